"""A pipeline for the add-on's tests: a colored ball grows where the job's camera expects the object.

It has the interface of `conrad_engine.pipeline`, takes real time, renders true previews from any camera and gives a mesh
with UVs and texture, so that overlay, import and alignment can be looked at without an optimisation.
A picture whose name holds "slow" takes longer, one whose name holds "bad" fails, and one whose name holds "stream" has
previews that cost nearly nothing, so that they come as often as they are asked for.
"""

from __future__ import annotations

import io
import json
import math
import time
from pathlib import Path

import numpy as np
from PIL import Image

from conrad_engine.benchmark.stand_in_pipeline import Job, JobResult, StandInMesh
from conrad_engine.errors import Cancelled, InputError
from conrad_engine.files import write_atomic
from conrad_engine.monitor import Command, Monitor, Progress
from conrad_engine.server.worker_messages import WorkerReady

from ..toy_pipeline import Guess

STEP_S, SLOW_STEP_S = 0.02, 0.1


def elevation_of_picture(picture: bytes, mask: bytes | None, fov_deg: float, device: str) -> Guess:
    """Sure of 33 degrees, but of nothing where a mask is given."""
    return Guess(33.0, 4.0 if mask is None else 20.0, mask is None)


def describe_device(name: str) -> WorkerReady:
    return WorkerReady("test device", 1, 6 << 30, 8 << 30, ("embedded",))


def generate(job: Job, folder: Path, monitor: Monitor) -> JobResult:
    monitor.progress(Progress("prepare", 0, 1))
    if "bad" in job.name:
        raise InputError("the picture shows no object; send another one")
    Image.open(io.BytesIO(job.picture) if isinstance(job.picture, bytes) else job.picture).verify()
    camera = job.camera or {"object_center": [0.0, 0.0, 0.0], "object_size": 1.0}
    center, radius = np.array(camera["object_center"]), 0.5 * (camera["object_size"] or 1.0)
    checkpoint, n_steps = folder / "step.json", job.config.optimize.n_steps
    step = json.loads(checkpoint.read_text()) if checkpoint.exists() else 0
    delay_s = SLOW_STEP_S if "slow" in job.name else STEP_S
    rays_across = 100 if "stream" in job.name else 200
    while step < n_steps:
        command = monitor.command()
        grown = radius * (0.3 + 0.7 * step / n_steps)
        _show(monitor, center, grown, rays_across)
        if command is Command.PAUSE:
            time.sleep(0.02)
            continue
        if command is Command.CANCEL:
            write_atomic(checkpoint, json.dumps(step).encode())
            raise Cancelled("stopped")
        if command is Command.KEEP:
            break
        step += 1
        time.sleep(delay_s)
        monitor.progress(Progress("optimize", step, n_steps, (n_steps - step) * delay_s, {"fit": 1 / step}))
        if step % 10 == 0:
            write_atomic(checkpoint, json.dumps(step).encode())
    write_atomic(checkpoint, json.dumps(step).encode())
    mesh = _mesh(center, radius, job.config.mesh.n_faces, job.config.mesh.texture_size)
    (folder / "mesh.glb").write_bytes(b"glTF" + bytes(100))
    (folder / "config.json").write_text(json.dumps({"seed": job.config.seed, "init": job.init_mesh is not None}))
    Image.fromarray(mesh.texture).save(folder / "texture.png", compress_level=1)
    Image.fromarray(_render(_front_view(center, radius), center, radius)).save(folder / "thumbnail.png")
    return JobResult(mesh, folder / "mesh.glb", {"steps": step})


def _color(normals: np.ndarray) -> np.ndarray:
    """Longitude and latitude as color, with dark stripes: shows position, handedness and orientation."""
    longitude = np.arctan2(normals[..., 0], -normals[..., 1]) / (2 * math.pi) + 0.5
    latitude = normals[..., 2] * 0.5 + 0.5
    stripe = 0.6 + 0.4 * (np.floor(longitude * 16) % 2)
    return np.stack([longitude, latitude, 1 - longitude], -1) * stripe[..., None]


def _show(monitor: Monitor, center: np.ndarray, radius: float, rays_across: int) -> None:
    camera = monitor.preview_camera()
    if camera is not None:
        view = camera.c2w.numpy(), camera.intrinsics.numpy(), camera.width, camera.height
        monitor.preview(_render(view, center, radius, max(1, camera.width // rays_across)), camera)


def _front_view(center: np.ndarray, radius: float) -> tuple:
    c2w = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0]])
    c2w[:, 3] = center - [0, 4 * radius, 0]
    return c2w, np.array([400.0, 400.0, 128.0, 128.0]), 256, 256


def _render(view: tuple, center: np.ndarray, radius: float, coarseness: int = 1) -> np.ndarray:
    """(H, W, 4) uint8 picture of the ball, straight alpha: rays against a sphere, one for a square of pixels."""
    c2w, (fx, fy, cx, cy), width, height = view
    half = coarseness / 2
    v, u = np.meshgrid(np.arange(0, height, coarseness) + half, np.arange(0, width, coarseness) + half, indexing="ij")
    local = np.stack([(u - cx) / fx, (cy - v) / fy, -np.ones_like(u)], -1)
    rays = local @ np.asarray(c2w)[:3, :3].T
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    offset = np.asarray(c2w)[:3, 3] - center
    b = rays @ offset
    inside = b**2 - (offset @ offset - radius**2)
    hit = inside > 0
    normals = (offset + rays * (-b - np.sqrt(np.maximum(inside, 0)))[..., None]) / radius
    rgba = np.concatenate([_color(normals), hit[..., None].astype(float)], -1)
    small = (np.clip(rgba, 0, 1) * 255 + 0.5).astype(np.uint8)
    full = small.repeat(coarseness, 0).repeat(coarseness, 1)[:height, :width]
    return np.ascontiguousarray(full)


def _mesh(center: np.ndarray, radius: float, n_faces: int, texture_size: int) -> StandInMesh:
    rows = max(int(math.sqrt(n_faces / 4)), 4)
    columns = 2 * rows
    v, u = np.meshgrid(np.linspace(0, 1, rows + 1), np.linspace(0, 1, columns + 1), indexing="ij")
    level, turn = np.sin(math.pi * v).round(7), 2 * math.pi * (np.where(u == 1, 0, u) - 0.5)
    normals = np.stack([level * np.sin(turn), -level * np.cos(turn), -np.cos(math.pi * v)], -1)
    index = np.arange((rows + 1) * (columns + 1)).reshape(rows + 1, columns + 1)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]
    faces = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)])
    size = np.arange(texture_size) + 0.5
    tv, tu = np.meshgrid(1 - size / texture_size, size / texture_size, indexing="ij")
    tlevel, tturn = np.sin(math.pi * tv), 2 * math.pi * (tu - 0.5)
    texel = np.stack([tlevel * np.sin(tturn), -tlevel * np.cos(tturn), -np.cos(math.pi * tv)], -1)
    texture = (np.clip(_color(texel), 0, 1) * 255 + 0.5).astype(np.uint8)
    points = normals.reshape(-1, 3) * radius + center
    uvs = np.stack([u, v], -1).reshape(-1, 2)
    return StandInMesh(
        points.astype("<f4"),
        faces.astype("<i4"),
        uvs.astype("<f4"),
        normals.reshape(-1, 3).astype("<f4"),
        np.ascontiguousarray(texture),
    )
