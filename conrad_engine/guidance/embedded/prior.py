"""The prior that ships with the package, behind the `Guidance` interface: score distillation and full sampling of views."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...cameras import Camera, orbit_angles
from ...config import REFERENCE_EXTENT, EmbeddedPriorConfig
from ...errors import GuidanceError
from ..interfaces import GuidanceResult, ReferencePicture
from .sampling import ConditionedPrior
from .unet import Reference, alpha_sigma
from .weights import load_for_use


def camera_rows(cameras: Camera, base_azimuth_rad: float = 0.0) -> Float[Tensor, "n 4"]:
    """(azimuth, elevation, distance, tan_half_fov) of square cameras that look at the origin."""
    azimuth, elevation, distance = orbit_angles(cameras.positions)
    tan_half = cameras.width / 2 / cameras.intrinsics[..., 0]
    return torch.stack([azimuth - base_azimuth_rad, elevation, distance, tan_half], -1).float()


def resized(pictures: Float[Tensor, "n c h w"], size: int) -> Float[Tensor, "n c size size"]:
    """Pictures of another size, by area averaging where they shrink."""
    if pictures.shape[-1] == size:
        return pictures
    if pictures.shape[-1] > size:
        return F.interpolate(pictures, size=(size, size), mode="area")
    return F.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=False)


def fast_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    if device.type != "cpu":
        return torch.float32
    probes = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return torch.bfloat16 if any(probe is not None and probe() for probe in probes) else torch.float32


def distances_to_clean(own: Float[Tensor, "n 4 h w"], clean: Float[Tensor, "n 4 h w"]) -> Float[Tensor, "n 4 h w"]:
    """What is to be taken off views, premultiplied RGBA, to become the clean ones: their difference, but that inside the object
    opacity and color do not answer for each other.

    The network is not sure of its outline: inside it says an alpha of 0.97 and colors as much darker. An opaque surface cannot
    follow in opacity, and would in color, step by step: rear sides came out 0.04 darker than the truth. So the difference of
    premultiplied colors a c - a' c' is parted into a (c - c'), which is left to the colors, and (a - a') c', which pulls at
    the opacity as strongly as before: |c'|^2 (a - a').
    """
    alpha, own_alpha = clean[:, 3:], own[:, 3:]
    is_inside = (alpha > 0.5) & (own_alpha > 0.5)
    straight = clean[:, :3] / alpha.clamp(min=0.5)
    colors = own[:, :3] - torch.where(is_inside, straight * own_alpha, clean[:, :3])
    pull = torch.where(is_inside, 1 + straight.square().sum(1, keepdim=True), 1.0)
    return torch.cat([colors, pull * (own_alpha - alpha)], 1)


class EmbeddedPrior:
    """View-conditioned diffusion at 64 px, weights included. Satisfies `guidance.interfaces.Guidance`."""

    def __init__(self, config: EmbeddedPriorConfig, device: torch.device | str) -> None:
        """Load the weights.

        Raises:
            GuidanceError: The weights are missing, damaged or of another architecture; or the precision is unknown.
        """
        precisions = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if config.precision != "auto" and config.precision not in precisions:
            raise GuidanceError(f"unknown precision {config.precision!r}: use auto, float32 or bfloat16")
        self.config, self.device = config, torch.device(device)
        dtype = precisions.get(config.precision) or fast_precision(self.device)
        self.net = load_for_use(config.weights, self.device, dtype)
        self.picture_size = self.net.size
        self._cast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self._conditioned: ConditionedPrior | None = None
        self._base_azimuth_rad = 0.0

    def set_reference(self, reference: ReferencePicture) -> None:
        """Take the picture to condition on; see `Guidance.set_reference`."""
        rgba = reference.rgba.to(self.device, torch.float32)[None]
        rows = camera_rows(reference.camera.to(self.device))[None]
        self._base_azimuth_rad = float(rows[0, 0])
        rows = rows * torch.tensor([0.0, 1, 1, 1], device=self.device)
        self._conditioned = self._condition(rgba, rows, reference.is_elevation_known, reference.object_size)

    def _condition(self, rgba: Tensor, rows: Tensor, is_elevation_known: bool, size: float | None) -> ConditionedPrior:
        one = torch.ones(1, device=self.device)
        facts = Reference(
            camera=rows,
            is_elevation_known=one * is_elevation_known,
            is_present=one,
            log_size=one * (0.0 if size is None else math.log(size / REFERENCE_EXTENT)),
            is_size_known=one * (size is not None),
        )
        return ConditionedPrior(self.net, resized(rgba, self.picture_size) * 2 - 1, facts, self._cast)

    def _ready(self) -> ConditionedPrior:
        if self._conditioned is None:
            raise GuidanceError("the embedded prior has no reference picture yet: call set_reference first")
        return self._conditioned

    def gradient(
        self,
        rgba: Float[Tensor, "n 4 height width"],
        cameras: Camera,
        progress: float,
        generator: torch.Generator | None = None,
    ) -> GuidanceResult:
        """Score distillation in its denoised-picture form: the gradient of half the summed squared difference to the
        pictures the prior sees behind a noised version of these, parted into colors and opacity as `distances_to_clean` says.
        All views share one noise level and see each other.

        See `Guidance.gradient` for the arguments.
        """
        time, noise = self.draw(len(rgba), progress, generator)
        return replace(self.distill(rgba, cameras, (time, noise)), notes={"t": float(time)})

    def draw(
        self, n: int, progress: float, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "n 4 size size"]]:
        """The noise level and the noise of one step; see `SplitGuidance.draw`."""
        config, size = self.config, self.picture_size
        source = torch.device("cpu") if generator is None else generator.device
        middle = config.t_start + (config.t_end - config.t_start) * min(progress, 1.0)
        spread = (torch.rand((), generator=generator, device=source) * 2 - 1) * config.t_spread
        noise = torch.randn(n, 4, size, size, generator=generator, device=source)
        return (middle + spread).clamp(0.02, 0.99).to(self.device), noise.to(self.device)

    def distill(
        self, rgba: Float[Tensor, "n 4 height width"], cameras: Camera, draws: tuple[Tensor, Tensor]
    ) -> GuidanceResult:
        """See `SplitGuidance.distill`."""
        time, noise = draws
        with torch.enable_grad():
            pictures = rgba.detach().to(self.device, torch.float32).requires_grad_()
            small = resized(pictures, self.picture_size)
        t = time.expand(len(rgba))
        alpha, sigma = alpha_sigma(t)
        noisy = alpha * (small.detach() * 2 - 1) + sigma * noise
        rows = camera_rows(cameras.to(self.device), self._base_azimuth_rad)
        clean = (self._ready().denoised(noisy, t, rows, self.config.scale, is_joint=True) + 1) / 2
        difference = distances_to_clean(small.detach(), clean)
        # As a loss: given a gradient, torch imports its symbolic shapes and sympy with them, a third of a second of every job.
        with torch.enable_grad():
            loss = (small * difference).sum()
        (gradient,) = torch.autograd.grad(loss, pictures)
        return GuidanceResult(gradient.to(rgba), (small.detach() - clean).square().mean(), clean)

    @torch.no_grad()
    def mirror_errors(self, azimuths_rad: Float[Tensor, " n"], times: Sequence[float]) -> Float[Tensor, " n"]:
        """See `ViewSampler.mirror_errors`: the error of denoising it, the same noise for all azimuths."""
        conditioned = self._ready()
        picture = conditioned.pictures.flip(-1)
        azimuths_rad = azimuths_rad.to(self.device)
        rows = conditioned.reference.camera[:1].repeat(len(azimuths_rad), 1)
        rows[:, 0] = azimuths_rad
        generator, errors = torch.Generator().manual_seed(0), []
        for time in times:
            noise = torch.randn(picture.shape, generator=generator).to(self.device)
            t = torch.full_like(azimuths_rad, time)
            alpha, sigma = alpha_sigma(t)
            clean = conditioned.denoised(alpha * picture + sigma * noise, t, rows, 1.0, is_joint=False)
            errors.append((clean - picture).square().mean((1, 2, 3)).log())
        return torch.stack(errors).mean(0)

    def know_mirrored(self, azimuth_rad: float) -> None:
        """See `ViewSampler.know_mirrored`."""
        conditioned = self._ready()
        place = conditioned.reference.camera[:1].clone()
        place[:, 0] = azimuth_rad
        conditioned.know(conditioned.pictures.flip(-1), place)

    def sample_views(
        self,
        cameras: Camera,
        n_steps: int,
        scale: float | None = None,
        generator: torch.Generator | None = None,
        is_joint: bool = True,
        on_step: Callable[[int], None] | None = None,
        n_drafts: int = 1,
        temperature: float = 1.0,
    ) -> Float[Tensor, "n 4 size size"]:
        """Views from pure noise, premultiplied RGBA in [0, 1].

        Args:
            cameras: Batch of n square cameras that look at the origin.
            n_steps: Denoising steps; 10 to 30.
            scale: Classifier-free guidance; the configured one when None.
            generator: Source of the noise.
            is_joint: Denoise all views together, so that they agree; one by one otherwise.
            on_step: Called after each step with the number of steps done, from 1 to `n_steps`; it may raise to stop.
            n_drafts, temperature: See `ConditionedPrior.sample`.
        """
        rows = camera_rows(cameras.to(self.device), self._base_azimuth_rad)
        scale = self.config.scale if scale is None else scale
        clean = self._ready().sample(rows, n_steps, scale, generator, is_joint, on_step, n_drafts, temperature)
        return (clean + 1) / 2
