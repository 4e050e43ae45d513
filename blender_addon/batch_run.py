"""A batch in Blender: sends pictures, takes results, keeps the list. Works in a window and in the background:

    blender -b scene.blend --python-expr "from bl_ext.user_default.conrad import batch_run; batch_run.run('in', 'out')"

`run` is for scripts and loops until the end; in a window the timer calls `_step`.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import bpy

from . import background, batch, batch_request, importer, link, pictures, preferences, requests, scene_tools
from .jobs import Job
from .protocol import Cancel, Fetch
from .session import is_whole, with_result_wanted

IN_FLIGHT = 3
"""Jobs the engine has at once: enough to keep it busy, few enough to cancel."""
READ_LIMIT_S = 120.0
"""A picture that was not read by then lies on a drive that is gone; the others need not wait for it."""
GLB = "mesh.glb"
_PICTURES_OWN = (batch.BatchError, *requests.REFUSALS)
"""What may be wrong with a picture; anything else is shown with its traceback."""

current: batch.Batch | None = None
_scene_uid = 0
"""Of the scene it was opened in, whose settings it has and which its objects come into."""
is_running = False
message = ""
"""The last thing worth saying about the whole batch."""
looks_later = not bpy.app.background
"""A window has ticks at which a batch can be opened once its folder was looked through; a script has none."""
_looking: object | None = None
"""Who waits for a folder; another value tells the search that nobody waits for it any more."""
_being_saved: set[object] = set()
"""One entry for every thread that writes the list."""
_at_hand: tuple[batch.Item, float] | None = None
"""The picture that is being read and sent, one at a time, and since when. Another value, even an equal one, tells the work on
this one that nobody waits for it any more."""
_being_written: set[str] = set()
"""Jobs whose GLB file is on its way to the disk."""


def look(scene: bpy.types.Scene, and_start: bool) -> None:
    """Open the batch that the scene's settings name and go on with it if asked to; the folder is read while Blender goes on.

    Raises:
        BatchError: See `_opening`; where `looks_later`, what is wrong becomes the `message`.
    """
    global message, _looking
    steps = _opening(scene, and_start)
    if looks_later:
        message, _looking = f"Looking for pictures in {scene.conrad.batch.folder}", object()
        background.start(_opening_later(steps, _looking))
    else:
        background.finish(steps)


def is_looking() -> bool:
    """The folder is being looked through."""
    return _looking is not None


def _opening(scene: bpy.types.Scene, and_start: bool = False) -> background.Steps:
    """Open the batch of a scene.

    Raises:
        BatchError: See `batch.open_batch`.
    """
    global current, message, _at_hand, _looking, _scene_uid
    chosen, own, uid = scene.conrad.batch, _looking, scene.session_uid
    if not chosen.folder:
        raise batch.BatchError("Choose the folder with the pictures")
    folder = Path(bpy.path.abspath(chosen.folder))
    out = Path(bpy.path.abspath(chosen.out_folder)) if chosen.out_folder else folder / "conrad_results"
    name, token, output, pattern = scene.name, link.file_token, chosen.output, chosen.pattern
    opened = yield partial(batch.open_batch, folder, pattern, out, output, lambda: _looking is own)
    if _looking is not own:
        return
    current, _scene_uid, _at_hand, _looking = opened, uid, None, None
    message = f"{len(opened.items)} pictures, {opened.counts[batch.DONE]} of them finished"
    sync_list()
    if and_start:
        start()
    if output in ("GRID", "COLLECTIONS"):
        yield from _append_missing(opened, name, token)


def _opening_later(steps: background.Steps, own: object) -> background.Steps:
    """The same at the ticks to come; what is wrong is said in the panel."""
    global message, _looking
    try:
        yield from steps
    except (batch.BatchError, OSError) as error:
        if _looking is own:
            message = str(error)
    finally:
        if _looking is own:
            _looking = None
        scene_tools.redraw()


def start() -> None:
    """Go on with the open batch."""
    global is_running
    is_running = True
    link.refresh_settings()
    link.session().want()
    link.wake()


def stop(cancel_jobs: bool) -> None:
    """Send nothing more; what the engine has in hand is finished or cancelled."""
    global is_running, _at_hand, _looking, message
    message = "" if is_looking() else message
    is_running, _at_hand, _looking = False, None, None
    if current is None:
        return
    session = link.session()
    for item in current.items:
        if item.state == batch.SENT and cancel_jobs:
            job = session.table.jobs.get(item.job)
            if job is not None and job.state is None and not job.is_remembered:
                # It is still on its way to the engine.
                session.forget(job)
            else:
                session.ask(Cancel(item.job))
            item.state, item.job = batch.WAITING, ""
    _save()


def file_opened() -> None:
    """The batch belongs to the file that was open: the next pictures would be made with this one's settings, and their objects
    would come into its scene. What the engine has in hand is finished, and found when the batch is started again."""
    global current, message
    was_at_work = is_running or is_looking()
    stop(cancel_jobs=False)
    current = None
    message = "Another file was opened: Start Batch goes on in the one before" if was_at_work else ""
    sync_list()


def _scene() -> bpy.types.Scene:
    """The scene of the open batch; where that was removed, the one that is looked at."""
    return scene_tools.found(bpy.data.scenes, _scene_uid) or scene_tools.scene_now()


def sync_list() -> None:
    """Make the batch list of the window manager the same as the batch's."""
    lines = bpy.context.window_manager.conrad.batch
    wanted = [item.picture for item in current.items] if current else []
    if [line.path for line in lines] != wanted:
        lines.clear()
        for picture in wanted:
            lines.add().path = picture


