"""The one live session: timer -> Session.poll() -> what it means for the scene -> redraw.

`pump()` is a plain function, because Blender's timers never fire in the background; the timer calls it in a window, tests
and batch runs call it in a loop. Nothing here keeps a reference to scene data between two calls: names are looked up anew.
"""

from __future__ import annotations

import traceback
import uuid
from collections import deque
from collections.abc import Callable
from time import perf_counter

import bpy

from . import background, importer, preferences, scene_tools
from .engine_state import Event, is_changed
from .jobs import Job, JobTable
from .launcher import Launcher
from .session import Session, is_whole, with_result_wanted

BUSY_S, WATCHING_S, IDLE_S = 0.1, 0.04, 0.5

_session: Session | None = None
file_token = uuid.uuid4().hex
"""Names the open file; a result comes into the scene by itself only where its job was started."""
listeners: list[Callable[[list[Event]], None]] = []
"""Called after every poll that brought something: thumbnails, overlay, batch."""
steps: list[Callable[[], bool]] = []
"""Called at every tick; true while there is work that keeps the timer going: set-up, check, batch."""
tick_times: deque[float] = deque(maxlen=4096)
"""Seconds of the last ticks, for the benchmark."""
last_error = ""
"""The last unexpected error of a tick, with its traceback; shown in the panel."""


def session() -> Session:
    """The session of this Blender, made when first asked for."""
    global _session
    if _session is None:
        folder = preferences.user_folder()
        _session = Session(Launcher(folder), JobTable(folder / "jobs"))
        _session.client_name = f"Blender {bpy.app.version_string}"
        _session.settings = preferences.engine_settings()
        sync_list()
    return _session


def has_session() -> bool:
    return _session is not None


def refresh_settings() -> None:
    """Read the preferences anew; an engine that runs on other settings keeps them until it is started again."""
    settings = preferences.engine_settings()
    own = session()
    if own.client is None or not is_changed(own.settings, settings):
        own.settings = settings


def wake() -> None:
    """Have the timer running."""
    if not bpy.app.background and not bpy.app.timers.is_registered(_tick):
        bpy.app.timers.register(_tick, first_interval=0.01, persistent=True)


def _tick() -> float | None:
    started = perf_counter()
    pause = pump()
    tick_times.append(perf_counter() - started)
    return pause


def pump() -> float | None:
    """One round; never raises, because an exception would end the timer silently.

    Returns:
        Seconds until the next round, or None when nothing is going on any more.
    """
    global last_error
    try:
        if _session is None:
            return WATCHING_S if background.go_on() else None
        events = _session.poll()
        if events:
            _react(events)
        has_background_work = background.go_on()
        is_working = [step() for step in list(steps)]
        _import_waiting()
    except Exception:
        # Whatever went wrong, the next round goes on; the panel shows it.
        last_error = traceback.format_exc()
        print(last_error)
        return BUSY_S
    is_watched = any(job.preview is not None for job in _session.table.active) and overlay_wanted()
    if is_watched or has_background_work:
        return WATCHING_S
    if any(is_working) or _session.table.active or _session.state.name in ("STARTING", "BUSY"):
        return BUSY_S
    return IDLE_S if _session.client is not None or _session.wants_engine or _session.launcher.is_running else None


def overlay_wanted() -> bool:
    return not bpy.app.background and scene_tools.scene_now().conrad.use_overlay


def _react(events: list[Event]) -> None:
    assert _session is not None
    kinds = {event.kind for event in events}
    # Results first: what listeners do, such as write a thumbnail to a disk that is full, may fail, and no event comes twice.
    for event in events:
        if event.kind == "job":
            _want_result(_session.table.jobs.get(event.job))
    if kinds & {"job", "forgotten", "thumbnail"}:
        sync_list()
    for listener in list(listeners):
        listener(events)
    scene_tools.redraw()


def _want_result(job: Job | None) -> None:
    """A result that belongs into the open file is fetched by itself; any other one waits in the list."""
    if job is None or job.state is None or job.state.state != "done" or job.wants_import or job.problem:
        return
    is_ours = job.notes.file_token == file_token and job.notes.kind != "batch"
    if is_ours and job.is_waiting and _session is not None:
        with_result_wanted(_session, job)


def _import_waiting() -> None:
    """Import what has arrived, one result a round, when the user's hands are off."""
    assert _session is not None
    for job in list(_session.table.jobs.values()):
        if job.wants_import and is_whole(job) and job.notes.kind != "batch" and not scene_tools.is_busy():
            return bring_in(job, scene_tools.scene_now())


def bring_in(job: Job, scene: bpy.types.Scene, collection: str = scene_tools.COLLECTION_NAME) -> None:
    """Import a result that has arrived, as one undo step."""
    number = job.result.result if job.result is not None else 0
    try:
        item = importer.import_result(job, scene, collection)
        source = bpy.data.objects.get(job.name) if job.notes.kind == "project" else None
        if source is not None and source != item:
            source.hide_set(True)
        scene_tools.push_undo("ConRad: Import Object")
    except (importer.CannotImport, RuntimeError, ReferenceError) as error:
        job.problem, job.wants_import, job.result = f"The import failed: {error}", False, None
        return
    session().table.imported(job, number)
    if preferences.get().show_textures:
        scene_tools.show_textures()
    scene_tools.redraw(view=True)


def sync_list() -> None:
    """Make the job list of the window manager the same as the table's, newest on top."""
    if _session is None:
        return
    state = bpy.context.window_manager.conrad
    wanted = [job.id for job in reversed(_session.table.jobs.values())]
    if [item.job for item in state.jobs] == wanted:
        return
    active = state.jobs[state.active_job].job if state.active_job < len(state.jobs) else ""
    had = {item.job for item in state.jobs}
    state.jobs.clear()
    for job_id in wanted:
        state.jobs.add().job = job_id
    # A new job becomes the active one; otherwise the choice stays.
    if wanted and wanted[0] not in had:
        active = wanted[0]
    state.active_job = wanted.index(active) if active in wanted else 0


def active_job() -> Job | None:
    """The job that is chosen in the list."""
    state = bpy.context.window_manager.conrad
    if _session is None or state.active_job >= len(state.jobs):
        return None
    return _session.table.jobs.get(state.jobs[state.active_job].job)


def file_opened() -> None:
    """Another file is open: it has a name of its own, and nothing of the old one is touched any more."""
    global file_token
    found = next((scene.conrad.file_id for scene in bpy.data.scenes if scene.conrad.file_id), "")
    file_token = found or uuid.uuid4().hex
    if _session is not None:
        for job in _session.table.jobs.values():
            job.wants_import, job.result = False, None
            job.fetching = 0
        sync_list()


def file_is_saved() -> None:
    """A file that jobs were started in keeps its name, which undo may have taken from the scene since."""
    jobs = _session.table.jobs.values() if _session is not None else ()
    if any(job.notes.file_token == file_token for job in jobs):
        own = [scene for scene in bpy.data.scenes if scene.library is None]
        if not any(scene.conrad.file_id for scene in own):
            own[0].conrad.file_id = file_token


def register() -> None:
    background.wake = wake


def unregister() -> None:
    global _session
    if not bpy.app.background and bpy.app.timers.is_registered(_tick):
        bpy.app.timers.unregister(_tick)
    if _session is not None:
        _session.end()
        _session = None
    background.clear()
    listeners.clear()
    steps.clear()
