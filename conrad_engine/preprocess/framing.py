"""From a picture and a camera to the object frame: where the object lies, and how the prior sees the picture.

The object frame has its origin at the object's center, +Z up, and the reference camera at azimuth 0. Where the user's center
is not to be believed, or there is none, it lies on the ray through the middle of the silhouette. Its unit makes the longest
side of the silhouette `REFERENCE_EXTENT` on the plane through the origin, so nothing has to be known of the object's true size;
its depth is the prior's to find.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..cameras import (
    Camera,
    CameraSetup,
    Similarity,
    centered_camera,
    default_camera,
    orbit_angles,
    pixel_mapping,
    resample,
)
from ..config import HALF_FRAME, REFERENCE_EXTENT, PictureConfig
from ..errors import InputError

log = logging.getLogger(__name__)

SIZE_RANGE = 0.85, 2.5
"""Believable ratios of the object's longest side to its silhouette's: it cannot be smaller than what is seen of it."""
MOST_BESIDE = 1 / 4
"""How far a believable center of the object may appear beside the middle of its silhouette, longest sides of the silhouette.
Perspective and parts that stick out move it by up to 0.13 for nineteen of twenty objects, and by 0.23 for one of a hundred."""
MOST_REACH = 0.96 * HALF_FRAME
"""How far from the origin a silhouette may reach in the conditioning view. One beside the middle is smaller for it: at
`MOST_BESIDE` it fills 0.64 of the frame."""
N_CENTERING_ROUNDS = 4
"""Turning the view towards the silhouette's middle moves that middle a little; four rounds settle it."""


@dataclass(frozen=True)
class Frame:
    """The object frame of one job."""

    camera: Camera
    """The reference camera in the object frame, float64, with the prepared picture's pixels."""
    to_world: Similarity
    """Object frame to the user's world."""
    condition: Camera
    """Square camera at the reference camera's place that looks straight at the origin; `HALF_FRAME` fits its half side."""
    has_camera: bool
    """Whether the world is the user's; without a camera file it is made up."""
    is_centered: bool
    """Whether the origin is the user's object center, and not a guess from the silhouette."""
    object_size: float | None
    """Longest side of the object's box in the object frame, if the user said something believable about it."""

    @property
    def elevation_rad(self) -> float:
        return float(orbit_angles(self.camera.positions)[1])

    @property
    def distance(self) -> float:
        return float(self.camera.positions.norm())

    @property
    def world_azimuth_rad(self) -> float | None:
        """Azimuth of the world's x axis; None without a camera file."""
        x, y, _ = self.to_world.inverse().rotation[:, 0].tolist()
        return math.atan2(y, x) if self.has_camera else None


def silhouette_bounds(camera: Camera, mask: np.ndarray, target: Tensor) -> tuple[Camera, Tensor, Tensor]:
    """The silhouette's box in the view that looks straight at `target`.

    Args:
        camera: Of the picture, float64.
        mask: (height, width) in [0, 1].
        target: World point (3,).

    Returns:
        The view, 2 x 2 pixels with tangents of -1 to 1, and the box's lower and upper ends (2,) in tangents.
    """
    rows, columns = np.nonzero(mask > 0.5)
    # The extreme pixels of each row and column are enough, and a large mask has millions of others.
    edges = np.concatenate([_extremes(rows, columns), _extremes(columns, rows)[:, ::-1]])
    uv = torch.from_numpy(np.concatenate([edges[:, ::-1], edges[:, ::-1] + 1]).astype(np.float64))
    view = centered_camera(camera, target, math.radians(90), 2)
    origins, directions = camera.rays(uv)
    tangents = view.project(origins + directions)[0] - 1
    return view, tangents.amin(0), tangents.amax(0)


