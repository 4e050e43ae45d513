"""Frames that no client would send, against the real server: it stays up, small and quick for everyone else."""

import dataclasses
import json
import os
import time
from contextlib import closing
from pathlib import Path

import pytest
import zmq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from conrad_engine.protocol import PROTOCOL_VERSION, Hello, Ping, Shutdown, Status, codec, encode, new_job_id

from .engine_process import Engine, running, toy_job
from .test_protocol_codec import MESSAGES, fields_of

PER_EXAMPLE = 25
HARMLESS = MESSAGES.filter(lambda message: not isinstance(message, Shutdown))
"""Tampering may leave a message as it is, and the engine would rightly end."""
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
HEADER_PARTS = {
    "v": st.just(PROTOCOL_VERSION) | JUNK,
    "type": st.sampled_from(sorted(set(codec.MESSAGES) - {"shutdown"})) | JUNK,
    "fields": st.dictionaries(st.sampled_from(["job", "request", "c2w", "overrides", "picture"]), JUNK, max_size=4)
    | JUNK,
    "frames": st.lists(
        st.fixed_dictionaries({"field": st.text(max_size=8)}, optional={"dtype": JUNK, "shape": JUNK}), max_size=3
    )
    | JUNK,
}


@st.composite
def broken(draw) -> list[bytes]:
    """Bytes; or JSON of nearly the right form; or a sound message whose frames were tampered with."""
    way = draw(st.integers(0, 2))
    if way == 0:
        return draw(st.lists(st.binary(max_size=64), min_size=1, max_size=16))
    if way == 1:
        header = json.dumps(draw(st.fixed_dictionaries(HEADER_PARTS))).encode()
        return [header, *draw(st.lists(st.binary(max_size=16), max_size=3))]
    frames = [bytes(frame) for frame in encode(draw(HARMLESS))]
    match draw(st.integers(0, 4)):
        case 0:
            frames.append(draw(st.binary(max_size=16)))
        case 1:
            frames = frames[:-1] or [b""]
        case 2:
            frames = frames[::-1]
        case 3:
            where = draw(st.integers(0, max(0, len(frames[0]) - 1)))
            frames[0] = frames[0][:where] + draw(st.binary(min_size=1, max_size=3)) + frames[0][where + 1 :]
        case _:
            frames[-1] = frames[-1][: draw(st.integers(0, len(frames[-1])))]
    return frames


@st.composite
def sound(draw) -> list[bytes]:
    """Any message of any kind; some of them about jobs that exist."""
    message = draw(HARMLESS)
    if "job" in fields_of(type(message)) and draw(st.booleans()):
        message = dataclasses.replace(message, job=draw(st.sampled_from(KNOWN_JOBS)))
    return [bytes(frame) for frame in encode(message)]


KNOWN_JOBS = [new_job_id() for _ in range(4)]


def memory_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Attack:
    """A connection that sends whatever it is given, and a proper client that must not notice."""

    def __init__(self, engine: Engine, is_reading: bool) -> None:
        self.engine, self.is_reading = engine, is_reading
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.plain_username, self.socket.plain_password = b"conrad", engine.connection.token.encode()
        self.socket.linger, self.socket.sndtimeo = 0, 60_000
        self.socket.connect(engine.connection.endpoint)
        self.socket.send_multipart(encode(Hello("fuzz")))
        self.client = engine.client()
        for job in KNOWN_JOBS:
            self.client.request(dataclasses.replace(toy_job(steps=2), job=job))
        self.n_sent = 0
        self.before = memory_bytes(engine.process.pid)

    def send(self, batch: list[list[bytes]]) -> None:
        for frames in batch:
            self.socket.send_multipart(frames)
        self.n_sent += len(batch)
        while self.is_reading and self.socket.poll(0):
            self.socket.recv_multipart()
        assert self.engine.process.poll() is None, self.engine.log.read_text()[-3000:]

    def check(self) -> None:
        started_s = time.monotonic()
        assert isinstance(self.client.request(Ping(), 60.0), Status)
        assert time.monotonic() - started_s < 30.0
        assert memory_bytes(self.engine.process.pid) - self.before < 100e6
        assert "Traceback" not in self.engine.log.read_text(), self.engine.log.read_text()[-3000:]

    def close(self) -> None:
        self.client.close()
        self.context.destroy(linger=0)


def attack(engine: Engine, frames: st.SearchStrategy, n_messages: int, is_reading: bool) -> None:
    with closing(Attack(engine, is_reading)) as attacker:
        run_attack(attacker, frames, n_messages)


def run_attack(attacker: Attack, frames: st.SearchStrategy, n_messages: int) -> None:
    # Not shrunk: the engine remembers what came before, so that a part of a failing batch says nothing.
    @settings(
        max_examples=-(-n_messages // PER_EXAMPLE),
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(frames, min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
    def run(batch):
        attacker.send(batch)
        if attacker.n_sent % (20 * PER_EXAMPLE) == 0:
            attacker.check()

    run()
    attacker.check()
    assert attacker.n_sent >= n_messages


@pytest.mark.parametrize(
    "n_messages", [1_000, pytest.param(50_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
@pytest.mark.parametrize("is_reading", [True, False], ids=["reading", "deaf"])
def test_broken_frames(tmp_path, n_messages, is_reading):
    with running(tmp_path / "data") as engine:
        attack(engine, broken(), n_messages, is_reading)


@pytest.mark.parametrize(
    "n_messages", [1_000, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_sound_frames_of_senseless_content(tmp_path, n_messages):
    with running(tmp_path / "data") as engine:
        attack(engine, sound(), n_messages, True)


def test_a_peer_that_does_not_speak_zeromq(tmp_path):
    import socket

    with running(tmp_path / "data") as engine, engine.client() as client:
        port = int(engine.connection.endpoint.rpartition(":")[2])
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\xff\0\0\0\0\0\0\0\1\x7f\3" + bytes(200), b""):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(data)
                assert isinstance(client.request(Ping(), 60.0), Status)


def test_a_frame_beyond_the_limit_is_not_taken(tmp_path):
    """ZeroMQ cuts the connection before it makes room for the frame."""
    with running(tmp_path / "data") as engine, engine.client() as client:
        client.request(Ping(), 60.0)
        before = memory_bytes(engine.process.pid)
        with closing(Attack(engine, True)) as attacker:
            attacker.socket.send_multipart([b"{}", bytes(300 * 1024 * 1024)], copy=False)
            time.sleep(0.5)
            assert isinstance(client.request(Ping(), 60.0), Status)
            assert memory_bytes(engine.process.pid) - before < 50e6
