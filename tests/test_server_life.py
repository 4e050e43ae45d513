"""The engine process from start to end: one a folder, gone with its parent, when idle or told to, and what it imports."""

import json
import os
import subprocess
import sys
import time

import pytest

from conrad_engine.protocol import (
    CONNECTION_FILE,
    Shutdown,
)
from conrad_engine.server.clients import FORGET_AFTER_S

from .engine_process import (
    ROOT,
    WITHIN_S,
    Engine,
    running,
    toy_job,
    until_step,
)
from .toy_pipeline import expected_value

SLOWLY = json.dumps({"delay_s": 0.02, "checkpoint_every": 5})


def test_a_second_engine_on_the_same_folder_is_refused(engine):
    with pytest.raises(RuntimeError, match="another engine uses the data folder"):
        Engine(engine.folder)
    assert (engine.folder / CONNECTION_FILE).exists(), "the second engine has removed the first one's connection file"


def test_the_engine_ends_with_its_parent_and_at_shutdown(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    engine = Engine(tmp_path / "data", parent_pid=parent.pid)
    parent.kill()  # Not waited for: a dead process that nobody has collected is gone all the same.
    assert engine.process.wait(WITHIN_S) == 0
    parent.wait()
    assert not (tmp_path / "data" / CONNECTION_FILE).exists()
    engine = Engine(tmp_path / "data")
    with engine.client() as client:
        client.request(Shutdown())
        assert engine.process.wait(WITHIN_S) == 0


def test_the_engine_ends_when_idle(tmp_path):
    assert Engine(tmp_path / "data", idle_timeout_s=0.3).process.wait(WITHIN_S) == 0


@pytest.mark.slow
def test_the_engine_does_not_end_while_it_works(tmp_path):
    engine = Engine(tmp_path / "data", idle_timeout_s=0.5)
    with engine.client() as client:
        client.request(toy_job(steps=2500, behavior=SLOWLY))
    time.sleep(FORGET_AFTER_S + 10)
    assert engine.process.poll() is None, "nobody is connected, but a job is at work"
    assert engine.process.wait(300) == 0


def test_shutdown_keeps_the_running_job_for_the_next_start(tmp_path):
    with running(tmp_path / "data") as engine, engine.client() as client:
        job = toy_job(steps=80, behavior=json.dumps({"delay_s": 0.02, "checkpoint_every": 10_000}))
        client.request(job)
        until_step(client, job.job, 20)
        assert engine.stop() == 0
    with running(tmp_path / "data") as engine, engine.client() as client:
        state = client.wait(job.job, WITHIN_S)
        assert state.metrics["value"] == expected_value(80)
        lines = (tmp_path / "data" / "worker-0.log").read_text()
        assert "failed" not in lines


def test_the_server_never_imports_what_is_heavy(tmp_path):
    code = (
        "import sys; import conrad_engine.cli as cli, conrad_engine.server.serve; cli.make_parser().parse_args(['serve']);"
        "heavy = {'torch', 'numpy', 'PIL', 'conrad_engine.pipeline', 'conrad_engine.cameras'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
