"""Every setting of a job, as frozen dataclasses. Defaults exist nowhere else. Standard library only.

A preset is a `dataclasses.replace` of the defaults; `to_json` and `from_json` keep the resolved settings beside a result.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field, replace

from .errors import InputError

REFERENCE_EXTENT = 1.2
"""Longest side of the reference silhouette in the object frame: this defines the frame's unit."""
HALF_FRAME = 0.75
"""Half side, at the origin, of what the conditioning view of the prior shows: the silhouette fills 80 % of it."""
HALF_BOX = 1.0
"""The field lives inside [-1, 1]³ of the object frame."""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class PictureConfig:
    """How the picture is read and its object cut out."""

    matting: str = "auto"
    """alpha, rembg, onnx, grabcut, or auto: alpha if it says anything, else rembg if its model is at hand, else grabcut."""
    matting_model: str = ""
    """Path of an ONNX matting model, for `onnx`."""
    max_pixels: int = 100_000_000
    """Larger pictures are refused before they are decoded."""
    max_side: int = 2048
    """The longest side is reduced to this many pixels after decoding; the texture takes its detail from here."""
    elevation_deg: float = 10.0
    """Camera height above the object's horizon, if no camera is given; product photos lie between 0 and 30."""
    is_elevation_known: bool = True
    """False lets the prior treat the elevation as a guess."""
    fov_deg: float = 40.0
    """Full angle of view of the picture's larger side, if no camera is given."""

    def __post_init__(self) -> None:
        _check(
            self.matting in ("auto", "alpha", "rembg", "onnx", "grabcut"),
            f"unknown matting {self.matting!r}: use auto, alpha, rembg, onnx or grabcut",
        )
        _check(
            -60 <= self.elevation_deg <= 89, f"elevation must be between -60 and 89 degrees, not {self.elevation_deg:g}"
        )
        _check(2 <= self.fov_deg <= 120, f"field of view must be between 2 and 120 degrees, not {self.fov_deg:g}")


@dataclass(frozen=True)
class FieldConfig:
    """The radiance field."""

    kind: str = "auto"
    """dense_volume, hash_grid, or auto: dense volume (fast on every device and enough for the embedded prior)."""
    resolution: int = 96
    """Cells along the longest side of the dense volume at its finest level."""
    coarsest: int = 12
    """Cells of the volume's coarsest level; levels double in between."""
    blob_density: float = 8.0
    """Raw density at the center of the initial softplus blob (Magic3D, arXiv:2211.10440, section 3.4)."""
    blob_radius: float = 0.45
    """Radius where the initial raw density crosses zero."""
    density_scale: float = 25.0
    """σ per world unit for a softplus output of one."""
    n_levels: int = 16
    """Hash grid: levels (instant-ngp, arXiv:2201.05989, table 1)."""
    n_features: int = 2
    """Hash grid: features a level."""
    log2_table: int = 19
    """Hash grid: entries of a level's table, as a power of two."""
    base_resolution: int = 16
    """Hash grid: cells of the coarsest level."""
    max_resolution: int = 2048
    """Hash grid: cells of the finest level."""
    start_levels: int = 6
    """Hash grid: levels active at the start; the rest joins during the first half (coarse to fine)."""
    hidden: int = 64
    """Hash grid: width of the MLPs."""
    encoder: str = "torch"
    """Hash grid: torch, triton or tinycudann (encoding only, fp32)."""


@dataclass(frozen=True)
class RenderConfig:
    """Volume rendering."""

    size: int = 64
    """Pixels a side of the views shown to the prior."""
    n_samples: int = 64
    """Samples a ray across the field's box."""
    occupancy_resolution: int = 48
    """Cells along a side of the occupancy grid."""
    occupancy_threshold: float = 0.01
    """Opacity over one sample step under which a cell counts as empty."""
    early_stop: float = 1e-4
    """Transmittance under which the rest of a ray is not evaluated (evaluation and previews only)."""
    max_points: int = 4_000_000
    """Points evaluated at once without gradient; more are done in chunks."""


@dataclass(frozen=True)
class ConstraintConfig:
    """The ConRad constraint (blog article, section 'Method'; arXiv:2311.05230, section 3)."""

    kind: str = "inferred_depth"
    """inferred_depth (the article's practical form), known_depth (its idealised form), or loss (no constraint, a picture
    loss instead, as RealFusion and NeuralLift-360 do: for comparison)."""
    fraction_start: float = 0.3
    """Share of a ray's opacity left behind the inferred surface at the start; the median would be 0.5."""
    fraction_end: float = 0.02
    """The same at the end. The article's rule is 0.05; a smaller share is closer to the picture."""
    delta: float = 0.02
    """Thickness behind the inferred surface that still takes the picture's color, world units."""
    shell_density: float = 150.0
    """λ of the known-depth form: opaque to 0.2 % across a shell of 2 δ with δ = 0.02."""
    softness: float = 0.0
    """Width of the transition at the surface, world units; 0 is a hard boundary."""
    depth_size: int = 128
    """Pixels along the longer side of the inferred depth map."""
    update_every: int = 2
    """Steps between two updates of the inferred depth."""
    dilate_px: float = 1.5
    """The mask is grown by this many pixels of the depth map before space outside it is emptied."""
    loss_weight: float = 2.0
    """Weight of the picture loss that replaces the constraint when kind is loss."""

    def __post_init__(self) -> None:
        _check(
            self.kind in ("inferred_depth", "known_depth", "loss"),
            f"unknown constraint {self.kind!r}: use inferred_depth, known_depth or loss",
        )
        _check(
            0 < self.fraction_end <= self.fraction_start < 1, "constraint fractions must satisfy 0 < end <= start < 1"
        )


