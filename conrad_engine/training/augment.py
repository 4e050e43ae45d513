"""Changes that make clean renders look like cut-out photos.

A camera's colors are the object's as far as anyone knows, so `shifted_colors` changes a reference and its targets alike;
what hides the object (blur, noise, compression, a ragged mask) befalls the reference only. All functions take and return
tensors on any device; randomness comes from torch's own generator of that device.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

P_COLOR_SHIFT = 0.3
P_UNTOUCHED = 0.5
P_EACH = 0.4
"""Chance of each single degradation in a picture that gets some."""


def _uniform(low: float, high: float, like: Tensor) -> Float[Tensor, "b 1 1 1"]:
    return torch.rand(len(like), 1, 1, 1, device=like.device) * (high - low) + low


def _sometimes(changed: Tensor, original: Tensor, chance: float = P_EACH) -> Tensor:
    """The changed picture in some rows of the batch."""
    return torch.where(_uniform(0, 1, original) < chance, changed, original)


@functools.cache
def _color_spread(device: torch.device) -> Float[Tensor, " 6"]:
    """Copied to the device once: each copy from the host waits for all that the device still has to do."""
    return torch.tensor([0.06, 0.06, 0.06, 0.15, 0.12, 0.2], device=device)


def draw_color_shifts(n: int, device: torch.device) -> Float[Tensor, "n 6"]:
    """Random parameters of `shifted_colors`: logarithms of three channel gains, gamma, contrast and saturation."""
    shifts = torch.randn(n, 6, device=device) * _color_spread(device)
    shifts[:, :3] += 0.12 * torch.randn(n, 1, device=device)
    return torch.where(torch.rand(n, 1, device=device) < P_COLOR_SHIFT, shifts, torch.zeros_like(shifts))


def shifted_colors(pictures: Float[Tensor, "b 4 h w"], shifts: Float[Tensor, "b 6"]) -> Float[Tensor, "b 4 h w"]:
    """Premultiplied pictures in [0, 1] with another white balance, brightness, gamma, contrast and saturation."""
    alpha = pictures[:, 3:]
    gain, (gamma, contrast, saturation) = shifts[:, :3, None, None], shifts[:, 3:, None, None, None].unbind(1)
    rgb = (pictures[:, :3] / alpha.clamp(min=1e-3)).clamp(1e-3, 1)
    rgb = (rgb ** gamma.exp() * gain.exp() - 0.5) * contrast.exp() + 0.5
    gray = rgb.mean(1, keepdim=True)
    rgb = (gray + (rgb - gray) * saturation.exp()).clamp(0, 1)
    return torch.cat([rgb * alpha, alpha], 1)


def _normal(like: Tensor) -> Float[Tensor, "b 1 1 1"]:
    return torch.randn(len(like), 1, 1, 1, device=like.device)


def blurred(pictures: Float[Tensor, "b c h w"], sigma_px: Float[Tensor, "b 1 1 1"]) -> Float[Tensor, "b c h w"]:
    """Gaussian blur, another width for each picture."""
    b, c, height, width = pictures.shape
    offsets = torch.arange(-4, 5, device=pictures.device)
    kernel = torch.exp(-0.5 * (offsets / sigma_px.flatten()[:, None].clamp(min=1e-2)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)
    flat = pictures.reshape(1, b * c, height, width)
    flat = F.conv2d(F.pad(flat, (4, 4, 0, 0), mode="replicate"), kernel[:, None, None], groups=b * c)
    flat = F.conv2d(F.pad(flat, (0, 0, 4, 4), mode="replicate"), kernel[:, None, :, None], groups=b * c)
    return flat.reshape(b, c, height, width)


def coarsened(rgb: Float[Tensor, "b 3 h w"], size: int) -> Float[Tensor, "b 3 h w"]:
    """Shrunk and enlarged again, as a small picture from the web."""
    small = F.interpolate(rgb, size=(size, size), mode="area")
    return F.interpolate(small, size=rgb.shape[-2:], mode="bilinear", align_corners=False)


def cosine_basis(device: torch.device) -> Float[Tensor, "8 8"]:
    """Rows are the orthonormal cosines of the 8-point DCT-II."""
    k, n = torch.meshgrid(torch.arange(8.0, device=device), torch.arange(8.0, device=device), indexing="ij")
    basis = torch.cos(math.pi / 8 * (n + 0.5) * k) / 2
    basis[0] /= math.sqrt(2)
    return basis


def quantized(rgb: Float[Tensor, "b 3 h w"], step: Float[Tensor, "b 1 1 1"]) -> Float[Tensor, "b 3 h w"]:
    """Cosine coefficients of 8x8 blocks rounded to multiples of a step that grows with frequency, as JPEG does."""
    b, c, height, width = rgb.shape
    basis = cosine_basis(rgb.device)
    blocks = rgb.reshape(b, c, height // 8, 8, width // 8, 8).transpose(3, 4)
    frequency = torch.arange(8, device=rgb.device)
    steps = step[..., None, None] * (1 + 0.6 * (frequency[:, None] + frequency))
    coefficients = basis @ blocks @ basis.T
    blocks = basis.T @ (torch.round(coefficients / steps) * steps) @ basis
    return blocks.transpose(3, 4).reshape(b, c, height, width).clamp(0, 1)


def ragged(alpha: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """A mask whose rim wanders in and out by about a pixel, as matting leaves it."""
    wander = F.interpolate(
        torch.randn(len(alpha), 1, 12, 12, device=alpha.device), size=alpha.shape[-2:], mode="bilinear"
    )
    soft = blurred(alpha, _uniform(0.7, 1.5, alpha))
    threshold = 0.5 + 0.12 * _normal(alpha) + 0.15 * wander
    threshold = threshold.clamp(0.2, 0.8)  # no specks far from the rim, no holes inside
    return ((soft - threshold) * _uniform(1.5, 5, alpha) + 0.5).clamp(0, 1)


def photo_like(pictures: Float[Tensor, "b 4 h w"], p_untouched: float = P_UNTOUCHED) -> Float[Tensor, "b 4 h w"]:
    """Premultiplied RGBA in [0, 1], all but `p_untouched` of the batch as if cut out of a photo.

    The object is put before a background of one color, the whole is degraded and cut out again, so that the background's
    color bleeds into the rim.
    """
    rgb, alpha = pictures[:, :3], pictures[:, 3:]
    own = rgb.sum((2, 3), keepdim=True) / alpha.sum((2, 3), keepdim=True).clamp(min=1)
    ground = _sometimes(torch.rand_like(own), own, 0.5)
    photo = rgb + ground * (1 - alpha)
    photo = _sometimes(blurred(photo, _uniform(0.3, 1.1, photo)), photo)
    photo = _sometimes(coarsened(photo, int(torch.randint(28, 60, ())) * photo.shape[-1] // 64), photo)
    photo = _sometimes(photo + torch.randn_like(photo) * _uniform(0.005, 0.06, photo), photo)
    photo = _sometimes(quantized(photo.clamp(0, 1), _uniform(0.02, 0.12, photo)), photo)
    mask = _sometimes(ragged(alpha), alpha)
    cut = torch.cat([photo.clamp(0, 1) * mask, mask], 1)
    return _sometimes(pictures, cut, p_untouched)
