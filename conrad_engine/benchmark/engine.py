"""The engine process: how fast it starts, answers, shows and hands over, as a client on the same machine sees it.

Answers, previews and the cost of streaming are measured while the real pipeline optimises (`timed_pipeline`); only the large
mesh, which takes long to make and not to hand over, is made up (`stand_in_pipeline`).
"""

from __future__ import annotations

import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..protocol import (
    CANCELLED,
    DONE,
    Cancel,
    Connection,
    EngineClient,
    Keep,
    Pause,
    Ping,
    Preview,
    Progress,
    SetPreview,
    Submit,
    Welcome,
    new_job_id,
)
from .assets import drawn_picture
from .report import Report, Row, Timing
from .timed_pipeline import TIMES, WHOLE, WHOLE_SIDE

LIMIT_S = 120.0
"""For anything that is waited for."""
ENDLESS = 1_000_000
"""Steps of a job that is stopped by the benchmark."""
NO_WARM_START = {"optimize.warm_start_views": 0}
"""Score distillation from the first step on: every step asks the prior."""
TINY = {"field.resolution": 24, "field.coarsest": 8, "render.n_samples": 16, "render.occupancy_resolution": 16}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    n_starts: int = 10
    n_requests: int = 1000
    previews_from: int = 40
    """Step from which previews are asked for: empty space is known then."""
    n_previews: int = 20
    previews_s: float = 25.0
    """No further preview is asked for after this long."""
    n_pairs: int = 3
    """Of runs without and with a subscriber."""
    run_s: float = 25.0
    """About how long one of these runs optimises."""
    n_faces: int = 500_000
    texture_size: int = 2048


SMALL = Sizes(2, 20, 2, 2, 5.0, 1, 0.5, 1000, 64)


def run(report: Report) -> None:
    """Every figure that an engine on this machine's device can show, with the most it may be."""
    sizes = SMALL if report.is_small else Sizes()
    where = report.device.type
    report.begin(
        "engine process", f"seen by a client on loopback; jobs of the real pipeline on {where}, but for the mesh"
    )
    starts = [_hello_ms(where) for _ in range(sizes.n_starts)]
    report.add_timing("hello answered after process start", timing_of(starts), notes={"at most ms": 1000})
    with tempfile.TemporaryDirectory() as folder:
        job = _job(Path(folder), report.is_small)
        with _engine(Path(folder), where, "conrad_engine.benchmark.timed_pipeline") as client:
            step_s = _measure_busy_engine(report, sizes, client, job, Path(folder))
            n_steps = max(4, round(sizes.run_s / step_s))
            _measure_streaming(report, sizes, client, job, n_steps, Path(folder))
        with _engine(Path(folder), "cpu", "conrad_engine.benchmark.stand_in_pipeline") as client:
            fetches = _fetches_ms(client, replace(job, n_faces=sizes.n_faces, texture_size=sizes.texture_size))
    name = f"mesh of {sizes.n_faces} faces, {sizes.texture_size} px texture"
    report.add_timing(name, timing_of(fetches), notes={"at most ms": 500})


def timing_of(times_ms: list[float]) -> Timing:
    return Timing(statistics.median(times_ms), min(times_ms), max(times_ms), len(times_ms))


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _measure_busy_engine(report: Report, sizes: Sizes, client: EngineClient, job: Submit, folder: Path) -> float:
    """Requests and previews while a job optimises; returns the seconds of one of its steps."""
    job = replace(job, job=new_job_id(), prompt=WHOLE)
    _start(client, job)
    pings = []
    for _ in range(sizes.n_requests):
        pings.append(_timed_ms(lambda: client.request(Ping())))
        time.sleep(0.005)  # So that the requests meet many steps.
    p99 = percentile(pings, 0.99)
    report.add_timing("request while a job optimises", timing_of(pings), notes={"p99 ms": p99, "p99 at most ms": 20})
    _until(client, lambda message: _is_step(message, job.job, sizes.previews_from))
    # A paused job draws what it is asked for at once: the path is the same, and no share of the time is kept for steps.
    client.request(Pause(job.job))
    asked: dict[tuple[float, ...], float] = {}
    arrived: dict[tuple[float, ...], float] = {}
    started_s = time.monotonic()
    while len(asked) < sizes.n_previews and time.monotonic() - started_s < sizes.previews_s:
        c2w = _c2w(0.1 * len(asked))
        asked[c2w] = time.monotonic()
        arrived[c2w] = _arrival_s(client, job.job, len(asked), c2w)
    times = _stop(client, job.job, folder)
    rendered = {tuple(preview["c2w"]): preview for preview in times["previews"]}
    ways = [1000 * (arrived[c2w] - rendered[c2w]["began_s"]) for c2w in asked]
    renders = [1000 * (preview["rendered_s"] - preview["began_s"]) for preview in rendered.values()]
    notes = {"of that rendering ms": statistics.median(renders), "at most ms on a GPU": 100}
    report.add_timing(f"preview of {WHOLE_SIDE} px, from render to client", timing_of(ways), notes=notes)
    waits = timing_of([1000 * (arrived[c2w] - asked[c2w]) for c2w in asked])
    step_s = _step_s(times["steps"])
    report.add_timing("the same, from asking a paused job", waits)
    report.add(Row("a step of the job meanwhile", notes={"ms": 1000 * step_s}))
    return step_s


