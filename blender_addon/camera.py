"""Reference cameras in the scene: making, fitting, reading and activating them. The mathematics is in camera_math."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import bpy
import numpy as np
from mathutils import Matrix, Vector

from . import background, pictures, scene_tools
from . import camera_math as cm

CAMERA_NAME, PROXY_NAME = "ConRad Reference", "ConRad Proxy"
SENSOR_MM = 36.0
ALPHA_DEPTHS = (32, 64, 128)
"""Bits a pixel of pictures that have alpha; Blender gives all four channels, whatever the file has."""
known_outline: tuple[int, tuple[float, float, float, float] | None] | None = None
"""What `find_outline` has found, by the picture's session_uid, for the next `fit_to_picture`."""
OUTLINE_SIDE = 1024
"""Pixels along a picture's larger side that are looked at for its outline."""


class CannotUseCamera(Exception):
    """A camera that ConRad cannot work with; the message says why."""


def lens_of(camera: bpy.types.Camera) -> cm.Lens:
    """The projection of a Blender camera.

    Raises:
        CannotUseCamera: It is not a perspective camera.
    """
    if camera.type != "PERSP":
        raise CannotUseCamera(f"The camera is {camera.type.lower()}: set its type to Perspective")
    return cm.Lens(
        camera.lens, camera.sensor_width, camera.sensor_height, camera.sensor_fit, camera.shift_x, camera.shift_y
    )


def pose_of(item: bpy.types.Object) -> np.ndarray:
    """Camera-to-world, 4x4, without scale; up to date even where the scene was not evaluated since the last change."""
    is_free = item.parent is None and not item.constraints and item.animation_data is None
    return cm.rigid(np.array(item.matrix_basis if is_free else item.matrix_world))


def set_pose(item: bpy.types.Object, pose: np.ndarray) -> None:
    """Move an object to a pose, keeping its scale and its rotation mode."""
    matrix = Matrix(pose.tolist()) @ Matrix.Diagonal((*item.scale, 1.0))
    if item.parent is None:
        item.matrix_basis = matrix
    else:
        item.matrix_world = matrix


def target_of(item: bpy.types.Object) -> tuple[np.ndarray, float]:
    """Center and largest side of the object that a reference camera looks at, from its proxy.

    Raises:
        CannotUseCamera: The proxy is gone.
    """
    proxy = item.conrad.proxy
    if proxy is None:
        raise CannotUseCamera("This camera has no proxy that says where the object is: press Use as Reference")
    is_free = proxy.parent is None and not proxy.constraints and proxy.animation_data is None
    matrix = np.array(proxy.matrix_basis if is_free else proxy.matrix_world)
    return matrix[:3, 3].astype(np.float64), float(np.linalg.norm(matrix[:3, :3], axis=0).max())


def _target_or_guess(item: bpy.types.Object) -> np.ndarray:
    try:
        return target_of(item)[0]
    except CannotUseCamera:
        pose = pose_of(item)
        return pose[:3, 3] - 3 * pose[:3, 2]


def orbit_value(item: bpy.types.Object, name: str) -> float:
    """What an orbit slider shows."""
    if item.type != "CAMERA":
        return 0.0
    if name == "perspective":
        return item.data.lens
    return getattr(cm.orbit_of(pose_of(item), _target_or_guess(item)), name)


def set_orbit_value(item: bpy.types.Object, name: str, value: float) -> None:
    """What moving an orbit slider does."""
    if item.type != "CAMERA":
        return
    target, pose = _target_or_guess(item), pose_of(item)
    orbit = cm.orbit_of(pose, target)
    if name == "perspective":
        factor = max(value, 1.0) / item.data.lens
        item.data.lens = max(value, 1.0)
        orbit = replace(orbit, distance=orbit.distance * factor)
    else:
        orbit = replace(orbit, **{name: value})
    set_pose(item, cm.moved_on_orbit(pose, target, orbit))


def job_setup(item: bpy.types.Object, image: bpy.types.Image) -> dict:
    """The camera of a job, from a reference camera and its picture.

    Raises:
        CannotUseCamera: The camera cannot be a reference, or has no proxy.
    """
    return setup_of(item, *picture_size(image))


def setup_of(item: bpy.types.Object, width: int, height: int) -> dict:
    """The same for a picture of this size, in pixels. Raises what `job_setup` raises."""
    lens = lens_of(item.data)
    center, size = target_of(item)
    pose = pose_of(item)
    depth = float((pose[:3, 3] - center) @ pose[:3, 2])
    if depth <= 0:
        raise CannotUseCamera("The proxy lies behind the camera: turn the camera or move the proxy")
    return cm.setup_json(pose, cm.intrinsics(lens, width, height), width, height, center, size)


