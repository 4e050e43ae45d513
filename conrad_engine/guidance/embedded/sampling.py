"""Using the network: guided denoising and full sampling for any number of reference pictures at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .unet import Group, Reference, ViewPrior, alpha_sigma

AGREED_UNTIL = 0.6
"""Noise time down to which several drafts of the same views are drawn and averaged."""
KNOWN_TIME = 0.3
"""Noise time of known views among targets that are noisier: the network has met such neighbors, and hardly any clean ones."""


def channels_last(pictures: Tensor) -> Tensor:
    return pictures.contiguous(memory_format=torch.channels_last)


def extrapolation(step: int, n_steps: int) -> float:
    """How far the line through the last two clean pictures is followed: h / 2h' of arXiv:2211.01095, Algorithm 2, with the
    logarithmic signal-to-noise ratio λ = ln cot(πt/2) of steps uniform in t. At both ends of the time λ is infinite, and the
    step of first order, DDIM's."""
    if step < 2 or step == n_steps - 1:
        return 0.0
    before, now, then = (-math.log(math.tan((1 - k / n_steps) * math.pi / 2)) for k in (step - 1, step, step + 1))
    return (then - now) / (now - before) / 2


class ConditionedPrior:
    """The network with the tokens of its reference pictures, computed once, with and without the picture."""

    def __init__(
        self, net: ViewPrior, pictures: Float[Tensor, "r 4 h w"], reference: Reference, cast: torch.autocast
    ) -> None:
        """Take the reference pictures, premultiplied RGBA in [-1, 1]; `cast` is the precision to compute in."""
        self.net, self.pictures, self.cast = net, pictures, cast
        self._known: tuple[Tensor, Tensor, Tensor] | None = None
        absent = reference._replace(is_present=torch.zeros_like(reference.is_present))
        # Rows: all references, then the same ones with the picture dropped.
        self.reference = Reference(*(torch.cat(pair) for pair in zip(reference, absent)))
        with torch.no_grad(), cast:
            self.tokens = net.encode(channels_last(torch.cat([pictures, pictures])), self.reference)

    @property
    def n_references(self) -> int:
        return len(self.reference.camera) // 2

    def know(self, pictures: Float[Tensor, "k 4 h w"], cameras: Float[Tensor, "k 4"]) -> None:
        """Further true views of the one object: targets that see each other also see these, with a little noise on them.

        Args:
            pictures: Premultiplied RGBA in [-1, 1].
        """
        assert self.n_references == 1
        noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0)).to(pictures)
        self._known = pictures, cameras, noise

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
        if is_joint and self._known is not None:
            pictures, places, noise = self._known
            known_t = t[:1].clamp(max=KNOWN_TIME).expand(len(pictures))
            alpha, sigma = alpha_sigma(known_t)
            beside = (
                torch.cat([noisy, alpha * pictures + sigma * noise]),
                torch.cat([t, known_t]),
                torch.cat([cameras, places]),
            )
            return self._denoised(*beside, scale, is_joint)[: len(noisy)]
        return self._denoised(noisy, t, cameras, scale, is_joint)

    def _denoised(self, noisy: Tensor, t: Tensor, cameras: Tensor, scale: float, is_joint: bool) -> Tensor:
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
        on_step: Callable[[int], None] | None = None,
        n_drafts: int = 1,
        temperature: float = 1.0,
    ) -> Float[Tensor, "b 4 h w"]:
        """Pictures in [-1, 1] from noise: DPM-Solver++(2M) (arXiv:2211.01095, Algorithm 2), steps uniform in t. Ten or
        twelve do what DDIM does in twenty.

        One draw of noise is one guess at what the picture does not show, and as far from the truth as any. Down to
        `AGREED_UNTIL` several drafts take the mean of what they denoise to, so that the layout is the middle of their guesses;
        the first goes on alone from there and is as sharp as any sample.

        Args:
            cameras: The same number for each reference, reference by reference.
            on_step: Called after each step with the number of steps done, from 1 to `n_steps`; it may raise to stop.
            n_drafts: Draws of noise; each costs a denoising in the first 1 - `AGREED_UNTIL` of the steps.
            temperature: Width of the noise at the start; below 1 the pictures are likelier ones.
        """
        size = self.net.size
        source = cameras.device if generator is None else generator.device
        shape = n_drafts, len(cameras), 4, size, size
        drafts = torch.randn(shape, generator=generator, device=source).to(cameras.device) * temperature
        clean = before = drafts[0]
        for step in range(n_steps):
            time = 1 - step / n_steps
            now, then = (math.pi / 2 * (1 - k / n_steps) for k in (step, step + 1))
            if time <= AGREED_UNTIL:
                drafts = drafts[:1]
            t = torch.full_like(cameras[:, 0], time)
            cleans = torch.stack([self.denoised(draft, t, cameras, scale, is_joint) for draft in drafts])
            clean, before = cleans.mean(0), clean
            push = extrapolation(step, n_steps) * (clean - before)
            noises = (drafts - math.cos(now) * (cleans + push)) / math.sin(now)
            drafts = math.cos(then) * (clean + push) + math.sin(then) * noises
            if on_step is not None:
                on_step(step + 1)
        return clean