def _step() -> bool:
    """One round of a running batch; true while it has work."""
    global is_running, message
    if not is_running or current is None:
        return False
    for item in current.items:
        if item.state == batch.SENT:
            _follow(item)
    _send_next()
    if is_running and current.is_finished:
        counts = current.counts
        message, is_running = f"{counts[batch.DONE]} finished, {counts[batch.FAILED]} failed", False
        scene_tools.redraw()
    return is_running


def _save() -> None:
    """Have the list written by a thread: of ten thousand pictures it takes 20 ms, and a slow drive any time."""
    assert current is not None
    background.start(_saving(current))


def _saving(own: batch.Batch) -> background.Steps:
    """A batch whose list cannot be written stops, because it could not be resumed."""
    global is_running, message
    entry = object()
    _being_saved.add(entry)
    try:
        yield own.save
    except batch.BatchError as error:
        if own is current:
            message, is_running = str(error), False
            scene_tools.redraw()
    finally:
        _being_saved.discard(entry)


def retry(items: list[batch.Item]) -> None:
    """Do pictures of the open batch again; those on their way go on."""
    for item in items:
        if item.state != batch.SENT:
            item.retry()
    if items:
        _save()
        start()


def _fail(item: batch.Item, error: str) -> None:
    item.state, item.error = batch.FAILED, error
    _save()
    scene_tools.redraw()


def _send_next() -> None:
    """Take the next picture in hand when there is room for it."""
    global _at_hand
    assert current is not None
    if _at_hand is not None:
        item, since = _at_hand
        if item.state == batch.WAITING and time.monotonic() - since > READ_LIMIT_S:
            _at_hand = None
            _fail(item, f"It was not read within {READ_LIMIT_S:.0f} s: is its drive still there?")
        return
    item = current.next_waiting()
    if item is not None and sum(item.state == batch.SENT for item in current.items) < IN_FLIGHT:
        _at_hand = item, time.monotonic()
        background.start(_sending(item))


