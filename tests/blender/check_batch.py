"""A folder of pictures to GLB files, a grid, collections and a library; bad pictures, side-cars, resuming.

PYTHON_WITH_BPY check_batch.py ZIP ENGINE_PYTHON DATA_FOLDER
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import bpy
import numpy as np
from check_jobs import use_engine
from common import empty_scene, main, part, pump_until


def make_pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, shade in (("cup", 0.2), ("pot", 0.5), ("sub_jar", 0.8)):
        image = bpy.data.images.new(name, 32, 24)
        image.pixels.foreach_set(np.tile(np.float32([shade, 0, 0, 1]), 32 * 24))
        image.filepath_raw, image.file_format = str(folder / f"{name}.png"), "PNG"
        image.save()
    (folder / "bad one.png").write_bytes(b"no picture")
    (folder / "pot.json").write_text(json.dumps({"seed": 9, "size": 0.5, "overrides": {"optimize.n_steps": 8}}))
    (folder / "unreadable.png").write_bytes((folder / "cup.png").read_bytes())
    (folder / "unreadable.json").write_text('{"sed": 9}')


def states() -> dict[str, str]:
    return {item.picture: item.state for item in part("batch_run").current.items}


FINISHED = {
    "bad one.png": "failed",
    "cup.png": "done",
    "pot.png": "done",
    "sub_jar.png": "done",
    "unreadable.png": "failed",
}


def check_glb(folder: Path) -> None:
    """What a script or `blender -b` calls; one bad picture does not stop the rest; a second run has nothing to do."""
    batch_run = part("batch_run")
    opened = batch_run.run(str(folder / "in"), str(folder / "glb"), "GLB", timeout_s=60)
    assert states() == FINISHED, states()
    assert sorted(p.name for p in (folder / "glb").glob("*.glb")) == ["cup.glb", "pot.glb", "sub_jar.glb"]
    errors = {item.picture: item.error for item in opened.items if item.error}
    assert "cannot be decoded" in errors["bad one.png"] and "unknown setting 'sed'" in errors["unreadable.png"]
    n_jobs = len(part("link").session().table.jobs)
    batch_run.run(str(folder / "in"), str(folder / "glb"), "GLB", timeout_s=10)
    assert len(part("link").session().table.jobs) == n_jobs


def check_resuming(folder: Path) -> None:
    """Stopped in the middle and opened anew, as after closing Blender: finished pictures are not done again."""
    batch_run, link = part("batch_run"), part("link")
    settings = bpy.context.scene.conrad.batch
    settings.folder, settings.out_folder, settings.output = str(folder / "in"), str(folder / "grid"), "GRID"
    assert bpy.ops.conrad.batch_start() == {"FINISHED"}
    pump_until(lambda: "done" in states().values())
    link.unregister()
    link.listeners.extend([part("thumbnails")._take, part("overlay")._take])
    link.steps.extend([part("operators_engine")._step, part("batch_run")._step])
    done = [picture for picture, state in states().items() if state == "done"]
    sent = {item.picture: item.job for item in batch_run.current.items if item.state == "sent"}
    assert sent
    batch_run.current, batch_run.is_running = None, False
    made = {item.name for item in bpy.data.objects}
    assert bpy.ops.conrad.batch_start() == {"FINISHED"}
    assert all(states()[picture] == "done" for picture in done)
    pump_until(lambda: not batch_run.is_running)
    jobs = {item.picture: item.job for item in batch_run.current.items}
    assert all(jobs[picture] == job for picture, job in sent.items()), "what the engine has is not sent again"
    assert states() == FINISHED and made <= {item.name for item in bpy.data.objects}
    objects = [item for item in bpy.data.objects if item.get("conrad_job")]
    assert len(objects) == 3 and len({tuple(np.round(item.location, 3)) for item in objects}) == 3
    assert bpy.data.objects["pot"]["conrad_seed"] == 9
    bpy.context.view_layer.update()
    assert abs(max(bpy.data.objects["pot"].dimensions) - 0.5) < 0.01
    for item in objects:
        bpy.data.objects.remove(item)
    bpy.ops.conrad.batch_scan()
    assert len([item for item in bpy.data.objects if item.get("conrad_job")]) == 3, "finished ones come back"


def check_another_file(folder: Path) -> None:
    """A batch does not go on in a file that is opened meanwhile, and is gone on with in its own."""
    batch_run, link = part("batch_run"), part("link")
    own, before = str(folder / "batch.blend"), len(bpy.data.objects)
    settings = bpy.context.scene.conrad.batch
    settings.folder, settings.out_folder, settings.output = str(folder / "in"), str(folder / "files"), "GRID"
    bpy.ops.wm.save_as_mainfile(filepath=own)
    bpy.ops.conrad.batch_start()
    pump_until(lambda: "sent" in states().values() and batch_run._at_hand is None)
    sent = {item.job for item in batch_run.current.items if item.state == "sent"}
    bpy.ops.wm.read_homefile(use_empty=True)
    assert batch_run.current is None and not batch_run.is_running and "Another file" in batch_run.message
    assert not bpy.context.window_manager.conrad.batch
    pump_until(lambda: all(link.session().table.jobs[job].state_name == "done" for job in sent))
    assert not bpy.data.objects, "nothing comes into a file that has not asked for it"
    bpy.ops.wm.open_mainfile(filepath=own)
    assert not batch_run.message
    bpy.ops.conrad.batch_start()
    pump_until(lambda: not batch_run.is_running)
    assert states() == FINISHED and sent <= {item.job for item in batch_run.current.items}
    assert len(bpy.data.objects) == before + 3


def check_another_scene(folder: Path) -> None:
    """A batch goes on with the settings of the scene it was started in, and there its objects come."""
    batch_run, table = part("batch_run"), part("link").session().table
    own = empty_scene()
    own.conrad.preset, own.conrad.seed = "draft", 5
    settings = own.conrad.batch
    settings.folder, settings.out_folder, settings.output = str(folder / "in"), str(folder / "scenes"), "GRID"
    bpy.ops.conrad.batch_start()
    other = bpy.context.window.scene = bpy.data.scenes.new("another")
    pump_until(lambda: not batch_run.is_running)
    assert bpy.context.scene == other and not other.objects and len(own.collection.all_objects) == 4
    seeds = [table.jobs[item.job].notes.seed for item in batch_run.current.items if item.state == "done"]
    assert sorted(seeds) == [5, 5, 5, 9], seeds
    bpy.context.window.scene = own
    bpy.data.scenes.remove(other)


def check_patience(folder: Path) -> None:
    """Of a picture that an earlier Blender sent, nothing is known before the engine has told of all its jobs."""
    batch, batch_run, jobs, link = part("batch"), part("batch_run"), part("jobs"), part("link")
    opened = batch.Batch(folder / "in", folder / "patience", [batch.Item("cup.png", "sent", "a" * 32)])
    table, client = jobs.JobTable(), SimpleNamespace(jobs={})
    before = link._session, batch_run.current
    stand_in = SimpleNamespace(table=table, client=client, is_connected=True, is_listed=False)
    link._session, batch_run.current = stand_in, opened
    try:
        for notes in (None, jobs.Notes("a" * 32)):
            if notes is not None:
                table.jobs[notes.job] = jobs.Job(notes, is_remembered=True)
            batch_run._follow(opened.items[0])
            assert opened.items[0].state == "sent", "it is not sent again in the meantime"
        table.jobs["a" * 32].is_unknown = True
        batch_run._follow(opened.items[0])
        assert opened.items[0].state == "waiting", "the engine does not have it"
    finally:
        link._session, batch_run.current = before


def check_library(folder: Path) -> None:
    batch_run = part("batch_run")
    empty_scene()
    batch_run.run(str(folder / "in"), str(folder / "library"), "LIBRARY", timeout_s=60)
    assert states() == FINISHED and not bpy.data.objects and not bpy.data.meshes
    with bpy.data.libraries.load(str(folder / "library" / "cup.blend"), assets_only=True) as (source, target):
        assert source.objects == ["cup"]
        target.objects = source.objects
    cup = bpy.data.objects["cup"]
    image = cup.data.materials[0].node_tree.nodes.active.image
    assert image.packed_file is not None and cup.asset_data.tags


def check_scene_camera(folder: Path) -> None:
    """The scene's reference camera for every picture; without one each picture says what is missing."""
    batch_run, batch_request, table = part("batch_run"), part("batch_request"), part("link").session().table
    settings = empty_scene().conrad
    settings.preset, settings.batch.camera = "draft", "CAMERA"
    opened = batch_run.run(str(folder / "in"), str(folder / "no_camera"), "GLB", pattern="cup.png", timeout_s=60)
    assert "no reference camera" in opened.items[0].error
    settings.image = bpy.data.images.load(str(folder / "in" / "cup.png"))
    bpy.ops.conrad.add_camera()
    opened = batch_run.run(str(folder / "in"), str(folder / "camera"), "GLB", pattern="cup.png", timeout_s=60)
    setup = table.jobs[opened.items[0].job].notes.setup
    assert opened.items[0].state == "done" and (setup["width"], setup["height"]) == (32, 24)
    assert setup == part("camera").job_setup(settings.camera, settings.image)
    image = bpy.data.images.new("deep", 32, 24)
    image.filepath_raw, image.file_format = str(folder / "in" / "deep.tif"), "TIFF"
    image.save()
    bpy.data.images.remove(image)
    data, n_images = (folder / "in" / "deep.tif").read_bytes(), len(bpy.data.images)
    steps = batch_request.picture_size(folder / "in" / "deep.tif", data)
    found = batch_request.scene_camera(bpy.context.scene, part("background").finish(steps))
    assert found == setup and len(bpy.data.images) == n_images, "of other kinds Blender reads the size"
    (folder / "in" / "deep.tif").unlink()


