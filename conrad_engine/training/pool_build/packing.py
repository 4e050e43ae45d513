"""Writes the pool format that `pool.py` describes and reads."""

from __future__ import annotations

import io
import lzma
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..pool import FORMAT_VERSION, LZMA_FILTERS, POSITION_STEPS, PoolMesh
from .meshes import Mesh

FINEST_UV_EXPONENT = -11
"""UV step 1/2048: a sixteenth of a texel at 128 px. Coarser where a texture repeats more than 16 times."""
WEBP_QUALITY = 86


@dataclass
class PackedObject:
    """One object as bytes, with the facts that selection and the index need."""

    source: str
    key: str
    name: str
    category: str
    license: str
    author: str
    geometry: bytes
    material_rgba: np.ndarray
    """(n_materials, 4) uint8."""
    material_texture: np.ndarray
    """(n_materials,) int32, index into `textures` or -1."""
    textures: list[bytes]
    n_faces: int
    n_faces_before: int
    shape_hash: str
    """Equal for objects with the same vertex set."""
    appearance: np.ndarray
    """Small renders, see `rules.appearance`; distances between them measure how alike two objects look."""
    split: str = "train"


def index_mesh(mesh: Mesh) -> PoolMesh:
    """Merge equal corners into vertices in order of first use, sort faces by material, drop unused materials."""
    order = np.argsort(mesh.face_materials, kind="stable")
    used, face_materials = np.unique(mesh.face_materials[order], return_inverse=True)
    corners = mesh.vertices[mesh.faces[order]].reshape(-1, 3)
    uvs = mesh.corner_uvs[order].reshape(-1, 2)
    is_textured = np.array([mesh.materials[m].texture is not None for m in used])[np.repeat(face_materials, 3)]
    uvs = np.where(is_textured[:, None], uvs, 0)
    grid = np.round((corners + 0.5) * POSITION_STEPS).clip(0, POSITION_STEPS)
    columns = [grid, np.round(uvs * 2.0**-FINEST_UV_EXPONENT)]
    colors = None
    if mesh.corner_colors is not None and mesh.corner_colors.min() < 0.995:
        colors = np.round(mesh.corner_colors[order].reshape(-1, 3) * 255).clip(0, 255)
        columns.append(colors)
    rows = np.ascontiguousarray(np.concatenate(columns, axis=1).astype(np.int64))
    _, first, inverse = np.unique(
        rows.view([("", rows.dtype)] * rows.shape[1]).ravel(), return_index=True, return_inverse=True
    )
    by_use = np.argsort(first)
    rank = np.empty_like(by_use)
    rank[by_use] = np.arange(len(by_use))
    kept = first[by_use]
    materials = [mesh.materials[m] for m in used]
    textures: list[np.ndarray] = []
    material_texture = []
    for material in materials:
        same = [k for k, texture in enumerate(textures) if texture is material.texture]
        if material.texture is not None and not same:
            textures.append(material.texture)
            same = [len(textures) - 1]
        material_texture.append(same[0] if same else -1)
    return PoolMesh(
        vertices=(grid[kept] / POSITION_STEPS - 0.5).astype(np.float32),
        faces=rank[inverse.ravel()].reshape(-1, 3).astype(np.int32),
        uvs=uvs[kept].astype(np.float32),
        face_materials=face_materials.astype(np.int32),
        material_rgba=np.array([[*material.color, material.alpha] for material in materials], np.float32).clip(0, 1),
        material_texture=np.array(material_texture, np.int32),
        textures=textures,
        vertex_colors=None if colors is None else (colors[kept] / 255).astype(np.float32),
    )


def _planes(values: np.ndarray, n_bytes: int) -> bytes:
    """Unsigned integers as planes of equally significant bytes: high planes are nearly constant and pack well."""
    flat = np.ascontiguousarray(values, np.int64).ravel()
    return b"".join(((flat >> (8 * k)) & 0xFF).astype(np.uint8).tobytes() for k in range(n_bytes))


