"""The space that silhouettes from several sides leave: their visual hull, lenient with a single dissenting view."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .cameras import Camera

HULL_CELLS = 72
"""Cells a side."""
EMPTY_SCORE = -2.0
"""Score of a point that one view sees half outside."""


def cell_centers(aabb: Float[Tensor, "2 3"]) -> Float[Tensor, "cells 3"]:
    """The middles of the hull's cells, the last axis fastest."""
    steps = (torch.arange(HULL_CELLS, device=aabb.device) + 0.5) / HULL_CELLS
    axes = [low + steps * (high - low) for low, high in aabb.T]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def log_opacities(
    points: Float[Tensor, "n 3"], opacities: Float[Tensor, "v 1 h w"], cameras: Camera
) -> Float[Tensor, "v n"]:
    """Logarithms of the opacities that points project to, softened by a pixel; at least log 0.02.

    Args:
        cameras: Batch of the v views' cameras.
    """
    uv, _ = cameras.project(points[None].expand(len(cameras), -1, -1))
    unit = uv / uv.new_tensor([cameras.width, cameras.height]) * 2 - 1
    soft = F.avg_pool2d(opacities, 3, 1, 1)
    seen = F.grid_sample(soft, unit[:, None], align_corners=False, padding_mode="border")[:, 0, 0]
    return seen.clamp(0.02, 1).log()


def hull_scores(logs: Float[Tensor, "v n"]) -> Float[Tensor, " n"]:
    """The sum over the views; the worst counts half, so a point that one view sees outside is on the surface
    (`EMPTY_SCORE`) and one that two views see outside is well out of it."""
    return logs.sum(0) - 0.5 * logs.amin(0)
