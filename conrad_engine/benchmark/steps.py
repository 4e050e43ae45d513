"""Whole iterations of score distillation: the engine's loop as it is, the same work in one CUDA graph, and a peer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras import Camera, default_camera
from ..config import HALF_FRAME, FieldConfig, PipelineConfig, StableDiffusionConfig, Zero123Config, preset
from ..constraint import reference_view
from ..fields.radiance_field import HashField, make_field
from ..graphs import WARM_UP_CALLS
from ..guidance import sds
from ..guidance.distill import Denoiser, Distiller, Draws, NoiseSchedule
from ..guidance.embedded.prior import camera_rows, fast_precision
from ..guidance.embedded.sampling import ConditionedPrior
from ..guidance.frozen_encoder import rewrite_encoder
from ..guidance.fused_norms import fuse_norms
from ..guidance.interfaces import Guidance, GuidanceResult, ReferencePicture
from ..guidance.latents import LatentSpace, on_device
from ..guidance.memory import PLANS
from ..rendering.renderer import render_rays
from ..state import make_state
from ..step import TrainStep
from .ceilings import Ceilings, count_flop
from .fields import PAPER_GRID, SMALL_GRID, orbit_cameras, unit_box
from .guidance import channels_last, half, unet_inputs
from .networks import (
    SD21,
    ZERO123,
    Encoder,
    LatentModel,
    TinyEncoder,
    embedded_prior,
    make_autoencoder,
    make_tiny_autoencoder,
    make_unet,
)
from .peer import PeerStep
from .report import EXPECTED_ERRORS, Report, Row, Timing


def run(report: Report, ceilings: Ceilings, compiles: bool = False) -> None:
    """All steps; `compiles` compiles the latent models' networks, which takes minutes."""
    torch.set_float32_matmul_precision("high")  # as a job does
    torch.manual_seed(0)
    _loop(report)
    torch.backends.cudnn.benchmark = True  # as a job with a latent model does
    _embedded(report)
    for model in (SD21,) if report.device.type == "cpu" else (SD21, ZERO123):
        try:
            _latent_loop(report, ceilings, model)
            if compiles:
                _latent_loop(report, ceilings, model, compiles)
            _latent(report, ceilings, model, compiles)
        except EXPECTED_ERRORS as error:
            report.fail(model.name, error)


def rate(timing: Timing | None, n_views: int, report: Report) -> None:
    """A row of iterations and views a second."""
    if timing is not None:
        per_s = 1000 / timing.median_ms
        report.add(Row("", notes={"iterations/s": per_s, "views/s": per_s * n_views}))


@dataclass(frozen=True)
class RaySettings:
    """What a step renders."""

    size: int
    n_samples: int


class StaticStep:
    """Cameras, rays, field, a gradient on the pictures, backward, Adam: static shapes and no host in between."""

    def __init__(
        self,
        config: FieldConfig,
        rays: RaySettings,
        n_views: int,
        to_loss: Callable[[Tensor, Camera], tuple[Tensor, Tensor]],
        device: torch.device,
    ) -> None:
        """
        Args:
            config: The field.
            rays: Size of the pictures.
            n_views: Pictures a step.
            to_loss: From premultiplied RGBA pictures (n, 4, h, w) and their cameras to a tensor that depends on them and
                the gradient that flows into it.
            device: Where it runs.
        """
        self.rays, self.n_views, self.to_loss, self.device = rays, n_views, to_loss, device
        self.field = make_field(config, unit_box(device))
        on_gpu = device.type == "cuda"
        self.adam = torch.optim.Adam(self.field.parameters(), lr=0.01, fused=on_gpu, capturable=on_gpu)

    def pictures(self, cameras: Camera) -> Tensor:
        origins, directions = cameras.rays()
        self.field.prepare()
        jitter = torch.rand(origins[..., 0].numel(), 1, device=self.device)
        rendering = render_rays(
            self.field, origins.reshape(-1, 3), directions.reshape(-1, 3), self.rays.n_samples, jitter=jitter
        )
        size = self.rays.size
        return rendering.rgba.view(self.n_views, size, size, 4).permute(0, 3, 1, 2)

    def __call__(self) -> None:
        self.adam.zero_grad(set_to_none=True)
        cameras = orbit_cameras(self.n_views, self.rays.size, self.device)
        value, gradient = self.to_loss(self.pictures(cameras), cameras)
        value.backward(gradient)
        self.adam.step()


