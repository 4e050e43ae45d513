"""Jobs, their states, and every transition between them. Pure: no sockets, files, processes or clocks.

    queued ──start──► running ──finish──► done
      ▲ │ ▲             │ ▲ │
      │ │ └─worker lost─┘ │ ├──fail────► failed ──────┐
      │ │               pause/resume                  │ resume, keep, extract, continue
      │ └──pause──► paused◄┘                          │ (from done, failed, cancelled)
      │               └─ cancel ──► cancelled ────────┤
      └───────────────────────────────────────────────┘

A job with a worker is cancelled by a command to it (`command`), one without at once. A job whose worker dies is queued
again and goes on from its checkpoint, unless it has killed too many workers at the same place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ..errors import ConradError
from ..protocol import CANCELLED, DONE, FAILED, FINAL_STATES, PAUSED, QUEUED, RUNNING

KEEP, CANCEL = "keep", "cancel"
MAX_WARNINGS, MAX_WARNING, MAX_REASON = 10, 500, 2000
"""Number and characters of what a job tells people: all of it must fit into the header of one message, in any script."""
MAX_DEATHS = 5
"""Workers that a job may lose without getting any further before it is given up."""


class StateError(ConradError):
    """The request does not fit the job's state."""

    code = "state"


class UnknownJob(ConradError):
    """No job has this id."""

    code = "unknown_job"


@dataclass(frozen=True)
class Job:
    """One job. All but `worker` and `deaths` outlives the process."""

    id: str
    order: int
    """Counts submissions; jobs of one priority are done in this order."""
    settings: dict
    """See `requests.settings_of`."""
    name: str = ""
    priority: int = 0
    state: str = QUEUED
    command: str = ""
    """keep or cancel, asked for and not done yet."""
    revision: int = 1
    created_unix_s: float = 0.0
    elapsed_s: float = 0.0
    step: int = 0
    n_steps: int = 0
    result: int = 0
    parts: tuple[str, ...] = ()
    metrics: dict = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error_code: str = ""
    error_message: str = ""
    error_hint: str = ""
    worker: int | None = None
    """The worker it is on; a paused job may have one or not."""
    deaths: int = 0
    """Workers lost in a row without passing `death_step`."""
    death_step: int = -1

    @property
    def wanted(self) -> str:
        """What its worker should do with it: run, pause, keep or cancel."""
        return self.command or ("pause" if self.state == PAUSED else "run")

    @property
    def label(self) -> str:
        """How messages to people call it."""
        return f"job {self.name!r}" if self.name else f"job {self.id[:8]}"


