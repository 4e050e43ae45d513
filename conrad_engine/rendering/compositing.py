"""Volume rendering along rays, as in NeRF (arXiv:2003.08934).

Names against the paper: `densities` σ_i, `steps` δ_i, `transmittance` T_i, `weights` w_i, `opacities` Σ w_i.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def render_weights(
    densities: Float[Tensor, "n_rays n_samples"], steps: Float[Tensor, "n_rays n_samples"] | Float[Tensor, "n_rays 1"]
) -> tuple[Float[Tensor, "n_rays n_samples"], Float[Tensor, "n_rays n_samples"]]:
    """Compositing weights and the transmittance before each sample.

    NeRF, Eq. 3: w_i = T_i (1 - exp(-σ_i δ_i)), T_i = exp(-Σ_{j<i} σ_j δ_j).

    Args:
        densities: σ after activation, per world unit, non-negative, front to back.
        steps: Lengths of the samples, world units.

    Returns:
        Weights, summing to at most 1 per ray, and the transmittance before each sample.
    """
    optical_depth = densities * steps
    # Exclusive sum: a sample is dimmed by what lies in front of it, not by itself. Shifted rather than subtracted,
    # because subtraction loses the small terms in front of a very dense sample.
    in_front = F.pad(optical_depth[..., :-1].cumsum(dim=-1), (1, 0))
    transmittance = torch.exp(-in_front)
    return transmittance * -torch.expm1(-optical_depth), transmittance


def quantile_distances(
    weights: Float[Tensor, "n_rays n_samples"],
    t_starts: Float[Tensor, "n_rays n_samples"],
    steps: Float[Tensor, "n_rays 1"],
    fraction: float,
) -> Float[Tensor, " n_rays"]:
    """Distance at which all but `fraction` of each ray's opacity has been passed.

    The article's rule T(t) / (T(t_n) - T(t_f)) = 0.05 has a solution only where the ray is at least 95.2 % opaque, so it is
    read in its normalised form, (T(t) - T(t_f)) / (T(t_n) - T(t_f)) = fraction: the cumulative weight reaches
    (1 - fraction) of its total. Both agree on opaque rays; this one exists for every ray that meets any density.

    Returns:
        Distances, interpolated inside the sample they fall into; the last sample's end where a ray is empty.
    """
    cumulative = weights.cumsum(-1)
    wanted = (1 - fraction) * cumulative[..., -1:]
    index = (cumulative < wanted).sum(-1, keepdim=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, index)
    before = cumulative.gather(-1, index) - weight
    part = ((wanted - before) / weight.clamp(min=1e-12)).clamp(0, 1)
    return (t_starts.gather(-1, index) + part * steps).squeeze(-1)


def distortion(
    weights: Float[Tensor, "n_rays n_samples"],
    mids: Float[Tensor, "n_rays n_samples"],
    steps: Float[Tensor, "n_rays 1"],
) -> Float[Tensor, " n_rays"]:
    """How far a ray's weights are spread: mip-NeRF 360 (arXiv:2111.12077), Eq. 15, by prefix sums.

    Σ_ij w_i w_j |s_i - s_j| + ⅓ Σ_i w_i² δ_i, with s in world units.
    """
    weight_before = weights.cumsum(-1) - weights
    moment_before = (weights * mids).cumsum(-1) - weights * mids
    between = 2 * (weights * (mids * weight_before - moment_before)).sum(-1)
    return between + (weights.square() * steps).sum(-1) / 3
