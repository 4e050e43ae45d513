"""What must not break the engine: sudden deaths, full disks, clients that misbehave. Every process here is a real one."""

import ast
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import zmq

from conrad_engine.errors import InputError
from conrad_engine.protocol import (
    ARRAYS,
    CANCELLED,
    DONE,
    FAILED,
    FINAL_STATES,
    Cancel,
    EngineClient,
    Hello,
    Keep,
    Pause,
    Ping,
    RequestRefused,
    Resume,
    SetPreview,
    Welcome,
    encode,
)
from conrad_engine.server import store as store_module
from conrad_engine.server.dispatch import CANCEL_LIMIT_S
from conrad_engine.server.file_thread import FileThread
from conrad_engine.server.job_queue import Job
from conrad_engine.server.process import is_alive
from conrad_engine.server.store import DiskFull, FolderInUse, Store
from conrad_engine.server.workers import Workers

from .engine_process import (
    ROOT,
    WITHIN_S,
    Engine,
    running,
    toy_job,
    until,
    until_message,
    until_state,
    until_step,
)
from .toy_pipeline import expected_value

STEPS = 60
SLOWLY = json.dumps({"delay_s": 0.01, "checkpoint_every": 5})
FEW, MANY = 3, 20


def check_result(client: EngineClient, job: str, steps: int = STEPS) -> None:
    """The job is done, its state is that of an undisturbed run, and its arrays are whole."""
    state = client.wait(job, WITHIN_S)
    assert (state.state, state.metrics["value"]) == (DONE, expected_value(steps)), state
    result = client.fetch(job, ARRAYS)
    faces = np.frombuffer(result.faces.data, result.faces.dtype).reshape(result.faces.shape)
    assert faces.shape == (100, 3) and faces.max() < result.vertices.shape[0]
    assert bytes(client.fetch(job, "mesh.glb").data) == b"glTF" + bytes(100)


def moments(n: int) -> list:
    """Waiting times from before the job starts until after its end."""
    generator = random.Random(n)
    return [generator.uniform(0.0, 1.2) for _ in range(n)]


