"""Blender cameras as pinhole cameras, and back. No bpy: every matrix is a numpy array.

Conventions are the engine's: camera axes +X right, +Y up, looking along -Z; pixel u to the right, v downward, centers at
+0.5; azimuth 0 stands on -Y, positive counterclockwise seen from above; elevation positive above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

MAX_ELEVATION_DEG = 89.0
FILL = 0.8
"""Part of the picture's smaller side that an object of unknown outline is taken to fill."""


@dataclass(frozen=True)
class Lens:
    """What a Blender camera says about its projection."""

    focal_mm: float = 50.0
    sensor_width_mm: float = 36.0
    sensor_height_mm: float = 24.0
    sensor_fit: str = "AUTO"
    """AUTO (the sensor's width belongs to the picture's larger side), HORIZONTAL or VERTICAL."""
    shift_x: float = 0.0
    """Parts of the side that the sensor fit names."""
    shift_y: float = 0.0


@dataclass(frozen=True)
class Orbit:
    """A camera's place around a target, and how it is turned against looking straight at it."""

    azimuth_deg: float = 0.0
    elevation_deg: float = 10.0
    distance: float = 3.0
    roll_deg: float = 0.0
    """Against the horizon, around the optical axis; positive turns the camera counterclockwise as seen from behind it."""


def fit_side(sensor_fit: str, width: int, height: int) -> int:
    """Pixels of the side that the sensor's fit belongs to."""
    return {"AUTO": max(width, height), "HORIZONTAL": width, "VERTICAL": height}[sensor_fit]


def intrinsics(lens: Lens, width: int, height: int) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy in pixels of a picture with square pixels."""
    side = fit_side(lens.sensor_fit, width, height)
    sensor_mm = lens.sensor_height_mm if lens.sensor_fit == "VERTICAL" else lens.sensor_width_mm
    focal = lens.focal_mm / sensor_mm * side
    return focal, focal, width / 2 - lens.shift_x * side, height / 2 + lens.shift_y * side


def shift_of(principal: tuple[float, float], sensor_fit: str, width: int, height: int) -> tuple[float, float]:
    """The lens shift that puts the principal point (cx, cy) where it is: the inverse of `intrinsics`."""
    side = fit_side(sensor_fit, width, height)
    return (width / 2 - principal[0]) / side, (principal[1] - height / 2) / side


def focal_mm(fov_deg: float, sensor_mm: float = 36.0) -> float:
    """Focal length whose full angle of view over the sensor's side is `fov_deg`."""
    return sensor_mm / 2 / math.tan(math.radians(fov_deg) / 2)


def rigid(matrix: np.ndarray) -> np.ndarray:
    """The 4x4 pose without scale: axes made orthonormal and right-handed, as Blender's camera ignores scale."""
    pose = np.eye(4)
    pose[:3, 3] = np.asarray(matrix, np.float64)[:3, 3]
    backward = _unit(np.asarray(matrix, np.float64)[:3, 2])
    right = _unit(np.cross(np.asarray(matrix, np.float64)[:3, 1], backward))
    pose[:3, :3] = np.stack([right, np.cross(backward, right), backward], axis=1)
    return pose


def _unit(vector: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vector)
    return vector / length if length > 1e-12 else np.array([0.0, 0.0, 1.0])


def orbit_direction(azimuth_deg: float, elevation_deg: float) -> np.ndarray:
    """Unit vector from the target to the camera."""
    azimuth, elevation = math.radians(azimuth_deg), math.radians(elevation_deg)
    level = math.cos(elevation)
    return np.array([level * math.sin(azimuth), -level * math.cos(azimuth), math.sin(elevation)])


def _roll_rotation(roll_deg: float) -> np.ndarray:
    cosine, sine = math.cos(math.radians(roll_deg)), math.sin(math.radians(roll_deg))
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def _level_rotation(yaw: float, pitch: float) -> np.ndarray:
    """Camera axes without roll; yaw 0 looks along +Y, pitch 0 is level, radians."""
    forward = np.array([-math.sin(yaw) * math.cos(pitch), math.cos(yaw) * math.cos(pitch), math.sin(pitch)])
    right = np.array([math.cos(yaw), math.sin(yaw), 0.0])
    return np.stack([right, np.cross(right, forward), -forward], axis=1)