def imagined_setup(settings: bpy.types.PropertyGroup, image: bpy.types.Image, location: Vector) -> dict:
    """The camera of a job without a reference camera, from elevation and angle of view."""
    width, height = picture_size(image)
    center = np.array(location, np.float64) + [0, 0, settings.size / 2]
    lens = cm.intrinsics(cm.Lens(cm.focal_mm(math.degrees(settings.fov))), width, height)
    orbit = cm.Orbit(0.0, math.degrees(settings.elevation))
    pose = cm.fitted_pose(orbit, lens, center, settings.size, cm.central_box(width, height))
    return cm.setup_json(pose, lens, width, height, center, settings.size)


def picture_size(image: bpy.types.Image) -> tuple[int, int]:
    """Pixels of a picture.

    Raises:
        CannotUseCamera: Its file is missing or it has not been rendered yet.
    """
    width, height = pictures.size_of(image)
    if not (width and height):
        raise CannotUseCamera(f"The picture {image.name} has no pixels: its file is missing or it is not rendered yet")
    return width, height


# Making one


def make_proxy(size: float, center: Vector, scene: bpy.types.Scene) -> bpy.types.Object:
    """A wire box with a ground circle and an arrow to its front (-Y); one unit large, scaled to the object's size."""
    mesh = bpy.data.meshes.new(PROXY_NAME)
    mesh.from_pydata(*_proxy_wire(), [])
    proxy = bpy.data.objects.new(PROXY_NAME, mesh)
    proxy.conrad.is_proxy = True
    proxy.location, proxy.scale = center, (size, size, size)
    proxy.hide_render = True
    proxy.display_type = "WIRE"
    scene_tools.link(proxy, scene)
    return proxy


def _proxy_wire() -> tuple[list[tuple[float, float, float]], list[tuple[int, int]]]:
    vertices = [(x, y, z) for z in (-0.5, 0.5) for y in (-0.5, 0.5) for x in (-0.5, 0.5)]
    edges = [(a, b) for a in range(8) for b in range(a) if (a ^ b) in (1, 2, 4)]

    def add_path(points: list[tuple[float, float, float]]) -> None:
        first = len(vertices)
        vertices.extend(points)
        edges.extend((first + k, first + k + 1) for k in range(len(points) - 1))

    turn = [2 * math.pi * k / 32 for k in range(33)]
    add_path([(0.5 * math.sin(a), 0.5 * math.cos(a), -0.5) for a in turn])
    add_path([(0.5 * math.sin(a), 0.0, 0.5 * math.cos(a)) for a in turn])
    add_path([(0.0, 0.5 * math.sin(a), 0.5 * math.cos(a)) for a in turn])
    add_path([(0.0, -0.5, -0.5), (0.0, -0.85, -0.5)])
    add_path([(-0.08, -0.73, -0.5), (0.0, -0.85, -0.5), (0.08, -0.73, -0.5)])
    return vertices, edges


def set_background(item: bpy.types.Object, image: bpy.types.Image) -> None:
    """Show the picture in the camera's view; pictures the user put there stay."""
    camera = item.data
    background = background_of(item)
    if background is None:
        background = camera.background_images.new()
        background.alpha, background.display_depth = 0.5, "BACK"
        background.frame_method = "FIT"
    background.image = image
    camera.show_background_images = True
    item.conrad.image = image


def background_of(item: bpy.types.Object) -> bpy.types.CameraBackgroundImage | None:
    """The background picture of a reference camera."""
    if item.type != "CAMERA" or item.conrad.image is None:
        return None
    return next((b for b in item.data.background_images if b.image == item.conrad.image), None)


def place_of(settings: bpy.types.PropertyGroup, scene: bpy.types.Scene) -> Vector:
    """Where a new object stands."""
    return scene.cursor.location.copy() if settings.place == "CURSOR" else Vector((0.0, 0.0, 0.0))


def add_reference(
    scene: bpy.types.Scene, pose: np.ndarray | None = None, fov_deg: float | None = None
) -> bpy.types.Object:
    """A new reference camera for the scene's picture with its proxy, fitted to the picture's outline.

    Args:
        pose: Where it stands; by the settings' elevation when None.
        fov_deg: Angle of view of the picture's larger side; the settings' one when None.
    """
    settings = scene.conrad
    image = settings.image
    width, height = picture_size(image)
    data = bpy.data.cameras.new(CAMERA_NAME)
    data.sensor_fit, data.sensor_width = "AUTO", SENSOR_MM
    data.lens = cm.focal_mm(fov_deg if fov_deg is not None else math.degrees(settings.fov), SENSOR_MM)
    item = bpy.data.objects.new(CAMERA_NAME, data)
    scene_tools.link(item, scene)
    item.conrad.is_reference, item.conrad.is_own = True, True
    center = place_of(settings, scene) + Vector((0, 0, settings.size / 2))
    item.conrad.proxy = make_proxy(settings.size, center, scene)
    set_background(item, image)
    if pose is None:
        set_pose(item, cm.orbit_pose(np.array(center), cm.Orbit(0.0, math.degrees(settings.elevation), 1.0)))
        fit_to_box(item, image, None)
        fit_to_picture(item, image)
    else:
        set_pose(item, pose)
    data.display_size = max(settings.size * 0.4, 0.01)
    data.clip_start = min(data.clip_start, cm.orbit_of(pose_of(item), np.array(center)).distance / 100)
    data.clip_end = max(data.clip_end, 20 * settings.size)
    settings.camera = item
    return item


