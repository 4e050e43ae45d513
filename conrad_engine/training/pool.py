"""Reads the packed mesh pool: one `.npz` a source, decoded object by object. Needs numpy and Pillow only.

    pool = Pool("pool_sweethome3d.npz")
    for index in pool.indices("train"):
        mesh = pool.mesh(index)

Arrays of a file (N objects, M materials and T textures over all objects):
    names, keys, categories, licenses, authors, splits   (N,) text; `keys` are stable and unique
    source                                               () text
    geometry, geometry_offset                            (bytes,) and (N + 1,): one compressed block an object
    material_rgba, material_texture, material_offset     (M, 4) 8-bit, (M,) texture or -1, (N + 1,)
    texture_bytes, texture_offset                        (bytes,) WebP files, (T + 1,)
A surface's color is material_rgba * texture * vertex color, sRGB, straight alpha.
"""

from __future__ import annotations

import io
import lzma
import zipfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InputError

FORMAT_VERSION = 1
LZMA_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 20, "lc": 3, "lp": 0, "pb": 0}
]
POSITION_STEPS = 65535
"""Grid steps along the longest side of an object."""
HEADER_FIELDS = 5
"""n_vertices, n_faces, n_materials, has_colors, uv_exponent; 32-bit each."""


@dataclass
class PoolMesh:
    """One object: +Z up, longest side 1, box centered on the origin."""

    vertices: np.ndarray
    """(n_vertices, 3) float32."""
    faces: np.ndarray
    """(n_faces, 3) int32, counterclockwise from outside where the source was consistent; render two-sided."""
    uvs: np.ndarray
    """(n_vertices, 2) float32, v up, repeating outside [0, 1]."""
    face_materials: np.ndarray
    """(n_faces,) int32."""
    material_rgba: np.ndarray
    """(n_materials, 4) float32 in [0, 1], sRGB."""
    material_texture: np.ndarray
    """(n_materials,) int32, index into `textures` or -1."""
    textures: list[np.ndarray] = field(default_factory=list)
    """(height, width, 4) uint8, row 0 on top."""
    vertex_colors: np.ndarray | None = None
    """(n_vertices, 3) float32 in [0, 1], or None."""


def decode_geometry(block: bytes) -> dict[str, np.ndarray | None]:
    """Inverse of `pool_build.packing.encode_geometry`: vertices, uvs, faces, face_materials, vertex_colors."""
    raw = np.frombuffer(lzma.decompress(block, lzma.FORMAT_RAW, filters=LZMA_FILTERS), np.uint8)
    n_vertices, n_faces, n_materials, has_colors, uv_exponent = raw[: 4 * HEADER_FIELDS].view("<i4")
    cursor = 4 * HEADER_FIELDS

    def take(count: int, n_bytes: int) -> np.ndarray:
        """`count` unsigned integers, stored as planes of equally significant bytes."""
        nonlocal cursor
        planes = raw[cursor : cursor + count * n_bytes].reshape(n_bytes, count)
        cursor += count * n_bytes
        return sum(planes[k].astype(np.int64) << (8 * k) for k in range(n_bytes))

    def take_deltas(n_columns: int) -> np.ndarray:
        """Columns of 16-bit numbers, stored as zigzag-coded differences from row to row."""
        codes = take(n_columns * n_vertices, 2).reshape(n_columns, n_vertices)
        return np.cumsum((codes >> 1) ^ -(codes & 1), axis=1).T

    positions = take_deltas(3) & 0xFFFF
    uvs = ((take_deltas(2) + 0x8000) & 0xFFFF) - 0x8000
    # A face index is stored as its distance below the next unused vertex, so code 0 introduces that vertex.
    codes = take(3 * n_faces, 4)
    is_new = codes == 0
    faces = np.cumsum(is_new) - is_new - codes
    face_counts = take(n_materials, 4)
    colors = take(3 * n_vertices, 1).reshape(3, n_vertices).T / 255 if has_colors else None
    return {
        "vertices": (positions / POSITION_STEPS - 0.5).astype(np.float32),
        "uvs": (uvs * 2.0 ** int(uv_exponent)).astype(np.float32),
        "faces": faces.reshape(-1, 3).astype(np.int32),
        "face_materials": np.repeat(np.arange(n_materials, dtype=np.int32), face_counts),
        "vertex_colors": None if colors is None else colors.astype(np.float32),
    }


class Pool:
    """One pool file. May be handed to worker processes; each decodes what it asks for."""

    def __init__(self, path: str | Path) -> None:
        """Read the index.

        Raises:
            InputError: The file is missing, damaged or of another format.
        """
        self.path = Path(path)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                self._arrays = {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"the mesh pool {path} cannot be read ({error}): build it again") from None
        version = int(self._arrays.get("format_version", -1))
        if version != FORMAT_VERSION:
            raise InputError(
                f"the mesh pool {path} has format {version}, this reader knows {FORMAT_VERSION}: build it again"
            )
        self.source = str(self._arrays["source"])
        self.names, self.keys, self.categories, self.licenses, self.authors, self.splits = (
            self._arrays[name] for name in ("names", "keys", "categories", "licenses", "authors", "splits")
        )
        self._texture = lru_cache(maxsize=512)(self._decode_texture)

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> tuple:
        """Pickled as its path: a worker process opens the file again."""
        return Pool, (self.path,)

    def indices(self, split: str) -> np.ndarray:
        """Object numbers of 'train' or 'val'."""
        return np.flatnonzero(self.splits == split)

    def _slice(self, name: str, index: int) -> slice:
        offset = self._arrays[f"{name}_offset"]
        return slice(int(offset[index]), int(offset[index + 1]))

    def _decode_texture(self, index: int) -> np.ndarray:
        encoded = self._arrays["texture_bytes"][self._slice("texture", index)].tobytes()
        return np.array(Image.open(io.BytesIO(encoded)).convert("RGBA"))

    def mesh(self, index: int) -> PoolMesh:
        """Decode one object (a few milliseconds)."""
        geometry = decode_geometry(self._arrays["geometry"][self._slice("geometry", index)].tobytes())
        materials = self._slice("material", index)
        texture_ids = self._arrays["material_texture"][materials]
        used = np.unique(texture_ids[texture_ids >= 0])
        local = np.searchsorted(used, texture_ids)
        return PoolMesh(
            **geometry,
            material_rgba=self._arrays["material_rgba"][materials].astype(np.float32) / 255,
            material_texture=np.where(texture_ids >= 0, local, -1).astype(np.int32),
            textures=[self._texture(int(texture)) for texture in used],
        )
