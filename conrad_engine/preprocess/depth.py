"""Depth maps that come with a picture: 16-bit PNG, TIFF, NumPy and OpenEXR files, or arrays."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float
from numpy import ndarray

from ..errors import InputError
from .reading import BROKEN_FILE, MAX_FILE_BYTES, open_image, read_bytes

ASPECT_TOLERANCE = 0.01
"""Largest relative difference of aspect ratio between the picture and its mask or depth, besides one pixel."""


def read_depth(
    source: Path | str | bytes | ndarray, height: int, width: int, max_pixels: int, inverse: bool = False
) -> Float[ndarray, "height width"]:
    """A depth map as distances: larger is farther.

    Args:
        source: A file (PNG, TIFF, npy, npz, EXR), its bytes, or an array of one channel. Non-positive or infinite
            values of a metric map mean "unknown" to many programs; NaN is refused, infinity becomes the largest value.
        height, width: Of the picture, whose aspect the map must have; it is resampled to this size.
        inverse: The file holds disparity (larger is nearer): distances are its reciprocal, up to scale.

    Raises:
        InputError: It cannot be read, holds NaN, is constant, or does not have the picture's aspect.
    """
    values = _as_single_channel(source if isinstance(source, ndarray) else decode_depth(source, max_pixels))
    if np.isnan(values).any():
        raise InputError(f"depth has {int(np.isnan(values).sum())} NaN values: fill them before using it")
    finite = np.isfinite(values)
    if not finite.any() or np.ptp(values[finite]) <= 1e-12:
        raise InputError("depth is the same everywhere: give a map in which nearer and farther differ")
    values = np.where(finite, values, values[finite].max())
    check_aspect("depth", values.shape, (height, width))
    if inverse:
        # A floor of a thousandth of the range keeps a far background from stretching the scale without limit.
        values = 1 / np.maximum(values, values.min() + 1e-3 * np.ptp(values) if values.min() <= 0 else values.min())
    shrinks = values.shape[0] > height
    values = values.astype(np.float32)
    return cv2.resize(values, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def check_aspect(what: str, found: tuple[int, ...], picture: tuple[int, int]) -> None:
    """A mask or depth map must show the same crop as the picture; its size may differ.

    Raises:
        InputError: The aspect ratios differ by more than rounding explains.
    """
    height, width = picture
    ratio = (found[1] / width) / (found[0] / height)
    slack = ASPECT_TOLERANCE + 1 / min(*found[:2], height, width)
    if abs(ratio - 1) > slack:
        raise InputError(
            f"{what} is {found[1]}x{found[0]} but the picture is {width}x{height}: "
            "they must have the same aspect ratio and show the same crop"
        )


def _as_single_channel(values: ndarray) -> Float[ndarray, "height width"]:
    values = np.squeeze(values)
    if values.ndim == 3 and values.shape[2] in (3, 4) and (values[..., 0] == values[..., 1]).all():
        values = values[..., 0]
    if values.ndim != 2 or not (np.issubdtype(values.dtype, np.number) or values.dtype == bool):
        raise InputError(f"depth has shape {values.shape} and type {values.dtype}: one channel of numbers is needed")
    if min(values.shape) < 2:
        raise InputError(f"depth is {values.shape[1]}x{values.shape[0]}: it must have the picture's aspect ratio")
    return values.astype(np.float64)


def decode_depth(source: Path | str | bytes, max_pixels: int) -> ndarray:
    """The numbers of a depth file as they are.

    Raises:
        InputError: It cannot be read, or has more than `max_pixels` (of an EXR file: more than OpenCV's own limit).
    """
    data = read_bytes(source, "depth")
    name = "depth" if isinstance(source, bytes) else f"depth {source}"
    if data.startswith((b"\x93NUMPY", b"PK\x03\x04")):
        return _numpy_array(data, name)
    if data.startswith(b"\x76\x2f\x31\x01"):
        return _open_exr(data, name)
    image = open_image(data, name, max_pixels)
    try:
        return np.asarray(image)
    except BROKEN_FILE as error:
        raise InputError(f"{name} is damaged or cut off ({error}): save it again") from None


def _numpy_array(data: bytes, name: str) -> ndarray:
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(loaded, ndarray):
            return loaded
        names = loaded.files
        if len(names) != 1 and "depth" not in names:
            raise InputError(f"{name} holds {', '.join(names) or 'nothing'}: name the array to use 'depth'")
        chosen = "depth" if "depth" in names else names[0]
        if loaded.zip.getinfo(f"{chosen}.npy").file_size > MAX_FILE_BYTES:
            raise InputError(f"{name} unpacks to more than {MAX_FILE_BYTES / 1e6:.0f} MB: give a smaller map")
        return loaded[chosen]
    except (*BROKEN_FILE, zipfile.BadZipFile) as error:
        raise InputError(f"{name} is not a readable NumPy file ({error})") from None


def _open_exr(data: bytes, name: str) -> ndarray:
    # OpenCV keeps its OpenEXR reader off unless this is set before its first use.
    os.environ.setdefault("OPENCV_IO_ENABLE_OPENEXR", "1")
    try:
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise InputError(f"{name} is an OpenEXR file this OpenCV cannot read ({error.err}): save it as npy") from None
    if values is None:
        raise InputError(f"{name} is an OpenEXR file this OpenCV cannot read: save it as npy or 16-bit PNG")
    return values
