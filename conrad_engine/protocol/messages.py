"""Every message as a flat frozen dataclass, with the bounds that hold for all of them. Standard library only.

A field is text, a number, a truth value, a tuple of texts or of numbers, a `Table`, raw bytes or an `Array`; the codec
reads the annotations and refuses everything else. The newest state of a job is always one `JobState`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

PROTOCOL_VERSION = 2
"""Counts changes of the wire format; independent of the package's version. Both sides must have the same."""

MAX_HEADER_BYTES = 64 * 1024
MAX_FRAMES = 12
"""Binary frames of a message."""
MAX_FRAME_BYTES = 256 * 1024 * 1024
MAX_MESSAGE_BYTES = 512 * 1024 * 1024
"""Of all frames together."""
MAX_TEXT = 8_000
"""Characters of a text."""
MAX_ITEMS = 256
"""Entries of a tuple or a table."""

Scalar = str | int | float | bool | None
Table = dict[str, Scalar]
"""A flat JSON object."""

ITEM_BYTES = {"u1": 1, "<u2": 2, "<i4": 4, "<u4": 4, "<f4": 4}
"""The number types of an array, spelled as numpy spells them; always little-endian."""
_FORMATS = {"u1": "B", "<u2": "H", "<i4": "i", "<u4": "I", "<f4": "f"}

QUEUED, RUNNING, PAUSED, DONE, FAILED, CANCELLED = "queued", "running", "paused", "done", "failed", "cancelled"
FINAL_STATES = (DONE, FAILED, CANCELLED)
"""A job in one of these waits for nobody; `Extract`, `Continue`, `Resume` and `Keep` can wake it up again."""

ARRAYS = "arrays"
RESULT_FILES = (
    "mesh.glb",
    "texture.png",
    "sheet.png",
    "thumbnail.png",
    "turntable.mp4",
    "turntable.gif",
    "camera.json",
    "config.json",
    "metrics.json",
)
"""What `Fetch` can ask for beside the arrays; `JobState.parts` says what is there."""


@dataclass(frozen=True)
class Array:
    """Numbers in C order. `data` is bytes or any object with the buffer protocol, never copied on the way."""

    dtype: str
    """u1, <u2, <i4, <u4 or <f4."""
    shape: tuple[int, ...]
    data: bytes | memoryview

    def view(self) -> memoryview:
        """The numbers as a flat typed view, without a copy: what Blender's `foreach_set` takes."""
        return memoryview(self.data).cast("B").cast(_FORMATS[self.dtype])

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


# Client to engine. `request` is numbered by the client; the answer carries the same number.


@dataclass(frozen=True)
class Hello:
    """The first message of a connection; answered by `Welcome`, `Status`, the `JobState` of every job, `Listed`."""

    client: str = ""
    """Name for the engine's log, such as "Blender 4.5"."""
    request: int = 0


@dataclass(frozen=True)
class Ping:
    """The client's heartbeat; answered by `Status`, which is the engine's."""

    request: int = 0


@dataclass(frozen=True)
class Submit:
    """A new job; answered by `Accepted`. Sent again with the same `job`, it changes nothing.

    The picture is either file bytes or pixels. Camera conventions are those of Blender: `c2w` is a 4x4 matrix, row by
    row, +X right, +Y up, looking along -Z, world +Z up; intrinsics (fx, fy, cx, cy) are pixels, row 0 on top.
    """

    job: str
    """32 hexadecimal digits chosen by the client: see `new_job_id`."""
    name: str = ""
    picture: bytes | None = None
    """File bytes in any format that Pillow reads."""
    pixels: Array | None = None
    """Instead of file bytes: u1 (height, width, 3 or 4), sRGB, straight alpha, row 0 on top."""
    mask: bytes | None = None
    mask_pixels: Array | None = None
    """u1 (height, width); above 127 is the object."""
    depth: bytes | None = None
    """File bytes: 16 bit PNG or .npy."""
    depth_pixels: Array | None = None
    """<f4 (height, width)."""
    depth_kind: str = "relative"
    """relative (up to scale and shift) or metric (distance along the optical axis, world units)."""
    init_mesh: bytes | None = None
    """GLB file bytes of a mesh to start from (glTF axes: +Y up)."""
    init_vertices: Array | None = None
    """Instead of a file: <f4 (n, 3) in the camera's world, +Z up; with `init_faces`."""
    init_faces: Array | None = None
    """<i4 or <u4 (n, 3)."""
    c2w: tuple[float, ...] = ()
    """16 numbers, or none: the reference camera then stands on -Y, as high as `picture.elevation_deg` of `overrides` says or
    as the engine guesses, and the object is about 1 unit large."""
    intrinsics: tuple[float, ...] = ()
    width: int = 0
    height: int = 0
    object_center: tuple[float, ...] = ()
    object_size: float | None = None
    """Rough largest side of the object, world units."""
    preset: str = "standard"
    guidance: str = ""
    """embedded, stable_diffusion, zero123 or mixture; the preset's own when empty."""
    prompt: str = ""
    seed: int = 0
    texture_size: int | None = None
    n_faces: int | None = None
    overrides: Table = field(default_factory=dict)
    """Any other setting by its dotted name, such as "optimize.n_steps"; settings that hold paths are refused."""
    priority: int = 0
    """-100 to 100: larger ones first, equal ones in the order of arrival."""
    request: int = 0


