"""Every setting of a job, as frozen dataclasses. Defaults exist nowhere else. Standard library only.

A preset is a `dataclasses.replace` of the defaults; `to_json` and `from_json` keep the resolved settings beside a result.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field, replace

from .errors import InputError
from .errors import check as _check
from .model_config import (  # noqa: F401  all settings have their names here
    GUIDANCES,
    ClipConfig,
    EmbeddedPriorConfig,
    GuidanceConfig,
    MixtureConfig,
    SeedingConfig,
    StableDiffusionConfig,
    WeightsConfig,
    Zero123Config,
)

REFERENCE_EXTENT = 1.2
"""Longest side of the reference silhouette in the object frame: this defines the frame's unit. Up to a tenth less where the
silhouette lies beside the origin (`preprocess.framing`)."""
HALF_FRAME = 0.75
"""Half side, at the origin, of what the conditioning view of the prior shows: the silhouette fills up to 80 % of it."""
HALF_BOX = 1.0
"""The field lives inside [-1, 1]³ of the object frame."""
AUTO = "auto"
"""An elevation on the command line that is to be guessed from the picture."""


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
    guess_elevation: bool = True
    """Estimate the elevation from the picture, if no camera is given; elevation_deg then is for pictures that do not say it.
    Setting elevation_deg by name switches this off."""
    is_elevation_known: bool = True
    """False has the prior look at the picture without being told its elevation. What was guessed sets it by itself."""
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
    """Hash grid: torch, triton, tinycudann (encoding only, fp32), or auto: triton on CUDA, else torch."""
    fused_heads: bool = True
    """Hash grid encoded by triton: both MLPs in one kernel, factors in 16 bits (`benchmark field` prints its errors)."""


@dataclass(frozen=True)
class RenderConfig:
    """Volume rendering."""

    size: int = 64
    """Pixels a side of the views shown to the prior."""
    fine_size: int = 256
    """The same in the fine stage."""
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
    fraction_end: float = 0.05
    """The same at the end: the article's rule."""
    delta: float = 0.02
    """Thickness behind the inferred surface that still takes the picture's color, world units."""
    shell_density: float = 150.0
    """λ of the shell: opaque to 0.2 % across 2 δ with δ = 0.02."""
    shell_from: float = 1.0
    """Part of the run after which the inferred form has the shell too, so that every pixel of the object is opaque: 1 is the
    finished field only (a shell in a surface that still moves would hold it back), above 1 is never."""
    softness: float = 0.0
    """Width of the transition at the surface, world units; 0 is a hard boundary."""
    depth_size: int = 128
    """Pixels along the longer side of the inferred depth map."""
    update_every: int = 2
    """Steps between two updates of the inferred depth; more in runs of more than some hundred steps."""
    dilate_px: float = 1.5
    """The mask is grown by this many pixels, of 512 along the longer side, before space outside it is emptied."""
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
class OptimizeConfig:
    """The optimisation loop."""

    warm_start_views: int = 12
    """Views sampled jointly from the embedded prior, whatever the guidance is, and fitted first; 0 starts with score
    distillation."""
    warm_start_sampling: int = 12
    """Denoising steps of these views."""
    warm_start_drafts: int = 4
    """Draws of noise that agree on their layout first: with more of them the object is likelier, and it takes longer."""
    warm_start_temperature: float = 0.8
    """Width of that noise, 0 to 1: below 1 the object is likelier, too, and plainer."""
    warm_start_steps: int = 120
    """Optimisation steps on these views."""
    carve: bool = True
    """Start from the visual hull of these views instead of the blob."""
    n_steps: int = 300
    """Steps of score distillation after it; 0 is allowed."""
    fine_steps: int = 0
    """Steps of a fine stage after them: the same field, seen in larger views (render.fine_size), and learning rates that
    start again. Works with every prior; Magic123 has such a stage, on a mesh."""
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
    symmetry: bool = True
    """Where the object is found to be symmetric (`symmetry.py`), the mirrored picture shows its other side. Needs the object's
    center, from the camera file; not with several pictures."""
    axis_aligned: bool = True
    """The thing stands square to the axes of the world that the camera is in, as most do: the likelier one is its plane of
    symmetry, unless the prior sees one far from them, and the thing's box lies along them (`mesh.centered`)."""
    entropy_weight: float = 0.02
    """Pushes the opacity of pixels to 0 or 1."""
    smooth_weight: float = 1e-3
    """Squared differences of neighbouring cells, or of normals."""
    distortion_weight: float = 0.01
    """mip-NeRF 360 distortion (arXiv:2111.12077, eq. 15): draws the density of a ray together."""
    depth_weight: float = 0.0
    """Agreement with a relative depth map, decaying to nothing at half of the run."""
    depth_loss: str = "correlation"
    """How it is measured: correlation (Pearson's), or ranking (the order of all pairs of rays, as NeuralLift-360)."""
    capture: str = "auto"
    """auto captures a step in a CUDA graph where there is CUDA (as fast as the GPU, needs memory of its own), off does not."""
    n_gpus: int = 1
    """GPUs that share the views of a step, which they must divide; on a CPU, processes."""
    checkpoint_every: int = 50
    """Steps between checkpoints; more, where steps are fast: there are at least five seconds between two."""

    def __post_init__(self) -> None:
        _check(
            self.n_gpus >= 1 and (self.n_gpus == 1 or self.n_views % self.n_gpus == 0),
            f"the {self.n_views} views of a step cannot be shared by {self.n_gpus} GPUs: set optimize.n_views to a multiple",
        )
        _check(
            self.fine_steps == 0 or (self.fine_steps > 0 and self.n_steps > 0),
            f"optimize.fine_steps must be 0 or more, and needs optimize.n_steps before it, not {self.fine_steps}",
        )
        _check(
            self.warm_start_drafts >= 1 and 0 <= self.warm_start_temperature <= 1,
            "optimize.warm_start_drafts must be at least 1, and optimize.warm_start_temperature between 0 and 1",
        )
        _check(self.capture in ("auto", "off"), f"unknown capture {self.capture!r}: use auto or off")
        _check(
            self.depth_loss in ("correlation", "ranking"),
            f"unknown depth loss {self.depth_loss!r}: use correlation or ranking",
        )


