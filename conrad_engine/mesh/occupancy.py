"""Where a mesh is inside: a signed distance grid that also works for meshes with holes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.ndimage import binary_closing, binary_dilation, distance_transform_edt, generate_binary_structure, label

from .mesh import Mesh

N_SURFACE_SAMPLES = 400_000
N_CLOSED = 2
"""Holes up to about twice this many cells wide are closed."""


def surface_points(mesh: Mesh, n_points: int, seed: int = 0) -> Float[np.ndarray, "n 3"]:
    """Points spread over the faces by area."""
    rng = np.random.default_rng(seed)
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    if areas.sum() <= 0:
        return corners.mean(1)
    chosen = corners[rng.choice(len(areas), n_points, p=areas / areas.sum())]
    a, b = rng.random((2, n_points, 1))
    flip = a + b > 1
    a, b = np.where(flip, 1 - a, a), np.where(flip, 1 - b, b)
    return chosen[:, 0] + a * (chosen[:, 1] - chosen[:, 0]) + b * (chosen[:, 2] - chosen[:, 0])


def signed_distance_grid(mesh: Mesh, aabb: np.ndarray, n_cells: int) -> Float[np.ndarray, "nx ny nz"]:
    """Signed distances at the cell centers of a box, positive inside, world units.

    The surface is drawn into cells; what a flood from outside cannot reach is inside. Small holes are closed first; where the
    flood gets in all the same (an open shell), only the shell itself counts as inside.

    Args:
        aabb: (2, 3) corners of the box.
        n_cells: Along the longest side; cells are about cubes.
    """
    sides = aabb[1] - aabb[0]
    cell = float(sides.max()) / n_cells
    shape = np.maximum(np.round(sides / cell).astype(int), 2)
    points = np.concatenate([surface_points(mesh, N_SURFACE_SAMPLES), mesh.vertices[np.unique(mesh.faces)]])
    index = np.floor((points - aabb[0]) / sides * shape).astype(int)
    index = index[((index >= 0) & (index < shape)).all(1)]
    # A margin lets the outside be one connected part.
    surface = np.zeros(shape + 6, bool)
    surface[tuple((index + 3).T)] = True
    closed = surface | binary_closing(surface, generate_binary_structure(3, 3), iterations=N_CLOSED)
    parts, _ = label(~closed)
    # Closing also filled narrow concave places: the outside takes them back, as far as the surface lets it.
    outside = binary_dilation(parts == parts[0, 0, 0], iterations=N_CLOSED, mask=~surface)
    solid = ~(outside | surface)
    # A cell of the surface is half way between outside and inside; of a thin sheet, which has no inside, it is the inside.
    to_outside, to_solid = distance_transform_edt(~outside), distance_transform_edt(~solid) if solid.any() else np.inf
    at_surface = np.where(to_solid > 2, 0.5, np.clip((to_outside - to_solid) / 2, -0.5, 0.5))
    away = distance_transform_edt(~surface)
    distances = np.where(surface, at_surface, np.where(solid, away, -away))
    return (distances * cell)[3:-3, 3:-3, 3:-3].astype(np.float32)