@dataclass(frozen=True)
class Pause:
    """Hold a job. A running one keeps its worker and still answers previews."""

    job: str
    request: int = 0


@dataclass(frozen=True)
class Resume:
    """Let a paused job go on; a failed or cancelled one starts again from its last checkpoint."""

    job: str
    request: int = 0


@dataclass(frozen=True)
class Cancel:
    """Stop a job without a mesh; its checkpoint is kept."""

    job: str
    request: int = 0


@dataclass(frozen=True)
class Keep:
    """Stop optimising and make the mesh of the current state."""

    job: str
    request: int = 0


@dataclass(frozen=True)
class Extract:
    """Make the mesh of an ended job again with other settings, without optimising; None leaves a setting."""

    job: str
    n_faces: int | None = None
    texture_size: int | None = None
    resolution: int | None = None
    level: float | None = None
    request: int = 0


@dataclass(frozen=True)
class Continue:
    """Optimise an ended job further."""

    job: str
    n_steps: int
    """The new number of optimisation steps in total; `JobState.n_steps_set` is the present one."""
    request: int = 0


@dataclass(frozen=True)
class SetPreview:
    """Ask for previews of a job, from the client's own camera or, without one, from a turning one.

    Where pictures of this size would take long they come smaller: `Preview` has its own size and intrinsics.
    """

    job: str
    is_on: bool = True
    serial: int = 0
    """Comes back with the previews of this view."""
    c2w: tuple[float, ...] = ()
    """In the world of the job's camera, as in `Submit`."""
    intrinsics: tuple[float, ...] = ()
    width: int = 256
    height: int = 256
    request: int = 0


@dataclass(frozen=True)
class Fetch:
    """Ask for `ARRAYS` (answered by `Result`) or one of `RESULT_FILES` (answered by `ResultFile`)."""

    job: str
    part: str = ARRAYS
    request: int = 0


@dataclass(frozen=True)
class ListJobs:
    """Answered by the `JobState` of every job, then `Listed`."""

    request: int = 0


@dataclass(frozen=True)
class Forget:
    """Remove an ended job and all its files."""

    job: str
    request: int = 0


@dataclass(frozen=True)
class FreeMemory:
    """Give GPU memory back by ending idle worker processes; they start again with the next job."""

    pause_jobs: bool = False
    """Also end workers at work: their jobs pause at the last checkpoint."""
    request: int = 0


@dataclass(frozen=True)
class GuessElevation:
    """Ask how high the camera of a picture stands; answered by `ElevationGuess`.

    The guess is made between two jobs, not beside one: while all workers are at work the answer is `Error("busy", ...)`.
    Picture and mask are those of `Submit`.
    """

    picture: bytes | None = None
    pixels: Array | None = None
    mask: bytes | None = None
    mask_pixels: Array | None = None
    fov_deg: float = 40.0
    """Full angle of view of the picture's larger side, 2 to 120."""
    request: int = 0


@dataclass(frozen=True)
class Shutdown:
    """End the engine; unfinished jobs go on at its next start."""

    request: int = 0


@dataclass(frozen=True)
class Ack:
    """What has been read of a job; the engine sends no newer progress or preview before that. `EngineClient` does it."""

    job: str
    revision: int = 0
    progress: int = 0
    preview: int = 0
    request: int = 0


# Engine to client.


@dataclass(frozen=True)
class Welcome:
    """The engine at the other end."""

    engine_version: str
    pid: int
    capabilities: tuple[str, ...] = ()
    request: int = 0


