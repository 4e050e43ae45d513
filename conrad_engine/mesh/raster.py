"""A z-buffer rasterizer in numpy: no window, no driver, no compiled code of ours.

Candidate pixels of many triangles are laid out in one long list (each triangle's bounding box, row by row) and tested at once;
of those inside, the nearest wins its pixel. So there is no loop over triangles or pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from ..cameras import Camera
from .mesh import TexturedMesh

NEAR = 1e-4
"""Triangles with a corner nearer than this (or behind the camera) are left out, not clipped."""
EDGE = 1e-5
"""Tolerance of the inside test, so that neighbouring triangles leave no crack."""
MAX_CANDIDATES = 1 << 17
"""Pixels tested at once: their arrays stay in the processor's cache."""

LIGHT, AMBIENT, GRAY = (-0.5, 0.6, 0.62), 0.2, 0.85
"""Of surfaces without texture: direction to the lamp in the camera's axes (right, up, backward), the part of the light that
comes from all around, and how bright full light is."""


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
        corners, weights = faces[self.faces[found]], self.barycentric[found]
        result[found] = sum(weights[:, k, None] * values[corners[:, k]] for k in range(3))
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
    boxes = _boxes(uv, z_depths, faces, width, height)
    first_pixels = boxes.top * width + boxes.left
    buffer = np.full(height * width, np.inf)
    owners = np.full(height * width, -1)
    for owner, column, row, planar in _covered(boxes):
        depth = 1 / boxes.inverse_z(owner, *planar).sum(0)
        pixels = first_pixels[owner] + row * width + column
        np.minimum.at(buffer, pixels, depth)
        # Of equally near triangles the last assignment stays.
        nearest = np.flatnonzero(depth == buffer[pixels])
        owners[pixels[nearest]] = owner[nearest]
    found = np.flatnonzero(owners >= 0)
    owner = owners[found]
    row, column = np.divmod(found, width)
    column, row = (column - boxes.left[owner]).astype(np.int32), (row - boxes.top[owner]).astype(np.int32)
    planar = (p[0, owner] + column * p[1, owner] + row * p[2, owner] for p in boxes.planar)
    face_ids = np.full(height * width, -1, np.int32)
    weights = np.zeros((height * width, 3), np.float32)
    face_ids[found] = boxes.faces[owner]
    weights[found] = (boxes.inverse_z(owner, *planar) * buffer[found]).T
    z_buffer = np.where(owners >= 0, buffer, 0).astype(np.float32).reshape(height, width)
    return Fragments(face_ids.reshape(height, width), weights.reshape(height, width, 3), z_buffer)


@dataclass(frozen=True)
class _Boxes:
    """Triangles that may cover a pixel, with the box of pixel centers around each. Arrays of columns: numpy is several times
    faster along whole columns than along short rows."""

    faces: np.ndarray
    """(n,) triangle numbers."""
    left: np.ndarray
    top: np.ndarray
    """(n,) first column and row."""
    width: np.ndarray
    height: np.ndarray
    """(n,) columns and rows."""
    planar: np.ndarray
    """(2, 3, n) float32: second and third corner's weight at the box's first center, and its change by column and row."""
    corner_inverse_z: np.ndarray
    """(3, n) float32."""

    def inverse_z(self, owner: np.ndarray, second: np.ndarray, third: np.ndarray) -> np.ndarray:
        """(3, k): what each corner of some boxes' triangles adds to the inverse z-depth at points with these weights."""
        a, b, c = self.corner_inverse_z
        return np.stack([(1 - second - third) * a[owner], second * b[owner], third * c[owner]])


