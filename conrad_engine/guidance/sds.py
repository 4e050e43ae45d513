"""Score distillation as pure functions on latents: no network, no camera, no random numbers.

Symbols of DreamFusion (arXiv:2209.14988): `clean` z, `noisy` z_t = √ᾱ_t z + √(1-ᾱ_t) ε, `noise` ε, `noise_pred` ε̂,
`alphas_cumprod` ᾱ, `scale` s of classifier-free guidance. Gradients are those of the loss with respect to z, the Jacobian of
the denoiser dropped (arXiv:2209.14988, Eq. 3).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "n channels height width"]
PerSample = Float[Tensor, " n"]


def _spread(values: PerSample) -> Float[Tensor, "n 1 1 1"]:
    return values.reshape(-1, 1, 1, 1)


def add_noise(clean: Latents, noise: Latents, alphas_cumprod: PerSample) -> Latents:
    """z_t = √ᾱ z + √(1-ᾱ) ε."""
    return _spread(alphas_cumprod.sqrt()) * clean + _spread((1 - alphas_cumprod).sqrt()) * noise


def prediction_to_noise(
    prediction: Latents, noisy: Latents, alphas_cumprod: PerSample, prediction_type: str
) -> Latents:
    """ε̂ from what the network was trained to answer.

    v = √ᾱ ε - √(1-ᾱ) z (progressive distillation, arXiv:2202.00512, appendix D), hence ε̂ = √(1-ᾱ) z_t + √ᾱ v̂.

    Args:
        prediction_type: `epsilon`, `v_prediction` or `sample`, as diffusers' scheduler files name them.
    """
    signal, spread = _spread(alphas_cumprod.sqrt()), _spread((1 - alphas_cumprod).sqrt())
    match prediction_type:
        case "epsilon":
            return prediction
        case "v_prediction":
            return spread * noisy + signal * prediction
        case "sample":
            return (noisy - signal * prediction) / spread
    raise ValueError(f"unknown prediction type {prediction_type!r}: expected epsilon, v_prediction or sample")


def noise_to_clean(noise_pred: Latents, noisy: Latents, alphas_cumprod: PerSample) -> Latents:
    """ẑ_0 = (z_t - √(1-ᾱ) ε̂) / √ᾱ, the denoiser's picture in one step."""
    return (noisy - _spread((1 - alphas_cumprod).sqrt()) * noise_pred) / _spread(alphas_cumprod.sqrt())


def ddim_move(noise_pred: Latents, noisy: Latents, alphas_from: PerSample, alphas_to: PerSample) -> Latents:
    """Deterministic DDIM move between two noise levels, in either direction (arXiv:2010.02502, Eq. 12 with σ = 0)."""
    return add_noise(noise_to_clean(noise_pred, noisy, alphas_from), noise_pred, alphas_to)


def guided(unconditional: Latents, conditional: Latents, scale: float) -> Latents:
    """Classifier-free guidance (arXiv:2207.12598): ε_u + s (ε_c - ε_u); scale 1 is the conditional prediction."""
    return unconditional + scale * (conditional - unconditional)


def perpendicular(vector: Latents, direction: Latents) -> Latents:
    """The part of `vector` at right angles to `direction`, sample by sample."""
    dims = (1, 2, 3)
    # The guard keeps a direction of zeros from dividing by zero; the result is then the vector itself.
    along = (vector * direction).sum(dims, keepdim=True) / direction.square().sum(dims, keepdim=True).clamp(min=1e-12)
    return vector - along * direction


def perp_neg_guided(
    unconditional: Latents,
    positive: Latents,
    negatives: Float[Tensor, "k n channels height width"],
    weights: Float[Tensor, "k n"],
    scale: float,
) -> Latents:
    """Perp-Neg (arXiv:2304.04968, Eq. 8): negative prompts act only at right angles to the positive one.

    ε_u + s [e₊ + Σ_i w_i (e_i - proj_{e₊} e_i)] with e = ε - ε_u.

    Args:
        weights: Zero or negative; zero switches a negative prompt off for a sample.
    """
    direction = positive - unconditional
    total = direction
    for negative, weight in zip(negatives, weights):
        total = total + _spread(weight) * perpendicular(negative - unconditional, direction)
    return unconditional + scale * total


def weighting(alphas_cumprod: PerSample, kind: str) -> PerSample:
    """w(t).

    Args:
        kind: `sds` 1-ᾱ (DreamFusion's σ²), `uniform` 1, `fantasia3d` √ᾱ (1-ᾱ) (arXiv:2303.13873, section 3.3), or `ism`
            √((1-ᾱ)/ᾱ) (LucidDreamer, arXiv:2311.11284).
    """
    match kind:
        case "sds":
            return 1 - alphas_cumprod
        case "uniform":
            return torch.ones_like(alphas_cumprod)
        case "fantasia3d":
            return alphas_cumprod.sqrt() * (1 - alphas_cumprod)
        case "ism":
            return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    raise ValueError(f"unknown weighting {kind!r}: expected sds, uniform, fantasia3d or ism")


def sds_gradient(noise_pred: Latents, noise: Latents, weights: PerSample) -> Latents:
    """w(t) (ε̂ - ε) (arXiv:2209.14988, Eq. 3), per sample: the sum over latent elements, no mean."""
    return _spread(weights) * (noise_pred - noise)


def ism_gradient(noise_pred: Latents, noise_pred_before: Latents, weights: PerSample) -> Latents:
    """Interval score matching (arXiv:2311.11284, Eq. 17): w(t) (ε̂(z_t, t, y) - ε̂(z_s, s, ∅)).

    z_s is reached from z by DDIM inversion and z_t from z_s by one more move of it, so that no random noise enters.
    """
    return _spread(weights) * (noise_pred - noise_pred_before)


def distillation_loss(gradient: Latents) -> Tensor:
    """½‖g‖² over the batch: the value of the loss ½‖z - stopgrad(z - g)‖², whose gradient to z is g / n.

    A diagnostic at noise level, not a measure of progress.
    """
    return 0.5 * gradient.float().square().sum() / gradient.shape[0]
