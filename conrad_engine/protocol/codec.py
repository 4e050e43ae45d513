"""Messages to frames and back, strictly. Standard library only.

Frame 0 is JSON: {"v": version, "type": name, "fields": {...}, "frames": [{"field": name, "dtype": ..., "shape": [...]}]}.
Each entry of "frames" describes one further frame of raw bytes: an `Array`, or opaque bytes if it has no dtype. Whatever
arrives is checked against the bounds of `messages.py` and the annotations of its class before anything is built from it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence

from . import messages
from .errors import ProtocolError, VersionMismatch
from .messages import (
    ITEM_BYTES,
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    MAX_HEADER_BYTES,
    MAX_ITEMS,
    MAX_MESSAGE_BYTES,
    MAX_TEXT,
    PROTOCOL_VERSION,
    Array,
    Error,
    Message,
)

MAX_INTEGER = 2**53
"""Beyond it JSON numbers are not exact everywhere."""
MAX_DIMENSIONS = 4

Buffer = bytes | bytearray | memoryview


def wire_name(kind: type) -> str:
    """SetPreview -> set_preview."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def registry(*kinds: type) -> dict[str, type]:
    """Message classes by their name on the wire."""
    return {wire_name(kind): kind for kind in kinds}


MESSAGES: dict[str, type] = registry(*typing.get_args(Message))


def encode(message: object) -> list[Buffer]:
    """The frames of a message; binary data is passed on, not copied.

    Raises:
        ProtocolError: A field is outside the protocol's bounds.
    """
    header: dict = {"v": PROTOCOL_VERSION, "type": wire_name(type(message)), "fields": {}, "frames": []}
    frames: list[Buffer] = []
    for name, (check, is_binary) in _fields_of(type(message)).items():
        value = getattr(message, name)
        if is_binary:
            if value is not None:
                header["frames"].append(_describe(name, value))
                frames.append(memoryview(value.data if isinstance(value, Array) else value).cast("B"))
            continue
        _require(check(value), f"{header['type']}.{name} cannot be sent: {_short(value)}")
        header["fields"][name] = value
    text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    _check_sizes([text, *frames])
    for description, frame in zip(header["frames"], frames):
        _check_frame(header["type"], description, frame)
    return [text, *frames]


