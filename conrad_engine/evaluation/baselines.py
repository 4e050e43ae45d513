"""Objects that need no prior, as the floor of every table: each from one picture, its mask and its camera.

All three carry the picture itself as their texture, projected along the camera's rays, so their reference view is as good
as the mesh's outline; the back shows the picture a second time. Their middle lies at the camera's `object_center` depth.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from ..cameras import Camera, CameraSetup
from ..errors import InputError
from ..mesh.mesh import TexturedMesh, vertex_normals

N_CELLS = 192
"""Cells along the picture's longer side of the relief and the billboard."""
RIM_PX = 0.5
"""Half thickness at the outline, pixels at the object's depth: enough to be a closed body."""


def inflated_relief(picture: np.ndarray, setup: CameraSetup) -> TexturedMesh:
    """The silhouette blown up like a cushion: a disk becomes a ball, a bar a cylinder.

    The half thickness at distance d from the outline is √(d (2 r - d)), with r the largest such distance.

    Args:
        picture: (H, W, 4), straight alpha.
        setup: The picture's camera.

    Raises:
        InputError: The mask is empty.
    """
    inside = _mask(picture)
    depths_px = distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    radius = depths_px.max()
    return _solid(picture, setup, lambda distance_px: np.sqrt(distance_px * (2 * radius - distance_px)))


def textured_billboard(picture: np.ndarray, setup: CameraSetup) -> TexturedMesh:
    """A cardboard cut-out facing the camera, printed on both sides; see `inflated_relief` for arguments and errors."""
    return _solid(picture, setup, np.zeros_like)


def ellipsoid(picture: np.ndarray, setup: CameraSetup, n_around: int = 64, n_along: int = 32) -> TexturedMesh:
    """An ellipsoid with the silhouette's width and height and the width as its depth; see `inflated_relief`."""
    inside = _mask(picture)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    uv_middle = np.array([columns[0] + columns[-1] + 1, rows[0] + rows[-1] + 1]) / 2
    half_px = np.array([columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]) / 2
    camera, z_depth = _camera_for(picture, setup), _center_depth(setup)
    unit = z_depth / camera.intrinsics[:2].numpy()
    axes = np.array([half_px[0] * unit[0], half_px[1] * unit[1], half_px[0] * unit[0]])
    around = np.arange(n_around) * (2 * np.pi / n_around)
    along = (np.arange(1, n_along) / n_along - 0.5) * np.pi
    ring = np.stack([np.cos(around), np.zeros(n_around), np.sin(around)], 1)
    rings = np.cos(along)[:, None, None] * ring + np.sin(along)[:, None, None] * np.array([0.0, 1.0, 0.0])
    local = np.concatenate([[[0.0, -1.0, 0.0]], rings.reshape(-1, 3), [[0.0, 1.0, 0.0]]]) * axes
    middle = camera.unproject(torch.from_numpy(uv_middle[None]), torch.tensor([z_depth], dtype=torch.float64))
    vertices = local @ camera.c2w[:, :3].numpy().T + middle.numpy()
    return _textured(vertices, _ring_faces(n_around, n_along - 1), picture, setup)


def _ring_faces(n_around: int, n_rings: int) -> np.ndarray:
    """Triangles of a closed stack of rings: vertex 0, the rings from bottom to top, the last vertex."""
    ring = np.arange(n_around)
    following = (ring + 1) % n_around
    last = 1 + n_rings * n_around
    faces = [np.stack([np.zeros_like(ring), 1 + ring, 1 + following], 1)]
    for k in range(n_rings - 1):
        low, high = 1 + k * n_around, 1 + (k + 1) * n_around
        faces.append(np.stack([low + ring, high + ring, low + following], 1))
        faces.append(np.stack([low + following, high + ring, high + following], 1))
    top = 1 + (n_rings - 1) * n_around
    faces.append(np.stack([top + ring, np.full_like(ring, last), top + following], 1))
    return np.concatenate(faces)


def _mask(picture: np.ndarray) -> np.ndarray:
    inside = picture[..., 3] > 0.5
    if not inside.any():
        raise InputError("the picture's mask is empty: a baseline needs a silhouette")
    return inside


def _camera_for(picture: np.ndarray, setup: CameraSetup) -> Camera:
    height, width = picture.shape[:2]
    return setup.camera.to(dtype=torch.float64).resized(width, height)


def _center_depth(setup: CameraSetup) -> float:
    return float(setup.camera.project(setup.object_center[None])[1][0])


