"""Regularisers of the optimisation: one pure function each, all returning a scalar."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
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


def correlation_loss(depths: Float[Tensor, " n"], relative: Float[Tensor, " n"]) -> Tensor:
    """1 - Pearson correlation with a relative depth map: free of its scale and shift."""
    a, b = depths - depths.mean(), relative - relative.mean()
    return 1 - F.cosine_similarity(a[None], b[None], eps=1e-6)[0]


def picture_loss(rgba: Float[Tensor, "n 4"], wanted: Float[Tensor, "n 4"]) -> Tensor:
    """Squared error up to 0.1, linear beyond: a few disagreeing views do not rule the fit."""
    beta = 0.1
    return 2 * beta * F.smooth_l1_loss(rgba, wanted, beta=beta)
