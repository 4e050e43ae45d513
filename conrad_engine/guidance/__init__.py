"""Diffusion priors that pull rendered pictures towards plausible ones."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..config import (
    ClipConfig,
    EmbeddedPriorConfig,
    GuidanceConfig,
    MixtureConfig,
    StableDiffusionConfig,
    Zero123Config,
)

if TYPE_CHECKING:
    import torch

    from .interfaces import Guidance, Likeness


@contextmanager
def without_collection() -> Iterator[None]:
    """Inside, Python looks for no garbage: among the objects of libraries that are imported, most of which stay, the look
    takes a quarter of the time (diffusers and transformers: 2.8 s with it, 2.2 without)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@without_collection()
def make_guidance(config: GuidanceConfig, device: torch.device) -> Guidance:
    """The prior that the settings name; its weights are read here.

    Raises:
        GuidanceError: Weights are missing or cannot be used.
        MissingDependency: The prior needs a package that is not installed.
    """
    # Heavy imports stay behind the choice.
    match config:
        case EmbeddedPriorConfig():
            from .embedded.prior import EmbeddedPrior

            return EmbeddedPrior(config, device)
        case StableDiffusionConfig():
            from .stable_diffusion import StableDiffusionGuidance

            return StableDiffusionGuidance(config, device)
        case Zero123Config():
            from .zero123 import Zero123Guidance

            return Zero123Guidance(config, device)
        case MixtureConfig():
            from .mixture import MixtureGuidance

            return MixtureGuidance(config, device, make_guidance)
    raise TypeError(f"not a guidance config: {type(config).__name__}")


def make_likeness(config: ClipConfig, device: torch.device) -> Likeness | None:
    """CLIP, if the settings give it a weight; errors as those of `make_guidance`."""
    if not config.is_used:
        return None
    from .clip import ClipLikeness

    return ClipLikeness(config, device)
