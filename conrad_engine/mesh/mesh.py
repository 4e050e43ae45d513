"""Meshes as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8


@dataclass(frozen=True)
class Mesh:
    """Triangles, counterclockwise from outside. +Z up."""

    vertices: Float[np.ndarray, "n_vertices 3"]
    """float32, world units."""
    faces: Int[np.ndarray, "n_faces 3"]
    """int32."""


@dataclass(frozen=True)
class TexturedMesh:
    """A mesh whose vertices are split along the seams of its charts."""

    vertices: Float[np.ndarray, "n_vertices 3"]
    faces: Int[np.ndarray, "n_faces 3"]
    uvs: Float[np.ndarray, "n_vertices 2"]
    """In [0, 1], u to the right, v upward: (0, 0) is the lower left corner of the texture."""
    normals: Float[np.ndarray, "n_vertices 3"]
    """Unit length; the same on both sides of a seam."""
    texture: UInt8[np.ndarray, "height width 3"]
    """sRGB, row 0 on top."""


def dots(a: Float[np.ndarray, "n 3"], b: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
    """Dot products of rows: `(a * b).sum(1)` to the last bit, ten times as fast as numpy is along short rows."""
    return a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1] + a[:, 2] * b[:, 2]


def lengths(a: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
    """Lengths of rows: `np.linalg.norm(a, axis=1)`; see `dots`."""
    return np.sqrt(dots(a, a))


def face_crosses(vertices: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "m 3"]) -> Float[np.ndarray, "m 3"]:
    """Normals of triangles, twice as long as their areas, float64."""
    corners = vertices[faces].astype(np.float64)
    return np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals (n_vertices, 3) float32: face normals weighted by area, summed over all vertices at the same place."""
    face_normals = face_crosses(vertices, faces)
    _, places = np.unique(vertices, axis=0, return_inverse=True)
    ids = places.reshape(-1)[faces]
    sums = np.stack(
        [
            np.bincount(ids.ravel(), np.repeat(face_normals[:, k], 3), minlength=ids.max(initial=-1) + 1)
            for k in range(3)
        ],
        1,
    )
    normals = sums[places.reshape(-1)] if len(sums) else np.zeros_like(vertices, np.float64)
    length = lengths(normals)[:, None]
    return np.where(length > 1e-20, normals / np.maximum(length, 1e-20), [0.0, 0.0, 1.0]).astype(np.float32)