def embedded_loss(prior: ConditionedPrior) -> Callable[[Tensor, Camera], tuple[Tensor, Tensor]]:
    """Score distillation by the embedded prior, with the noise time drawn on the device."""

    def to_loss(rgba: Tensor, cameras: Camera) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            time = (0.2 + 0.6 * torch.rand(1, device=rgba.device)).expand(len(rgba))
            angle = time[:, None, None, None] * (torch.pi / 2)
            noisy = angle.cos() * (rgba * 2 - 1) + angle.sin() * torch.randn_like(rgba)
            clean = (prior.denoised(noisy, time, camera_rows(cameras), 2.0, is_joint=True) + 1) / 2
        return rgba, (rgba.detach() - clean) / rgba.numel()

    return to_loss


Networks = tuple[Callable[..., tuple[Tensor]], Callable[[Tensor], Tensor]]
"""UNet and encoder."""


def latent_loss(
    model: LatentModel,
    unet: Callable[..., tuple[Tensor]],
    encode: Callable[[Tensor], Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    picture_size: int,
    memory_format: torch.memory_format,
) -> Callable[[Tensor, Camera], tuple[Tensor, Tensor]]:
    """Score distillation by a latent model (arXiv:2209.14988): picture, latents, guided noise, gradient to the latents."""
    condition, dtype = inputs[2], inputs[2].dtype
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=condition.device) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    # Zero123 sees the reference picture's latents beside the noisy ones.
    beside = inputs[0][:, 4:]

    def to_loss(rgba: Tensor, cameras: Camera) -> tuple[Tensor, Tensor]:
        rgb = rgba[:, :3] + (1 - rgba[:, 3:])
        large = F.interpolate(rgb, (picture_size, picture_size), mode="bilinear", align_corners=False)
        latents = encode((large.to(dtype) * 2 - 1).contiguous(memory_format=memory_format))
        with torch.no_grad():
            timesteps = torch.randint(20, 980, (len(rgba),), device=rgba.device)
            alphas = alphas_cumprod[timesteps]
            noise = torch.randn_like(latents, dtype=torch.float32)
            noisy = sds.add_noise(latents.float(), noise, alphas).to(dtype)
            twice = torch.cat([torch.cat([noisy, noisy]), beside], 1).contiguous(memory_format=memory_format)
            predicted = unet(twice, torch.cat([timesteps, timesteps]), condition, return_dict=False)[0]
            without, conditional = predicted.float().chunk(2)
            noise_pred = sds.guided(without, conditional, model.scale)
            gradient = sds.sds_gradient(noise_pred, noise, sds.weighting(alphas, "sds"))
        return latents, (gradient / len(rgba)).to(latents.dtype)

    return to_loss


def _loop(report: Report) -> None:
    """`step.TrainStep` with the embedded prior, as a job runs it."""
    from ..guidance.embedded.prior import EmbeddedPrior

    report.begin("step, the engine's loop", "step.TrainStep of the presets, embedded prior, constraint and losses")
    for name in ("draft",) if report.is_small else ("draft", "standard"):
        config = preset(name)
        _job_steps(
            report, f"preset {name}", config, lambda config=config: EmbeddedPrior(config.guidance, report.device)
        )


def _job_steps(
    report: Report,
    name: str,
    config: PipelineConfig,
    make_prior: Callable[[], Guidance],
    floor_ms: float | None = None,
) -> None:
    """Rows of a job's steps: as they are, and on CUDA captured."""
    n_views = config.optimize.n_views
    for capture in ("off", "auto") if report.device.type == "cuda" else ("off",):
        label = f"{name}, {n_views} views{', captured' if capture == 'auto' else ''}"
        try:
            chosen = replace(config, optimize=replace(config.optimize, capture=capture))
            step = job_step(chosen, make_prior(), report.device)
            for _ in range(WARM_UP_CALLS + 1):
                step()
        except EXPECTED_ERRORS as error:
            report.fail(label, error)
            continue
        timing = report.time(label, step, floor_ms, n_calls=10 if report.is_small else 40)
        if timing is not None and capture == "auto" and not step.graphed.is_captured:
            report.add(Row("", notes={"not captured": True}))
        rate(timing, n_views, report)


def job_step(config: PipelineConfig, prior: Guidance, device: torch.device) -> TrainStep:
    """Steps from the middle of a job on, whose picture shows a ball."""
    config = replace(config, optimize=replace(config.optimize, warm_start_views=0, n_steps=5000))
    v, u = (np.mgrid[:128, :128] + 0.5) / 64 - 1
    mask = (np.hypot(u, v) < 0.8).astype(np.float32)
    rgb = np.stack([mask * 0.8, 0.5 + 0.4 * u, 0.5 + 0.4 * v], -1).astype(np.float32)
    camera = default_camera(128, 128, 10.0, 40.0)
    # As far away as a half frame of HALF_FRAME at the origin asks for.
    tangent = 64 / float(camera.intrinsics[0])
    c2w = camera.c2w.clone()
    c2w[:, 3] *= HALF_FRAME / tangent
    camera = replace(camera, c2w=c2w)
    view = reference_view(rgb, mask, camera).to(device)
    state = make_state(make_field(config.field_, unit_box(device)), [view], config, device)
    rgba = torch.from_numpy(np.concatenate([rgb * mask[..., None], mask[..., None]], -1)).permute(2, 0, 1)
    prior.set_reference(ReferencePicture(rgba.to(device), camera.to(device, torch.float32)))
    state.step = 2000
    return JobStep(state, prior, camera, config)


