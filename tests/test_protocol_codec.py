"""Messages survive the way to frames and back, and nothing else gets through."""

import dataclasses
import json
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conrad_engine.protocol import (
    MAX_FRAMES,
    MAX_HEADER_BYTES,
    PROTOCOL_VERSION,
    Array,
    Error,
    Message,
    Pause,
    Preview,
    ProtocolError,
    Submit,
    VersionMismatch,
    decode,
    encode,
    which_side_to_update,
)
from conrad_engine.protocol.messages import ITEM_BYTES, Table

KINDS = typing.get_args(Message)
ITEM = st.floats(-1e9, 1e9) | st.integers(-(2**53), 2**53)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
SCALAR = st.none() | st.booleans() | ITEM | TEXT


@st.composite
def arrays(draw) -> Array:
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    blank = Array(dtype, shape, b"")
    return dataclasses.replace(blank, data=draw(st.binary(min_size=blank.n_bytes, max_size=blank.n_bytes)))


BY_HINT = {
    str: TEXT,
    int: st.integers(-(2**53), 2**53),
    float: st.floats(-1e9, 1e9),
    bool: st.booleans(),
    tuple[float, ...]: st.lists(ITEM, max_size=16).map(tuple),
    tuple[str, ...]: st.lists(TEXT, max_size=4).map(tuple),
    Table: st.dictionaries(TEXT, SCALAR, max_size=4),
    bytes: st.binary(max_size=40),
    Array: arrays(),
}


def fields_of(kind: type) -> dict[str, st.SearchStrategy]:
    strategies = {}
    for name, hint in typing.get_type_hints(kind).items():
        options = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
        strategies[name] = st.one_of(*(st.none() if o is type(None) else BY_HINT[o] for o in options))
    return strategies


MESSAGES = st.sampled_from(KINDS).flatmap(lambda kind: st.builds(kind, **fields_of(kind)))


@settings(max_examples=300, deadline=None)
@given(MESSAGES)
def test_every_message_comes_back_as_it_was(message):
    frames = [bytes(frame) for frame in encode(message)]
    assert decode(frames) == message


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_request_number(kind):
    assert "request" in {field.name for field in dataclasses.fields(kind)}


def header(**changes) -> bytes:
    base = {"v": PROTOCOL_VERSION, "type": "pause", "fields": {"job": "a"}, "frames": []}
    return json.dumps({**base, **changes}).encode()


def test_the_base_of_the_broken_headers_is_sound():
    assert decode([header()]) == Pause("a")


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        ([], "1 to 13 frames, not 0"),
        ([b""], "not JSON"),
        ([b"\xff\xfe"], "not JSON"),
        ([b"[" * 30_000], "not JSON"),
        ([b"1" * 10_000], "not JSON"),
        ([b'{"v": NaN}'], "not JSON"),
        ([b"[]"], "needs v, type, fields"),
        ([header(v="1")], "needs v, type, fields"),
        ([header(v=True)], "needs v, type, fields"),
        ([header(extra=1)], "needs v, type, fields"),
        ([b" " * (MAX_HEADER_BYTES + 1)], "the header has 65537 bytes"),
        ([header(), *[b""] * (MAX_FRAMES + 1)], "frames, not 14"),
        ([header(), b"stray"], "does not describe its frames"),
        ([header(type="fire")], "unknown message type 'fire'"),
        ([header(fields={})], "pause lacks job"),
        ([header(fields={"job": 1})], "pause.job cannot be 1"),
        ([header(fields={"job": "a", "self": 1})], "pause has no field 'self'"),
        ([header(fields={"job": "\ud800"})], "pause.job cannot be"),
        ([header(fields={"job": "a" * 9000})], "pause.job cannot be"),
        ([header(fields={"job": "a", "request": 1.5})], "pause.request cannot be 1.5"),
        ([header(fields={"job": "a", "request": True})], "pause.request cannot be True"),
        ([header(fields={"job": "a", "request": 10**300})], "pause.request cannot be"),
        ([header(frames=[{"field": "job"}]), b""], "pause has no binary field 'job'"),
        ([header(type="submit", frames=[{"field": "picture"}] * 2), b"", b""], "has no binary field 'picture'"),
        ([header(type="submit", fields={"job": "a", "picture": "x"})], "submit has no field 'picture'"),
        ([header(type="submit", fields={"job": "a", "overrides": {"a": [1]}})], "overrides cannot be a dict"),
        ([header(type="submit", fields={"job": "a", "c2w": ["x"]})], "c2w cannot be a list"),
        ([header(type="submit", fields={"job": "a", "c2w": [0] * 300})], "c2w cannot be a list"),
    ],
)
def test_a_broken_header_is_named(frames, complaint):
    with pytest.raises(ProtocolError, match="(?s)" + complaint.replace("(", r"\(")):
        decode(frames)


