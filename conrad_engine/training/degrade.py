"""Changes that make true views look as the texture of a mesh shows them before its detail is drawn.

What the texture lacks: it is blurred, as it comes from 64 px guidance and a coarse field; its colors are off in blotches; what
several views said of it is shifted and laid over each other. Its silhouette is as crisp as the mesh. All functions work on
batches on any device, with torch's own generator of that device; pictures are premultiplied RGBA in [0, 1].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..guidance.embedded.sampling import ConditionedPrior
from ..guidance.embedded.unet import alpha_sigma

FILL_PX = 12.0
"""Colors spread this far past a silhouette that is too small, pixels at 128 px."""
WARP_CELLS, BLOTCH_CELLS = (3, 6, 10), (3, 5, 8)
P_GHOST, P_COARSE, P_SPECKLES, P_SECOND_MASK = 0.3, 0.3, 0.3, 0.3
PRIOR_SCALE = 1.5
"""The product's classifier-free guidance."""


def _uniform(low: float, high: float, n: int, device: torch.device) -> Float[Tensor, "n 1 1 1"]:
    return torch.rand(n, 1, 1, 1, device=device) * (high - low) + low


def _log_uniform(low: float, high: float, n: int, device: torch.device) -> Float[Tensor, "n 1 1 1"]:
    return _uniform(math.log(low), math.log(high), n, device).exp()


def _one_of(choices: tuple[int, ...]) -> int:
    return choices[int(torch.randint(len(choices), ()))]


def smooth_noise(n: int, channels: int, cells: int, size: int, device: torch.device) -> Float[Tensor, "n c size size"]:
    """Normal noise on a coarse grid, enlarged smoothly."""
    noise = torch.randn(n, channels, cells, cells, device=device)
    return F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=False)


def blur_matrices(sigma_px: Float[Tensor, " b"], size: int) -> Float[Tensor, "b size size"]:
    """Gaussian blur of a line of pixels as a matrix; rows sum to 1, also at the border."""
    position = torch.arange(size, device=sigma_px.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * ((position[:, None] - position) / sigma_px.clamp(min=0.05)[:, None, None]) ** 2)
    return kernel / kernel.sum(2, keepdim=True)


def widely_blurred(pictures: Float[Tensor, "b c h h"], sigma_px: Float[Tensor, "b 2"]) -> Float[Tensor, "b c h h"]:
    """Gaussian blur of any width, another one for each picture and direction."""
    rows, columns = (blur_matrices(sigma, pictures.shape[-1])[:, None] for sigma in sigma_px.unbind(1))
    return rows @ pictures @ columns.mT


def spread_colors(pictures: Float[Tensor, "b 4 h h"], sigma_px: Float[Tensor, "b 2"]) -> Float[Tensor, "b 3 h h"]:
    """Straight colors blurred inside the silhouette alone, and continued past it."""
    near = widely_blurred(pictures, sigma_px)
    far = widely_blurred(pictures, torch.full_like(sigma_px, FILL_PX * pictures.shape[-1] / 128))
    continued = far[:, :3] / far[:, 3:].clamp(min=1e-4)
    return (near[:, :3] + 0.02 * continued) / (near[:, 3:] + 0.02)


