"""Pictures at other sizes. A pixel is the mean over its square: smaller pictures keep that, and so does what lies between."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import map_coordinates, spline_filter
from torch import Tensor


def reduced_by_area(pictures: Float[Tensor, "n h w"], height: int, width: int) -> Float[Tensor, "n height width"]:
    """Pictures with fewer pixels, each the mean over its square, parts of pixels included.

    `torch.nn.functional.interpolate` counts whole pixels instead: from 734 to 512 most means are over twice their square.
    """
    rows = np.ascontiguousarray(pictures.cpu().movedim(0, -1).numpy())
    reduced = cv2.resize(rows, (width, height), interpolation=cv2.INTER_AREA).reshape(height, width, -1)
    return torch.from_numpy(reduced).movedim(-1, 0).contiguous().to(pictures.device)


def between_pixels(picture: Float[np.ndarray, "h w c"], uv: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n c"]:
    """The smooth picture whose mean over each pixel is that pixel's color, at pixel coordinates.

    It is a quadratic spline with the coefficients of the cubic one through the pixels: the mean of a B-spline over a pixel is a
    sample of the next higher one, beta2 * beta0 = beta3 (Unser, Splines: a perfect fit for signal and image processing, 1999).
    Interpolating linearly would average twice, and what is drawn with it would be blurrier than the picture.
    """
    columns, rows = uv.T - 0.5
    found = np.empty((len(uv), picture.shape[2]), np.float32)
    for channel in range(picture.shape[2]):
        coefficients = spline_filter(picture[..., channel], 3, np.float32, mode="reflect")
        map_coordinates(coefficients, (rows, columns), found[:, channel], 2, mode="reflect", prefilter=False)
    return found
