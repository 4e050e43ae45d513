"""kill -9 of worker, server and client at 20 moments of a job of the real pipeline with the embedded prior, at toy size.

A job whose process dies goes on from its checkpoint. The seed and the step's number alone decide the loop's random numbers,
so it repeats what an undisturbed run does: where this was written, to the last bit of every array. The tolerances leave room
for sums that threads round in another order, and are far below what another seed changes (`test_another_seed_is_told_apart`).
"""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from conrad_engine.mesh.glb import read_textured
from conrad_engine.protocol import DONE, FINAL_STATES, EngineClient, Listed, Progress, Submit, Welcome, new_job_id

from .conftest import figure_rgba, png_bytes
from .engine_process import ROOT, Engine, running, until, until_message

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

MOMENTS = 20
WITHIN_S = 240.0
"""For one job on a loaded machine, including the start of a worker."""
STAGES = ("decode", "prepare", "warm_start", "optimize", "mesh", "done")
SETTINGS = {
    "field.resolution": 24,
    "field.coarsest": 8,
    "render.n_samples": 24,
    "render.occupancy_resolution": 16,
    "constraint.depth_size": 32,
    "optimize.warm_start_views": 2,
    "optimize.warm_start_sampling": 2,
    "optimize.warm_start_steps": 8,
    "optimize.n_steps": 6,
    "optimize.n_views": 1,
    "optimize.checkpoint_every": 2,
    "mesh.resolution": 24,
    "mesh.level": 20.0,
    "mesh.turntable_frames": 1,
    "mesh.turntable_size": 16,
}
N_STEPS = 14
OF_THE_MACHINE = ("seconds", "memory_bytes")
"""Measures of the machine, not of the object."""


def real_job(seed: int = 0) -> Submit:
    picture = png_bytes(figure_rgba(96, 80))
    return Submit(
        new_job_id(), "real", picture, preset="draft", overrides=SETTINGS, texture_size=64, n_faces=500, seed=seed
    )


