"""One step of score distillation through a latent diffusion model, whatever the model is conditioned on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..cameras import Camera
from ..config import StableDiffusionConfig, Zero123Config
from ..graphs import GraphedStep
from . import sds
from .interfaces import GuidanceResult
from .latents import LatentSpace, composited, in_layout, picture_gradient, resized, searched_convolutions
from .memory import MemoryPlan, smaller_plan
from .schedule import sample_times, time_range, times_to_timesteps

log = logging.getLogger(__name__)

UNIT = 64
"""Gradients are those of the usual sum over latent elements, divided by this. A sum keeps published ratios between priors; the
division brings what a pixel feels to about the embedded prior's distance between picture and denoised picture, tenths, beside
which the other losses were weighed. (Estimate for Stable Diffusion at a scale of 25: 1.5 a latent element, eight times that a
pixel of a 64 px view. With real weights it was not measured.)"""


@dataclass(frozen=True)
class NoiseSchedule:
    """What the model was trained with."""

    alphas_cumprod: Float[Tensor, " n_train_steps"]
    prediction_type: str

    @staticmethod
    def read(folder: Path, device: torch.device) -> NoiseSchedule:
        """From a model's scheduler settings, whatever sampler they name."""
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        return NoiseSchedule(scheduler.alphas_cumprod.float().to(device), scheduler.config.prediction_type)


@dataclass(frozen=True)
class Denoiser:
    """A conditioned denoiser for the views of one step; both answer noise."""

    guided: Callable[[Tensor, Tensor, slice], Tensor]
    """(noisy, timesteps, views) -> noise_pred with classifier-free guidance."""
    unconditional: Callable[[Tensor, Tensor, slice], Tensor]


class Draws(NamedTuple):
    """The random numbers of one step, drawn before it: a second attempt sees the same ones, and a captured one new ones."""

    timesteps: Int[Tensor, " n"]
    noise: Float[Tensor, "n 4 h w"]
    background: Float[Tensor, "n 3 1 1"]
    share: Float[Tensor, ""]
    """One over the number of views that were drawn for, of which a step may see some."""


