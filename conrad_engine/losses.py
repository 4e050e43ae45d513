"""Regularisers of the optimisation: one pure function each, all returning a scalar."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def mask_loss(opacities: Float[Tensor, " n"], mask: Float[Tensor, " n"]) -> Tensor:
    """Mean squared error of the opacities seen from a reference camera."""
    return (opacities - mask).square().mean()


def entropy_loss(opacities: Float[Tensor, " n"]) -> Tensor:
    """Mean binary entropy: least where pixels are empty or opaque (stable-dreamfusion's opaque loss)."""
    p = opacities.clamp(1e-3, 1 - 1e-3)
    return -(p * p.log() + (1 - p) * (1 - p).log()).mean()


def orientation_loss(
    weights: Float[Tensor, "n_rays n_samples"],
    normals: Float[Tensor, "n_rays n_samples 3"],
    directions: Float[Tensor, "n_rays 3"],
) -> Tensor:
    """Normals that face away from the camera: Ref-NeRF (arXiv:2112.03907), Eq. 11, with weights held fixed."""
    away = (normals * directions[:, None]).sum(-1).clamp(min=0)
    return (weights.detach() * away.square()).sum(-1).mean()


def correlation_loss(
    depths: Float[Tensor, " n"], relative: Float[Tensor, " n"], is_usable: Bool[Tensor, " n"] | None = None
) -> Tensor:
    """1 - Pearson correlation with a relative depth map: free of its scale and shift.

    Args:
        is_usable: Which rays count (all, if None); by a mask instead of an index, so that shapes depend on no values.
    """
    if is_usable is None:
        is_usable = torch.ones_like(depths, dtype=torch.bool)
    n = is_usable.sum().clamp(min=1)

    def centered(values: Tensor) -> Tensor:
        known = torch.where(is_usable, values, 0.0)
        return torch.where(is_usable, known - known.sum() / n, 0.0)[None]

    return 1 - F.cosine_similarity(centered(depths), centered(relative), eps=1e-6)[0]


def ranking_loss(
    depths: Float[Tensor, " n"], relative: Float[Tensor, " n"], is_usable: Bool[Tensor, " n"] | None = None
) -> Tensor:
    """Mean over all pairs of rays of how far their depths stand in the wrong order against a relative depth map.

    NeuralLift-360 (arXiv:2211.16431, section 3.3), with its released code's margin of 0: max(0, -sign(r_i - r_j) (d_i - d_j)).

    Args:
        is_usable: See `correlation_loss`.
    """
    if is_usable is None:
        is_usable = torch.ones_like(depths, dtype=torch.bool)
    known = torch.where(is_usable, relative, 0.0)
    order = (known[:, None] - known).sign()
    are_usable = is_usable[:, None] & is_usable
    wrong = (-order * (depths[:, None] - depths)).clamp(min=0)
    return torch.where(are_usable, wrong, 0.0).sum() / are_usable.sum().clamp(min=1)


def picture_loss(shown: Float[Tensor, "n channels"], wanted: Float[Tensor, "n channels"]) -> Tensor:
    """Squared error up to 0.1, linear beyond: a few disagreeing views do not rule the fit."""
    beta = 0.1
    return 2 * beta * F.smooth_l1_loss(shown, wanted, beta=beta)
