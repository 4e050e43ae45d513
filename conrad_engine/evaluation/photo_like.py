"""Pictures as people take them: the clean render of a suite blurred, noisy, compressed, badly cut out, over a photo."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

from ..errors import InputError

SCIKIT_IMAGE_PHOTOS = ("astronaut", "brick", "chelsea", "coffee", "grass", "gravel", "motorcycle_left", "rocket")


def background_photos(paths: list[Path] | None = None) -> list[np.ndarray]:
    """Photos (h, w, 3) in [0, 1]: the given files, or those that scikit-image carries in its package.

    Raises:
        InputError: A file cannot be read, or scikit-image carries none.
    """
    if paths is None:
        import skimage.data

        folder = Path(skimage.data.__file__).parent
        paths = [path for path in sorted(folder.iterdir()) if path.stem in SCIKIT_IMAGE_PHOTOS]
    if not paths:
        raise InputError("there are no photos for the backgrounds; name some files")
    photos = []
    for path in paths:
        try:
            with Image.open(path) as photo:
                photos.append(np.asarray(photo.convert("RGB"), np.float64) / 255)
        except OSError as error:
            raise InputError(f"background photo {path} cannot be read: {error}") from None
    return photos


def random_crop(photo: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A window of the photo with the shape's aspect, between 60 % and all of what fits, resized to the shape."""
    scale = min(photo.shape[0] / height, photo.shape[1] / width) * rng.uniform(0.6, 1.0)
    rows, columns = max(int(height * scale), 1), max(int(width * scale), 1)
    top, left = rng.integers(photo.shape[0] - rows + 1), rng.integers(photo.shape[1] - columns + 1)
    window = Image.fromarray(np.round(photo[top : top + rows, left : left + columns] * 255).astype(np.uint8))
    return np.asarray(window.resize((width, height), Image.Resampling.BICUBIC), np.float64) / 255


def through_a_camera(rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur (σ 0.4 to 1.2 px at 512), color cast, gamma, noise (1 to 3 %) and JPEG (quality 40 to 85) of a picture."""
    sigma_px = rng.uniform(0.4, 1.2) * max(rgb.shape[:2]) / 512
    rgb = gaussian_filter(rgb, (sigma_px, sigma_px, 0))
    rgb = np.clip(rgb * rng.uniform(0.9, 1.08, 3), 0, 1) ** rng.uniform(0.85, 1.2)
    rgb = rgb + rng.normal(size=rgb.shape) * rng.uniform(0.01, 0.03)
    buffer = io.BytesIO()
    pixels = np.round(np.clip(rgb, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(40, 86)))
    return np.asarray(Image.open(buffer), np.float64) / 255


def ragged(alpha: np.ndarray, rng: np.random.Generator, reach_px: float = 2.0) -> np.ndarray:
    """The mask as a hasty cut-out leaves it: its outline displaced by up to about `reach_px` at 512, smoothly varying."""
    height, width = alpha.shape
    scale = max(height, width) / 512
    shifts = gaussian_filter(rng.normal(size=(2, height, width)), (0, 8 * scale, 8 * scale))
    shifts *= reach_px * scale / (2 * max(shifts.std(), 1e-9))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return map_coordinates(alpha, [rows + shifts[0], columns + shifts[1]], order=1, mode="constant")


def degraded(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A cut-out of a careless photograph (H, W, 4): taken against one plain color, with a ragged mask."""
    backdrop = rng.uniform(0.2, 0.9, 3)
    rgb = through_a_camera(rgba[..., :3] * rgba[..., 3:] + backdrop * (1 - rgba[..., 3:]), rng)
    return np.concatenate([rgb, ragged(rgba[..., 3], rng)[..., None]], -1)


def composited(rgba: np.ndarray, photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The object in front of a photo (H, W, 3), both through one camera; the background slightly out of focus."""
    background = random_crop(photo, *rgba.shape[:2], rng)
    sigma_px = rng.uniform(0.5, 3.0) * max(rgba.shape[:2]) / 512
    background = gaussian_filter(background, (sigma_px, sigma_px, 0))
    return through_a_camera(rgba[..., :3] * rgba[..., 3:] + background * (1 - rgba[..., 3:]), rng)
