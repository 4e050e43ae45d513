"""A vertical plane of symmetry: where the object has one, the picture in a mirror is a view of its other side.

Most things are alike on two sides. The prior says how well the mirrored picture would do as the view from around there; what it
has drawn from all around must leave room for that silhouette. A plane that stands both tests gives a second picture of the
object, which the prior then knows, at the price of an error of the plane of a degree or two.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .cameras import Camera
from .constraint import ReferenceView
from .guidance.interfaces import ViewSampler
from .hull import EMPTY_SCORE, HULL_CELLS, cell_centers, hull_scores, log_opacities

log = logging.getLogger(__name__)

STEP_DEG = 3
WINDOW = 4
"""Steps to both sides of a plane within which the prior must dislike some other plane."""
LEAST_DIP = 0.12
"""By how much, at both ends of that window (logarithm of its error)."""
MOST_DENIED = 0.1
"""Part of the drawn silhouettes that the mirrored one may leave no room for: where it is more, the two tell of other shapes."""
MOST_ABOVE = 0.3
"""Error over what is usual at an angle, above the least of all, up to which a dip counts: a box is a little alike about its
diagonals, too."""
LEAST_TURN_DEG, MOST_TURN_DEG = 6.0, 80.0
"""Angles between plane and line of sight from which on the mirrored picture says something new, and up to which it may be
taken for the other side: beyond, it is the face of a head on its back, which the prior does not find strange enough."""
USUAL_TURNS_DEG, USUAL_ERRORS = (0, 9, 18, 27, 45, 63, 90), (0.44, 0.245, 0.116, 0.061, -0.018, -0.077, -0.105)
"""The prior's error, over its median for a picture, at any angle between plane and line of sight: means over 200 objects. It
takes a face for a likelier back than side."""
LEAST_CONTRAST, MOST_DENIED_AXIS, LEAST_ALIKE = 0.05, 0.04, 0.5
"""What a plane along one of the world's axes needs: an error below the usual, so much further below than the other axis, less
that is denied, and a hull so much like its mirror image."""
SNAP_DEG = 4.5
"""A plane is moved to one of the world's axes from so near: the lowest error may be as far off as that."""
SILHOUETTE_PX = 64
"""Longer side of the picture's silhouette in the hull: as much as drawn views have."""


def find_plane(
    view: ReferenceView,
    opacities: Float[Tensor, "v 1 h w"],
    cameras: Camera,
    aabb: Float[Tensor, "2 3"],
    sampler: ViewSampler,
    world_azimuth_rad: float | None = None,
) -> float | None:
    """The vertical plane through the origin about which the object is symmetric; None if there is none to be seen, or if the
    picture would say nothing new in its mirror.

    As a function of the plane's angle the prior's error for the mirrored picture falls by a tenth and more, within ten degrees,
    where it is right (cf. ID-Pose, arXiv:2306.17140, for the cameras of several pictures); but it may fall elsewhere, too. Of
    such angles, the one counts whose hull, of the views and both pictures, is most like its own mirror image, if its error is
    as low. If there is none, one of the world's axes may do, along which most things stand in a scene.

    Args:
        view: The picture.
        opacities: Of views that the prior has drawn, and their `cameras`.
        aabb: Where the object is.
        world_azimuth_rad: Of one of the world's level axes, if things are likely to stand square to them.

    Returns:
        Azimuth of its normal (radians); 0 is across the reference's line of sight.
    """
    angles = np.arange(0, 180, STEP_DEG)
    errors = mirror_errors(sampler, angles)
    hull = _Hull(view, opacities, cameras, aabb)
    axes = None
    if world_azimuth_rad is not None:
        axes = (math.degrees(world_azimuth_rad) + np.array([0.0, 90.0])) % 180
    found = _deepest(angles, errors, hull)
    if found is not None:
        angle = _refined(angles[found], sampler)
        if axes is not None:
            near = axes[np.abs((axes - angle + 90) % 180 - 90) < SNAP_DEG]
            angle = near[0] if len(near) else angle
    elif axes is not None:
        angle = _along_an_axis(axes, mirror_errors(sampler, axes) - np.median(errors), hull)
    else:
        return None
    if angle is None or not is_new(angle):
        return None
    log.info("symmetric about the plane at %.1f degrees", angle)
    return math.radians(angle)


def _deepest(angles: np.ndarray, errors: np.ndarray, hull: _Hull) -> int | None:
    """Index of the angle in a dip of the errors whose hull is most like its mirror image."""
    ends = np.minimum(*(nearby(errors, side * np.array([WINDOW - 1, WINDOW])).min(0) for side in (-1, 1)))
    is_lowest = errors <= nearby(errors, np.array([-1, 1])).min(0)
    best, most_alike = None, -math.inf
    unusual = errors - usual_errors(angles)
    is_low = unusual < unusual.min() + MOST_ABOVE
    for index in np.flatnonzero(is_lowest & is_low & is_new(angles) & (ends - errors > LEAST_DIP)):
        denied, alike = hull.beside(math.radians(angles[index]))
        dip = ends[index] - errors[index]
        log.info("a plane at %d degrees: dip %.2f, denied %.3f, alike %.2f", angles[index], dip, denied, alike)
        alike -= unusual[index]
        if denied < MOST_DENIED and alike > most_alike:
            best, most_alike = index, alike
    return best