def _delta_planes(columns: np.ndarray) -> bytes:
    """(n_vertices, k) 16-bit numbers as zigzag-coded differences along the vertices, wrapped to 16 bits."""
    differences = np.diff(columns.astype(np.int64), axis=0, prepend=0)
    wrapped = ((differences + 0x8000) & 0xFFFF) - 0x8000
    return _planes(((wrapped << 1) ^ (wrapped >> 63)).T, 2)


def encode_geometry(mesh: PoolMesh) -> bytes:
    """One compressed block; see `pool.decode_geometry` for the layout.

    Raises:
        ValueError: The mesh is not as `index_mesh` makes it: vertices in order of first use, faces sorted by material.
    """
    positions = np.round((mesh.vertices.astype(np.float64) + 0.5) * POSITION_STEPS).astype(np.int64)
    largest = float(np.abs(mesh.uvs).max(initial=0))
    uv_exponent = max(FINEST_UV_EXPONENT, int(np.ceil(np.log2(max(largest, 1e-9) / 32767))))
    uvs = np.round(mesh.uvs * 2.0**-uv_exponent).astype(np.int64)
    flat = mesh.faces.ravel().astype(np.int64)
    next_unused = np.maximum.accumulate(np.concatenate([[-1], flat]))[:-1] + 1
    if (next_unused < flat).any() or (np.diff(mesh.face_materials) < 0).any():
        raise ValueError("vertices must be numbered in order of first use, and faces sorted by material")
    face_counts = np.bincount(mesh.face_materials, minlength=len(mesh.material_rgba))
    has_colors = mesh.vertex_colors is not None
    header = np.array(
        [len(positions), len(mesh.faces), len(mesh.material_rgba), has_colors, uv_exponent], "<i4"
    ).tobytes()
    parts = [
        header,
        _delta_planes(positions),
        _delta_planes(uvs),
        _planes(next_unused - flat, 4),
        _planes(face_counts, 4),
    ]
    if has_colors:
        parts.append(_planes(np.round(mesh.vertex_colors * 255).T, 1))
    return lzma.compress(b"".join(parts), lzma.FORMAT_RAW, filters=LZMA_FILTERS)


@lru_cache(maxsize=512)
def _webp(pixels: bytes, height: int, width: int) -> bytes:
    rgba = np.frombuffer(pixels, np.uint8).reshape(height, width, 4)
    has_alpha = rgba[..., 3].min() < 255
    buffer = io.BytesIO()
    Image.fromarray(rgba if has_alpha else np.ascontiguousarray(rgba[..., :3])).save(
        buffer, "WEBP", quality=WEBP_QUALITY, method=6
    )
    return buffer.getvalue()


def encode_texture(texture: np.ndarray) -> bytes:
    """WebP bytes of an RGBA texture; alpha is stored only where there is any. Many objects share textures: remembered."""
    return _webp(texture.tobytes(), *texture.shape[:2])


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def write_pool(path: Path, source: str, objects: list[PackedObject]) -> None:
    """Write one pool file; equal textures of different objects are stored once."""
    texture_ids: dict[bytes, int] = {}
    material_texture = []
    for item in objects:
        ids = np.array(
            [texture_ids.setdefault(texture, len(texture_ids)) for texture in item.textures] + [-1], np.int32
        )
        material_texture.append(ids[item.material_texture])
    textures = list(texture_ids)
    np.savez(
        path,
        format_version=np.int32(FORMAT_VERSION),
        source=np.array(source),
        names=np.array([item.name for item in objects]),
        keys=np.array([item.key for item in objects]),
        categories=np.array([item.category for item in objects]),
        licenses=np.array([item.license for item in objects]),
        authors=np.array([item.author for item in objects]),
        splits=np.array([item.split for item in objects]),
        n_faces=np.array([item.n_faces for item in objects], np.int32),
        geometry=np.frombuffer(b"".join(item.geometry for item in objects), np.uint8),
        geometry_offset=_offsets([len(item.geometry) for item in objects]),
        material_rgba=np.concatenate([item.material_rgba for item in objects]),
        material_texture=np.concatenate(material_texture),
        material_offset=_offsets([len(item.material_rgba) for item in objects]),
        texture_bytes=np.frombuffer(b"".join(textures), np.uint8),
        texture_offset=_offsets([len(texture) for texture in textures]),
    )
