"""The texture: the photo where its camera sees the surface, the field's color elsewhere, and no seam between them.

Visibility is the mesh's own (a z-buffer from the photo's camera), so the photo lands where the mesh shows it. Beyond the
border the field's colors are shifted to meet the photo's and the shift fades with distance along the way, as in seamless
cloning; where both truly differ (a red front, a blue side) the edge is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter
from scipy.spatial import cKDTree
from torch import Tensor

from ..cameras import Camera
from ..config import MeshConfig
from .mesh import TexturedMesh
from .raster import rasterize, rasterize_projected
from .unwrap import UnwrappedMesh

Z_BUFFER = 1024
"""Pixels along the longer side of the visibility test."""
FACING_BAND = 0.2
"""Cosine range over which the photo fades in above `MeshConfig.facing_min`."""
N_SEAM_POINTS = 4000
N_NEIGHBORS = 8
SEAM_REACH = 0.06
"""Pairs of seen and unseen texels nearer than this, as a part of the mesh's size, meet at the seam."""
SEAM_FADE = 0.15
"""Distance over which the shift of the field's colors fades, as a part of the mesh's size."""
TRUE_EDGE = 0.3
"""A larger difference of colors is an edge of the object, not a seam."""
CHUNK = 1 << 19


@dataclass(frozen=True)
class Photo:
    """A picture that shows a part of the surface."""

    camera: Camera
    rgb: Float[np.ndarray, "height width 3"]
    """sRGB in [0, 1], continued past the mask."""
    mask: Float[np.ndarray, "height width"]


@dataclass(frozen=True)
class _Texels:
    """The texels that lie on the surface."""

    pixels: np.ndarray
    """(n,) flat numbers."""
    positions: np.ndarray
    normals: np.ndarray
    faces: np.ndarray
    barycentric: np.ndarray


def bake_texture(
    mesh: UnwrappedMesh, color: Callable[[Tensor], Tensor], photos: list[Photo], config: MeshConfig
) -> TexturedMesh:
    """Color an unwrapped mesh.

    Args:
        color: The field's sRGB color in [0, 1] at positions (n, 3).
        photos: Pictures with their cameras, in the mesh's world.
    """
    size = config.texture_size
    texels = _texels(mesh, size)
    points = torch.from_numpy(texels.positions)
    field = np.concatenate([color(chunk).numpy() for chunk in points.split(CHUNK)])
    colors, weight = _from_photos(mesh, texels, photos, config)
    if weight.max(initial=0) > 0:
        field = _meet_at_the_seam(mesh, texels, field, colors, weight)
    texture = np.zeros((size * size, 3), np.float32)
    texture[texels.pixels] = weight[:, None] * colors + (1 - weight[:, None]) * field
    covered = np.zeros(size * size, bool)
    covered[texels.pixels] = True
    texture = _padded(texture.reshape(size, size, 3), covered.reshape(size, size))
    texture = (texture.clip(0, 1) * 255).round().astype(np.uint8)
    return TexturedMesh(mesh.vertices, mesh.faces, mesh.uvs, mesh.normals, texture)


def _texels(mesh: UnwrappedMesh, size: int) -> _Texels:
    uv = np.stack([mesh.uvs[:, 0] * size, (1 - mesh.uvs[:, 1]) * size], 1).astype(np.float64)
    fragments = rasterize_projected(uv, np.ones(len(uv)), mesh.faces, size, size)
    pixels = np.flatnonzero(fragments.faces.ravel() >= 0)
    faces, weights = fragments.faces.ravel()[pixels], fragments.barycentric.reshape(-1, 3)[pixels]
    corners = mesh.faces[faces]
    positions = (mesh.vertices[corners] * weights[..., None]).sum(1)
    normals = (mesh.normals[corners] * weights[..., None]).sum(1)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    return _Texels(pixels, positions.astype(np.float32), normals.astype(np.float32), faces, weights)