@dataclass(frozen=True)
class EmbeddedPriorConfig:
    """The small view-conditioned prior that ships with the package."""

    scale: float = 2.0
    """Classifier-free guidance; 1 is none."""
    t_start: float = 0.98
    """Noise time at the start of the optimisation, 0 to 1."""
    t_end: float = 0.2
    """Noise time at its end."""
    t_spread: float = 0.05
    """Half width of the random range around it."""
    weights: str = ""
    """Path of other weights of the same architecture; the shipped ones when empty."""
    precision: str = "auto"
    """float32, bfloat16, or auto: bfloat16 where the processor multiplies it fast."""


@dataclass(frozen=True)
class StableDiffusionConfig:
    """Stable Diffusion 1.x, 2.x or XL through diffusers."""

    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Hub id or local folder in diffusers layout."""
    scale: float = 25.0
    t_min: float = 0.02
    t_start: float = 0.98
    t_end: float = 0.3
    negative_prompt: str = ""
    half_precision: bool = True


@dataclass(frozen=True)
class Zero123Config:
    """Zero-1-to-3, Zero123-XL or Stable Zero123 in diffusers layout."""

    model: str = "kxic/zero123-xl"
    """Hub id or local folder in diffusers layout."""
    variant: str = "zero123"
    """zero123 (also XL) or stable_zero123: the meaning of the pose vector's last number."""
    scale: float = 3.0
    t_min: float = 0.2
    t_start: float = 0.98
    t_end: float = 0.3
    half_precision: bool = True


GuidanceConfig = EmbeddedPriorConfig | StableDiffusionConfig | Zero123Config
GUIDANCES: dict[str, type] = {
    "embedded": EmbeddedPriorConfig,
    "stable_diffusion": StableDiffusionConfig,
    "zero123": Zero123Config,
}


