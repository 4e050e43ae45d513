"""The client without an engine, or with one that misbehaves."""

import gc
import subprocess
import sys
import time

import pytest
import zmq

from conrad_engine.protocol import (
    CLOSED,
    CONNECTING,
    NOT_RESPONDING,
    READY,
    Connection,
    EngineClient,
    EngineUnavailable,
    Error,
    JobState,
    Listed,
    Pause,
    Ping,
    Progress,
    RequestRefused,
    Status,
    Welcome,
    decode,
    encode,
)
from conrad_engine.protocol import client as client_module

from .engine_process import ROOT, until_message


class StubEngine:
    """A ROUTER that says what a test tells it to; it lets every PLAIN client in."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.gate = self.context.socket(zmq.REP)
        self.gate.bind("inproc://zeromq.zap.01")
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.PLAIN_SERVER, 1)
        self.socket.setsockopt(zmq.ZAP_DOMAIN, b"x")
        self.endpoint = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"
        self.heard = []

    def serve(self, client: EngineClient, *answers, for_s: float = 0.5) -> list:
        """Let both sides work for a while; the answers go out when the client is first heard."""
        told, end_s = [], time.monotonic() + for_s
        answers = list(answers)
        while time.monotonic() < end_s:
            if self.gate.poll(5):
                version, number, *_ = self.gate.recv_multipart()
                self.gate.send_multipart([version, number, b"200", b"", b"", b""])
            while self.socket.poll(5):
                route, *frames = self.socket.recv_multipart()
                self.heard.append(decode(frames))
                while answers:
                    self.socket.send_multipart([route, *encode(answers.pop(0))])
            told += client.poll()
        return told

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def stub():
    engine = StubEngine()
    yield engine
    engine.close()


def test_nothing_blocks_without_an_engine():
    with EngineClient("tcp://127.0.0.1:9", "token") as client:
        started_s = time.monotonic()
        for _ in range(100):
            assert client.poll() == []
        client.send(Pause("a"))
        assert time.monotonic() - started_s < 0.5
        assert client.state == CONNECTING
        with pytest.raises(EngineUnavailable, match="not answered within 0.2 s"):
            client.request(Ping(), timeout_s=0.2)
    assert client.state == CLOSED and client.poll() == []
    with pytest.raises(EngineUnavailable, match="closed"):
        client.send(Ping())


def test_a_senseless_address_is_named():
    with pytest.raises(EngineUnavailable, match="no address"):
        EngineClient("nowhere", "token")


def test_requests_wait_for_the_welcome(stub):
    with EngineClient(stub.endpoint, "t") as client:
        client.send(Pause("a"))
        stub.serve(client)
        assert stub.heard and not [m for m in stub.heard if isinstance(m, Pause)]
        stub.serve(client, Welcome("0", 1), for_s=1.5)  # The answer to its next ping.
        assert [m.job for m in stub.heard if isinstance(m, Pause)] == ["a"]


def test_an_unanswered_request_is_sent_again_after_a_new_welcome(stub):
    with EngineClient(stub.endpoint, "t") as client:
        stub.serve(client, Welcome("0", 1), Listed(0))
        client.send(Pause("a"))
        stub.serve(client, Error("hello", "say hello first"))
        stub.serve(client, Welcome("0", 2), for_s=1.5)
        assert [m.job for m in stub.heard if isinstance(m, Pause)] == ["a", "a"]


def test_only_the_newest_progress_is_handed_out_and_states_all_are(stub):
    with EngineClient(stub.endpoint, "t") as client:
        steps = [Progress("a", n, "optimize", n, 9) for n in range(5)] + [Progress("b", 1, "optimize", 1, 9)]
        states = [JobState("a", n, "running") for n in range(3)]
        client.poll()
        stub.gate.poll(1000)
        version, number, *_ = stub.gate.recv_multipart()
        stub.gate.send_multipart([version, number, b"200", b"", b"", b""])
        assert stub.socket.poll(2000)
        route, *_ = stub.socket.recv_multipart()
        for message in [Welcome("0", 1), *steps[:3], *states, *steps[3:]]:
            stub.socket.send_multipart([route, *encode(message)])
        time.sleep(0.3)
        told = client.poll()
        assert [m.revision for m in told if isinstance(m, JobState)] == [0, 1, 2]
        assert [(m.job, m.number) for m in told if isinstance(m, Progress)] == [("a", 4), ("b", 1)]
        assert client.jobs["a"].revision == 2


def test_a_budget_leaves_the_rest_for_later(stub):
    with EngineClient(stub.endpoint, "t") as client:
        stub.serve(client, Welcome("0", 1))
        assert client.poll(budget_s=0.0) == []


def test_jobs_that_were_forgotten_meanwhile_leave_the_table(stub):
    with EngineClient(stub.endpoint, "t") as client:
        stub.serve(client, Welcome("0", 1), JobState("a", 1, "done"), JobState("b", 1, "done"), Listed(2))
        assert client.jobs.keys() == {"a", "b"}
        client.send(Ping())
        stub.serve(client, Welcome("0", 2), JobState("b", 1, "done"), Listed(1))
        assert client.jobs.keys() == {"b"}


def test_silence_is_noticed(stub, monkeypatch):
    monkeypatch.setattr(client_module, "SILENCE_S", 0.2)
    with EngineClient(stub.endpoint, "t") as client:
        stub.serve(client, Welcome("0", 1))
        time.sleep(0.3)
        client.poll()
        assert client.state == NOT_RESPONDING
        client.send(Ping())
        stub.serve(client, Status(), for_s=0.15)
        assert client.state == READY


def test_an_engine_of_another_version_is_told_apart(stub):
    with EngineClient(stub.endpoint, "t") as client:
        client.poll()
        stub.gate.poll(1000)
        version, number, *_ = stub.gate.recv_multipart()
        stub.gate.send_multipart([version, number, b"200", b"", b"", b""])
        assert stub.socket.poll(2000)
        route, *_ = stub.socket.recv_multipart()
        stub.socket.send_multipart([route, b'{"v":9,"type":"welcome","cargo":[]}'])
        told = until_message(client, lambda message: isinstance(message, Error))
        assert told.code == "version" and "update the client" in told.message
        with pytest.raises(EngineUnavailable):
            client.wait("a")


def test_waiting_for_a_job_that_does_not_exist_ends(stub):
    with EngineClient(stub.endpoint, "t") as client:
        stub.serve(client, Welcome("0", 1), Listed(0))
        client.send = lambda request: 1  # The list that `wait` asks for is answered below.
        with pytest.raises(RequestRefused, match="knows no job a"):
            client.wait("a", timeout_s=2.0)


def test_a_client_that_nobody_closes_does_not_hang_the_process():
    code = (
        "import gc; from conrad_engine.protocol import EngineClient\n"
        "class Holder: pass\n"
        "for _ in range(3):\n"
        "    holder = Holder(); holder.client = EngineClient('tcp://127.0.0.1:9', 't'); holder.self = holder; del holder\n"
        "    gc.collect()\n"
        "last = EngineClient('tcp://127.0.0.1:9', 't')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20, cwd=ROOT)
    gc.collect()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"endpoint": 1}'])
def test_a_broken_connection_file_is_named(tmp_path, text):
    (tmp_path / "connection.json").write_text(text)
    with pytest.raises(EngineUnavailable, match="cannot be read"):
        EngineClient.from_connection_file(tmp_path / "connection.json")
    with pytest.raises(EngineUnavailable, match="start one with `conrad serve`"):
        EngineClient.from_connection_file(tmp_path / "none.json")


def test_an_announcement_survives_the_way_to_a_file_and_back():
    connection = Connection("tcp://127.0.0.1:5", "0.1", 1, 77, "secret")
    assert Connection.from_json(connection.to_json()) == connection


def test_the_protocol_needs_nothing_but_zmq():
    code = (
        "import sys; blocked = ('torch', 'numpy', 'PIL', 'conrad_engine.config', 'conrad_engine.errors');"
        "sys.modules.update(dict.fromkeys(blocked));"
        "import conrad_engine.protocol as p; assert set(p.__all__) == {n for n in p.__all__ if hasattr(p, n)}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20, cwd=ROOT)