def _from_photos(
    mesh: UnwrappedMesh, texels: _Texels, photos: list[Photo], config: MeshConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Colors of the photos together (n, 3) and how much they count (n,), 0 to 1."""
    total = np.zeros(len(texels.pixels), np.float32)
    colors = np.zeros((len(total), 3), np.float32)
    strongest = np.zeros_like(total)
    for photo in photos:
        weight, uv = _visibility(mesh, texels, photo, config)
        share = weight**4 + 1e-12 * (weight > 0)  # the photo that faces a texel best rules it
        colors += share[:, None] * _sample(photo.rgb, uv, _footprint(uv, texels, config))
        total += share
        strongest = np.maximum(strongest, weight)
    return colors / np.maximum(total, 1e-20)[:, None], strongest


def _visibility(
    mesh: UnwrappedMesh, texels: _Texels, photo: Photo, config: MeshConfig
) -> tuple[np.ndarray, np.ndarray]:
    """How well a photo sees each texel (n,), 0 to 1, and where it lies in the photo (n, 2), pixels."""
    camera = photo.camera.to("cpu", torch.float64)
    points = torch.from_numpy(texels.positions).double()
    uv, z_depths = (x.numpy() for x in camera.project(points))
    scale = Z_BUFFER / max(camera.width, camera.height)
    small = camera.resized(max(1, round(camera.width * scale)), max(1, round(camera.height * scale)))
    buffer = rasterize(mesh.vertices, mesh.faces, small).z_depths
    pixel = 1 / float(small.intrinsics[0])
    # The nearest and farthest surface around each pixel: at an occluder's rim they differ.
    filled = np.where(buffer > 0, buffer, np.inf)
    nearest = minimum_filter(filled, 3)
    farthest = maximum_filter(buffer, 3)
    column = np.clip((uv[:, 0] * scale).astype(np.int64), 0, small.width - 1)
    row = np.clip((uv[:, 1] * scale).astype(np.int64), 0, small.height - 1)
    toward = (camera.positions.numpy() - texels.positions).astype(np.float32)
    toward /= np.linalg.norm(toward, axis=1, keepdims=True)
    facing = (texels.normals * toward).sum(1)
    slope = 1 / np.clip(facing, 0.15, 1)
    is_seen = (z_depths <= farthest[row, column] + 1.5 * pixel * z_depths * slope) & (z_depths > 0)
    is_seen &= (uv >= 0).all(1) & (uv <= [camera.width, camera.height]).all(1)
    # Beside an occluder the photo may show the occluder: the far side keeps away from the jump by a ramp.
    with np.errstate(invalid="ignore"):
        is_far_side = (buffer > 0) & (buffer - nearest > 6 * pixel * buffer)
    band = max(1.0, config.band_px / 4 * Z_BUFFER / 512)
    clearance = distance_transform_edt(~is_far_side) if is_far_side.any() else np.full(buffer.shape, band)
    ramp = np.clip(clearance[row, column] / band, 0, 1)
    fade = np.clip((facing - config.facing_min) / FACING_BAND, 0, 1)
    weight = is_seen * ramp * fade * fade * (3 - 2 * fade)
    return weight.astype(np.float32), uv


def _footprint(uv: np.ndarray, texels: _Texels, config: MeshConfig) -> float:
    """Photo pixels a texel, the median: larger than 1 where the texture is coarser than the photo."""
    size = config.texture_size
    neighbor = np.flatnonzero((np.diff(texels.pixels) == 1) & (texels.faces[1:] == texels.faces[:-1]))
    if not len(neighbor) or size < 2:
        return 1.0
    return float(np.median(np.linalg.norm(uv[neighbor + 1] - uv[neighbor], axis=1)))


def _sample(rgb: np.ndarray, uv: np.ndarray, footprint: float) -> np.ndarray:
    """The photo at pixel coordinates, averaged over the footprint first so that fine detail does not alias."""
    table = torch.from_numpy(np.ascontiguousarray(rgb, np.float32)).permute(2, 0, 1)[None]
    height, width = rgb.shape[:2]
    factor = max(1, int(footprint))
    if factor > 1:
        shape = max(1, round(height / factor)), max(1, round(width / factor))
        table = F.interpolate(table, shape, mode="area")
    grid = torch.from_numpy((uv / [width, height] * 2 - 1).astype(np.float32))
    found = F.grid_sample(table, grid[None, None], mode="bilinear", padding_mode="border", align_corners=False)
    return found[0, :, 0].T.numpy()


def _meet_at_the_seam(
    mesh: UnwrappedMesh, texels: _Texels, field: np.ndarray, photo: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """The field's colors, shifted near the border of the photo's part so that both agree there."""
    extent = float(np.ptp(mesh.vertices, axis=0).max())
    rng = np.random.default_rng(0)
    seen, unseen = np.flatnonzero(weight > 0.5), np.flatnonzero(weight < 0.05)
    if not len(seen) or not len(unseen):
        return field
    sample_seen = rng.choice(seen, min(len(seen), 20 * N_SEAM_POINTS), replace=False)
    sample_unseen = rng.choice(unseen, min(len(unseen), 20 * N_SEAM_POINTS), replace=False)
    distance, index = cKDTree(texels.positions[sample_seen]).query(
        texels.positions[sample_unseen], distance_upper_bound=SEAM_REACH * extent
    )
    # Only the nearest of them: a seam is a line, not an area.
    meets = np.isfinite(distance)
    if meets.sum() < N_NEIGHBORS:
        return field
    order = np.argsort(distance[meets])[:N_SEAM_POINTS]
    unseen_side, seen_side = sample_unseen[meets][order], sample_seen[index[meets][order]]
    shift = photo[seen_side] - field[unseen_side]
    shift = shift * (np.abs(shift).max(1, keepdims=True) < TRUE_EDGE)
    # Shifts are smooth, so they are found at the vertices and interpolated.
    near, found = cKDTree(texels.positions[unseen_side]).query(mesh.vertices, k=min(N_NEIGHBORS, len(shift)))
    near, found = near.reshape(len(mesh.vertices), -1), found.reshape(len(mesh.vertices), -1)
    parts = 1 / (near**2 + (0.01 * extent) ** 2)
    blended = (shift[found] * parts[..., None]).sum(1) / parts.sum(1, keepdims=True)
    blended *= np.exp(-near[:, :1] / (SEAM_FADE * extent))
    moved = (blended[mesh.faces[texels.faces]] * texels.barycentric[..., None]).sum(1)
    return field + moved.astype(np.float32)


def _padded(texture: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Every texel outside the charts takes the nearest chart's color: no seam at any mip level."""
    if covered.all() or not covered.any():
        return texture
    rows, columns = distance_transform_edt(~covered, return_distances=False, return_indices=True)
    return texture[rows, columns]
