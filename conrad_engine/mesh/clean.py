"""Making an extracted surface one clean part of a bounded size."""

from __future__ import annotations

from collections.abc import Sequence

import fast_simplification
import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ..config import MeshConfig
from ..errors import MeshError
from .fairing import faired
from .mesh import Mesh
from .outline import ISLAND, SILHOUETTE, SurfaceView, fit_outline, silhouette
from .raster import rasterize

DUST_FACES, DUST_DIAGONAL = 0.01, 0.05
"""Parts with a smaller share of the faces or of the diagonal are dust."""
SMOOTHING_ROUNDS = 4
TAUBIN_IN, TAUBIN_OUT = 0.5, -0.53
"""Taubin (SIGGRAPH 95): a shrinking and a growing step remove stair-steps without shrinking the whole."""


def clean_mesh(mesh: Mesh, config: MeshConfig, views: Sequence[SurfaceView] = (), pixel: float = 0.0) -> Mesh:
    """Parts chosen, stair-steps smoothed, decimated to the budget, lumps taken off (`fairing`), degenerate faces dropped.

    Args:
        views: Pictures whose silhouettes the outline is fitted to at the end.
        pixel: Side of a pixel of the views that formed the surface, in the mesh's unit; see `MeshConfig.fairing`.

    Raises:
        MeshError: Nothing is left.
    """
    mesh = keep_components(weld(mesh), config.max_components, views)
    mesh = taubin(mesh, SMOOTHING_ROUNDS)
    mesh = decimate(mesh, config.n_faces)
    # Decimation may cut a thin bridge.
    mesh = keep_components(mesh, config.max_components, views)
    if len(mesh.faces) < 4:
        raise MeshError("nothing is left of the surface after cleaning; try another seed or mesh.max_components=0")
    return fit_outline(faired(mesh, config.fairing * pixel, views), list(views))


def weld(mesh: Mesh) -> Mesh:
    """Vertices at the same place joined, degenerate faces dropped. Of double faces one stays; two that look opposite ways,
    a flap without thickness as decimation leaves it, both go: one of them would be a third face at an edge."""
    vertices, index = np.unique(mesh.vertices, axis=0, return_inverse=True)
    faces = index.reshape(-1)[mesh.faces].astype(np.int32)
    faces = faces[(faces != np.roll(faces, 1, axis=1)).all(1)]
    _, first, group = np.unique(np.sort(faces, axis=1), axis=0, return_index=True, return_inverse=True)
    a, b, c = faces.T
    turns = np.where((a < b) ^ (b < c) ^ (a < c), 1, -1)  # the sense of the corners' order
    balance = np.bincount(group.reshape(-1), turns, len(first))
    return compact(Mesh(vertices.astype(np.float32), faces[np.sort(first[balance != 0])]))


def compact(mesh: Mesh) -> Mesh:
    """Without vertices that no face uses."""
    used, faces = np.unique(mesh.faces, return_inverse=True)
    return Mesh(mesh.vertices[used], faces.reshape(-1, 3).astype(np.int32))


def face_components(faces: np.ndarray, n_vertices: int) -> Int[np.ndarray, " n_faces"]:
    """Number of the connected part of each face."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]]])
    graph = coo_matrix((np.ones(len(edges), np.int8), edges.T), shape=(n_vertices, n_vertices))
    return connected_components(graph, directed=False)[1][faces[:, 0]] if len(faces) else np.zeros(0, int)


def keep_components(mesh: Mesh, n_kept: int, views: Sequence[SurfaceView] = ()) -> Mesh:
    """The largest connected parts, by faces; with 0, all parts but dust.

    Besides them, what a picture needs: a part that shows `ISLAND` of a silhouette or more where no kept part does, be it an
    island of that silhouette or a crest that came out too deep to be joined to its helmet.
    """
    labels = face_components(mesh.faces, len(mesh.vertices))
    if not len(labels):
        return mesh
    counts = np.bincount(labels)
    if n_kept > 0:
        order = np.argsort(-counts, kind="stable")
        is_kept = np.isin(np.arange(len(counts)), order[:n_kept])
        for view in views:
            _keep_shown(is_kept, mesh, labels, view)
    else:
        diagonal = np.linalg.norm(np.ptp(mesh.vertices, axis=0))
        sizes = [
            np.linalg.norm(np.ptp(mesh.vertices[mesh.faces[labels == k]].reshape(-1, 3), axis=0)) if n else 0
            for k, n in enumerate(counts)
        ]
        is_kept = (counts >= DUST_FACES * len(labels)) & (np.array(sizes) >= DUST_DIAGONAL * diagonal)
        is_kept[np.argmax(counts)] = True
    return compact(Mesh(mesh.vertices, mesh.faces[is_kept[labels]]))


def _keep_shown(is_kept: np.ndarray, mesh: Mesh, labels: np.ndarray, view: SurfaceView) -> None:
    """Mark, in place, the parts without which a good piece of the view's silhouette would be lost."""
    if is_kept.all():
        return
    camera, mask = view.resized(SILHOUETTE)
    faces = rasterize(mesh.vertices, mesh.faces, camera).faces
    shown = np.where((faces >= 0) & (mask > 0.5), labels[faces], -1)
    while True:
        covered, _ = silhouette(Mesh(mesh.vertices, mesh.faces[is_kept[labels]]), view, SILHOUETTE)
        lost = np.bincount(shown[(shown >= 0) & ~covered], minlength=len(is_kept))
        if lost.max() <= ISLAND * (mask > 0.5).sum():
            return
        is_kept[lost.argmax()] = True


def taubin(mesh: Mesh, n_rounds: int) -> Mesh:
    """Smooth without shrinking."""
    n = len(mesh.vertices)
    edges = np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    graph = coo_matrix((np.ones(len(edges)), edges.T), shape=(n, n)).tocsr()
    graph = ((graph + graph.T) > 0).astype(np.float64)
    degree = np.maximum(np.asarray(graph.sum(1)), 1)
    vertices = mesh.vertices.astype(np.float64)
    for _ in range(n_rounds):
        for factor in (TAUBIN_IN, TAUBIN_OUT):
            vertices = vertices + factor * (graph @ vertices / degree - vertices)
    return Mesh(vertices.astype(np.float32), mesh.faces)


def decimate(mesh: Mesh, n_faces: int) -> Mesh:
    """Quadric edge collapse to at most about `n_faces` triangles."""
    if len(mesh.faces) <= n_faces:
        return mesh
    vertices, faces = fast_simplification.simplify(
        mesh.vertices, mesh.faces.astype(np.int64), target_count=n_faces, agg=5
    )
    return weld(Mesh(np.asarray(vertices, np.float32), np.asarray(faces, np.int32)))


def manifold_share(faces: np.ndarray) -> float:
    """Part of the edges with exactly two triangles."""
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    counts = np.unique(edges, axis=0, return_counts=True)[1]
    return float((counts == 2).mean()) if len(counts) else 0.0
