"""What requests and workers do to jobs: the queue changes, the change is kept, everyone is told.

No sockets here. `server` brings decoded messages; answers leave through `clients`, orders through `workers`.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from typing import Any

from ..errors import ConradError
from ..protocol import (
    ARRAYS,
    FINAL_STATES,
    QUEUED,
    RESULT_FILES,
    RUNNING,
    Accepted,
    Ack,
    Cancel,
    Continue,
    Error,
    Extract,
    Fetch,
    Forget,
    Forgotten,
    FreeMemory,
    GuessElevation,
    JobState,
    Keep,
    Listed,
    ListJobs,
    Pause,
    Ping,
    Preview,
    Progress,
    Resume,
    SetPreview,
    Shutdown,
    Status,
    Submit,
)
from .clients import Client, Clients
from .file_thread import FileThread
from .guesses import Busy, Guesses
from .job_queue import CANCEL, Job, JobQueue, StateError
from .requests import check_view, continue_changes, extract_changes, pipeline_config, settings_of
from .store import DiskFull, NoResult, Store
from .worker_messages import DONE, STOPPED, Ended, Guessed, Run, Steer, View, Warned, WorkerPreview, WorkerReady
from .workers import Lost, Worker, Workers

log = logging.getLogger("conrad.server")

MAX_ARRIVING_BYTES = 1024**3
"""Pictures that may be on their way to the disk at once."""
MAX_PREVIEW_SIDE = 2048
CANCEL_LIMIT_S = 20.0
"""A worker that has not obeyed a cancel by then is killed."""
DECODE_LIMIT_S = 30.0
"""A picture that takes longer to decode is refused."""

OPTIMIZING = "optimize"
"""The stage whose steps are those of the job."""


class Dispatch:
    """The jobs of one engine."""

    def __init__(
        self, store: Store, files: FileThread, clients: Clients, workers: Workers, stop: Callable[[], None]
    ) -> None:
        self._store = store
        self._files = files
        self._clients = clients
        self._workers = workers
        self._stop = stop
        self._queue = JobQueue(store.load())
        self._guesses = Guesses(clients, workers)
        self._arriving: dict[str, list[tuple[bytes, int]]] = {}
        self._arriving_bytes = 0
        self._early: dict[str, list[tuple[Client, Any]]] = {}
        """Requests about jobs that are still arriving."""
        self._unsaved: dict[str, Job] = {}
        self._views: dict[str, dict[int, SetPreview]] = {}
        self._progressed_s: dict[str, float] = {}
        self._preview_numbers = itertools.count(1)
        for job in self._queue:
            self._save(job)
        known = {job.id for job in self._queue}
        self._files.do(lambda: store.sweep(known))

    @property
    def is_idle(self) -> bool:
        return not self._arriving and self._queue.is_idle()

    # What clients ask for.

    def list_jobs(self, client: Client, request: int = 0) -> None:
        jobs = list(self._queue)
        for job in jobs:
            client.tell(self._state(job, request))
        self._clients.tell(client.route, Listed(len(jobs), request))

    def on_request(self, client: Client, message: Any) -> None:
        """Do what a client asks for, and answer."""
        job_id = getattr(message, "job", "")
        if job_id in self._arriving and not isinstance(message, (Submit, Ack)):
            self._early.setdefault(job_id, []).append((client, message))
            return
        try:
            self._do(client, message)
        except ConradError as error:
            self._clients.tell(client.route, Error(error.code, str(error)[:2000], job_id, message.request))

    def _do(self, client: Client, message: Any) -> None:
        match message:
            case Ack():
                self._clients.acknowledge(client, message)
            case Ping():
                self._clients.tell(client.route, self.status(message.request))
            case Submit():
                self._submit(client, message)
            case Fetch():
                self._fetch(client, message)
            case ListJobs():
                self.list_jobs(client, message.request)
            case GuessElevation():
                self._guesses.ask(client.route, message)
            case Forget():
                self._forget(message.job)
                self._clients.tell(client.route, Forgotten(message.job, message.request))
            case _:
                self._order(client, message)
                self._clients.tell(client.route, Accepted(message.request, getattr(message, "job", "")))

    def _order(self, client: Client, message: Any) -> None:
        """What is answered by `Accepted`."""
        match message:
            case Pause() | Resume() | Cancel() | Keep() | Extract() | Continue():
                self._steer(message)
            case SetPreview():
                self._set_preview(client, message)
            case FreeMemory():
                self._free_memory(message.pause_jobs)
            case Shutdown():
                self._stop()
            case _:
                raise StateError("this is a message of the engine, not of a client")

    def _submit(self, client: Client, submit: Submit) -> None:
        if submit.job in self._queue:
            self._clients.tell(client.route, Accepted(submit.request, submit.job))
            return
        if submit.job in self._arriving:
            self._arriving[submit.job].append((client.route, submit.request))
            return
        settings = settings_of(submit)
        n_bytes = submit_bytes(submit)
        if self._arriving_bytes + n_bytes > MAX_ARRIVING_BYTES:
            raise Busy("many pictures are arriving; send this one again in a moment")
        self._arriving[submit.job] = [(client.route, submit.request)]
        self._arriving_bytes += n_bytes

        def stored(outcome: Any) -> None:
            self._arriving_bytes -= n_bytes
            self._arrived(submit, settings, outcome)
            for early_client, message in self._early.pop(submit.job, []):
                self.on_request(early_client, message)

        self._files.do(lambda: self._store.put_inputs(submit), stored)

    def _arrived(self, submit: Submit, settings: dict, outcome: Any) -> None:
        """A job's inputs are on the disk, or could not be written."""
        askers = self._arriving.pop(submit.job)
        job = Job(submit.job, self._queue.next_order(), settings, submit.name, submit.priority)
        job = self._queue.add(job, time.time())
        try:
            if isinstance(outcome, Exception):
                raise outcome
            self._store.save(job)
        except Exception as error:  # Whatever kept it from being stored: who sent the job must hear of it.
            log.error("job %s cannot be stored: %r", job.id, error)
            self._queue.remove(job.id)
            self._files.do(lambda: self._store.discard(job.id))
            for route, request in askers:
                self._clients.tell(route, Error(getattr(error, "code", "internal"), str(error), job.id, request))
            return
        # The state first: whoever is told that a job is accepted knows the job.
        self._clients.tell_all(self._state(job))
        for route, request in askers:
            self._clients.tell(route, Accepted(request, job.id))

    def _steer(self, message: Any) -> None:
        before = self._queue[message.job]
        match message:
            case Pause():
                job = self._queue.pause(before.id)
            case Resume():
                job = self._queue.resume(before.id)
            case Cancel():
                job = self._queue.cancel(before.id)
            case Keep():
                job = self._queue.keep(before.id)
            case Extract():
                job = self._queue.extract(before.id, extract_changes(message, before.settings))
            case Continue():
                job = self._queue.continue_(before.id, continue_changes(message.n_steps, before.settings))
        worker = self._workers.of_job(job.id)
        if worker is not None:
            self._workers.tell(worker, Steer(job.id, job.wanted))
            if job.command == CANCEL:
                self._workers.expect(worker, CANCEL_LIMIT_S, "its job did not stop when it was cancelled")
        if job is not before:
            self._changed(job)

    def _fetch(self, client: Client, fetch: Fetch) -> None:
        job = self._queue[fetch.job]
        if fetch.part != ARRAYS and fetch.part not in RESULT_FILES:
            raise NoResult(f"a result has no {fetch.part[:40]!r}: ask for {ARRAYS}, {', '.join(RESULT_FILES)}")
        if not job.result:
            raise NoResult(f"{job.label} has no result yet: it is {job.state}")

        def read(outcome: Any) -> None:
            if isinstance(outcome, Exception):
                outcome = Error(getattr(outcome, "code", "internal"), str(outcome), fetch.job, fetch.request)
            self._clients.tell(client.route, outcome)

        self._files.do(lambda: self._store.read_part(job.id, job.result, fetch.part, fetch.request), read)

    def _forget(self, job_id: str) -> None:
        self._queue.check_forgettable(job_id)
        self._store.remove(job_id)
        self._queue.remove(job_id)
        self._unsaved.pop(job_id, None)
        self._views.pop(job_id, None)
        self._files.do(lambda: self._store.discard(job_id))
        self._clients.tell_all(Forgotten(job_id))

    def _set_preview(self, client: Client, message: SetPreview) -> None:
        job = self._queue[message.job]
        check_view(message.c2w, message.intrinsics, message.width, message.height, MAX_PREVIEW_SIDE)
        views = self._views.setdefault(job.id, {})
        views[client.number] = message
        if not message.is_on:
            del views[client.number]
        worker = self._workers.of_job(job.id)
        if worker is not None:
            self._workers.tell(worker, _view(client.number, message))

    def _free_memory(self, pause_jobs: bool) -> None:
        at_work = [worker for worker in self._workers if worker.job is not None]
        if at_work and not pause_jobs:
            raise Busy(f"{len(at_work)} job(s) are at work; wait for them, or free the memory with their pause")
        for worker in self._workers:
            if worker.job is not None:
                self._changed(self._queue.hold(worker.job))
                self._workers.abandon(worker)
            else:
                self._workers.end(worker)

    def forget_client(self, client: Client) -> None:
        """A client is gone: nobody looks at its views any more."""
        for job_id, views in self._views.items():
            worker = self._workers.of_job(job_id)
            if views.pop(client.number, None) is not None and worker is not None:
                self._workers.tell(worker, View(job_id, client.number, False))

    # What workers say.

    def on_worker(self, worker: Worker, message: Any) -> None:
        if getattr(message, "job", worker.job) != worker.job:
            return  # It was taken off this job meanwhile.
        match message:
            case WorkerReady():
                self._workers.became_ready(worker, message)
            case Progress():
                self._on_progress(worker, message)
            case WorkerPreview():
                self._on_preview(message)
            case Warned():
                self._changed(self._queue.warn(message.job, message.message))
            case Ended():
                self._on_ended(worker, message)
            case Guessed():
                self._guesses.answered(worker, message)

    def _on_progress(self, worker: Worker, progress: Progress) -> None:
        job = self._queue[progress.job]
        if job.command != CANCEL:
            self._workers.expect_nothing(worker)
            if progress.stage == "decode":
                reason = f"the picture took longer than {DECODE_LIMIT_S:g} s to decode"
                self._workers.expect(worker, DECODE_LIMIT_S, reason, is_fatal=True)
        now_s = time.monotonic()
        passed_s = now_s - self._progressed_s.get(job.id, now_s) if job.state == RUNNING else 0.0
        self._progressed_s[job.id] = now_s
        # The other stages count for themselves; how far the job is has not changed.
        is_optimizing = progress.stage == OPTIMIZING
        step, n_steps = (progress.step, progress.n_steps) if is_optimizing else (job.step, job.n_steps)
        self._queue.progressed(job.id, step, n_steps, job.elapsed_s + passed_s)
        for client in self._clients:
            self._clients.offer(client, progress)

    def _on_preview(self, seen: WorkerPreview) -> None:
        client = self._clients.numbered(seen.view)
        if client is not None:
            number = next(self._preview_numbers)
            preview = Preview(seen.job, number, seen.step, seen.rgb, seen.serial, seen.c2w, seen.intrinsics)
            self._clients.offer(client, preview)

    def _on_ended(self, worker: Worker, ended: Ended) -> None:
        worker.job = None
        self._workers.expect_nothing(worker)
        self._progressed_s.pop(ended.job, None)
        if ended.outcome == DONE:
            self._changed(self._queue.finish(ended.job, ended.result, ended.parts, dict(ended.metrics)))
            self._files.do(lambda: self._store.discard_results_before(ended.job, ended.result))
        elif ended.outcome != STOPPED:
            self._changed(self._queue.fail(ended.job, ended.code, ended.message, ended.hint))
        elif self._queue[ended.job].command == CANCEL:
            self._changed(self._queue.stopped(ended.job))
        # Else it was stopped because the engine ends, and is still running as far as the next start is concerned.

    # What happens by itself.

    def schedule(self) -> None:
        """Give questions and queued jobs to idle workers."""
        self._guesses.schedule()
        while (job := self._queue.next_queued()) is not None:
            self._workers.wake()
            worker = self._workers.idle()
            if worker is None:
                return
            settings = {name: value for name, value in job.settings.items() if name != "resolved"}
            try:
                pipeline_config(settings)
            except ConradError as error:
                # It was accepted by another version of the engine, whose settings had other names.
                self._changed(self._queue.fail(job.id, error.code, str(error)))
                continue
            folder = str(self._store.job_folder(job.id))
            job = self._queue.start(job.id, worker.number)
            self._workers.run(
                worker, Run(job.id, folder, worker.device, job.result + 1, job.wanted, job.name, **settings)
            )
            for number, view in self._views.get(job.id, {}).items():
                self._workers.tell(worker, _view(number, view))
            self._changed(job)

    def on_lost(self, lost: Lost) -> None:
        """A job's worker process has ended."""
        self._progressed_s.pop(lost.job, None)
        if lost.is_fatal and self._queue[lost.job].command != CANCEL:
            self._changed(self._queue.fail(lost.job, "timeout", lost.reason))
        else:
            self._changed(self._queue.worker_lost(lost.job, lost.reason))

    def save_progress(self) -> None:
        """Keep how far the jobs at work are: no change that anyone is told, but the next start should know it."""
        for job in self._queue:
            if job.state == RUNNING:
                self._save(job)

    def save_again(self) -> None:
        """Try to keep what did not fit on the disk."""
        for job in list(self._unsaved.values()):
            self._save(job)

    def status(self, request: int = 0) -> Status:
        ready = [worker.ready for worker in self._workers if worker.ready is not None]
        problem = "the engine's disk is full: free some space in its data folder" if self._unsaved else ""
        return Status(
            workers=self._workers.state,
            device=ready[0].device if ready else "",
            free_memory_bytes=sum(r.free_memory_bytes for r in ready),
            total_memory_bytes=sum(r.total_memory_bytes for r in ready),
            guidances=ready[0].guidances if ready else (),
            n_workers=len(self._workers),
            n_running=self._queue.count(RUNNING),
            n_queued=self._queue.count(QUEUED),
            problem=problem or self._workers.problem,
            request=request,
        )

    def _changed(self, job: Job) -> None:
        """Keep a change and tell it to everyone."""
        self._save(job)
        if job.state in FINAL_STATES:
            log.info("job %s is %s %s", job.id, job.state, job.error_code)
        self._clients.tell_all(self._state(job))

    def _save(self, job: Job) -> None:
        try:
            self._store.save(job)
            self._unsaved.pop(job.id, None)
        except DiskFull as error:
            if job.id not in self._unsaved:
                log.error("%s", error)
            self._unsaved[job.id] = job

    def _state(self, job: Job, request: int = 0) -> JobState:
        return JobState(
            job=job.id,
            revision=job.revision,
            state=job.state,
            name=job.name,
            command=job.command,
            priority=job.priority,
            position=self._queue.position(job),
            created_unix_s=job.created_unix_s,
            elapsed_s=job.elapsed_s,
            step=job.step,
            n_steps=job.n_steps,
            **job.settings["resolved"],
            result=job.result,
            parts=job.parts,
            metrics=job.metrics,
            warnings=job.warnings,
            error_code=job.error_code,
            error_message=job.error_message,
            error_hint=job.error_hint,
            request=request,
        )


def submit_bytes(submit: Submit) -> int:
    """Size of what came with a job."""
    values = (getattr(submit, name) for name in submit.__dataclass_fields__)
    return sum(
        value.n_bytes if hasattr(value, "n_bytes") else len(value)
        for value in values
        if hasattr(value, "n_bytes") or isinstance(value, (bytes, memoryview))
    )


def _view(number: int, view: SetPreview) -> View:
    return View(view.job, number, view.is_on, view.serial, view.c2w, view.intrinsics, view.width, view.height)
