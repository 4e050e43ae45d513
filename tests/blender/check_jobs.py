"""Jobs from inside Blender against a real engine process that the add-on starts itself, with the ball pipeline.

PYTHON_WITH_BPY check_jobs.py ZIP ENGINE_PYTHON DATA_FOLDER
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import bpy
import numpy as np
from common import empty_scene, main, part, preferences, pump_until

PIPELINE = "tests.blender.ball_pipeline"


def use_engine() -> None:
    preferences().engine_python, preferences().data_folder = sys.argv[2], sys.argv[3]
    preferences().engine_options = f"--pipeline {PIPELINE}"


def painted(name: str, width: int = 120, height: int = 90) -> bpy.types.Image:
    """A picture that exists in Blender only."""
    image = bpy.data.images.new(name, width, height, alpha=True)
    pixels = np.zeros((height, width, 4), np.float32)
    pixels[20:70, 30:90] = (0.8, 0.3, 0.1, 1.0)
    image.pixels.foreach_set(pixels.ravel())
    image.update()
    return image


def table():  # noqa: ANN201
    return part("link").session().table


def submit(name: str = "pot", **settings):  # noqa: ANN003, ANN201
    scene = bpy.context.scene
    scene.conrad.image = scene.conrad.image or painted(name)
    scene.conrad.image.name = name
    scene.conrad.preset = "draft"
    for key, value in settings.items():
        setattr(scene.conrad, key, value)
    before = set(table().jobs)
    assert bpy.ops.conrad.generate() == {"FINISHED"}
    [job_id] = set(table().jobs) - before
    return table().jobs[job_id]


def made_by(job) -> list[bpy.types.Object]:  # noqa: ANN001
    return [item for item in bpy.data.objects if item.get("conrad_job") == job.id]


def check_generate() -> None:
    """From a painted picture to an object under it, through a camera; the engine is started on demand."""
    session = part("link").session()
    assert session.state_line() == "Stopped"
    bpy.context.scene.conrad.image = painted("pot")
    bpy.ops.conrad.add_camera()
    job = submit(seed=7, n_faces=2000)
    pump_until(lambda: session.is_connected)
    pump_until(lambda: job.progress is not None and job.progress.step > 3)
    assert "Optimizing" in job.status() and session.state.value == "Busy"
    protocol = part("protocol")
    session.tell(protocol.SetPreview(job.id, True, 5, width=64, height=48))
    pump_until(lambda: job.preview is not None and job.preview.serial == 5)
    assert job.preview.rgb.shape[:2] == (48, 64)
    pump_until(lambda: made_by(job))
    [item] = made_by(job)
    assert item["conrad_seed"] == 7 and json.loads(item["conrad_config"])["seed"] == 7
    assert item.data.materials[0].node_tree.nodes.active.image.packed_file is not None
    # The ball stands where the proxy is, so it covers the picture through the camera.
    proxy = bpy.context.scene.conrad.camera.conrad.proxy
    bpy.context.view_layer.update()
    points = np.array([item.matrix_world @ v.co for v in item.data.vertices])
    assert np.allclose((points.max(0) + points.min(0)) / 2, proxy.location, atol=1e-3)
    assert math.isclose(max(item.dimensions), proxy.scale.x, rel_tol=1e-3)
    assert not job.is_waiting


def check_without_camera() -> None:
    scene = bpy.context.scene
    scene.conrad.camera = None
    scene.cursor.location = (4, 0, 1)
    unsent, name = part("link").session()._unsent, "picture.is_elevation_known"
    job = submit("cup", place="CURSOR", size=0.25)
    assert unsent[job.id].overrides[name] is False, "nobody has said how high the camera stands"
    other = submit("cup", elevation=0.3)
    assert name not in unsent[other.id].overrides
    bpy.ops.conrad.cancel(job=other.id)
    assert other.id not in table().jobs, "it was cancelled before the engine has said anything"
    pump_until(lambda: other.id in table().jobs and table().jobs[other.id].state_name == "cancelled")
    pump_until(lambda: made_by(job))
    [item] = made_by(job)
    bpy.context.view_layer.update()
    assert np.allclose(item.location, (4, 0, 1)) and math.isclose(max(item.dimensions), 0.25, rel_tol=1e-3)
    scene.conrad.place = "CAMERA"


def check_guess() -> None:
    """Guess Elevation: returns at once, then the camera or the setting moves; an unsure answer moves nothing."""
    scene, operators = bpy.context.scene, part("operators_camera")

    def guessed() -> str:
        assert bpy.ops.conrad.estimate_elevation() == {"FINISHED"}
        assert operators.question is not None and not bpy.ops.conrad.estimate_elevation.poll()
        pump_until(lambda: operators.question is None)
        return operators.guess_note

    scene.conrad.image, scene.conrad.camera, scene.conrad.is_elevation_guess = painted("pan"), None, True
    assert guessed() == "Elevation guessed: 33° ± 4°" and not scene.conrad.is_elevation_guess
    assert math.isclose(scene.conrad.elevation, math.radians(33), rel_tol=1e-5)
    scene.conrad.elevation = 0.0
    bpy.ops.conrad.add_camera()
    item = scene.conrad.camera
    guessed()
    assert math.isclose(item.conrad.elevation, math.radians(33), abs_tol=1e-3) and scene.conrad.elevation == 0
    item.conrad.elevation = 0.1
    scene.conrad.use_mask, scene.conrad.mask = True, painted("mask")
    assert "does not say it (33° ± 20°)" in guessed() and math.isclose(item.conrad.elevation, 0.1, abs_tol=1e-3)
    scene.conrad.use_mask = False
    bpy.ops.conrad.estimate_elevation()
    scene.conrad.image = painted("other")
    pump_until(lambda: operators.question is None)
    assert "changed meanwhile" in operators.guess_note and math.isclose(item.conrad.elevation, 0.1, abs_tol=1e-3)
    scene.conrad.is_elevation_guess, scene.conrad.camera = False, None


def check_steering() -> None:
    """Pause, resume, stop and keep, continue, extract again, cancel, forget."""
    job = submit("slow one")
    pump_until(lambda: job.progress is not None and job.progress.step > 3)
    bpy.ops.conrad.pause(job=job.id)
    pump_until(lambda: job.state_name == "paused")
    bpy.ops.conrad.resume(job=job.id)
    pump_until(lambda: job.state_name == "running")
    bpy.ops.conrad.keep(job=job.id)
    pump_until(lambda: made_by(job))
    assert job.state.metrics["steps"] < 60
    bpy.context.scene.conrad.extra_steps, bpy.context.scene.conrad.n_faces = 10, 500
    bpy.ops.conrad.continue_job(job=job.id)
    pump_until(lambda: job.result_number == 2 and len(made_by(job)) == 2, 30)
    bpy.ops.conrad.extract(job=job.id)
    pump_until(lambda: len(made_by(job)) == 3)
    sizes = sorted(len(item.data.polygons) for item in made_by(job))
    assert sizes[0] < 700 < sizes[-1], sizes
    bpy.ops.conrad.import_result(job=job.id)
    pump_until(lambda: len(made_by(job)) == 4)
    bpy.ops.conrad.forget("EXEC_DEFAULT", job=job.id)
    pump_until(lambda: job.id not in table().jobs)
    job = submit("slow two")
    pump_until(lambda: job.progress is not None)
    bpy.ops.conrad.cancel(job=job.id)
    pump_until(lambda: job.state_name == "cancelled")
    assert not made_by(job)


def check_failure_and_queue() -> None:
    bad, good = submit("bad picture"), submit("good picture")
    pump_until(lambda: bad.state_name == "failed" and made_by(good))
    assert "shows no object" in bad.status()


def check_too_much() -> None:
    """What the protocol does not take is said in words, and leaves no job that is being sent for ever."""
    scene, session, before = bpy.context.scene, part("link").session(), set(table().jobs)
    image, scene.conrad.extra = scene.conrad.image, "a=" + 9000 * "b"
    try:
        bpy.ops.conrad.generate()
        raise AssertionError("no error is reported")
    except RuntimeError as error:
        assert "submit.overrides cannot be sent" in str(error) and "Traceback" not in str(error), error
    scene.conrad.image = painted("large pot", 1200, 900)
    bpy.ops.conrad.generate()
    pump_until(lambda: set(table().jobs) == before)
    assert session.problem.startswith("large pot: submit.overrides cannot be sent"), session.problem
    assert len(bpy.context.window_manager.conrad.jobs) == len(before)
    session.problem, scene.conrad.extra, scene.conrad.image = "", "", image


def check_failing_listener() -> None:
    """Whatever goes wrong with thumbnails and overlay, the result comes in."""

    def fail(events: object) -> None:
        raise OSError("no space left on device")

    link = part("link")
    link.listeners.insert(0, fail)
    try:
        job, end = submit("full disk"), time.monotonic() + 60
        while not made_by(job):
            link.pump()
            time.sleep(0.02)
            assert time.monotonic() < end, f"the result does not come in: {link.last_error}"
        assert "no space left" in link.last_error
    finally:
        link.listeners.remove(fail)
        link.last_error = ""


def check_triangles() -> None:
    """Faces of any number of corners become triangles; those that are triangles already are taken as they lie."""
    triangles_of = part("pictures")._triangles_of
    mesh = bpy.data.meshes.new("mixed")
    points = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (2, 0, 1)]
    for faces, n_triangles in (([(0, 1, 2, 3), (1, 4, 2)], 3), ([(0, 1, 2), (0, 2, 3), (1, 4, 2)], 3)):
        mesh.clear_geometry()
        mesh.from_pydata(points, [], faces)
        found = triangles_of(mesh)
        mesh.calc_loop_triangles()
        assert found.shape == (n_triangles, 3)
        assert found.tolist() == [list(triangle.vertices) for triangle in mesh.loop_triangles]
    bpy.data.meshes.remove(mesh)


def check_start_mesh() -> None:
    scene = bpy.context.scene
    bpy.ops.mesh.primitive_monkey_add(location=(0, 0, 0.5))
    monkey = bpy.context.active_object
    scene.conrad.camera = next(i for i in bpy.data.objects if i.conrad.is_reference)
    job = submit("from mesh", use_start=True, start=monkey)
    pump_until(lambda: made_by(job))
    assert json.loads(made_by(job)[0]["conrad_config"])["init"] is True
    scene.conrad.use_start = False


def check_waiting_in_another_file(folder: Path) -> None:
    """A result that arrives while another file is open waits, and comes in when its file is opened again."""
    bpy.ops.wm.save_as_mainfile(filepath=str(folder / "first.blend"))
    job = submit("slow three")
    bpy.ops.wm.save_mainfile()
    pump_until(lambda: job.progress is not None)
    bpy.ops.wm.read_homefile(use_empty=True)
    pump_until(lambda: job.state_name == "done", 30)
    part("link").pump()
    assert job.is_waiting and not made_by(job) and not job.wants_import
    assert len(bpy.context.window_manager.conrad.jobs) == len(table().jobs)
    bpy.ops.wm.open_mainfile(filepath=str(folder / "first.blend"))
    bpy.ops.conrad.import_result(job=job.id)
    pump_until(lambda: made_by(job))


def check_file_after_undo(folder: Path) -> None:
    """A file is known again although undo went back behind the moment at which a job was started in it."""
    bpy.ops.ed.undo_push(message="before")
    bpy.context.scene.conrad.file_id = ""
    bpy.ops.ed.undo_push(message="nameless")
    bpy.context.scene.conrad.seed += 1
    bpy.ops.ed.undo_push(message="seed")
    job = submit("undone")
    token = bpy.context.scene.conrad.file_id
    bpy.ops.ed.undo()
    assert token and not bpy.context.scene.conrad.file_id
    bpy.ops.wm.save_as_mainfile(filepath=str(folder / "undone.blend"))
    bpy.ops.wm.read_homefile(use_empty=True)
    bpy.ops.wm.open_mainfile(filepath=str(folder / "undone.blend"))
    assert part("link").file_token == token == job.notes.file_token
    pump_until(lambda: made_by(job))


def check_pictures_of_all_kinds(folder: Path) -> None:
    """Files go as they are; painted, float, turned and rendered pictures go as they look."""
    pictures, finish = part("pictures"), part("background").finish
    scene = bpy.context.scene
    image = painted("saved", 40, 30)
    image.filepath_raw, image.file_format = str(folder / "saved.png"), "PNG"
    image.save()
    loaded = bpy.data.images.load(str(folder / "saved.png"))
    assert pictures.size_of(loaded) == (40, 30)
    assert finish(pictures.picture_fields(loaded, scene))["picture"] == (folder / "saved.png").read_bytes()
    assert not loaded.has_data, "Blender does not wait for its decoding"
    loaded.pack()
    (folder / "saved.png").unlink()
    assert finish(pictures.picture_fields(loaded, scene))["picture"].startswith(b"\x89PNG")
    again = bpy.data.images[loaded.name]
    again.buffers_free()
    assert not again.has_data and pictures.size_of(again) == (40, 30) and not again.has_data
    assert (again.session_uid, again.packed_file.size) in pictures._packed_heads
    loaded.pixels[0] = 0.5
    array = finish(pictures.picture_fields(loaded, scene))["pixels"]
    assert array.shape == (30, 40, 4) and array.dtype == "u1"
    pixels = np.frombuffer(array.data, np.uint8).reshape(array.shape)
    assert pixels[-1, 0, 0] == 128, "row 0 is on top"
    deep = bpy.data.images.new("float", 2, 2, float_buffer=True)
    deep.pixels.foreach_set(np.tile(np.float32([0.21404, 0, 0, 1]), 4))
    assert abs(int(finish(pictures.pixels_of(deep))[0, 0, 0]) - 128) <= 1, "linear becomes sRGB"
    missing = bpy.data.images.load(str(folder / "first.blend"))
    try:
        finish(pictures.picture_fields(missing, scene))
    except pictures.NoPicture as error:
        assert "has no pixels" in str(error)
    else:
        raise AssertionError("a file that is no picture was sent")
    turned = b"\xff\xd8\xff\xe1\x00\x20Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    image.filepath_raw, image.file_format = str(folder / "photo.jpg"), "JPEG"
    image.save()
    photo = (folder / "photo.jpg").read_bytes()
    assert pictures.upright_size(photo) == (40, 30)
    assert pictures.upright_size(photo[:2] + turned[2:] + b"\0\0" + photo[2:]) == (30, 40), "a phone held upright"
    assert pictures.upright_size(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x07\0\0\0\x05") == (7, 5)
    for file_format, name in (("PNG", "head.png"), ("WEBP", "head.webp")):
        image.filepath_raw, image.file_format = str(folder / name), file_format
        image.save()
        assert pictures.head_of((folder / name).read_bytes()) == pictures.Head(40, 30, has_alpha=True), name
    assert pictures.upright_size(b"RIFF") is None
    assert pictures.is_turned(turned) and not pictures.is_turned(turned.replace(b"\x06\0\0\0", b"\x01\0\0\0"))


def check_large_pictures() -> None:
    """Generate returns before a large picture was read; until it is sent the job can be cancelled, or fails in words."""
    session, scene = part("link").session(), bpy.context.scene

    def sending() -> Any:
        scene.conrad.image = painted("large", 1700, 1300)
        job = submit("large")
        assert job.state is None and job.is_active and job.id not in session._unsent
        return job

    sent = sending()
    pump_until(lambda: sent.state is not None)
    bpy.ops.conrad.cancel(job=sent.id)
    pump_until(lambda: not sent.is_active)
    bpy.ops.conrad.cancel(job=sending().id)
    pump_until(lambda: not part("background")._running)
    assert not session.problem
    sending()
    bpy.data.images.remove(scene.conrad.image)
    pump_until(lambda: not part("background")._running)
    assert "removed while" in session.problem
    assert not table().unsent() and [job.name for job in table().jobs.values()].count("large") == 1
    session.problem = ""


def check_render_result() -> None:
    """What was rendered last is a picture too, piece by piece the same as in one; nothing of the scene is changed."""
    camera, ours, scene = part("camera"), part("render_result"), bpy.context.scene
    scene.render.engine, scene.cycles.samples = "CYCLES", 1
    scene.render.resolution_x, scene.render.resolution_y, scene.render.resolution_percentage = 96, 62, 50
    scene.camera = next(item for item in bpy.data.objects if item.type == "CAMERA")
    scene.render.film_transparent = True
    bpy.data.objects[scene.camera.name].rotation_euler.rotate_axis("Z", 0.4)
    light_up(scene)
    bpy.ops.render.render()
    image = bpy.data.images["Render Result"]
    assert camera.picture_size(image) == (48, 31)
    settings, view = scene.render.image_settings, scene.view_settings
    if hasattr(settings, "media_type"):
        settings.media_type = "VIDEO"
    settings.file_format, settings.color_mode = "FFMPEG", "BW"
    # Blender adds noise to what it saves in one.
    scene.render.dither_intensity = 0
    ours.PIECE_PIXELS = 48 * 7
    for transform, exposure, gamma, curve in (
        ("AgX", 0.0, 1.0, False), ("AgX", 0.7, 1.3, True), ("Standard", 0.0, 1.0, False), ("Standard", -0.6, 0.8, False),
        ("Filmic", 1.0, 1.0, False),
    ):  # fmt: skip
        view.view_transform, view.exposure, view.gamma, view.use_curve_mapping = transform, exposure, gamma, curve
        if curve:
            view.curve_mapping.curves[3].points.new(0.3, 0.6)
            view.curve_mapping.update()
        assert_as_saved(image, scene)
    settings.color_management = "OVERRIDE"
    settings.view_settings.view_transform, settings.view_settings.exposure = "Standard", -1.0
    assert_as_saved(image, scene)
    if hasattr(settings, "media_type"):
        settings.media_type = "IMAGE"
    settings.file_format = "OPEN_EXR"
    settings.linear_colorspace_settings.name = "ACES2065-1"
    assert_as_saved(image, scene)
    settings.file_format, settings.color_management = "PNG", "FOLLOW_SCENE"
    check_look_changed_meanwhile(image, scene)
    scene.render.dither_intensity = 1.0
    assert_as_saved(image, scene, at_most=2)
    scene.render.use_multiview = True
    bpy.ops.render.render()
    assert_as_saved(image, scene, at_most=2)
    scene.render.use_multiview = False
    scene.render.resolution_percentage, ours.PIECE_PIXELS = 100, 2**17


def light_up(scene: bpy.types.Scene) -> None:
    """Something to see in every direction, in all tones up to 16."""
    scene.render.film_transparent = False
    scene.world = bpy.data.worlds.new("colors")
    if bpy.app.version < (5, 0):
        scene.world.use_nodes = True
    nodes, links = scene.world.node_tree.nodes, scene.world.node_tree.links
    noise, power = nodes.new("ShaderNodeTexNoise"), nodes.new("ShaderNodeGamma")
    noise.inputs["Scale"].default_value, power.inputs["Gamma"].default_value = 9.0, 8.0
    links.new(noise.outputs["Color"], power.inputs["Color"])
    links.new(power.outputs["Color"], nodes["Background"].inputs["Color"])
    nodes["Background"].inputs["Strength"].default_value = 50.0


def assert_as_saved(image: bpy.types.Image, scene: bpy.types.Scene, at_most: int = 0) -> None:
    """The picture of a job is what Blender saves, in bytes' steps, and all else is as it was."""
    settings, temporary = scene.render.image_settings, Path(bpy.app.tempdir)
    view = settings.view_settings

    def state() -> list:
        space = settings.linear_colorspace_settings.name if settings.has_linear_colorspace else ""
        names = [
            name
            for name in (*part("render_result").OUTPUT_SETTINGS, "quality", "tiff_codec")
            if hasattr(settings, name)
        ]
        output = {name: getattr(settings, name) for name in names}
        files, images = sorted(temporary.iterdir()), [(image.name, image.users) for image in bpy.data.images]
        return [output, space, settings.color_management, view.view_transform, view.exposure, files, images]

    before = state()
    array = part("background").finish(part("pictures").picture_fields(image, scene))["pixels"]
    assert state() == before, f"{state()}\n{before}"
    pixels, saved = np.frombuffer(array.data, np.uint8).reshape(array.shape), saved_in_one(image, scene)
    assert pixels.shape == saved.shape == (31, 48, 4)
    difference = int(np.abs(pixels.astype(int) - saved).max())
    n_tones = len(np.unique(saved[..., :3]))
    assert difference <= at_most and n_tones > 50, (before, difference, n_tones)


