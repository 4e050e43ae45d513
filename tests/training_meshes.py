"""Small meshes and a tiny mesh pool for the tests of training."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from conrad_engine.training import raster
from conrad_engine.training.pool import PoolMesh
from conrad_engine.training.pool_build.packing import PackedObject, encode_geometry, encode_texture, write_pool
from conrad_engine.training.shapes import random_shape

PARTS = (
    ((-0.1, -0.1, -0.5), (0.1, 0.1, 0.5), (0.2, 0.8, 0.2)),
    ((-0.5, -0.08, 0.2), (-0.1, 0.08, 0.4), (0.9, 0.1, 0.1)),
    ((0.1, -0.08, -0.2), (0.4, 0.08, 0.0), (0.1, 0.1, 0.9)),
)
"""Low corner, high corner and color: a post, a high red arm towards -X, a low blue one towards +X."""
UNLIT = raster.Light((0.0, 0.0, 1.0), 1.0, 0.0, 0.0)
FOV_RAD = math.radians(40)


def boxes(parts: tuple = PARTS) -> PoolMesh:
    """Boxes of one material each."""
    corners = np.array(list(itertools.product((0, 1), repeat=3)))
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    triangles = np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))])
    vertices = [np.array(low) + corners * (np.array(high) - np.array(low)) for low, high, _ in parts]
    return PoolMesh(
        vertices=np.concatenate(vertices).astype(np.float32),
        faces=np.concatenate([triangles + 8 * k for k in range(len(parts))]).astype(np.int32),
        uvs=np.zeros((8 * len(parts), 2), np.float32),
        face_materials=np.repeat(np.arange(len(parts)), 12).astype(np.int32),
        material_rgba=np.array([[*color, 1.0] for _, _, color in parts], np.float32),
        material_texture=np.full(len(parts), -1, np.int32),
    )


def box(x: float, y: float, z: float) -> PoolMesh:
    half = np.array([x, y, z]) / 2
    return boxes(((-half, half, (0.7, 0.5, 0.3)),))


def in_order_of_use(mesh: PoolMesh) -> PoolMesh:
    """The same with faces sorted by material and vertices numbered as the pool file needs them, box side 1."""
    by_material = np.argsort(mesh.face_materials, kind="stable")
    flat = mesh.faces[by_material].ravel()
    used, first = np.unique(flat, return_index=True)
    old = used[np.argsort(first)]
    new = np.zeros(len(mesh.vertices), np.int32)
    new[old] = np.arange(len(old))
    vertices = mesh.vertices[old] / np.ptp(mesh.vertices[old], axis=0).max()
    return replace(
        mesh,
        vertices=vertices - (vertices.min(0) + vertices.max(0)) / 2,
        uvs=mesh.uvs[old],
        faces=new[flat].reshape(-1, 3),
        face_materials=mesh.face_materials[by_material],
    )


def packed(mesh: PoolMesh, key: str, source: str, split: str) -> PackedObject:
    return PackedObject(
        source=source,
        key=key,
        name=key,
        category="things",
        license="CC0-1.0",
        author="tests",
        geometry=encode_geometry(mesh),
        material_rgba=np.round(mesh.material_rgba * 255).astype(np.uint8),
        material_texture=mesh.material_texture,
        textures=[encode_texture(texture) for texture in mesh.textures],
        n_faces=len(mesh.faces),
        n_faces_before=len(mesh.faces),
        shape_hash=key,
        appearance=np.zeros((4, 2, 2, 4), np.uint8),
        split=split,
    )


def write_tiny_pool(folder: Path) -> None:
    """Two training objects and one for validation of each of two sources."""
    rng = np.random.default_rng(0)
    for source in ("sweethome3d", "0ad"):
        meshes = [boxes(), random_shape(rng), random_shape(rng)]
        items = []
        for k, mesh in enumerate(map(in_order_of_use, meshes)):
            items.append(packed(mesh, f"{source}_{k}", source, "val" if k == 2 else "train"))
        write_pool(folder / f"pool_{source}.npz", source, items)