@pytest.mark.parametrize("n", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_killed_worker_loses_no_job(tmp_path, n):
    with running(tmp_path / "data") as engine, engine.client() as client:
        for wait_s in moments(n):
            job = toy_job(steps=STEPS, behavior=SLOWLY)
            client.request(job)
            time.sleep(wait_s)
            for pid in engine.worker_pids():
                os.kill(pid, signal.SIGKILL)
            check_result(client, job.job)


@pytest.mark.parametrize("n", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_killed_server_loses_no_job_and_its_clients_find_it_again(tmp_path, n):
    engine = Engine(tmp_path / "data")
    try:
        with engine.client() as client:
            jobs = []
            for wait_s in moments(n):
                jobs.append(toy_job(steps=STEPS, behavior=SLOWLY))
                client.send(jobs[-1])
                until(client, lambda: jobs[-1].job in client.jobs)
                time.sleep(wait_s)
                workers = engine.worker_pids()
                engine.kill()
                engine = Engine(tmp_path / "data")
                until_message(client, lambda m: isinstance(m, Welcome))
                # A worker that was just being started ends as soon as it has read that its server is gone.
                end_s = time.monotonic() + WITHIN_S
                while any(is_alive(pid) for pid in workers):
                    assert time.monotonic() < end_s, "workers of the former engine live on"
                    time.sleep(0.05)
            for job in jobs:
                check_result(client, job.job)
    finally:
        engine.stop()


@pytest.mark.parametrize("n", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_killed_client_disturbs_nobody(tmp_path, n):
    code = (
        "import sys; from pathlib import Path; from tests.engine_process import toy_job;"
        "from conrad_engine.protocol import *;"
        "client = EngineClient.from_connection_file(Path(sys.argv[1]));"
        f"job = toy_job(steps={STEPS}, behavior='{SLOWLY}'); client.request(job);"
        "client.request(SetPreview(job.job)); print(job.job, flush=True); client.wait(job.job)"
    )
    with running(tmp_path / "data") as engine, engine.client() as client:
        for wait_s in moments(n):
            command = [sys.executable, "-c", code, str(engine.folder / "connection.json")]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
            )
            job = process.stdout.readline().strip()
            time.sleep(wait_s)
            process.kill()
            process.communicate()
            check_result(client, job)


def test_a_job_that_kills_its_worker_fails_and_the_next_one_runs(tmp_path):
    with running(tmp_path / "data") as engine, engine.client() as client:
        bad = toy_job(steps=STEPS, behavior=json.dumps({"crash_at": 3, "checkpoint_every": 1}))
        good = toy_job(steps=5)
        client.request(bad)
        client.request(good)
        state = client.wait(bad.job, WITHIN_S)
        assert (state.state, state.error_code) == (FAILED, "worker_lost")
        assert "code 9" in state.error_message and state.error_hint
        assert client.wait(good.job, WITHIN_S).state == DONE


@pytest.mark.slow
def test_a_job_that_hangs_can_be_cancelled(tmp_path):
    with running(tmp_path / "data") as engine, engine.client() as client:
        job = toy_job(steps=STEPS, behavior=json.dumps({"hang_at": 3}))
        client.request(job)
        until_step(client, job.job, 2)
        client.request(Cancel(job.job))
        assert until_state(client, job.job, CANCELLED, within_s=CANCEL_LIMIT_S + WITHIN_S)


def test_200_jobs_of_8_clients_with_random_cancels(tmp_path):
    """None is lost, none is starved, and every one ends as it was told to."""
    generator = random.Random(0)
    with running(tmp_path / "data", devices="cpu,cpu") as engine:
        clients = [engine.client(f"client {number}") for number in range(8)]
        jobs = {}
        for number in range(200):
            client = clients[number % 8]
            job = toy_job(steps=3, priority=generator.choice([0, 0, 1]))
            jobs[job.job] = is_cancelled = generator.random() < 0.3
            client.send(job)
            if is_cancelled:
                client.send(Cancel(job.job))
            if generator.random() < 0.1:
                client.send(Pause(job.job))
                client.send(Resume(job.job))
        end_s = time.monotonic() + 2 * WITHIN_S
        while any(len([j for j in c.jobs.values() if j.state in FINAL_STATES]) < 200 for c in clients):
            for client in clients:
                client.poll(0.005)
            assert time.monotonic() < end_s
        for client in clients:
            assert client.jobs.keys() == jobs.keys()
            for job, is_cancelled in jobs.items():
                state = client.jobs[job]
                assert state.state == DONE if not is_cancelled else state.state in (CANCELLED, DONE)
                assert state.state != DONE or state.metrics["value"] == expected_value(3)
        assert sum(state.state == CANCELLED for state in clients[0].jobs.values()) > 20
        for client in clients:
            client.close()


def test_the_order_of_one_priority_is_kept(tmp_path):
    hold = tmp_path / "hold"
    hold.touch()
    with running(tmp_path / "data") as engine, engine.client() as client:
        first = toy_job(steps=3, behavior=json.dumps({"hold_at": 1, "hold": str(hold)}))
        client.request(first)
        until_step(client, first.job, 1)
        jobs = [toy_job(steps=1, priority=priority) for priority in (0, 5, 0, 5, -3, 0)]
        for job in jobs:
            client.request(job)
        hold.unlink()
        messages = until(client, lambda: all(state.state == DONE for state in client.jobs.values()))
        order = [message.job for message in messages if getattr(message, "state", "") == DONE]
        assert order == [first.job, *(jobs[index].job for index in (1, 3, 0, 2, 5, 4))]


def raw_socket(engine: Engine) -> tuple[zmq.Context, zmq.Socket]:
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.plain_username, socket.plain_password = b"conrad", engine.connection.token.encode()
    socket.linger = 0
    socket.rcvhwm = 1
    socket.connect(engine.connection.endpoint)
    return context, socket


def memory_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_client_that_stops_reading_slows_nobody(tmp_path):
    """It watches large previews and asks for more than it ever reads; the job, the others and the memory do not care."""
    with running(tmp_path / "data") as engine, engine.client() as client:
        context, deaf = raw_socket(engine)
        deaf.send_multipart(encode(Hello("deaf")))
        job = toy_job(steps=300, behavior=json.dumps({"delay_s": 0.01}))
        client.request(job)
        deaf.send_multipart(encode(SetPreview(job.job, width=1024, height=1024)))
        until_step(client, job.job, 20)
        before = memory_bytes(engine.process.pid)
        for _ in range(3000):
            deaf.send_multipart(encode(Ping(1)))
        assert client.wait(job.job, WITHIN_S).state == DONE
        assert memory_bytes(engine.process.pid) - before < 60e6
        answered_s = []
        for _ in range(50):
            started_s = time.monotonic()
            client.request(Ping(), WITHIN_S)
            answered_s.append(time.monotonic() - started_s)
        assert sorted(answered_s)[25] < 0.2
        context.destroy(linger=0)


def test_a_client_that_comes_back_is_told_what_it_missed(tmp_path):
    with running(tmp_path / "data") as engine:
        with engine.client() as client:
            job = toy_job(steps=5)
            client.request(job)
        time.sleep(1.0)
        with engine.client() as again:
            until(again, lambda: again.jobs.get(job.job) and again.jobs[job.job].state == DONE)


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path):
    """A real file system of a few megabytes."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with running(small / "data") as engine, engine.client() as client:
            done = toy_job(steps=STEPS)
            client.request(done)
            check_result(client, done.job)
            stuffing = small / "stuffing"
            with open(stuffing, "wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(4096))
            with pytest.raises(RequestRefused, match="disk is full|list cannot be written") as caught:
                client.request(toy_job(steps=5))
            assert caught.value.code == "disk_full"
            check_result(client, done.job)
            stuffing.unlink()
            later = toy_job(steps=STEPS)
            client.request(later)
            check_result(client, later.job)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_change_that_cannot_be_written_is_kept_in_memory_and_written_later(tmp_path, monkeypatch):
    store = Store(tmp_path)
    job = Job("0" * 32, 1, {"resolved": {}})
    store.save(job)
    monkeypatch.setattr(store, "_database", FullDatabase())
    with pytest.raises(DiskFull, match="job list cannot be written"):
        store.save(job)
    with pytest.raises(DiskFull):
        store.remove(job.id)
    monkeypatch.undo()
    assert store.load() == [job]
    store.close()


class FullDatabase:
    """A database on a full disk."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def execute(self, *arguments):
        raise store_module.sqlite3.OperationalError("database or disk is full")


def test_inputs_that_do_not_fit_leave_nothing_behind(tmp_path, monkeypatch):
    store = Store(tmp_path)

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "_write", full)
    with pytest.raises(DiskFull):
        store.put_inputs(toy_job())
    assert not list((tmp_path / "incoming").iterdir()) and not list((tmp_path / "jobs").iterdir())
    store.close()


