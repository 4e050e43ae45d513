"""Pictures and meshes of the scene as what a job is sent: file bytes where a file says it all, else pixels."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import bpy
import numpy as np

from .protocol import Array

PLAIN_FORMATS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"BM": "bmp"}
MAX_FILE_BYTES = 64 * 1024 * 1024


class NoPicture(Exception):
    """There are no pixels to send; the message says why."""


def picture_fields(image: bpy.types.Image, scene: bpy.types.Scene) -> dict[str, bytes | Array]:
    """`picture` or `pixels` of a job.

    Raises:
        NoPicture: The file is missing, or nothing was rendered or painted yet.
    """
    if image.type in ("RENDER_RESULT", "COMPOSITING"):
        return {"picture": _rendered_bytes(image, scene)}
    data = file_bytes(image)
    return {"picture": data} if data else {"pixels": array_of(pixels_of(image))}


def mask_fields(image: bpy.types.Image) -> dict[str, Array]:
    """`mask_pixels` of a job: the alpha of a picture that has one, else its brightness."""
    pixels = pixels_of(image)
    has_alpha = pixels.shape[2] == 4 and bool((pixels[..., 3] < 255).any())
    channel = pixels[..., 3] if has_alpha else pixels[..., :3].max(2)
    return {"mask_pixels": array_of(np.ascontiguousarray(channel))}


def array_of(values: np.ndarray) -> Array:
    values = np.ascontiguousarray(values)
    return Array(values.dtype.str.replace("|", ""), values.shape, values.data)


def file_bytes(image: bpy.types.Image) -> bytes:
    """The picture's file when Blender shows it exactly as another program would read it, else nothing.

    Painted, generated and float pictures are not their files; neither is one that its EXIF tags turn, because Blender
    does not turn it.
    """
    if image.source != "FILE" or image.is_dirty or image.is_float:
        return b""
    if image.packed_file is not None:
        data = bytes(image.packed_file.data)
    else:
        path = Path(bpy.path.abspath(image.filepath_from_user(), library=image.library))
        try:
            data = path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else b""
        except OSError:
            return b""
    is_plain = data.startswith(tuple(PLAIN_FORMATS)) and not is_turned(data)
    return data if is_plain else b""


def is_turned(data: bytes) -> bool:
    """Whether EXIF tags in the file's head ask for rotation or mirroring."""
    return orientation(data) not in (0, 1)


def orientation(data: bytes) -> int:
    """The EXIF tag: 1 is upright, 5 to 8 lie on their side; 0 where there is none."""
    at = data.find(b"Exif\0\0", 0, 200_000)
    start = at + 6 if at >= 0 else data.find(b"eXIf", 0, 200_000) + 4
    if start < 6:
        return 0
    tiff = data[start : start + 65_536]
    order = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
        return 0
    first = int.from_bytes(tiff[4:8], order)
    for k in range(int.from_bytes(tiff[first : first + 2], order)):
        entry = tiff[first + 2 + 12 * k : first + 14 + 12 * k]
        if int.from_bytes(entry[:2], order) == 0x0112:
            return int.from_bytes(entry[8:10], order)
    return 0


