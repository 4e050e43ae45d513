"""Colors over a surface that continue the photos into what they do not show, without a seam.

One color x per vertex, by least squares over the edges: where a photo sees, x is its color; where it does not, neighbors differ
as the field's colors do, and x is drawn weakly to the field's own. So the field is shifted to meet the photo and the shift
fades along the surface (seamless cloning, Pérez et al. 2003, with a screen). Where the field knows nothing of its own,
neighbors are drawn together, which fills in smoothly.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from .laplacian import divergence, half_cotangents, solver
from .mesh import face_crosses, lengths

SEEN_PULL = 10.0
"""Pull of a photo on a vertex it sees, against an edge's pull of 1."""
SEAM_FADE = 0.15
"""Distance along the surface over which the shift of the field's colors fades, as a part of the mesh's size."""
TRUE_EDGE = 0.2
"""Where photo and field meet with a much larger difference of colors, it is an edge of the object and no seam."""
LEAST_WEIGHT, MOST_WEIGHT = 0.02, 20.0
"""Bounds of an edge's weight, which is about 1 in a regular mesh."""


def complete_colors(
    vertices: Float[np.ndarray, "n 3"],
    faces: Int[np.ndarray, "m 3"],
    photo: Float[np.ndarray, "n 3"],
    seen: Float[np.ndarray, " n"],
    field: Float[np.ndarray, "n 3"],
    known: Float[np.ndarray, " n"],
    fade: float = SEAM_FADE,
) -> Float[np.ndarray, "n 3"]:
    """One color per vertex; vertices at the same place get the same.

    Args:
        photo, seen: The photos' colors, and how well they see each vertex, 0 to 1.
        field, known: The field's colors, and how far they are its own, 0 to 1.
        fade: Distance over which the field's shift fades, as a part of the mesh's size.
    """
    _, first, place = np.unique(vertices, axis=0, return_index=True, return_inverse=True)
    place = place.reshape(-1)
    photo, seen, field, known = photo[first], seen[first], field[first], known[first]
    edges, strength, areas = _edges(vertices[first].astype(np.float64), place[faces])
    a, b = edges.T
    # Neighbors that are both the field's own keep its difference; a photo's neighbor takes its color.
    own = (known * (1 - seen))[:, None]
    wanted = np.minimum(own[a], own[b]) * (field[a] - field[b])
    now = seen[:, None] * photo + (1 - seen[:, None]) * field
    jump = np.abs(now[a] - now[b]).max(1) * np.abs(seen[a] - seen[b]) * np.minimum(1, known[a] + known[b])
    strength = strength / (1 + (jump / TRUE_EDGE) ** 4)
    extent = float(np.ptp(vertices, axis=0).max())
    to_photo = SEEN_PULL * seen**2
    to_field = own[:, 0] * areas / (fade * extent) ** 2 + 1e-6
    right = to_photo[:, None] * photo + to_field[:, None] * field
    right += divergence(a, b, strength[:, None] * wanted, len(first))
    return solver(a, b, strength, to_photo + to_field)(right)[place].astype(np.float32)


def _edges(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges (k, 2), their cotangent weights (k,), and the area around each vertex.

    Negative weights, at obtuse corners, are lifted: neighbors never repel.
    """
    faces = faces[(faces != np.roll(faces, 1, axis=1)).all(1)]
    pairs = np.concatenate([faces[:, [1, 2]], faces[:, [2, 0]], faces[:, [0, 1]]])
    weights = half_cotangents(vertices, faces).T.ravel()
    doubled = lengths(face_crosses(vertices, faces))
    areas = np.bincount(faces.ravel(), np.repeat(doubled / 6, 3), minlength=len(vertices))
    edges, index = np.unique(np.sort(pairs, axis=1), axis=0, return_inverse=True)
    strength = np.bincount(index.reshape(-1), weights, minlength=len(edges))
    return edges, np.clip(strength, LEAST_WEIGHT, MOST_WEIGHT), areas
