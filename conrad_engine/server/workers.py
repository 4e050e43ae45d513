"""Worker processes: started, watched, ended, started again. They do the jobs; torch lives only there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

from .process import child_environment, log_tail, python_command, start_child
from .worker_messages import Guess, Quit, Run, Steer, WorkerReady

log = logging.getLogger("conrad.server")

STARTING, IDLE, BUSY, ENDED = "starting", "idle", "busy", "ended"

SILENCE_LIMIT_S = 120.0
"""A worker that has not been heard for this long, whatever its job does, is killed."""
RESTART_DELAYS_S = (0.0, 1.0, 5.0, 15.0, 60.0)
"""Before a worker that has failed n times without having been ready in between is started again."""
MAX_LOG_BYTES = 5_000_000
SECRET_VARIABLE = "CONRAD_WORKER_SECRET"


MAX_DEVICES = 64
"""More GPUs than this are a mistake of the worker's report, not a machine."""


@dataclass(frozen=True)
class Lost:
    """A job whose worker has ended."""

    job: str
    reason: str
    is_fatal: bool
    """The job itself is to blame; another try would end the same way."""


@dataclass
class Worker:
    """One worker and the process it has at the moment, if any."""

    number: int
    device: str
    """auto or a torch device."""
    state: str = ENDED
    job: str | None = None
    process: Popen | None = None
    generation: int = 0
    heard_s: float = 0.0
    failures: int = 0
    restart_at_s: float = 0.0
    is_wanted: bool = True
    """False after its memory was freed, until a job needs it."""
    deadline_s: float | None = None
    """When it is killed unless it does what it was told: a cancel, or decoding a picture."""
    deadline_reason: str = ""
    is_deadline_fatal: bool = False
    """Missing it is the job's own fault."""
    killed_for: str = ""
    """Why this process was killed by us; empty while it was not."""
    ready: WorkerReady | None = None

    @property
    def route(self) -> bytes:
        return f"worker-{self.number}-{self.generation}".encode()