def _turned(direction: np.ndarray, ray: np.ndarray, roll_deg: float) -> np.ndarray:
    """Camera axes with a given roll against the horizon that see a world direction along a ray of the camera.

    With r the ray before the roll and the camera pitched by p, the direction's height is r_y cos p - r_z sin p.
    """
    r = _roll_rotation(roll_deg) @ ray
    reach = math.hypot(r[1], r[2])
    # Nearly straight above the target no level camera sees it so far aside; the nearest one is taken.
    pitch = math.asin(float(np.clip(direction[2] / max(reach, 1e-9), -1, 1))) - math.atan2(r[1], -r[2])
    ahead = -r[2] * math.cos(pitch) - r[1] * math.sin(pitch)
    if math.hypot(direction[0], direction[1]) > 1e-9:
        yaw = math.atan2(-direction[0], direction[1]) - math.atan2(-r[0], ahead)
    else:
        yaw = 0.0
    return _level_rotation(yaw, pitch) @ _roll_rotation(roll_deg)


def _roll_of(axes: np.ndarray) -> float:
    """Degrees between the camera's right axis and the horizon."""
    forward = -axes[:, 2]
    level = np.array([forward[1], -forward[0], 0.0])
    level = level / np.linalg.norm(level) if np.linalg.norm(level) > 1e-9 else np.array([1.0, 0.0, 0.0])
    return math.degrees(math.atan2(axes[:, 0] @ np.cross(level, forward), axes[:, 0] @ level))


def orbit_of(c2w: np.ndarray, target: np.ndarray) -> Orbit:
    """Where the camera stands around the target."""
    pose = rigid(c2w)
    offset = pose[:3, 3] - np.asarray(target, np.float64)
    direction = _unit(offset)
    elevation = math.degrees(math.asin(float(np.clip(direction[2], -1, 1))))
    is_aside = math.hypot(direction[0], direction[1]) > 1e-9
    azimuth = math.degrees(math.atan2(direction[0], -direction[1])) if is_aside else 0.0
    return Orbit(azimuth, elevation, float(np.linalg.norm(offset)), _roll_of(pose[:3, :3]))


def moved_on_orbit(c2w: np.ndarray, target: np.ndarray, orbit: Orbit) -> np.ndarray:
    """The pose at another place of the orbit, which sees the target at the same place of the picture."""
    pose, target = rigid(c2w), np.asarray(target, np.float64)
    ray = pose[:3, :3].T @ -_unit(pose[:3, 3] - target)
    # A target behind the camera or far off its picture is looked straight at.
    return _posed(target, orbit, ray if ray[2] < -0.2 else np.array([0.0, 0.0, -1.0]))


def orbit_pose(target: np.ndarray, orbit: Orbit) -> np.ndarray:
    """The pose that looks straight at the target."""
    return _posed(np.asarray(target, np.float64), orbit, np.array([0.0, 0.0, -1.0]))


def _posed(target: np.ndarray, orbit: Orbit, ray: np.ndarray) -> np.ndarray:
    elevation = float(np.clip(orbit.elevation_deg, -MAX_ELEVATION_DEG, MAX_ELEVATION_DEG))
    away = orbit_direction(orbit.azimuth_deg, elevation)
    pose = np.eye(4)
    pose[:3, :3] = _turned(-away, ray, orbit.roll_deg)
    pose[:3, 3] = target + max(orbit.distance, 1e-6) * away
    return pose


def fitted_pose(
    orbit: Orbit,
    camera: tuple[float, float, float, float],
    target: np.ndarray,
    size: float,
    box: tuple[float, float, float, float],
) -> np.ndarray:
    """The pose from which an object at `target` covers a box of the picture.

    The camera turns and comes nearer or goes back, but its orbit angles and roll stay: an object beside the picture's
    center was seen aside, not shifted.

    Args:
        orbit: Where it stands; the distance is ignored.
        camera: fx, fy, cx, cy.
        target: The object's center.
        size: Its largest side.
        box: left, top, right, bottom of the object in the picture, pixels.

    Returns:
        The pose that sees the target at the box's center, `size` as long as the box's larger side.
    """
    fx, fy, cx, cy = camera
    left, top, right, bottom = box
    depth = min(fx * size / max(right - left, 1.0), fy * size / max(bottom - top, 1.0))
    ray = np.array([((left + right) / 2 - cx) / fx, (cy - (top + bottom) / 2) / fy, -1.0])
    distance = depth * float(np.linalg.norm(ray))
    return _posed(np.asarray(target, np.float64), replace(orbit, distance=distance), _unit(ray))