@dataclass(frozen=True)
class OptimizeConfig:
    """The optimisation loop."""

    warm_start_views: int = 8
    """Views sampled jointly from the prior and fitted first; 0 starts with score distillation (embedded prior only)."""
    warm_start_sampling: int = 16
    """Denoising steps of these views."""
    warm_start_steps: int = 100
    """Optimisation steps on these views."""
    n_steps: int = 150
    """Steps of score distillation after it; 0 is allowed."""
    n_views: int = 2
    """Views a step."""
    rate: float = 0.06
    """Adam's learning rate of the dense volume."""
    hash_rate: float = 0.01
    """Adam's learning rate of the hash grid; its MLPs take a tenth."""
    elevation_min_deg: float = -10.0
    elevation_max_deg: float = 45.0
    range_grows_until: float = 0.3
    """Part of the run during which the azimuth range grows from near the picture to all around."""
    mask_weight: float = 2.0
    """Opacity against the mask, seen from the reference camera."""
    entropy_weight: float = 0.02
    """Pushes the opacity of pixels to 0 or 1."""
    smooth_weight: float = 1e-3
    """Squared differences of neighbouring cells, or of normals."""
    distortion_weight: float = 0.01
    """mip-NeRF 360 distortion (arXiv:2111.12077, eq. 15): draws the density of a ray together."""
    orientation_weight: float = 0.0
    """Normals that face away from the camera (Ref-NeRF, arXiv:2112.03907, eq. 11); hash grid only."""
    depth_weight: float = 0.0
    """Correlation with a relative depth map, decaying to nothing at half of the run."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    preview_every: int = 10
    """Steps between previews, at least."""


@dataclass(frozen=True)
class MeshConfig:
    """From field to textured mesh."""

    resolution: int = 160
    """Marching-cubes cells along the longest side of the object."""
    level: float = 0.0
    """Density of the surface; 0 chooses the level whose silhouette matches the mask best."""
    max_components: int = 1
    """Connected parts kept, largest first; 0 keeps every part that is not dust."""
    n_faces: int = 40_000
    """Face budget after decimation."""
    texture_size: int = 1024
    """Pixels a side."""
    facing_min: float = 0.25
    """Cosine between normal and viewing direction under which the photo is not used."""
    band_px: float = 8.0
    """Width of the blend between photo and field at the border of the visible part, picture pixels at 512 px."""
    padding_px: int = 8
    """Texels grown around every chart."""
    turntable_frames: int = 36
    turntable_size: int = 256

    def __post_init__(self) -> None:
        _check(16 <= self.resolution <= 1024, f"mesh resolution must be between 16 and 1024, not {self.resolution}")
        _check(64 <= self.texture_size <= 8192, f"texture size must be between 64 and 8192, not {self.texture_size}")
        _check(self.n_faces >= 100, f"the face budget must be at least 100, not {self.n_faces}")


@dataclass(frozen=True)
class PipelineConfig:
    """One job."""

    preset: str = "standard"
    seed: int = 0
    device: str = "auto"
    """auto (cuda, mps, cpu in this order), or a torch device."""
    threads: int = 0
    """CPU threads; 0 takes the processor's cores, at most 8."""
    prompt: str = ""
    picture: PictureConfig = field(default_factory=PictureConfig)
    field_: FieldConfig = field(default_factory=FieldConfig)
    render: RenderConfig = field(default_factory=RenderConfig)
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)
    guidance: GuidanceConfig = field(default_factory=EmbeddedPriorConfig)
    optimize: OptimizeConfig = field(default_factory=OptimizeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def _preset(name: str, steps: OptimizeConfig, volume: FieldConfig, mesh: MeshConfig) -> PipelineConfig:
    return PipelineConfig(preset=name, optimize=steps, field_=volume, mesh=mesh)


PRESETS: dict[str, PipelineConfig] = {
    "draft": _preset(
        "draft",
        OptimizeConfig(warm_start_views=6, warm_start_sampling=12, warm_start_steps=80, n_steps=60, n_views=1),
        FieldConfig(resolution=64, coarsest=8),
        MeshConfig(resolution=128, n_faces=20_000, texture_size=1024),
    ),
    "standard": PipelineConfig(),
    "fine": _preset(
        "fine",
        OptimizeConfig(warm_start_views=12, warm_start_sampling=32, warm_start_steps=200, n_steps=600, n_views=4),
        FieldConfig(resolution=128, coarsest=16),
        MeshConfig(resolution=256, n_faces=100_000, texture_size=2048),
    ),
}


def preset(name: str) -> PipelineConfig:
    """The settings of a preset.

    Raises:
        InputError: No preset has this name.
    """
    _check(name in PRESETS, f"unknown preset {name!r}: use {', '.join(PRESETS)}")
    return PRESETS[name]


def with_overrides(config: PipelineConfig, overrides: dict[str, object]) -> PipelineConfig:
    """The settings with some replaced, by dotted names such as `optimize.n_steps`; values may be text.

    `guidance` itself takes a name of `GUIDANCES` and must come before its own fields.

    Raises:
        InputError: A name does not exist or a value does not fit its type.
    """
    for name, value in overrides.items():
        config = _with_override(config, name, name.replace("field.", "field_.", 1).split("."), value)
    return config


def _with_override(config: typing.Any, full_name: str, path: list[str], value: object) -> typing.Any:
    names = {f.name: f for f in dataclasses.fields(config)}
    _check(path[0] in names, f"unknown setting {full_name!r}; this part has: {', '.join(n.rstrip('_') for n in names)}")
    current = getattr(config, path[0])
    if len(path) > 1:
        _check(dataclasses.is_dataclass(current), f"setting {full_name!r} has no parts")
        return replace(config, **{path[0]: _with_override(current, full_name, path[1:], value)})
    if path[0] == "guidance" and not dataclasses.is_dataclass(value):
        _check(value in GUIDANCES, f"unknown guidance {value!r}: use {', '.join(GUIDANCES)}")
        return replace(config, guidance=GUIDANCES[str(value)]())
    _check(not dataclasses.is_dataclass(current), f"setting {full_name!r} is a group; name one of its parts")
    return replace(config, **{path[0]: _converted(full_name, value, type(current))})


def _converted(name: str, value: object, kind: type) -> object:
    try:
        if kind is bool:
            text = str(value).lower()
            if text not in ("true", "false", "1", "0"):
                raise ValueError
            return text in ("true", "1")
        if kind is int and (isinstance(value, bool) or float(value) != int(float(value))):  # type: ignore[arg-type]
            raise ValueError
        result = kind(float(value)) if kind is int else kind(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"setting {name} must be {kind.__name__}, not {value!r}") from None
    if kind is float and not math.isfinite(result):  # type: ignore[arg-type]
        raise InputError(f"setting {name} must be a finite number, not {value!r}")
    return result


def to_json(config: PipelineConfig) -> dict:
    data = dataclasses.asdict(config)
    data["guidance"]["kind"] = next(name for name, kind in GUIDANCES.items() if isinstance(config.guidance, kind))
    return data


def from_json(data: dict) -> PipelineConfig:
    """Settings from `to_json`'s data; unknown fields are an error, missing ones take their default."""
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    kind = data.get("guidance", {}).pop("kind", "embedded")
    _check(kind in GUIDANCES, f"unknown guidance {kind!r}: use {', '.join(GUIDANCES)}")
    config = replace(PipelineConfig(), guidance=GUIDANCES[kind]())
    for key, value in data.items():
        if isinstance(value, dict):
            config = with_overrides(config, {f"{key}.{inner}": x for inner, x in value.items()})
        else:
            config = with_overrides(config, {key: value})
    return config
