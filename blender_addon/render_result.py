"""The pixels of a render result as Blender shows it, without keeping Blender waiting for the whole of it.

Only saving gives a render result's pixels. Saved as a picture it costs 50 ms a megapixel and more, because Blender applies the
view transform. So it is saved as it is, scene-linear floats in an OpenEXR file that a thread reads, and is given to Blender
again in pieces, one a tick, each saved through the same view transform. Whatever that is (AgX, looks, curves, a studio's own
configuration), the picture is the same, but for the dither that Blender adds to the whole.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import bpy
import numpy as np

from . import scene_tools
from .background import Steps

PIECE_PIXELS = 2**17
"""As many go through the view transform in one tick: 4 to 25 ms on two cores."""
OUTPUT_SETTINGS = (
    "media_type", "file_format", "color_mode", "color_depth", "compression", "exr_codec", "views_format",
)  # fmt: skip
"""What `_saved` changes, in the order in which it can be put back: the first ones decide what the others may be."""
AS_PICTURE = {"file_format": "TARGA_RAW", "color_mode": "RGBA", "views_format": "INDIVIDUAL"}
"""The quickest of all files of bytes."""
AS_FLOATS = {
    "file_format": "OPEN_EXR", "color_mode": "RGBA", "color_depth": "32", "exr_codec": "NONE",
    "views_format": "INDIVIDUAL",
}  # fmt: skip
"""Half floats take Blender two to three times as long, and compression longer. No alpha would save it a sixth to a quarter."""


def pixels(image: bpy.types.Image, scene: bpy.types.Scene) -> Steps:
    """(H, W, 4) uint8 as displayed, straight alpha, row 0 on top; None where nothing was rendered.

    Raises:
        RuntimeError: Blender cannot save it, or is rendering.
        ReferenceError: The scene or the render result was removed meanwhile.
    """
    if _is_rendering():
        raise RuntimeError("wait until Blender has rendered")
    image_uid, scene_uid = image.session_uid, scene.session_uid
    linear = None
    # How large it is only a saved file tells.
    with suppress(RuntimeError):
        folder = _saved(image, scene, AS_FLOATS)
        linear = yield partial(_taken, folder, floats_of)
    if linear is not None:
        return (yield from _developed(linear, scene_uid))
    # Blender wrote another kind of file, or none.
    folder = _saved(_found(bpy.data.images, image_uid), _found(bpy.data.scenes, scene_uid), AS_PICTURE)
    return (yield partial(_taken, folder, bytes_of))


def _is_rendering() -> bool:
    return not bpy.app.background and bpy.app.is_job_running("RENDER")


def _found(items: Any, uid: int) -> Any:
    """A scene or picture of the open file that was there some ticks ago."""
    item = scene_tools.found(items, uid)
    if item is None:
        raise ReferenceError("it was removed while it was being read")
    return item


def _developed(linear: np.ndarray, scene_uid: int) -> Steps:
    """Scene-linear pixels through the view transform, a piece at a time.

    Args:
        linear: (H, W, 4) float32, premultiplied, row 0 on top.
    """
    height, width = linear.shape[:2]
    developed = yield partial(np.zeros, linear.shape, np.uint8)
    n_rows, top, look = max(1, PIECE_PIXELS // width), 0, _look_of(_found(bpy.data.scenes, scene_uid))
    # Where nobody has looked at it, Blender reads the view transform's tables now (AgX: 60 to 80 ms), not along with a piece.
    yield partial(_taken, _saved_piece(np.zeros((1, 1, 4), np.float32), _found(bpy.data.scenes, scene_uid)), bytes_of)
    block = yield partial(_bottom_up, linear[:n_rows])
    while top < height:
        if _is_rendering():
            # Frames of an animation are saved with the output settings that a piece borrows.
            yield partial(time.sleep, 0.1)
            continue
        scene = _found(bpy.data.scenes, scene_uid)
        if _look_of(scene) != look:
            # It was changed meanwhile: the picture would be of two kinds.
            top, look = 0, _look_of(scene)
            block = yield partial(_bottom_up, linear[:n_rows])
            continue
        folder = _saved_piece(block, scene)
        here, following = (slice(start, start + n_rows) for start in (top, top + n_rows))
        block = yield partial(_put, folder, developed[here], linear[following])
        top += n_rows
    return developed


def _bottom_up(rows: np.ndarray) -> np.ndarray:
    """Rows in Blender's order."""
    return np.ascontiguousarray(rows[::-1])


