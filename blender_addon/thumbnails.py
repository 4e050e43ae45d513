"""Small pictures for panels: one a finished job, and the live preview of the running one."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

import bpy
import bpy.utils.previews
import numpy as np

from . import link
from .engine_state import Event

LIVE_SIZE, ICON_SIZE = 256, 32
LIVE_EVERY_S = 0.25

_icons: bpy.utils.previews.ImagePreviewCollection | None = None
_live_job = ""
_live_at = 0.0


def icon_of(job_id: str) -> int:
    """Icon number of a job's thumbnail, 0 while there is none."""
    return _icons[job_id].icon_id if _icons is not None and job_id in _icons else 0


def picture_icon(path: str) -> int:
    """Icon number of a picture file; Blender reads it in the background."""
    if _icons is None:
        return 0
    if path not in _icons:
        _icons.load(path, path, "IMAGE")
    return _icons[path].icon_id


def live_icon(job_id: str) -> int:
    """Icon number of the live preview; while there is none of this job, that of an empty frame.

    The frame keeps its place: panels below a growing one are drawn over it until the next redraw.
    """
    if _icons is None:
        return 0
    return _icons["live" if _live_job == job_id and "live" in _icons else "none"].icon_id


def _take(events: list[Event]) -> None:
    global _live_job, _live_at
    table = link.session().table
    for event in events:
        job = table.jobs.get(event.job)
        if job is None or _icons is None:
            continue
        if event.kind == "thumbnail" and job.thumbnail:
            _load(job.id, job.thumbnail)
        if event.kind == "job" and job.preview is not None and not job.is_active and job.id not in _icons:
            # Until a better one comes: what was seen last.
            _show(job.id, cropped(rgba_of(job.preview.rgb.shape, job.preview.rgb.data)))
        if event.kind == "preview" and job.preview is not None and monotonic() - _live_at > LIVE_EVERY_S:
            _live_job, _live_at = job.id, monotonic()
            _show("live", cropped(rgba_of(job.preview.rgb.shape, job.preview.rgb.data)))


def _load(job_id: str, png: bytes) -> None:
    folder = Path(bpy.app.tempdir) / "conrad_thumbnails"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{job_id}.png"
    path.write_bytes(png)
    if job_id in _icons:
        del _icons[job_id]
    _icons.load(job_id, str(path), "IMAGE")


def rgba_of(shape: tuple[int, ...], data: bytes | memoryview) -> np.ndarray:
    """(H, W, 4) float32, bottom row first, of a preview with three or four channels."""
    pixels = np.frombuffer(data, np.uint8).reshape(shape)[::-1]
    rgba = np.ones((*shape[:2], 4), np.float32)
    np.multiply(pixels, np.float32(1 / 255), out=rgba[..., : shape[2]])
    return rgba


def cropped(rgba: np.ndarray) -> np.ndarray:
    """The part of a picture that is clearly there."""
    is_seen = rgba[..., 3] > 0.1
    rows, columns = np.flatnonzero(is_seen.any(1)), np.flatnonzero(is_seen.any(0))
    return rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else rgba


def _show(name: str, rgba: np.ndarray) -> None:
    """Put a preview into an icon, centered on a transparent square."""
    stride = max(1, -(-max(rgba.shape[:2]) // LIVE_SIZE))
    small = rgba[::stride, ::stride]
    side = max(small.shape[:2])
    square = np.zeros((side, side, 4), np.float32)
    top, left = (side - small.shape[0]) // 2, (side - small.shape[1]) // 2
    window = square[top : top + small.shape[0], left : left + small.shape[1]]
    # Icons are drawn with premultiplied alpha.
    window[..., :3] = small[..., :3] * small[..., 3:]
    window[..., 3] = small[..., 3]
    preview = _icons[name] if name in _icons else _icons.new(name)
    if tuple(preview.image_size) != (side, side):
        preview.image_size = side, side
    preview.image_pixels_float.foreach_set(square.ravel())
    if name != "live":
        # Lists draw the small icon.
        index = (np.arange(ICON_SIZE) + 0.5) * side / ICON_SIZE
        preview.icon_size = ICON_SIZE, ICON_SIZE
        icon = np.ascontiguousarray(square[index.astype(int)][:, index.astype(int)])
        preview.icon_pixels_float.foreach_set(icon.ravel())


def register() -> None:
    global _icons
    _icons = bpy.utils.previews.new()
    _show("none", np.array([[[1.0, 1.0, 1.0, 0.06]]], np.float32))
    link.listeners.append(_take)


def unregister() -> None:
    global _icons, _live_job
    if _take in link.listeners:
        link.listeners.remove(_take)
    if _icons is not None:
        bpy.utils.previews.remove(_icons)
        _icons, _live_job = None, ""