@dataclass(frozen=True)
class MeshConfig:
    """From field to textured mesh."""

    resolution: int = 160
    """Marching-cubes cells along the longest side of the object."""
    level: float = 0.0
    """Density of the surface; 0 chooses the level whose silhouette matches the mask best."""
    max_components: int = 1
    """Connected parts kept, largest first, and what the picture shows apart from them; 0 keeps every part that is not dust."""
    n_faces: int = 40_000
    """Face budget after decimation."""
    fairing: float = 1.0
    """Lumps of the surface up to about four times this are taken off, pixels of the views that formed it; 0 leaves them."""
    round_bars: bool = True
    """Makes straight slender parts as deep as the picture shows them wide (`mesh/bars.py`); not with several pictures."""
    texture_size: int = 1024
    """Pixels a side."""
    facing_min: float = 0.05
    """Cosine between normal and viewing direction under which the photo is not used."""
    band_px: float = 8.0
    """Width of the blend between photo and field at the border of the visible part, picture pixels at 512 px."""
    padding_px: int = 8
    """Texels grown around every chart."""
    project_only: bool = False
    """Puts the picture on the initial mesh as it is: nothing is optimised and no surface is extracted."""
    centered: bool = True
    """Scales the finished mesh from the reference camera, which does not see it, until its middle is as deep as the object's
    center; parts that came out before or behind what they touch in the picture are brought beside it first. Not where a
    metric depth map or an initial mesh says how deep it lies; a mesh that a mirrored picture helped to form is not scaled."""
    detail_views: int = 10
    """Views around the finished mesh whose blurred parts are redrawn with detail and painted on the texture, whatever the
    guidance was; 0 leaves the texture as the field has it. Not with `project_only`, nor where the picture is only a loss."""
    detail_steps: int = 8
    """Denoising steps of each of these views."""
    detail_temperature: float = 1.0
    """Width of the noise that they start from, 0 to 1: 1 draws the most detail, and the most that is not there."""
    detail_weights: str = ""
    """Path of other weights of the detail model; the shipped ones when empty."""
    turntable_frames: int = 36
    turntable_size: int = 256

    def __post_init__(self) -> None:
        _check(16 <= self.resolution <= 1024, f"mesh resolution must be between 16 and 1024, not {self.resolution}")
        _check(64 <= self.texture_size <= 8192, f"texture size must be between 64 and 8192, not {self.texture_size}")
        _check(self.detail_views >= 0, f"mesh.detail_views must not be negative: {self.detail_views}")
        _check(
            0 <= self.detail_temperature <= 1,
            f"mesh.detail_temperature must lie between 0 and 1: {self.detail_temperature}",
        )
        _check(self.detail_steps >= 1, f"mesh.detail_steps must be at least 1, not {self.detail_steps}")
        _check(self.n_faces >= 100, f"the face budget must be at least 100, not {self.n_faces}")
        _check(0 <= self.fairing <= 8, f"mesh.fairing must lie between 0 and 8: {self.fairing}")


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
    clip: ClipConfig = field(default_factory=ClipConfig)
    optimize: OptimizeConfig = field(default_factory=OptimizeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seeding: SeedingConfig = field(default_factory=SeedingConfig)


PRESETS: dict[str, PipelineConfig] = {
    "draft": PipelineConfig(
        preset="draft",
        optimize=OptimizeConfig(
            warm_start_views=8, warm_start_sampling=8, warm_start_drafts=2, warm_start_steps=80, n_steps=80, n_views=1
        ),
        # So few steps would not settle what more noise stirs up.
        guidance=EmbeddedPriorConfig(t_start=0.6, t_end=0.15),
        field_=FieldConfig(resolution=64, coarsest=8),
        mesh=MeshConfig(resolution=128, n_faces=20_000, texture_size=1024, detail_views=5),
    ),
    "standard": PipelineConfig(),
    "fine": PipelineConfig(
        preset="fine",
        optimize=OptimizeConfig(
            warm_start_views=16,
            warm_start_sampling=20,
            warm_start_drafts=8,
            warm_start_steps=250,
            n_steps=500,
            n_views=4,
        ),
        # The field stays as it is: views of 64 pixels do not hold the surface of finer cells still.
        mesh=MeshConfig(resolution=256, n_faces=100_000, texture_size=2048, detail_views=14, detail_steps=12),
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

    `guidance` itself takes a name of `GUIDANCES`; its own fields are set after it, and kept if it is of this kind already.

    Raises:
        InputError: A name does not exist or a value does not fit its type.
    """
    rest = dict(overrides)
    if "picture.elevation_deg" in rest:  # whoever names an elevation wants that one
        rest.setdefault("picture.guess_elevation", False)
    kind = rest.pop("guidance", config.guidance)
    if not dataclasses.is_dataclass(kind):
        _check(kind in GUIDANCES, f"unknown guidance {kind!r}: use {', '.join(GUIDANCES)}")
        named = GUIDANCES[str(kind)]
        kind = config.guidance if isinstance(config.guidance, named) else named()
    groups: dict[str, object] = {}
    for name, value in rest.items():
        _insert(groups, name, value)
    return _replaced(replace(config, guidance=kind), "", groups)


def _insert(groups: dict[str, typing.Any], name: str, value: object) -> None:
    *path, last = name.split(".")
    for part in path:
        groups = groups.setdefault(part, {})
        _check(isinstance(groups, dict), f"setting {name!r} has no parts")
    groups[last] = value


def _replaced(config: typing.Any, prefix: str, values: dict[str, typing.Any]) -> typing.Any:
    """All values of one group at once, so that only the result has to be valid."""
    names = {f.name.rstrip("_"): f.name for f in dataclasses.fields(config)}
    changes = {}
    for key, value in values.items():
        full_name = prefix + key
        name = names.get(key.rstrip("_"))
        _check(name is not None, f"unknown setting {full_name!r}; this part has: {', '.join(names)}")
        current = getattr(config, name)
        if isinstance(value, dict):
            _check(dataclasses.is_dataclass(current), f"setting {full_name!r} has no parts")
            changes[name] = _replaced(current, f"{full_name}.", value)
        else:
            _check(not dataclasses.is_dataclass(current), f"setting {full_name!r} is a group; name one of its parts")
            changes[name] = _converted(full_name, value, type(current))
    return replace(config, **changes)


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


def _flattened(prefix: str, data: dict) -> dict[str, object]:
    """Nested settings as dotted names."""
    flat: dict[str, object] = {}
    for key, value in data.items():
        flat |= _flattened(f"{prefix}.{key}", value) if isinstance(value, dict) else {f"{prefix}.{key}": value}
    return flat


def from_json(data: dict) -> PipelineConfig:
    """Settings from `to_json`'s data; unknown fields are an error, missing ones take their default."""
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    kind = data.get("guidance", {}).pop("kind", "embedded")
    _check(kind in GUIDANCES, f"unknown guidance {kind!r}: use {', '.join(GUIDANCES)}")
    config = replace(PipelineConfig(), guidance=GUIDANCES[kind]())
    for key, value in data.items():
        if isinstance(value, dict):
            config = with_overrides(config, _flattened(key, value))
        else:
            config = with_overrides(config, {key: value})
    return config