def use_existing(item: bpy.types.Object, scene: bpy.types.Scene) -> None:
    """Make any perspective camera a reference camera; it is not moved.

    Raises:
        CannotUseCamera: It is not a perspective camera.
    """
    settings = scene.conrad
    lens_of(item.data)
    item.conrad.is_reference = True
    set_background(item, settings.image)
    if item.conrad.proxy is None:
        pose = pose_of(item)
        place = np.array(place_of(settings, scene)) + [0, 0, settings.size / 2]
        width, height = picture_size(settings.image)
        uv, depth = cm.project(place[None], pose, cm.intrinsics(lens_of(item.data), width, height))
        if depth[0] <= 0 or not (0 < uv[0, 0] < width and 0 < uv[0, 1] < height):
            place = pose[:3, 3] - 3 * settings.size * pose[:3, 2]
        item.conrad.proxy = make_proxy(settings.size, Vector(place), scene)


def fov_deg(item: bpy.types.Object, image: bpy.types.Image) -> float:
    """Full angle of view over the picture's larger side.

    Raises:
        CannotUseCamera: It is not a perspective camera, or the picture has no pixels.
    """
    width, height = picture_size(image)
    focal_px = cm.intrinsics(lens_of(item.data), width, height)[0]
    return math.degrees(2 * math.atan(max(width, height) / 2 / focal_px))


def fit_to_picture(item: bpy.types.Object, image: bpy.types.Image) -> None:
    """Move and turn the camera, at the same orbit angles, until the proxy covers the object in the picture.

    The outline of a large picture takes some time, during which Blender stands still, unless `find_outline` has found it.

    Raises:
        CannotUseCamera: It has no proxy or is not a perspective camera.
    """
    global known_outline
    known, known_outline = known_outline, None
    fit_to_box(item, image, known[1] if known is not None and known[0] == image.session_uid else outline_box(image))


def find_outline(image: bpy.types.Image) -> background.Steps:
    """Find the outline of a large picture for a camera that is about to be fitted to it.

    Raises:
        NoPicture: It has no pixels, or was removed meanwhile.
    """
    global known_outline
    uid, known_outline = image.session_uid, None
    yield from pictures.until_decoded(image)
    image = pictures.found(uid)
    if has_alpha(image) and pictures.is_large(image):
        known_outline = uid, (yield from _outline(image))


def fit_to_box(item: bpy.types.Object, image: bpy.types.Image, box: tuple[float, float, float, float] | None) -> None:
    """The same for a known box of the object in the picture, pixels; None takes the middle of the picture."""
    width, height = picture_size(image)
    center, size = target_of(item)
    lens = cm.intrinsics(lens_of(item.data), width, height)
    box = box or cm.central_box(width, height)
    set_pose(item, cm.fitted_pose(cm.orbit_of(pose_of(item), center), lens, center, size, box))


def why_pause(image: bpy.types.Image) -> str:
    """What to tell the user when Blender stood still while the outline of a picture was looked for, or nothing."""
    is_rendered = image.type in ("RENDER_RESULT", "COMPOSITING")
    width, height = pictures.size_of(image)
    if is_rendered or width * height <= pictures.QUIET_PIXELS or not has_alpha(image):
        return ""
    return f"Blender stopped for a moment to find the outline of {image.name} ({width} x {height} pixels)"


def has_alpha(image: bpy.types.Image) -> bool:
    """Whether the picture's alpha may say where the object is."""
    head = pictures.unread_head(image)
    return image.depth in ALPHA_DEPTHS if head is None else head.has_alpha


def outline_box(image: bpy.types.Image) -> tuple[float, float, float, float] | None:
    """The box of the object in the picture by its alpha, pixels, or None when alpha says nothing."""
    try:
        return background.finish(_outline(image)) if has_alpha(image) else None
    except pictures.NoPicture:
        return None


def _outline(image: bpy.types.Image) -> background.Steps:
    values = yield from pictures.values_of(image)
    return (yield partial(_box_of_alpha, values))