class JobStep(TrainStep):
    """Goes on to the next step by itself."""

    def __call__(self) -> dict[str, Tensor]:
        self.state.step += 1
        return super().__call__()


class RandomLatentPrior:
    """The engine's own distiller, as Stable Diffusion and Zero123 use it, on networks of random weights."""

    def __init__(
        self,
        model: LatentModel,
        unet: Callable[..., tuple[Tensor]],
        vae: torch.nn.Module,
        inputs: tuple[Tensor, Tensor, Tensor],
        picture_size: int,
        compiles: bool = False,
    ) -> None:
        """Changes the networks into their fast forms."""
        self.picture_size, device = picture_size, inputs[2].device
        self._scale, self._tokens = model.scale, inputs[2]
        self._beside = inputs[0][:, 4:] if model.in_channels > 4 else None
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=device) ** 2
        schedule = NoiseSchedule(torch.cumprod(1 - betas, 0), "epsilon")
        config = StableDiffusionConfig() if self._beside is None else Zero123Config()
        space = LatentSpace(vae, device)
        network = on_device(unet, device, compiles)
        self._distiller = Distiller(space, schedule, network, self._denoiser, config, PLANS[0], picture_size)

    def set_reference(self, reference: ReferencePicture) -> None:
        """The conditions are random as well."""

    def _denoiser(self, cameras: Camera) -> Denoiser:
        def guided(noisy: Tensor, timesteps: Tensor, views: slice) -> Tensor:
            plain, own = self._distiller.ask(noisy, timesteps, self._tokens, self._beside)
            return sds.guided(plain, own, self._scale)

        return Denoiser(guided, guided)

    def draw(self, n: int, progress: float, generator: torch.Generator | None = None) -> Draws:
        return self._distiller.draw(n, progress, generator, white_background=False)

    def distill(self, rgba: Tensor, cameras: Camera, draws: tuple[Tensor, ...]) -> GuidanceResult:
        return self._distiller.distill(rgba, cameras, draws)

    def gradient(
        self, rgba: Tensor, cameras: Camera, progress: float, generator: torch.Generator | None = None
    ) -> GuidanceResult:
        return self.distill(rgba, cameras, self.draw(len(rgba), progress, generator))


def _latent_loop(report: Report, ceilings: Ceilings, model: LatentModel, compiles: bool = False) -> None:
    """`step.TrainStep` with a latent model, hash grid, constraint and losses: the step that a job takes."""
    device, dtype, small = report.device, half(report.device), report.is_small
    picture_size = 64 if small else model.picture_size
    unet, vae = make_unet(model, device, dtype, small), make_autoencoder(device, dtype, small)
    inputs = unet_inputs(model, device, dtype, small)
    flop = _network_flop(model, unet, Encoder(vae), inputs, picture_size)
    rays = "16x16 rays x 16" if small else "64x64 rays x 128"
    report.begin(
        f"step, the engine's loop, {model.name}",
        f"step.TrainStep, hash grid, {rays} samples a view, constraint and losses; where the whole is not captured, the "
        "guidance captures itself; floor: UNet and autoencoder",
    )
    prior = RandomLatentPrior(model, unet, vae, inputs, picture_size, compiles)
    floor_ms = ceilings.floor_ms(flop=flop, dtype=dtype)
    name = f"{model.name}, compiled" if compiles else model.name
    _job_steps(report, name, latent_job(model, small), lambda: prior, floor_ms)


def latent_job(model: LatentModel, is_small: bool) -> PipelineConfig:
    """A job's settings with a latent model; the prior itself is given to its steps."""
    config = preset("standard")
    size, n_samples = (16, 16) if is_small else (64, 128)
    return replace(
        config,
        field_=SMALL_GRID if is_small else replace(PAPER_GRID, encoder="auto"),
        render=replace(config.render, size=size, n_samples=n_samples),
        optimize=replace(config.optimize, n_views=model.n_views),
    )