def warped(pictures: Float[Tensor, "b c h h"], amplitude_px: Float[Tensor, "b 1 1 1"]) -> Float[Tensor, "b c h h"]:
    """Pictures bent smoothly and shifted, each by about the given amplitude."""
    b, _, size, _ = pictures.shape
    device = pictures.device
    bend = smooth_noise(b, 2, _one_of(WARP_CELLS), size, device) + 0.7 * torch.randn(b, 2, 1, 1, device=device)
    line = (torch.arange(size, device=device) + 0.5) * (2 / size) - 1
    grid = torch.stack(torch.broadcast_tensors(line[None, :], line[:, None]), -1)
    grid = grid + (bend * amplitude_px * (2 / size)).permute(0, 2, 3, 1)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def prior_guesses(
    prior: ConditionedPrior, targets: Float[Tensor, "b 4 h h"], cameras: Float[Tensor, "b 4"]
) -> Float[Tensor, "b 4 h h"]:
    """What the embedded prior takes noised versions of the targets for: where score distillation leads.

    Args:
        prior: Conditioned on the references of the targets.
        targets, cameras: As many for each reference, reference by reference.

    Returns:
        Premultiplied RGBA, enlarged from the prior's size; silhouettes are the prior's.
    """
    size, n_targets = prior.net.size, len(targets) // prior.n_references
    small = F.interpolate(targets, size=(size, size), mode="area") * 2 - 1
    t = (0.4 + 0.58 * torch.rand(prior.n_references, device=targets.device)).repeat_interleave(n_targets)
    alpha, sigma = alpha_sigma(t)
    noisy = alpha * small + sigma * torch.randn_like(small)
    clean = (prior.denoised(noisy, t, cameras, PRIOR_SCALE, is_joint=True) + 1) / 2
    large = F.interpolate(clean, size=targets.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([torch.minimum(large[:, :3], large[:, 3:]), large[:, 3:]], 1)


def textured(
    colors: Float[Tensor, "b 4 h h"], alpha: Float[Tensor, "b 1 h h"], sigma_range_px: tuple[float, float]
) -> Float[Tensor, "b 4 h h"]:
    """Views as the texture would show them: colors bent, laid over each other, blurred, blotched, cut by a crisp silhouette.

    Args:
        colors: Pictures that tell the colors; their own silhouettes only say where these are known.
        alpha: The true silhouettes.
        sigma_range_px: Widths of the blur at 128 px, drawn evenly in their logarithm.
    """
    b, _, size, _ = colors.shape
    device, unit = colors.device, colors.shape[-1] / 128
    ghost = warped(colors, _uniform(0.5, 3, b, device) * unit)
    colors = warped(colors, _uniform(0, 1.5, b, device) * unit)
    is_ghost = torch.rand(b, 1, 1, 1, device=device) < P_GHOST
    colors = torch.where(is_ghost, (colors + ghost) / 2, colors)
    sigma = _log_uniform(*sigma_range_px, b, device).flatten()[:, None] * unit
    sigma = sigma * torch.exp(0.15 * torch.randn(b, 2, device=device))
    cells = max(2, round(_one_of((32, 40, 48, 64)) * unit))
    coarse = F.interpolate(colors, size=(cells, cells), mode="area")
    coarse = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    colors = torch.where(torch.rand(b, 1, 1, 1, device=device) < P_COARSE, coarse, colors)
    rgb = spread_colors(colors, sigma)
    blotches = smooth_noise(b, 3, _one_of(BLOTCH_CELLS), size, device)
    gray = smooth_noise(b, 1, _one_of(BLOTCH_CELLS), size, device)
    rgb = rgb + blotches * _uniform(0, 0.04, b, device) + gray * _uniform(0, 0.06, b, device)
    speckles = smooth_noise(b, 3, size // 4, size, device) * _uniform(0, 0.03, b, device)
    rgb = torch.where(torch.rand(b, 1, 1, 1, device=device) < P_SPECKLES, rgb + speckles, rgb)
    return torch.cat([rgb.clamp(0, 1) * alpha, alpha], 1)


def _beyond_a_line(angle_rad: Tensor, edge: Tensor, size: int) -> Float[Tensor, "b 1 size size"]:
    """1 on the side of a wavy line whose normal points at an angle, at most `edge` along it (-1 to 1 across the frame)."""
    device, n = edge.device, len(edge)
    line = (torch.arange(size, device=device) + 0.5) * (2 / size) - 1
    along = angle_rad.cos()[:, None, None] * line[None, None, :] + angle_rad.sin()[:, None, None] * line[None, :, None]
    wave = 0.2 * smooth_noise(n, 1, _one_of((3, 6, 12)), size, device)
    return (along[:, None] + wave < edge[:, None, None, None]).float()


def random_finals(cameras: Float[Tensor, "b 4"], size: int) -> Float[Tensor, "b 1 size size"]:
    """Masks of pixels that are sharp and final already.

    In a third of the views none; in others what faces the reference (as on a round object), the side of a random line or
    random blobs, sometimes two of these.
    """
    n, device = len(cameras), cameras.device
    azimuth = cameras[:, 0]
    # Seen from the right of the reference, what faced it lies to the left.
    side = torch.where(azimuth.sin() < 0, math.pi, 0.0)
    facing = _beyond_a_line(
        side + 0.3 * torch.randn(n, device=device), 0.8 * azimuth.cos() + 0.25 * torch.randn(n, device=device), size
    )
    angle = torch.rand(n, device=device) * (2 * math.pi)
    half = _beyond_a_line(angle, torch.rand(n, device=device) * 1.2 - 0.8, size)
    blobs = (smooth_noise(n, 1, _one_of((4, 8, 14)), size, device) > _uniform(-0.3, 1.0, n, device)).float()
    choice = torch.rand(n, 1, 1, 1, device=device)
    first = torch.where(choice < 0.65, facing, torch.where(choice < 0.8, half, blobs))
    has_second = torch.rand(n, 1, 1, 1, device=device) < P_SECOND_MASK
    both = torch.where(has_second, torch.maximum(first, half), first)
    return torch.where(choice < 0.33, torch.zeros_like(both), both)
