"""Reference cameras in real bpy: projection against Blender's own, sliders, activation, other cameras, deletion."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from types import SimpleNamespace

import bpy
import numpy as np
from bpy_extras.object_utils import world_to_camera_view
from common import empty_scene, main, part
from mathutils import Euler, Vector

LARGEST_ERROR_PX = 0.01


def check_projection() -> None:
    """Every sensor fit, shift and proportion, at random poses."""
    camera, cm = part("camera"), part("camera_math")
    scene = bpy.context.scene
    random = np.random.default_rng(0)
    worst = 0.0
    fits = ("AUTO", "HORIZONTAL", "VERTICAL")
    sizes = ((640, 480), (480, 640), (512, 512), (1000, 301))
    shifts = ((0, 0), (0.2, -0.1), (-0.35, 0.4))
    for fit, (width, height), (shift_x, shift_y) in itertools.product(fits, sizes, shifts):
        data = bpy.data.cameras.new("test")
        item = bpy.data.objects.new("test", data)
        scene.collection.objects.link(item)
        data.sensor_fit, data.shift_x, data.shift_y = fit, shift_x, shift_y
        data.lens, data.sensor_width, data.sensor_height = random.uniform(18, 120), 30.0, 17.0
        item.location = random.uniform(-3, 3, 3)
        item.rotation_euler = Euler(random.uniform(-3, 3, 3))
        item.scale = (1.7, 1.7, 1.7) if fit == "AUTO" else (1, 1, 1)
        scene.render.resolution_x, scene.render.resolution_y = width, height
        bpy.context.view_layer.update()
        pose = camera.pose_of(item)
        local = random.uniform(-1, 1, (20, 3)) * [1, 1, 0.3] + [0, 0, -4]
        points = local @ pose[:3, :3].T + pose[:3, 3]
        lens = cm.intrinsics(camera.lens_of(data), width, height)
        ours, _ = cm.project(points, pose, lens)
        for point, found in zip(points, ours):
            u, v, _ = world_to_camera_view(scene, item, Vector(point))
            worst = max(worst, abs(u * width - found[0]), abs((1 - v) * height - found[1]))
        bpy.data.objects.remove(item)
    print(f"projection: largest error {worst:.5f} px")
    assert worst <= LARGEST_ERROR_PX, worst


def new_picture(width: int, height: int, box: tuple[int, int, int, int] | None = None) -> bpy.types.Image:
    image = bpy.data.images.new("picture", width, height, alpha=True)
    if box:
        pixels = np.zeros((height, width, 4), np.float32)
        left, top, right, bottom = box
        pixels[height - bottom : height - top, left:right] = 1
        image.pixels.foreach_set(pixels.ravel())
        image.update()
    return image


def check_adding() -> None:
    """A portrait picture with a known outline: the proxy covers it, render size is the picture's, undoable by hand."""
    camera, cm = part("camera"), part("camera_math")
    scene = empty_scene()
    scene.render.resolution_x, scene.render.resolution_y = 1920, 1080
    scene.unit_settings.scale_length = 0.01
    old = bpy.data.objects.new("Old", bpy.data.cameras.new("Old"))
    scene.collection.objects.link(old)
    scene.camera = old
    box = (40, 100, 200, 400)
    scene.conrad.image = new_picture(300, 500, box)
    scene.conrad.size = 0.5
    assert bpy.ops.conrad.add_camera() == {"FINISHED"}
    item = scene.conrad.camera
    assert (scene.render.resolution_x, scene.render.resolution_y) == (300, 500)
    assert scene.camera == item and math.isclose(scene.unit_settings.scale_length, 0.01, rel_tol=1e-5)
    setup = camera.job_setup(item, scene.conrad.image)
    lens = tuple(setup["intrinsics"])
    center = np.array(setup["object_center"])
    uv, depth = cm.project(center[None], np.array(setup["c2w"]), lens)
    assert np.allclose(uv[0], [120, 250], atol=0.01), uv
    assert math.isclose(lens[0] * setup["object_size"] / depth[0], 300, rel_tol=1e-4)
    bpy.context.view_layer.update()
    seen = world_to_camera_view(scene, item, Vector(center))
    assert abs(seen.x * 300 - 120) < 0.01 and abs((1 - seen.y) * 500 - 250) < 0.01
    background = item.data.background_images[0]
    assert background.image == scene.conrad.image and background.frame_method == "FIT"
    assert item.data.show_background_images and item.conrad.proxy.hide_render
    bpy.ops.conrad.leave_camera()
    assert (scene.render.resolution_x, scene.render.resolution_y) == (1920, 1080) and scene.camera == old


