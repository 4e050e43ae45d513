"""Using the network: guided denoising and full sampling for any number of reference pictures at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .unet import Group, Reference, ViewPrior, alpha_sigma


def channels_last(pictures: Tensor) -> Tensor:
    return pictures.contiguous(memory_format=torch.channels_last)


class ConditionedPrior:
    """The network with the tokens of its reference pictures, computed once, with and without the picture."""

    def __init__(
        self, net: ViewPrior, pictures: Float[Tensor, "r 4 h w"], reference: Reference, cast: torch.autocast
    ) -> None:
        """Take the reference pictures, premultiplied RGBA in [-1, 1]; `cast` is the precision to compute in."""
        self.net, self.cast = net, cast
        absent = reference._replace(is_present=torch.zeros_like(reference.is_present))
        # Rows: all references, then the same ones with the picture dropped.
        self.reference = Reference(*(torch.cat(pair) for pair in zip(reference, absent)))
        with torch.no_grad(), cast:
            self.tokens = net.encode(channels_last(torch.cat([pictures, pictures])), self.reference)

    @property
    def n_references(self) -> int:
        return len(self.reference.camera) // 2

    @torch.no_grad()
    def denoised(
        self,
        noisy: Float[Tensor, "b 4 h w"],
        t: Float[Tensor, " b"],
        cameras: Float[Tensor, "b 4"],
        scale: float,
        is_joint: bool,
    ) -> Float[Tensor, "b 4 h w"]:
        """The clean pictures expected behind noisy ones, in [-1, 1], with classifier-free guidance.

        Args:
            noisy, t, cameras: The targets, the same number for each reference, reference by reference.
            scale: 1 is no guidance (and costs half).
            is_joint: Whether targets of one reference see each other.
        """
        r = self.n_references
        n_targets = len(noisy) // r
        if scale == 1:
            reference, tokens = Reference(*(x[:r] for x in self.reference)), [(k[:r], v[:r]) for k, v in self.tokens]
            layout = (Group(r, n_targets, is_joint),)
            with self.cast:
                v = self.net.denoise(channels_last(noisy), t, cameras, reference, tokens, layout).float()
        else:
            twice = [torch.cat([x, x]) for x in (noisy, t, cameras)]
            layout = (Group(2 * r, n_targets, is_joint),)
            with self.cast:
                v = self.net.denoise(channels_last(twice[0]), *twice[1:], self.reference, self.tokens, layout).float()
            with_picture, without = v.chunk(2)
            v = without + scale * (with_picture - without)
        alpha, sigma = alpha_sigma(t)
        return (alpha * noisy - sigma * v).clamp(-1, 1)

    def sample(
        self,
        cameras: Float[Tensor, "b 4"],
        n_steps: int,
        scale: float,
        generator: torch.Generator | None = None,
        is_joint: bool = True,
        known: tuple[Tensor, Tensor] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "b 4 h w"]:
        """Pictures in [-1, 1] from noise: DDIM (arXiv:2010.02502) without added noise, steps uniform in t.

        Args:
            cameras: The same number for each reference, reference by reference.
            known: Finished pictures in [-1, 1] of the same references and their cameras: they join as targets without noise.
            on_step: Called after each step with the number of steps done, from 1 to `n_steps`; it may raise to stop.
        """
        r, size, n_targets = self.n_references, self.net.size, len(cameras) // self.n_references
        source = cameras.device if generator is None else generator.device
        x = torch.randn(len(cameras), 4, size, size, generator=generator, device=source).to(cameras.device)
        finished, finished_cameras = known if known is not None else (x[:0], cameras[:0])
        all_cameras = _joined(cameras, finished_cameras, r)
        is_open = _joined(torch.ones_like(cameras[:, 0]), torch.zeros_like(finished_cameras[:, 0]), r)
        clean = x
        for step in range(n_steps):
            now, then = (math.pi / 2 * (1 - k / n_steps) for k in (step, step + 1))
            noisy = _joined(x, finished, r)
            clean = self.denoised(noisy, is_open * (1 - step / n_steps), all_cameras, scale, is_joint)
            clean = _by_reference(clean, r)[:, :n_targets].flatten(0, 1)
            noise = (x - math.cos(now) * clean) / math.sin(now)
            x = math.cos(then) * clean + math.sin(then) * noise
            if on_step is not None:
                on_step(step + 1)
        return clean


def _by_reference(rows: Tensor, n_references: int) -> Tensor:
    return rows.reshape(n_references, len(rows) // n_references, *rows.shape[1:])


def _joined(rows: Tensor, others: Tensor, n_references: int) -> Tensor:
    """Rows of each reference followed by other rows of the same reference."""
    return torch.cat([_by_reference(rows, n_references), _by_reference(others, n_references)], 1).flatten(0, 1)