def _sending(item: batch.Item) -> background.Steps:
    """Read one picture and send it; whatever is wrong with it is its own problem and not the batch's."""
    global _at_hand
    assert current is not None
    table, opened, own, notes = link.session().table, current, _at_hand, None
    try:
        source = yield partial(batch.read_source, current.path(item), pictures.MAX_FILE_BYTES)
        if _at_hand is not own:
            return
        setup = source.settings.get("camera", {})
        if not setup and "elevation_deg" not in source.settings and _scene().conrad.batch.camera == "CAMERA":
            size = yield from batch_request.picture_size(opened.path(item), source.picture)
            setup = batch_request.scene_camera(_scene(), size)
        if _at_hand is not own:
            return
        request, notes = batch_request.made_of(opened, item, _scene(), source, setup)
        item.job, item.state, item.attempts = notes.job, batch.SENT, item.attempts + 1
        table.add(notes)
        # The list knows the job before the engine does: a crash in between costs nothing.
        yield opened.save
        yield partial(table.keep_request, request)
        if notes.job in table.jobs:
            link.session().submit(request, notes)
        else:
            # It was cancelled meanwhile.
            table.confirmed(notes.job)
    except Exception as error:
        if notes is not None:
            table.remove(notes.job)
        if _at_hand is own:
            _fail(item, str(error) or type(error).__name__)
        if not isinstance(error, _PICTURES_OWN):
            raise
    finally:
        if _at_hand is own:
            _at_hand = None
        link.sync_list()


def _follow(item: batch.Item) -> None:
    """See what became of a picture that was sent."""
    assert current is not None
    session = link.session()
    job = session.table.jobs.get(item.job)
    if job is None or job.state is None:
        # Sent by an earlier Blender, and this engine has never heard of it. Before it has told of all its jobs nothing
        # is known, and what was not confirmed yet is on its way.
        if job.is_unknown if job is not None else session.is_listed and item.job not in session.client.jobs:
            item.state, item.job = batch.WAITING, ""
        return
    item.seconds = job.state.elapsed_s
    if job.state.state in ("failed", "cancelled"):
        return _fail(item, job.state.error_message or job.state.state.capitalize())
    if job.state.state == "done":
        _take_result(item, job)


def _take_result(item: batch.Item, job: Job) -> None:
    assert current is not None
    session = link.session()
    if job.problem:
        return _fail(item, job.problem)
    if current.output == "GLB":
        key = (job.id, GLB)
        if key not in session.file_takers and job.id not in _being_written:
            opened = current
            session.file_takers[key] = lambda data: background.start(_writing(opened, item, job, data))
            session.ask(Fetch(job.id, GLB))
        return
    if not job.wants_import:
        return with_result_wanted(session, job)
    if is_whole(job) and not scene_tools.is_busy():
        _bring_in(item, job)


def _writing(opened: batch.Batch, item: batch.Item, job: Job, data: bytes) -> background.Steps:
    """Write a result's file, unless the batch is stopped meanwhile."""
    name, problem = batch.output_name(opened, item, ".glb"), ""
    _being_written.add(job.id)
    try:
        yield partial(_write, opened.out / name, data)
    except OSError as error:
        problem = f"{name} cannot be written: {error.strerror or error}"
    finally:
        _being_written.discard(job.id)
    if opened is not current or item.state != batch.SENT or item.job != job.id:
        return
    if problem:
        _fail(item, problem)
    else:
        _finish(item, job, name)


def _write(path: Path, data: bytes) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def _bring_in(item: batch.Item, job: Job) -> None:
    """Import a result and write its own .blend file; the scene keeps the object where the output says so."""
    assert current is not None and job.result is not None
    number, name = job.result.result, batch.output_name(current, item, ".blend")
    scene = _scene()
    collection = job.name if current.output == "COLLECTIONS" else scene_tools.COLLECTION_NAME
    try:
        made = importer.import_result(job, scene, collection)
        # Not compressed: the texture is a PNG already, and Blender would wait ten times longer for a large mesh.
        bpy.data.libraries.write(str(current.out / name), {made})
    except (importer.CannotImport, RuntimeError, OSError) as error:
        job.wants_import, job.result = False, None
        return _fail(item, f"The import failed: {error}")
    if current.output == "LIBRARY":
        _remove(made)
    else:
        scene_tools.push_undo("ConRad: Import Object")
    link.session().table.imported(job, number)
    _finish(item, job, name)


