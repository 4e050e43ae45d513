"""From any picture to what the engine works with: colors of the object alone, its mask and, if given, its depth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from ..config import PictureConfig
from ..errors import InputError
from .depth import check_aspect, read_depth
from .foreground import clean_rim, estimate_foreground, object_colors
from .matting import matte
from .reading import Picture, read_picture

Source = Path | str | bytes
Mask = Float[ndarray, "height width"]

MIN_OBJECT_PIXELS = 64
"""Fewer object pixels than this are no object."""
LEAST_DETAIL = 0.02
"""Change of the sharpest pixels when an object is halved and doubled again: below it the picture was enlarged a lot."""
SMALL_OBJECT_SIDE = 128
"""An object whose longer side has fewer pixels gets a blurred texture: worth a warning."""

EMPTY_ALPHA, TRANSLUCENT_ALPHA = 0.1, 0.4
"""Alpha up to which nothing is there, and from which it is a translucent object; in between are cast shadows."""
RIM_REACH = 0.02
"""Width of an object's soft rim at most, as a part of the picture's longer side."""


@dataclass(frozen=True)
class PreparedPicture:
    """One picture, upright, in sRGB, reduced to `PictureConfig.max_side`."""

    rgb: Float[ndarray, "height width 3"]
    """The object's own colors, float32: no background at the rim, and spread on beyond the mask."""
    mask: Mask
    """Soft alpha of the object, float32 in [0, 1]; 1 inside, also where the object is translucent."""
    depth: Mask | None
    """Distances, larger is farther; metric along the optical axis, or relative: right up to scale and offset."""
    depth_kind: Literal["relative", "metric"]
    original: UInt8[ndarray, "height width 4"]
    """The picture as it came (reduced), for result sheets."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom of the mask at one half; right and bottom lie one past the last pixel."""
    matting: str
    """Where the mask comes from: mask, alpha, backdrop, grabcut, rembg MODEL or onnx MODEL."""
    warnings: tuple[str, ...]
    """Sentences for the user; none of them stops the job."""
    sha256: str
    """Of the picture's bytes."""
    scale: float
    """Width here divided by the width of the upright original."""
    original_width: int
    original_height: int


def prepare_picture(
    source: Source,
    config: PictureConfig,
    mask: Source | ndarray | None = None,
    depth: Source | ndarray | None = None,
    depth_kind: Literal["relative", "metric"] = "relative",
    depth_is_inverse: bool = False,
) -> PreparedPicture:
    """Read a picture and find its object.

    Args:
        source: A file Pillow can read, or its bytes.
        mask: Of the object, white on black or in the alpha channel, or an array; overrides alpha and matting.
        depth: A map of the picture's aspect; see `depth.read_depth`.
        depth_is_inverse: The map holds disparity (larger is nearer).

    Raises:
        InputError: Something of it cannot be used; the message says what and what to do.
        MissingDependency: The matting backend asked for is not there.
    """
    picture = read_picture(source, config.max_pixels, config.max_side)
    height, width = picture.rgba.shape[:2]
    alpha, matting = _find_mask(picture, config, mask)
    box = _object_box(alpha)
    rgb = picture.rgba[..., :3]
    if matting == "alpha":
        colors = clean_rim(rgb, alpha)
    else:
        colors = estimate_foreground(rgb, alpha)[0]
    distances = None
    if depth is not None:
        distances = read_depth(depth, height, width, config.max_pixels, depth_is_inverse)
    colors = object_colors(colors, alpha)
    return PreparedPicture(
        rgb=colors,
        mask=alpha,
        depth=distances,
        depth_kind=depth_kind,
        original=(picture.rgba * 255).round().astype(np.uint8),
        box=box,
        matting=matting,
        warnings=picture.warnings + tuple(_object_warnings(colors, box, matting)),
        sha256=picture.sha256,
        scale=width / picture.original_width,
        original_width=picture.original_width,
        original_height=picture.original_height,
    )


def _find_mask(picture: Picture, config: PictureConfig, mask: Source | ndarray | None) -> tuple[Mask, str]:
    height, width = picture.rgba.shape[:2]
    if mask is not None:
        return _read_mask(mask, height, width, config), "mask"
    alpha = picture.rgba[..., 3]
    if config.matting in ("auto", "alpha") and picture.has_alpha:
        if alpha.max() <= 0.5:
            raise InputError(
                f"the picture is transparent everywhere (alpha is at most {alpha.max():.2f}): "
                "save it with its object opaque, or give a mask"
            )
        if _says_something(alpha):
            return _solid(_without_dust(alpha)), "alpha"
    return matte(np.ascontiguousarray(picture.rgba[..., :3]), config)


def _says_something(alpha: Mask) -> bool:
    """Rounded corners of a screenshot or a uniform veil say nothing about the object."""
    return float((alpha < 0.5).mean()) >= 0.005


