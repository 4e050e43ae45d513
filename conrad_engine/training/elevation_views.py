"""Views to learn the camera's elevation from: every one framed as the product frames a picture, elevation uniform."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np

from ..config import HALF_FRAME
from .pool import PoolMesh
from .raster import Rasterizer, orbit_camera, random_light
from .remodel import recolored, reshaped
from .views import MIN_COVERAGE, P_RECOLOR, SIZE, Framing, Task, framed, is_usable, load_mesh

ELEVATIONS_DEG = (-10.0, 60.0)
FOVS_DEG = (20.0, 60.0)
N_TRIES = 8


@dataclass(frozen=True)
class ElevationViews:
    """Views of one or several objects."""

    views: np.ndarray
    """(n, 64, 64, 4) 8-bit straight RGBA."""
    elevations_deg: np.ndarray
    """(n,)"""
    fovs_deg: np.ndarray
    """(n,) angle of view of the square frame."""
    objects: np.ndarray
    """(n,) number of the object in the list that was rendered."""

    @staticmethod
    def joined(parts: list[ElevationViews]) -> ElevationViews:
        names = (field.name for field in fields(ElevationViews))
        return ElevationViews(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def draw_view(rng: np.random.Generator, mesh: PoolMesh, elevation_deg: float, fill: float) -> tuple[np.ndarray, float]:
    """One view (64, 64, 4) from a random side with a random lens and light, and its angle of view in degrees.

    Raises:
        ValueError: No side in `N_TRIES` shows enough of the object.
    """
    for _ in range(N_TRIES):
        fov_deg = rng.uniform(*FOVS_DEG)
        fov_rad, azimuth_rad = math.radians(fov_deg), rng.uniform(-math.pi, math.pi)
        framing = Framing(fov_rad, math.radians(elevation_deg), azimuth_rad, fill, is_silhouette_centered=True)
        moved = framed(mesh.vertices, framing)
        if not is_usable(moved, framing):
            continue
        scene = Rasterizer(replace(mesh, vertices=moved.astype(np.float32)))
        distance = HALF_FRAME / math.tan(fov_rad / 2)
        camera = orbit_camera(azimuth_rad, framing.elevation_rad, distance)
        view = scene.render(camera, fov_rad, SIZE, random_light(rng))
        if (view[..., 3] > 127).mean() >= MIN_COVERAGE:
            return view, fov_deg
    raise ValueError(f"no side in {N_TRIES} shows enough of it")


def render_elevations(task: Task, n_views: int) -> ElevationViews:
    """Views of one object; none if it fails.

    In training the elevation is uniform in `ELEVATIONS_DEG` and the object is changed as in the prior's own training;
    in validation the elevations are evenly spaced, both ends included.
    """
    rng = np.random.default_rng([task.round_index, task.row, 11])
    views, elevations, fovs = [], [], []
    low, high = ELEVATIONS_DEG
    try:
        mesh = load_mesh(rng, task)
        for elevation_deg in rng.uniform(low, high, n_views) if task.is_train else np.linspace(low, high, n_views):
            changed = mesh
            if task.is_train and rng.random() < P_RECOLOR:
                changed = recolored(rng, changed)
            if task.is_train:
                changed = replace(changed, vertices=reshaped(rng, changed.vertices))
            view, fov_deg = draw_view(rng, changed, elevation_deg, rng.uniform(0.76, 0.82) if task.is_train else 0.8)
            views.append(view)
            elevations.append(elevation_deg)
            fovs.append(fov_deg)
    except (ValueError, IndexError, ArithmeticError, MemoryError, OSError) as error:
        print(f"{task.source} {task.index}: {error!r}"[:200], flush=True)
    return ElevationViews(
        np.array(views, np.uint8).reshape(-1, SIZE, SIZE, 4),
        np.array(elevations, np.float32),
        np.array(fovs, np.float32),
        np.full(len(views), task.row),
    )
