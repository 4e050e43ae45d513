"""Fairing: lumps too small for anyone to have known of are taken off a surface, its edges kept.

The views that shape a field have 64 pixels, so what it holds below two or three of them is chance. The normals are averaged
over that scale without regard to edges, and then again and again along the surface as the last result says it runs: a rolling
guidance filter (Wang et al., ACM TOG 34(6), 2015). Lumps are gone, edges between large sides come back. The vertices are then
those of the triangles so turned, stitched together by a Poisson equation (Yu et al., ACM TOG 23(3), 2004).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from .laplacian import divergence, half_cotangents, solver
from .mesh import Mesh, dots, face_crosses, lengths
from .outline import SurfaceView, hull_distances

N_ROUNDS = 3
"""Averages along the surface."""
SAME_SIDE = 0.35
"""Difference of unit normals over which faces do not average with each other: its standard deviation."""
KEPT_BELOW, FAIRED_FROM = 0.55, 0.85
"""Length of the mean of the normals around a face. A rod thinner than the scale has them all around: it stays as it is."""
HOLD = 0.1
"""How much vertices keep to their places, of how much they keep to the normals, for a bend as long as the scale."""
LEAST_WEIGHT, MOST_WEIGHT = 0.01, 5.0
"""Bounds of what a triangle adds to an edge's weight."""


def faired(mesh: Mesh, scale: float, views: Sequence[SurfaceView] = ()) -> Mesh:
    """The mesh without lumps smaller than about four times `scale`, in its own unit; 0 leaves it as it is.

    Args:
        views: Pictures whose outlines the mesh has: near them vertices move along the rays alone.
    """
    if scale <= 0 or len(mesh.faces) < 4:
        return mesh
    vertices = mesh.vertices.astype(np.float64)
    normals = smooth_normals(vertices, mesh.faces, scale)
    moves = stitched(vertices, mesh.faces, normals, HOLD / scale**2) - vertices
    for view in views:
        inside = hull_distances(view.mask, view.camera)(torch.from_numpy(mesh.vertices)).numpy()
        rays = _unit(vertices - view.camera.positions.double().cpu().numpy())
        across = moves - rays * dots(moves, rays)[:, None]
        moves -= across * np.clip(1 - inside / scale, 0, 1)[:, None]
    return Mesh((vertices + moves).astype(np.float32), mesh.faces)


def smooth_normals(
    vertices: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "m 3"], scale: float
) -> Float[np.ndarray, "m 3"]:
    """Unit normals of the faces without what is smaller than the scale."""
    crosses = face_crosses(vertices, faces)
    normals, areas = _unit(crosses), np.maximum(lengths(crosses) / 2, 1e-20)
    first, second, edges = neighbors(faces)
    centers = vertices[faces].mean(1)
    ways = lengths(vertices[edges[:, 0]] - vertices[edges[:, 1]]) / np.maximum(
        lengths(centers[first] - centers[second]), 1e-9
    )

    def averaged(weights: np.ndarray) -> np.ndarray:
        """Heat flow for as long as it takes to spread over the scale, in one implicit step."""
        flows = scale**2 / 2 * weights * ways
        return solver(first, second, flows, areas)(areas[:, None] * normals)

    blurred = averaged(np.ones(len(first)))
    trust = np.clip((lengths(blurred) - KEPT_BELOW) / (FAIRED_FROM - KEPT_BELOW), 0, 1)[:, None]
    guide = _unit(blurred)
    for _ in range(N_ROUNDS):
        apart = np.square(guide[first] - guide[second]).sum(1)
        guide = _unit(averaged(np.exp(-apart / (2 * SAME_SIDE**2))))
    return _unit(normals + trust * (guide - normals))


def stitched(
    vertices: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "m 3"], normals: Float[np.ndarray, "m 3"], hold: float
) -> Float[np.ndarray, "n 3"]:
    """Vertices whose triangles are nearest to the given ones, each projected along its given normal onto the plane it says.

    Turned triangles would keep their area, and a lumpy side, which has more of it than an even one, would bulge.

    Args:
        hold: Weight of the squared distance from where vertices were, per area, in one over the mesh's unit squared.
    """
    corners = vertices[faces]
    corners = corners - normals[:, None] * np.einsum("mkc,mc->mk", corners, normals)[..., None]
    ahead, behind = [1, 2, 0], [2, 0, 1]  # ends of the edge opposite to each corner
    first, second = faces[:, ahead].ravel(), faces[:, behind].ravel()
    differences = (corners[:, ahead] - corners[:, behind]).reshape(-1, 3)
    weights = half_cotangents(vertices, faces).clip(LEAST_WEIGHT, MOST_WEIGHT).ravel()
    areas = lengths(face_crosses(vertices, faces)) / 2
    masses = hold * np.bincount(faces.ravel(), np.repeat(areas / 3, 3), len(vertices)) + 1e-12
    right = divergence(first, second, weights[:, None] * differences, len(vertices)) + masses[:, None] * vertices
    return solver(first, second, weights, masses)(right)


def neighbors(faces: Int[np.ndarray, "m 3"]) -> tuple[np.ndarray, np.ndarray, Int[np.ndarray, "p 2"]]:
    """Pairs of faces that share an edge, and its ends; where more than two do, those next to each other in their order."""
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).astype(np.int64), axis=1)
    keys = edges[:, 0] * (faces.max(initial=0) + 1) + edges[:, 1]
    order = np.argsort(keys, kind="stable")
    shared = np.flatnonzero(np.diff(keys[order]) == 0)
    owners = np.tile(np.arange(len(faces)), 3)[order]
    return owners[shared], owners[shared + 1], edges[order[shared]]


def _unit(vectors: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    return vectors / np.maximum(lengths(vectors), 1e-20)[:, None]
