"""Diffusion priors that pull rendered pictures towards plausible ones."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


SWITCH_S = 0.0002
"""Turns of Python's threads while one imports. At the usual 5 ms whoever computes beside it waits that long at each of its
many small operations: a start with 2.5 s of imports became 0.2 s shorter; with this one 1.1 s (two cores, one computing)."""
_importing = threading.Lock()


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


def check_priors(config: GuidanceConfig, clip: ClipConfig, prompt: str, device: torch.device) -> None:
    """Refuse at once what `make_guidance`, `make_likeness` and `set_reference` would, as far as that can be told without
    importing libraries and reading weights; files that lie on the hub are downloaded here.

    Raises:
        InputError: Guidance by text has no prompt.
        GuidanceError, MissingDependency: As from `make_guidance`.
    """
    if clip.is_used:
        from .clip import find_model

        find_model(clip)
    for part in _parts(config):
        if isinstance(part, StableDiffusionConfig):
            from . import stable_diffusion

            stable_diffusion.check_settings(part, prompt, device)
        elif isinstance(part, Zero123Config):
            from . import zero123

            zero123.check_settings(part, device)


@without_collection()
def import_libraries(config: GuidanceConfig, clip: ClipConfig) -> None:
    """Import what `make_guidance` and `make_likeness` will take from diffusers and transformers, which takes seconds: for a
    thread beside other work. Failures are left to them; they import the same and say what is wrong."""
    kinds = {type(part) for part in _parts(config)}
    with _importing, _short_turns(), suppress(Exception):
        if kinds & {StableDiffusionConfig, Zero123Config}:
            from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel  # noqa: F401
        if Zero123Config in kinds:
            from transformers import CLIPVisionModelWithProjection  # noqa: F401
        if StableDiffusionConfig in kinds:
            from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: F401
            from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401
        if clip.is_used:
            from diffusers import ModelMixin  # noqa: F401
            from transformers import CLIPModel  # noqa: F401


@contextmanager
def _short_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _parts(config: GuidanceConfig) -> list[GuidanceConfig]:
    """The priors that are used, one by one."""
    if not isinstance(config, MixtureConfig):
        return [config]
    from .mixture import shares

    return [getattr(config, name) for name in shares(config, 0.0)]


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
