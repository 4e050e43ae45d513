"""How well pictures agree: every picture measure of the evaluation, as pure functions on arrays.

Pictures are (height, width, 4) or (height, width, 3) floats in [0, 1], sRGB, straight alpha; masks are alpha > 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import binary_erosion, gaussian_filter
from skimage.metrics import structural_similarity

from ..cameras import Camera

MIN_SQUARED_ERROR = 1e-6
"""PSNR ends at 60 dB: one picture that agrees to the last bit must not carry a mean."""
MIN_STD = 0.01
"""Colors that vary less than this, standard deviation in [0, 1], have no meaningful correlation."""
MIN_COMMON = 64
"""Fewest common pixels for a correlation."""


def on_white(rgba: np.ndarray) -> np.ndarray:
    """(height, width, 3): the picture composited over white; pictures without alpha are returned as they are."""
    if rgba.shape[-1] == 3:
        return rgba
    return rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:])


def mask_of(rgba: np.ndarray) -> np.ndarray:
    return rgba[..., 3] > 0.5


def solid_pixels(mask: np.ndarray) -> np.ndarray:
    """Where a soft mask is the object alone; of an object that is thinner than a pixel, where it shows the most of it."""
    return mask > 0.99 if mask.max() > 0.99 else mask == mask.max()


def psnr_from_mse(mean_squared_error: float) -> float:
    """Decibels for pictures in [0, 1], at most 60."""
    return float(-10 * np.log10(max(float(mean_squared_error), MIN_SQUARED_ERROR)))


def psnr(rgb: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float:
    """PSNR over all pixels and channels, or over the pixels of a mask; NaN where the mask is empty."""
    squared = (np.asarray(rgb, np.float64) - truth) ** 2
    if mask is not None:
        squared = squared[mask]
    return psnr_from_mse(squared.mean()) if squared.size else float("nan")


def ssim(rgb: np.ndarray, truth: np.ndarray) -> float:
    """SSIM with the Gaussian window of Wang et al. (2004): σ 1.5, no sample covariance, mean over channels."""
    return float(
        structural_similarity(
            np.asarray(rgb, np.float64),
            np.asarray(truth, np.float64),
            channel_axis=2,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def mask_iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union; 1 where both are empty."""
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else 1.0


