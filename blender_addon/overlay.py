"""The forming object in the viewport: the newest preview, drawn as a picture that stands in the scene.

The viewport's own view goes to the engine as the preview's camera. A preview brings its camera back; it is drawn on the
plane through the object's center that faces that camera, so it lies exactly right once the view rests and follows pans
and zooms before that. While the view moves small previews are asked for, at rest larger ones.
"""

from __future__ import annotations

from time import monotonic

import bpy
import gpu
import numpy as np
from gpu_extras.batch import batch_for_shader
from mathutils import Vector

from . import camera_math as cm
from . import link, preferences, scene_tools
from .engine_state import Event
from .jobs import Job
from .protocol import Preview, SetPreview

MOVING_SIZE, RESTING_SIZE = 160, 320
REST_S, LONG_REST_S = 0.25, 1.0
ASK_EVERY_S = 0.08
MAX_TURN_DEG = 60.0
MARGIN = 0.75
"""Half of the shown window, in sizes of the object around its center."""

_handles: list[object] = []
_texture: gpu.types.GPUTexture | None = None
_shown: Preview | None = None
_pending: Preview | None = None
_is_waiting = False
"""What was done for the first picture was enough for one drawing of the view; the rest waits for another."""
_rehearsed: set[tuple[int, int]] = set()
"""Sizes of the textures whose drawing the driver has compiled; for a width or height of 2^n software GL does so once more."""
_are_corners_compiled = False
_serial = 0
_asked: tuple = ()
_asked_at = 0.0
_view: tuple = ()
_moved_at = 0.0


def _take(events: list[Event]) -> None:
    """A new preview has come: it is drawn from now on."""
    global _pending
    jobs = link.session().table.jobs
    for event in events:
        job = jobs.get(event.job)
        if event.kind == "preview" and job is not None and job.preview is not None and job.notes.setup:
            _pending = job.preview
            scene_tools.redraw(kinds=("VIEW_3D",), view=True)
        if event.kind in ("job", "forgotten") and _pending is not None and event.job == _pending.job:
            if job is None or not job.is_active:
                clear()
                scene_tools.redraw(kinds=("VIEW_3D",), view=True)


def clear() -> None:
    """Show nothing any more."""
    global _texture, _shown, _pending, _asked, _is_waiting
    _texture = _shown = _pending = None
    _asked, _is_waiting = (), False


def _watched_job() -> Job | None:
    job = link.session().table.shown() if link.has_session() else None
    return job if job is not None and job.state_name in ("running", "paused") else None


def _step() -> bool:
    """Tell the engine where the view is, when it has changed or come to rest."""
    global _is_waiting
    job = _watched_job()
    if job is None or bpy.app.background:
        return False
    if _is_waiting:
        _is_waiting = False
        scene_tools.redraw(kinds=("VIEW_3D",), view=True)
    if scene_tools.scene_now().conrad.use_overlay and job.notes.setup:
        _ask_for_view(job)
    else:
        _ask_for_turning_view(job)
    return True


def _ask_for_turning_view(job: Job) -> None:
    """Something to look at in the panel, once a job."""
    global _asked
    if _asked != ("turning", job.id):
        _asked = ("turning", job.id)
        link.session().tell(SetPreview(job.id, True, width=256, height=256))


def _ask_for_view(job: Job) -> None:
    """The picture from the view that was moved last: small while it moves, large when it rests."""
    global _serial, _asked, _asked_at, _view, _moved_at
    found, now = _moved_view(), monotonic()
    if found is None:
        return
    region, data, key = found
    if key != _view:
        _view, _moved_at = key, now
    rest, largest = now - _moved_at, preferences.get().preview_size
    size = MOVING_SIZE if rest < REST_S else (RESTING_SIZE if rest < LONG_REST_S else largest)
    request = (job.id, key, min(size, largest))
    if request == _asked or now - _asked_at < ASK_EVERY_S:
        return
    view = window_on_object(data, region.width, region.height, job.notes.setup, request[2])
    if view is None:
        return
    _asked, _asked_at, _serial = request, now, _serial + 1
    pose, lens, width, height = view
    c2w, intrinsics = tuple(float(x) for x in pose.ravel()), tuple(float(x) for x in lens)
    link.session().tell(SetPreview(job.id, True, _serial, c2w, intrinsics, width, height))


