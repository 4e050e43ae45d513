"""The client without an engine, or with one that misbehaves."""

import gc
import subprocess
import sys
import time
from collections.abc import Callable

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
    Hello,
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

from .engine_process import ROOT, WITHIN_S, until_message


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
        self.route = b""

    def serve(self, client: EngineClient, *answers, until: Callable[[], object]) -> list:
        """Let both sides work until something holds; the answers go out when the client is next heard."""
        told, end_s = [], time.monotonic() + WITHIN_S
        answers = list(answers)
        while answers or not until():
            assert time.monotonic() < end_s, f"not within {WITHIN_S:g} s; heard: {self.heard}, told: {told}"
            if self.gate.poll(5):
                version, number, *_ = self.gate.recv_multipart()
                self.gate.send_multipart([version, number, b"200", b"", b"", b""])
            while self.socket.poll(5):
                self.route, *frames = self.socket.recv_multipart()
                self.heard.append(decode(frames))
                while answers:
                    self.socket.send_multipart([self.route, *encode(answers.pop(0))])
            told += client.poll()
        return told

    def let_in(self) -> bytes:
        """Open the gate for a client and return its route, once it has said hello."""
        assert self.gate.poll(WITHIN_S * 1000)
        version, number, *_ = self.gate.recv_multipart()
        self.gate.send_multipart([version, number, b"200", b"", b"", b""])
        assert self.socket.poll(WITHIN_S * 1000)
        return self.socket.recv_multipart()[0]

    def pauses(self) -> list[str]:
        """Jobs that it was asked to pause."""
        return [message.job for message in self.heard if isinstance(message, Pause)]

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
        assert time.monotonic() - started_s < 3.0, "a hundredth of that for each call, however busy the machine is"
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
        stub.serve(client, until=lambda: sum(isinstance(message, Ping) for message in stub.heard) >= 2)
        assert isinstance(stub.heard[0], Hello) and not stub.pauses()
        stub.serve(client, Welcome("0", 1), until=stub.pauses)  # The answer to its next ping.
        assert stub.pauses() == ["a"]


def test_an_unanswered_request_is_sent_again_after_a_new_welcome(stub):
    with EngineClient(stub.endpoint, "t") as client:
        stub.serve(client, Welcome("0", 1), Listed(0), until=lambda: client.state == READY)
        client.send(Pause("a"))
        stub.serve(client, Error("hello", "say hello first"), until=stub.pauses)
        stub.serve(client, Welcome("0", 2), until=lambda: len(stub.pauses()) > 1)
        assert stub.pauses() == ["a", "a"]


def test_only_the_newest_progress_is_handed_out_and_states_all_are(stub):
    with EngineClient(stub.endpoint, "t") as client:
        steps = [Progress("a", n, "optimize", n, 9) for n in range(5)] + [Progress("b", 1, "optimize", 1, 9)]
        states = [JobState("a", n, "running") for n in range(3)]
        client.poll()
        route = stub.let_in()
        for message in [Welcome("0", 1), *steps[:3], *states, *steps[3:]]:
            stub.socket.send_multipart([route, *encode(message)])
        time.sleep(2.0)  # For all of them to be there before the one call that is tested.
        told = client.poll()
        assert [m.revision for m in told if isinstance(m, JobState)] == [0, 1, 2]
        assert [(m.job, m.number) for m in told if isinstance(m, Progress)] == [("a", 4), ("b", 1)]
        assert client.jobs["a"].revision == 2


def test_a_budget_leaves_the_rest_for_later(stub):
    with EngineClient(stub.endpoint, "t") as client:
        stub.serve(client, Welcome("0", 1), until=lambda: client.state == READY)
        client.send(Pause("a"))
        stub.serve(client, until=stub.pauses)
        stub.socket.send_multipart([stub.route, *encode(Status(device="x"))])
        assert client.poll(timeout_s=WITHIN_S, budget_s=0.0) == []
        assert [message.device for message in client.poll()] == ["x"]


def test_jobs_that_were_forgotten_meanwhile_leave_the_table(stub):
    with EngineClient(stub.endpoint, "t") as client:
        jobs = JobState("a", 1, "done"), JobState("b", 1, "done")
        stub.serve(client, Welcome("0", 1), *jobs, Listed(2), until=lambda: client.jobs.keys() == {"a", "b"})
        client.send(Ping())
        again = Welcome("0", 2), JobState("b", 1, "done"), Listed(1)
        stub.serve(client, *again, until=lambda: client.jobs.keys() == {"b"})


def test_silence_is_noticed(stub, monkeypatch):
    monkeypatch.setattr(client_module, "SILENCE_S", 2.0)
    with EngineClient(stub.endpoint, "t") as client:
        stub.serve(client, Welcome("0", 1), until=lambda: client.state == READY)
        time.sleep(2.5)
        client.poll()
        assert client.state == NOT_RESPONDING
        stub.serve(client, Status(), until=lambda: client.state == READY)


def test_an_engine_of_another_version_is_told_apart(stub):
    with EngineClient(stub.endpoint, "t") as client:
        client.poll()
        stub.socket.send_multipart([stub.let_in(), b'{"v":9,"type":"welcome","cargo":[]}'])
        told = until_message(client, lambda message: isinstance(message, Error))
        assert told.code == "version" and "update the client" in told.message
        with pytest.raises(EngineUnavailable):
            client.wait("a")


def test_waiting_for_a_job_that_does_not_exist_ends(stub):
    with EngineClient(stub.endpoint, "t") as client:
        told = []
        while not any(isinstance(message, Listed) for message in told):
            told += stub.serve(client, Welcome("0", 1), Listed(0), until=lambda: client.state == READY)
            told += client.poll(0.1)
        client.send = lambda request: 1  # The list that `wait` asks for was answered above.
        with pytest.raises(RequestRefused, match="knows no job a"):
            client.wait("a", timeout_s=WITHIN_S)


def test_a_client_that_nobody_closes_does_not_hang_the_process():
    code = (
        "import gc; from conrad_engine.protocol import EngineClient\n"
        "class Holder: pass\n"
        "for _ in range(3):\n"
        "    holder = Holder(); holder.client = EngineClient('tcp://127.0.0.1:9', 't'); holder.self = holder; del holder\n"
        "    gc.collect()\n"
        "last = EngineClient('tcp://127.0.0.1:9', 't')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WITHIN_S, cwd=ROOT)
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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WITHIN_S, cwd=ROOT)
