"""What a text-to-image model is told about the view it looks at: words and weights by the camera's angles.

Azimuth 0 is the reference view, which counts as the front.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

VIEWS = ("front", "side", "back", "overhead")
NEGATIVE_VIEWS = ("front", "side")
"""Views that Perp-Neg pushes away from where the camera looks from elsewhere."""
OVERHEAD_FROM, OVERHEAD_FULL = math.radians(50), math.radians(70)
"""Elevations between which the overhead view takes over; the usual switch is at 60 degrees."""


def view_prompts(prompt: str) -> list[str]:
    """The prompt for each of `VIEWS` (DreamFusion, arXiv:2209.14988, section 3.2)."""
    return [f"{prompt}, {view} view" if prompt else f"{view} view" for view in VIEWS]


def turned_away(azimuth_rad: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Angle to the front, 0 to π, the same to the left and to the right."""
    return torch.atan2(azimuth_rad.sin(), azimuth_rad.cos()).abs()


def overhead_share(elevation_rad: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return ((elevation_rad - OVERHEAD_FROM) / (OVERHEAD_FULL - OVERHEAD_FROM)).clamp(0, 1)


def view_shares(azimuth_rad: Float[Tensor, " n"], elevation_rad: Float[Tensor, " n"]) -> Float[Tensor, "n 4"]:
    """Shares of `VIEWS` in a camera's prompt, summing to 1: linear in azimuth between front, side and back."""
    quarter = turned_away(azimuth_rad) / (math.pi / 2)
    front = (1 - quarter).clamp(min=0)
    back = (quarter - 1).clamp(min=0)
    overhead = overhead_share(elevation_rad)
    level = torch.stack([front, 1 - front - back, back], -1) * (1 - overhead)[:, None]
    return torch.cat([level, overhead[:, None]], -1)


def negative_weights(azimuth_rad: Float[Tensor, " n"], elevation_rad: Float[Tensor, " n"]) -> Float[Tensor, "2 n"]:
    """Perp-Neg's weights of `NEGATIVE_VIEWS`, zero or negative; none seen from above.

    Shifted exponentials -(a exp(-b r) + c) of the share r of the nearer side, with the constants of threestudio's default
    settings (read there; the paper, arXiv:2304.04968, gives the form and leaves the constants to the user).
    """
    quarter = turned_away(azimuth_rad) / (math.pi / 2)
    is_frontal = quarter <= 1
    nearer = torch.where(is_frontal, 1 - quarter, 2 - quarter)
    front = torch.where(is_frontal, _decay(nearer, 4.0, -2.426), _decay(nearer, 1.0, 0.967))
    side = torch.where(is_frontal, _decay(1 - nearer, 4.0, -2.426), _decay(nearer, 1.0, -0.606))
    # The constants are rounded, so that a weight that should vanish comes out slightly above zero.
    return -torch.stack([front, side]).clamp(min=0) * (1 - overhead_share(elevation_rad))


def _decay(r: Tensor, height: float, shift: float) -> Tensor:
    return height * torch.exp(-0.5 * r) + shift