def saved_in_one(image: bpy.types.Image, scene: bpy.types.Scene) -> np.ndarray:
    ours = part("render_result")
    return ours._taken(ours._saved(image, scene, ours.AS_PICTURE), ours.bytes_of)


def check_look_changed_meanwhile(image: bpy.types.Image, scene: bpy.types.Scene) -> None:
    """A picture is of one look; a scene that is removed meanwhile says so."""
    ours, background, other = part("render_result"), part("background"), scene.copy()
    steps = ours.pixels(image, scene)
    work = next(steps)
    for _ in range(5):
        work = steps.send(work())
    scene.view_settings.exposure += 1.0
    pixels = background.finish(resumed(steps, work))
    assert (pixels == saved_in_one(image, scene)).all()
    bpy.ops.render.render(scene=other.name)
    steps = part("pictures").picture_fields(image, other)
    work = next(steps)
    bpy.data.scenes.remove(other)
    try:
        background.finish(resumed(steps, work))
    except part("pictures").NoPicture as error:
        assert "it was removed while" in str(error)
    else:
        raise AssertionError("a picture of a scene that is gone")


def resumed(steps: Any, work: Any) -> Any:
    """The rest of steps whose next work is known."""
    try:
        while True:
            work = steps.send((yield work))
    except StopIteration as end:
        return end.value


def check_stop() -> None:
    session = part("link").session()
    # Nothing was polled while the renders took their time.
    pump_until(lambda: session.is_connected)
    bpy.ops.conrad.free_memory()
    bpy.ops.conrad.stop_engine()
    pump_until(lambda: not session.launcher.is_running and session.client is None)
    assert session.state_line() == "Stopped"


def run() -> None:
    folder = Path(sys.argv[3])
    empty_scene()
    use_engine()
    started = time.monotonic()
    for check in (
        check_generate,
        check_without_camera,
        check_guess,
        check_steering,
        check_failure_and_queue,
        check_too_much,
        check_failing_listener,
        check_triangles,
        check_start_mesh,
        lambda: check_waiting_in_another_file(folder),
        lambda: check_file_after_undo(folder),
        lambda: check_pictures_of_all_kinds(folder),
        check_large_pictures,
        check_render_result,
        check_stop,
    ):
        check()
        print(f"{getattr(check, '__name__', 'check')}: {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main(run)
