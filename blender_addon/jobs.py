"""The job table, and how each message changes it. No bpy, no sockets.

The engine knows how a job runs; this side knows what Blender wants with it (`Notes`), and keeps that in one small file a
job so that a result still finds its place after Blender was closed or killed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .protocol import FINAL_STATES, JobState, Preview, Progress, ProtocolError, Result, Submit, decode, encode

ACTIVE_STATES = ("queued", "running", "paused")
STAGE_NAMES = {
    "decode": "Reading",
    "prepare": "Preparing",
    "warm_start": "Imagining Views",
    "optimize": "Optimizing",
    "mesh": "Making Mesh",
    "write": "Writing",
}


STAGE_PARTS = {
    "decode": (0.0, 0.01),
    "prepare": (0.01, 0.03),
    "warm_start": (0.03, 0.1),
    "optimize": (0.1, 0.88),
    "mesh": (0.88, 0.98),
    "write": (0.98, 1.0),
    "done": (1.0, 1.0),
}
"""Where a stage begins and ends on the progress bar, so that it never runs backwards."""


@dataclass
class Notes:
    """What Blender remembers of a job."""

    job: str
    name: str = ""
    kind: str = "generate"
    """generate, project or batch."""
    file_token: str = ""
    """The file the job was started in."""
    picture: str = ""
    """Name of the picture's data-block."""
    camera: str = ""
    """Name of the reference camera's object, if one was used."""
    is_own_camera: bool = False
    """The add-on made that camera and may move it along with the result."""
    setup: dict = field(default_factory=dict)
    """The camera that was sent (`camera_math.setup_json`)."""
    place: str = "CAMERA"
    """CAMERA, ORIGIN or CURSOR."""
    location: tuple[float, float, float] = (0.0, 0.0, 0.0)
    size: float | None = None
    """Largest side wanted, Blender units; None keeps the size seen by the camera."""
    origin: str = "BOTTOM"
    is_asset: bool = False
    asset_tags: str = ""
    seed: int = 0
    preset: str = ""
    submitted_unix_s: float = 0.0
    imported: int = 0
    """Number of the newest result that was brought into a scene."""

    @staticmethod
    def from_dict(data: dict) -> Notes:
        """Read saved notes; unknown entries of a newer version are left out.

        Raises:
            TypeError: There is no job in them.
        """
        names = {f.name for f in dataclasses.fields(Notes)}
        notes = Notes(**{name: value for name, value in data.items() if name in names})
        notes.location = tuple(float(x) for x in notes.location)  # type: ignore[assignment]
        return notes


@dataclass
class Job:
    """One line of the job list."""

    notes: Notes
    state: JobState | None = None
    """None until the engine has said anything about it."""
    progress: Progress | None = None
    preview: Preview | None = None
    thumbnail: bytes = b""
    """PNG file."""
    config: str = ""
    """The resolved settings of the result, JSON."""
    texture: bytes = b""
    """The result's texture as a PNG file."""
    result: Result | None = None
    """Arrays on their way into the scene."""
    wants_import: bool = False
    fetching: int = 0
    """Number of the result whose arrays were asked for."""
    is_remembered: bool = False
    """Known from notes of an earlier session only; the engine has not spoken of it yet."""
    is_unknown: bool = False
    """The engine was asked and does not have it."""
    problem: str = ""
    """What went wrong on this side: a refused request, an import that failed."""

    @property
    def id(self) -> str:
        return self.notes.job

    @property
    def name(self) -> str:
        return self.notes.name or (self.state.name if self.state else "") or self.id[:8]

    @property
    def state_name(self) -> str:
        return self.state.state if self.state else ("remembered" if self.is_remembered else "sending")

    @property
    def is_active(self) -> bool:
        return self.state_name in ("sending", *ACTIVE_STATES)

    @property
    def result_number(self) -> int:
        return self.state.result if self.state else 0

    @property
    def is_waiting(self) -> bool:
        """A result is there that no scene has got yet."""
        return self.result_number > self.notes.imported

    @property
    def factor(self) -> float:
        """Part done, 0 to 1."""
        if self.state is not None and self.state.state == "done":
            return 1.0
        step, n_steps = self.steps
        part = min(max(step / n_steps, 0.0), 1.0) if n_steps else 0.0
        if self.progress is None or self.progress.stage not in STAGE_PARTS:
            return part
        start, end = STAGE_PARTS[self.progress.stage]
        return start + (end - start) * part

    @property
    def steps(self) -> tuple[int, int]:
        if self.progress is not None:
            return self.progress.step, self.progress.n_steps
        return (self.state.step, self.state.n_steps) if self.state else (0, 0)

    def status(self) -> str:
        """One short line for the progress bar."""
        if self.problem:
            return self.problem
        if self.state is None:
            if self.is_unknown:
                return "Not in This Engine"
            return "Known When the Engine Runs" if self.is_remembered else "Sending"
        if self.state.command:
            return "Finishing" if self.state.command == "keep" else "Stopping"
        match self.state.state:
            case "queued":
                return f"Waiting ({self.state.position} before it)" if self.state.position else "Waiting for the Engine"
            case "paused":
                return f"Paused at {self.steps[0]}/{self.steps[1]}"
            case "running":
                return self._running_line()
            case "failed":
                return self.state.error_message or "Failed"
            case other:
                return other.capitalize()

    def _running_line(self) -> str:
        if self.progress is None:
            return "Starting"
        stage = STAGE_NAMES.get(self.progress.stage, self.progress.stage.capitalize())
        line = f"{stage} {self.progress.step}/{self.progress.n_steps}"
        return line if self.progress.eta_s is None else f"{line} - {clock(self.progress.eta_s)} left"


