"""Settings that make this engine work as other published systems do, for comparison by the same code.

They are re-creations of the idea with this engine's field, renderer and loss scaling, not those systems: numbers measured
with them are numbers of the idea. What each lacks is said beside it. Standard library only.
"""

from __future__ import annotations

from .config import PipelineConfig, preset, with_overrides
from .errors import InputError

LOSS_BASED: dict[str, object] = {
    # The picture enters by a loss, as in all of them, and no views are sampled first.
    "constraint.kind": "loss",
    "optimize.warm_start_views": 0,
    "optimize.warm_start_steps": 0,
    "field.kind": "hash_grid",
    "field.encoder": "auto",
}
TEXT_SDS: dict[str, object] = {
    "guidance": "stable_diffusion",
    "guidance.objective": "sds",
    "guidance.scale": 100.0,
    "guidance.schedule": "uniform",
    "guidance.weighting": "sds",
    "guidance.perp_neg": False,
}
TEXT_ONLY: dict[str, object] = TEXT_SDS | {
    # DreamFusion (arXiv:2209.14988) with another model, no shading, and Perp-Neg against several faces.
    "guidance.perp_neg": True,
    "optimize.warm_start_views": 0,
    "optimize.warm_start_steps": 0,
    "optimize.n_steps": 5000,
    "optimize.range_grows_until": 0.0,
    "optimize.elevation_max_deg": 60.0,
    "field.kind": "hash_grid",
    "field.encoder": "auto",
}
"""No picture at all: words alone say what the object is."""

BASELINES: dict[str, dict[str, object]] = {
    # RealFusion (arXiv:2302.10663): text SDS at scale 100 with a word learned from the picture, picture and mask losses.
    # Lacks its coarse-to-fine normals; learns the word in fewer steps.
    "realfusion": LOSS_BASED
    | TEXT_SDS
    | {
        "guidance.word_steps": 600,
        "optimize.n_steps": 5000,
        "constraint.loss_weight": 5.0,
        "optimize.mask_weight": 0.5,
        "render.size": 96,
    },
    # NeuralLift-360 (arXiv:2211.16431): text SDS, picture loss, order of depths, distortion, CLIP. Lacks CLIP inside the
    # diffusion model's step (see guidance/clip.py) and the fine-tuning of that model on the picture; its depth loss fades
    # out here.
    "neurallift": LOSS_BASED
    | TEXT_SDS
    | {
        "optimize.n_steps": 10_000,
        "guidance.t_min": 0.05,
        "guidance.t_start": 0.95,
        "constraint.loss_weight": 40.0,
        "optimize.depth_weight": 10.0,
        "optimize.depth_loss": "ranking",
        "optimize.distortion_weight": 0.1,
        "clip.weight": 1.0,
        "clip.weight_aside": 0.5,
        "render.size": 128,
    },
    # Zero123 distilled by score, as threestudio's configuration of it does (600 steps, CFG 3).
    "zero123": LOSS_BASED
    | {
        "guidance": "zero123",
        "guidance.scale": 3.0,
        "optimize.n_steps": 600,
        "optimize.n_views": 4,
        "constraint.loss_weight": 500.0,
        "optimize.mask_weight": 50.0,
    },
    # Magic123 (arXiv:2306.17843): 1 : 40, noise times 0.2 to 0.6, a word learned from the picture; then a fine stage with
    # 1 : 10. There that is a deformable tetrahedral mesh (DMTet) rasterised at 1024 px, noise times 0.02 to 0.5; here the
    # field itself goes on, at 256 px and with the noise times of before. A mesh stage needs a differentiable rasteriser.
    "magic123": LOSS_BASED
    | {
        "guidance": "mixture",
        "guidance.zero123.scale": 5.0,
        "guidance.zero123.schedule": "uniform",
        "guidance.zero123.t_min": 0.2,
        "guidance.zero123.t_start": 0.6,
        "guidance.zero123.t_end": 0.6,
        "guidance.stable_diffusion.scale": 100.0,
        "guidance.stable_diffusion.schedule": "uniform",
        "guidance.stable_diffusion.t_min": 0.2,
        "guidance.stable_diffusion.t_start": 0.6,
        "guidance.stable_diffusion.t_end": 0.6,
        "guidance.stable_diffusion.perp_neg": False,
        "guidance.stable_diffusion.word_steps": 600,
        "guidance.zero123_fine": 0.25,
        "optimize.n_steps": 5000,
        "optimize.fine_steps": 5000,
        "constraint.loss_weight": 5.0,
        "optimize.mask_weight": 0.5,
        "render.size": 128,
        "render.fine_size": 256,
    },
}


NEEDS_DEPTH = ("neurallift",)
"""Baselines that read a relative depth map; it is estimated where none is given."""
NEEDS_WORDS = ("neurallift",)
"""Baselines that read a prompt without learning a word: the picture is captioned where none is given."""


def overrides_of(name: str, constrained: bool = False) -> dict[str, object]:
    """The settings of a baseline that differ from the preset's.

    Args:
        constrained: The same with this project's constraint in place of the picture loss: the article's comparison.

    Raises:
        InputError: No baseline has this name.
    """
    if name not in BASELINES:
        raise InputError(f"unknown baseline {name!r}: use {', '.join(BASELINES)}")
    overrides = dict(BASELINES[name])
    if constrained:
        del overrides["constraint.kind"], overrides["constraint.loss_weight"]
    return overrides


def baseline(name: str, constrained: bool = False) -> PipelineConfig:
    """The settings of a baseline, over those of the preset standard. See `overrides_of`."""
    return with_overrides(preset("standard"), overrides_of(name, constrained))