def _measure_streaming(
    report: Report, sizes: Sizes, client: EngineClient, job: Submit, n_steps: int, folder: Path
) -> None:
    """The same job with nobody watching and with a subscriber, in turn; each pair gives the extra time in percent."""
    costs, shares, n_previews = [], [], 0
    alone_ms, watched_ms = [], []
    for _ in range(sizes.n_pairs):
        alone = _run_of(client, job, n_steps, False, folder)
        watched = _run_of(client, job, n_steps, True, folder)
        alone_ms.append(1000 * _duration_s(alone, n_steps))
        watched_ms.append(1000 * _duration_s(watched, n_steps))
        costs.append(100 * (watched_ms[-1] / alone_ms[-1] - 1))
        counted = [p for p in watched["previews"] if p["rendered_s"] <= _end_s(watched, n_steps)]
        spent_s = sum(preview["rendered_s"] - preview["began_s"] for preview in counted)
        shares.append(100 * 1000 * spent_s / watched_ms[-1])
        n_previews += len(counted)
    report.add_timing(f"{n_steps} steps, nobody watching", timing_of(alone_ms))
    report.add_timing(f"{n_steps} steps, a client watching at {WHOLE_SIDE} px", timing_of(watched_ms))
    notes = {
        "percent": statistics.median(costs),
        "low": min(costs),
        "high": max(costs),
        "rendering percent": statistics.median(shares),
        "previews": n_previews,
        "at most percent": 5,
    }
    report.add(Row("what streaming costs the optimisation", notes=notes))


def _run_of(client: EngineClient, job: Submit, n_steps: int, is_watched: bool, folder: Path) -> dict:
    """The times of a fresh job until it has made some steps."""
    job = replace(job, job=new_job_id())
    client.request(job)
    if is_watched:
        client.request(SetPreview(job.job, width=WHOLE_SIDE, height=WHOLE_SIDE))
    _until(client, lambda message: _is_step(message, job.job, n_steps))
    return _stop(client, job.job, folder)


def _fetches_ms(client: EngineClient, job: Submit) -> list[float]:
    """Times to bring a mesh of the asked-for size to the client."""
    job = replace(job, job=new_job_id())
    _start(client, job)
    client.request(Keep(job.job))
    state = client.wait(job.job, LIMIT_S)
    if state.state != DONE:
        raise RuntimeError(f"the stand-in job is {state.state}: {state.error_message}")
    return [_timed_ms(lambda: client.fetch(job.job)) for _ in range(5)]


def _start(client: EngineClient, job: Submit) -> None:
    """Send a job and wait for its first step."""
    client.request(job)
    _until(client, lambda message: _is_step(message, job.job, 1))


def _stop(client: EngineClient, job: str, folder: Path) -> dict:
    """Cancel a job; what `timed_pipeline` has noted of it."""
    client.request(Cancel(job))
    state = client.wait(job, LIMIT_S)
    if state.state != CANCELLED:
        raise RuntimeError(f"the job is {state.state}: {state.error_message}")
    return json.loads((folder / "data" / "jobs" / job / "work" / TIMES).read_text())


def _is_step(message: object, job: str, step: int) -> bool:
    is_progress = isinstance(message, Progress) and message.job == job
    return is_progress and message.stage == "optimize" and message.step >= step


def _step_s(steps: list[list[float]]) -> float:
    """Seconds of a step: the median over stretches of 50, since the host runs ahead of a GPU and then waits for it."""
    times = [s for _, s in steps]
    stretch = min(50, len(times) // 2)
    return statistics.median(later - earlier for earlier, later in zip(times, times[stretch:])) / stretch


def _duration_s(times: dict, n_steps: int) -> float:
    """Seconds from the end of the first step to that of the last one counted."""
    return _end_s(times, n_steps) - _end_s(times, 1)


def _end_s(times: dict, step: int) -> float:
    return next(end_s for number, end_s in times["steps"] if number == step)


def _timed_ms(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return 1000 * (time.perf_counter() - started)


def _hello_ms(device: str) -> float:
    """From nothing to an answered hello."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _engine(Path(folder), device, "conrad_engine.pipeline"):
        return 1000 * (time.perf_counter() - started)


def _arrival_s(client: EngineClient, job: str, serial: int, c2w: tuple[float, ...]) -> float:
    """Ask for a view; when its picture arrives, by the monotonic clock."""
    size, focal = WHOLE_SIDE, 1.5 * WHOLE_SIDE
    client.send(SetPreview(job, True, serial, c2w, (focal, focal, size / 2, size / 2), size, size))
    _until(client, lambda message: isinstance(message, Preview) and message.serial == serial)
    return time.monotonic()


def _c2w(azimuth_rad: float) -> tuple[float, ...]:
    """A level camera 3 units from the origin, which looks at it."""
    sin, cos = math.sin(azimuth_rad), math.cos(azimuth_rad)
    return (cos, 0.0, sin, 3 * sin, sin, 0.0, -cos, -3 * cos, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)


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


def _job(folder: Path, is_small: bool) -> Submit:
    """A drawn object in the smallest preset, without an end."""
    picture = drawn_picture(folder / "figure.png").read_bytes()
    overrides = {"optimize.n_steps": ENDLESS, **NO_WARM_START, **(TINY if is_small else {})}
    return Submit("", "benchmark", picture, preset="draft", overrides=overrides)


@contextmanager
def _engine(folder: Path, device: str, pipeline: str) -> Iterator[EngineClient]:
    """A fresh engine, started as a user starts it, and a client that it has welcomed; ended at the end."""
    command = [sys.executable, "-m", "conrad_engine", "serve", "--data", str(folder / "data")]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--devices", device, "--pipeline", pipeline], stdout=subprocess.PIPE, stderr=log
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
