"""Pictures and meshes of the scene as what a job is sent: file bytes where a file says it all, else pixels."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import bpy
import numpy as np

from . import background, render_result, scene_tools
from .background import Steps
from .protocol import Array

PLAIN_FORMATS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"BM": "bmp"}
OTHER_FORMATS = (b"II*\0", b"MM\0*", b"\x76\x2f\x31\x01", b"#?RADIANCE", b"BM")
"""TIFF, OpenEXR, Radiance, BMP: only Blender reads their size, and decodes them for that."""
MAX_FILE_BYTES = 64 * 1024 * 1024
HEAD_BYTES = 1024 * 1024
"""Color profiles and thumbnails stand before a JPEG file's size."""
LARGE_PIXELS = 2**18
"""Of more, threads do what they can: making room for the pixels of a megapixel alone took Blender 45 ms at times, because the
system hands out new memory page by page."""
QUIET_PIXELS, QUIET_RENDERED_PIXELS = 3072**2, 2560 * 1600
"""Only Blender's own thread can take pixels out of Blender; more than these may take it longer than 50 ms (4096 x 4096 painted
ones 32 to 99 ms, 3840 x 2160 rendered ones 58 to 89 ms)."""
QUIET_PACKED_BYTES = 2**24
"""Packed files come out of Blender by way of its own thread too, about 1.6 ms a megabyte."""
PATIENCE_S = 30.0
"""How long a thread of Blender's is given to decode a picture."""


class NoPicture(Exception):
    """There are no pixels to send; the message says why."""


def job_fields(image: bpy.types.Image, mask: bpy.types.Image | None, scene: bpy.types.Scene) -> Steps:
    """`picture` or `pixels`, and `mask_pixels`, of a job.

    Raises:
        NoPicture: A file is missing, or nothing was rendered or painted yet.
    """
    mask_uid = None if mask is None else mask.session_uid
    fields = yield from picture_fields(image, scene)
    return fields if mask_uid is None else {**fields, **(yield from mask_fields(found(mask_uid)))}


def picture_fields(image: bpy.types.Image, scene: bpy.types.Scene) -> Steps:
    """`picture` or `pixels` of a job. Raises what `job_fields` raises."""
    if image.type in ("RENDER_RESULT", "COMPOSITING"):
        return {"pixels": array_of((yield from _rendered_pixels(image, scene)))}
    uid = image.session_uid
    data = yield from file_bytes(image)
    return {"picture": data} if data else {"pixels": array_of((yield from pixels_of(found(uid))))}


def mask_fields(image: bpy.types.Image) -> Steps:
    """`mask_pixels` of a job: the alpha of a picture that has one, else its brightness."""
    pixels = yield from pixels_of(image)
    return {"mask_pixels": array_of((yield partial(_mask_of, pixels)))}


def _mask_of(pixels: np.ndarray) -> np.ndarray:
    has_alpha = pixels.shape[2] == 4 and bool((pixels[..., 3] < 255).any())
    return np.ascontiguousarray(pixels[..., 3]) if has_alpha else pixels[..., :3].max(2)


def found(uid: int) -> bpy.types.Image:
    """A picture of the open file that was there some ticks ago.

    Raises:
        NoPicture: It is gone.
    """
    image = scene_tools.found(bpy.data.images, uid)
    if image is None:
        raise NoPicture("The picture was removed while it was being read")
    return image


def is_large(*images: bpy.types.Image | None) -> bool:
    """Whether Blender would be kept waiting by reading one of these."""
    sizes = [size_of(image) for image in images if image is not None]
    return any(width * height > LARGE_PIXELS for width, height in sizes)