class JobQueue:
    """All jobs. Every method that changes one returns it with a higher revision, or as it was if nothing changed."""

    def __init__(self, jobs: Iterable[Job] = ()) -> None:
        self._jobs: dict[str, Job] = {}
        for job in sorted(jobs, key=lambda job: job.order):
            self._jobs[job.id] = self._restarted(job)

    def __iter__(self) -> Iterable[Job]:
        return iter(self._jobs.values())

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._jobs

    def __getitem__(self, job_id: str) -> Job:
        if job_id not in self._jobs:
            raise UnknownJob(f"the engine knows no job {job_id[:32]!r}; it may have been forgotten")
        return self._jobs[job_id]

    def count(self, state: str) -> int:
        return sum(job.state == state for job in self._jobs.values())

    def is_idle(self) -> bool:
        """Nothing is to be done: no job is queued or has a worker."""
        return not any(job.state in (QUEUED, RUNNING) or job.worker is not None for job in self._jobs.values())

    def position(self, job: Job) -> int:
        """Jobs that come before this one; 0 for the next one and for jobs that do not wait."""
        if job.state != QUEUED:
            return 0
        return sum(other.state == QUEUED and _rank(other) < _rank(job) for other in self._jobs.values())

    def next_queued(self) -> Job | None:
        """The job that the next free worker gets: highest priority, then first come."""
        return min((job for job in self._jobs.values() if job.state == QUEUED), key=_rank, default=None)

    def next_order(self) -> int:
        return 1 + max((job.order for job in self._jobs.values()), default=0)

    def add(self, job: Job, created_unix_s: float) -> Job:
        self._jobs[job.id] = replace(job, created_unix_s=created_unix_s)
        return self._jobs[job.id]

    def start(self, job_id: str, worker: int) -> Job:
        return self._change(self[job_id], state=RUNNING, worker=worker)

    def pause(self, job_id: str) -> Job:
        job = self[job_id]
        if job.state == PAUSED:
            return job
        self._require(job.state in (QUEUED, RUNNING) and not job.command, job, "paused", "it is not running or queued")
        return self._change(job, state=PAUSED)

    def resume(self, job_id: str) -> Job:
        job = self[job_id]
        if job.state in (QUEUED, RUNNING):
            return job
        if job.state == PAUSED:
            return self._change(job, state=QUEUED if job.worker is None else RUNNING)
        self._require(job.state != DONE, job, "resumed", "it is done; continue it with more steps")
        return self._requeue(job)

    def cancel(self, job_id: str) -> Job:
        job = self[job_id]
        if job.state == CANCELLED or job.command == CANCEL:
            return job
        self._require(job.state not in FINAL_STATES, job, "cancelled", f"it is {job.state}")
        if job.worker is None:
            return self._change(job, state=CANCELLED, command="")
        return self._change(job, command=CANCEL)

    def keep(self, job_id: str) -> Job:
        job = self[job_id]
        if job.state == DONE or job.command == KEEP:
            return job
        self._require(job.command != CANCEL, job, "kept", "it is being cancelled")
        if job.worker is not None:
            # The command also ends a pause.
            return self._change(job, state=RUNNING, command=KEEP)
        self._require(job.step > 0, job, "kept", "it has not begun; there is nothing to keep")
        return self._requeue(job, command=KEEP)

    def extract(self, job_id: str, changes: dict) -> Job:
        """Make the mesh again; `changes` are settings by name."""
        job = self[job_id]
        if job.state == QUEUED and job.command == KEEP and changes.items() <= job.settings.items():
            return job
        self._require(job.state in FINAL_STATES, job, "extracted again", f"it is {job.state}")
        self._require(job.step > 0, job, "extracted", "it has no optimised state yet")
        return self._requeue(job, command=KEEP, settings={**job.settings, **changes})

    def continue_(self, job_id: str, changes: dict) -> Job:
        """Optimise further; `changes` are settings by name."""
        job = self[job_id]
        if job.state in (QUEUED, RUNNING) and changes.items() <= job.settings.items():
            return job
        self._require(job.state in FINAL_STATES, job, "continued", f"it is {job.state}")
        return self._requeue(job, settings={**job.settings, **changes})

    def finish(self, job_id: str, result: int, parts: tuple[str, ...], metrics: dict) -> Job:
        job = self[job_id]
        return self._change(
            job, state=DONE, command="", worker=None, result=result, parts=parts, metrics=metrics, deaths=0
        )

    def stopped(self, job_id: str) -> Job:
        """The worker obeyed a cancel."""
        return self._change(self[job_id], state=CANCELLED, command="", worker=None)

    def fail(self, job_id: str, code: str, message: str, hint: str = "") -> Job:
        job = self[job_id]
        return self._change(
            job,
            state=FAILED,
            command="",
            worker=None,
            error_code=code,
            error_message=message[:MAX_REASON],
            error_hint=hint[:MAX_WARNING],
        )

    def worker_lost(self, job_id: str, reason: str) -> Job:
        """The job's worker process ended without an answer; `reason` is for people."""
        job = self[job_id]
        if job.command == CANCEL:
            return self.stopped(job_id)
        if job.state == PAUSED:
            return self._change(job, worker=None)
        is_stuck = job.step <= job.death_step
        deaths = job.deaths + 1 if is_stuck else 1
        if deaths >= MAX_DEATHS:
            hint = "Use a smaller preset or other settings, or resume it to try once more from its checkpoint."
            return self.fail(job_id, "worker_lost", f"{deaths} workers in a row were lost at this job: {reason}", hint)
        return self._change(job, state=QUEUED, worker=None, deaths=deaths, death_step=max(job.step, job.death_step))

    def hold(self, job_id: str) -> Job:
        """Take a job off its worker, which is about to be ended on purpose; it is paused at its last checkpoint."""
        return self._change(self[job_id], state=PAUSED, worker=None)

    def progressed(self, job_id: str, step: int, n_steps: int, elapsed_s: float) -> Job:
        """Note how far a job is; no change of state, so no new revision."""
        job = replace(self[job_id], step=step, n_steps=n_steps, elapsed_s=elapsed_s)
        self._jobs[job_id] = job
        return job

    def warn(self, job_id: str, message: str) -> Job:
        job = self[job_id]
        message = message[:MAX_WARNING]
        if message in job.warnings or len(job.warnings) >= MAX_WARNINGS:
            return job
        return self._change(job, warnings=(*job.warnings, message))

    def check_forgettable(self, job_id: str) -> None:
        job = self[job_id]
        is_free = job.worker is None and job.state in (*FINAL_STATES, PAUSED)
        self._require(is_free, job, "forgotten", "cancel it first")

    def remove(self, job_id: str) -> None:
        del self._jobs[job_id]

    def _requeue(self, job: Job, command: str = "", settings: dict | None = None) -> Job:
        return self._change(
            job,
            state=QUEUED,
            command=command,
            settings=job.settings if settings is None else settings,
            error_code="",
            error_message="",
            error_hint="",
            deaths=0,
            death_step=-1,
        )

    def _change(self, job: Job, **changes: object) -> Job:
        changed = replace(job, revision=job.revision + 1, **changes)
        self._jobs[job.id] = changed
        return changed

    @staticmethod
    def _restarted(job: Job) -> Job:
        """A job as it is when the engine starts: no worker has it."""
        job = replace(job, worker=None, deaths=0, death_step=-1)
        if job.state == RUNNING or (job.state == PAUSED and job.command):
            state = CANCELLED if job.command == CANCEL else QUEUED
            command = "" if job.command == CANCEL else job.command
            return replace(job, state=state, command=command, revision=job.revision + 1)
        return job

    @staticmethod
    def _require(condition: bool, job: Job, verb: str, reason: str) -> None:
        if not condition:
            raise StateError(f"{job.label} cannot be {verb}: {reason}")


def _rank(job: Job) -> tuple[int, int]:
    return -job.priority, job.order
