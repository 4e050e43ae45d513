"""Diffusion priors: the embedded one by number of views, and latent models of the published sizes with random weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..guidance.embedded.prior import fast_precision
from ..guidance.frozen_encoder import rewrite_encoder
from ..guidance.fused_norms import fuse_norms, keep_layout
from .ceilings import Ceilings, count_flop
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
from .report import EXPECTED_ERRORS, Report, relative_error


def run(report: Report, ceilings: Ceilings, compiles: bool = False) -> None:
    """All priors; `compiles` adds rows of torch.compile, which takes minutes."""
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    _embedded(report, ceilings)
    for model in (SD21,) if report.device.type == "cpu" else (SD21, ZERO123):
        try:
            _unet(report, ceilings, model, compiles)
            _autoencoder(report, ceilings, model, compiles)
        except EXPECTED_ERRORS as error:
            report.fail(model.name, error)


def half(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def _embedded(report: Report, ceilings: Ceilings) -> None:
    device, dtype = report.device, fast_precision(report.device)
    prior, weights = embedded_prior(device, dtype)
    report.begin(
        "embedded prior",
        f"one guided denoising of n views together, {str(dtype).removeprefix('torch.')}, {weights} weights; "
        "floor: its operations at the matrix rate",
    )
    size = prior.net.size
    for n in (1, 2) if report.is_small else (1, 2, 4, 8):
        noisy, time = torch.randn(n, 4, size, size, device=device), torch.full((n,), 0.6, device=device)
        angles = torch.linspace(0.3, 2 * math.pi, n, device=device)
        cameras = torch.stack([angles, 0 * angles + 0.2, 0 * angles + 2.5, 0 * angles + 0.3], 1)

        def denoise(noisy: Tensor = noisy, time: Tensor = time, cameras: Tensor = cameras) -> Tensor:
            return prior.denoised(noisy, time, cameras, 2.0, is_joint=True)

        floor_ms = ceilings.floor_ms(flop=count_flop(denoise), dtype=dtype)
        report.time(f"{n} views", denoise, floor_ms)
        report.time(f"{n} views, captured", denoise, floor_ms, is_captured=True)


def unet_inputs(
    model: LatentModel, device: torch.device, dtype: torch.dtype, is_small: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and conditions for all views with guidance."""
    n, side = 2 * model.n_views, 8 if is_small else model.picture_size // 8
    x = torch.randn(n, model.in_channels, side, side, device=device, dtype=dtype)
    timesteps = torch.randint(20, 980, (n,), device=device)
    return x, timesteps, torch.randn(n, model.n_tokens, model.n_text, device=device, dtype=dtype)


def unet_function(unet: Callable[..., tuple[Tensor]], inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with torch.no_grad():
            return unet(*inputs, return_dict=False)[0]

    return forward


def channels_last(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return inputs[0].to(memory_format=torch.channels_last), *inputs[1:]


def _unet(report: Report, ceilings: Ceilings, model: LatentModel, compiles: bool) -> None:
    device, dtype = report.device, half(report.device)
    unet = make_unet(model, device, dtype, report.is_small)
    inputs = unet_inputs(model, device, dtype, report.is_small)
    plain = unet_function(unet, inputs)
    flop = count_flop(plain)
    millions = sum(p.numel() for p in unet.parameters()) / 1e6
    report.begin(
        f"{model.name}, UNet",
        f"{len(inputs[0])} latents of {inputs[0].shape[-1]} px, {millions:.0f} M, {flop / 1e12:.2f} TFLOP",
    )
    floor_ms = ceilings.floor_ms(flop=flop, dtype=dtype)
    expected = plain()
    report.time("plain", plain, floor_ms)
    report.time("plain, captured", plain, floor_ms, is_captured=True)
    keep_layout(unet)
    variants = [("channels last", unet.to(memory_format=torch.channels_last))]
    variants.append(("channels last, fused norms", copy.deepcopy(unet)))
    fuse_norms(variants[-1][1])
    if compiles:
        variants.append(("compiled", torch.compile(unet, fullgraph=True, dynamic=False)))
    for name, network in variants:
        fast = unet_function(network, channels_last(inputs))
        error = {"error": relative_error(fast(), expected)}
        report.time(name, fast, floor_ms, error)
        report.time(f"{name}, captured", fast, floor_ms, error, is_captured=True)


def encoder_function(encode: Callable[[Tensor], Tensor], pictures: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """Forward, and backward to the pictures."""
    leaf = pictures.detach().requires_grad_()

    def both() -> Tensor:
        leaf.grad = None
        encode(leaf).backward(weight)
        assert leaf.grad is not None, "filled by backward"
        return leaf.grad

    return both


def _autoencoder(report: Report, ceilings: Ceilings, model: LatentModel, compiles: bool) -> None:
    device, dtype = report.device, half(report.device)
    size = 64 if report.is_small else model.picture_size
    vae = make_autoencoder(device, dtype, report.is_small)
    pictures = torch.rand(model.n_views, 3, size, size, device=device, dtype=dtype) * 2 - 1
    weight = torch.randn(model.n_views, 4, size // 8, size // 8, device=device, dtype=dtype)
    turned = pictures.to(memory_format=torch.channels_last)
    plain = encoder_function(Encoder(vae), pictures, weight)
    flop = count_flop(plain)
    report.begin(
        f"{model.name}, autoencoder",
        f"encoding {model.n_views} pictures of {size} px, forward and backward to them, {flop / 1e12:.2f} TFLOP",
    )
    floor_ms = ceilings.floor_ms(flop=flop, dtype=dtype)
    expected = plain()
    report.time("plain", plain, floor_ms, n_calls=10)
    report.time("plain, captured", plain, floor_ms, is_captured=True)
    rewrite_encoder(vae)
    encoder = Encoder(vae).to(memory_format=torch.channels_last)
    variants = [("rewritten, channels last", encoder), ("rewritten, fused norms", copy.deepcopy(encoder))]
    fuse_norms(variants[1][1])
    if compiles:
        variants.append(("rewritten, compiled", torch.compile(encoder, fullgraph=True, dynamic=False)))
    for name, network in variants:
        fast = encoder_function(network, turned, weight)
        error = {"error of the gradient": relative_error(fast(), expected)}
        report.time(name, fast, floor_ms, error)
        report.time(f"{name}, captured", fast, floor_ms, error, is_captured=True)
    tiny = TinyEncoder(make_tiny_autoencoder(device, dtype)).to(memory_format=torch.channels_last)
    small = encoder_function(tiny, turned, weight)
    tiny_floor_ms = ceilings.floor_ms(flop=count_flop(small), dtype=dtype)
    report.time("tiny autoencoder (another function)", small, tiny_floor_ms)
    report.time("tiny autoencoder, captured", small, tiny_floor_ms, is_captured=True)