def upright_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG or JPEG file as the engine turns it, without decoding it; None for other files."""
    size = None
    if data.startswith(b"\x89PNG"):
        size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    elif data.startswith(b"\xff\xd8"):
        at = 2
        while size is None and at + 9 <= len(data) and data[at] == 0xFF:
            # The frame header is the first of these markers, but for three that stand between them.
            if 0xC0 <= data[at + 1] <= 0xCF and data[at + 1] not in (0xC4, 0xC8, 0xCC):
                size = int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return size[::-1] if size is not None and orientation(data) > 4 else size


def pixels_of(image: bpy.types.Image) -> np.ndarray:
    """(H, W, 4) uint8, sRGB, straight alpha, row 0 on top.

    Raises:
        NoPicture: There are none.
    """
    width, height = image.size
    n_values = len(image.pixels)
    if not n_values or n_values != width * height * image.channels:
        raise NoPicture(f"The picture {image.name} has no pixels: its file is missing or nothing was rendered yet")
    values = np.empty(n_values, np.float32)
    image.pixels.foreach_get(values)
    if not image.is_float and image.channels == 4:
        return _bytes_on_top(values.reshape(height, width, 4))
    pixels = values.reshape(height, width, image.channels)[::-1]
    rgba = np.ones((height, width, 4), np.float32)
    rgba[..., : min(image.channels, 4)] = pixels[..., :4]
    if image.channels == 1:
        rgba[..., 1:3] = pixels
    if image.is_float:
        rgba[..., :3] /= np.maximum(rgba[..., 3:], 1e-6)
        rgba[..., :3] = _linear_to_srgb(np.clip(rgba[..., :3], 0, 1))
    return (np.clip(rgba, 0, 1) * 255 + 0.5).astype(np.uint8)


def _bytes_on_top(values: np.ndarray) -> np.ndarray:
    """[0, 1] floats, bottom row first -> bytes, top row first. The floats are used up: in blocks that stay in the
    processor's cache it takes a quarter of the time, which Blender spends waiting."""
    height, width = values.shape[:2]
    rgba = np.empty(values.shape, np.uint8)
    n_rows = max(1, 16384 // width)
    for bottom in range(0, height, n_rows):
        block = values[bottom : bottom + n_rows]
        block *= 255
        block += 0.5
        rgba[height - bottom - len(block) : height - bottom] = block[::-1]
    return rgba


def _linear_to_srgb(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


def _rendered_bytes(image: bpy.types.Image, scene: bpy.types.Scene) -> bytes:
    """A render result as a PNG file: only saving it gives its pixels. The output settings are put back."""
    settings = scene.render.image_settings
    names = ("file_format", "color_mode", "color_depth", "compression")
    before = {name: getattr(settings, name) for name in names}
    handle, path = tempfile.mkstemp(suffix=".png", dir=bpy.app.tempdir or None)
    os.close(handle)
    try:
        settings.file_format, settings.color_mode, settings.color_depth = "PNG", "RGBA", "8"
        settings.compression = 0
        image.save_render(path, scene=scene)
        data = Path(path).read_bytes()
    except RuntimeError as error:
        raise NoPicture(f"The render result cannot be read: {error}") from None
    finally:
        settings.file_format = before["file_format"]
        for name in names[1:]:
            setattr(settings, name, before[name])
        Path(path).unlink(missing_ok=True)
    if not data:
        raise NoPicture("Nothing has been rendered yet")
    return data


def mesh_fields(item: bpy.types.Object, depsgraph: bpy.types.Depsgraph) -> dict[str, Array]:
    """`init_vertices` and `init_faces` of a job: the object with its modifiers, as triangles in the world.

    Raises:
        NoPicture: It has no faces.
    """
    evaluated = item.evaluated_get(depsgraph)
    mesh = evaluated.to_mesh()
    try:
        mesh.calc_loop_triangles()
        n_triangles = len(mesh.loop_triangles)
        if not n_triangles:
            raise NoPicture(f"{item.name} has no faces to start from")
        vertices = np.empty(3 * len(mesh.vertices), np.float32)
        mesh.vertices.foreach_get("co", vertices)
        faces = np.empty(3 * n_triangles, np.int32)
        mesh.loop_triangles.foreach_get("vertices", faces)
    finally:
        evaluated.to_mesh_clear()
    matrix = np.array(item.matrix_world, np.float64)
    world = vertices.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3]
    faces = faces.reshape(-1, 3)
    if np.linalg.det(matrix[:3, :3]) < 0:
        # A mirroring scale turns every triangle inside out.
        faces = faces[:, ::-1]
    return {"init_vertices": array_of(world.astype("<f4")), "init_faces": array_of(faces.astype("<i4"))}
