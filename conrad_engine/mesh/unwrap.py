"""Texture coordinates: charts by xatlas, packed into one square."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xatlas
from jaxtyping import Float, Int

from ..config import MeshConfig
from ..errors import MeshError
from .mesh import Mesh, face_crosses, lengths, vertex_normals

MIN_CHARTS = 80
"""No chart takes more than this part of the surface."""


@dataclass(frozen=True)
class UnwrappedMesh:
    """A mesh whose vertices are split along chart borders."""

    vertices: Float[np.ndarray, "n_vertices 3"]
    faces: Int[np.ndarray, "n_faces 3"]
    uvs: Float[np.ndarray, "n_vertices 2"]
    """In [0, 1], v upward."""
    normals: Float[np.ndarray, "n_vertices 3"]


def unwrap(mesh: Mesh, config: MeshConfig) -> UnwrappedMesh:
    """Cut a mesh into charts and lay them side by side.

    Raises:
        MeshError: There are no faces, or no chart could be laid out.
    """
    if not len(mesh.faces):
        raise MeshError("a mesh without faces cannot be unwrapped")
    atlas = xatlas.Atlas()
    normals = vertex_normals(mesh.vertices, mesh.faces)
    atlas.add_mesh(mesh.vertices, mesh.faces.astype(np.uint32), normals)
    charts = xatlas.ChartOptions()
    charts.max_iterations = 1
    charts.max_cost = 4.0  # fewer and larger charts than the default of 2: fewer seams
    # The time of growing a chart rises faster than its size.
    charts.max_chart_area = _area(mesh) / MIN_CHARTS
    pack = xatlas.PackOptions()
    pack.resolution = config.texture_size
    pack.padding = config.padding_px // 2
    pack.bilinear = True
    pack.rotate_charts = True
    atlas.generate(charts, pack)
    source, faces, uvs = atlas[0]
    if not len(faces):
        raise MeshError("the mesh could not be unwrapped: it has no face of any area")
    # xatlas has v downward as pictures do.
    uvs = np.stack([uvs[:, 0], 1 - uvs[:, 1]], 1)
    return UnwrappedMesh(mesh.vertices[source], faces.astype(np.int32), uvs.astype(np.float32), normals[source])


def _area(mesh: Mesh) -> float:
    return float(lengths(face_crosses(mesh.vertices, mesh.faces)).sum() / 2)
