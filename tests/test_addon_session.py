"""The add-on's session, without Blender: real engines with a toy pipeline, started, killed, stopped and shared."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from blender_addon.engine_state import EngineSettings, State
from blender_addon.jobs import JobTable, Notes
from blender_addon.launcher import Launcher
from blender_addon.protocol import NOT_RESPONDING, Cancel, Fetch, GuessElevation, Keep, ListJobs, Resume
from blender_addon.session import Session, with_result_wanted
from tests.engine_process import ROOT, WITHIN_S, picture, running, script, toy_job

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in interpreters are shell scripts")


def make_session(folder: Path, data: Path | None, python: str = "") -> Session:
    session = Session(Launcher(folder), JobTable(folder / "jobs"))
    session.settings = EngineSettings(python=python, data_folder=str(data) if data else "")
    return session


def poll_until(session: Session, is_true, within_s: float = WITHIN_S) -> list:
    events = []
    end = time.monotonic() + within_s
    while not is_true():
        events += session.poll()
        time.sleep(0.01)
        assert time.monotonic() < end, f"not in time: {session.state_line()}"
    return events


def test_a_session_finds_an_engine_and_runs_a_job_to_its_arrays(tmp_path):
    with running(tmp_path / "data") as engine:
        session = make_session(tmp_path / "blender", engine.folder)
        request = toy_job(20)
        job = session.submit(request, Notes(request.job, "toy"))
        events = poll_until(session, lambda: job.state_name == "done")
        assert {"job", "engine"} <= {event.kind for event in events} and job.result_number == 1 and job.is_waiting
        poll_until(session, lambda: "Ready - cpu" in session.state_line())
        with_result_wanted(session, job)
        poll_until(session, lambda: job.result is not None)
        assert job.result.faces.shape == (100, 3)
        session.table.imported(job, 1)
        assert not job.is_waiting
        session.end()
        # Another Blender later: notes say that it was imported.
        later = make_session(tmp_path / "blender", engine.folder)
        assert later.table.jobs[job.id].state_name == "remembered"
        later.want()
        poll_until(later, lambda: later.table.jobs[job.id].state is not None)
        assert not later.table.jobs[job.id].is_waiting
        later.forget(later.table.jobs[job.id])
        poll_until(later, lambda: job.id not in later.table.jobs)
        assert not list((tmp_path / "blender" / "jobs").glob("*"))
        later.end()


def test_a_job_sent_to_nobody_reaches_the_engine_of_a_later_session(tmp_path):
    session = make_session(tmp_path / "blender", tmp_path / "data")
    request = toy_job(5)
    session.submit(request, Notes(request.job))
    session.end()
    with running(tmp_path / "data") as engine:
        later = make_session(tmp_path / "blender", engine.folder)
        later.table.save(Notes("9" * 32, "of another engine"))
        later = make_session(tmp_path / "blender", engine.folder)
        later.want()
        poll_until(later, lambda: later.table.jobs[request.job].state_name == "done")
        assert not list((tmp_path / "blender" / "jobs").glob("*.unsent"))
        poll_until(later, lambda: later.table.jobs["9" * 32].status() == "Not in This Engine")
        later.end()


def test_jobs_that_were_not_sent_are_read_before_anything_is_connected_and_not_waited_for(tmp_path):
    table, gate = JobTable(tmp_path), threading.Event()
    requests = [toy_job(5), toy_job(5)]
    for request in requests:
        table.add(Notes(request.job))
        table.keep_request(request)
    kept = table.unsent()
    assert len(kept) == 2
    table.unsent = lambda: kept if gate.wait(WITHIN_S) else {}
    session = Session(Launcher(tmp_path), table)
    session.want()
    session.poll()
    assert session.wants_engine and not session._unsent, "nothing is started yet"
    table.remove(requests[1].job)
    gate.set()
    poll_until(session, lambda: not session.wants_engine)
    assert list(session._unsent) == [requests[0].job], "the other one was removed meanwhile"


def test_keep_cancel_and_resume(tmp_path):
    with running(tmp_path / "data") as engine:
        session = make_session(tmp_path / "blender", engine.folder)
        request = toy_job(10_000, '{"delay_s": 0.005}')
        job = session.submit(request, Notes(request.job))
        poll_until(session, lambda: job.progress is not None and job.progress.step > 5)
        assert "Optimizing" in job.status() and 0 < job.factor < 1
        session.ask(Keep(job.id))
        poll_until(session, lambda: job.state_name == "done")
        assert job.state.metrics["steps"] < 10_000
        request = toy_job(10_000, '{"delay_s": 0.005}')
        job = session.submit(request, Notes(request.job))
        poll_until(session, lambda: job.progress is not None and job.progress.step > 5)
        session.ask(Cancel(job.id))
        poll_until(session, lambda: job.state_name == "cancelled")
        session.ask(Resume(job.id))
        poll_until(session, lambda: job.progress is not None and job.progress.step > 5)
        session.end()


def test_a_refused_job_says_why(tmp_path):
    with running(tmp_path / "data") as engine:
        session = make_session(tmp_path / "blender", engine.folder)
        request = toy_job(10, preset="none such")
        job = session.submit(request, Notes(request.job))
        poll_until(session, lambda: job.state_name == "failed")
        assert "none such" in job.status() and not job.is_active
        session.end()


def test_an_elevation_is_asked_for_and_an_engine_at_work_says_so(tmp_path):
    with running(tmp_path / "data") as engine:
        session = make_session(tmp_path / "blender", engine.folder)
        session.ask(GuessElevation(picture(23, 9)))  # there is no connection yet
        events = poll_until(session, lambda: session.elevation is not None)
        assert "elevation" in {event.kind for event in events}
        assert (session.elevation.elevation_deg, session.elevation.spread_deg) == (23, 9)
        request = toy_job(2000, json.dumps({"delay_s": 0.02}))
        job = session.submit(request, Notes(request.job))
        poll_until(session, lambda: job.progress is not None)
        session.elevation = None
        session.ask(GuessElevation(picture(23, 9)))
        poll_until(session, lambda: session.elevation is not None)
        assert session.elevation.code == "busy" and "at work" in session.elevation.message
        session.elevation = None
        session.ask(GuessElevation(picture(23, 9), fov_deg="wide"))
        assert session.elevation.message.startswith("This cannot be sent"), "said at once, not after the wait"
        assert not session.problem and not job.problem, "nothing is wrong with the engine or the job"
        session.end()


def own_session(tmp_path: Path, monkeypatch) -> Session:
    """One that starts engines with a toy pipeline, without the pause between them."""
    monkeypatch.setattr("blender_addon.launcher.MIN_PAUSE_S", 0.2)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import os; os.environ['PYTHONPATH'] = sys.path[0]\n"
        "from pathlib import Path\nfrom conrad_engine.server.serve import Options, serve\n"
        "from conrad_engine.server.server import Life\n"
        "data = sys.argv[sys.argv.index('--data') + 1]\n"
        "serve(Options(Path(data), devices=('cpu',), pipeline='tests.toy_pipeline', life=Life(int(sys.argv[6]), None)))"
    )
    return make_session(tmp_path / "blender", tmp_path / "data", script(tmp_path / "python", code))


def test_a_killed_engine_loses_no_job(tmp_path, monkeypatch):
    """The engine found first is killed; the session starts its own on the same folder and the job goes on."""
    session = own_session(tmp_path, monkeypatch)
    request = toy_job(300, '{"delay_s": 0.01}')
    job = session.submit(request, Notes(request.job))
    poll_until(session, lambda: job.progress is not None and job.progress.step > 30)
    session.launcher.child.process.kill()
    poll_until(session, lambda: not session.launcher.is_running)
    assert job.is_active and session.wants_engine
    poll_until(session, lambda: job.state_name == "done")
    assert job.state.metrics["steps"] == 300
    session.stop()
    poll_until(session, lambda: not session.launcher.is_running)
    assert session.state is State.STOPPED
    session.end()


@pytest.mark.parametrize("is_wanted_again", [True, False])
def test_an_engine_killed_with_a_result_on_its_way_loses_no_result(tmp_path, monkeypatch, is_wanted_again):
    """The killed engine leaves its connection file, so the next requests go to nobody first; they reach the one after it."""
    session = own_session(tmp_path, monkeypatch)
    request = toy_job(5)
    job = session.submit(request, Notes(request.job))
    poll_until(session, lambda: job.state_name == "done")
    session.launcher.child.process.kill()
    with_result_wanted(session, job)
    if is_wanted_again:
        # Asked for before anyone knows that it is gone; the next one is asked again.
        session.launcher.child.process.wait()
        session.poll()
        session.want(by_person=True)
    else:
        # Nothing is running, so no engine is started; whoever wants one later gets what was wanted.
        poll_until(session, lambda: not session.launcher.is_running)
        assert not session.wants_engine and not session._queue and job.wants_import
        session.want(by_person=True)
    taken = []
    session.file_takers[job.id, "mesh.glb"] = taken.append
    session.ask(Fetch(job.id, "mesh.glb"))
    poll_until(session, lambda: job.result is not None and taken)
    session.end()


def test_a_job_sent_while_the_engine_stops_goes_to_the_next_one(tmp_path, monkeypatch):
    session = own_session(tmp_path, monkeypatch)
    session.want(by_person=True)
    poll_until(session, lambda: session.is_connected)
    first = session.launcher.child.process
    session.stop()
    request = toy_job(5)
    job = session.submit(request, Notes(request.job))
    poll_until(session, lambda: job.state_name == "done")
    assert first.poll() is not None and session.launcher.child.process is not first
    session.end()


def test_without_an_engine_the_session_says_so(tmp_path):
    session = make_session(tmp_path, None)
    session.want(by_person=True)
    session.poll()
    assert session.state is State.NOT_SET_UP and session.state_line() == "Not Set Up"
    session.settings = EngineSettings(python=script(tmp_path / "python", "raise SystemExit('torch is missing')"))
    session.want(by_person=True)
    poll_until(session, lambda: session.state is State.CRASHED)
    assert "exit code 1" in session.state_line() and "torch is missing" in session.launcher.crash_report()


def test_two_blenders_share_an_engine(tmp_path):
    with running(tmp_path / "data") as engine:
        first, second = (make_session(tmp_path / name, engine.folder) for name in ("a", "b"))
        request = toy_job(20)
        first.submit(request, Notes(request.job, "mine"))
        second.want()
        poll_until(first, lambda: first.table.jobs[request.job].state_name == "done")
        poll_until(second, lambda: request.job in second.table.jobs)
        assert not first.launcher.is_running and not second.launcher.is_running
        second.stop()
        assert second.client is None and engine.process.poll() is None, "another program's engine is not stopped"
        first.end()


def test_an_engine_is_not_taken_for_gone_because_blender_stood_still(tmp_path):
    with running(tmp_path / "data") as engine:
        session = make_session(tmp_path / "blender", engine.folder)
        session.want()
        poll_until(session, lambda: session.is_connected)
        client = session.client
        client.send(ListJobs())
        time.sleep(0.5)  # the answer is there, and nobody has read it
        client._heard_s -= 60
        assert client.state == NOT_RESPONDING
        session.poll()
        assert session.client is client and session.is_connected and not session.launcher.is_running
        session.end()


def test_a_remote_engine_needs_its_keys(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "conrad_engine", "keys", str(tmp_path / "keys"), "--client", "artist"],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    command = [sys.executable, "-m", "conrad_engine", "serve", "--data", str(tmp_path / "data"), "--devices", "cpu"]
    command += ["--keys", str(tmp_path / "keys"), "--pipeline", "tests.toy_pipeline"]
    engine = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        endpoint = json.loads(engine.stdout.readline())["endpoint"]
        session = make_session(tmp_path / "blender", None)
        session.settings = EngineSettings(
            remote_endpoint=endpoint,
            server_key_file=str(tmp_path / "keys" / "server.key"),
            client_key_file=str(tmp_path / "keys" / "artist.key_secret"),
        )
        request = toy_job(5)
        job = session.submit(request, Notes(request.job))
        poll_until(session, lambda: job.state_name == "done")
        session.end()
        stranger = make_session(tmp_path / "stranger", None)
        stranger.settings = replace(session.settings, client_key_file=str(tmp_path / "none"))
        stranger.want(by_person=True)
        poll_until(stranger, lambda: stranger.state is not State.STOPPED)
        assert stranger.state is State.CRASHED and "none cannot be used" in stranger.state_line()
    finally:
        engine.terminate()
        engine.wait(WITHIN_S)
        engine.stdout.close()
