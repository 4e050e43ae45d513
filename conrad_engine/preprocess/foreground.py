"""Colors of the object alone: the background's share is taken out of the rim, and colors are spread outwards."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float
from numpy import ndarray

Rgb = Float[ndarray, "height width 3"]
Mask = Float[ndarray, "height width"]

RIM = (0.1, 0.9)
"""Alpha between which a pixel is a mixture worth looking at."""


def estimate_foreground(picture: Rgb, mask: Mask, radii: tuple[int, ...] = (45, 6)) -> tuple[Rgb, Rgb]:
    """Foreground and background colors of an opaque picture of an object with soft edges.

    Blur fusion (Forte 2021, arXiv:2006.14970, eq. 4-6): local means F̄ and B̄ weighted by α and 1-α, corrected so that
    α F + (1-α) B reproduces the picture; a wide pass first, then a narrow one.

    Args:
        radii: Half widths of the box means of the passes, pixels.
    """
    alpha = mask[..., None]
    foreground = background = picture
    for radius in radii:
        size = (2 * radius + 1, 2 * radius + 1)
        share = cv2.blur(mask, size)[..., None]
        foreground_mean = cv2.blur(foreground * alpha, size) / (share + 1e-5)
        background = cv2.blur(background * (1 - alpha), size) / (1 - share + 1e-5)
        residual = picture - alpha * foreground_mean - (1 - alpha) * background
        foreground = (foreground_mean + alpha * residual).clip(0, 1)
    return foreground, background


def clean_rim(rgb: Rgb, mask: Mask) -> Rgb:
    """Colors of a picture that came with its own alpha, without a fringe of its former background.

    Straight alpha should hold the object's own colors, but many cut-outs still hold the mixture. The mixture is
    assumed only if it explains the rim better than the object's own colors nearby do, for one of three backgrounds:
    the color hidden under the transparent pixels, black (premultiplied), or white.
    """
    rim = (mask > RIM[0]) & (mask < RIM[1])
    solid = (mask >= RIM[1]).astype(np.float32)
    if rim.sum() < 20 or solid.sum() < 20:
        return rgb
    own = spread(rgb, solid)
    hidden = spread(rgb, (mask <= 0.02).astype(np.float32)) if (mask <= 0.02).any() else np.zeros_like(rgb)
    candidates = [hidden, np.zeros_like(rgb), np.ones_like(rgb)]
    alpha = mask[rim][:, None]
    errors = [float(np.abs(rgb[rim] - own[rim]).mean())]
    errors += [float(np.abs(rgb[rim] - alpha * own[rim] - (1 - alpha) * b[rim]).mean()) for b in candidates]
    best = int(np.argmin(errors))
    # The mixture has to win clearly: straight alpha is what the formats prescribe.
    if best == 0 or errors[best] > 0.7 * errors[0]:
        return rgb
    composite = np.where(mask[..., None] > 0.02, rgb, candidates[best - 1])
    return estimate_foreground(composite, mask)[0]


def spread(rgb: Rgb, weight: Mask) -> Rgb:
    """Fill pixels of little weight from the nearest ones that have it, at every distance.

    Pull-push (Gortler et al. 1996, "The Lumigraph", section 3.4): weighted averages down a pyramid, and gaps filled on
    the way up.
    """
    if min(weight.shape) <= 1 or weight.min() >= 1:
        total = max(float(weight.sum()), 1e-8)
        mean = (rgb * weight[..., None]).sum((0, 1)) / total
        return rgb * weight[..., None] + mean * (1 - weight[..., None])
    height, width = weight.shape
    even = ((0, height % 2), (0, width % 2))
    padded = np.pad(weight, even)
    colored = np.pad(rgb * weight[..., None], (*even, (0, 0)))
    size = (padded.shape[1] // 2, padded.shape[0] // 2)
    share = cv2.resize(padded, size, interpolation=cv2.INTER_AREA)
    color = cv2.resize(colored, size, interpolation=cv2.INTER_AREA) / np.maximum(share, 1e-8)[..., None]
    # Four children with full weight make a full parent; one with full weight is enough, too.
    coarse = spread(color, np.minimum(share * 4, 1))
    filled = cv2.resize(coarse, (padded.shape[1], padded.shape[0]), interpolation=cv2.INTER_LINEAR)[:height, :width]
    return rgb * weight[..., None] + filled * (1 - weight[..., None])


def object_colors(foreground: Rgb, mask: Mask) -> Rgb:
    """Foreground colors inside the mask, spread beyond it.

    Where little of the object shows, its estimated color is noise: it fades into the color of its surroundings.
    """
    reliable = ((mask - 0.15) / 0.45).clip(0, 1)
    return spread(foreground, reliable.astype(np.float32)).clip(0, 1).astype(np.float32)
