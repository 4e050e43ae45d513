"""A vertical plane of symmetry: where a shape has one, the picture in a mirror is a view of its other side.

Most things are alike on two sides. What the prior draws from all around is so, too, roughly: the plane shows in the field that
is fitted to these views, to a few degrees, and the mirrored picture then tells what they cannot, at the picture's resolution:
outline and colors of the far side and, as from a second camera, how deep the near one is.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import NamedTuple

import mcubes
import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.ndimage import binary_fill_holes
from scipy.optimize import minimize
from scipy.spatial import cKDTree

from .constraint import ConstrainedField, ReferenceView

log = logging.getLogger(__name__)

N_CELLS = 80
"""Cells a side of the grid in which the field's surface is found."""
CHUNK = 1 << 17
"""Points of the field evaluated at once."""
N_POINTS, LEAST_POINTS = 2500, 300
FARTHEST = 0.1
"""Distances count up to here, longest sides: what one side alone has must not decide where the plane is."""
STEP_DEG = 3
MOST_UNLIKE = 0.02
"""Mean distance, longest sides, between the surface and its mirror image up to which it is symmetric. Sampled as here, a
surface is about 0.006 away from itself."""
MOST_CONTRAST = 0.6
"""... and of what it is across the middle one of all planes: a thing that is round has none of its own."""
LEAST_TURN_DEG = 5.0
"""Angle between the plane and the reference's line of sight from which the mirrored picture says something new."""


class Plane(NamedTuple):
    """A vertical plane of the object frame."""

    azimuth_rad: float
    """Of its normal; 0 is across the reference's line of sight."""
    offset: float
    """Distance from the origin along the normal."""

    @property
    def normal(self) -> Float[np.ndarray, "3"]:
        return np.array([math.cos(self.azimuth_rad), math.sin(self.azimuth_rad), 0.0])

    @property
    def turn_deg(self) -> float:
        """Angle between the plane and the reference's line of sight: the mirrored picture is taken from twice as far aside."""
        return math.degrees(math.asin(min(1.0, abs(math.sin(self.azimuth_rad)))))


def find_plane(field: ConstrainedField, is_centered: bool) -> Plane | None:
    """The plane about which the field's surface is most like its mirror image; None if it is not like it about any, or if the
    picture would say nothing new in the mirror.

    Args:
        is_centered: Whether the origin is known to be the object's center, so that the plane goes through it.
    """
    points, faces = outer_surface(field)
    if len(points) < LEAST_POINTS:
        return None
    longest, rng = float(np.ptp(points, axis=0).max()), np.random.default_rng(0)
    # Anywhere on the faces: the vertices lie on a grid, which has planes of its own.
    corners = points[faces[rng.integers(len(faces), size=N_POINTS)]]
    tree, some = cKDTree(points), (rng.dirichlet(np.ones(3), N_POINTS)[..., None] * corners).sum(1)

    def unlikeness(plane: Plane) -> float:
        distances, _ = tree.query(mirrored_points(some, plane), distance_upper_bound=FARTHEST * longest)
        return float(np.minimum(distances / longest, FARTHEST).mean())

    def through_the_middle(azimuth_rad: float) -> Plane:
        along = points @ Plane(azimuth_rad, 0.0).normal
        return Plane(azimuth_rad, 0.0 if is_centered else float(along.min() + along.max()) / 2)

    planes = [through_the_middle(math.radians(angle)) for angle in range(0, 180, STEP_DEG)]
    scores = np.array([unlikeness(plane) for plane in planes])
    start = planes[int(scores.argmin())]
    step = np.array([math.radians(STEP_DEG), FARTHEST / 4 * longest])[: 1 if is_centered else 2]
    ends = np.array(start)[: len(step)] + np.concatenate([-step[None] / 2, np.diag(step)])
    options = {"initial_simplex": ends, "maxfev": 25 * len(step)}
    found = minimize(
        lambda x: unlikeness(Plane(*x, 0.0) if is_centered else Plane(*x)),
        ends[0],
        method="Nelder-Mead",
        options=options,
    )
    best = Plane(*map(float, found.x), 0.0) if is_centered else Plane(*map(float, found.x))
    median = float(np.median(scores))
    log.info(
        "most symmetric about a plane %.1f degrees from the line of sight: %.4f, others %.4f",
        best.turn_deg,
        found.fun,
        median,
    )
    is_symmetric = found.fun < min(MOST_UNLIKE, MOST_CONTRAST * median)
    return best if is_symmetric and best.turn_deg > LEAST_TURN_DEG else None


def mirrored_points(points: Float[np.ndarray, "n 3"], plane: Plane) -> Float[np.ndarray, "n 3"]:
    normal = plane.normal
    return points - 2 * (points @ normal - plane.offset)[:, None] * normal


@torch.no_grad()
def outer_surface(field: ConstrainedField) -> tuple[Float[np.ndarray, "n 3"], Int[np.ndarray, "m 3"]]:
    """Vertices of the field's outer surface, about a cell apart, and its faces; none where it is empty."""
    low, high = field.aabb.double().cpu().numpy()
    cell = float((high - low).max()) / N_CELLS
    axes = [np.arange(start + cell / 2, end, cell) for start, end in zip(low, high)]
    grid = torch.from_numpy(np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)).to(field.aabb)
    density = torch.cat([field.density(some) for some in grid.split(CHUNK)])
    # Half opaque after two cells.
    solid = (density * (2 * cell / math.log(2))).clamp(max=2).cpu().numpy().reshape([len(axis) for axis in axes])
    outer = np.pad(np.where(binary_fill_holes(solid > 1), np.maximum(solid, 1.001), solid), 1)
    vertices, faces = mcubes.marching_cubes(outer, 1.0)
    return low + (vertices - 0.5) * cell, faces.astype(np.int64)


def mirrored_view(view: ReferenceView, plane: Plane) -> ReferenceView:
    """The picture in the mirror as a view of the object, and the camera that took it."""
    camera = view.camera
    normal = torch.from_numpy(plane.normal)
    mirror = torch.eye(3, dtype=torch.float64) - 2 * torch.outer(normal, normal)
    axes, position = (mirror @ camera.c2w.double().cpu()).split([3, 1], 1)
    # A mirror makes a right hand a left one, and so does a picture turned over: together they are a camera again.
    axes = axes * torch.tensor([-1.0, 1, 1], dtype=torch.float64)
    c2w = torch.cat([axes, position + 2 * plane.offset * normal[:, None]], 1).to(camera.c2w)
    fx, fy, cx, cy = camera.intrinsics.unbind(-1)
    camera = replace(camera, c2w=c2w, intrinsics=torch.stack([fx, fy, camera.width - cx, cy], -1))
    return ReferenceView(view.rgb.flip(-1), view.mask.flip(-1), camera)
