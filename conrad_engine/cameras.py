"""Cameras: the one home of every convention.

World: right-handed, +Z up. Camera: OpenGL/Blender axes, +X right, +Y up, looking along -Z. Pixels: u to the right, v
downward, row 0 on top, pixel centers at +0.5. Intrinsics (fx, fy, cx, cy) are in pixels; the principal point may lie
anywhere. `z_depths` run along the optical axis and are positive in front of the camera; `distances` run along a ray.
Orbit: azimuth 0 stands on -Y and looks towards +Y, positive counterclockwise seen from above (90 degrees stands on +X);
elevation 0 is level, positive is above.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True)
class Camera:
    """One pinhole camera, or a batch of them with the same picture size."""

    c2w: Float[Tensor, "*batch 3 4"]
    """Camera-to-world: columns right, up, backward, position."""
    intrinsics: Float[Tensor, "*batch 4"]
    """fx, fy, cx, cy in pixels."""
    width: int
    height: int

    @property
    def positions(self) -> Float[Tensor, "*batch 3"]:
        return self.c2w[..., 3]

    @property
    def forward(self) -> Float[Tensor, "*batch 3"]:
        """Unit vectors along the optical axis."""
        return -self.c2w[..., 2]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Camera:
        return replace(self, c2w=self.c2w.to(device, dtype), intrinsics=self.intrinsics.to(device, dtype))

    def __len__(self) -> int:
        """Number of cameras of a batch with one batch dimension."""
        return self.c2w.shape[0]

    def __getitem__(self, index: Any) -> Camera:
        return replace(self, c2w=self.c2w[index], intrinsics=self.intrinsics[index])

    def resized(self, width: int, height: int) -> Camera:
        """The same view with another number of pixels."""
        scale = torch.tensor([width / self.width, height / self.height] * 2).to(self.intrinsics)
        return replace(self, intrinsics=self.intrinsics * scale, width=width, height=height)

    def cropped(self, left: float, top: float, width: int, height: int) -> Camera:
        """The view through a window of the picture whose corner is (left, top); the window may reach beyond it."""
        shift = torch.tensor([0.0, 0.0, -left, -top]).to(self.intrinsics)
        return replace(self, intrinsics=self.intrinsics + shift, width=width, height=height)

    def pixel_centers(self) -> Float[Tensor, "height width 2"]:
        v, u = torch.meshgrid(
            torch.arange(self.height, device=self.c2w.device, dtype=self.c2w.dtype) + 0.5,
            torch.arange(self.width, device=self.c2w.device, dtype=self.c2w.dtype) + 0.5,
            indexing="ij",
        )
        return torch.stack([u, v], -1)

    def rays(self, uv: Float[Tensor, "*batch n 2"] | None = None) -> tuple[Tensor, Tensor]:
        """World-space rays through pixels.

        Args:
            uv: Pixel coordinates; all pixel centers, row by row, when None.

        Returns:
            Origins and unit directions (*batch, n, 3).
        """
        if uv is None:
            uv = self.pixel_centers().reshape(-1, 2)
        fx, fy, cx, cy = (value[..., None] for value in self.intrinsics.unbind(-1))
        x, y = (uv[..., 0] - cx) / fx, (cy - uv[..., 1]) / fy
        right, up, backward, position = (axis[..., None, :] for axis in self.c2w.unbind(-1))
        directions = F.normalize(x[..., None] * right + y[..., None] * up - backward, dim=-1)
        return position.expand_as(directions), directions

    def project(self, points: Float[Tensor, "*batch n 3"]) -> tuple[Tensor, Tensor]:
        """Pixel coordinates (*batch, n, 2) and z-depths (*batch, n) of world points.

        Points behind the camera get a negative z-depth and mirrored coordinates: check the depth.
        """
        local = (points - self.positions[..., None, :]) @ self.c2w[..., :3]
        z_depths = -local[..., 2]
        safe = torch.where(z_depths.abs() < 1e-9, torch.full_like(z_depths, 1e-9), z_depths)
        fx, fy, cx, cy = (value[..., None] for value in self.intrinsics.unbind(-1))
        return torch.stack([cx + fx * local[..., 0] / safe, cy - fy * local[..., 1] / safe], -1), z_depths

    def unproject(self, uv: Float[Tensor, "*batch n 2"], z_depths: Float[Tensor, "*batch n"]) -> Tensor:
        """World points (*batch, n, 3): the inverse of `project`."""
        fx, fy, cx, cy = (value[..., None] for value in self.intrinsics.unbind(-1))
        local = torch.stack([(uv[..., 0] - cx) / fx, (cy - uv[..., 1]) / fy, -torch.ones_like(z_depths)], -1)
        return (local * z_depths[..., None]) @ self.c2w[..., :3].transpose(-1, -2) + self.positions[..., None, :]

    def distances(self, points: Float[Tensor, "*batch n 3"]) -> Float[Tensor, "*batch n"]:
        """Distances from the camera along the ray through each point."""
        return (points - self.positions[..., None, :]).norm(dim=-1)


def stack_cameras(cameras: list[Camera]) -> Camera:
    """One batch of single cameras of equal picture size."""
    first = cameras[0]
    if any((c.width, c.height) != (first.width, first.height) for c in cameras):
        raise ValueError("cameras of one batch must have the same picture size")
    return replace(
        first, c2w=torch.stack([c.c2w for c in cameras]), intrinsics=torch.stack([c.intrinsics for c in cameras])
    )


def look_at(position: Float[Tensor, "*batch 3"], target: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 4"]:
    """Camera-to-world matrices without roll. Straight up or down, the picture's up is world +Y."""
    backward = F.normalize(position - target, dim=-1)
    z_axis = torch.zeros_like(backward)
    z_axis[..., 2] = 1
    right = torch.linalg.cross(z_axis, backward)
    x_axis = torch.zeros_like(backward)
    x_axis[..., 0] = 1
    right = F.normalize(torch.where(right.norm(dim=-1, keepdim=True) > 1e-6, right, x_axis), dim=-1)
    return torch.stack([right, torch.linalg.cross(backward, right), backward, position], -1)


