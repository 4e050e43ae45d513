"""What the server and its worker processes say to each other, in the frames of the protocol. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..protocol import Array, Progress, registry
from ..protocol.messages import Table

DONE, STOPPED, FAILED = "done", "stopped", "failed"


@dataclass(frozen=True)
class WorkerHello:
    """First message of a worker; it has not loaded torch yet."""

    pid: int


@dataclass(frozen=True)
class WorkerReady:
    """The worker can take a job. Sent again after each one, so memory is up to date."""

    device: str
    """Name for people, such as "NVIDIA H100"."""
    n_devices: int
    """GPUs this machine has; the first worker finds out, and the server starts one worker for each."""
    free_memory_bytes: int
    total_memory_bytes: int
    guidances: tuple[str, ...]


@dataclass(frozen=True)
class WorkerBeat:
    """The worker's process is alive, whatever its job does."""


@dataclass(frozen=True)
class WorkerPreview:
    """A preview, for the client whose view it is."""

    job: str
    view: int
    serial: int
    step: int
    c2w: tuple[float, ...]
    intrinsics: tuple[float, ...]
    rgb: Array


@dataclass(frozen=True)
class Warned:
    """The job goes on, but the user should know."""

    job: str
    message: str


@dataclass(frozen=True)
class Ended:
    """The job has left the worker."""

    job: str
    outcome: str
    """done, stopped or failed."""
    code: str = ""
    message: str = ""
    hint: str = ""
    result: int = 0
    parts: tuple[str, ...] = ()
    metrics: Table = field(default_factory=dict)


@dataclass(frozen=True)
class Guess:
    """Estimate the elevation of a picture's camera; answered by `Guessed`, then `WorkerReady`."""

    device: str
    fov_deg: float
    picture: bytes | None = None
    pixels: Array | None = None
    mask: bytes | None = None
    mask_pixels: Array | None = None


@dataclass(frozen=True)
class Guessed:
    """The answer to `Guess`; with a code it is what went wrong."""

    elevation_deg: float = 0.0
    spread_deg: float = 0.0
    is_sure: bool = False
    code: str = ""
    message: str = ""


@dataclass(frozen=True)
class Run:
    """Do this job, from its checkpoint if there is one."""

    job: str
    folder: str
    device: str
    result: int
    """Number of the result folder to make."""
    command: str
    """run, pause or keep: what is wanted from the start."""
    name: str
    preset: str
    guidance: str
    prompt: str
    seed: int
    texture_size: int | None
    n_faces: int | None
    overrides: Table


@dataclass(frozen=True)
class Steer:
    """run, pause, keep or cancel, for the job at work."""

    job: str
    command: str


@dataclass(frozen=True)
class View:
    """A client's camera for previews; without c2w a turning one."""

    job: str
    view: int
    is_on: bool
    serial: int = 0
    c2w: tuple[float, ...] = ()
    intrinsics: tuple[float, ...] = ()
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Quit:
    """End the process."""


FROM_WORKER = registry(WorkerHello, WorkerReady, WorkerBeat, WorkerPreview, Warned, Ended, Guessed, Progress)
TO_WORKER = registry(Run, Guess, Steer, View, Quit)
