"""The engine as the add-on sees it: process, connection and jobs as one thing that is polled. No bpy, never waiting.

Session.poll() -> launcher (is the process there?) -> client (what has it said?) -> jobs (what does it mean?) -> events
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .background import in_thread
from .engine_state import EngineSettings, Event, State
from .jobs import Job, JobTable, Notes, is_setup
from .launcher import CannotStart, Launcher
from .protocol import (
    ARRAYS,
    CONNECTION_FILE,
    NOT_RESPONDING,
    READY,
    REFUSED,
    Accepted,
    Cancel,
    Connection,
    CurveKeys,
    ElevationGuess,
    EngineClient,
    EngineUnavailable,
    Error,
    Fetch,
    Forget,
    Forgotten,
    FreeMemory,
    GuessElevation,
    JobState,
    Listed,
    ListJobs,
    Preview,
    Progress,
    ProtocolError,
    Result,
    ResultFile,
    SetPreview,
    Shutdown,
    Status,
    Submit,
    Welcome,
)

FIND_FOR_S = 2.0
"""How long an engine that another program started is given to answer before an own one is started."""
READ_BUDGET_S = 0.004
NOT_AGAIN = (Submit, ListJobs, SetPreview, FreeMemory, Shutdown)
"""What the next engine is not asked for an engine that is gone: jobs are kept by themselves, the rest was worth something
then."""
TEXTURE, THUMBNAIL, CONFIG, CAMERA = "texture.png", "thumbnail.png", "config.json", "camera.json"


@dataclass
class Session:
    """One engine, own or remote, and everything asked of it."""

    launcher: Launcher
    table: JobTable
    settings: EngineSettings = EngineSettings()
    client: EngineClient | None = None
    problem: str = ""
    """One sentence about the connection; empty when all is well."""
    client_name: str = "Blender"
    file_takers: dict[tuple[str, str], Callable[[bytes], None]] = field(default_factory=dict)
    """What to do with a result file, such as a GLB, by job and part."""
    elevation: ElevationGuess | Error | None = None
    """The newest answer to a `GuessElevation`, until someone takes it."""
    wants_engine: bool = False
    """Someone wants it to run; it is started again when it crashes."""
    is_listed: bool = False
    """This engine has told of all its jobs: what it has not named it does not have."""
    _is_by_person: bool = False
    _found_since: float | None = None
    _last_words: tuple = ()
    _unsent: dict[str, Submit] = field(default_factory=dict)
    """Jobs the engine has not confirmed yet; sent again to a new engine."""
    _queue: list[Any] = field(default_factory=list)
    """Requests for when a connection is there."""
    _asked: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # They may be hundreds of megabytes: until a thread has read them nothing is connected.
        self._kept: Future | None = in_thread(self.table.unsent)

    # What is asked of it

    def want(self, by_person: bool = False) -> None:
        """Have an engine running and connected, soon."""
        self.wants_engine = True
        self._is_by_person = self._is_by_person or by_person
        if by_person:
            self.problem = ""

    def submit(self, request: Submit, notes: Notes) -> Job:
        """Send a job; it is kept until the engine has confirmed it."""
        job = self.table.jobs.get(notes.job) or self.table.add(notes)
        if not self.table.is_kept(request.job):
            self.table.keep_request(request)
        self._unsent[request.job] = request
        if self.client is not None:
            self._send(request)
        self.want()
        return job

    def ask(self, request: Any) -> None:
        """Send any other request now, or as soon as the engine is there."""
        self.want()
        if self.client is not None:
            self._send(request)
        else:
            self._queue.append(request)

    def tell(self, request: Any) -> None:
        """Send a request that is only worth something now, such as a preview camera."""
        if self.client is not None and self.client.state == READY:
            self._send(request)

    def fetch(self, job: Job) -> None:
        """Ask for the newest result's arrays, once."""
        if job.fetching != job.result_number:
            job.fetching = job.result_number
            job.result, job.texture = None, b""
            if job.state is not None and TEXTURE in job.state.parts:
                self.ask(Fetch(job.id, TEXTURE))
            self.ask(Fetch(job.id, ARRAYS))

    def forget(self, job: Job) -> None:
        """Remove an ended job and its files, or one that the engine has not confirmed yet."""
        if job.state is None:
            was_sent = self._unsent.pop(job.id, None) is not None and self.client is not None
            self.table.remove(job.id)
            if was_sent:
                # It may be on its way: it then comes back as a cancelled one.
                self.ask(Cancel(job.id))
        else:
            self.ask(Forget(job.id))

    def free_memory(self, pause_jobs: bool) -> None:
        self.tell(FreeMemory(pause_jobs))

    def stop(self) -> None:
        """Shut the own engine down politely, or let go of another one."""
        self.wants_engine, self._found_since = False, None
        if self.client is not None and self.launcher.is_running:
            try:
                self._send(Shutdown())
                return self.launcher.ask_to_stop()
            except EngineUnavailable:
                pass
        self._drop_client()
        self._give_up()
        if self.launcher.is_running and self.launcher.child is not None:
            self.launcher.child.terminate()

    def end(self) -> None:
        """Let go of everything now: the add-on is switched off or Blender quits."""
        self._drop_client()
        self.launcher.end()

    # What it answers

    @property
    def is_connected(self) -> bool:
        return self.client is not None and self.client.state == READY

    @property
    def status(self) -> Status | None:
        return self.client.status if self.client is not None else None

    @property
    def state(self) -> State:
        if self.client is not None and self.client.welcome is not None:
            if self.client.state == NOT_RESPONDING:
                return State.NOT_RESPONDING
            if self.client.state == READY:
                return State.BUSY if self.status and self.status.n_running else State.READY
        if self.problem and not self.launcher.is_running:
            return State.CRASHED
        if self.launcher.is_running or self.client is not None:
            return State.STARTING
        if self.launcher.exit_code is not None:
            return State.CRASHED
        return State.STOPPED if self.settings.python or self.settings.is_remote else State.NOT_SET_UP

    def state_line(self) -> str:
        """State, device and free memory, or what is wrong, in one line."""
        if self.state is State.CRASHED:
            return self.problem or self.launcher.crash_report(1).splitlines()[0]
        return " - ".join([self.state.value, *self.details()])

    def details(self) -> list[str]:
        """Device, free memory and what the worker does, of an engine that answers."""
        if self.status is None or self.state not in (State.READY, State.BUSY):
            return []
        kind, _, name = self.status.device.partition(": ")
        # The name of a processor tells an artist nothing.
        words = ["CPU" if kind == "cpu" else name or kind] if kind else []
        if self.status.total_memory_bytes:
            words.append(f"{self.status.free_memory_bytes / 2**30:.1f} GB free")
        if self.status.workers in ("starting", "stopped", "crashed"):
            words.append({"starting": "loading", "stopped": "memory freed"}.get(self.status.workers, "worker lost"))
        return words

    def poll(self, now: float | None = None) -> list[Event]:
        """Go on: a few milliseconds, whatever happens.

        Returns:
            What the user interface should react to.
        """
        now = time.monotonic() if now is None else now
        events: list[Event] = []
        if self._kept is not None and self._kept.done():
            kept, self._kept = self._kept.result(), None
            # One that was removed meanwhile is not sent after all.
            self._unsent.update({job: kept[job] for job in kept if job in self.table.jobs})
        self._poll_process(now)
        if self.client is not None:
            try:
                messages = self.client.poll(budget_s=READ_BUDGET_S)
            except EngineUnavailable as error:
                messages, self.problem = [], str(error)
            for message in messages:
                events += self._take(message)
            if self.client.state == REFUSED:
                self._drop_client()
                self.wants_engine = False
                self._give_up()
        # After reading: Blender may have stood still for longer than an engine may be silent.
        if self._kept is None:
            self._connect(now)
        words = (self.state, self.state_line())
        if words != self._last_words:
            self._last_words = words
            events.append(Event("engine"))
        return events

    # How it does it

    def _poll_process(self, now: float) -> None:
        what = self.launcher.poll(now)
        if what == "announced" and self.launcher.announcement is not None:
            self._open(self.launcher.announcement)
        elif what == "ended":
            self._drop_client()
            # One that was asked to stop is wanted again only by what came after that.
            if self.launcher.exit_code is not None and not self.table.active:
                self.wants_engine = False
                self.problem = self.launcher.crash_report(1).splitlines()[0]
            if not self.wants_engine:
                self._give_up()

    def _connect(self, now: float) -> None:
        """Find an engine that runs, or start one, if one is wanted."""
        if not self.wants_engine or self.launcher.is_running:
            return
        if self.client is not None:
            if self.client.welcome is None and self._found_since is not None and now - self._found_since > FIND_FOR_S:
                # A connection file of an engine that is gone.
                self._drop_client()
                self._start(now)
            elif self.client.state == NOT_RESPONDING and self._found_since is not None and self.client.silence_s > 15:
                self._drop_client()
                self._start(now)
            return
        if self.settings.is_remote:
            return self._open_remote()
        found = self._found()
        if found is not None and self._found_since is None:
            self._found_since = now
            return self._open(found)
        self._start(now)

    def _found(self) -> Connection | None:
        if not self.settings.data_folder:
            return None
        try:
            return Connection.read(Path(self.settings.data_folder) / CONNECTION_FILE)
        except EngineUnavailable:
            return None

    def _start(self, now: float) -> None:
        self._found_since = None
        if not self.settings.python:
            self.wants_engine = False
            return
        try:
            self.launcher.start(self.settings.python, self.settings.arguments(), self._is_by_person, now)
            self._is_by_person, self.problem = False, ""
        except CannotStart as error:
            if "wait a moment" not in str(error):
                self.wants_engine = False
            self.problem = str(error)

    def _open_remote(self) -> None:
        try:
            keys = CurveKeys.load(Path(self.settings.server_key_file), Path(self.settings.client_key_file))
            self.client = EngineClient(self.settings.remote_endpoint, keys=keys, name=self.client_name)
            self._resend()
        except EngineUnavailable as error:
            self.problem, self.wants_engine = str(error), False

    def _open(self, connection: Connection) -> None:
        self._drop_client()
        try:
            self.client = EngineClient(connection.endpoint, connection.token, name=self.client_name)
            self._resend()
        except EngineUnavailable as error:
            self.problem = str(error)

    def _resend(self) -> None:
        requests, self._queue = [*self._unsent.values(), *self._queue], []
        for request in requests:
            self._send(request)

    def _send(self, request: Any) -> None:
        """Hand a request to the client; what the protocol does not allow is answered as the engine answers what it refuses."""
        assert self.client is not None
        try:
            self._asked[self.client.send(request)] = request
        except ProtocolError as error:
            self._take_error(Error("input", f"This cannot be sent: {error}"), request)

    def _drop_client(self) -> None:
        """Close the connection; what has no answer yet, such as a result on its way, the next engine is asked."""
        if self.client is not None:
            self.client.close()
            self.client = None
        self.is_listed = False
        self._queue[:0] = [request for request in self._asked.values() if not isinstance(request, NOT_AGAIN)]
        self._asked.clear()

    def _give_up(self) -> None:
        """No engine is wanted any more, so nothing is asked of one; results that are still wanted come with the next list."""
        self._queue.clear()
        self.file_takers.clear()
        for job in self.table.jobs.values():
            job.fetching = 0

    def _blame(self, job_id: str, text: str) -> None:
        job = self.table.jobs.get(job_id)
        if job is not None:
            job.problem = text
        else:
            self.problem = text

    def _take(self, message: Any) -> list[Event]:
        """What one message changes."""
        asked = self._asked.pop(message.request, None) if message.request else None
        match message:
            case Welcome():
                self.problem = ""
                self._found_since = None if self.launcher.is_running else self._found_since
                self.launcher.answered()
                self._send(ListJobs())
            case JobState():
                return self._take_state(message)
            case Progress():
                return [Event("job", message.job)] if self.table.take_progress(message) else []
            case Preview():
                return [Event("preview", message.job)] if self.table.take_preview(message) else []
            case Result():
                return self._take_result(message)
            case ResultFile():
                return self._take_file(message)
            case Forgotten():
                self.table.remove(message.job)
                return [Event("forgotten", message.job)]
            case ElevationGuess():
                self.elevation = message
                return [Event("elevation")]
            case Error():
                return self._take_error(message, asked)
            case Status():
                self.problem = message.problem if message.problem else self.problem
            case Listed():
                return self._take_end_of_list()
            case Accepted():
                pass
        return []

    def _take_state(self, state: JobState) -> list[Event]:
        if self._unsent.pop(state.job, None) is not None:
            self.table.confirmed(state.job)
        before = self.table.jobs.get(state.job)
        old_result = before.result_number if before is not None and before.state is not None else 0
        job = self.table.take_state(state)
        if state.result > old_result:
            for part in (THUMBNAIL, CONFIG, CAMERA):
                # A job that was sent without a camera learns the one that the engine took.
                if part in state.parts and not (part == CAMERA and job.notes.setup):
                    self._send(Fetch(job.id, part))
        return [Event("job", job.id)]

    def _take_end_of_list(self) -> list[Event]:
        """Everything the engine has was told: jobs it has not are not its jobs."""
        assert self.client is not None
        self.is_listed = True
        lost = [j for j in self.table.jobs.values() if j.is_remembered and j.state is None and j.id not in self._unsent]
        for job in lost:
            job.is_unknown = job.id not in self.client.jobs
        for job in self.table.jobs.values():
            if job.wants_import and job.result_number and not is_whole(job):
                self.fetch(job)
        return [Event("job", job.id) for job in lost]

    def _take_result(self, result: Result) -> list[Event]:
        job = self.table.jobs.get(result.job)
        if job is None or not job.wants_import:
            return []
        job.result = result
        return self._arrived(job)

    def _arrived(self, job: Job) -> list[Event]:
        """The event of a result that is here with everything that belongs to it."""
        return [Event("result", job.id)] if job.wants_import and is_whole(job) else []

    def _take_file(self, file: ResultFile) -> list[Event]:
        job = self.table.jobs.get(file.job)
        if job is None:
            return []
        if file.part == THUMBNAIL:
            job.thumbnail = bytes(file.data)
            return [Event("thumbnail", job.id)]
        if file.part == CONFIG:
            job.config = bytes(file.data).decode("utf-8", "replace")
        if file.part == CAMERA:
            job.notes.setup = _read_setup(bytes(file.data))
            self.table.save(job.notes)
        if file.part == TEXTURE:
            job.texture = bytes(file.data)
            return self._arrived(job)
        return [Event("file", job.id)] if self._keep_file(file) else []

    def _keep_file(self, file: ResultFile) -> bool:
        """Hand a file to whoever waits for it."""
        taker = self.file_takers.pop((file.job, file.part), None)
        if taker is not None:
            taker(bytes(file.data))
        return taker is not None

    def _take_error(self, error: Error, asked: Any) -> list[Event]:
        if isinstance(asked, GuessElevation):
            self.elevation = error
            return [Event("elevation")]
        job_id = error.job or getattr(asked, "job", "")
        job = self.table.jobs.get(job_id)
        if isinstance(asked, Forget) and error.code == "unknown_job":
            self.table.remove(job_id)
            return [Event("forgotten", job_id)]
        if isinstance(asked, Submit):
            self._unsent.pop(job_id, None)
            self.table.confirmed(job_id)
            if job is not None:
                # A job that was refused has no other state than this one.
                job.state = JobState(job_id, 0, "failed", job.name, error_code=error.code, error_message=error.message)
        if job is not None and isinstance(asked, Fetch):
            job.fetching = 0
            job.wants_import = job.wants_import and asked.part != ARRAYS
        self._blame(job_id, error.message)
        return [Event("job", job_id) if job is not None else Event("engine")]


def _read_setup(data: bytes) -> dict:
    """A camera set-up from its file; nothing if it is not one, because the object does not depend on it."""
    try:
        setup = json.loads(data)
    except ValueError:
        return {}
    return setup if is_setup(setup) else {}


def is_whole(job: Job) -> bool:
    """Whether a result has arrived with everything that belongs to it."""
    needs_texture = job.state is not None and TEXTURE in job.state.parts
    return job.result is not None and bool(job.texture or not needs_texture)


def with_result_wanted(session: Session, job: Job) -> None:
    """Bring a job's newest result into the scene when it arrives."""
    job.wants_import, job.problem = True, ""
    session.fetch(job)