def _extremes(lines: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """First and last position on every line that has any: (n, 2) of (line, position)."""
    first = np.full(lines.max() + 1, np.iinfo(np.int64).max)
    last = np.full(lines.max() + 1, -1)
    np.minimum.at(first, lines, positions)
    np.maximum.at(last, lines, positions)
    used = np.flatnonzero(last >= 0)
    return np.concatenate([np.stack([used, first[used]], 1), np.stack([used, last[used]], 1)])


def frame_object(mask: np.ndarray, setup: CameraSetup | None, config: PictureConfig) -> Frame:
    """Choose the object frame of a prepared picture.

    Args:
        mask: (height, width) in [0, 1] of the prepared picture.
        setup: The user's camera of the original picture, which may have been reduced since; None makes one up from the
            elevation and field of view of `config`.

    Raises:
        InputError: The camera's picture has another aspect, or the object would reach behind the camera.
    """
    height, width = mask.shape
    if setup is None:
        camera = default_camera(width, height, config.elevation_deg, config.fov_deg)
        center = torch.zeros(3, dtype=torch.float64)
    else:
        if abs(math.log(setup.camera.width / setup.camera.height * height / width)) > 0.02:
            raise InputError(
                f"the camera is for a {setup.camera.width} x {setup.camera.height} picture but the picture is "
                f"{width} x {height}: the shapes must match"
            )
        camera, center = setup.camera.resized(width, height), setup.object_center.to(torch.float64)
    view, low, high = silhouette_bounds(camera, mask, center)
    beside = float((low + high).abs().max() / 2 / (high - low).max())
    is_centered = setup is not None and beside <= MOST_BESIDE
    if not is_centered:
        if setup is not None:
            log.info("object_center is %.2f silhouettes beside the silhouette's middle: only its depth is used", beside)
        z_depth = camera.project(center[None])[1][0]
        for _ in range(N_CENTERING_ROUNDS):
            direction = view.rays((low + high)[None] / 2 + 1)[1][0]
            center = camera.positions + direction * z_depth / (direction @ camera.forward)
            view, low, high = silhouette_bounds(camera, mask, center)
    distance = float((center - camera.positions).norm())
    extent = float((high - low).max()) * distance
    reach = float(torch.maximum(low.abs(), high.abs()).max()) * distance
    scale = min(REFERENCE_EXTENT / extent, MOST_REACH / reach)
    if scale * distance < REFERENCE_EXTENT / 2 * 1.2:
        raise InputError("the object fills more than about 90 degrees of the camera's view; use a longer focal length")
    azimuth, _, _ = orbit_angles(camera.positions - center)
    cos, sin = float(azimuth.cos()), float(azimuth.sin())
    turn = torch.tensor([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], dtype=torch.float64)
    to_object = Similarity(scale, turn, -scale * turn @ center)
    reference = to_object.camera(camera)
    fov_rad = 2 * math.atan(HALF_FRAME / (scale * distance))
    condition = centered_camera(reference, torch.zeros(3, dtype=torch.float64), fov_rad, 256)
    size = None
    if setup is not None and setup.object_size is not None:
        if SIZE_RANGE[0] <= setup.object_size / extent <= SIZE_RANGE[1]:
            size = setup.object_size * scale
        else:
            log.info("object_size is %.2f times the silhouette: it is not used", setup.object_size / extent)
    return Frame(reference, to_object.inverse(), condition, setup is not None, is_centered, size)


def condition_picture(rgb: np.ndarray, mask: np.ndarray, frame: Frame) -> Tensor:
    """The object as the conditioning camera sees it: premultiplied RGBA (4, 256, 256) in [0, 1], float32."""
    rgba = torch.from_numpy(np.concatenate([rgb * mask[..., None], mask[..., None]], -1)).permute(2, 0, 1).float()
    uv = pixel_mapping(frame.condition, frame.camera)
    # A large picture is first reduced to about the size of the target, so that no pixel is skipped.
    spacing = float((uv[1:, :, 1] - uv[:-1, :, 1]).abs().median())
    factor = max(1, round(spacing))
    if factor > 1:
        rgba = torch.nn.functional.avg_pool2d(rgba[None], factor, ceil_mode=True, count_include_pad=False)[0]
        uv = uv / factor
        # The last cell may stand for fewer pixels; its part beyond the picture is nobody's.
    return resample(rgba, uv).clamp(0, 1)


def final_similarity(frame: Frame, vertices: np.ndarray) -> Similarity:
    """Object frame to the world the mesh is written in.

    With a camera file that is the user's world. Without one the object is centered at the origin with largest side 1, and
    the reference camera stays on its -Y side.
    """
    if frame.has_camera:
        return frame.to_world
    low, high = torch.from_numpy(vertices.min(0)).double(), torch.from_numpy(vertices.max(0)).double()
    scale = 1 / float((high - low).max())
    return Similarity(scale, torch.eye(3, dtype=torch.float64), -scale * (low + high) / 2)