def check_elevations(folder: Path) -> None:
    """The engine guesses unless the scene, or the side-car for its picture, says how high the camera stands."""
    batch, batch_request = part("batch"), part("batch_request")
    scene = empty_scene()
    opened = batch.Batch(folder / "in", folder / "elevations", [batch.Item("cup.png")])

    def sent(camera: str, **own: object) -> tuple:
        scene.conrad.batch.camera = camera
        (folder / "in" / "cup.json").write_text(json.dumps(own))
        source = batch.read_source(folder / "in" / "cup.png", 10_000)
        request, _ = batch_request.made_of(opened, opened.items[0], scene, source, {})
        names = ("elevation_deg", "is_elevation_known", "guess_elevation")
        return tuple(request.overrides.get(f"picture.{name}") for name in names)

    assert scene.conrad.batch.camera == "GUESS"
    assert sent("GUESS") == (None, None, None), "without an elevation the engine guesses"
    assert sent("GUESS", elevation_deg=20) == (20.0, None, None)
    scene.conrad.elevation, scene.conrad.is_elevation_guess = np.radians(30), True
    assert np.isclose(sent("ELEVATION")[0], 30) and sent("ELEVATION")[1] is False
    assert sent("ELEVATION", elevation_deg="auto") == (None, None, None)
    assert sent("CAMERA", elevation_deg="auto") == (None, None, None), "it needs no camera then"
    (folder / "in" / "cup.json").unlink()


