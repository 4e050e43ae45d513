"""Diffusion networks of the published sizes with random weights: they cost what the real ones cost and know nothing.

Sizes from the models' published `unet/config.json` and `vae/config.json` (Stable Diffusion 2.1-base, Zero-1-to-3 in diffusers
layout, the tiny autoencoder's defaults).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import EmbeddedPriorConfig
from ..errors import MissingDependency
from ..guidance.embedded.sampling import ConditionedPrior
from ..guidance.embedded.unet import Reference, ViewPrior, in_precision
from ..guidance.embedded.weights import load, shipped_path

LATENT_SCALE = 0.18215
"""Stable Diffusion's and Zero123's scale of latents."""


@dataclass(frozen=True)
class LatentModel:
    """One published size, and how its step uses it."""

    name: str
    n_views: int
    picture_size: int
    in_channels: int
    n_tokens: int
    n_text: int
    head_dim: int | tuple[int, ...]
    uses_linear: bool
    scale: float
    """Classifier-free guidance of its step."""


SD21 = LatentModel("SD 2.1", 1, 512, 4, 77, 1024, (5, 10, 20, 20), True, 7.5)
ZERO123 = LatentModel("Zero123", 4, 256, 8, 1, 768, 8, False, 3.0)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise MissingDependency(
            "the latent models of the benchmark need diffusers: pip install 'conrad-engine[sd]'"
        ) from None
    # It warns of every cast, also of those that its own pipelines make.
    diffusers.utils.logging.set_verbosity_error()
    return diffusers


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Networks come into being there and so: single precision on the way would take twice the memory of a job."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def make_unet(model: LatentModel, device: torch.device, dtype: torch.dtype, is_small: bool) -> Any:
    """The UNet; `is_small` makes a tiny one of the same structure."""
    # Diffusers calls the number of heads `attention_head_dim` in these two families' configurations.
    head_dim = 8 if is_small else model.head_dim
    with _made_on(device, dtype):
        unet = _diffusers().UNet2DConditionModel(
            sample_size=model.picture_size // 8,
            in_channels=model.in_channels,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            block_out_channels=(32, 32, 64, 64) if is_small else (320, 640, 1280, 1280),
            layers_per_block=1 if is_small else 2,
            cross_attention_dim=model.n_text,
            attention_head_dim=head_dim,
            use_linear_projection=model.uses_linear,
        )
    return unet.eval().requires_grad_(False)


def make_autoencoder(device: torch.device, dtype: torch.dtype, is_small: bool) -> Any:
    """Stable Diffusion's autoencoder; Zero123 uses the same."""
    with _made_on(device, dtype):
        vae = _diffusers().AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            layers_per_block=1 if is_small else 2,
            block_out_channels=(32,) * 4 if is_small else (128, 256, 512, 512),
            norm_num_groups=32,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=512,
        )
    return vae.eval().requires_grad_(False)


def make_tiny_autoencoder(device: torch.device, dtype: torch.dtype) -> Any:
    with _made_on(device, dtype):
        tiny = _diffusers().AutoencoderTiny()
    return tiny.eval().requires_grad_(False)


class Encoder(nn.Module):
    """Pictures in [-1, 1] to the scaled mean of their latents, by an autoencoder's own modules."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.quantize = vae.encoder, vae.quant_conv

    def forward(self, pictures: Tensor) -> Tensor:
        return self.quantize(self.encoder(pictures))[:, :4] * LATENT_SCALE


class TinyEncoder(nn.Module):
    """The same by the tiny autoencoder, whose latents come scaled."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder = vae.encoder

    def forward(self, pictures: Tensor) -> Tensor:
        return self.encoder(pictures)


def embedded_prior(device: torch.device, dtype: torch.dtype) -> tuple[ConditionedPrior, str]:
    """The shipped prior, or random weights of its size where there is no weights file, looking at a random picture."""
    if shipped_path().is_file():
        net, weights = load(EmbeddedPriorConfig().weights), "shipped"
    else:
        net, weights = ViewPrior().requires_grad_(False).eval(), "random"
        for parameter in net.parameters():
            # Layers that training starts at zero would let everything after them work on zeros.
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    net = in_precision(net, dtype).to(device).to(memory_format=torch.channels_last)
    one = torch.ones(1, device=device)
    camera = torch.tensor([[0.0, 0.2, 2.5, math.tan(0.3)]], device=device)
    facts = Reference(camera, one, one, 0 * one, 0 * one)
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    picture = torch.rand(1, 4, net.size, net.size, device=device) * 2 - 1
    return ConditionedPrior(net, picture, facts, cast), weights