def sent(client: EngineClient) -> str:
    job = real_job()
    client.request(job)
    return job.job


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to: when it got where, and what came of it."""

    times_s: list[float]
    ranks: list[tuple[int, int]]
    metrics: dict
    vertices: np.ndarray
    texture: np.ndarray

    def moment(self, share: float) -> tuple[tuple[int, int], float]:
        """A moment of the run as what was reached last before it, and the seconds since then."""
        at_s = share * self.times_s[-1]
        index = max(0, bisect_right(self.times_s, at_s) - 1)
        return self.ranks[index], at_s - self.times_s[index]


def rank(progress: Progress) -> tuple[int, int]:
    """Progress in the order in which it happens."""
    return STAGES.index(progress.stage), progress.step


def start_worker(client: EngineClient) -> None:
    """Have a worker that has loaded torch, so that a job begins when it is sent."""
    until(client, lambda: client.status is not None and client.status.workers == "ready", WITHIN_S)


def run_undisturbed(client: EngineClient, seed: int = 0) -> Undisturbed:
    times_s, ranks = [], []
    job = real_job(seed)

    def note(message) -> None:
        if isinstance(message, Progress) and message.job == job.job:
            times_s.append(time.monotonic() - started_s)
            ranks.append(rank(message))

    started_s = time.monotonic()
    client.request(job)
    state = client.wait(job.job, WITHIN_S, note)
    assert state.state == DONE, state
    result = client.fetch(job.job)
    return Undisturbed(times_s, ranks, state.metrics, array_of(result.vertices), array_of(result.texture))


def moments(undisturbed: Undisturbed):
    """One random moment in each twentieth of the run."""
    generator = random.Random(0)
    for part in range(MOMENTS):
        yield undisturbed.moment((part + generator.random()) / MOMENTS)


def at_work(client: EngineClient, send: Callable[[], str], moment: tuple[tuple[int, int], float]) -> str:
    """Send a job and wait until it is there; where the machine has become faster and it has ended before, try again."""
    reached, later_s = moment
    for _ in range(8):
        job = send()

        def is_there(message, job=job) -> bool:
            is_over = job in client.jobs and client.jobs[job].state in FINAL_STATES
            return is_over or (isinstance(message, Progress) and message.job == job and rank(message) >= reached)

        until_message(client, is_there, WITHIN_S)
        time.sleep(later_s)
        client.poll()
        if client.jobs[job].state not in FINAL_STATES:
            return job
        later_s *= 0.6
    raise AssertionError("every job had ended before its moment came")


def array_of(array) -> np.ndarray:
    return np.frombuffer(array.data, array.dtype).reshape(array.shape)


def check_result(client: EngineClient, engine: Engine, job: str, undisturbed: Undisturbed, tmp_path) -> None:
    """The job is done, every artefact is whole, and it is what an undisturbed run makes."""
    state = client.wait(job, WITHIN_S)
    assert (state.state, state.step, state.metrics["steps"]) == (DONE, N_STEPS, N_STEPS), state
    check_metrics(state.metrics, undisturbed.metrics)
    check_artefacts(client, job, state, undisturbed, tmp_path)
    folder = engine.folder / "jobs" / job
    torch.load(folder / "work" / "checkpoint.pt", weights_only=True)
    rest = [path for path in folder.rglob("*") if path.name.startswith((".", "making-"))]
    assert not rest, f"left behind by killed processes: {rest}"
    assert [path.name for path in folder.glob("result-*")] == [f"result-{state.result}"]


def check_metrics(found: dict, wanted: dict) -> None:
    found, wanted = (
        {name: value for name, value in metrics.items() if not name.startswith(OF_THE_MACHINE)}
        for metrics in (found, wanted)
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        expected = pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value
        assert found[name] == expected, f"{name}: {found[name]} instead of {value}"


def check_artefacts(client: EngineClient, job: str, state, undisturbed: Undisturbed, tmp_path) -> None:
    result = client.fetch(job)
    vertices, faces = array_of(result.vertices), array_of(result.faces)
    assert np.isfinite(vertices).all() and faces.min() >= 0 and faces.max() < len(vertices)
    assert vertices.shape == undisturbed.vertices.shape
    assert np.abs(vertices - undisturbed.vertices).max() < 1e-5
    difference = array_of(result.texture).astype(float) - undisturbed.texture
    assert np.abs(difference).max() <= 1, "of 255"
    files = {part: bytes(client.fetch(job, part).data) for part in state.parts if part != "arrays"}
    assert {"mesh.glb", "texture.png", "sheet.png", "camera.json", "config.json", "metrics.json"} <= files.keys()
    (tmp_path / "mesh.glb").write_bytes(files["mesh.glb"])
    assert len(read_textured(tmp_path / "mesh.glb").faces) == len(faces)
    for name, data in files.items():
        if name.endswith(".png"):
            Image.open(io.BytesIO(data)).load()
        if name.endswith(".json"):
            json.loads(data)


def test_another_seed_is_told_apart(tmp_path):
    """What the tolerances are worth: the same seed passes, the next one does not."""
    with running(tmp_path / "data", pipeline="conrad_engine.pipeline") as engine, engine.client() as client:
        start_worker(client)
        first, again, other = (run_undisturbed(client, seed) for seed in (0, 0, 1))
        check_metrics(again.metrics, first.metrics)
        with pytest.raises(AssertionError):
            check_metrics(other.metrics, first.metrics)


def test_a_killed_worker(tmp_path):
    with running(tmp_path / "data", pipeline="conrad_engine.pipeline") as engine, engine.client() as client:
        start_worker(client)
        undisturbed = run_undisturbed(client)
        for moment in moments(undisturbed):
            job = at_work(client, lambda: sent(client), moment)
            for pid in engine.worker_pids():
                os.kill(pid, signal.SIGKILL)
            check_result(client, engine, job, undisturbed, tmp_path)


def test_a_killed_server(tmp_path):
    engine = Engine(tmp_path / "data", pipeline="conrad_engine.pipeline")
    try:
        with engine.client() as client:
            start_worker(client)
            undisturbed = run_undisturbed(client)
            jobs = set(client.jobs)
            for moment in moments(undisturbed):
                job = at_work(client, lambda: sent(client), moment)
                jobs |= set(client.jobs)
                engine.kill()
                engine = Engine(tmp_path / "data", pipeline="conrad_engine.pipeline")
                until_message(client, lambda message: isinstance(message, Welcome), WITHIN_S)
                check_result(client, engine, job, undisturbed, tmp_path)
            with engine.client("later") as later:
                until_message(later, lambda message: isinstance(message, Listed), WITHIN_S)
                assert {state.state for state in later.jobs.values()} == {DONE}
                assert len(jobs) > MOMENTS and later.jobs.keys() == jobs, "no job is lost"
    finally:
        engine.stop()


def test_a_killed_client(tmp_path):
    """It watches previews when it is killed; another client finds its job and the result."""
    picture = tmp_path / "figure.png"
    picture.write_bytes(png_bytes(figure_rgba(96, 80)))
    command = [sys.executable, "-m", "conrad_engine", "submit", str(picture), "--data", str(tmp_path / "data")]
    command += ["--preset", "draft", "--texture-size", "64", "--faces", "500", "--preview-dir", str(tmp_path / "seen")]
    command += [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    processes = []

    def submitted() -> str:
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT))
        return processes[-1].stdout.readline().decode().strip()

    with running(tmp_path / "data", pipeline="conrad_engine.pipeline") as engine, engine.client() as client:
        start_worker(client)
        undisturbed = run_undisturbed(client)
        try:
            for moment in moments(undisturbed):
                job = at_work(client, submitted, moment)
                processes[-1].kill()
                check_result(client, engine, job, undisturbed, tmp_path)
            assert len(client.jobs) == 1 + len(processes) > MOMENTS
            assert list((tmp_path / "seen").glob("*.png")), "the clients have watched"
        finally:
            for process in processes:
                process.kill()
                process.communicate()