def _boxes(uv: np.ndarray, z_depths: np.ndarray, faces: np.ndarray, width: int, height: int) -> _Boxes:
    is_visible = z_depths > NEAR
    a, b, c = faces.T
    visible = np.flatnonzero(is_visible[a] & is_visible[b] & is_visible[c])
    triangles = np.ascontiguousarray(faces[visible].T)
    sides, lows, slopes = [], [], []
    for values, limit in zip(np.ascontiguousarray(uv.T), (width, height)):
        a, b, c = (values[corner] for corner in triangles)
        low = np.clip(np.ceil(np.minimum(np.minimum(a, b), c) - 0.5), 0, limit).astype(np.int64)
        high = np.clip(np.floor(np.maximum(np.maximum(a, b), c) - 0.5), -1, limit - 1).astype(np.int64)
        lows.append(low)
        sides.append(np.maximum(high - low + 1, 0))
        slopes.append((b - a, c - a, low + 0.5 - a))
    (second_x, third_x, start_x), (second_y, third_y, start_y) = slopes
    area = second_x * third_y - third_x * second_y
    used = np.flatnonzero((sides[0] > 0) & (sides[1] > 0) & (np.abs(area) > 1e-12))
    area, start_x, start_y = area[used], start_x[used], start_y[used]
    planar = []
    for by_column, by_row in ((third_y, -third_x), (-second_y, second_x)):
        by_column, by_row = by_column[used] / area, by_row[used] / area
        planar.append(np.stack([start_x * by_column + start_y * by_row, by_column, by_row]))
    inverse_z = (1 / np.where(is_visible, z_depths, np.inf)).astype(np.float32)
    return _Boxes(
        visible[used],
        *(low[used] for low in lows),
        *(side[used] for side in sides),
        np.stack(planar).astype(np.float32),
        inverse_z[triangles[:, used]],
    )


def _covered(boxes: _Boxes) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]]:
    """All pixels that triangles cover, in pieces: which box, column and row inside it, and two corners' weights there."""
    counts = boxes.width * boxes.height
    ends = np.cumsum(counts)
    widths = boxes.width.astype(np.int32)
    first = 0
    while first < len(counts):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + MAX_CANDIDATES, side="right")))
        part, n = slice(first, last), counts[first:last]
        owner = np.repeat(np.arange(first, last), n)
        local = np.arange(len(owner), dtype=np.int32) - np.repeat((ends[part] - n - done).astype(np.int32), n)
        row, column = np.divmod(local, np.repeat(widths[part], n))
        second, third = (
            np.repeat(p[0, part], n) + column * np.repeat(p[1, part], n) + row * np.repeat(p[2, part], n)
            for p in boxes.planar
        )
        inside = np.flatnonzero((second >= -EDGE) & (third >= -EDGE) & (second + third <= 1 + EDGE))
        yield owner[inside], column[inside], row[inside], [second[inside], third[inside]]
        first = last


def sample_texture(texture: np.ndarray, uvs: np.ndarray, palette: np.ndarray | None = None) -> np.ndarray:
    """Bilinear look-up: texture (height, width, c) with row 0 on top, uvs (n, 2) with v upward; float32 (n, c).

    Args:
        palette: (k, c) if the texture (height, width) holds numbers of its rows.
    """
    at = lambda y, x: texture[y, x] if palette is None else palette[texture[y, x]]  # noqa: E731
    height, width = texture.shape[:2]
    x = np.clip(uvs[:, 0] * width - 0.5, 0, width - 1)
    y = np.clip((1 - uvs[:, 1]) * height - 0.5, 0, height - 1)
    x0, y0 = np.minimum(x.astype(np.int64), max(width - 2, 0)), np.minimum(y.astype(np.int64), max(height - 2, 0))
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    fx, fy = (x - x0)[:, None].astype(np.float32), (y - y0)[:, None].astype(np.float32)
    top = at(y0, x0) * (1 - fx) + at(y0, x1) * fx
    bottom = at(y1, x0) * (1 - fx) + at(y1, x1) * fx
    return (top * (1 - fy) + bottom * fy).astype(np.float32)


def reduced(samples: np.ndarray, n: int, reduce: np.ufunc = np.add) -> np.ndarray:
    """Samples (height * n, width * n, ...) joined in blocks of n by n, row by row: (height, width, ...).

    Whole slices are joined: numpy's own reductions of two short axes take five times as long for the same result.
    """
    slices = [samples[row::n, column::n] for row in range(n) for column in range(n)]
    total = slices[0].copy()
    for part in slices[1:]:
        reduce(total, part, out=total)
    return total