def check_slow_drive(folder: Path) -> None:
    """Blender goes on while a picture is being read; it can be stopped then, and one that hangs does not stop the rest."""
    batch, batch_run, background, session = part("batch"), part("batch_run"), part("background"), part("link").session()
    settings, gate = empty_scene().conrad.batch, threading.Event()
    bpy.context.scene.conrad.preset = "draft"
    real, table, before = (batch.read_source, batch_run.READ_LIMIT_S), session.table, len(session.table.jobs)
    settings.folder, settings.out_folder, settings.output = str(folder / "in"), str(folder / "slow"), "GLB"
    settings.pattern = "cup.png pot.png"

    def hanging(picture: Path, max_bytes: int) -> object:
        assert picture.name != "cup.png" or gate.wait(60)
        return real[0](picture, max_bytes)

    def keeping(request: object) -> None:
        gate.wait(60)
        type(table).keep_request(table, request)

    try:
        batch.read_source = hanging
        assert bpy.ops.conrad.batch_start() == {"FINISHED"}
        for _ in range(3):
            part("link").pump()
        assert background._running and states() == {"cup.png": "waiting", "pot.png": "waiting"}, "one after the other"
        bpy.ops.conrad.batch_stop()
        gate.set()
        pump_until(lambda: not background._running)
        assert set(states().values()) == {"waiting"} and len(table.jobs) == before, "it was stopped before it was sent"

        batch.read_source, table.keep_request = real[0], keeping
        gate.clear()
        bpy.ops.conrad.batch_start()
        pump_until(lambda: states()["cup.png"] == "sent")
        bpy.ops.conrad.batch_stop()
        gate.set()
        pump_until(lambda: not background._running)
        assert len(table.jobs) == before and not session._unsent and not table.unsent(), "neither is it sent afterwards"
        del table.keep_request

        gate.clear()
        batch.read_source, batch_run.READ_LIMIT_S = hanging, 0.3
        bpy.ops.conrad.batch_start()
        pump_until(lambda: not batch_run.is_running)
        assert states() == {"cup.png": "failed", "pot.png": "done"}
        assert "not read within" in batch_run.current.items[0].error
        gate.set()
        pump_until(lambda: not background._running)
        assert states()["cup.png"] == "failed" and len(table.jobs) == before + 1, "it comes too late"
    finally:
        gate.set()
        batch.read_source, batch_run.READ_LIMIT_S = real