def _embedded(report: Report) -> None:
    device, dtype = report.device, fast_precision(report.device)
    prior, weights = embedded_prior(device, dtype)
    rays = RaySettings(prior.net.size, 16 if report.is_small else 64)
    report.begin(
        "step, embedded prior",
        f"{rays.size}x{rays.size} rays x {rays.n_samples} samples a view, field, guidance, Adam; {weights} weights, "
        "no constraint and no further losses",
    )
    grid = SMALL_GRID if report.is_small else replace(PAPER_GRID, encoder="auto")
    volume = FieldConfig(kind="dense_volume", resolution=24 if report.is_small else 96)
    for field_name, config in (("dense volume", volume), ("hash grid", grid)):
        for n_views in (1,) if report.is_small else (1, 4):
            step = StaticStep(config, rays, n_views, embedded_loss(prior), device)
            name = f"{field_name}, {n_views} views"
            timing = report.time(name, step)
            timing = report.time(f"{name}, captured", step, is_captured=True) or timing
            rate(timing, n_views, report)


def _latent(report: Report, ceilings: Ceilings, model: LatentModel, compiles: bool) -> None:
    device, dtype, small = report.device, half(report.device), report.is_small
    rays = RaySettings(16, 16) if small else RaySettings(64, 128)
    picture_size = 64 if small else model.picture_size
    unet, vae = make_unet(model, device, dtype, small), make_autoencoder(device, dtype, small)
    inputs = unet_inputs(model, device, dtype, small)
    flop = _network_flop(model, unet, Encoder(vae), inputs, picture_size)
    floor_ms = ceilings.floor_ms(flop=flop, dtype=dtype)
    report.begin(
        f"step, {model.name}",
        f"{model.n_views} views, {rays.size}x{rays.size} rays x {rays.n_samples} samples, pictures of {picture_size} px; "
        f"floor: operations of UNet and autoencoder, {flop / 1e12:.2f} TFLOP",
    )

    def time(name: str, networks: Networks, layout: torch.memory_format, floor_ms: float | None) -> None:
        loss = latent_loss(model, *networks, channels_last(inputs), picture_size, layout)
        step = StaticStep(
            SMALL_GRID if small else replace(PAPER_GRID, encoder="auto"), rays, model.n_views, loss, device
        )
        timing = report.time(name, step, floor_ms)
        timing = report.time(f"{name}, captured", step, floor_ms, is_captured=True) or timing
        rate(timing, model.n_views, report)

    time("plain", (unet, Encoder(vae)), torch.contiguous_format, floor_ms)
    if model is SD21:
        _peer(report, unet, vae, inputs, picture_size, floor_ms)
    for label, (denoise, encode, tiny) in fast_networks(unet, vae, make_tiny_autoencoder(device, dtype), compiles):
        time(label, (denoise, encode), torch.channels_last, floor_ms)
        time(f"{label}, tiny autoencoder", (denoise, tiny), torch.channels_last, None)


def fast_networks(
    unet: torch.nn.Module, vae: torch.nn.Module, tiny: torch.nn.Module, compiles: bool
) -> Iterator[tuple[str, tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]]]:
    """UNet, encoder and tiny encoder in their fast forms, one after the other; changes what it is given."""
    rewrite_encoder(vae)
    unet, *encoders = (x.to(memory_format=torch.channels_last) for x in (unet, Encoder(vae), TinyEncoder(tiny)))
    for encoder in encoders:
        fuse_norms(encoder)
    if compiles:
        # Compiling fuses the norms itself, but not as well where there is a gradient.
        yield "rewritten, fused norms, UNet compiled", (torch.compile(unet, fullgraph=True, dynamic=False), *encoders)
    fuse_norms(unet)
    yield "rewritten, fused norms", (unet, *encoders)


def _network_flop(
    model: LatentModel,
    unet: Callable[..., tuple[Tensor]],
    encoder: Encoder,
    inputs: tuple[Tensor, Tensor, Tensor],
    picture_size: int,
) -> float:
    """Operations of the networks in one step: the encoder's forward and backward pass, and the UNet."""
    loss = latent_loss(model, unet, encoder, inputs, picture_size, torch.contiguous_format)
    rgba = torch.rand(model.n_views, 4, 64, 64, device=inputs[0].device, requires_grad=True)
    cameras = orbit_cameras(model.n_views, 64, inputs[0].device)

    def networks() -> None:
        value, gradient = loss(rgba, cameras)
        value.backward(gradient)

    return count_flop(networks)


def _peer(
    report: Report,
    unet: Callable[..., tuple[Tensor]],
    vae: torch.nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor],
    picture_size: int,
    floor_ms: float,
) -> None:
    loss = latent_loss(SD21, unet, Encoder(vae), inputs, picture_size, torch.contiguous_format)
    grid = SMALL_GRID if report.is_small else replace(PAPER_GRID, encoder="auto")
    step = PeerStep(HashField(grid, unit_box(report.device)), loss, report.device, is_small=report.is_small)
    timing = report.time("threestudio's dreamfusion-sd, re-implemented", step, floor_ms)
    if timing is not None:
        report.add(Row("", notes={"samples kept": step.n_kept}))
    rate(timing, 1, report)