def _box_of_alpha(values: np.ndarray) -> tuple[float, float, float, float] | None:
    # Every pixel of a large picture would take time and tell no more.
    step = max(1, max(values.shape[:2]) // OUTLINE_SIDE)
    box = cm.box_of_mask(values[::-1, :, 3][::step, ::step] > 0.5) if values.shape[2] == 4 else None
    return None if box is None else tuple(step * edge for edge in box)


# Looking through it


def activate(item: bpy.types.Object, scene: bpy.types.Scene) -> str:
    """Make it the scene's camera with the picture's proportions, remembering what was there.

    Returns:
        What was changed, for the user, or nothing.
    """
    settings, render = scene.conrad, scene.render
    if settings.aspect_camera is None:
        settings.previous_camera = scene.camera
        settings.previous_x, settings.previous_y = render.resolution_x, render.resolution_y
    elif settings.aspect_camera != item:
        render.resolution_x, render.resolution_y = settings.previous_x, settings.previous_y
    settings.aspect_camera = item
    scene.camera = item
    image = item.conrad.image
    if image is None:
        return ""
    width, height = picture_size(image)
    if abs(render.resolution_x * height - render.resolution_y * width) <= max(width, height):
        return ""
    largest = max(settings.previous_x, settings.previous_y) if max(width, height) > 8192 else max(width, height)
    scale = largest / max(width, height)
    render.resolution_x, render.resolution_y = max(round(width * scale), 4), max(round(height * scale), 4)
    return (
        f"Render size is {render.resolution_x} x {render.resolution_y} while this camera is active "
        f"(before: {settings.previous_x} x {settings.previous_y})"
    )


def is_aspect_stale(scene: bpy.types.Scene) -> bool:
    """The render size still is the picture's, but another camera has become active."""
    settings = scene.conrad
    return settings.previous_x > 0 and (settings.aspect_camera is None or scene.camera != settings.aspect_camera)


def restore_aspect(scene: bpy.types.Scene, with_camera: bool) -> None:
    """Give the render size back, and the camera from before if asked to."""
    settings = scene.conrad
    if settings.previous_x:
        scene.render.resolution_x, scene.render.resolution_y = settings.previous_x, settings.previous_y
        if with_camera and settings.previous_camera is not None:
            scene.camera = settings.previous_camera
    settings.aspect_camera = settings.previous_camera = None
    settings.previous_x = settings.previous_y = 0


def picture_changed(settings: bpy.types.PropertyGroup) -> None:
    """The scene's picture was chosen anew: the reference camera shows it."""
    item, image = settings.camera, settings.image
    if item is not None and image is not None and item.conrad.is_reference and item.conrad.image != image:
        background = background_of(item)
        if background is not None:
            background.image = image
        item.conrad.image = image


def camera_changed(settings: bpy.types.PropertyGroup) -> None:
    """Another reference camera was chosen: its picture is the scene's picture."""
    item = settings.camera
    if item is not None and item.conrad.image is not None and item.conrad.image != settings.image:
        settings.image = item.conrad.image


def move_along(item: bpy.types.Object, mapping: cm.Placement) -> None:
    """Move an own reference camera and its proxy with a result, so that it still covers the picture."""
    proxy = item.conrad.proxy
    set_pose(item, mapping.pose(pose_of(item)))
    if proxy is not None and proxy.parent is None:
        proxy.location = mapping.points(np.array(proxy.location))
        proxy.scale = [mapping.scale * s for s in proxy.scale]


def from_setup(setup: dict, image: bpy.types.Image | None, scene: bpy.types.Scene) -> bpy.types.Object:
    """A reference camera from the set-up of a job (`camera_math.setup_json`)."""
    width, height = setup["width"], setup["height"]
    fx, _, cx, cy = setup["intrinsics"]
    data = bpy.data.cameras.new(CAMERA_NAME)
    data.sensor_fit, data.sensor_width = "AUTO", SENSOR_MM
    data.lens = fx * SENSOR_MM / max(width, height)
    data.shift_x, data.shift_y = cm.shift_of((cx, cy), "AUTO", width, height)
    item = bpy.data.objects.new(CAMERA_NAME, data)
    scene_tools.link(item, scene)
    set_pose(item, np.array(setup["c2w"]))
    item.conrad.is_reference, item.conrad.is_own = True, True
    item.conrad.proxy = make_proxy(setup["object_size"], Vector(setup["object_center"]), scene)
    if image is not None:
        set_background(item, image)
    return item


def carry(item: bpy.types.Object, motion: np.ndarray) -> None:
    """Move a reference camera and its proxy by a world matrix; a scale in it moves the camera off by as much."""
    scale = float(np.cbrt(abs(np.linalg.det(motion[:3, :3]))))
    set_pose(item, cm.rigid(motion @ pose_of(item)))
    proxy = item.conrad.proxy
    if proxy is not None:
        proxy.location = (motion @ [*proxy.location, 1.0])[:3]
        proxy.scale = [scale * s for s in proxy.scale]
