"""Settings of everything that reads a generative model: priors, and what stands before or beside them. Standard library only.

`config` has the rest, and all of these under their names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import check


@dataclass(frozen=True)
class EmbeddedPriorConfig:
    """The small view-conditioned prior that ships with the package."""

    scale: float = 1.5
    """Classifier-free guidance; 1 is none."""
    t_start: float = 0.8
    """Noise time at the start of the distillation, 0 to 1; after a warm start more would undo it, without one take 0.98."""
    t_end: float = 0.3
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
    """On a GPU, compile the UNet and search for fast convolutions: steps a tenth faster, for a minute or two before the first
    one (once, but for ten seconds: the result is kept); worth it from some thousand steps on."""
    tiny_autoencoder: str = ""
    """Hub id or folder of a tiny autoencoder (`madebyollin/taesd`); empty keeps the model's own. Faster, less exact."""

    def __post_init__(self) -> None:
        check(
            self.precision in ("auto", "float32", "float16", "bfloat16"),
            f"unknown precision {self.precision!r}: use auto, float32, float16 or bfloat16",
        )
        check(
            self.memory in ("auto", "6", "8", "12", "24"),
            f"unknown memory preset {self.memory!r}: use auto, 6, 8, 12 or 24",
        )


def _check_diffusion(config: StableDiffusionConfig | Zero123Config) -> None:
    check(bool(config.model), "the guidance needs a model: a hub id or a folder in diffusers layout")
    check(
        0 < config.t_min <= config.t_end <= config.t_start < 1,
        f"noise times must satisfy 0 < t_min <= t_end <= t_start < 1, not {config.t_min}, {config.t_end}, {config.t_start}",
    )
    check(
        config.schedule in ("uniform", "linear", "sqrt", "deterministic", "dreamtime"),
        f"unknown schedule {config.schedule!r}: use uniform, linear, sqrt, deterministic or dreamtime",
    )
    check(
        config.weighting in ("sds", "uniform", "fantasia3d", "ism"),
        f"unknown weighting {config.weighting!r}: use sds, uniform, fantasia3d or ism",
    )
    check(config.strength > 0, f"the guidance's strength must be positive, not {config.strength}")


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
        check(self.objective in ("sds", "ism"), f"unknown objective {self.objective!r}: use sds or ism")
        check(self.background in ("random", "white"), f"unknown background {self.background!r}: use random or white")
        check(0 < self.ism_interval < 1, f"ism_interval must lie between 0 and 1, not {self.ism_interval}")
        check(self.ism_steps >= 1, f"ism_steps must be at least 1, not {self.ism_steps}")
        check(self.word_steps >= 0, f"word_steps must not be negative, not {self.word_steps}")
        check(
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
        check(
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
        check(all(weight >= 0 for pair in pairs for weight in pair), "the weights of a mixture must not be negative")
        check(any(weight > 0 for pair in pairs for weight in pair), "a mixture needs at least one positive weight")
        check(self.zero123_fine >= 0, f"zero123_fine must not be negative, not {self.zero123_fine:g}")
        check(0 <= self.spare_seen <= 1, f"spare_seen must lie between 0 and 1, not {self.spare_seen}")

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the priors, each with its settings and the weights `<name>_start` and `<name>_end`."""
        return ("embedded", "zero123", "stable_diffusion")


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
        check(
            self.edit_method in ("edict", "instruct"),
            f"unknown edit method {self.edit_method!r}: use edict or instruct",
        )
        check(0 < self.edit_strength <= 1, f"edit_strength must lie between 0 and 1, not {self.edit_strength:g}")
        check(0.5 < self.edict_mixing <= 1, f"edict_mixing must lie between 0.5 and 1, not {self.edict_mixing:g}")
        check(self.text_steps >= 1 and self.edit_steps >= 1, "text_steps and edit_steps must be at least 1")


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
    """Of these only `revision` and `allow_pickle` count here; CLIP is small and runs in float32."""

    def __post_init__(self) -> None:
        check(self.weight >= 0 and self.weight_aside >= 0, "the weights of CLIP's loss must not be negative")
        check(bool(self.model), "clip.model must be a hub id or a folder")

    @property
    def is_used(self) -> bool:
        return self.weight > 0 or self.weight_aside > 0


GuidanceConfig = EmbeddedPriorConfig | StableDiffusionConfig | Zero123Config | MixtureConfig
GUIDANCES: dict[str, type] = {
    "embedded": EmbeddedPriorConfig,
    "stable_diffusion": StableDiffusionConfig,
    "zero123": Zero123Config,
    "mixture": MixtureConfig,
}
