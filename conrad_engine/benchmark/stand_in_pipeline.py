"""Stands for `conrad_engine.pipeline` where the engine process is measured and not the job: works, but makes nothing.

A step computes for `STEP_S` on the processor, as a job on a GPU keeps one core busy; previews are ready at once, and the
result is a mesh of random numbers with the asked-for number of faces. The tests' stand-ins take their parts from here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import Cancelled
from ..monitor import Command, Monitor, Progress
from ..server.worker_messages import WorkerReady

STEP_S = 0.01


@dataclass(frozen=True)
class Job:
    """As in `conrad_engine.pipeline`."""

    picture: bytes
    config: Any
    mask: bytes | None = None
    depth: bytes | None = None
    depth_kind: str = "relative"
    camera: dict | None = None
    init_mesh: Any = None
    name: str = "object"


@dataclass(frozen=True)
class StandInMesh:
    """The fields of `mesh.mesh.TexturedMesh`."""

    vertices: np.ndarray
    faces: np.ndarray
    uvs: np.ndarray
    normals: np.ndarray
    texture: np.ndarray


@dataclass(frozen=True)
class JobResult:
    """As in `conrad_engine.pipeline`."""

    mesh: StandInMesh
    glb: Path
    metrics: dict = field(default_factory=dict)


def describe_device(name: str) -> WorkerReady:
    return WorkerReady(f"stand-in: {name}", 1, 0, 0, ("embedded",))


def generate(job: Job, folder: Path, monitor: Monitor) -> JobResult:
    """Keep busy for the job's steps, then make a mesh up.

    Raises:
        Cancelled: The monitor asked for it.
    """
    n_steps = job.config.optimize.n_steps
    for step in range(1, n_steps + 1):
        command = monitor.command()
        if command is Command.CANCEL:
            raise Cancelled("cancelled")
        if command is Command.KEEP:
            break
        end_s = time.perf_counter() + STEP_S
        while time.perf_counter() < end_s:
            pass
        monitor.progress(Progress("optimize", step, n_steps))
        camera = monitor.preview_camera()
        if camera is not None:
            monitor.preview(np.full((camera.height, camera.width, 3), step % 256, np.uint8), camera)
    (folder / "mesh.glb").write_bytes(b"glTF")
    Image.new("RGB", (8, 8)).save(folder / "sheet.png")
    return JobResult(random_mesh(job.config.mesh.n_faces, job.config.mesh.texture_size), folder / "mesh.glb")


def random_mesh(n_faces: int, texture_size: int) -> StandInMesh:
    """Arrays of the right shapes and types, the same every time."""
    n_vertices = n_faces // 2 + 2
    generator = np.random.default_rng(0)
    numbers = generator.random((n_vertices, 8), np.float32)
    faces = generator.integers(0, n_vertices, (n_faces, 3), dtype=np.int32)
    texture = generator.integers(0, 256, (texture_size, texture_size, 3), dtype=np.uint8)
    return StandInMesh(numbers[:, :3], faces, numbers[:, 3:5], numbers[:, 5:8], texture)