def check_outline() -> None:
    """Of a large picture every few pixels are looked at; one without alpha says nothing."""
    camera = part("camera")
    large = new_picture(4000, 3000, (400, 1000, 2000, 2600))
    assert np.allclose(camera.outline_box(large), (400, 1000, 2000, 2600), atol=4), camera.outline_box(large)
    flat = bpy.data.images.new("flat", 64, 64, alpha=False)
    flat.filepath_raw, flat.file_format = bpy.app.tempdir + "flat.jpg", "JPEG"
    flat.save()
    photo = bpy.data.images.load(flat.filepath_raw)
    assert camera.picture_size(photo) == (64, 64) and camera.outline_box(photo) is None
    for image in (large, flat, photo):
        bpy.data.images.remove(image)


def check_pause() -> None:
    """Only a very large picture that no file has is worth a word, and a render result earlier."""
    pictures = part("pictures")
    image = bpy.data.images.new("huge", 3073, 3072)
    assert "Blender stops for a moment to read huge" in pictures.why_pause(None, image)
    image.scale(3072, 3072)
    assert not pictures.why_pause(image, None)
    bpy.data.images.remove(image)
    camera = part("camera")
    for height, word in ((3072, ""), (3073, "outline of large (3072 x 3073 pixels)")):
        image = new_picture(3072, height)
        image.name = "large"
        assert word in camera.why_pause(image) and bool(word) == bool(camera.why_pause(image))
        bpy.data.images.remove(image)
    image = bpy.data.images.new("flat", 3072, 3073, alpha=False)
    image.filepath_raw, image.file_format = bpy.app.tempdir + "flat.jpg", "JPEG"
    image.save()
    photo = bpy.data.images.load(image.filepath_raw, check_existing=False)
    assert not camera.why_pause(photo) and not photo.has_data, "without alpha there is no outline to look for"
    bpy.data.images.remove(image)
    bpy.data.images.remove(photo)
    stand_in = SimpleNamespace(type="RENDER_RESULT", source="VIEWER", name="Render Result", has_data=True, size=(0, 0))
    render = bpy.context.scene.render
    before = render.resolution_x, render.resolution_y
    for size, word in (((2560, 1600), ""), ((2560, 1601), "read Render Result")):
        render.resolution_x, render.resolution_y = size
        assert word in pictures.why_pause(stand_in) and bool(word) == bool(pictures.why_pause(stand_in))
        assert pictures.is_large(stand_in) and pictures.size_of(stand_in) == size
    render.resolution_x, render.resolution_y = before
    photo = SimpleNamespace(type="IMAGE", source="FILE", is_dirty=False, packed_file=None, name="photo")
    assert not pictures.why_pause(photo), "of a file nothing is looked at: its size could have it decoded"
    photo.packed_file = SimpleNamespace(size=pictures.QUIET_PACKED_BYTES)
    assert not pictures.why_pause(photo)
    photo.packed_file.size += 1
    assert "read photo" in pictures.why_pause(photo)


def check_loading() -> None:
    """A picture of a kind whose size only Blender reads is taken without decoding it; what is no picture is not."""
    scene, folder = empty_scene(), Path(bpy.app.tempdir)
    image = new_picture(64, 48)
    image.filepath_raw, image.file_format = str(folder / "deep.exr"), "OPEN_EXR"
    image.save()
    bpy.data.images.remove(image)
    (folder / "no.exr").write_bytes(b"no picture")
    assert bpy.ops.conrad.drop_picture(filepath=str(folder / "deep.exr")) == {"FINISHED"}
    assert not scene.conrad.image.has_data and part("pictures").size_of(scene.conrad.image) == (64, 48)
    try:
        bpy.ops.conrad.drop_picture(filepath=str(folder / "no.exr"))
    except RuntimeError as error:
        assert "it is no picture" in str(error)
    else:
        raise AssertionError("a file that is no picture was taken")


