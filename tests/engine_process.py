"""Starting real engine processes for tests, with the toy pipeline unless told otherwise."""

from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from conrad_engine.protocol import Connection, EngineClient, JobState, Progress, Submit, new_job_id

ROOT = Path(__file__).resolve().parents[1]
WITHIN_S = 90.0
"""Longer than anything takes on a machine that is busy with other things; only what fails waits so long."""
START = (
    "import sys; from pathlib import Path; from conrad_engine.server.serve import Options, serve;"
    "from conrad_engine.server.server import Life; import logging; logging.basicConfig(level='INFO');"
    "folder, devices, pipeline, parent, idle = sys.argv[1:];"
    "serve(Options(Path(folder), devices=tuple(devices.split(',')), pipeline=pipeline,"
    " life=Life(int(parent) or None, float(idle) or None)))"
)


class Engine:
    """An engine process on a data folder."""

    def __init__(
        self,
        folder: Path,
        devices: str = "cpu",
        pipeline: str = "tests.toy_pipeline",
        parent_pid: int = 0,
        idle_timeout_s: float = 0,
        python_path: Path | None = None,
    ) -> None:
        """Start it, and wait until it has announced itself.

        Args:
            python_path: A folder whose modules its processes find before others.
        """
        self.folder = folder
        path = [str(python_path), str(ROOT)] if python_path else [str(ROOT)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        arguments = [str(folder), devices, pipeline, str(parent_pid), str(idle_timeout_s)]
        folder.mkdir(exist_ok=True)
        self.log = folder.parent / f"{folder.name}.log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine did not start: {self.log.read_text()}")
        self.connection = Connection.from_json(line)

    def client(self, name: str = "test") -> EngineClient:
        return EngineClient(self.connection.endpoint, self.connection.token, name=name)

    def kill(self) -> None:
        """kill -9, as nothing else is as sudden."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(WITHIN_S)
        self.process.stdout.close()
        return code

    def worker_pids(self) -> list[int]:
        """Processes that this engine has started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children]


@contextmanager
def running(folder: Path, **options):
    engine = Engine(folder, **options)
    try:
        yield engine
    finally:
        if engine.process.poll() is None:
            engine.stop()


def picture(width: int = 8, height: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(buffer, "png")
    return buffer.getvalue()


def script(path: Path, body: str) -> str:
    """An executable that Python code stands behind; it gets the arguments an interpreter would."""
    code = path.with_suffix(".code.py")
    code.write_text(body)
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{code}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def toy_job(steps: int = 20, behavior: str = "{}", **fields) -> Submit:
    fields = {"texture_size": 64, "n_faces": 100, **fields}
    return Submit(new_job_id(), "toy", picture(), prompt=behavior, overrides={"optimize.n_steps": steps}, **fields)


def until(client: EngineClient, is_true: Callable[[], object], within_s: float = WITHIN_S) -> list:
    """Poll until something holds; every message that came in meanwhile."""
    messages, end_s = [], time.monotonic() + within_s
    while not is_true():
        messages += client.poll(timeout_s=0.02)
        assert time.monotonic() < end_s, f"not within {within_s} s; last messages: {messages[-5:]}"
    return messages


def until_message(client: EngineClient, is_it: Callable[[object], bool], within_s: float = WITHIN_S) -> object:
    """Poll until a certain message comes."""
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        for message in client.poll(timeout_s=0.02):
            if is_it(message):
                return message
    raise AssertionError(f"no such message within {within_s} s")


def until_state(client: EngineClient, job: str, *states: str, within_s: float = WITHIN_S) -> JobState:
    until(client, lambda: job in client.jobs and client.jobs[job].state in states, within_s)
    return client.jobs[job]


def until_step(client: EngineClient, job: str, step: int, within_s: float = WITHIN_S) -> None:
    until_message(client, lambda m: isinstance(m, Progress) and m.job == job and m.step >= step, within_s)
