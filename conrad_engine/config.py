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
AUTO = "auto"
"""An elevation on the command line that is to be guessed from the picture."""


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
    """Steps between two updates of the inferred depth."""
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
class EmbeddedPriorConfig:
    """The small view-conditioned prior that ships with the package."""

    scale: float = 1.5
    """Classifier-free guidance; 1 is none."""
    t_start: float = 0.6
    """Noise time at the start of the distillation, 0 to 1; after a warm start more would undo it, without one take 0.98."""
    t_end: float = 0.15
    """Noise time at its end."""
    t_spread: float = 0.05
    """Half width of the random range around it."""
    weights: str = ""
    """Path of other weights of the same architecture; the shipped ones when empty."""
    precision: str = "auto"
    """float32, bfloat16, or auto: bfloat16 where the processor multiplies it fast."""


@dataclass(frozen=True)
class WeightsConfig:
    """How the weights of a diffusers model are found, trusted and held."""

    revision: str = ""
    """Branch, tag or commit on the hub; the default branch when empty."""
    allow_pickle: bool = False
    """True also reads .bin files. These are pickles: opening one runs whatever program its author put inside. Only for files
    you trust as much as the programs you install."""
    precision: str = "auto"
    """float32, float16, bfloat16, or auto: float16 on a GPU, float32 on a CPU."""
    memory: str = "auto"
    """Memory preset in GiB: 6, 8, 12, 24, or auto: the largest that fits the device's free memory."""
    compile: bool = False
    """On a GPU, compile the networks: a tenth to a fifth faster, for a minute or two before the first step (once: the result
    is kept); worth it from some thousand steps on."""
    tiny_autoencoder: str = ""
    """Hub id or folder of a tiny autoencoder (`madebyollin/taesd`); empty keeps the model's own. Faster, less exact."""

    def __post_init__(self) -> None:
        _check(
            self.precision in ("auto", "float32", "float16", "bfloat16"),
            f"unknown precision {self.precision!r}: use auto, float32, float16 or bfloat16",
        )
        _check(
            self.memory in ("auto", "6", "8", "12", "24"),
            f"unknown memory preset {self.memory!r}: use auto, 6, 8, 12 or 24",
        )


def _check_diffusion(config: StableDiffusionConfig | Zero123Config) -> None:
    _check(bool(config.model), "the guidance needs a model: a hub id or a folder in diffusers layout")
    _check(
        0 < config.t_min <= config.t_end <= config.t_start < 1,
        f"noise times must satisfy 0 < t_min <= t_end <= t_start < 1, not {config.t_min}, {config.t_end}, {config.t_start}",
    )
    _check(
        config.schedule in ("uniform", "linear", "sqrt", "deterministic", "dreamtime"),
        f"unknown schedule {config.schedule!r}: use uniform, linear, sqrt, deterministic or dreamtime",
    )
    _check(
        config.weighting in ("sds", "uniform", "fantasia3d", "ism"),
        f"unknown weighting {config.weighting!r}: use sds, uniform, fantasia3d or ism",
    )
    _check(config.strength > 0, f"the guidance's strength must be positive, not {config.strength}")