def is_setup(value: Any) -> bool:
    """Whether something read from a file is a camera as `camera_math.setup_json` writes it, so that all who use it find what
    they need."""
    try:
        lengths = [len([float(x) for x in row]) for row in value["c2w"]]
        lengths += [len([float(x) for x in value[name]]) for name in ("intrinsics", "object_center")]
        sizes = [float(value[name]) for name in ("width", "height", "object_size")]
    except (TypeError, ValueError, KeyError):
        return False
    return lengths == [4, 4, 4, 4, 4, 3] and min(sizes) > 0


def clock(seconds: float) -> str:
    """75 -> 1:15."""
    whole = max(int(seconds + 0.5), 0)
    if whole >= 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
    return f"{whole // 60}:{whole % 60:02d}"


class JobTable:
    """Every job this Blender knows of, newest last."""

    def __init__(self, folder: Path | None = None):
        """Args: folder: Where notes are kept; None keeps them in memory only."""
        self._folder = folder
        self.jobs: dict[str, Job] = {}
        for notes in self._saved_notes():
            self.jobs[notes.job] = Job(notes, is_remembered=True)

    def _saved_notes(self) -> list[Notes]:
        if self._folder is None or not self._folder.is_dir():
            return []
        found = []
        for path in self._folder.glob("*.json"):
            try:
                found.append(Notes.from_dict(json.loads(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError, TypeError, AttributeError):
                # A damaged note costs the wishes of one job, never the list.
                continue
        return sorted(found, key=lambda notes: notes.submitted_unix_s)

    def save(self, notes: Notes) -> None:
        """Write the notes; a full disk costs the memory of the wishes, not the job."""
        if self._folder is None:
            return
        partial = self._folder / f"{notes.job}.part"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(dataclasses.asdict(notes)), encoding="utf-8")
            os.replace(partial, self._folder / f"{notes.job}.json")
        except OSError:
            return

    def keep_request(self, request: Submit) -> None:
        """Keep a job that the engine has not confirmed yet: it is sent even if Blender dies now.

        Raises:
            ProtocolError: The protocol does not take it.
        """
        frames = encode(request)
        if self._folder is None:
            return
        partial = self._folder / f"{request.job}.part"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                for frame in frames:
                    # Not joined: a large picture would be copied twice while Blender waits.
                    file.write(len(frame).to_bytes(8, "little"))
                    file.write(frame)
            os.replace(partial, self._folder / f"{request.job}.unsent")
        except OSError:
            # A full disk: the job is still sent, only not after a crash.
            return

    def is_kept(self, job_id: str) -> bool:
        return self._folder is not None and (self._folder / f"{job_id}.unsent").exists()

    def confirmed(self, job_id: str) -> None:
        """The engine has the job."""
        self._remove_file(f"{job_id}.unsent")

    def unsent(self) -> dict[str, Submit]:
        """Jobs of an earlier session that no engine has confirmed."""
        found = {}
        for path in [] if self._folder is None else sorted(self._folder.glob("*.unsent")):
            try:
                data, frames = path.read_bytes(), []
                while data:
                    length = int.from_bytes(data[:8], "little")
                    frames.append(data[8 : 8 + length])
                    data = data[8 + length :]
                found[path.stem] = decode(frames)
            except (OSError, ProtocolError):
                # Damaged, or of another version: it cannot be sent any more.
                continue
        return found

    def add(self, notes: Notes) -> Job:
        """Take up a job that is being sent."""
        notes.submitted_unix_s = notes.submitted_unix_s or time.time()
        self.jobs[notes.job] = Job(notes)
        self.save(notes)
        return self.jobs[notes.job]

    def remove(self, job_id: str) -> None:
        self.jobs.pop(job_id, None)
        self._remove_file(f"{job_id}.json")
        self._remove_file(f"{job_id}.unsent")

    def _remove_file(self, name: str) -> None:
        """One that cannot be removed now, because another program reads it, costs no more than a line in a later list."""
        if self._folder is not None:
            with suppress(OSError):
                (self._folder / name).unlink()

    def take_state(self, state: JobState) -> Job:
        """The newest word about a job; one that was submitted by someone else is listed too."""
        job = self.jobs.get(state.job)
        if job is None:
            notes = Notes(state.job, state.name, submitted_unix_s=state.created_unix_s or time.time())
            job = self.jobs[state.job] = Job(notes)
        if job.state is not None and state.revision < job.state.revision:
            return job
        if state.state not in ACTIVE_STATES or (job.state and job.state.state != state.state):
            job.progress = None if state.state in FINAL_STATES else job.progress
        if state.state != "failed":
            job.problem = ""
        job.state = state
        return job

    def take_progress(self, progress: Progress) -> Job | None:
        job = self.jobs.get(progress.job)
        if job is not None and job.is_active:
            job.progress = progress
        return job

    def take_preview(self, preview: Preview) -> Job | None:
        job = self.jobs.get(preview.job)
        if job is not None:
            job.preview = preview
        return job

    def imported(self, job: Job, number: int) -> None:
        """A result has come into a scene."""
        job.notes.imported = max(job.notes.imported, number)
        job.wants_import, job.result, job.fetching, job.texture = False, None, 0, b""
        self.save(job.notes)

    @property
    def active(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.is_active]

    def shown(self) -> Job | None:
        """The job whose progress is shown: the running one, else the first that is active."""
        active = self.active
        running = [job for job in active if job.state_name == "running"]
        return (running or active or [None])[0]