_last_keys: dict[int, tuple] = {}


def _moved_view() -> tuple[bpy.types.Region, bpy.types.RegionView3D, tuple] | None:
    """The 3D view that was moved last: the first one whose view differs from the last look, else the one before."""
    views = []
    for window in bpy.context.window_manager.windows:
        for area in window.screen.areas:
            if area.type == "VIEW_3D":
                region = next(r for r in area.regions if r.type == "WINDOW")
                data = area.spaces.active.region_3d
                matrix = np.array(data.window_matrix) @ np.array(data.view_matrix)
                key = (area.as_pointer(), region.width, region.height, *np.round(matrix, 5).ravel().tolist())
                views.append((region, data, key))
    if not views:
        _last_keys.clear()
        return None
    changed = [view for view in views if _last_keys.get(view[2][0]) != view[2]]
    _last_keys.clear()
    _last_keys.update({view[2][0]: view[2] for view in views})
    same = [view for view in views if _view and view[2][0] == _view[0]]
    return (changed or same or views)[0]


def window_on_object(
    data: bpy.types.RegionView3D, region_width: int, region_height: int, setup: dict, largest: int
) -> tuple[np.ndarray, tuple[float, float, float, float], int, int] | None:
    """The camera of the part of a viewport that shows the object.

    Returns:
        Pose, intrinsics, width and height; None when the object is out of sight.
    """
    center, size = np.array(setup["object_center"]), setup["object_size"]
    pose, lens = cm.view_camera(
        np.array(data.view_matrix), np.array(data.window_matrix), region_width, region_height, center, size
    )
    offsets = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * size * MARGIN
    uv, depths = cm.project(center + offsets, pose, lens)
    if depths.min() <= 1e-6:
        low, high = np.zeros(2), np.array([region_width, region_height], float)
    else:
        low = np.clip(uv.min(0), 0, [region_width, region_height])
        high = np.clip(uv.max(0), 0, [region_width, region_height])
    if (high - low).min() < 4:
        return None
    scale = min(largest / float((high - low).max()), 1.0)
    width, height = (int(max(round(x), 8)) for x in (high - low) * scale)
    sx, sy = width / (high[0] - low[0]), height / (high[1] - low[1])
    fx, fy, cx, cy = lens
    return pose, (fx * sx, fy * sy, (cx - low[0]) * sx, (cy - low[1]) * sy), width, height


def corners(preview: Preview, center: np.ndarray) -> list[Vector]:
    """The picture's corners in the world, on the plane through the center that faces its camera: lower left, lower
    right, upper right, upper left."""
    height, width = preview.rgb.shape[:2]
    pose = np.array(preview.c2w).reshape(4, 4)
    fx, fy, cx, cy = preview.intrinsics
    depth = float((pose[:3, 3] - center) @ pose[:3, 2])
    found = []
    for u, v in ((0, height), (width, height), (width, 0), (0, 0)):
        local = np.array([(u - cx) / fx, (cy - v) / fy, -1.0]) * depth
        found.append(Vector(pose[:3, 3] + pose[:3, :3] @ local))
    return found


def _prepare() -> None:
    """Called before every 3D view is drawn: makes the newest preview a texture, and has the driver compile its drawing.

    A driver compiles at a first drawing, software GL for 40 ms. While it draws the view its threads take the processor from
    that, so this comes before. The first picture of all is made ready in three drawings of the view, a later one in one.
    """
    global _texture, _shown, _is_waiting, _are_corners_compiled
    job = _drawn_job()
    if job is None or _is_waiting:
        return
    # Newer ones wait until the first one is shown: to make them as well would be felt.
    is_first_on_its_way = _shown is not None and _shown.job == job.id and not _rehearsed
    if _pending is not None and _pending is not _shown and _pending.c2w and not is_first_on_its_way:
        _is_waiting = not _rehearsed
        _texture, _shown = _make_texture(_pending), _pending
        if _is_waiting:
            return
    if _texture is None or is_ready() or _shown.job != job.id:
        return
    if _are_corners_compiled:
        # Now, so that the picture is shown whatever becomes of this.
        _rehearsed.add((_texture.width, _texture.height))
        _rehearse(job, has_colors=True)
    else:
        # Without colors the driver compiles what becomes of the corners, and little else.
        _are_corners_compiled = _is_waiting = True
        _rehearse(job, has_colors=False)