@dataclass(frozen=True)
class StableDiffusionConfig:
    """Stable Diffusion 1.x, 2.x or XL through diffusers."""

    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Hub id or local folder in diffusers layout."""
    scale: float = 25.0
    """Classifier-free guidance; DreamFusion used 100, which saturates colors beside an exact photo; 7.5 with ism."""
    objective: str = "sds"
    """sds (DreamFusion) or ism (LucidDreamer, works at a scale of 7.5, costs ism_steps more evaluations)."""
    weighting: str = "sds"
    """w(t): sds, uniform, fantasia3d or ism."""
    schedule: str = "sqrt"
    """Noise times: uniform, linear, sqrt, deterministic or dreamtime."""
    t_min: float = 0.02
    t_start: float = 0.98
    """Upper end of the noise times at the start, 0 to 1."""
    t_end: float = 0.3
    """The same at the end."""
    strength: float = 1.0
    """Factor on the gradient, against the other losses."""
    negative_prompt: str = ""
    """What the pictures must not show; replaces the empty prompt of classifier-free guidance."""
    view_prompts: bool = True
    """Adds front, side, back or overhead view to the prompt, interpolated by the camera's angles."""
    perp_neg: bool = True
    """Pushes back and side views away from the front by Perp-Neg: against several faces; two more evaluations a step."""
    ism_interval: float = 0.05
    """ism: distance of the two noise times."""
    ism_steps: int = 4
    """ism: inversion steps from the picture to the first noise time."""
    background: str = "random"
    """Behind the rendered object: random (one gray or color a view), or white."""
    picture_size: int = 0
    """Pixels a side given to the autoencoder; 0 takes the model's own (512, 768 or 1024)."""
    ip_adapter: str = ""
    """Hub id or folder of an IP-Adapter, so that the picture itself is a prompt (`h94/IP-Adapter`); empty for none."""
    ip_adapter_file: str = "models/ip-adapter_sd15.safetensors"
    """The adapter's file in it; `sdxl_models/ip-adapter_sdxl.safetensors` for XL."""
    ip_adapter_scale: float = 0.6
    """Influence of the picture against the text, 0 to 1."""
    embedding: str = ""
    """Textual-inversion embedding (.safetensors) whose token the prompt may name."""
    word_steps: int = 0
    """Steps of textual inversion that learn a word for the picture first, to be the prompt (RealFusion); 0 learns none."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)

    def __post_init__(self) -> None:
        _check_diffusion(self)
        _check(self.objective in ("sds", "ism"), f"unknown objective {self.objective!r}: use sds or ism")
        _check(self.background in ("random", "white"), f"unknown background {self.background!r}: use random or white")
        _check(0 < self.ism_interval < 1, f"ism_interval must lie between 0 and 1, not {self.ism_interval}")
        _check(self.ism_steps >= 1, f"ism_steps must be at least 1, not {self.ism_steps}")
        _check(self.word_steps >= 0, f"word_steps must not be negative, not {self.word_steps}")
        _check(
            self.picture_size == 0 or (self.picture_size >= 16 and self.picture_size % 8 == 0),
            f"picture_size must be 0 or a multiple of 8 from 16 on, not {self.picture_size}",
        )


@dataclass(frozen=True)
class Zero123Config:
    """Zero-1-to-3, Zero123-XL or Stable Zero123 in diffusers layout."""

    model: str = "kxic/zero123-xl"
    """Hub id or local folder in diffusers layout, with a `cc_projection` or `clip_camera_projection` component."""
    variant: str = "zero123"
    """zero123 (also XL) or stable_zero123: the meaning of the pose vector's last number."""
    scale: float = 3.0
    """Classifier-free guidance."""
    weighting: str = "sds"
    """w(t): sds, uniform, fantasia3d or ism."""
    schedule: str = "linear"
    """Noise times: uniform, linear, sqrt, deterministic or dreamtime."""
    t_min: float = 0.2
    t_start: float = 0.98
    """Upper end of the noise times at the start, 0 to 1."""
    t_end: float = 0.3
    """The same at the end."""
    strength: float = 1.0
    """Factor on the gradient, against the other losses."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)

    def __post_init__(self) -> None:
        _check_diffusion(self)
        _check(
            self.variant in ("zero123", "stable_zero123"),
            f"unknown variant {self.variant!r}: use zero123 (also for XL) or stable_zero123",
        )


@dataclass(frozen=True)
class MixtureConfig:
    """Several priors at once. A prior whose weights are 0 is not loaded. The defaults are Magic123's ratio, 1 : 40."""

    embedded_start: float = 0.0
    """Weight of the embedded prior's gradient at the start; it changes linearly to embedded_end."""
    embedded_end: float = 0.0
    zero123_start: float = 40.0
    """The same for Zero123 (Magic123, arXiv:2306.17843, section 3.2: 40 against 1)."""
    zero123_end: float = 40.0
    zero123_fine: float = 1.0
    """Factor on Zero123's weight in the fine stage; Magic123's code goes from 40 against 1 to 10 against 1."""
    stable_diffusion_start: float = 1.0
    """The same for Stable Diffusion."""
    stable_diffusion_end: float = 1.0
    spare_seen: float = 0.0
    """Part of the gradient taken away where the photo already shows the surface, 0 to 1."""
    embedded: EmbeddedPriorConfig = field(default_factory=EmbeddedPriorConfig)
    zero123: Zero123Config = field(default_factory=Zero123Config)
    stable_diffusion: StableDiffusionConfig = field(default_factory=StableDiffusionConfig)

    def __post_init__(self) -> None:
        pairs = [(getattr(self, f"{name}_start"), getattr(self, f"{name}_end")) for name in self.parts]
        _check(all(weight >= 0 for pair in pairs for weight in pair), "the weights of a mixture must not be negative")
        _check(any(weight > 0 for pair in pairs for weight in pair), "a mixture needs at least one positive weight")
        _check(self.zero123_fine >= 0, f"zero123_fine must not be negative, not {self.zero123_fine:g}")
        _check(0 <= self.spare_seen <= 1, f"spare_seen must lie between 0 and 1, not {self.spare_seen}")

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the priors, each with its settings and the weights `<name>_start` and `<name>_end`."""
        return ("embedded", "zero123", "stable_diffusion")


GuidanceConfig = EmbeddedPriorConfig | StableDiffusionConfig | Zero123Config | MixtureConfig
GUIDANCES: dict[str, type] = {
    "embedded": EmbeddedPriorConfig,
    "stable_diffusion": StableDiffusionConfig,
    "zero123": Zero123Config,
    "mixture": MixtureConfig,
}


@dataclass(frozen=True)
class SeedingConfig:
    """The models around the optimisation, each used only when asked for: a picture from text, an edit of the picture
    first, its caption, its depth."""

    text_to_image: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Any text-to-image model in diffusers layout."""
    text_suffix: str = ", a single object, centered, whole object in the frame, plain white background"
    """Added to the prompt, so that the object can be cut out of the picture."""
    text_steps: int = 30
    text_scale: float = 7.5
    edit_method: str = "edict"
    """edict (exact inversion of any Stable Diffusion 1.x or 2.x, `edit_model`), or instruct (an instruction model)."""
    edit_model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """For edict; it reads a description of the picture wanted."""
    instruct_model: str = "timbrooks/instruct-pix2pix"
    """For instruct; it reads what to change."""
    edit_steps: int = 50
    edit_scale: float = 3.0
    """Classifier-free guidance of edict (arXiv:2211.12446, section 4.1); an instruction model takes text_scale."""
    edit_strength: float = 0.8
    """edict: how far the picture is taken back to noise; 1 is all the way."""
    edict_mixing: float = 0.93
    """edict: p of the coupled transformations (arXiv:2211.12446, section 3.2)."""
    picture_scale: float = 1.5
    """instruct: guidance by the picture (arXiv:2211.09800, section 3.2.1)."""
    caption_model: str = "Salesforce/blip-image-captioning-base"
    """Any image-to-text model of transformers."""
    depth_model: str = "depth-anything/Depth-Anything-V2-Small-hf"
    """Any depth-estimation model of transformers."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)

    def __post_init__(self) -> None:
        _check(
            self.edit_method in ("edict", "instruct"),
            f"unknown edit method {self.edit_method!r}: use edict or instruct",
        )
        _check(0 < self.edit_strength <= 1, f"edit_strength must lie between 0 and 1, not {self.edit_strength:g}")
        _check(0.5 < self.edict_mixing <= 1, f"edict_mixing must lie between 0.5 and 1, not {self.edict_mixing:g}")
        _check(self.text_steps >= 1 and self.edit_steps >= 1, "text_steps and edit_steps must be at least 1")


@dataclass(frozen=True)
class ClipConfig:
    """New views are to look like the picture to CLIP (NeuralLift-360, arXiv:2211.16431), besides what the prior wants."""

    weight: float = 0.0
    """Of the loss in views from the front; NeuralLift-360's code has 1. CLIP is not loaded where both weights are 0."""
    weight_aside: float = 0.0
    """The same in views turned away more than 60 degrees; NeuralLift-360 has half there, of another such loss."""
    model: str = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    """Hub id or local folder of any CLIP model in the layout of transformers."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """Its precision is always float32."""

    def __post_init__(self) -> None:
        _check(self.weight >= 0 and self.weight_aside >= 0, "the weights of CLIP's loss must not be negative")
        _check(bool(self.model), "clip.model must be a hub id or a folder")

    @property
    def is_used(self) -> bool:
        return self.weight > 0 or self.weight_aside > 0


@dataclass(frozen=True)
class OptimizeConfig:
    """The optimisation loop."""

    warm_start_views: int = 12
    """Views sampled jointly from the prior and fitted first; 0 starts with score distillation (embedded prior only)."""
    warm_start_rings: int = 1
    """Times these views are sampled, from places between each other's: more average more guesses of the prior."""
    warm_start_sampling: int = 20
    """Denoising steps of these views."""
    warm_start_steps: int = 120
    """Optimisation steps on these views."""
    carve: bool = True
    """Start from the visual hull of these views instead of the blob."""
    n_steps: int = 150
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
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        _check(
            self.n_gpus >= 1 and (self.n_gpus == 1 or self.n_views % self.n_gpus == 0),
            f"the {self.n_views} views of a step cannot be shared by {self.n_gpus} GPUs: set optimize.n_views to a multiple",
        )
        _check(
            self.fine_steps == 0 or (self.fine_steps > 0 and self.n_steps > 0),
            f"optimize.fine_steps must be 0 or more, and needs optimize.n_steps before it, not {self.fine_steps}",
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
    """Connected parts kept, largest first; 0 keeps every part that is not dust."""
    n_faces: int = 40_000
    """Face budget after decimation."""
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
    detail_views: int = 10
    """Views around the finished mesh whose blurred parts are redrawn with detail and painted on the texture, whatever the
    guidance was; 0 leaves the texture as the field has it. Not with `project_only`, nor where the picture is only a loss."""
    detail_steps: int = 8
    """Denoising steps of each of these views."""
    detail_weights: str = ""
    """Path of other weights of the detail model; the shipped ones when empty."""
    turntable_frames: int = 36
    turntable_size: int = 256

    def __post_init__(self) -> None:
        _check(16 <= self.resolution <= 1024, f"mesh resolution must be between 16 and 1024, not {self.resolution}")
        _check(64 <= self.texture_size <= 8192, f"texture size must be between 64 and 8192, not {self.texture_size}")
        _check(self.detail_views >= 0, f"mesh.detail_views must not be negative: {self.detail_views}")
        _check(self.detail_steps >= 1, f"mesh.detail_steps must be at least 1, not {self.detail_steps}")
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
    clip: ClipConfig = field(default_factory=ClipConfig)
    optimize: OptimizeConfig = field(default_factory=OptimizeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seeding: SeedingConfig = field(default_factory=SeedingConfig)


def _preset(name: str, steps: OptimizeConfig, volume: FieldConfig, mesh: MeshConfig) -> PipelineConfig:
    return PipelineConfig(preset=name, optimize=steps, field_=volume, mesh=mesh)


PRESETS: dict[str, PipelineConfig] = {
    "draft": _preset(
        "draft",
        OptimizeConfig(warm_start_views=8, warm_start_sampling=12, warm_start_steps=80, n_steps=80, n_views=1),
        FieldConfig(resolution=64, coarsest=8),
        MeshConfig(resolution=128, n_faces=20_000, texture_size=1024, detail_views=5),
    ),
    "standard": PipelineConfig(),
    "fine": _preset(
        "fine",
        OptimizeConfig(warm_start_views=16, warm_start_sampling=32, warm_start_steps=250, n_steps=500, n_views=4),
        FieldConfig(resolution=128, coarsest=16),
        MeshConfig(resolution=256, n_faces=100_000, texture_size=2048, detail_views=14, detail_steps=12),
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