def decode(frames: Sequence[Buffer], kinds: Mapping[str, type] = MESSAGES) -> typing.Any:
    """The message in these frames.

    Raises:
        VersionMismatch: It is of another protocol version (except an `Error`, which every version reads).
        ProtocolError: It is no message of `kinds`, or outside the protocol's bounds.
    """
    header = _header(frames)
    kind = kinds.get(header["type"])
    if header["v"] != PROTOCOL_VERSION:
        return _foreign_error(header)
    _require(kind is not None, f"unknown message type {_short(header['type'])}")
    known = _fields_of(kind)
    values = header["fields"]
    for name, value in values.items():
        _require(name in known and not known[name][1], f"{header['type']} has no field {_short(name)}")
        _require(known[name][0](value), f"{header['type']}.{name} cannot be {_short(value)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for description, frame in zip(header["frames"], frames[1:]):
        name = description["field"]
        is_free = name in known and known[name][1] and name not in values
        _require(is_free, f"{header['type']} has no binary field {_short(name)}")
        values[name] = _read_frame(header["type"], description, frame, known[name][0])
    try:
        return kind(**values)
    except TypeError:
        missing = [f.name for f in dataclasses.fields(kind) if f.name not in values and _is_required(f)]
        raise ProtocolError(f"{header['type']} lacks {', '.join(missing)}") from None


def _header(frames: Sequence[Buffer]) -> dict:
    """The parsed first frame, with its outer structure checked."""
    _check_sizes(frames)
    try:
        header = json.loads(bytes(frames[0]).decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ProtocolError("the header is not JSON") from None
    has_version = isinstance(header, dict) and type(header.get("v")) is int
    if has_version and header["v"] != PROTOCOL_VERSION and header.get("type") != wire_name(Error):
        raise VersionMismatch(header["v"], PROTOCOL_VERSION)
    is_header = (
        has_version
        and header.keys() == {"v", "type", "fields", "frames"}
        and isinstance(header["type"], str)
        and isinstance(header["fields"], dict)
        and isinstance(header["frames"], list)
    )
    _require(is_header, "the header needs v, type, fields and frames")
    if header["v"] == PROTOCOL_VERSION:
        described = all(isinstance(d, dict) and isinstance(d.get("field"), str) for d in header["frames"])
        _require(described and len(header["frames"]) == len(frames) - 1, "the header does not describe its frames")
    return header


def _check_sizes(frames: Sequence[Buffer]) -> None:
    _require(1 <= len(frames) <= MAX_FRAMES + 1, f"a message has 1 to {MAX_FRAMES + 1} frames, not {len(frames)}")
    _require(len(frames[0]) <= MAX_HEADER_BYTES, f"the header has {len(frames[0])} bytes, more than {MAX_HEADER_BYTES}")
    total = sum(map(len, frames))
    _require(total <= MAX_MESSAGE_BYTES, f"the message has {total} bytes, more than {MAX_MESSAGE_BYTES}")


def _foreign_error(header: dict) -> Error:
    code, message = header["fields"].get("code"), header["fields"].get("message")
    _require(_is_text(code) and _is_text(message), "an error of another version cannot be read")
    return Error(code, message)


def _describe(name: str, value: object) -> dict:
    if isinstance(value, Array):
        return {"field": name, "dtype": value.dtype, "shape": list(value.shape)}
    return {"field": name}


def _read_frame(kind: str, description: dict, frame: Buffer, check: Callable) -> Buffer | Array:
    _check_frame(kind, description, frame)
    if "dtype" not in description:
        _require(check(b""), f"{kind}.{description['field']} must be an array")
        return frame
    array = Array(description["dtype"], tuple(description["shape"]), frame)
    _require(check(array), f"{kind}.{description['field']} must be bytes, not an array")
    return array


def _check_frame(kind: str, description: dict, frame: Buffer) -> None:
    """The frame has the size that its description claims, computed without allocating anything."""
    name = f"{kind}.{description['field']}"
    _require(len(frame) <= MAX_FRAME_BYTES, f"{name} has {len(frame)} bytes, more than {MAX_FRAME_BYTES}")
    if description.keys() == {"field"}:
        return
    dtype, shape = description.get("dtype"), description.get("shape")
    _require(isinstance(dtype, str) and dtype in ITEM_BYTES, f"{name} has the unknown number type {_short(dtype)}")
    is_shape = (
        isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n <= MAX_FRAME_BYTES for n in shape)
    )
    _require(is_shape and description.keys() == {"field", "dtype", "shape"}, f"{name} has a bad shape {_short(shape)}")
    n_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    _require(n_bytes == len(frame), f"{name} claims {n_bytes} bytes ({dtype} {shape}) and has {len(frame)}")


_known_fields: dict[type, dict[str, tuple[Callable, bool]]] = {}


def _fields_of(kind: type) -> dict[str, tuple[Callable, bool]]:
    """A check and whether it is binary, for every field of a message class."""
    if kind not in _known_fields:
        # Resolved in the module of the class, so that other modules can have messages of their own.
        hints = typing.get_type_hints(kind, localns=vars(messages))
        _known_fields[kind] = {f.name: _check_of(hints[f.name]) for f in dataclasses.fields(kind)}
    return _known_fields[kind]


def _check_of(hint: object) -> tuple[Callable, bool]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = next(option for option in typing.get_args(hint) if option is not type(None))
        check, is_binary = _check_of(inner)
        return (lambda value: value is None or check(value)), is_binary
    return _CHECKS[hint]


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        return False
    # JSON can smuggle in half a surrogate pair, which no file, log or database takes.
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _is_integer(value: object) -> bool:
    return type(value) is int and abs(value) <= MAX_INTEGER


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e300  # type: ignore[operator]


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, bool) or _is_text(value) or _is_number(value)


def _is_sequence(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= MAX_ITEMS


def _is_table(value: object) -> bool:
    if not isinstance(value, dict) or len(value) > MAX_ITEMS:
        return False
    return all(_is_text(key) and _is_scalar(entry) for key, entry in value.items())


_CHECKS: dict[object, tuple[Callable, bool]] = {
    str: (_is_text, False),
    int: (_is_integer, False),
    float: (_is_number, False),
    bool: (lambda value: isinstance(value, bool), False),
    tuple[float, ...]: (lambda value: _is_sequence(value) and all(map(_is_number, value)), False),
    tuple[str, ...]: (lambda value: _is_sequence(value) and all(map(_is_text, value)), False),
    messages.Table: (_is_table, False),
    bytes: (lambda value: isinstance(value, (bytes, bytearray, memoryview)), True),
    Array: (lambda value: isinstance(value, Array), True),
}


def _is_required(entry: dataclasses.Field) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _short(value: object) -> str:
    """The start of a value, cheap and safe to show whatever it is."""
    if isinstance(value, str):
        return repr(value[:60])
    return repr(value)[:60] if isinstance(value, (int, float, type(None))) else f"a {type(value).__name__}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ProtocolError(message)