class Distiller:
    """The part that Stable Diffusion and Zero123 have in common. On CUDA a step is captured in a graph."""

    def __init__(
        self,
        space: LatentSpace,
        schedule: NoiseSchedule,
        network: Any,
        denoiser_of: Callable[[Camera], Denoiser],
        config: StableDiffusionConfig | Zero123Config,
        plan: MemoryPlan,
        picture_size: int,
    ) -> None:
        """
        Args:
            network: diffusers' UNet.
            denoiser_of: The network conditioned on cameras. It may depend on nothing else that changes within a job.
        """
        self.space, self.schedule, self.network, self.denoiser_of = space, schedule, network, denoiser_of
        self.config, self.picture_size = config, picture_size
        self.shows_denoised = False
        """Set it to have the model's own pictures in the results; costs a decoding a view."""
        self._graphed = GraphedStep(self._step, schedule.alphas_cumprod.device)
        self._signature: tuple = ()
        self.use(plan)

    def use(self, plan: MemoryPlan) -> None:
        """Work by another memory preset from now on."""
        self.plan = plan
        self.space.apply(plan)
        self.forget()

    def forget(self) -> None:
        """Capture anew: something that a step depends on has changed."""
        self._graphed.reset()
        self._signature = ()

    def gradient(
        self,
        rgba: Float[Tensor, "n 4 height width"],
        cameras: Camera,
        progress: float,
        generator: torch.Generator | None,
        white_background: bool,
    ) -> GuidanceResult:
        """See `interfaces.Guidance.gradient`; errors as those of `distill`."""
        low, high = self._time_range(progress)
        result = self.distill(rgba, cameras, self.draw(len(rgba), progress, generator, white_background))
        return replace(result, notes={"time_low": low, "time_high": high})

    def draw(self, n: int, progress: float, generator: torch.Generator | None, white_background: bool) -> Draws:
        """See `interfaces.SplitGuidance.draw`."""
        device, side = self.schedule.alphas_cumprod.device, self.picture_size // self.space.factor
        where = device if generator is None else generator.device
        low, high = self._time_range(progress)
        timesteps = times_to_timesteps(sample_times(n, low, high, generator), len(self.schedule.alphas_cumprod))
        noise = torch.randn(n, 4, side, side, generator=generator, device=where)
        color = torch.rand(n, 4, 1, 1, generator=generator, device=where)
        # Half of the views get a gray, half a color: the field must not use the background as part of the object.
        plain = torch.where(color[:, 3:] < 0.5, color[:, :1].expand(-1, 3, -1, -1), color[:, :3])
        background = torch.ones_like(plain) if white_background else plain
        share = torch.full((), 1 / n, device=device)
        return Draws(timesteps.to(device), noise.to(device), background.to(device), share)

    def _time_range(self, progress: float) -> tuple[float, float]:
        return time_range(progress, self.config.schedule, self.config.t_min, self.config.t_start, self.config.t_end)

    def distill(
        self, rgba: Float[Tensor, "n 4 height width"], cameras: Camera, draws: tuple[Tensor, ...]
    ) -> GuidanceResult:
        """See `interfaces.SplitGuidance.distill`. Out of memory, the step is done again with the next smaller preset, and the
        following ones too.

        Raises:
            torch.OutOfMemoryError: The smallest preset does not fit either.
        """
        while True:
            try:
                return GuidanceResult(*self._run(rgba.detach(), cameras, Draws(*draws)))
            except torch.cuda.OutOfMemoryError:
                plan = smaller_plan(self.plan)
                # A capture cannot be mended from within: whoever captures tries again.
                if plan is None or (rgba.is_cuda and torch.cuda.is_current_stream_capturing()):
                    raise
            # Outside the handler: the exception holds the failed step's tensors.
            log.warning("out of memory with preset %s; going on with preset %s", self.plan.name, plan.name)
            self.use(plan)
            torch.cuda.empty_cache()

    def ask(
        self,
        noisy: Float[Tensor, "n 4 h w"],
        timesteps: Int[Tensor, " n"],
        tokens: Float[Tensor, "kn n_tokens width"],
        concatenated: Float[Tensor, "kn c h w"] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> list[Float[Tensor, "n 4 h w"]]:
        """Noise predictions of the network under k conditions, in one pass.

        Args:
            tokens: Conditions of all n views, one condition after the other.
            concatenated: Further input channels.
            extra: diffusers' `added_cond_kwargs`.
        """
        k = len(tokens) // len(noisy)
        sample = noisy.repeat(k, 1, 1, 1)
        if concatenated is not None:
            sample = torch.cat([sample, concatenated], 1)
        answer = self.network(
            in_layout(sample.to(tokens.dtype)),
            timesteps.repeat(k),
            encoder_hidden_states=tokens,
            added_cond_kwargs=extra,
            return_dict=False,
        )[0].float()
        alphas = self.schedule.alphas_cumprod[timesteps]
        return [
            sds.prediction_to_noise(part, noisy.float(), alphas, self.schedule.prediction_type)
            for part in answer.chunk(k)
        ]

    def _run(self, rgba: Tensor, cameras: Camera, draws: Draws) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs = (
            rgba,
            cameras.c2w.to(rgba),
            cameras.intrinsics.to(rgba),
            draws.timesteps,
            draws.noise,
            draws.background,
            draws.share,
        )
        self._size = cameras.width, cameras.height
        # A captured step is bound to its shapes.
        signature = (self._size, self.shows_denoised, *(tuple(tensor.shape) for tensor in inputs))
        is_first = signature != self._signature
        if is_first:
            self.forget()
            self._signature = signature
        with searched_convolutions(self.config.weights.compile):
            # The next call overwrites what a captured step returns.
            gradient, loss, denoised = self._graphed(*inputs)
        if is_first and rgba.is_cuda:
            # The search takes the largest workspace that any algorithm asks for and the device has free (134 GiB were seen),
            # and makes do with less: the peak is to say what steps need, of which all but this one follow.
            torch.cuda.reset_peak_memory_stats(rgba.device)
        return gradient.clone(), loss.clone(), None if denoised is None else denoised.clone()

    def _step(
        self,
        rgba: Tensor,
        c2w: Tensor,
        intrinsics: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        background: Tensor,
        share: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One step as a function of tensors alone: what is captured."""
        with torch.no_grad():
            denoiser = self.denoiser_of(Camera(c2w, intrinsics, *self._size))
        draws = Draws(timesteps, noise, background, share)
        gradients, losses, pictures = [], [], []
        for start in range(0, len(rgba), self.plan.views_at_once):
            views = slice(start, min(start + self.plan.views_at_once, len(rgba)))

            def to_latents(part: Tensor, views: slice = views) -> Tensor:
                return self.space.encode(resized(composited(part, background[views]), self.picture_size))

            def latent_gradient(latents: Tensor, views: slice = views) -> Tensor:
                gradient, clean = self._latent_gradient(latents, draws, denoiser, views)
                if self.shows_denoised:
                    rgb = resized(self.space.decode(clean), rgba.shape[-1])
                    pictures.append(torch.cat([rgb, torch.ones_like(rgb[:, :1])], 1))
                return gradient * (self.config.strength / UNIT * share)

            to_rgba, gradient = picture_gradient(rgba[views], to_latents, latent_gradient)
            gradients.append(to_rgba)
            losses.append(0.5 * gradient.square().sum())
        return torch.cat(gradients), torch.stack(losses).sum(), torch.cat(pictures) if pictures else None

    def _latent_gradient(
        self, latents: Tensor, draws: Draws, denoiser: Denoiser, views: slice
    ) -> tuple[Tensor, Tensor]:
        timesteps, noise = draws.timesteps[views], draws.noise[views]
        alphas = self.schedule.alphas_cumprod[timesteps]
        weights = sds.weighting(alphas, self.config.weighting)
        if isinstance(self.config, StableDiffusionConfig) and self.config.objective == "ism":
            noisy, compared = self._inverted(latents, noise, timesteps, denoiser, views)
            noise_pred = denoiser.guided(noisy, timesteps, views)
            gradient = sds.ism_gradient(noise_pred, compared, weights)
        else:
            noisy = sds.add_noise(latents, noise, alphas)
            noise_pred = denoiser.guided(noisy, timesteps, views)
            gradient = sds.sds_gradient(noise_pred, noise, weights)
        return gradient, sds.noise_to_clean(noise_pred, noisy, alphas)

    def _inverted(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, denoiser: Denoiser, views: slice
    ) -> tuple[Tensor, Tensor]:
        """z_t by DDIM inversion over z_s, and ε̂(z_s, s, ∅) (LucidDreamer, arXiv:2311.11284, section 4.2).

        The inversion starts from the model's least noise, added at random: at none at all it was never trained.
        """
        assert isinstance(self.config, StableDiffusionConfig)
        alphas = self.schedule.alphas_cumprod
        interval = round(self.config.ism_interval * len(alphas))
        before = (timesteps - interval).clamp(min=1)
        now = torch.zeros_like(timesteps)
        noisy = sds.add_noise(latents, noise, alphas[now])
        for step in range(1, self.config.ism_steps + 1):
            then = (before * step) // self.config.ism_steps
            noisy = sds.ddim_move(denoiser.unconditional(noisy, now, views), noisy, alphas[now], alphas[then])
            now = then
        compared = denoiser.unconditional(noisy, now, views)
        return sds.ddim_move(compared, noisy, alphas[now], alphas[timesteps]), compared
