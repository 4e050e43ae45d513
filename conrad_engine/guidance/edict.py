"""EDICT: exact inversion of a diffusion sampler by coupled transformations (arXiv:2211.12446).

Two copies of the latents, x and y, are denoised in turn, each with the noise predicted from the other one. Every single
move is affine in what it changes, so that the way back is exact however wrong the network is; a mixing of the copies after
each step keeps them from drifting apart. Symbols: `mixing` p; a_t, b_t of DDIM's move x_{t-1} = a_t x_t + b_t ε(x_t, t).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Predict = Callable[[Tensor, int], Tensor]
"""(latents, timestep) -> noise_pred."""
Pair = tuple[Tensor, Tensor]


def timesteps_of(n_steps: int, strength: float, n_train_steps: int) -> Int[Tensor, " n"]:
    """Timesteps from clean to noisy, evenly spaced, the noisiest at `strength` of the training steps."""
    last = round(strength * (n_train_steps - 1))
    return torch.linspace(last / n_steps, last, n_steps).round().long()


def _coefficients(alphas_cumprod: Float[Tensor, " n"], timestep: int, before: int | None) -> tuple[float, float]:
    """a_t and b_t between a timestep and the next cleaner one; None is the clean picture."""
    noisy = float(alphas_cumprod[timestep])
    clean = 1.0 if before is None else float(alphas_cumprod[before])
    a = (clean / noisy) ** 0.5
    return a, (1 - clean) ** 0.5 - a * (1 - noisy) ** 0.5


def _moves(alphas_cumprod: Tensor, timesteps: Tensor) -> list[tuple[int, float, float, bool]]:
    """Timestep, a, b and which copy comes second, of every step from clean to noisy."""
    steps = timesteps.tolist()
    befores = [None, *steps[:-1]]
    # The order alternates: otherwise one copy would always see the newer of the two.
    return [
        (t, *_coefficients(alphas_cumprod, t, before), i % 2 == 1) for i, (t, before) in enumerate(zip(steps, befores))
    ]


def denoise(
    pair: Pair, predict: Predict, alphas_cumprod: Float[Tensor, " n"], timesteps: Int[Tensor, " k"], mixing: float
) -> Pair:
    """From noisy to clean (arXiv:2211.12446, Eqs. 13 and 14).

    Args:
        pair: Latents in float64: the way back multiplies rounding errors by up to 1 / mixing² a step.
        timesteps: From clean to noisy, as for `invert`.
    """
    x, y = pair
    for timestep, a, b, is_swapped in reversed(_moves(alphas_cumprod, timesteps)):
        x, y = (y, x) if is_swapped else (x, y)
        x = a * x + b * predict(y, timestep)
        y = a * y + b * predict(x, timestep)
        x = mixing * x + (1 - mixing) * y
        y = mixing * y + (1 - mixing) * x
        x, y = (y, x) if is_swapped else (x, y)
    return x, y


def invert(
    pair: Pair, predict: Predict, alphas_cumprod: Float[Tensor, " n"], timesteps: Int[Tensor, " k"], mixing: float
) -> Pair:
    """From clean to noisy: every line of `denoise` undone in reverse (arXiv:2211.12446, Eqs. 15 and 16)."""
    x, y = pair
    for timestep, a, b, is_swapped in _moves(alphas_cumprod, timesteps):
        x, y = (y, x) if is_swapped else (x, y)
        y = (y - (1 - mixing) * x) / mixing
        x = (x - (1 - mixing) * y) / mixing
        y = (y - b * predict(x, timestep)) / a
        x = (x - b * predict(y, timestep)) / a
        x, y = (y, x) if is_swapped else (x, y)
    return x, y