def square_intrinsics(fov_rad: Float[Tensor, "*batch"], size: int) -> Float[Tensor, "*batch 4"]:
    """Intrinsics of square pictures, centered, from the full angle of view."""
    focal = size / 2 / torch.tan(fov_rad / 2)
    center = torch.full_like(focal, size / 2)
    return torch.stack([focal, focal, center, center], -1)


def orbit_positions(azimuth_rad: Tensor, elevation_rad: Tensor, distance: Tensor) -> Float[Tensor, "*batch 3"]:
    level = torch.cos(elevation_rad)
    unit = torch.stack([level * azimuth_rad.sin(), -level * azimuth_rad.cos(), elevation_rad.sin()], -1)
    return unit * distance[..., None]


def orbit_camera(
    azimuth_rad: Tensor | float,
    elevation_rad: Tensor | float,
    distance: Tensor | float,
    fov_rad: Tensor | float,
    size: int,
) -> Camera:
    """Square cameras on an orbit around the origin, looking at it.

    Args:
        azimuth_rad, elevation_rad: See the module's docstring; elevation within ±90 degrees.
        distance: From the origin, world units.
        fov_rad: Full angle of view.
        size: Pixels a side.
    """
    azimuth_rad, elevation_rad, distance, fov_rad = torch.broadcast_tensors(
        *(torch.as_tensor(value, dtype=torch.float32) for value in (azimuth_rad, elevation_rad, distance, fov_rad))
    )
    backward = orbit_positions(azimuth_rad, elevation_rad, torch.ones_like(distance))
    right = torch.stack([azimuth_rad.cos(), azimuth_rad.sin(), torch.zeros_like(azimuth_rad)], -1)
    c2w = torch.stack([right, torch.linalg.cross(backward, right), backward, backward * distance[..., None]], -1)
    return Camera(c2w, square_intrinsics(fov_rad, size), size, size)


def orbit_angles(positions: Float[Tensor, "*batch 3"]) -> tuple[Tensor, Tensor, Tensor]:
    """Azimuths, elevations (radians) and distances of positions around the origin: the inverse of `orbit_positions`."""
    distance = positions.norm(dim=-1)
    elevation = torch.asin((positions[..., 2] / distance.clamp(min=1e-9)).clamp(-1, 1))
    return torch.atan2(positions[..., 0], -positions[..., 1]), elevation, distance


def centered_camera(camera: Camera, target: Float[Tensor, "3"], fov_rad: float, size: int) -> Camera:
    """The square camera at the same place that looks straight at `target`, without roll."""
    c2w = look_at(camera.positions, target.to(camera.c2w))
    return Camera(c2w, square_intrinsics(torch.tensor(fov_rad).to(c2w), size), size, size)


def pixel_mapping(target: Camera, source: Camera) -> Float[Tensor, "height width 2"]:
    """Where the pixels of one camera lie in the picture of another camera at the same place (a homography)."""
    origins, directions = target.rays()
    uv, z_depths = source.project(origins + directions)
    # A direction behind the source picture has no pixel there.
    uv = torch.where(z_depths[..., None] > 1e-6, uv, torch.full_like(uv, -1e6))
    return uv.reshape(target.height, target.width, 2)


def resample(
    picture: Float[Tensor, "channels height width"], uv: Float[Tensor, "h w 2"], mode: str = "bilinear"
) -> Float[Tensor, "channels h w"]:
    """The picture's values at pixel coordinates; zero outside of it."""
    height, width = picture.shape[1:]
    grid = uv / torch.tensor([width, height]).to(uv) * 2 - 1
    return F.grid_sample(picture[None], grid[None].to(picture), mode=mode, align_corners=False)[0]