def _put(folder: Path, rows: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Take over a developed piece; returns the next one for Blender."""
    piece = _taken(folder, bytes_of)
    if piece is None:
        raise RuntimeError("Blender could not save a part of the picture")
    rows[:] = piece
    return _bottom_up(following)


def _look_of(scene: bpy.types.Scene) -> list:
    """All that says how scene-linear values are displayed."""
    settings, output = scene.view_settings, scene.render.image_settings
    owners = [scene.display_settings, settings]
    if output.color_management == "OVERRIDE":
        owners += [output.display_settings, output.view_settings]
    look = [output.color_management]
    for owner in owners:
        for own in owner.bl_rna.properties:
            if own.type == "POINTER":
                continue
            value = getattr(owner, own.identifier)
            look.append(tuple(value) if getattr(own, "is_array", False) else value)
        mapping = getattr(owner, "curve_mapping", None)
        if mapping is not None:
            look += [tuple(point.location) for curve in mapping.curves for point in curve.points]
    return look


def _saved_piece(rows: np.ndarray, scene: bpy.types.Scene) -> Path:
    """Rows of pixels saved as a picture."""
    with _float_image(rows.shape[1], rows.shape[0]) as piece:
        piece.pixels.foreach_set(rows.ravel())
        return _saved(piece, scene, AS_PICTURE)


@contextmanager
def _float_image(width: int, height: int) -> Iterator[bpy.types.Image]:
    """A picture of Blender's that is there for a moment, so that no undo step has it."""
    image = bpy.data.images.new(".ConRad piece", width, height, alpha=True, float_buffer=True)
    try:
        yield image
    finally:
        # Nothing uses it. Unlinking would have Blender build the whole scene's dependencies anew.
        bpy.data.images.remove(image, do_unlink=False)


def _saved(image: bpy.types.Image, scene: bpy.types.Scene, output: dict[str, str]) -> Path:
    """A new folder in which the image was saved; the output settings are put back.

    Raises:
        RuntimeError: There is no file.
    """
    folder = Path(tempfile.mkdtemp(prefix="conrad_", dir=bpy.app.tempdir or None))
    try:
        with _output(scene.render.image_settings, output):
            image.save_render(str(folder / "picture"), scene=scene)
    except RuntimeError:
        # In stereo each eye's picture may have been written, and Blender misses the file of the name it was given.
        if not any(folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder


@contextmanager
def _output(settings: bpy.types.ImageFormatSettings, output: dict[str, str]) -> Iterator[None]:
    """Other output settings for a moment."""
    names = [name for name in OUTPUT_SETTINGS if hasattr(settings, name)]
    before = {name: getattr(settings, name) for name in names}
    # Blender changes it with the file format, from 4.5 on.
    space = settings.linear_colorspace_settings.name if settings.has_linear_colorspace else ""
    output = {"media_type": "IMAGE", **output}
    try:
        for name in names:
            if name in output:
                setattr(settings, name, output[name])
        with _scene_linear(settings) if settings.has_linear_colorspace else nullcontext():
            yield
    finally:
        for name in names:
            setattr(settings, name, before[name])
        if space:
            settings.linear_colorspace_settings.name = space


@contextmanager
def _scene_linear(settings: bpy.types.ImageFormatSettings) -> Iterator[None]:
    """Floats are saved in the space that a new picture of floats has, for a moment."""
    space = settings.linear_colorspace_settings
    before = space.name
    with _float_image(1, 1) as image:
        space.name = image.colorspace_settings.name
    try:
        yield
    finally:
        # In 4.2 it has no name until one is chosen, and cannot lose it again.
        if before:
            space.name = before


def _taken(folder: Path, read: Any) -> np.ndarray | None:
    """What is read from the folder's first file, of the left eye where there are two; the folder is removed."""
    try:
        return next((read(path) for path in sorted(folder.iterdir())), None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bytes_of(path: Path) -> np.ndarray | None:
    """(H, W, 4) uint8 of a raw Targa file of 32 bits a pixel, row 0 on top; None if it is no such file."""
    data = path.read_bytes()
    if len(data) < 18 or data[2] != 2 or data[16] != 32:
        return None
    width, height = (int.from_bytes(data[at : at + 2], "little") for at in (12, 14))
    bgra = np.frombuffer(data, np.uint8, width * height * 4, 18 + data[0]).reshape(height, width, 4)
    is_top_first = data[17] & 0x20
    return np.ascontiguousarray((bgra if is_top_first else bgra[::-1])[..., [2, 1, 0, 3]])


def floats_of(path: Path) -> np.ndarray | None:
    """(H, W, 4) float32 of an OpenEXR file, row 0 on top, without copying them; None unless it has one part of uncompressed
    scan lines with the channels A, B, G, R in floats.

    The format: https://openexr.com/en/latest/OpenEXRFileLayout.html
    """
    data = np.fromfile(path, np.uint8)
    head = data[: 2**16].tobytes()
    # Magic number and version; the flags of tiles, deep data and more parts are not set.
    if len(head) < 8 or head[:5] != b"\x76\x2f\x31\x01\x02" or head[5] & ~0x04:
        return None
    attributes, at = {}, 8
    while at < len(head) and head[at]:
        name, kind, rest = head[at:].split(b"\0", 2)
        at += len(name) + len(kind) + 6
        size = int.from_bytes(rest[:4], "little")
        attributes[name], at = head[at : at + size], at + size
    # Each: name, type (2 is float), four bytes of no matter, steps in x and y.
    every_pixel = b"\2\0\0\0%b\1\0\0\0\1\0\0\0"
    channels = re.compile(
        b"".join(name + b"\0" + every_pixel % b".{4}" for name in (b"A", b"B", b"G", b"R")), re.DOTALL
    )
    if not channels.match(attributes.get(b"channels", b"")) or attributes.get(b"compression") != b"\0":
        return None
    left, top, right, bottom = np.frombuffer(attributes[b"dataWindow"], "<i4").tolist()
    width, height = right - left + 1, bottom - top + 1
    starts = np.frombuffer(data[at + 1 :].data, "<u8", height)
    # A line: its number and its size, then one channel after the other.
    line_bytes = 8 + 16 * width
    if (np.diff(starts.astype(np.int64)) != line_bytes).any() or len(data) < int(starts[-1]) + line_bytes:
        return None
    lines = data[int(starts[0]) :][: height * line_bytes].reshape(height, line_bytes)[:, 8:].view("<f4")
    return lines.reshape(height, 4, width).transpose(0, 2, 1)[..., ::-1]
