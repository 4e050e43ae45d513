"""Any picture Pillow can read, as straight-alpha sRGB: modes, orientation, color profile, size limits.

A damaged, foreign or oversized file gives one `InputError`; nothing is decoded before its size is known.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float
from numpy import ndarray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ..errors import InputError

MAX_FILE_BYTES = 1 << 29
"""Larger files are refused before they are read."""
MIN_SIDE = 16
"""A picture with fewer pixels on its shorter side shows nothing to build on."""
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF", "FLI")
"""Formats whose further frames are moments in time; a TIFF has pages, a phone's MPO a second lens, a PSD layers."""
PROGRAMS = ("EPS",)
"""Formats that Pillow does not decode but has run by another program, which no limit of ours holds for."""
BROKEN_FILE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders answer to damaged files."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture, reduced to the size the engine works with."""

    rgba: Float[ndarray, "height width 4"]
    """sRGB with straight alpha, float32 in [0, 1]."""
    has_alpha: bool
    """The file carries transparency of some kind."""
    original_width: int
    original_height: int
    """Size in the file, turned upright."""
    sha256: str
    """Of the file's bytes."""
    warnings: tuple[str, ...]


def read_picture(source: Path | str | bytes, max_pixels: int, max_side: int, what: str = "picture") -> Picture:
    """Decode a picture, turn it upright, convert it to sRGB and reduce it.

    Args:
        source: A file or its bytes.
        max_pixels: Larger pictures are refused before they are decoded.
        max_side: The longer side is reduced to this, by area averages of premultiplied color.
        what: How messages call it.

    Raises:
        InputError: The file is missing, empty, too large, not a picture, damaged, animated, or too small.
    """
    data = read_bytes(source, what)
    name = what if isinstance(source, bytes) else f"{what} {source}"
    notes: list[str] = []
    image = open_image(data, name, max_pixels)
    with warnings.catch_warnings():
        # Pillow remarks on odd metadata that do not change a pixel.
        warnings.simplefilter("ignore")
        _check_frames(image, name, notes)
        try:
            image.load()
            image = ImageOps.exif_transpose(image)
        except BROKEN_FILE as error:
            raise InputError(f"{name} is damaged or cut off ({error}): save or download it again") from None
    width, height = image.size
    has_alpha = image.has_transparency_data
    factor = max(1, max(width, height) // max_side)
    rgba = _rgba(image, name, factor, notes)
    rgba = reduce_area(rgba, max_side)
    if min(rgba.shape[:2]) < MIN_SIDE:
        raise InputError(
            f"{name} is {width}x{height} pixels: at least {MIN_SIDE} a side are needed, also after its longer side "
            f"is reduced to {max_side}"
        )
    return Picture(rgba, has_alpha, width, height, hashlib.sha256(data).hexdigest(), tuple(notes))


def read_bytes(source: Path | str | bytes, what: str) -> bytes:
    """The content of a file, or the bytes themselves.

    Raises:
        InputError: It is missing, no file, unreadable, empty, or larger than `MAX_FILE_BYTES`.
    """
    if isinstance(source, bytes):
        if not source:
            raise InputError(f"the {what} is empty (0 bytes): give a file that holds a {what}")
        if len(source) > MAX_FILE_BYTES:
            raise InputError(f"the {what} has {len(source) / 1e6:.0f} MB: at most {MAX_FILE_BYTES / 1e6:.0f} are read")
        return source
    path = Path(source)
    try:
        if path.is_dir():
            raise InputError(f"{what} {path} is a folder: give a file")
        if not path.exists():
            raise InputError(f"{what} {path} does not exist: check the path")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(
                f"{what} {path} has {path.stat().st_size / 1e6:.0f} MB: at most {MAX_FILE_BYTES / 1e6:.0f} are read"
            )
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {path} cannot be read ({error}): check the path and its permissions") from None
    if not data:
        raise InputError(f"{what} {path} is empty (0 bytes): give a file that holds a {what}")
    return data


def open_image(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """Open a picture without decoding it.

    Raises:
        InputError: It is not a picture, is a program, is damaged, or has more than `max_pixels`.
    """
    limit = f"at most {max_pixels:,} are accepted, reduce it first"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise InputError(f"{name} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels: {limit}") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a picture in a known format: use PNG, JPEG, WebP or TIFF") from None
    except BROKEN_FILE as error:
        reason = str(error).partition("<_io")[0].strip()  # Pillow names the buffer, which says nothing to a person
        raise InputError(f"{name} is damaged or cut off ({reason}): save or download it again") from None
    if image.format in PROGRAMS:
        raise InputError(f"{name} is a {image.format} file, which is a program: save it as PNG or JPEG")
    if image.width * image.height > max_pixels:
        raise InputError(f"{name} is {image.width}x{image.height}, {image.width * image.height:,} pixels: {limit}")
    return image


def reduce_area(image: Float[ndarray, "height width 4"], max_side: int) -> Float[ndarray, "h w 4"]:
    """Reduce straight-alpha color so that its longer side is at most `max_side`; smaller pictures stay as they are.

    Colors are averaged with their alpha as weight, so that what transparent pixels hide does not bleed in.
    """
    height, width = image.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    alpha = image[..., 3:]
    reduced = cv2.resize(np.concatenate([image[..., :3] * alpha, alpha], -1), size, interpolation=cv2.INTER_AREA)
    plain = cv2.resize(image[..., :3], size, interpolation=cv2.INTER_AREA)
    # Where nothing is visible, the plain average keeps the hidden color, which tells how a cut-out was made.
    weight = reduced[..., 3:]
    rgb = np.where(weight > 1e-3, reduced[..., :3] / np.maximum(weight, 1e-3), plain)
    return np.concatenate([rgb, weight], -1).clip(0, 1).astype(np.float32)


def _check_frames(image: Image.Image, name: str, notes: list[str]) -> None:
    try:
        n_frames = getattr(image, "n_frames", 1)
    except BROKEN_FILE as error:
        raise InputError(f"{name} is damaged or cut off ({error}): save or download it again") from None
    if n_frames > 1 and image.format in ANIMATED_FORMATS:
        raise InputError(f"{name} is animated ({n_frames} frames): save the frame you want as a still picture")
    if n_frames > 1 and image.format == "TIFF":
        notes.append(f"{name} has {n_frames} pages: only the first is used")


def _rgba(image: Image.Image, name: str, factor: int, notes: list[str]) -> Float[ndarray, "height width 4"]:
    """Straight sRGB and alpha of any mode, reduced by a whole factor beforehand to bound the memory."""
    try:
        if image.mode.startswith("I") or image.mode == "F":
            gray = _gray_levels(np.asarray(image), image.mode, name)
            gray = cv2.resize(gray, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA)
            return np.stack([gray, gray, gray, np.ones_like(gray)], -1)
        image = _in_srgb(image, name, notes)
        values = np.asarray(image.reduce(factor) if factor > 1 else image)
    except BROKEN_FILE as error:
        raise InputError(f"{name} cannot be converted to color ({error}): save it as an 8-bit PNG") from None
    return values.astype(np.float32) / 255


def _gray_levels(values: ndarray, mode: str, name: str) -> Float[ndarray, "height width"]:
    """Gray pictures of more than 8 bits, scaled to [0, 1]: 16 bit by 65535, floats as they are."""
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{name} has values that are not finite: save it as an 8- or 16-bit PNG")
    top = 65535.0 if mode.startswith("I") else 1.0
    if values.min() < 0 or values.max() > top:
        raise InputError(
            f"{name} has gray values from {values.min():g} to {values.max():g}, not 0 to {top:g}: "
            "save it as an 8- or 16-bit PNG"
        )
    return values / top


def _in_srgb(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """RGBA of an 8-bit picture of any mode, its color profile applied."""
    if image.mode == "La":
        # Pillow cannot undo the premultiplication of gray pictures.
        level, alpha = image.split()
        image = Image.merge("RGBa", (level, level, level, alpha)).convert("RGBA")
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        source, target = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, target, outputMode="RGB").convert("RGBA")
    rgba = image.convert("RGBA")
    if not profile:
        return rgba
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return rgba
        base = image if source.profile.xcolor_space.strip() in ("CMYK", "GRAY") else rgba.convert("RGB")
        base = base.convert("L") if base.mode in ("LA", "1") else base
        rgb = ImageCms.profileToProfile(
            base, source, ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB"
        )
    except (ImageCms.PyCMSError, *BROKEN_FILE) as error:
        notes.append(f"{name} has a color profile that cannot be used ({error}): its colors are taken as sRGB")
        return rgba
    rgb.putalpha(rgba.getchannel("A"))
    return rgb