def view_scores(rgba: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The measures of one view: `psnr` on white, `foreground` (inside the true silhouette), `ssim` on white, `iou`."""
    ours, theirs = on_white(rgba), on_white(truth)
    return {
        "psnr": psnr(ours, theirs),
        "foreground": psnr(ours, theirs, mask_of(truth)),
        "ssim": ssim(ours, theirs),
        "iou": mask_iou(mask_of(rgba), mask_of(truth)),
    }


def gradient_energy(rgba: np.ndarray, erode_px: int = 2) -> float:
    """Mean squared color gradient inside the silhouette: how much detail a view has.

    Central differences of sRGB values a pixel, squared and averaged over both directions, the channels and the pixels of
    the silhouette eroded by `erode_px` (the outline itself is not detail). 0 where nothing is left.
    """
    inside = binary_erosion(mask_of(rgba), iterations=erode_px, border_value=0)
    if not inside.any():
        return 0.0
    rows, columns = np.gradient(np.asarray(rgba[..., :3], np.float64), axis=(0, 1))
    return float(((rows**2 + columns**2) / 2).mean(-1)[inside].mean())


def back_camera(camera: Camera, center: np.ndarray) -> Camera:
    """The camera on the other side of the object: turned half around the picture's up axis through `center`.

    It looks back along the reference's optical axis, so its picture, mirrored, lies over the reference's.
    """
    axes, position = camera.c2w[..., :3], camera.positions
    half_turn = axes @ torch.diag(torch.tensor([-1.0, 1.0, -1.0])).to(axes) @ axes.T
    pivot = torch.as_tensor(np.asarray(center)).to(position)
    c2w = torch.cat([half_turn @ axes, (pivot + half_turn @ (position - pivot))[:, None]], -1)
    # Mirroring moves an off-center principal point to the other side.
    fx, fy, cx, cy = camera.intrinsics.unbind(-1)
    return Camera(c2w, torch.stack([fx, fy, camera.width - cx, cy]), camera.width, camera.height)


def printed_through(picture: np.ndarray, reference: Camera, back: Camera, z_depths: np.ndarray) -> np.ndarray:
    """What the back view would show if the picture were printed through the object along the reference rays.

    This is the mirrored front with perspective taken into account: the surface point of every pixel of the back view
    takes the picture's value where the reference camera sees that point's ray.

    Args:
        picture: (H, W, 4), what the reference camera shows.
        reference, back: The two cameras.
        z_depths: (h, w) of the back view, along its optical axis, world units; 0 where nothing is.

    Returns:
        (h, w, 4), alpha 0 where the back view or the picture is empty.
    """
    depths = torch.from_numpy(np.ascontiguousarray(z_depths, np.float64)).reshape(-1)
    back, reference = back.to(dtype=torch.float64), reference.to(dtype=torch.float64)
    uv, front_depths = reference.project(back.unproject(back.pixel_centers().reshape(-1, 2), depths))
    columns, rows = np.floor(uv.numpy()).astype(np.int64).T
    height, width = picture.shape[:2]
    seen = (depths > 0).numpy() & (front_depths > 0).numpy()
    seen &= (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    printed = np.zeros((len(uv), 4))
    printed[seen] = picture[rows[seen], columns[seen]]
    return printed.reshape(*z_depths.shape, 4)


def color_correlation(rgba: np.ndarray, other: np.ndarray, detail_px: float | None = None) -> float | None:
    """Pearson correlation of colors inside the common silhouette, over pixels and channels together.

    Every channel's own mean is taken away first, so that two views of one plain color do not correlate.

    Args:
        rgba, other: Two pictures of equal size.
        detail_px: If given, colors are first reduced to their detail: minus a Gaussian mean of this σ in pixels, taken
            inside the common silhouette. Detail tells a printed picture from an object that is alike on both sides.

    Returns:
        -1 to 1, or None where too few pixels are common or one of the pictures is plain there.
    """
    common = mask_of(rgba) & mask_of(other)
    if common.sum() < MIN_COMMON:
        return None
    values = []
    for picture in (rgba[..., :3], other[..., :3]):
        if detail_px is not None:
            picture = picture - _masked_blur(picture, common, detail_px)
        inside = picture[common]
        inside = inside - inside.mean(axis=0)
        if inside.std() < MIN_STD:
            return None
        values.append(inside.ravel())
    return float(np.corrcoef(values[0], values[1])[0, 1])


def _masked_blur(rgb: np.ndarray, mask: np.ndarray, sigma_px: float) -> np.ndarray:
    """Gaussian mean over the pixels of the mask alone."""
    weights = gaussian_filter(mask.astype(np.float64), sigma_px)
    sums = gaussian_filter(rgb * mask[..., None], (sigma_px, sigma_px, 0))
    return sums / np.maximum(weights, 1e-6)[..., None]


def print_through(back_view: np.ndarray, printed: np.ndarray) -> dict[str, float | None]:
    """Whether the picture shows on the back: correlation of colors, and of their detail (σ = 1/32 of the height)."""
    return {
        "print_through": color_correlation(back_view, printed),
        "print_through_detail": color_correlation(back_view, printed, detail_px=len(printed) / 32),
    }


def perceptual_distance() -> Callable[[np.ndarray, np.ndarray], float] | None:
    """LPIPS (AlexNet) as a function of two (H, W, 3) pictures, or None where its package or weights are not at hand.

    Nothing is ever downloaded: the package `lpips` must be installed and torchvision's AlexNet weights must lie in torch's
    hub folder already.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    if find_spec("lpips") is None or not weights.exists():
        return None
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False).eval()

    def distance(rgb: np.ndarray, truth: np.ndarray) -> float:
        pair = [torch.from_numpy(np.asarray(x, np.float32)).permute(2, 0, 1)[None] * 2 - 1 for x in (rgb, truth)]
        with torch.no_grad():
            return float(network(*pair))

    return distance
