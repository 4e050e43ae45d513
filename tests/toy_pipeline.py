"""A pipeline that counts instead of optimising, with the interface of `conrad_engine.pipeline` and none of its weight.

Its state is a number that every step changes in a way that depends on all steps before, so that a result shows whether
steps were lost or done twice. The prompt is JSON that says how it behaves:
    delay_s (per step), checkpoint_every, crash_at (ends the process at this step), hang_at, error, n_faces, texture_size,
    hold_at with hold (at this step it waits, open to commands, for as long as this file exists)
"""

from __future__ import annotations

import errno
import io
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from conrad_engine.benchmark.stand_in_pipeline import Job, JobResult, random_mesh
from conrad_engine.errors import Cancelled, InputError
from conrad_engine.files import write_atomic
from conrad_engine.monitor import Command, Monitor, Progress
from conrad_engine.server.worker_messages import WorkerReady


def describe_device(name: str) -> WorkerReady:
    return WorkerReady(f"toy: {name}", 1, 1000, 2000, ("embedded",))


@dataclass(frozen=True)
class Guess:
    elevation_deg: float
    spread_deg: float
    is_sure: bool


def elevation_of_picture(picture: bytes, mask: bytes | None, fov_deg: float, device: str) -> Guess:
    """The picture's width as elevation and its height as spread; some fields of view misbehave."""
    if fov_deg == 66:
        os._exit(9)
    if fov_deg == 67:
        raise InputError("the picture shows no object; send another one")
    width, height = Image.open(io.BytesIO(picture)).size
    return Guess(width, height, mask is not None)


def advance(value: int, step: int) -> int:
    return (value * 1103515245 + step + 12345) % 2**31


def expected_value(n_steps: int) -> int:
    """The state after an undisturbed run."""
    value = 1
    for step in range(1, n_steps + 1):
        value = advance(value, step)
    return value


def generate(job: Job, folder: Path, monitor: Monitor | None = None) -> JobResult:
    monitor = monitor or Monitor()
    behavior = json.loads(job.config.prompt or "{}")
    n_steps = job.config.optimize.n_steps
    checkpoint = folder / "checkpoint.json"
    step, value = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, 1)
    monitor.progress(Progress("prepare", 0, 1))
    if step:
        monitor.progress(Progress("optimize", step, n_steps))
    if "error" in behavior:
        _raise(behavior["error"])
    while step < n_steps:
        command = monitor.command()
        while command is Command.PAUSE or (command is Command.RUN and _is_held(behavior, step)):
            _show(monitor)
            time.sleep(0.01)
            command = monitor.command()
        if command is Command.CANCEL:
            write_atomic(checkpoint, json.dumps([step, value]).encode())
            raise Cancelled("stopped")
        if command is Command.KEEP:
            break
        step += 1
        value = advance(value, step)
        _misbehave(behavior, step)
        time.sleep(behavior.get("delay_s", 0.0))
        monitor.progress(
            Progress("optimize", step, n_steps, (n_steps - step) * 0.01, {"fit": 1 / step, "bad": float("nan")})
        )
        _show(monitor)
        if step % behavior.get("checkpoint_every", 10) == 0:
            write_atomic(checkpoint, json.dumps([step, value]).encode())
    write_atomic(checkpoint, json.dumps([step, value]).encode())
    monitor.progress(Progress("mesh", 0, 1))
    (folder / "mesh.glb").write_bytes(b"glTF" + bytes(job.config.mesh.n_faces))
    _sheet(job.picture, value).save(folder / "sheet.png")
    metrics = {"value": value, "steps": step, "nested": {"psnr": 30.0, "worst": float("inf")}, "views": [1, 2]}
    return JobResult(random_mesh(job.config.mesh.n_faces, job.config.mesh.texture_size), folder / "mesh.glb", metrics)


def _sheet(picture: bytes, value: int) -> Image.Image:
    sheet = Image.new("RGB", (600, 150), (240, 240, 240))
    seen = Image.open(io.BytesIO(picture)).convert("RGB").resize((140, 140))
    for view in range(4):
        sheet.paste(seen.rotate(15 * view + value % 7), (5 + 150 * view, 5))
    return sheet


def _raise(kind: str) -> None:
    if kind == "input":
        raise InputError("the picture shows no object; send another one")
    if kind == "disk_full":
        raise OSError(errno.ENOSPC, "No space left on device")
    raise RuntimeError("a mistake")


def _is_held(behavior: dict, step: int) -> bool:
    return behavior.get("hold_at") == step and Path(behavior["hold"]).exists()


def _misbehave(behavior: dict, step: int) -> None:
    if behavior.get("crash_at") == step:
        os._exit(9)
    while behavior.get("hang_at") == step:
        time.sleep(1)


def _show(monitor: Monitor) -> None:
    camera = monitor.preview_camera()
    if camera is not None:
        monitor.preview(np.full((camera.height, camera.width, 4), 128, np.uint8), camera)