def central_box(width: int, height: int) -> tuple[float, float, float, float]:
    """The box of an object of unknown outline: centered, filling `FILL` of the picture's smaller side."""
    half = FILL * min(width, height) / 2
    return width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half


def box_of_mask(mask: np.ndarray) -> tuple[float, float, float, float] | None:
    """left, top, right, bottom of the mask's set pixels (H, W; row 0 on top), or None when nothing or all is set."""
    mask = np.asarray(mask, bool)
    if mask.all() or not mask.any():
        return None
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def project(
    points: np.ndarray, c2w: np.ndarray, camera: tuple[float, float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates (n, 2) and z-depths (n,) of world points (n, 3)."""
    pose = rigid(c2w)
    local = (np.asarray(points, np.float64) - pose[:3, 3]) @ pose[:3, :3]
    depths = -local[:, 2]
    fx, fy, cx, cy = camera
    return np.stack([cx + fx * local[:, 0] / depths, cy - fy * local[:, 1] / depths], axis=1), depths


def setup_json(
    c2w: np.ndarray,
    camera: tuple[float, float, float, float],
    width: int,
    height: int,
    center: np.ndarray,
    size: float,
) -> dict:
    """The reference camera as the engine reads it (`cameras.CameraSetup.from_json`)."""
    return {
        "c2w": rigid(c2w).tolist(),
        "intrinsics": [float(value) for value in camera],
        "width": int(width),
        "height": int(height),
        "object_center": [float(value) for value in center],
        "object_size": float(size),
    }


def view_camera(
    view: np.ndarray, window: np.ndarray, width: int, height: int, center: np.ndarray, size: float
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """The pinhole camera of a 3D viewport.

    Args:
        view: World to view, 4x4 (`RegionView3D.view_matrix`).
        window: Projection, 4x4 (`RegionView3D.window_matrix`).
        width, height: Of the picture wanted; its aspect should be the region's.
        center, size: The object's. An orthographic view becomes a camera far behind, which scales the object as the
            view does at `center`.

    Returns:
        Pose 4x4 and fx, fy, cx, cy.
    """
    pose = rigid(np.linalg.inv(np.asarray(view, np.float64)))
    window = np.asarray(window, np.float64)
    if abs(window[3, 3]) < 0.5:
        fx, fy = width / 2 * window[0, 0], height / 2 * window[1, 1]
        return pose, (fx, fy, width / 2 * (1 - window[0, 2]), height / 2 * (1 + window[1, 2]))
    far = 30.0 * max(size, 1e-3)
    depth = float((pose[:3, 3] - np.asarray(center)) @ pose[:3, 2])
    pose[:3, 3] += (far - depth) * pose[:3, 2]
    fx, fy = width / 2 * window[0, 0] * far, height / 2 * window[1, 1] * far
    return pose, (fx, fy, width / 2 * (1 + window[0, 3]), height / 2 * (1 - window[1, 3]))


@dataclass(frozen=True)
class Placement:
    """points -> scale * points + offset: from where the job's camera saw the object to where it is wanted."""

    scale: float = 1.0
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def points(self, points: np.ndarray) -> np.ndarray:
        return self.scale * np.asarray(points) + np.asarray(self.offset)

    def pose(self, c2w: np.ndarray) -> np.ndarray:
        """The pose from which the placed object looks as it did before."""
        pose = rigid(c2w)
        pose[:3, 3] = self.points(pose[:3, 3])
        return pose


def placement(
    vertices: np.ndarray, place: np.ndarray | None, size: float | None, origin: str
) -> tuple[Placement, np.ndarray]:
    """How to put a mesh where it is wanted.

    Args:
        vertices: (n, 3) as the job's camera sees them.
        place: Where the object's origin goes; None leaves it where it is.
        size: Wanted largest side; None leaves the size.
        origin: BOTTOM (center of the lowest plane) or CENTER of the bounding box.

    Returns:
        The mapping, and the object's origin after it.
    """
    low, high = np.asarray(vertices, np.float64).min(0), np.asarray(vertices, np.float64).max(0)
    anchor = (low + high) / 2
    if origin == "BOTTOM":
        anchor[2] = low[2]
    scale = 1.0 if size is None else size / max(float((high - low).max()), 1e-9)
    goal = anchor if place is None else np.asarray(place, np.float64)
    return Placement(scale, tuple(float(x) for x in goal - scale * anchor)), goal