def check_looking(folder: Path) -> None:
    """In a window a folder is looked through while Blender goes on; stopping forgets it, and what is wrong is said."""
    batch, batch_run, background = part("batch"), part("batch_run"), part("background")
    settings, gate, real = empty_scene().conrad.batch, threading.Event(), batch.find_pictures
    settings.folder, settings.out_folder, settings.output = str(folder / "in"), str(folder / "looked"), "GLB"

    def slow(*arguments: object) -> list[str]:
        assert gate.wait(60)
        return real(*arguments)

    batch.find_pictures, batch_run.looks_later, batch_run.current = slow, True, None
    try:
        assert bpy.ops.conrad.batch_scan() == {"FINISHED"}
        assert batch_run.is_looking() and "Looking for pictures" in batch_run.message
        assert not bpy.ops.conrad.batch_scan.poll() and not bpy.ops.conrad.batch_start.poll()
        part("link").pump()
        assert batch_run.is_looking() and batch_run.current is None
        bpy.ops.conrad.batch_stop()
        assert not batch_run.is_looking() and not batch_run.message and bpy.ops.conrad.batch_scan.poll()
        gate.set()
        pump_until(lambda: not background._running)
        assert batch_run.current is None and not batch_run.message and not (folder / "looked").exists()

        bpy.ops.conrad.batch_scan()
        pump_until(lambda: not batch_run.is_looking())
        assert len(bpy.context.window_manager.conrad.batch) == len(FINISHED) and not batch_run.is_running
        assert batch_run.message == "5 pictures, 0 of them finished", batch_run.message
        settings.folder = str(folder / "nowhere")
        bpy.ops.conrad.batch_start()
        pump_until(lambda: not batch_run.is_looking())
        assert "nowhere is no folder" in batch_run.message and not batch_run.is_running

        # Of an earlier run's objects one comes a tick.
        settings.folder, settings.out_folder, settings.output = str(folder / "in"), str(folder / "grid"), "GRID"
        bpy.ops.conrad.batch_scan()
        numbers = [0]
        while background._running:
            part("link").pump()
            numbers.append(sum(bool(item.get("conrad_job")) for item in bpy.data.objects))
        assert numbers[-1] == 3 and max(np.diff(numbers)) == 1, numbers
    finally:
        gate.set()
        batch.find_pictures, batch_run.looks_later = real, False


def check_saving(folder: Path) -> None:
    """A list on a slow drive keeps nobody waiting but the picture that must not be sent before it is written."""
    batch, batch_run, background = part("batch"), part("batch_run"), part("background")
    settings, gate, real = empty_scene().conrad.batch, threading.Event(), batch.Batch.save
    bpy.context.scene.conrad.preset = "draft"
    settings.folder, settings.out_folder, settings.output = str(folder / "in"), str(folder / "saved"), "GLB"
    settings.pattern = "cup.png"
    n_saves = []

    def slow(opened: object) -> None:
        n_saves.append(gate.wait(60))
        real(opened)

    bpy.ops.conrad.batch_scan()
    before = len(part("link").session().table.jobs)
    batch.Batch.save = slow
    try:
        batch_run.current.items[0].state = "failed"
        assert bpy.ops.conrad.batch_retry(all_failed=True) == {"FINISHED"}
        pump_until(lambda: states()["cup.png"] == "sent")
        part("link").pump()
        assert not n_saves and not part("link").session()._unsent, "the list knows the job before the engine does"
        gate.set()
        pump_until(lambda: not (batch_run.is_running or background._running))
        assert states() == {"cup.png": "done"} and len(part("link").session().table.jobs) == before + 1
        written = json.loads((folder / "saved" / batch.LIST_NAME).read_text())["items"]
        assert [item["state"] for item in written] == ["done"] and len(n_saves) < 6, n_saves
    finally:
        gate.set()
        batch.Batch.save = real


def check_retry(folder: Path) -> None:
    """The failed one is mended and done again."""
    batch_run = part("batch_run")
    (folder / "in" / "unreadable.json").unlink()
    assert bpy.ops.conrad.batch_retry(all_failed=True) == {"FINISHED"}
    pump_until(lambda: not batch_run.is_running)
    assert states() == FINISHED | {"unreadable.png": "done"}
    empty_scene()
    batch_run.run(str(folder / "in"), str(folder / "many"), "COLLECTIONS", timeout_s=60)
    assert {"cup", "pot", "sub_jar", "unreadable"} <= {c.name for c in bpy.context.scene.collection.children}


def run() -> None:
    folder = Path(sys.argv[3]) / "batch"
    empty_scene()
    use_engine()
    bpy.context.scene.conrad.preset = "draft"
    make_pictures(folder / "in")
    check_glb(folder)
    check_resuming(folder)
    check_another_file(folder)
    check_patience(folder)
    check_library(folder)
    check_retry(folder)
    check_scene_camera(folder)
    check_elevations(folder)
    check_slow_drive(folder)
    check_looking(folder)
    check_saving(folder)
    check_another_scene(folder)


if __name__ == "__main__":
    main(run)
