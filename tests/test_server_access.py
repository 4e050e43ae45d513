"""Who may talk to an engine: token, version, loopback, and keys for any other address."""

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from conrad_engine.errors import InputError
from conrad_engine.protocol import (
    CONNECTION_FILE,
    PROTOCOL_VERSION,
    REFUSED,
    CurveKeys,
    EngineClient,
    EngineUnavailable,
    Error,
    Hello,
    Pause,
    Ping,
    ProtocolError,
    Shutdown,
    Status,
    encode,
)
from conrad_engine.server.gate import ServerKeys, check_address
from conrad_engine.server.keys import make_keys
from conrad_engine.server.serve import Options, serve

from .engine_process import (
    ROOT,
    WITHIN_S,
    toy_job,
    until,
)


def test_a_wrong_token_is_refused_with_a_name(engine):
    with EngineClient(engine.connection.endpoint, "guess") as stranger:
        messages = until(stranger, lambda: stranger.state == REFUSED)
        assert Error("refused", messages[-1].message) in messages
        with pytest.raises(EngineUnavailable):
            stranger.send(Shutdown())


def test_nobody_else_can_read_the_connection_file(engine):
    path = engine.folder / CONNECTION_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["token"] == engine.connection.token


def test_logs_carry_no_token(engine, client):
    job = toy_job(steps=2)
    client.request(job)
    client.wait(job.job, WITHIN_S)
    logs = [engine.log, *engine.folder.glob("*.log")]
    assert len(logs) >= 2
    assert all(engine.connection.token not in log.read_text() for log in logs)
    command = open(f"/proc/{engine.worker_pids()[0]}/cmdline").read()
    assert engine.connection.token not in command


def test_a_client_of_another_version_learns_which_side_is_old(engine):
    context = zmq.Context()
    try:
        dealer = context.socket(zmq.DEALER)
        dealer.plain_username, dealer.plain_password = b"conrad", engine.connection.token.encode()
        dealer.connect(engine.connection.endpoint)
        newer = {**json.loads(bytes(encode(Hello())[0])), "v": PROTOCOL_VERSION + 1}
        hello = json.dumps(newer).encode()
        dealer.send_multipart([hello])
        assert dealer.poll(60_000)
        answer = json.loads(dealer.recv_multipart()[0])
        assert answer["fields"]["code"] == "version" and "update the engine" in answer["fields"]["message"]
    finally:
        context.destroy(linger=0)


def test_only_loopback_is_bound(engine):
    port = int(engine.connection.endpoint.rpartition(":")[2])
    listening = [line.split() for line in open("/proc/net/tcp") if f":{port:04X} " in line and " 0A " in line]
    assert listening and all(line[1].startswith("0100007F") for line in listening)
    with socket.create_connection(("127.0.0.1", port), timeout=2):
        pass
    with pytest.raises(ProtocolError):
        EngineClient(engine.connection.endpoint, engine.connection.token).send(Pause("x" * 9000))


@pytest.mark.parametrize("address", ["0.0.0.0", "192.168.1.5", "::"])
def test_other_addresses_need_keys(address, tmp_path):
    with pytest.raises(InputError, match="would let other machines send jobs unencrypted"):
        serve(Options(tmp_path / "data", address=address))
    assert not (tmp_path / "data").exists()
    with pytest.raises(InputError, match="takes an IP address"):
        check_address("example.org", None)


@pytest.fixture
def keys(tmp_path) -> Path:
    make_keys(tmp_path / "keys", "alice")
    make_keys(tmp_path / "keys", "bob")
    return tmp_path / "keys"


def test_keys_open_an_engine_and_nothing_else_does(tmp_path, keys):
    server_key, alice, bob = keys / "server.key", keys / "alice.key_secret", keys / "bob.key_secret"
    (keys / "clients" / "bob.key").unlink()
    code = (
        "import sys; from pathlib import Path; from conrad_engine.server.serve import *;"
        "serve(Options(Path(sys.argv[1]), '0.0.0.0', keys=Path(sys.argv[2]), devices=('cpu',), pipeline='tests.toy_pipeline'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "data"), str(keys)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        announced = json.loads(process.stdout.readline())
        assert announced["token"] == "" and announced["endpoint"].startswith("tcp://0.0.0.0:")
        endpoint = announced["endpoint"].replace("0.0.0.0", "127.0.0.1")
        with EngineClient(endpoint, keys=CurveKeys.load(server_key, alice)) as client:
            assert isinstance(client.request(Ping(), WITHIN_S), Status)
        with EngineClient(endpoint, keys=CurveKeys.load(server_key, bob)) as client:
            until(client, lambda: client.state == "refused")
        for wrong in (
            EngineClient(endpoint, "guess"),
            EngineClient(endpoint, keys=CurveKeys.load(keys / "bob.key_secret", alice)),
        ):
            with wrong:
                assert not [m for m in wrong.poll(1.0) + wrong.poll(0.5) if not isinstance(m, Error)]
                assert wrong.state in ("connecting", "refused")
    finally:
        process.terminate()
        process.wait(WITHIN_S)


def test_key_files_are_private_and_checked(keys, tmp_path):
    assert (keys / "server.key_secret").stat().st_mode & 0o077 == 0
    assert len(ServerKeys.load(keys).clients) == 2
    with pytest.raises(InputError, match="make keys with"):
        ServerKeys.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="a client's name has"):
        make_keys(keys, "../x")
    former = (keys / "server.key").read_bytes()
    make_keys(keys, "carol")
    assert (keys / "server.key").read_bytes() == former