def _without_dust(alpha: Mask) -> Mask:
    """Alpha without specks that are tiny beside the object, such as background removers leave."""
    n_parts, labels = cv2.connectedComponents((alpha > 0.02).astype(np.uint8), connectivity=8)
    areas = np.bincount(labels.ravel(), weights=(alpha > 0.5).ravel(), minlength=n_parts)
    areas[0] = 0
    keep = areas >= 1e-3 * areas.max()
    return np.where(keep[labels], alpha, 0).astype(np.float32)


def _solid(alpha: Mask) -> Mask:
    """Alpha with glass and the like as opaque as the rest: a mesh's surface is there or it is not.

    Soft rims stay as soft; parts that are all rim, such as hair and wires, stay as they are.
    """
    reach = max(2, round(RIM_REACH * max(alpha.shape)))
    is_inner = cv2.distanceTransform((alpha > EMPTY_ALPHA).astype(np.uint8), cv2.DIST_L2, 3) > reach
    # A rim's own alpha is that of the object behind it, and no other rim's.
    core = np.where(is_inner & (cv2.erode(alpha, np.ones((3, 3), np.uint8)) >= TRANSLUCENT_ALPHA), alpha, 0)
    size = 2 * (reach + 2) + 1
    behind = cv2.dilate(core, np.ones((size, size), np.uint8))  # a square takes a thirtieth of a disc's time
    rim = np.where(behind > 0, (alpha / np.maximum(behind, TRANSLUCENT_ALPHA)).clip(0, 1), alpha)
    return np.where(is_inner & (alpha >= TRANSLUCENT_ALPHA), 1, rim).astype(np.float32)


def _read_mask(source: Source | ndarray, height: int, width: int, config: PictureConfig) -> Mask:
    if isinstance(source, ndarray):
        values = _mask_levels(source)
    else:
        picture = read_picture(source, config.max_pixels, max(config.max_side, 2 * max(height, width)), "mask")
        alpha = picture.rgba[..., 3]
        values = alpha if picture.has_alpha and np.ptp(alpha) > 0.5 else picture.rgba[..., :3].mean(-1)
    check_aspect("mask", values.shape, (height, width))
    shrinks = values.shape[0] > height
    values = cv2.resize(
        np.ascontiguousarray(values, np.float32),
        (width, height),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )
    if (values > 0.5).sum() < MIN_OBJECT_PIXELS:
        raise InputError("the mask is empty: paint the object white and the background black")
    return _solid(values)


def _mask_levels(values: ndarray) -> Mask:
    values = np.squeeze(values)
    if values.ndim == 3 and values.shape[2] in (2, 4):
        values = values[..., -1]
    elif values.ndim == 3 and values.shape[2] == 3:
        values = values.mean(-1).astype(values.dtype)
    if values.ndim != 2 or min(values.shape) < 2 or values.dtype.kind not in "buif":
        raise InputError(f"the mask has shape {values.shape} and type {values.dtype}: one channel of numbers is needed")
    if not np.isfinite(values).all() or values.min() < 0:
        raise InputError("the mask has negative or non-finite values: use 0 for background and 1 for the object")
    if values.dtype.kind == "u" and values.max() > 1:
        return values.astype(np.float32) / np.iinfo(values.dtype).max
    if values.max() > 255:
        raise InputError(f"the mask has values up to {values.max():g}: use 0 to 1, or 0 to 255")
    return values.astype(np.float32) / (255 if values.max() > 1 else 1)


def _object_box(alpha: Mask) -> tuple[int, int, int, int]:
    inside = alpha > 0.5
    if inside.sum() < MIN_OBJECT_PIXELS:
        raise InputError(
            f"no visible object: only {int(inside.sum())} pixels of the picture belong to it; use a picture in which "
            "the object is larger, or give a mask"
        )
    columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _object_warnings(rgb: Float[ndarray, "height width 3"], box: tuple[int, int, int, int], matting: str) -> list[str]:
    height, width = rgb.shape[:2]
    left, top, right, bottom = box
    notes = []
    touching = {"left": left == 0, "top": top == 0, "right": right == width, "bottom": bottom == height}
    sides = [name for name, touches in touching.items() if touches]
    if sides:
        notes.append(f"the object touches the {' and '.join(sides)} border of the picture: what lies beyond is missing")
    longest = max(right - left, bottom - top)
    if longest < SMALL_OBJECT_SIDE:
        notes.append(f"the object is only {longest} pixels large: its texture will be blurred; use a larger picture")
    if _is_enlarged(rgb[top:bottom, left:right]):
        notes.append("the object has no fine detail: the picture was enlarged or is out of focus; use a sharper one")
    if matting == "grabcut":
        notes.append(
            "the object was cut out of a busy background by color alone: check the mask, give one if it is wrong"
        )
    return notes


def _is_enlarged(rgb: Float[ndarray, "height width 3"]) -> bool:
    width, height = rgb.shape[1] // 2, rgb.shape[0] // 2
    if min(width, height) < 1:
        return False
    rgb = rgb[: 2 * height, : 2 * width]
    halved = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
    restored = cv2.resize(halved, rgb.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    return float(np.percentile(np.abs(rgb - restored).max(-1), 99.9)) < LEAST_DETAIL
