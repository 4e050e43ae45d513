"""Meshes of results, drawn without light as the truth's cameras see them."""

from __future__ import annotations

import numpy as np

from ..cameras import Camera
from ..mesh import raster
from ..mesh.mesh import TexturedMesh

SUPERSAMPLE = 3
"""Samples a pixel along each side. Odd: with two, an outline that covers half of a pixel ends at exactly 0.5, and masks
come out a quarter of a pixel too small."""


def render(mesh: TexturedMesh, camera: Camera) -> np.ndarray:
    """(height, width, 4) in [0, 1], straight alpha: the texture as it is, unlit."""
    return raster.render_mesh(mesh, camera, SUPERSAMPLE).astype(np.float64)


def render_with_depth(mesh: TexturedMesh, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """The same, with z-depths (height, width) along the optical axis; 0 where nothing is."""
    rgba, z_depths = raster.render_with_depth(mesh, camera, SUPERSAMPLE)
    return rgba.astype(np.float64), z_depths
