"""Noise times over an optimisation: pure functions of its progress.

A time is a part of the training steps, 0 (clean) to 1 (noise); `times_to_timesteps` turns it into a network's index.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCHEDULES = ("uniform", "linear", "sqrt", "deterministic", "dreamtime")


def time_range(progress: float, kind: str, t_min: float, t_start: float, t_end: float) -> tuple[float, float]:
    """Lowest and highest noise time at this point of the optimisation.

    Args:
        progress: Part of the optimisation done, 0 to 1; above counts as 1.
        kind: `uniform` stays at [t_min, t_start] (DreamFusion, arXiv:2209.14988); `linear` and `sqrt` lower the upper end
            from t_start to t_end, as progress and as its square root (HiFA, arXiv:2305.18766, Eq. 9); `deterministic` has
            no width and falls linearly (as DreamGaussian does, arXiv:2309.16653, section 3.2); `dreamtime` has no width
            and follows `dreamtime_time`.
        t_min, t_start, t_end: Times with 0 < t_min <= t_end <= t_start < 1.
    """
    progress = min(max(progress, 0.0), 1.0)
    match kind:
        case "uniform":
            return t_min, t_start
        case "linear":
            return t_min, t_start + (t_end - t_start) * progress
        case "sqrt":
            return t_min, t_start + (t_end - t_start) * math.sqrt(progress)
        case "deterministic":
            time = t_start + (t_end - t_start) * progress
            return time, time
        case "dreamtime":
            time = dreamtime_time(progress, t_end, t_start)
            return time, time
    raise ValueError(f"unknown schedule {kind!r}: expected one of {', '.join(SCHEDULES)}")


def dreamtime_time(
    progress: float,
    t_end: float,
    t_start: float,
    plateau: tuple[float, float] = (0.5, 0.8),
    widths: tuple[float, float] = (0.1, 0.3),
) -> float:
    """Non-increasing time that dwells where the picture's content is decided (DreamTime, arXiv:2306.12422, Eq. 8).

    t(i) solves Σ_{t' >= t} W(t') = i / N with W flat on the plateau and falling off as a Gaussian of the given width below
    and above it. The paper's m₂ = 500, m₁ = 800, s₂ = 100, s₁ = 300 of 1000 are the defaults.
    """
    times = torch.linspace(t_start, t_end, 1001, dtype=torch.float64)
    low, high = plateau
    outside = torch.where(times > high, (times - high) / widths[1], (low - times).clamp(min=0) / widths[0])
    weight = torch.exp(-outside.square() / 2)
    steps = torch.cat([torch.zeros(1, dtype=torch.float64), (weight[1:] + weight[:-1]) / 2])
    spent = steps.cumsum(0) / steps.sum()
    return float(times[int(torch.searchsorted(spent, progress).clamp(max=1000))])


def sample_times(n: int, low: float, high: float, generator: torch.Generator | None = None) -> Float[Tensor, " n"]:
    """n noise times, uniform in [low, high]; drawn where the generator lives."""
    device = None if generator is None else generator.device
    return low + (high - low) * torch.rand(n, generator=generator, device=device)


def times_to_timesteps(times: Float[Tensor, " n"], n_train_steps: int) -> Int[Tensor, " n"]:
    """Indices into a network's training schedule, 0 to n_train_steps - 1."""
    return (times * n_train_steps).round().long().clamp(0, n_train_steps - 1)
