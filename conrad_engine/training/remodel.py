"""Changes that make another object of a mesh: other proportions, fewer parts, other colors, a companion."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ..mesh.clean import face_components
from .pool import PoolMesh
from .raster import places
from .shapes import random_color

P_TALLER, P_TURNED_PROFILE, P_FLATTER = 0.7, 0.5, 0.15
P_PART_GONE = 0.3
LARGEST_PART = 0.5
"""Part of an object's area that a piece of it has at most to be left out."""


def reshaped(rng: np.random.Generator, vertices: np.ndarray) -> np.ndarray:
    """The vertices in other proportions: taller or lower, wider at some heights, and a few flattened from a side.

    All but the last keep what a view from one side says of another: round things stay round, and left like right.
    """
    scale = np.ones(3)
    if rng.random() < P_TALLER:
        scale[2] = math.exp(rng.uniform(-0.35, 0.35))
    if rng.random() < P_FLATTER:
        scale[int(rng.integers(2))] = math.exp(rng.uniform(-0.25, 0.25))
    moved = vertices * scale
    if rng.random() < P_TURNED_PROFILE:
        wave = np.sin(2 * math.pi * rng.uniform(0.2, 1.2) * vertices[:, 2] + rng.uniform(-math.pi, math.pi))
        moved[:, :2] *= 1 + rng.uniform(0, 0.3) * wave[:, None]
    return moved


def without_parts(rng: np.random.Generator, mesh: PoolMesh) -> PoolMesh:
    """The mesh without some of its smaller connected pieces."""
    part = face_components(places(mesh.vertices)[mesh.faces], len(mesh.vertices))
    first, second, third = mesh.vertices[mesh.faces].transpose(1, 0, 2)
    area = np.bincount(part, np.linalg.norm(np.cross(second - first, third - first), axis=1))
    is_gone = (rng.random(len(area)) < P_PART_GONE) & (area < LARGEST_PART * area.sum())
    if area[is_gone].sum() > LARGEST_PART * area.sum():
        return mesh
    kept = ~is_gone[part]
    used, faces = np.unique(mesh.faces[kept], return_inverse=True)
    return replace(
        mesh,
        vertices=mesh.vertices[used],
        uvs=mesh.uvs[used],
        vertex_colors=None if mesh.vertex_colors is None else mesh.vertex_colors[used],
        faces=faces.reshape(-1, 3).astype(np.int32),
        face_materials=mesh.face_materials[kept],
    )


def recolored(rng: np.random.Generator, mesh: PoolMesh) -> PoolMesh:
    """The mesh with random colors for its materials without texture."""
    rgba = mesh.material_rgba.copy()
    for index in np.flatnonzero(mesh.material_texture < 0):
        rgba[index, :3] = random_color(rng)
    return replace(mesh, material_rgba=rgba)


def joined(first: PoolMesh, second: PoolMesh) -> PoolMesh:
    """Two meshes as one."""
    white = (np.ones_like(mesh.vertices) for mesh in (first, second))
    colors = [
        plain if mesh.vertex_colors is None else mesh.vertex_colors for mesh, plain in zip((first, second), white)
    ]
    texture = np.where(second.material_texture >= 0, second.material_texture + len(first.textures), -1)
    return PoolMesh(
        vertices=np.concatenate([first.vertices, second.vertices]),
        faces=np.concatenate([first.faces, second.faces + len(first.vertices)]),
        uvs=np.concatenate([first.uvs, second.uvs]),
        face_materials=np.concatenate([first.face_materials, second.face_materials + len(first.material_rgba)]),
        material_rgba=np.concatenate([first.material_rgba, second.material_rgba]),
        material_texture=np.concatenate([first.material_texture, texture]).astype(np.int32),
        textures=first.textures + second.textures,
        vertex_colors=np.concatenate(colors),
    )


def with_companion(rng: np.random.Generator, mesh: PoolMesh, other: PoolMesh) -> PoolMesh:
    """The mesh with another one standing beside it on the same ground."""
    angle, axis = rng.uniform(-math.pi, math.pi), int(rng.integers(2))
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    vertices = other.vertices @ turn.T * rng.uniform(0.4, 1.1)
    vertices[:, axis] += mesh.vertices[:, axis].max() - vertices[:, axis].min() + rng.uniform(-0.05, 0.05)
    vertices[:, 2] += mesh.vertices[:, 2].min() - vertices[:, 2].min()
    return joined(mesh, replace(other, vertices=vertices.astype(np.float32)))
