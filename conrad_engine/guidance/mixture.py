"""Several priors at once, as Magic123 (arXiv:2306.17843) and DreamCraft3D (arXiv:2310.16818) combine them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..cameras import Camera
from ..config import GuidanceConfig, MixtureConfig
from .interfaces import Guidance, GuidanceResult, ReferencePicture


def shares(config: MixtureConfig, progress: float) -> dict[str, float]:
    """Each prior's share of the gradient at this point, summing to 1; only those that are ever used."""
    weights = {}
    for name in config.parts:
        start, end = getattr(config, f"{name}_start"), getattr(config, f"{name}_end")
        if start > 0 or end > 0:
            weights[name] = start + (end - start) * min(max(progress, 0.0), 1.0)
    if progress > 1 and "zero123" in weights:
        weights["zero123"] *= config.zero123_fine
    total = sum(weights.values())
    return {name: weight / total if total else 0.0 for name, weight in weights.items()}


def spared(
    gradient: Float[Tensor, "n c height width"], seen: Float[Tensor, "n height width"], amount: float
) -> Float[Tensor, "n c height width"]:
    """The gradient with the part taken away that would change what the photo shows.

    DreamCraft3D (section 3.4) restricts its texture stage to what the reference cannot see.
    """
    return gradient * (1 - amount * seen[:, None])


def facing(reference: Camera, cameras: Camera) -> Float[Tensor, " n"]:
    """How much of what a camera sees the reference camera sees too, guessed from the angle between their directions."""
    return (cameras.forward * reference.forward.to(cameras.forward)).sum(-1).clamp(0, 1)


class MixtureGuidance:
    """Implements `interfaces.SplitGuidance`."""

    def __init__(
        self,
        config: MixtureConfig,
        device: torch.device,
        make: Callable[[GuidanceConfig, torch.device], Guidance],
    ) -> None:
        self.config, self.device = config, device
        self.priors = {name: make(getattr(config, name), device) for name in shares(config, 0.0)}
        self.picture_size = max(prior.picture_size for prior in self.priors.values())
        self.reference: Camera | None = None

    def set_reference(self, reference: ReferencePicture) -> None:
        self.reference = reference.camera.to(self.device)
        for prior in self.priors.values():
            prior.set_reference(reference)

    def gradient(
        self,
        rgba: Float[Tensor, "n 4 height width"],
        cameras: Camera,
        progress: float,
        generator: torch.Generator | None = None,
        seen: Float[Tensor, "n height width"] | None = None,
    ) -> GuidanceResult:
        """See `interfaces.Guidance`.

        Args:
            seen: Where the views show surface that the photo shows too, 0 to 1; guessed from the angle when not given.
        """
        if self.reference is None:
            raise ValueError("set_reference must be called before gradient")
        asked = {name: share for name, share in shares(self.config, progress).items() if share}
        results = {name: self.priors[name].gradient(rgba, cameras, progress, generator) for name in asked}
        notes = {f"{name}.{key}": value for name, result in results.items() for key, value in result.notes.items()}
        notes |= {f"{name}.share": share for name, share in asked.items()}
        return replace(self._mixed(rgba, cameras, results, asked, seen), notes=notes)

    def draw(self, n: int, progress: float, generator: torch.Generator | None = None) -> tuple[Any, ...]:
        """See `interfaces.SplitGuidance`: the shares, and each prior's numbers."""
        parts = [prior.draw(n, progress, generator) for prior in self.priors.values()]
        # Filled on the device: a copy from the host would wait for the steps before this one.
        amounts = (torch.full((), share, device=self.device) for share in shares(self.config, progress).values())
        return tuple(amounts), *parts

    def distill(
        self, rgba: Float[Tensor, "n 4 height width"], cameras: Camera, draws: tuple[Any, ...]
    ) -> GuidanceResult:
        """See `interfaces.SplitGuidance`."""
        amounts, *parts = draws
        results = {name: p.distill(rgba, cameras, part) for (name, p), part in zip(self.priors.items(), parts)}
        return self._mixed(rgba, cameras, results, dict(zip(results, amounts)), None)

    def _mixed(
        self,
        rgba: Tensor,
        cameras: Camera,
        results: dict[str, GuidanceResult],
        amounts: Mapping[str, float | Tensor],
        seen: Tensor | None,
    ) -> GuidanceResult:
        assert self.reference is not None, "the priors have it, too"
        total, loss = torch.zeros_like(rgba), rgba.new_zeros(())
        for name, result in results.items():
            total = total + amounts[name] * result.gradient
            loss = loss + amounts[name] * result.loss
        if self.config.spare_seen > 0:
            if seen is None:
                seen = facing(self.reference, cameras).reshape(-1, 1, 1).to(rgba).expand(-1, *rgba.shape[2:])
            total = spared(total, seen, self.config.spare_seen)
        denoised = next((result.denoised for result in results.values() if result.denoised is not None), None)
        return GuidanceResult(total, loss, denoised)