def _finish(item: batch.Item, job: Job, output: str) -> None:
    assert current is not None
    item.state, item.output, item.error = batch.DONE, output, ""
    item.seconds = job.state.elapsed_s if job.state else item.seconds
    link.session().table.imported(job, job.result_number)
    _save()
    scene_tools.redraw()


def _remove(item: bpy.types.Object) -> None:
    """Take an object that was written to a library out of the file again, with its data."""
    mesh, material = item.data, item.data.materials[0]
    image = next(node.image for node in material.node_tree.nodes if node.type == "TEX_IMAGE")
    bpy.data.objects.remove(item)
    bpy.data.meshes.remove(mesh)
    bpy.data.materials.remove(material)
    bpy.data.images.remove(image)


def _append_missing(opened: batch.Batch, scene_name: str, file_token: str) -> background.Steps:
    """Objects of an earlier run that this scene does not have come back from their files, one a tick."""
    there = {item.get("conrad_job") for item in bpy.data.objects}
    done = [item for item in opened.items if item.state == batch.DONE and item.output.endswith(".blend")]
    gone = [item for item in done if item.job not in there]
    missing = yield lambda: [item for item in gone if (opened.out / item.output).exists()]
    for item in missing:
        while scene_tools.is_busy():
            yield partial(time.sleep, 0.05)
        scene = bpy.data.scenes.get(scene_name)
        if scene is None or link.file_token != file_token or current is not opened:
            return
        with bpy.data.libraries.load(str(opened.out / item.output)) as (source, target):
            target.objects = source.objects
        name = scene_tools.data_name(Path(item.picture).stem)
        collection = name if opened.output == "COLLECTIONS" else scene_tools.COLLECTION_NAME
        for made in target.objects:
            scene_tools.link(made, scene, collection)
        scene_tools.push_undo("ConRad: Import Object")
        yield lambda: None


def run(
    folder: str, out: str, output: str = "GLB", pattern: str = "", timeout_s: float = float("inf"), quiet: bool = False
) -> batch.Batch:
    """Convert a folder and wait for it; for scripts. The scene's settings give everything else.

    Raises:
        BatchError: There is nothing to do, the engine cannot be had, or the time is over.
    """
    settings = scene_tools.scene_now().conrad
    settings.batch.folder, settings.batch.out_folder, settings.batch.output = folder, out, output
    settings.batch.pattern = pattern or settings.batch.pattern
    reason = preferences.why_no_engine()
    if reason:
        raise batch.BatchError(reason)
    background.finish(_opening(scene_tools.scene_now(), and_start=True))
    opened = current
    assert opened is not None
    end, said = time.monotonic() + timeout_s, None
    while is_running or _being_saved:
        link.pump()
        time.sleep(0.05)
        if opened.counts != said and not quiet:
            said = opened.counts
            print("ConRad batch:", ", ".join(f"{count} {state}" for state, count in said.items()), flush=True)
        session = link.session()
        if not session.wants_engine and session.client is None and not session.launcher.is_running:
            stop(cancel_jobs=False)
            raise batch.BatchError(f"The engine does not run: {session.state_line()}")
        if time.monotonic() > end:
            stop(cancel_jobs=False)
            raise batch.BatchError(f"The batch is not finished after {timeout_s:.0f} s; run it again to go on")
    return opened


def register() -> None:
    link.steps.append(_step)


def unregister() -> None:
    global current, is_running, _at_hand, _looking
    current, is_running, _at_hand, _looking = None, False, None, None
    if _step in link.steps:
        link.steps.remove(_step)
