"""A z-buffer rasterizer in numpy: no window, no driver, no compiled code of ours.

Candidate pixels of many triangles are laid out in one long list (each triangle's bounding box, row by row), tested at once,
and written back to front; so there is no loop over triangles or pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from ..cameras import Camera
from .mesh import TexturedMesh

NEAR = 1e-4
"""Triangles with a corner nearer than this (or behind the camera) are left out, not clipped."""
EDGE = 1e-5
"""Tolerance of the inside test, so that neighbouring triangles leave no crack."""
MAX_CANDIDATES = 4_000_000
"""Pixels tested at once: bounds the memory to about 0.5 GB."""


@dataclass(frozen=True)
class Fragments:
    """The nearest triangle of each pixel."""

    faces: Int[np.ndarray, "height width"]
    """int32; -1 where nothing is."""
    barycentric: Float[np.ndarray, "height width 3"]
    """Perspective-correct weights of the triangle's corners; 0 where nothing is."""
    z_depths: Float[np.ndarray, "height width"]
    """Along the optical axis, world units; 0 where nothing is."""

    def interpolate(self, faces: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Values of vertices (n_vertices, c) at the pixels: (height, width, c), 0 where nothing is."""
        found = self.faces >= 0
        result = np.zeros((*self.faces.shape, values.shape[1]), np.float32)
        corners = values[faces[self.faces[found]]]
        result[found] = (corners * self.barycentric[found][..., None]).sum(1)
        return result


def rasterize(vertices: np.ndarray, faces: np.ndarray, camera: Camera) -> Fragments:
    """Draw triangles, both sides, as a camera sees them.

    Args:
        vertices: (n_vertices, 3), the camera's world.
        faces: (n_faces, 3).
    """
    uv, z = camera.to("cpu", torch.float64).project(torch.from_numpy(np.asarray(vertices, np.float64)))
    return rasterize_projected(uv.numpy(), z.numpy(), faces, camera.width, camera.height)


def rasterize_projected(uv: np.ndarray, z_depths: np.ndarray, faces: np.ndarray, width: int, height: int) -> Fragments:
    """Draw triangles from pixel coordinates (n_vertices, 2) and z-depths (n_vertices,) of their corners."""
    face_ids = np.full(height * width, -1, np.int32)
    weights = np.zeros((height * width, 3), np.float32)
    buffer = np.full(height * width, np.inf, np.float32)
    boxes = _boxes(uv, z_depths, faces, width, height)
    inverse_z = (1 / np.where(z_depths > NEAR, z_depths, np.inf)).astype(np.float32)
    for owner, column, row in _candidates(boxes):
        planar = boxes.planar[:, owner, 0] + column * boxes.planar[:, owner, 1] + row * boxes.planar[:, owner, 2]
        inside = (planar[0] >= -EDGE) & (planar[1] >= -EDGE) & (planar[0] + planar[1] <= 1 + EDGE)
        owner, column, row, planar = owner[inside], column[inside], row[inside], planar[:, inside]
        pixels = (boxes.low[owner, 1] + row) * width + boxes.low[owner, 0] + column
        face = boxes.faces[owner]
        second, third = planar * inverse_z[faces[face, 1:].T]
        first = (1 - planar[0] - planar[1]) * inverse_z[faces[face, 0]]
        depth = 1 / (first + second + third)
        nearer = np.flatnonzero(depth < buffer[pixels])
        # Of equal indices the last assignment stays, so the nearest comes last.
        order = nearer[np.argsort(-depth[nearer], kind="stable")]
        target = pixels[order]
        buffer[target] = depth[order]
        face_ids[target] = face[order]
        weights[target] = np.stack([first[order], second[order], third[order]], 1) * depth[order, None]
    z_buffer = np.where(np.isfinite(buffer), buffer, 0).reshape(height, width)
    return Fragments(face_ids.reshape(height, width), weights.reshape(height, width, 3), z_buffer)


@dataclass(frozen=True)
class _Boxes:
    """Triangles that may cover a pixel, with the box of pixel centers around each."""

    faces: np.ndarray
    """(n,) triangle numbers."""
    low: np.ndarray
    """(n, 2) first column and row."""
    size: np.ndarray
    """(n, 2) columns and rows."""
    planar: np.ndarray
    """(2, n, 3) float32: second and third corner's weight at the box's first center, and its change by column and row."""


def _boxes(uv: np.ndarray, z_depths: np.ndarray, faces: np.ndarray, width: int, height: int) -> _Boxes:
    visible = np.flatnonzero((z_depths > NEAR)[faces].all(1))
    corners = uv[faces[visible]]
    limits = np.array([width, height]) - 1
    low = np.clip(np.ceil(corners.min(1) - 0.5), 0, limits + 1).astype(np.int64)
    high = np.clip(np.floor(corners.max(1) - 0.5), -1, limits).astype(np.int64)
    size = np.maximum(high - low + 1, 0)
    first, to_second, to_third = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = to_second[:, 0] * to_third[:, 1] - to_third[:, 0] * to_second[:, 1]
    used = (size > 0).all(1) & (np.abs(area) > 1e-12)
    visible, low, size, first, area = visible[used], low[used], size[used], first[used], area[used, None]
    second = np.stack([to_third[used, 1], -to_third[used, 0]], 1) / area
    third = np.stack([-to_second[used, 1], to_second[used, 0]], 1) / area
    start = low + 0.5 - first
    planar = [np.concatenate([(start * slope).sum(1, keepdims=True), slope], 1) for slope in (second, third)]
    return _Boxes(visible, low, size, np.stack(planar).astype(np.float32))


def _candidates(boxes: _Boxes) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All pixels of all boxes, in pieces: which box, and the column and row inside it."""
    counts = boxes.size[:, 0] * boxes.size[:, 1]
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + MAX_CANDIDATES, side="right")))
        owner = np.repeat(np.arange(first, last, dtype=np.int32), counts[first:last])
        local = (
            np.arange(len(owner)) - np.repeat(ends[first:last] - counts[first:last] - done, counts[first:last])
        ).astype(np.int32)
        row, column = np.divmod(local, boxes.size[:, 0].astype(np.int32)[owner])
        yield owner, column, row
        first = last