def is_ready() -> bool:
    """There is a picture that the driver can draw without compiling anything."""
    return _texture is not None and (_texture.width, _texture.height) in _rehearsed


def _rehearse(job: Job, has_colors: bool) -> None:
    """Draw the picture beside the view, into buffers of its formats: a driver compiles once more for others."""
    color, depth = (gpu.types.GPUTexture((8, 8), format=name) for name in ("SRGB8_A8", "DEPTH_COMPONENT32F"))
    with gpu.types.GPUFrameBuffer(color_slots=color, depth_slot=depth).bind():
        gpu.state.color_mask_set(*[has_colors] * 4)
        try:
            _draw_picture(job)
        finally:
            gpu.state.color_mask_set(True, True, True, True)


def _drawn_job() -> Job | None:
    """The job whose pictures stand in the 3D views."""
    job = _watched_job()
    return job if job is not None and bpy.context.scene.conrad.use_overlay and job.notes.setup else None


def _draw() -> None:
    """Called after every 3D view was drawn; reads state, changes nothing."""
    job = _drawn_job()
    if job is None or not is_ready() or _shown.job != job.id:
        return
    forward = np.array(bpy.context.region_data.view_matrix)[2, :3]
    if forward @ np.array(_shown.c2w).reshape(4, 4)[:3, 2] >= np.cos(np.radians(MAX_TURN_DEG)):
        _draw_picture(job)


def _draw_picture(job: Job) -> None:
    shader = gpu.shader.from_builtin("IMAGE_COLOR")
    batch = batch_for_shader(
        shader,
        "TRI_FAN",
        {
            "pos": corners(_shown, np.array(job.notes.setup["object_center"])),
            "texCoord": ((0, 0), (1, 0), (1, 1), (0, 1)),
        },
    )
    gpu.state.blend_set("ALPHA")
    gpu.state.depth_test_set("NONE")
    shader.bind()
    shader.uniform_sampler("image", _texture)
    shader.uniform_float("color", (1.0, 1.0, 1.0, bpy.context.scene.conrad.overlay_opacity))
    batch.draw(shader)
    gpu.state.blend_set("NONE")


def _linear_table() -> np.ndarray:
    """sRGB bytes -> linear: the viewport's buffer encodes what a shader writes."""
    srgb = np.arange(256) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4).astype(np.float32)


_LINEAR = _linear_table()


def _make_texture(preview: Preview) -> gpu.types.GPUTexture:
    """The preview on the GPU, linear; half floats keep dark tones that eight bits would lose."""
    pixels = np.frombuffer(preview.rgb.data, np.uint8).reshape(preview.rgb.shape)[::-1]
    height, width, n_channels = pixels.shape
    rgba = np.ones((height, width, 4), np.float32)
    rgba[..., :3] = _LINEAR[pixels[..., :3]]
    if n_channels == 4:
        np.multiply(pixels[..., 3], np.float32(1 / 255), out=rgba[..., 3])
    data = gpu.types.Buffer("FLOAT", width * height * 4, rgba.ravel())
    return gpu.types.GPUTexture((width, height), format="RGBA16F", data=data)


def register() -> None:
    link.listeners.append(_take)
    link.steps.append(_step)
    if not bpy.app.background:
        for function, when in ((_prepare, "PRE_VIEW"), (_draw, "POST_VIEW")):
            _handles.append(bpy.types.SpaceView3D.draw_handler_add(function, (), "WINDOW", when))


def unregister() -> None:
    if _take in link.listeners:
        link.listeners.remove(_take)
    if _step in link.steps:
        link.steps.remove(_step)
    while _handles:
        bpy.types.SpaceView3D.draw_handler_remove(_handles.pop(), "WINDOW")
    clear()
    _last_keys.clear()