@dataclass(frozen=True)
class Status:
    """How the engine is, on change and in answer to every ping."""

    workers: str = "starting"
    """starting, ready, busy, stopped (memory was freed) or crashed."""
    device: str = ""
    """What the workers compute on; empty until the first one has looked."""
    free_memory_bytes: int = 0
    total_memory_bytes: int = 0
    guidances: tuple[str, ...] = ()
    """Those that can be used as the engine is installed; empty until the first worker has looked."""
    n_workers: int = 0
    n_running: int = 0
    n_queued: int = 0
    problem: str = ""
    """One sentence if something is wrong, such as a full disk or a worker that does not start."""
    request: int = 0


@dataclass(frozen=True)
class Accepted:
    """A request was understood and will be done; what comes of it is told by `JobState`."""

    request: int
    job: str = ""


@dataclass(frozen=True)
class JobState:
    """Everything about a job but its pictures. No revision is ever skipped on a living connection."""

    job: str
    revision: int
    """Grows with every change of this job, also across restarts of the engine."""
    state: str
    """queued, running, paused, done, failed or cancelled."""
    name: str = ""
    command: str = ""
    """keep or cancel: what was asked for and is not done yet."""
    priority: int = 0
    position: int = 0
    """Jobs that are before this one in the queue when this was sent."""
    created_unix_s: float = 0.0
    elapsed_s: float = 0.0
    """Time spent working on it."""
    step: int = 0
    n_steps: int = 0
    n_steps_set: int = 0
    texture_size: int = 0
    n_faces: int = 0
    result: int = 0
    """Number of the newest result; 0 while there is none."""
    parts: tuple[str, ...] = ()
    """What `Fetch` can ask for."""
    metrics: Table = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error_code: str = ""
    error_message: str = ""
    error_hint: str = ""
    request: int = 0


@dataclass(frozen=True)
class Progress:
    """How far a running job is; a newer one replaces an older one on the way."""

    job: str
    number: int
    stage: str
    step: int
    n_steps: int
    eta_s: float | None = None
    losses: Table = field(default_factory=dict)
    memory_bytes: int = 0
    request: int = 0


@dataclass(frozen=True)
class Preview:
    """The field as it is now; a newer one replaces an older one on the way."""

    job: str
    number: int
    step: int
    rgb: Array
    """u1 (height, width, 3), sRGB, row 0 on top; or 4 channels, the last of which is straight opacity."""
    serial: int = 0
    """That of the `SetPreview` it answers."""
    c2w: tuple[float, ...] = ()
    """The camera it was seen from, as in `Submit`."""
    intrinsics: tuple[float, ...] = ()
    request: int = 0


@dataclass(frozen=True)
class Result:
    """The textured mesh, in the world of the job's camera (+Z up)."""

    job: str
    result: int
    vertices: Array
    """<f4 (n_vertices, 3)."""
    faces: Array
    """<i4 (n_faces, 3), counterclockwise seen from outside."""
    uvs: Array
    """<f4 (n_vertices, 2), origin at the lower left as in Blender."""
    normals: Array
    """<f4 (n_vertices, 3)."""
    texture: Array
    """u1 (size, size, 3), sRGB, row 0 on top."""
    metrics: Table = field(default_factory=dict)
    request: int = 0


@dataclass(frozen=True)
class ResultFile:
    """One file of a result, as it would lie in a results folder."""

    job: str
    result: int
    part: str
    data: bytes
    request: int = 0


@dataclass(frozen=True)
class ElevationGuess:
    """How high the camera of a picture seems to stand."""

    elevation_deg: float
    """Above the object's horizon, seen from the object; positive looks down on it."""
    spread_deg: float
    """Standard deviation of the estimate."""
    is_sure: bool
    """False where the spread is so large that the usual elevation would be as good a guess."""
    request: int = 0


@dataclass(frozen=True)
class Listed:
    """The end of a list of jobs."""

    count: int
    request: int = 0


@dataclass(frozen=True)
class Forgotten:
    """A job is gone."""

    job: str
    request: int = 0


@dataclass(frozen=True)
class Error:
    """A request that cannot be done, or a connection that cannot go on. Its format is the same in every version.

    Codes: protocol, version, hello (say `Hello` first), input, unknown_job, state, busy, no_result, disk_full, refused
    (made by the client itself when the engine refuses its token or key), internal.
    """

    code: str
    message: str
    job: str = ""
    request: int = 0


Message = (
    Hello
    | Ping
    | Submit
    | Pause
    | Resume
    | Cancel
    | Keep
    | Extract
    | Continue
    | SetPreview
    | Fetch
    | ListJobs
    | Forget
    | FreeMemory
    | GuessElevation
    | Shutdown
    | Ack
    | Welcome
    | Status
    | Accepted
    | JobState
    | Progress
    | Preview
    | Result
    | ResultFile
    | ElevationGuess
    | Listed
    | Forgotten
    | Error
)