@dataclass(frozen=True)
class Similarity:
    """points -> scale * rotation @ points + translation."""

    scale: float
    rotation: Float[Tensor, "3 3"]
    translation: Float[Tensor, "3"]

    def points(self, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
        return self.scale * points @ self.rotation.to(points).T + self.translation.to(points)

    def camera(self, camera: Camera) -> Camera:
        """The camera that sees the transformed points where `camera` sees the original ones."""
        rotation = self.rotation.to(camera.c2w)
        axes = rotation @ camera.c2w[..., :3]
        return replace(camera, c2w=torch.cat([axes, self.points(camera.positions)[..., None]], -1))

    def inverse(self) -> Similarity:
        back = self.rotation.T
        return Similarity(1 / self.scale, back, -(back @ self.translation) / self.scale)

    def then(self, other: Similarity) -> Similarity:
        """This one first, the other after it."""
        return Similarity(
            self.scale * other.scale,
            other.rotation @ self.rotation,
            other.scale * other.rotation @ self.translation + other.translation,
        )

    @staticmethod
    def identity() -> Similarity:
        return Similarity(1.0, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))


@dataclass(frozen=True)
class CameraSetup:
    """A reference camera in the user's world, with what is known of the object there."""

    camera: Camera
    """Of the original picture, float64."""
    object_center: Float[Tensor, "3"]
    """Middle of the object's upright box. Where it appears beside the middle of the silhouette says how the object stands; a
    center far beside it gives its depth alone (`preprocess.framing`)."""
    object_size: float | None = None
    """Rough largest side of the object, world units; None when unknown."""

    @staticmethod
    def from_json(data: dict | str | Path) -> CameraSetup:
        """Read a camera file or its parsed content.

        Raises:
            InputError: The file cannot be read, or a field is missing, misshapen or not finite.
        """
        if not isinstance(data, dict):
            try:
                data = json.loads(Path(data).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(f"camera file {data} cannot be read as JSON: {error}") from None
        try:
            c2w = np.asarray(data["c2w"], np.float64).reshape(-1, 4)[:3]
            intrinsics = np.asarray(data["intrinsics"], np.float64).reshape(4)
            center = np.asarray(data.get("object_center", [0.0, 0.0, 0.0]), np.float64).reshape(3)
            width, height = int(data["width"]), int(data["height"])
            size = None if data.get("object_size") is None else float(data["object_size"])
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                "the camera needs c2w (4x4, row-major), intrinsics [fx, fy, cx, cy], width and height, "
                f"and may have object_center [x, y, z] and object_size; problem: {error!r}"
            ) from None
        numbers = np.concatenate([c2w.ravel(), intrinsics, center, [0.0 if size is None else size]])
        if c2w.shape != (3, 4) or not np.isfinite(numbers).all():
            raise InputError("the camera has a number that is not finite, or c2w is not a 4x4 matrix")
        axes = c2w[:, :3]
        if not np.allclose(axes.T @ axes, np.eye(3), atol=1e-3) or np.linalg.det(axes) < 0:
            raise InputError("the camera's c2w must be a rotation and a position, without scale or mirroring")
        if width < 1 or height < 1 or intrinsics[0] <= 0 or intrinsics[1] <= 0 or (size is not None and size <= 0):
            raise InputError("the camera's width, height, focal lengths and object_size must be positive")
        camera = Camera(torch.from_numpy(c2w), torch.from_numpy(intrinsics), width, height)
        setup = CameraSetup(camera, torch.from_numpy(center), size)
        if float(camera.project(setup.object_center[None])[1]) <= 0:
            raise InputError("object_center lies behind the camera; the camera looks along its -Z axis")
        return setup

    def to_json(self) -> dict:
        return {
            "c2w": [*self.camera.c2w.tolist(), [0.0, 0.0, 0.0, 1.0]],
            "intrinsics": self.camera.intrinsics.tolist(),
            "width": self.camera.width,
            "height": self.camera.height,
            "object_center": self.object_center.tolist(),
            "object_size": self.object_size,
        }


def default_camera(width: int, height: int, elevation_deg: float, fov_deg: float) -> Camera:
    """The reference camera when none is given: on -Y, looking at the origin from distance 1.

    `fov_deg` is the full angle of the picture's larger side, as a Blender camera's; `PreparedImage` moves the camera so
    that the object has its size.
    """
    focal = max(width, height) / 2 / math.tan(math.radians(fov_deg) / 2)
    position = orbit_positions(*(torch.tensor(x, dtype=torch.float64) for x in (0.0, math.radians(elevation_deg), 1.0)))
    c2w = look_at(position, torch.zeros(3, dtype=torch.float64))
    intrinsics = torch.tensor([focal, focal, width / 2, height / 2], dtype=torch.float64)
    return Camera(c2w, intrinsics, width, height)