def why_pause(*images: bpy.types.Image | None) -> str:
    """What to tell the user when Blender stands still while one of these is read, or nothing."""
    for image in images:
        if image is None:
            continue
        is_rendered = image.type in ("RENDER_RESULT", "COMPOSITING")
        if image.source == "FILE" and not image.is_dirty and not is_rendered:
            is_quiet = image.packed_file is None or image.packed_file.size <= QUIET_PACKED_BYTES
        else:
            width, height = size_of(image)
            is_quiet = width * height <= (QUIET_RENDERED_PIXELS if is_rendered else QUIET_PIXELS)
        if not is_quiet:
            return f"Blender stops for a moment to read {image.name}; a saved PNG or JPEG file is read while it goes on"
    return ""


def is_decoding() -> bool:
    """Whether a thread of Blender's is decoding a picture, for its icon: until it is done, whatever is asked of that picture
    has to wait, even whether it is decoded."""
    return not bpy.app.background and bpy.app.is_job_running("RENDER_PREVIEW")


def start_decoding(*images: bpy.types.Image | None) -> bool:
    """Have a thread of Blender's decode what else Blender's own would be kept waiting with; true while one is at it."""
    if is_decoding():
        return True
    for image in () if bpy.app.background else images:
        if image is None or image.source != "FILE" or image.has_data:
            continue
        head = unread_head(image)
        if head is not None and head.width * head.height <= LARGE_PIXELS:
            continue
        with bpy.context.temp_override(window=bpy.context.window_manager.windows[0], id=image):
            # Not for the preview: this is the one way to have a picture decoded in a thread.
            if bpy.ops.ed.lib_id_generate_preview.poll():
                bpy.ops.ed.lib_id_generate_preview()
    return is_decoding()


def until_decoded(*images: bpy.types.Image | None) -> Steps:
    """Let a thread of Blender's decode these pictures first.

    Raises:
        NoPicture: One of them was removed meanwhile.
    """
    uids = [image.session_uid for image in images if image is not None]
    end = time.monotonic() + PATIENCE_S
    is_waiting = start_decoding(*images)
    while is_waiting and time.monotonic() < end:
        yield partial(time.sleep, 0.02)
        is_waiting = is_decoding()
    for uid in uids:
        found(uid)