def _refined(angle: float, sampler: ViewSampler) -> float:
    """The lowest point of a parabola through the prior's errors around an angle."""
    steps = np.arange(-2, 3) * (STEP_DEG / 2)
    curve = np.polyfit(steps, mirror_errors(sampler, angle + steps), 2)
    return angle + (float(np.clip(-curve[1] / (2 * curve[0]), -STEP_DEG, STEP_DEG)) if curve[0] > 0 else 0.0)


def _along_an_axis(axes: np.ndarray, errors: np.ndarray, hull: _Hull) -> float | None:
    """The axis that the prior likes clearly better than is usual at its angle, and better than the other one."""
    unusual = errors - usual_errors(axes)
    better = int(unusual.argmin())
    if not is_new(axes)[better] or unusual[better] > 0 or unusual.max() - unusual.min() < LEAST_CONTRAST:
        return None
    denied, alike = hull.beside(math.radians(axes[better]))
    log.info("an axis at %d degrees: %.2f, denied %.3f, alike %.2f", axes[better], unusual[better], denied, alike)
    return float(axes[better]) if denied < MOST_DENIED_AXIS and alike > LEAST_ALIKE else None


def usual_errors(angles_deg: np.ndarray) -> np.ndarray:
    """See `USUAL_ERRORS`."""
    return np.interp(turns_deg(angles_deg), USUAL_TURNS_DEG, USUAL_ERRORS)


def turns_deg(angles_deg: np.ndarray | float) -> np.ndarray:
    """Angles, 0 to 90, between planes and the line of sight."""
    return np.minimum(angles_deg % 180, -angles_deg % 180)


def is_new(angles_deg: np.ndarray | float) -> np.ndarray:
    """Whether the picture in the mirror says something of the other side."""
    return (turns_deg(angles_deg) > LEAST_TURN_DEG) & (turns_deg(angles_deg) < MOST_TURN_DEG)


def nearby(errors: Float[np.ndarray, " n"], steps: np.ndarray) -> Float[np.ndarray, "s n"]:
    """Errors so many steps of the angle away: half a turn makes a plane the same again."""
    return np.stack([np.roll(errors, -step) for step in steps])


class _Hull:
    """Of drawn silhouettes and the picture's own; what becomes of it when the mirrored one joins."""

    def __init__(self, view: ReferenceView, opacities: Tensor, cameras: Camera, aabb: Tensor) -> None:
        self.view, self.aabb = view.resized(SILHOUETTE_PX), aabb
        self.points = cell_centers(aabb)
        drawn = log_opacities(self.points, opacities, cameras)
        self.logs = torch.cat([drawn, self._seen(self.view)])
        # Pixels of drawn silhouettes that points fall on, numbered through all views; the last number is for none.
        uv, _ = cameras.project(self.points[None].expand(len(cameras), -1, -1))
        column, row = uv.long().unbind(-1)
        width, height = cameras.width, cameras.height
        is_inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        first = torch.arange(len(cameras), device=aabb.device)[:, None] * width * height
        pixel = torch.where(is_inside, first + row * width + column, 0)
        is_inside &= opacities.flatten()[pixel] > 0.5
        self.n_pixels = opacities.numel()
        self.pixels = torch.where(is_inside, pixel, self.n_pixels)
        self.n_covered = self._covered(hull_scores(self.logs) > EMPTY_SCORE)

    def beside(self, azimuth_rad: float) -> tuple[float, float]:
        """With the picture in this plane's mirror: the part of the drawn silhouettes that has no hull any more, and the
        intersection over union of the hull and its mirror image."""
        logs = torch.cat([self.logs, self._seen(mirrored_view(self.view, azimuth_rad))])
        is_solid = hull_scores(logs) > EMPTY_SCORE
        if not is_solid.any():
            return 1.0, 0.0
        points = self.points[is_solid]
        low, high = self.aabb
        cells = ((mirrored_points(points, azimuth_rad) - low) / (high - low) * HULL_CELLS).floor().long()
        is_inside = ((cells >= 0) & (cells < HULL_CELLS)).all(-1)
        x, y, z = cells[is_inside].unbind(-1)
        n_both = int(is_solid[(x * HULL_CELLS + y) * HULL_CELLS + z].sum())
        return 1 - self._covered(is_solid) / max(1, self.n_covered), n_both / (2 * len(points) - n_both)

    def _seen(self, view: ReferenceView) -> Tensor:
        return log_opacities(self.points, view.mask[None], view.camera[None])

    def _covered(self, is_solid: Bool[Tensor, " n"]) -> int:
        hit = torch.zeros(self.n_pixels + 1, dtype=torch.bool, device=is_solid.device)
        hit[self.pixels[:, is_solid].flatten()] = True
        return int(hit[:-1].sum())


def mirror_errors(sampler: ViewSampler, azimuths_deg: np.ndarray) -> Float[np.ndarray, " n"]:
    """What the prior thinks of planes. In a mirror the reference moves by twice its angle."""
    return sampler.mirror_errors(torch.from_numpy(np.radians(2 * azimuths_deg)).float()).double().cpu().numpy()


def mirrored_points(points: Float[Tensor, "n 3"], azimuth_rad: float) -> Float[Tensor, "n 3"]:
    normal = torch.from_numpy(plane_normal(azimuth_rad)).to(points)
    return points - 2 * (points @ normal)[:, None] * normal


def plane_normal(azimuth_rad: float) -> Float[np.ndarray, "3"]:
    return np.array([math.cos(azimuth_rad), math.sin(azimuth_rad), 0.0])


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