@pytest.mark.parametrize(
    ("dtype", "shape", "n_bytes", "complaint"),
    [
        ("<f4", [2, 3], 23, "claims 24 bytes"),
        ("<f8", [1], 8, "unknown number type '<f8'"),
        ("O", [1], 8, "unknown number type 'O'"),
        (["<f4"], [1], 4, "unknown number type a list"),
        ("u1", [2**40, 2**40], 4, "bad shape"),
        ("u1", [2**28, 2**28, 2**28, 2**28], 4, "claims"),
        ("u1", [-1, -4], 4, "bad shape"),
        ("u1", [1.0], 1, "bad shape"),
        ("u1", [True], 1, "bad shape"),
        ("u1", "4", 4, "bad shape"),
        ("u1", [1, 1, 1, 1, 1], 1, "bad shape"),
    ],
)
def test_an_array_that_does_not_fit_its_frame_is_refused(dtype, shape, n_bytes, complaint):
    described = {"field": "pixels", "dtype": dtype, "shape": shape}
    with pytest.raises(ProtocolError, match=complaint):
        decode([header(type="submit", frames=[described]), bytes(n_bytes)])


def test_bytes_and_arrays_are_not_mixed_up():
    with pytest.raises(ProtocolError, match="must be an array"):
        decode([header(type="submit", frames=[{"field": "pixels"}]), b"abc"])
    with pytest.raises(ProtocolError, match="must be bytes"):
        described = {"field": "picture", "dtype": "u1", "shape": [3]}
        decode([header(type="submit", frames=[described]), b"abc"])


def test_what_cannot_be_sent_is_refused_before_sending():
    with pytest.raises(ProtocolError, match="submit.seed cannot be sent"):
        encode(Submit("a", seed=2**60))
    with pytest.raises(ProtocolError, match="claims 12 bytes"):
        encode(Preview("a", 1, 1, Array("u1", (2, 2, 3), b"short")))
    with pytest.raises(ProtocolError, match="the header has"):
        encode(Submit("a", overrides={f"x{i}": "y" * 1000 for i in range(100)}))


def test_binary_data_is_passed_on_without_a_copy():
    pixels = bytearray(12)
    _, frame = encode(Preview("a", 1, 1, Array("u1", (2, 2, 3), pixels)))
    pixels[5] = 77
    assert frame[5] == 77


def test_an_array_is_seen_as_numbers():
    assert Array("<f4", (2,), b"\x00\x00\x80?\x00\x00\x00@").view().tolist() == [1.0, 2.0]
    assert Array("<i4", (1,), b"\xff\xff\xff\xff").view().tolist() == [-1]


def test_another_version_is_recognized_before_anything_else_is_read():
    with pytest.raises(VersionMismatch) as caught:
        decode([json.dumps({"v": 7, "kind": "warp", "cargo": [[]]}).encode()])
    assert caught.value.theirs == 7


def test_an_error_is_read_in_every_version():
    frames = encode(Error("version", "update the engine"))
    told = bytes(frames[0]).replace(f'"v":{PROTOCOL_VERSION}'.encode(), b'"v":9')
    assert b'"v":9' in told
    assert decode([told]) == Error("version", "update the engine")


def test_the_older_side_is_told_to_update():
    assert "update the engine" in which_side_to_update(engine=1, client=2)
    assert "update the client" in which_side_to_update(engine=2, client=1)