class PreparedFirst:
    """An operator that begins, when a person presses its button, once `preparation` is done; Blender goes on meanwhile."""

    def preparation(self, context: bpy.types.Context) -> Steps:
        settings = context.scene.conrad
        yield from until_decoded(settings.image, settings.mask if settings.use_mask else None)

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        if any(type(other) is type(self) for other in context.window.modal_operators):
            self.report({"INFO"}, "The picture is still being read")
            return {"CANCELLED"}
        self._is_prepared: list[bool] = []
        background.start(_noted(self.preparation(context), self._is_prepared))
        if self._is_prepared:
            return self.execute(context)
        self._timer = context.window_manager.event_timer_add(0.05, window=context.window)
        context.window_manager.modal_handler_add(self)
        context.workspace.status_text_set(f"{self.bl_label}: the picture is being read")
        return {"RUNNING_MODAL"}

    def modal(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        if event.type != "TIMER" or not self._is_prepared:
            return {"PASS_THROUGH"}
        self.cancel(context)
        # The picture may have been removed meanwhile.
        return self.execute(context) if self.poll(context) else {"CANCELLED"}

    def cancel(self, context: bpy.types.Context) -> None:
        context.window_manager.event_timer_remove(self._timer)
        context.workspace.status_text_set(None)


def _noted(steps: Steps, is_done: list[bool]) -> Steps:
    """The same, its end noted."""
    try:
        yield from steps
    except NoPicture:
        pass
    finally:
        is_done.append(True)


def array_of(values: np.ndarray) -> Array:
    values = np.ascontiguousarray(values)
    return Array(values.dtype.str.replace("|", ""), values.shape, values.data)


def file_bytes(image: bpy.types.Image) -> Steps:
    """The picture's file when Blender shows it exactly as another program would read it, else nothing.

    Painted, generated and float pictures are not their files; neither is one that its EXIF tags turn, because Blender
    does not turn it.
    """
    if image.source != "FILE" or image.is_dirty:
        return b""
    if image.packed_file is not None:
        data = bytes(image.packed_file.data) if image.packed_file.size <= MAX_FILE_BYTES else b""
    else:
        data = yield partial(_read, _path_of(image), MAX_FILE_BYTES)
    head = head_of(data)
    is_plain = data.startswith(tuple(PLAIN_FORMATS)) and not is_turned(data) and not (head is not None and head.is_deep)
    return data if is_plain and len(data) <= MAX_FILE_BYTES else b""


def _path_of(image: bpy.types.Image) -> Path:
    return Path(bpy.path.abspath(image.filepath_from_user(), library=image.library))


def _read(path: Path, n_bytes: int) -> bytes:
    """The file's beginning, with one byte more than asked for where it is longer; nothing where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(n_bytes + 1)
    except OSError:
        return b""


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


@dataclass(frozen=True)
class Head:
    """What the head of a picture file says."""

    width: int
    height: int
    has_alpha: bool = False
    is_deep: bool = False
    """More than eight bits a channel: Blender makes floats of them."""


def head_of(data: bytes) -> Head | None:
    """The head of a PNG, JPEG or WebP file, without decoding it; None for other files."""
    if data.startswith(b"\x89PNG"):
        width, height, depth, kind = _whole(data[16:20]), _whole(data[20:24]), data[24:25], data[25:26]
        pixels_at = data.find(b"IDAT")
        has_alpha = kind in (b"\4", b"\6") or data.find(b"tRNS", 0, pixels_at if pixels_at > 0 else None) > 0
        return Head(width, height, has_alpha, depth == b"\x10")
    if data.startswith(b"\xff\xd8"):
        at = 2
        while at + 9 <= len(data) and data[at] == 0xFF:
            # The frame header is the first of these markers, but for three that stand between them.
            if 0xC0 <= data[at + 1] <= 0xCF and data[at + 1] not in (0xC4, 0xC8, 0xCC):
                return Head(_whole(data[at + 7 : at + 9]), _whole(data[at + 5 : at + 7]))
            at += 2 + _whole(data[at + 2 : at + 4])
    if data[:4] == b"RIFF" and data[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        return Head(width, height, bool(data[20] & 0x10))
    if data[:4] == b"RIFF" and data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return Head(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), bool(bits >> 28 & 1))
    if data[:4] == b"RIFF" and data[12:16] == b"VP8 ":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        return Head(width, height)
    return None


def _whole(data: bytes) -> int:
    return int.from_bytes(data, "big")


def upright_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG, JPEG or WebP file as the engine turns it, without decoding it; None for other files."""
    head = head_of(data)
    if head is None:
        return None
    return (head.height, head.width) if orientation(data) > 4 else (head.width, head.height)


def unread_head(image: bpy.types.Image) -> Head | None:
    """The head of a picture's file while Blender has not decoded it: its own properties would, and Blender waits for that
    half a second for a photo. None where only Blender knows."""
    if image.has_data or image.source != "FILE":
        return None
    if image.packed_file is None:
        return head_of(_read(_path_of(image), HEAD_BYTES))
    key = image.session_uid, image.packed_file.size
    if key not in _packed_heads:
        # All of it comes out of Blender or nothing: once is enough.
        _packed_heads[key] = head_of(bytes(image.packed_file.data))
    return _packed_heads[key]


_packed_heads: dict[tuple[int, int], Head | None] = {}


def size_of(image: bpy.types.Image) -> tuple[int, int]:
    """Width and height, 0 where there are no pixels."""
    if image.type == "RENDER_RESULT":
        # Blender tells no size of it; most probably it was rendered with the settings as they are.
        render = scene_tools.scene_now().render
        return tuple(side * render.resolution_percentage // 100 for side in (render.resolution_x, render.resolution_y))
    head = unread_head(image)
    return (head.width, head.height) if head is not None else tuple(image.size)


def is_picture(image: bpy.types.Image) -> bool:
    """Whether a picture just loaded is one, by the beginning of its file where that says it."""
    is_other = not image.has_data and _read(_path_of(image), 16).startswith(OTHER_FORMATS)
    return is_other or size_of(image)[0] > 0


def values_of(image: bpy.types.Image) -> Steps:
    """Blender's own numbers, (height, width, channels) float32, bottom row first.

    Raises:
        NoPicture: There are none.
    """
    uid, shape = image.session_uid, _shape_of(image)
    # A large new array costs as much as its filling, because the system hands out every page of it at the first touch.
    values = yield partial(np.full, shape, 0, np.float32)
    image = found(uid)
    if _shape_of(image) != shape:
        raise NoPicture(f"The picture {image.name} was changed while it was being read")
    image.pixels.foreach_get(values.ravel())
    return values


def _shape_of(image: bpy.types.Image) -> tuple[int, int, int]:
    width, height = image.size
    shape = (height, width, image.channels)
    if not width or len(image.pixels) != height * width * image.channels:
        raise NoPicture(f"The picture {image.name} has no pixels: its file is missing or nothing was rendered yet")
    return shape


def pixels_of(image: bpy.types.Image) -> Steps:
    """(H, W, 4) uint8, sRGB, straight alpha, row 0 on top. Raises what `values_of` raises."""
    uid = image.session_uid
    values = yield from values_of(image)
    return (yield partial(_pixels_from, values, found(uid).is_float))


def _pixels_from(values: np.ndarray, is_float: bool) -> np.ndarray:
    height, width, channels = values.shape
    if not is_float and channels == 4:
        return _bytes_on_top(values)
    pixels = values[::-1]
    rgba = np.ones((height, width, 4), np.float32)
    rgba[..., : min(channels, 4)] = pixels[..., :4]
    if channels == 1:
        rgba[..., 1:3] = pixels
    if is_float:
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


def _rendered_pixels(image: bpy.types.Image, scene: bpy.types.Scene) -> Steps:
    """The pixels of a render result, as of `pixels_of`."""
    try:
        pixels = yield from render_result.pixels(image, scene)
    except (RuntimeError, ReferenceError) as error:
        raise NoPicture(f"The render result cannot be read: {error}") from None
    if pixels is None:
        raise NoPicture("Nothing has been rendered yet")
    return pixels


def mesh_fields(item: bpy.types.Object, depsgraph: bpy.types.Depsgraph) -> dict[str, Array]:
    """`init_vertices` and `init_faces` of a job: the object with its modifiers, as triangles in the world.

    Raises:
        NoPicture: It has no faces.
    """
    evaluated = item.evaluated_get(depsgraph)
    mesh = evaluated.to_mesh()
    try:
        if not len(mesh.polygons):
            raise NoPicture(f"{item.name} has no faces to start from")
        vertices = np.empty(3 * len(mesh.vertices), np.float32)
        mesh.vertices.foreach_get("co", vertices)
        faces = _triangles_of(mesh)
    finally:
        evaluated.to_mesh_clear()
    matrix = np.array(item.matrix_world, np.float64)
    world = vertices.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3]
    if np.linalg.det(matrix[:3, :3]) < 0:
        # A mirroring scale turns every triangle inside out.
        faces = faces[:, ::-1]
    return {"init_vertices": array_of(world.astype("<f4")), "init_faces": array_of(faces.astype("<i4"))}


def _triangles_of(mesh: bpy.types.Mesh) -> np.ndarray:
    """(n, 3) vertex numbers."""
    if len(mesh.loops) == 3 * len(mesh.polygons):
        # All are triangles: the corners as they lie in memory take no time, triangulating 500,000 faces 60 ms.
        faces = np.empty(len(mesh.loops), np.int32)
        mesh.attributes[".corner_vert"].data.foreach_get("value", faces)
    else:
        mesh.calc_loop_triangles()
        faces = np.empty(3 * len(mesh.loop_triangles), np.int32)
        mesh.loop_triangles.foreach_get("vertices", faces)
    return faces.reshape(-1, 3)