def sample_texture(texture: np.ndarray, uvs: np.ndarray) -> np.ndarray:
    """Bilinear look-up: texture (height, width, c) with row 0 on top, uvs (n, 2) with v upward; float32 (n, c)."""
    height, width = texture.shape[:2]
    x = np.clip(uvs[:, 0] * width - 0.5, 0, width - 1)
    y = np.clip((1 - uvs[:, 1]) * height - 0.5, 0, height - 1)
    x0, y0 = np.minimum(x.astype(np.int64), max(width - 2, 0)), np.minimum(y.astype(np.int64), max(height - 2, 0))
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    fx, fy = (x - x0)[:, None].astype(np.float32), (y - y0)[:, None].astype(np.float32)
    top = texture[y0, x0] * (1 - fx) + texture[y0, x1] * fx
    bottom = texture[y1, x0] * (1 - fx) + texture[y1, x1] * fx
    return (top * (1 - fy) + bottom * fy).astype(np.float32)


def render_with_depth(mesh: TexturedMesh, camera: Camera, supersample: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """The unlit textured mesh.

    Args:
        supersample: Samples a pixel along each side.

    Returns:
        RGBA (height, width, 4) float32, sRGB, straight alpha; and z-depths (height, width) of the nearest surface in each
        pixel, 0 where nothing is.
    """
    width, height = camera.width, camera.height
    fragments = rasterize(mesh.vertices, mesh.faces, camera.resized(width * supersample, height * supersample))
    found = fragments.faces >= 0
    uvs = fragments.interpolate(mesh.faces, mesh.uvs)[found]
    samples = np.zeros((*found.shape, 4), np.float32)
    samples[found, :3] = sample_texture(mesh.texture, uvs) / 255
    samples[found, 3] = 1
    blocks = samples.reshape(height, supersample, width, supersample, 4).mean((1, 3))
    rgba = np.concatenate([blocks[..., :3] / np.maximum(blocks[..., 3:], 1e-6), blocks[..., 3:]], -1)
    depth = np.where(found, fragments.z_depths, np.inf).reshape(height, supersample, width, supersample).min((1, 3))
    return rgba, np.where(np.isfinite(depth), depth, 0).astype(np.float32)


def render_mesh(mesh: TexturedMesh, camera: Camera, supersample: int = 2) -> np.ndarray:
    """RGBA (height, width, 4) of the unlit textured mesh; see `render_with_depth`."""
    return render_with_depth(mesh, camera, supersample)[0]
