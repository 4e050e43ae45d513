"""Sparse least squares over the edges of a mesh or of any other graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import splu

from .mesh import dots, face_crosses, lengths


def half_cotangents(vertices: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "m 3"]) -> Float[np.ndarray, "m 3"]:
    """Half the cotangent of the angle at each corner: what its triangle adds to the weight of the edge opposite.

    With these weights the sum over edges of squared differences is the integral of the squared gradient (Pinkall and
    Polthier 1993), whatever the triangles' shapes. Negative at obtuse corners.
    """
    corners = vertices[faces]
    doubled = np.maximum(lengths(face_crosses(vertices, faces)), 1e-12)
    sides = [(corners[:, (k + 1) % 3] - corners[:, k], corners[:, (k + 2) % 3] - corners[:, k]) for k in range(3)]
    return np.stack([dots(u, v) / doubled / 2 for u, v in sides], 1)


def solver(
    first: Int[np.ndarray, " e"], second: Int[np.ndarray, " e"], weights: Float[np.ndarray, " e"], masses: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Solves (masses + the Laplacian of a weighted graph) x = right-hand sides (n, k).

    Args:
        first, second, weights: Ends of the edges, which may repeat, and their weights.
        masses: (n,) what holds each vertex by itself; positive.
    """
    n = len(masses)
    rows, columns = (np.concatenate(pair) for pair in ((first, second, first, second), (first, second, second, first)))
    laplacian = coo_matrix((np.concatenate([weights, weights, -weights, -weights]), (rows, columns)), shape=(n, n))
    system = (laplacian + diags(masses)).tocsc()
    # Conjugate gradients take three times as long, at any size that was tried.
    return splu(system, permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}).solve


def divergence(
    first: Int[np.ndarray, " e"], second: Int[np.ndarray, " e"], differences: Float[np.ndarray, "e k"], n: int
) -> Float[np.ndarray, "n k"]:
    """The right-hand side (n, k) that asks for weighted differences x_first - x_second."""
    columns = [np.bincount(first, part, n) - np.bincount(second, part, n) for part in differences.T]
    return np.stack(columns, 1)