def check_outline_first() -> None:
    """What a button does before its operator: of a large picture the outline is found while Blender goes on, and used once."""
    camera, background, pictures = part("camera"), part("background"), part("pictures")
    scene = empty_scene()
    image = scene.conrad.image = new_picture(1800, 1500, (300, 200, 1000, 1300))
    bpy.ops.conrad.add_camera()
    item = scene.conrad.camera
    fitted = camera.pose_of(item)

    def prepare() -> list[bool]:
        is_done = []
        background.start(pictures._noted(camera.find_outline(image), is_done))
        return is_done

    def wait() -> None:
        while background.go_on():
            time.sleep(0.01)

    is_done = prepare()
    assert not is_done
    wait()
    assert is_done and np.allclose(camera.known_outline[1], (300, 200, 1000, 1300), atol=2)
    outline_box, camera.outline_box = camera.outline_box, None
    try:
        camera.fit_to_box(item, image, None)
        assert bpy.ops.conrad.fit_camera() == {"FINISHED"}
    finally:
        camera.outline_box = outline_box
    assert np.allclose(camera.pose_of(item), fitted, atol=1e-6) and camera.known_outline is None
    small = scene.conrad.image = new_picture(64, 48)
    assert background.finish(camera.find_outline(small)) is None and camera.known_outline is None
    is_done = prepare()
    bpy.data.images.remove(image)
    wait()
    assert is_done and camera.known_outline is None, "a picture that was removed ends it too"


def check_sliders() -> None:
    scene = bpy.context.scene
    own = scene.conrad.camera.conrad
    for name, value in (("azimuth", 0.7), ("elevation", 0.6), ("roll", -0.12), ("distance", 3.5)):
        setattr(own, name, value)
    for name, value in (("azimuth", 0.7), ("elevation", 0.6), ("roll", -0.12), ("distance", 3.5)):
        assert math.isclose(getattr(own, name), value, abs_tol=1e-3), (name, getattr(own, name))
    lens, distance = scene.conrad.camera.data.lens, own.distance
    own.perspective = lens * 2
    assert math.isclose(own.distance, distance * 2, rel_tol=1e-4)
    own.opacity, own.in_front = 0.25, True
    background = scene.conrad.camera.data.background_images[0]
    assert math.isclose(background.alpha, 0.25) and background.display_depth == "FRONT"


def check_other_cameras() -> None:
    """A second camera with its own picture, an existing one as reference, an orthographic one refused."""
    camera = part("camera")
    scene = bpy.context.scene
    first, picture = scene.conrad.camera, scene.conrad.image
    scene.conrad.camera = None
    scene.conrad.image = new_picture(640, 480)
    bpy.ops.conrad.add_camera()
    second = scene.conrad.camera
    assert second != first and (scene.render.resolution_x, scene.render.resolution_y) == (640, 480)
    scene.conrad.camera = first
    assert scene.conrad.image == picture, "choosing a camera chooses its picture"
    bpy.ops.conrad.look_through()
    assert (scene.render.resolution_x, scene.render.resolution_y) == (300, 500)
    bpy.ops.conrad.leave_camera()
    assert (scene.render.resolution_x, scene.render.resolution_y) == (1920, 1080)
    bpy.ops.conrad.look_through()
    existing = bpy.data.objects["Old"]
    scene.camera = existing
    assert camera.is_aspect_stale(scene), "another camera is active, so the size is its own again"
    part("handlers")._give_back()
    assert (scene.render.resolution_x, scene.render.resolution_y) == (1920, 1080) and scene.camera == existing
    existing.location, existing.rotation_euler = (0, -5, 1), (math.radians(85), 0, 0)
    scene.conrad.camera = existing
    matrix = existing.matrix_basis.copy()
    bpy.ops.conrad.use_camera()
    assert existing.matrix_basis == matrix and existing.conrad.proxy is not None and not existing.conrad.is_own
    assert camera.job_setup(existing, scene.conrad.image)["width"] == scene.conrad.image.size[0]
    existing.data.type = "ORTHO"
    try:
        camera.job_setup(existing, scene.conrad.image)
    except camera.CannotUseCamera as error:
        assert "Perspective" in str(error)
    else:
        raise AssertionError("an orthographic camera was taken")
    existing.data.type = "PERSP"


def check_deletion() -> None:
    """Camera, proxy and picture may vanish at any moment."""
    requests = part("requests")
    scene = bpy.context.scene
    bpy.data.objects.remove(scene.conrad.camera.conrad.proxy)
    assert "proxy" in requests.why_not(bpy.context)
    assert scene.conrad.camera.conrad.azimuth is not None
    bpy.data.objects.remove(scene.conrad.camera)
    assert scene.conrad.camera is None
    bpy.data.images.remove(scene.conrad.image)
    assert requests.why_not(bpy.context).startswith("Choose a picture first")
    camera = part("camera")
    if camera.is_aspect_stale(scene):
        camera.restore_aspect(scene, with_camera=False)


def run() -> None:
    check_projection()
    check_pause()
    check_loading()
    check_outline_first()
    check_adding()
    check_outline()
    check_sliders()
    check_other_cameras()
    check_deletion()


main(run)