@dataclass(frozen=True)
class Sight:
    """Where the pixels of a view look at a texture: what stays the same while its colors change."""

    is_hit: Bool[np.ndarray, "height width"]
    """Whether there is a surface at the pixel's center."""
    uvs: Float[np.ndarray, "n 2"]
    """Of the hits, row by row."""
    z_depths: Float[np.ndarray, "height width"]
    """Of the nearest surface, 0 for none."""

    def shown(self, texture: np.ndarray) -> Float[np.ndarray, "height width 4"]:
        """RGBA of the texture (size, size, 3), 8 bit, at each pixel's center, with alpha 0 or 1."""
        samples = np.zeros((*self.is_hit.shape, 4), np.float32)
        samples[self.is_hit, :3] = sample_texture(texture, self.uvs) / 255
        samples[self.is_hit, 3] = 1
        return samples


def look(vertices: np.ndarray, faces: np.ndarray, uvs: np.ndarray, camera: Camera) -> Sight:
    """What a camera sees of a mesh (n_vertices, 3), (n_faces, 3) with texture coordinates (n_vertices, 2)."""
    fragments = rasterize(vertices, faces, camera)
    is_hit = fragments.faces >= 0
    return Sight(is_hit, fragments.interpolate(faces, uvs)[is_hit], fragments.z_depths)


def finer(camera: Camera, n: int) -> Camera:
    """The camera with n by n samples in place of each pixel."""
    return camera.resized(camera.width * n, camera.height * n)


def averaged(samples: np.ndarray, n: int) -> np.ndarray:
    """Straight RGBA of blocks of n by n samples (see `Sight.shown`)."""
    blocks = reduced(samples, n) / np.float32(n * n)
    return np.concatenate([blocks[..., :3] / np.maximum(blocks[..., 3:], 1e-6), blocks[..., 3:]], -1)


def render_with_depth(mesh: TexturedMesh, camera: Camera, supersample: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """The unlit textured mesh.

    Args:
        supersample: Samples a pixel along each side.

    Returns:
        RGBA (height, width, 4) float32, sRGB, straight alpha; and z-depths (height, width) of the nearest surface in each
        pixel, 0 where nothing is.
    """
    sight = look(mesh.vertices, mesh.faces, mesh.uvs, finer(camera, supersample))
    nearest = reduced(np.where(sight.z_depths > 0, sight.z_depths, np.inf), supersample, np.minimum)
    return averaged(sight.shown(mesh.texture), supersample), np.where(np.isfinite(nearest), nearest, 0).astype(
        np.float32
    )


def render_mesh(mesh: TexturedMesh, camera: Camera, supersample: int = 2) -> np.ndarray:
    """RGBA (height, width, 4) of the unlit textured mesh; see `render_with_depth`."""
    sight = look(mesh.vertices, mesh.faces, mesh.uvs, finer(camera, supersample))
    return averaged(sight.shown(mesh.texture), supersample)


def render_surface(mesh: TexturedMesh, camera: Camera, supersample: int = 2) -> np.ndarray:
    """RGBA (height, width, 4) of the mesh in gray, lit over the left shoulder, as a viewport without textures shows it."""
    fragments = rasterize(mesh.vertices, mesh.faces, finer(camera, supersample))
    normals = fragments.interpolate(mesh.faces, mesh.normals) @ camera.c2w[:, :3].cpu().numpy()
    light = np.array(LIGHT) / np.linalg.norm(LIGHT)
    shade = AMBIENT + (1 - AMBIENT) * np.clip(normals @ light, 0, 1) / np.maximum(
        np.linalg.norm(normals, axis=-1), 1e-6
    )
    samples = np.concatenate([np.repeat(GRAY * shade[..., None], 3, -1), np.ones((*shade.shape, 1))], -1)
    return averaged(np.where(fragments.faces[..., None] >= 0, samples, 0).astype(np.float32), supersample)