class Workers:
    """All workers of this engine.

    Args:
        devices: One worker is started for each; ("auto",) finds out how many GPUs there are.
        endpoint, secret: Where a worker connects, and how it proves that it is one.
        pipeline: Module with `generate` and `Job`.
        folder: The data folder: logs, and an empty folder to work in.
        send: Sends a message to a worker's route.
    """

    def __init__(
        self,
        devices: tuple[str, ...],
        endpoint: str,
        secret: str,
        pipeline: str,
        folder: Path,
        send: Callable[[bytes, Any], bool],
    ) -> None:
        self._workers = [Worker(number, device) for number, device in enumerate(devices)]
        self._arguments = ["--endpoint", endpoint, "--pipeline", pipeline]
        self._secret = secret
        self._folder = folder
        self._send = send

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers)

    def __len__(self) -> int:
        return len(self._workers)

    def by_route(self, route: bytes) -> Worker | None:
        return next((w for w in self._workers if w.route == route and w.state != ENDED), None)

    def of_job(self, job: str) -> Worker | None:
        return next((w for w in self._workers if w.job == job), None)

    def idle(self) -> Worker | None:
        return next((w for w in self._workers if w.state == IDLE), None)

    @property
    def state(self) -> str:
        """In one word, for `Status`."""
        states = {worker.state for worker in self._workers}
        if BUSY in states:
            return "busy"
        if IDLE in states:
            return "ready"
        if not any(worker.is_wanted for worker in self._workers):
            return "stopped"
        return "crashed" if all(worker.failures >= 3 for worker in self._workers) else "starting"

    @property
    def problem(self) -> str:
        """Why no worker gets ready; empty while that is not so."""
        if self.state != "crashed":
            return ""
        return f"the worker process does not start; the end of its log: {log_tail(self._log(self._workers[0]))}"

    @property
    def are_at_work(self) -> bool:
        return any(worker.job is not None for worker in self._workers)

    def tell(self, worker: Worker, message: Any) -> None:
        self._send(worker.route, message)

    def stop_jobs(self) -> None:
        """Have every job at work save its checkpoint and stop."""
        for worker in self._workers:
            if worker.job is not None:
                self.tell(worker, Steer(worker.job, "cancel"))

    def wake(self) -> None:
        """A job waits: start the workers whose memory was freed."""
        for worker in self._workers:
            worker.is_wanted = True

    def run(self, worker: Worker, run: Run) -> None:
        worker.state, worker.job = BUSY, run.job
        self.expect_nothing(worker)
        self.tell(worker, run)

    def guess(self, worker: Worker, guess: Guess, within_s: float) -> None:
        """Have an idle worker estimate an elevation; it is killed if that takes longer."""
        worker.state = BUSY
        self.tell(worker, guess)
        self.expect(worker, within_s, f"an elevation took longer than {within_s:g} s to estimate")

    def became_ready(self, worker: Worker, ready: WorkerReady) -> None:
        """A worker says that it can take a job; the first one also says how many GPUs there are."""
        worker.state, worker.job = IDLE, None
        self.expect_nothing(worker)
        worker.ready, worker.failures = ready, 0
        if worker.device == "auto" and ready.n_devices > 1:
            worker.device = "cuda:0"
            self._workers += [
                Worker(number, f"cuda:{number}") for number in range(1, min(ready.n_devices, MAX_DEVICES))
            ]

    def end(self, worker: Worker) -> None:
        """End an idle or starting worker until a job needs it."""
        worker.is_wanted = False
        self.tell(worker, Quit())
        self.expect(worker, 3.0, "it did not quit")

    def abandon(self, worker: Worker) -> None:
        """Kill a worker at work, until a job needs it; its job has been taken off it."""
        worker.job, worker.is_wanted = None, False
        if worker.process is not None:
            worker.process.kill()

    def expect(self, worker: Worker, within_s: float, reason: str, is_fatal: bool = False) -> None:
        """Kill the worker unless `expect_nothing` is called in time."""
        worker.deadline_s, worker.deadline_reason = time.monotonic() + within_s, reason
        worker.is_deadline_fatal = is_fatal

    def expect_nothing(self, worker: Worker) -> None:
        worker.deadline_s, worker.deadline_reason, worker.is_deadline_fatal = None, "", False

    def poll(self, may_start: bool) -> list[Lost]:
        """Start, kill and collect processes; the jobs that lost their worker are returned."""
        now_s = time.monotonic()
        lost = []
        for worker in self._workers:
            if worker.process is None:
                if may_start and worker.is_wanted and now_s >= worker.restart_at_s:
                    self._start(worker)
                continue
            if worker.deadline_s is not None and now_s > worker.deadline_s:
                log.warning("worker %d is killed: %s", worker.number, worker.deadline_reason)
                worker.killed_for = worker.deadline_reason
                worker.process.kill()
            elif now_s - worker.heard_s > SILENCE_LIMIT_S:
                worker.killed_for = f"it was not heard for {SILENCE_LIMIT_S:g} s"
                worker.process.kill()
            if worker.process.poll() is not None:
                lost += self._collect(worker, now_s)
        return lost

    def close(self, within_s: float = 3.0) -> None:
        """End all processes."""
        for worker in self._workers:
            if worker.process is not None and worker.process.stdin is not None:
                worker.process.stdin.close()
        end_s = time.monotonic() + within_s
        for worker in self._workers:
            if worker.process is None:
                continue
            try:
                worker.process.wait(max(0.0, end_s - time.monotonic()))
            except TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def _log(self, worker: Worker) -> Path:
        return self._folder / f"worker-{worker.number}.log"

    def _start(self, worker: Worker) -> None:
        path = self._log(worker)
        if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
            path.replace(path.with_suffix(".old.log"))
        worker.generation += 1
        worker.state, worker.job, worker.heard_s = STARTING, None, time.monotonic()
        worker.killed_for = ""
        self.expect_nothing(worker)
        command = [*python_command("conrad_engine.server.worker"), *self._arguments]
        command += ["--device", worker.device, "--name", worker.route.decode()]
        environment = child_environment({SECRET_VARIABLE: self._secret})
        try:
            worker.process = start_child(command, environment, path, self._folder / "empty")
        except OSError as error:
            log.error("worker %d cannot be started: %s", worker.number, error)
            self._failed(worker, time.monotonic())

    def _collect(self, worker: Worker, now_s: float) -> list[Lost]:
        """The process has ended: forget it, and name the job it leaves behind."""
        assert worker.process is not None
        code, job = worker.process.returncode, worker.job
        reason = worker.killed_for or f"the process ended with code {code}"
        if worker.process.stdin is not None:
            worker.process.stdin.close()
        if worker.is_wanted:
            log.warning("worker %d was lost: %s", worker.number, reason)
            self._failed(worker, now_s)
        worker.process, worker.job, worker.ready, worker.state = None, None, None, ENDED
        # A process that ends for another reason while a deadline runs has missed nothing.
        return [] if job is None else [Lost(job, reason, bool(worker.killed_for) and worker.is_deadline_fatal)]

    def _failed(self, worker: Worker, now_s: float) -> None:
        worker.restart_at_s = now_s + RESTART_DELAYS_S[min(worker.failures, len(RESTART_DELAYS_S) - 1)]
        worker.failures += 1
