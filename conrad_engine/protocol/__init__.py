"""The protocol between the engine and its clients, version 2. Standard library and pyzmq only, Python 3.11.

Transport. The engine binds a ZeroMQ ROUTER socket, a client connects a DEALER. On loopback the connection is PLAIN: user
`conrad`, password the token that the engine announces (one JSON line on its standard output, and its connection file:
`Connection`). On every other address it is CURVE, with the engine's key and one key for each client. ZeroMQ checks
either before the first message; a client that is refused hears so from its socket, which `EngineClient` turns into
`Error("refused", ...)`.

Frames. Frame 0 is a JSON object of at most 64 KiB: `v` (version), `type` (class name in snake_case), `fields` (text,
numbers, truth values, lists of them, flat objects), `frames` (for each further frame its field and, for an array, dtype
and shape). At most 12 further frames of at most 256 MiB each, 512 MiB together, hold raw bytes,
little-endian, C order. Sizes are checked against dtype and shape before anything is built. Unknown fields, missing fields
and wrong types are errors. Never pickle.

Versions. Every message carries the version. A message of another version is answered by `Error("version", ...)` that says
which side to update; the format of `Error` never changes.

Conversation. A client says `Hello` and gets `Welcome`, `Status`, the `JobState` of every job and `Listed`; without hello the
engine answers `Error("hello", ...)`, which also tells a client that the engine was started anew. The client sends `Ping` every
second and gets `Status`; a client that is silent for 30 s is forgotten until its next hello. Every request carries a
number chosen by the client, and its answer the same number: `Accepted`, `Result`, `ResultFile`, `ElevationGuess`,
`Listed`, `Forgotten`, `Status` or `Error`. A request may be sent again until it is answered: doing it twice changes
nothing more.

Jobs. `Submit` names the job itself. Its life is told to every client by `JobState`; no revision is dropped while a client
is connected, and hello brings the newest of each. `Progress` and `Preview` are only sent when the client has acknowledged
the one before (`Ack`); newer ones replace those that wait, so that a slow client slows nobody. Previews come to those who
ask by `SetPreview`, each from its own camera. `Pause`, `Resume`, `Cancel`, `Keep`, `Extract`, `Continue`, `Forget` steer a
job; `Fetch` brings its result; `FreeMemory` and `Shutdown` steer the engine. `GuessElevation` belongs to no job: an idle
worker looks at one picture; while all are at work the answer is `Error("busy", ...)`.
"""

from .client import CLOSED, CONNECTING, NOT_RESPONDING, READY, REFUSED, EngineClient, new_job_id
from .codec import decode, encode, registry
from .connection import CONNECTION_FILE, Connection, CurveKeys, default_data_folder, load_key_file
from .errors import EngineUnavailable, ProtocolError, RequestRefused, VersionMismatch, which_side_to_update
from .messages import (
    ARRAYS,
    CANCELLED,
    DONE,
    FAILED,
    FINAL_STATES,
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    MAX_HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    PAUSED,
    PROTOCOL_VERSION,
    QUEUED,
    RESULT_FILES,
    RUNNING,
    Accepted,
    Ack,
    Array,
    Cancel,
    Continue,
    ElevationGuess,
    Error,
    Extract,
    Fetch,
    Forget,
    Forgotten,
    FreeMemory,
    GuessElevation,
    Hello,
    JobState,
    Keep,
    Listed,
    ListJobs,
    Message,
    Pause,
    Ping,
    Preview,
    Progress,
    Result,
    ResultFile,
    Resume,
    SetPreview,
    Shutdown,
    Status,
    Submit,
    Welcome,
)

__all__ = [
    "ARRAYS",
    "CANCELLED",
    "CLOSED",
    "CONNECTING",
    "CONNECTION_FILE",
    "DONE",
    "FAILED",
    "FINAL_STATES",
    "MAX_FRAMES",
    "MAX_FRAME_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_MESSAGE_BYTES",
    "NOT_RESPONDING",
    "PAUSED",
    "PROTOCOL_VERSION",
    "QUEUED",
    "READY",
    "REFUSED",
    "RESULT_FILES",
    "RUNNING",
    "Accepted",
    "Ack",
    "Array",
    "Cancel",
    "Connection",
    "Continue",
    "CurveKeys",
    "ElevationGuess",
    "EngineClient",
    "EngineUnavailable",
    "Error",
    "Extract",
    "Fetch",
    "Forget",
    "Forgotten",
    "FreeMemory",
    "GuessElevation",
    "Hello",
    "JobState",
    "Keep",
    "ListJobs",
    "Listed",
    "Message",
    "Pause",
    "Ping",
    "Preview",
    "Progress",
    "ProtocolError",
    "RequestRefused",
    "Result",
    "ResultFile",
    "Resume",
    "SetPreview",
    "Shutdown",
    "Status",
    "Submit",
    "VersionMismatch",
    "Welcome",
    "decode",
    "default_data_folder",
    "encode",
    "load_key_file",
    "new_job_id",
    "registry",
    "which_side_to_update",
]
