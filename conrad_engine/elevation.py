"""The elevation of a picture whose camera nobody knows: estimated, and used where the estimate beats the default."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .config import PictureConfig
from .device import resolve_device
from .guidance.embedded.elevation import ElevationEstimate, estimate_elevation
from .preprocess.framing import condition_picture, frame_object
from .preprocess.prepare import PreparedPicture, prepare_picture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ElevationGuess:
    """An estimate, and what was made of it."""

    estimate: ElevationEstimate
    """Seen from the object."""
    picture: PictureConfig
    """The settings with the elevation to use, of a camera that looks at the middle of the picture. A sure estimate counts as
    known: told of it, the prior draws better views than told nothing (MODEL_CARD.md)."""

    def to_json(self) -> dict:
        """For a job's metrics."""
        return {
            "estimate_deg": round(self.estimate.elevation_deg, 1),
            "spread_deg": round(self.estimate.spread_deg, 1),
            "is_used": self.estimate.is_sure,
            "used_deg": self.picture.elevation_deg,
        }

    def sentence(self) -> str:
        """What the user should know."""
        found = f"{self.estimate.elevation_deg:.0f} ± {self.estimate.spread_deg:.0f} degrees"
        if self.estimate.is_sure:
            return f"the camera's elevation was guessed from the picture: {found}"
        used = f"{self.picture.elevation_deg:g} degrees are taken"
        return f"the picture does not say its camera's elevation ({found}): {used}; give it if it is known"


def guess_elevation(prepared: PreparedPicture, config: PictureConfig, device: torch.device) -> ElevationGuess:
    """Estimate the elevation of a prepared picture without a camera.

    Raises:
        GuidanceError: The weights are missing or damaged.
    """
    frame = frame_object(prepared.mask, None, config)
    estimate = estimate_elevation(condition_picture(prepared.rgb, prepared.mask, frame), device)
    elevation_deg = config.elevation_deg
    if estimate.is_sure:
        # An object beside the middle of the picture is seen from another elevation than the camera has on its axis.
        aside_deg = config.elevation_deg - math.degrees(frame.elevation_rad)
        # Whole degrees: what another device computes differently must not part a job from its checkpoint.
        elevation_deg = float(min(max(round(estimate.elevation_deg + aside_deg), -60), 89))
    used = replace(config, elevation_deg=elevation_deg, is_elevation_known=estimate.is_sure)
    guess = ElevationGuess(estimate, used)
    log.info("%s", guess.sentence())
    return guess


def elevation_of_picture(
    picture: Path | bytes, mask: Path | bytes | None, fov_deg: float, device: str
) -> ElevationEstimate:
    """Answer a question about one picture, without a job.

    Raises:
        InputError, MissingDependency: The picture cannot be used; see `prepare_picture`.
        GuidanceError: The weights are missing or damaged.
    """
    config = PictureConfig(fov_deg=fov_deg)
    prepared = prepare_picture(picture, config, mask)
    frame = frame_object(prepared.mask, None, config)
    return estimate_elevation(condition_picture(prepared.rgb, prepared.mask, frame), resolve_device(device))
