"""A vertical plane of symmetry: where a shape has one, the picture in a mirror is a view of its other side.

Most things are alike on two sides. What the prior draws from all around is so, too, roughly: the plane shows in the hull of
these views. The mirrored picture then tells what they cannot, at the picture's resolution: outline and colors of the far side
and, as from a second camera, how deep the near one is.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import mcubes
import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import binary_fill_holes
from scipy.spatial import cKDTree

from .cameras import Camera
from .constraint import ConstrainedField, ReferenceView
from .guidance.interfaces import ViewSampler
from .mesh.mesh import Mesh
from .mesh.occupancy import surface_points

log = logging.getLogger(__name__)

N_CELLS = 80
"""Cells a side of the grid in which the field's surface is found."""
CHUNK = 1 << 17
"""Points of the field evaluated at once."""
N_POINTS, LEAST_POINTS = 2500, 300
FARTHEST = 0.1
"""Distances count up to here, longest sides: what one side alone has must not decide where the plane is."""
STEP_DEG = 3
MOST_UNLIKE = 0.03
"""Mean distance, longest sides, between the surface and its mirror image up to which it may be symmetric. Sampled as here, a
surface is about 0.006 away from itself."""
MOST_CONTRAST = 0.6
"""... and of what it is across the middle one of all planes: a thing that is round has none of its own."""
N_CANDIDATES, WINDOW_DEG = 3, 9
"""Planes that the prior is asked about, and how far to both sides of each."""
LEAST_DIP = 0.03
"""By how much the prior must like a plane better than those at both ends of its window (logarithm of its error)."""
LEAST_TURN_DEG, MOST_TURN_DEG = 5.0, 70.0
"""Angles between plane and line of sight from which on the mirrored picture says something new, and up to which an error
of one degree makes an object no more than 5 % longer; beyond, it also prints a face on the back of a head."""


def find_plane(field: ConstrainedField, sampler: ViewSampler) -> float | None:
    """The vertical plane through the origin about which the object is symmetric; None if there is none, or if the picture would
    say nothing new in its mirror.

    The field's surface says about where it is. How well the prior takes the mirrored picture for the view from the other side
    says it to a degree or two (cf. ID-Pose, arXiv:2306.17140, for the cameras of several pictures): across a plane that is off
    by one, an object long towards the camera would have to be several percent longer to fit both pictures.

    Returns:
        Azimuth of its normal (radians); 0 is across the reference's line of sight.
    """
    for likely_deg in likely_planes(field):
        window = np.arange(likely_deg - WINDOW_DEG, likely_deg + WINDOW_DEG + 1, STEP_DEG)
        errors = mirror_errors(sampler, window)
        lowest = int(errors.argmin())
        dip = float(min(errors[0], errors[-1]) - errors[lowest])
        log.info("a plane at %.0f degrees: the prior's best is %.0f, by %.3f", likely_deg, window[lowest], dip)
        if dip > LEAST_DIP:
            break
    else:
        return None
    near = window[lowest] + np.arange(-2, 3) * (STEP_DEG / 2)
    curve = np.polyfit(near - window[lowest], mirror_errors(sampler, near), 2)
    shift = float(np.clip(-curve[1] / (2 * curve[0]), -STEP_DEG, STEP_DEG)) if curve[0] > 0 else 0.0
    azimuth_rad = math.radians(window[lowest] + shift)
    turn_deg = math.degrees(math.asin(abs(math.sin(azimuth_rad))))
    log.info("symmetric about a plane %.1f degrees off the line of sight", turn_deg)
    return azimuth_rad if LEAST_TURN_DEG < turn_deg < MOST_TURN_DEG else None