def _solid(picture: np.ndarray, setup: CameraSetup, half_px: Callable[[np.ndarray], np.ndarray]) -> TexturedMesh:
    """A closed body over the silhouette, symmetrical about the plane of the object's center.

    Args:
        half_px: Half thickness in pixels at the object's depth, of the distance from the outline in pixels.
    """
    cells, step = _cells(_mask(picture))
    n_rows, n_columns = cells.shape
    padded = np.pad(cells, 1)
    around = [padded[i : i + n_rows + 1, j : j + n_columns + 1] for i in (0, 1) for j in (0, 1)]
    # A node all of whose cells belong to the body lies inside, others on the rim.
    distance_px = distance_transform_edt(np.pad(np.logical_and.reduce(around), 1))[1:-1, 1:-1] * step
    half = np.maximum(half_px(distance_px), RIM_PX)
    camera, z_center = _camera_for(picture, setup), _center_depth(setup)
    v, u = np.meshgrid(np.arange(n_rows + 1) * step, np.arange(n_columns + 1) * step, indexing="ij")
    uv = torch.from_numpy(np.stack([u, v], -1).reshape(-1, 2))
    offset = torch.from_numpy(half.reshape(-1)) * (z_center / float(camera.intrinsics[0]))
    front, back = (camera.unproject(uv, z_center + sign * offset).numpy() for sign in (-1, 1))
    faces = _sheet_faces(cells)
    n = len(front)
    # The wall between front and back stands on the edges that only one triangle has.
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    is_rim = ~np.isin(edges[:, 0] * n + edges[:, 1], edges[:, 1] * n + edges[:, 0])
    a, b = edges[is_rim].T
    wall = np.concatenate([np.stack([a, a + n, b], 1), np.stack([b, a + n, b + n], 1)])
    used, renumbered = np.unique(np.concatenate([faces, faces[:, ::-1] + n, wall]), return_inverse=True)
    return _textured(np.concatenate([front, back])[used], renumbered.reshape(-1, 3), picture, setup)


def _cells(inside: np.ndarray) -> tuple[np.ndarray, float]:
    """The mask on a coarser grid, and the grid's step in pixels; at least one cell is left."""
    height, width = inside.shape
    step = max(max(height, width) / N_CELLS, 1.0)
    shape = int(np.ceil(height / step)), int(np.ceil(width / step))
    rows, columns = (np.minimum(((np.arange(n) + 0.5) * step).astype(int), m - 1) for n, m in zip(shape, inside.shape))
    cells = inside[rows[:, None], columns[None]]
    if not cells.any():
        row, column = np.argwhere(inside)[0]
        cells[int(row / step), int(column / step)] = True
    return cells, step


def _sheet_faces(cells: np.ndarray) -> np.ndarray:
    """Two triangles a cell, counterclockwise as the camera sees them, between the nodes of the grid."""
    i, j = np.nonzero(cells)
    pitch = cells.shape[1] + 1
    a, b, c, d = i * pitch + j, i * pitch + j + 1, (i + 1) * pitch + j, (i + 1) * pitch + j + 1
    return np.concatenate([np.stack([a, c, b], 1), np.stack([b, c, d], 1)])


def _textured(vertices: np.ndarray, faces: np.ndarray, picture: np.ndarray, setup: CameraSetup) -> TexturedMesh:
    """The mesh with the picture projected on it along the camera's rays; colors grow beyond the outline."""
    height, width = picture.shape[:2]
    uv = _camera_for(picture, setup).project(torch.from_numpy(vertices))[0].numpy()
    rows, columns = distance_transform_edt(picture[..., 3] <= 0.5, return_distances=False, return_indices=True)
    texture = np.round(np.clip(picture[rows, columns, :3], 0, 1) * 255).astype(np.uint8)
    # Texture coordinates have v upward, pixels count downward.
    uvs = np.clip(np.stack([uv[:, 0] / width, 1 - uv[:, 1] / height], 1), 0, 1).astype(np.float32)
    vertices, faces = vertices.astype(np.float32), faces.astype(np.int32)
    return TexturedMesh(vertices, faces, uvs, vertex_normals(vertices, faces), texture)


BASELINES: dict[str, Callable[[np.ndarray, CameraSetup], TexturedMesh]] = {
    "relief": inflated_relief,
    "ellipsoid": ellipsoid,
    "billboard": textured_billboard,
}
