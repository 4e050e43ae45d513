"""The engine process: how fast it answers. Jobs are stand-ins (`stand_in_pipeline`), so that only the engine counts."""

from __future__ import annotations

import io
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from ..protocol import Connection, EngineClient, Keep, Ping, Preview, Progress, SetPreview, Submit, Welcome, new_job_id
from .report import Report, Timing
from .stand_in_pipeline import STEP_S

_START = (
    "import sys; from pathlib import Path; from conrad_engine.server.serve import Options, serve; "
    "serve(Options(Path(sys.argv[1]), devices=('cpu',), pipeline='conrad_engine.benchmark.stand_in_pipeline'))"
)
LIMIT_S = 60.0
PREVIEW_SIZE = 512


def run(report: Report) -> None:
    """Start, request latency while a job runs, previews, and the transfer of a large mesh."""
    report.begin("engine process", "wall-clock times seen by a client on loopback; the job is a stand-in")
    small = report.is_small
    report.add_timing("hello answered after process start", timing_of([_hello_ms() for _ in range(2 if small else 10)]))
    n_faces, texture_size = (1000, 64) if small else (500_000, 2048)
    with tempfile.TemporaryDirectory() as folder, _engine(Path(folder)) as client:
        job = new_job_id()
        endless = {"optimize.n_steps": 1_000_000}
        client.request(
            Submit(job, "benchmark", _picture(), overrides=endless, n_faces=n_faces, texture_size=texture_size)
        )
        _until(client, lambda message: isinstance(message, Progress) and message.step > 0)
        pings = sorted(_timed_ms(lambda: client.request(Ping())) for _ in range(50 if small else 1000))
        p99 = pings[int(0.99 * len(pings))]
        report.add_timing("request while a job runs", timing_of(pings), notes={"p99 ms": p99})
        previews = [_preview_ms(client, job, serial) for serial in range(1, 6 if small else 51)]
        name = f"preview of {PREVIEW_SIZE} px from a new camera, until arrival"
        report.add_timing(name, timing_of(previews), notes={"waits for a step of at most ms": 1000 * STEP_S})
        client.request(Keep(job))
        client.wait(job, LIMIT_S)
        fetches = [_timed_ms(lambda: client.fetch(job)) for _ in range(3)]
        report.add_timing(f"mesh of {n_faces} faces, texture of {texture_size} px", timing_of(fetches))


def timing_of(times_ms: list[float]) -> Timing:
    return Timing(statistics.median(times_ms), min(times_ms), max(times_ms), len(times_ms))


def _timed_ms(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return 1000 * (time.perf_counter() - started)


def _hello_ms() -> float:
    """From nothing to an answered hello."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _engine(Path(folder)):
        return 1000 * (time.perf_counter() - started)


def _preview_ms(client: EngineClient, job: str, serial: int) -> float:
    """From asking for a view to its picture."""
    angle = 0.1 * serial
    c2w = (math.cos(angle), -math.sin(angle), 0, 0, math.sin(angle), math.cos(angle), 0, 0, 0, 0, 1, 3, 0, 0, 0, 1)
    size = PREVIEW_SIZE
    started = time.perf_counter()
    client.send(SetPreview(job, True, serial, c2w, (float(size), float(size), size / 2, size / 2), size, size))
    _until(client, lambda message: isinstance(message, Preview) and message.serial == serial)
    return 1000 * (time.perf_counter() - started)


def _until(client: EngineClient, is_it: Callable[[object], bool]) -> None:
    """Poll until a message comes.

    Raises:
        RuntimeError: It did not come in time.
    """
    end_s = time.monotonic() + LIMIT_S
    while time.monotonic() < end_s:
        if any([is_it(message) for message in client.poll(timeout_s=0.05)]):
            return
    raise RuntimeError(f"the engine did not answer within {LIMIT_S:g} s")


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 100, 50)).save(buffer, "png")
    return buffer.getvalue()


@contextmanager
def _engine(folder: Path) -> Iterator[EngineClient]:
    """A fresh engine and a client that it has welcomed; ended at the end."""
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(folder / "data")], stdout=subprocess.PIPE, stderr=log
        )
    try:
        assert process.stdout is not None, "asked for"
        line = process.stdout.readline().decode()
        if not line:
            raise RuntimeError(f"the engine did not start: {(folder / 'log').read_text()[-500:]}")
        connection = Connection.from_json(line)
        with EngineClient(connection.endpoint, connection.token, name="benchmark") as client:
            _until(client, lambda message: isinstance(message, Welcome))
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT_S)
