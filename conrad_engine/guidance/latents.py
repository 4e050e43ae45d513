"""Between rendered pictures and the latents of a diffusion model, with the gradient."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..config import WeightsConfig
from ..model_files import DTYPES, is_xl, load_component, model_folder
from .frozen_encoder import rewrite_encoder
from .fused_norms import fuse_norms, keep_layout
from .memory import MemoryPlan

Pictures = Float[Tensor, "n 3 height width"]
TILE = 256
"""Pixels a side of a tile, where the autoencoder sees the picture in tiles."""

TINY_SCALING = 0.18215
"""Tiny autoencoders answer Stable Diffusion's latents already scaled by this."""


def composited(rgba: Float[Tensor, "n 4 height width"], background: Float[Tensor, "n 3 1 1"]) -> Pictures:
    """Premultiplied color over a plain background."""
    return rgba[:, :3] + (1 - rgba[:, 3:]) * background


def resized(pictures: Float[Tensor, "n c height width"], size: int) -> Float[Tensor, "n c size size"]:
    """Square pictures of another size; smoothed first where they shrink."""
    if pictures.shape[-1] == size:
        return pictures
    return F.interpolate(
        pictures, (size, size), mode="bilinear", align_corners=False, antialias=pictures.shape[-1] > size
    )


def on_device(network: Any, device: torch.device, compiles: bool = False) -> Any:
    """A frozen network of diffusers where it will run, on a GPU in its fastest exact form."""
    network = network.to(device)
    if device.type == "cuda":
        make_fast(network, compiles)
    return network


@contextmanager
def searched_convolutions(is_wanted: bool) -> Iterator[None]:
    """Inside, cuDNN tries its algorithms on every new shape of a convolution and keeps the fastest, if that is wanted.

    Zero123's first step takes 2 s longer with it (H100) and the others 29.0 ms, 28.7 without: it is for jobs that have the
    time to compile their networks too.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or is_wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def make_fast(network: Any, compiles: bool = False) -> None:
    """Channels-last layout, and group norms fused or the whole compiled, in place; what the network computes stays the same.

    A captured UNet of Stable Diffusion 2.1 takes 11.3 ms as it comes, 9.7 in this layout, 8.6 with fused norms, 6.1 compiled
    (H200). Compiling happens at the first call; its results are kept between runs.
    """
    network.to(memory_format=torch.channels_last)
    if compiles:  # fuses the norms itself
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "conrad" / "compiled"))
        keep_layout(network)
        network.compile(dynamic=False)
    else:
        fuse_norms(network)


def in_layout(pictures: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """The memory layout that the networks want their input in."""
    return pictures.contiguous(memory_format=torch.channels_last) if pictures.is_cuda else pictures


class LatentSpace:
    """An autoencoder of diffusers, its own or a tiny one, and the scale of its latents."""

    def __init__(self, vae: Any, device: torch.device) -> None:
        from diffusers import AutoencoderTiny

        self.vae = vae
        self.dtype = vae.dtype
        self.is_tiny = isinstance(vae, AutoencoderTiny)
        vae.to(device)
        if device.type == "cuda":
            self.make_fast()
        self.scaling = float(vae.config.scaling_factor)
        self.factor = 2 ** (len(vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels) - 1)
        """Pixels a latent."""

    def make_fast(self) -> None:
        """Rewrite what the gradient runs through; see `frozen_encoder` and `fused_norms`.

        Never compiled: with its gradient that is slower than the fused norms (7.8 against 7.2 ms, Stable Diffusion on an H200).
        """
        if not self.is_tiny:
            rewrite_encoder(self.vae)
        make_fast(self.vae.encoder)

    def apply(self, plan: MemoryPlan) -> None:
        """Trade time for memory as the preset says."""
        if plan.recomputes:
            self.vae.enable_gradient_checkpointing()
        else:
            self.vae.disable_gradient_checkpointing()
        if plan.tiles and not self.is_tiny:
            self.vae.enable_tiling()
            self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = TILE, TILE // self.factor
        elif not self.is_tiny:
            self.vae.disable_tiling()

    def encode(self, rgb: Pictures) -> Float[Tensor, "n 4 h w"]:
        """Scaled latents of pictures in [0, 1], differentiable: the posterior's mean, which has no noise of its own."""
        if self.is_tiny:
            return self.vae.encode(self._input(rgb)).latents.float() * self.scaling
        return self.vae.encode(self._input(rgb)).latent_dist.mode().float() * self.scaling

    def encode_unscaled(self, rgb: Pictures) -> Float[Tensor, "n 4 h w"]:
        """Latents as the autoencoder gives them, which is how Zero123 takes its condition picture."""
        return self.encode(rgb) / (TINY_SCALING if self.is_tiny else self.scaling)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n 4 h w"]) -> Pictures:
        pictures = self.vae.decode((latents / self.scaling).to(self.dtype)).sample
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    def _input(self, rgb: Pictures) -> Pictures:
        return in_layout(rgb.to(self.dtype) * 2 - 1)


def find_tiny_autoencoder(weights: WeightsConfig) -> Path | None:
    """The folder of the tiny autoencoder, if the settings name one; errors as those of `model_folder`."""
    return model_folder(weights.tiny_autoencoder, ("",), weights) if weights.tiny_autoencoder else None


def load_latent_space(folder: Path, weights: WeightsConfig, device: torch.device) -> LatentSpace:
    """A model's own autoencoder, or the tiny one that the settings name."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    dtype = DTYPES[weights.precision]
    if tiny := find_tiny_autoencoder(weights):
        return LatentSpace(load_component(tiny, "", AutoencoderTiny, dtype, weights), device)
    # XL's autoencoder overflows in float16 unless its settings say otherwise. In other models' settings the same word is only
    # diffusers' default, written there by whoever saved them anew, and diffusers does not heed it either.
    needs_float32 = is_xl(folder) and AutoencoderKL.load_config(folder, subfolder="vae").get("force_upcast", True)
    if dtype == torch.float16 and needs_float32:
        dtype, weights = torch.float32, replace(weights, precision="float32")
    return LatentSpace(load_component(folder, "vae", AutoencoderKL, dtype, weights), device)


def picture_gradient(
    rgba: Float[Tensor, "n 4 height width"],
    to_latents: Callable[[Tensor], Tensor],
    latent_gradient: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, "n 4 height width"], Tensor]:
    """The gradient to pictures of a loss whose gradient to their latents is known.

    Args:
        to_latents: From RGBA pictures to latents, differentiable.
        latent_gradient: From detached latents to the loss's gradient.

    Returns:
        The gradient to `rgba`, and the one to the latents.
    """
    leaf = rgba.detach().float().requires_grad_()
    with torch.enable_grad():
        latents = to_latents(leaf)
    with torch.no_grad():
        gradient = latent_gradient(latents.detach()).float()
    # The backward pass is linear: with a largest element of one, half precision neither overflows nor loses small parts.
    largest = gradient.abs().amax().clamp(min=1e-20)
    (to_rgba,) = torch.autograd.grad(latents, leaf, gradient / largest)
    return to_rgba * largest, gradient