def likely_planes(field: ConstrainedField) -> list[float]:
    """Azimuths (degrees) of planes about which the field's surface is like its mirror image, the likeliest first."""
    surface = outer_surface(field)
    if len(surface.vertices) < LEAST_POINTS:
        return []
    longest = float(np.ptp(surface.vertices, axis=0).max())
    # Anywhere on the faces: the vertices lie on a grid, which has planes of its own.
    tree, some = cKDTree(surface.vertices), surface_points(surface, N_POINTS)

    def unlikeness(azimuth_deg: float) -> float:
        mirrored = mirrored_points(some, math.radians(azimuth_deg))
        distances, _ = tree.query(mirrored, distance_upper_bound=FARTHEST * longest)
        return float(np.minimum(distances / longest, FARTHEST).mean())

    azimuths = np.arange(0, 180, STEP_DEG)
    scores = np.array([unlikeness(azimuth) for azimuth in azimuths])
    is_lowest = (scores <= np.roll(scores, 1)) & (scores <= np.roll(scores, -1))
    is_likely = is_lowest & (scores < min(MOST_UNLIKE, MOST_CONTRAST * np.median(scores)))
    order = np.argsort(scores)
    log.info("most symmetric at %d degrees: %.4f, others %.4f", azimuths[order[0]], scores.min(), np.median(scores))
    return [float(azimuths[k]) for k in order if is_likely[k]][:N_CANDIDATES]


def mirror_errors(sampler: ViewSampler, azimuths_deg: np.ndarray) -> Float[np.ndarray, " n"]:
    """What the prior thinks of planes. In a mirror the reference moves by twice its angle."""
    return sampler.mirror_errors(torch.from_numpy(np.radians(2 * azimuths_deg)).float()).double().cpu().numpy()


def mirrored_points(points: Float[np.ndarray, "n 3"], azimuth_rad: float) -> Float[np.ndarray, "n 3"]:
    normal = plane_normal(azimuth_rad)
    return points - 2 * (points @ normal)[:, None] * normal


def plane_normal(azimuth_rad: float) -> Float[np.ndarray, "3"]:
    return np.array([math.cos(azimuth_rad), math.sin(azimuth_rad), 0.0])


@torch.no_grad()
def outer_surface(field: ConstrainedField) -> Mesh:
    """The field's outer surface, its vertices about a cell apart; empty where the field is."""
    low, high = field.aabb.double().cpu().numpy()
    cell = float((high - low).max()) / N_CELLS
    axes = [np.arange(start + cell / 2, end, cell) for start, end in zip(low, high)]
    grid = torch.from_numpy(np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)).to(field.aabb)
    density = torch.cat([field.density(some) for some in grid.split(CHUNK)])
    # Half opaque after two cells.
    solid = (density * (2 * cell / math.log(2))).clamp(max=2).cpu().numpy().reshape([len(axis) for axis in axes])
    outer = np.pad(np.where(binary_fill_holes(solid > 1), np.maximum(solid, 1.001), solid), 1)
    vertices, faces = mcubes.marching_cubes(outer, 1.0)
    return Mesh((low + (vertices - 0.5) * cell).astype(np.float32), faces.astype(np.int32))


def mirrored_view(view: ReferenceView, azimuth_rad: float) -> ReferenceView:
    """The picture in the mirror as a view of the object, and the camera that took it."""
    return ReferenceView(view.rgb.flip(-1), view.mask.flip(-1), mirrored_camera(view.camera, azimuth_rad))


def mirrored_camera(camera: Camera, azimuth_rad: float) -> Camera:
    """The one that sees of the mirror image what `camera` sees of the thing, left and right exchanged."""
    normal = torch.from_numpy(plane_normal(azimuth_rad))
    mirror = torch.eye(3, dtype=torch.float64) - 2 * torch.outer(normal, normal)
    # A mirror makes a right hand a left one, and so does a picture turned over: together they are a camera again.
    c2w = (mirror @ camera.c2w.double().cpu()) * torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64)
    fx, fy, cx, cy = camera.intrinsics.unbind(-1)
    intrinsics = torch.stack([fx, fy, camera.width - cx, cy], -1)
    return replace(camera, c2w=c2w.to(camera.c2w), intrinsics=intrinsics)