def test_a_data_folder_belongs_to_one_engine(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(FolderInUse, match="another engine uses the data folder"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


def test_what_an_earlier_engine_left_half_way_is_removed(tmp_path):
    store = Store(tmp_path)
    for name in ("incoming/x", "trash/y", f"jobs/{'a' * 32}", f"jobs/{'b' * 32}"):
        (tmp_path / name).mkdir()
    store.sweep({"b" * 32})
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["b" * 32]
    assert not list((tmp_path / "incoming").iterdir()) and not list((tmp_path / "trash").iterdir())
    store.close()


def test_a_broken_or_newer_job_list_is_named(tmp_path):
    Store(tmp_path).close()
    (tmp_path / "jobs.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match="job list .* cannot be used"):
        Store(tmp_path)
    (tmp_path / "jobs.sqlite").unlink()
    store = Store(tmp_path)
    store._database.execute("PRAGMA user_version=99")
    store.close()
    with pytest.raises(InputError, match="another engine version"):
        Store(tmp_path)


def test_the_file_thread_survives_what_goes_wrong(tmp_path):
    files, outcomes = FileThread(), []
    errors = [OSError(5, "broken disk"), sqlite3.OperationalError("unable to open database file"), TypeError("mistake")]

    def fails(error):
        raise error

    for error in errors:
        files.do(lambda error=error: fails(error), outcomes.append)
    files.do(lambda: "fine", outcomes.append)
    end_s = time.monotonic() + 30
    while len(outcomes) < 4 and time.monotonic() < end_s:
        files.deliver()
        time.sleep(0.01)
    assert outcomes == [*errors, "fine"] and files.is_idle
    files.close()


@pytest.mark.parametrize(
    ("within_s", "reason", "is_fatal"),
    [(0.05, "the picture took too long", True), (1000.0, "the process ended with code -9", False)],
)
def test_a_worker_that_misses_a_deadline_is_killed_and_its_job_named(tmp_path, within_s, reason, is_fatal):
    """One that is killed by others while the deadline runs is not to blame, and its job goes on elsewhere."""
    (tmp_path / "empty").mkdir()
    workers = Workers(
        ("cpu",), "tcp://127.0.0.1:1", "secret", "tests.toy_pipeline", tmp_path, lambda route, message: True
    )
    assert workers.poll(may_start=True) == []
    (worker,) = workers
    worker.job = "a"
    workers.expect(worker, within_s, "the picture took too long", is_fatal=True)
    if not is_fatal:
        worker.process.kill()
    lost, end_s = [], time.monotonic() + 10
    while not lost and time.monotonic() < end_s:
        lost = workers.poll(may_start=False)
        time.sleep(0.02)
    assert [(item.job, item.reason, item.is_fatal) for item in lost] == [("a", reason, is_fatal)]
    workers.close()


def test_a_worker_that_cannot_start_is_told_with_the_end_of_its_log(tmp_path):
    with running(tmp_path / "data", pipeline="tests.no_such_module") as engine, engine.client() as client:
        until(client, lambda: client.status is not None and client.status.workers == "crashed")
        assert "No module named 'tests.no_such_module'" in client.status.problem
        assert client.request(Ping()).workers == "crashed"


def test_no_timer_depends_on_the_clock_on_the_wall():
    """The clock may jump: only the date of a job, which is shown and nothing more, comes from it."""
    users = []
    for path in sorted((ROOT / "conrad_engine").glob("server/*.py")) + sorted(
        (ROOT / "conrad_engine").glob("protocol/*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "time.time",
                "datetime.now",
                "datetime.datetime.now",
            ):
                users.append(path.name)
    assert users == ["dispatch.py"]


def test_a_clock_that_jumps_by_years_changes_nothing(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import itertools, time\nreal, jumps = time.time, itertools.cycle([0.0, 4e8, -3e8])\n"
        "time.time = lambda: real() + next(jumps)\n"
    )
    with running(tmp_path / "data", python_path=tmp_path) as engine, engine.client() as client:
        jobs = [toy_job(steps=20, behavior=SLOWLY) for _ in range(4)]
        for job in jobs:
            client.request(job)
        messages = until(client, lambda: all(state.state == DONE for state in client.jobs.values()))
        assert [m.job for m in messages if getattr(m, "state", "") == DONE] == [job.job for job in jobs]
        states = [client.jobs[job.job] for job in jobs]
        assert all(state.metrics["value"] == expected_value(20) and 0 <= state.elapsed_s < WITHIN_S for state in states)
        dates = [state.created_unix_s for state in states]
        assert max(dates) - min(dates) > 1e8, "the clock has not jumped"


def test_a_killed_server_still_knows_how_far_its_job_was(tmp_path):
    """So that the job can be stopped and kept before its next worker has loaded anything."""
    hold = tmp_path / "hold"
    hold.touch()
    engine = Engine(tmp_path / "data")
    try:
        with engine.client() as client:
            job = toy_job(steps=60, behavior=json.dumps({"checkpoint_every": 5, "hold_at": 20, "hold": str(hold)}))
            client.request(job)
            until_step(client, job.job, 20)
            until(client, lambda: saved_step(engine) == 20)
            engine.kill()
            engine = Engine(tmp_path / "data")
            until_message(client, lambda message: isinstance(message, Welcome))
            client.request(Keep(job.job))
            state = client.wait(job.job, WITHIN_S)
            assert (state.state, state.step, state.metrics["value"]) == (DONE, 20, expected_value(20))
    finally:
        engine.stop()


def saved_step(engine: Engine) -> int:
    """How far the only job is, as the next engine would read it."""
    with closing(sqlite3.connect(engine.folder / "jobs.sqlite")) as database:
        return json.loads(database.execute("SELECT body FROM jobs").fetchone()[0])["step"]


def test_progress_and_previews_wait_for_the_reader(tmp_path):
    """Of what a client has not acknowledged there is never more than one on the way."""
    with running(tmp_path / "data") as engine, engine.client() as client:
        context, slow = raw_socket(engine)
        slow.send_multipart(encode(Hello("slow")))
        assert slow.poll(WITHIN_S * 1000), "it must be there before the job is"
        job = toy_job(steps=150, behavior=json.dumps({"delay_s": 0.01}))
        client.request(job)
        client.wait(job.job, WITHIN_S)
        time.sleep(0.3)
        kinds = []
        while slow.poll(200):
            kinds.append(json.loads(slow.recv_multipart()[0])["type"])
        assert kinds.count("progress") == 1
        assert kinds.count("job_state") >= 2
        context.destroy(linger=0)
