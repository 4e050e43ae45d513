"""SuperTuxKart: SPM binary meshes (left-handed, +Y up, v downwards), shaders in materials.xml, licenses a file."""

from __future__ import annotations

import re
import struct
import xml.etree.ElementTree as ET
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..licenses import Stanza, read_copyright, stanza_of
from ..meshes import Candidate, Material, Mesh, load_texture

SOURCE = "supertuxkart"
DATA = Path("supertuxkart-data/usr/share/games/supertuxkart/data")
COPYRIGHT = Path("supertuxkart-data/usr/share/doc/supertuxkart-data/copyright")
FOLDERS = ("library", "tracks", "karts", "models")
SHADERS_WITH_ALPHA = {"alphatest", "alphablend", "grass", "unlit"}
"""Other shaders keep gloss or color masks in the alpha channel."""


@lru_cache(maxsize=2)
def _stanzas(path: Path) -> list[Stanza]:
    return read_copyright(path)


def candidates(sources: Path, work: Path) -> list[Candidate]:
    """Every SPM file of the library, tracks, karts and models, wheels left out."""
    root = sources / DATA
    stanzas = _stanzas(sources / COPYRIGHT)
    found = []
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.spm")):
            key = path.relative_to(root).as_posix()
            parent = re.sub(r"^stklib_|_[a-z]$", "", path.parent.name)
            name = path.stem if folder in ("models", "karts") else f"{parent} {path.stem}"
            stanza = stanza_of(stanzas, f"data/{key}")
            license, author = (stanza.license, stanza.authors) if stanza else ("see package", "")
            found.append(Candidate(SOURCE, key, name, folder, path, license, author))
    return found


def texture_credit(sources: Path, file: Path) -> tuple[str, str]:
    """(license, authors) of a texture file."""
    stanza = stanza_of(_stanzas(sources / COPYRIGHT), f"data/{file.relative_to(sources / DATA).as_posix()}")
    return (stanza.license, stanza.authors) if stanza else ("see package", "")


@lru_cache(maxsize=2)
def _texture_index(root: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Texture files by lower-case name, and shaders by lower-case texture name (the common folder wins)."""
    files: dict[str, Path] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
            files.setdefault(path.name.lower(), path)
    shaders: dict[str, str] = {}
    for path in sorted(root.rglob("materials.xml"), key=lambda path: path.parent.name == "textures"):
        shaders.update(_shaders(path))
    return files, shaders


@lru_cache(maxsize=256)
def _shaders(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        return {
            node.get("name", "").lower(): node.get("shader", "solid")
            for node in ET.parse(path).getroot().iter("material")
        }
    except ET.ParseError:
        return {}


def _shader(name: str, folder: Path, root: Path) -> str:
    """The shader of a texture: the model's own materials.xml first, then any other."""
    return _shaders(folder / "materials.xml").get(name.lower()) or _texture_index(root)[1].get(name.lower(), "solid")


def _material(name: str, folder: Path, root: Path) -> Material:
    file = folder / name if name and (folder / name).is_file() else _texture_index(root)[0].get(name.lower())
    texture = load_texture(file, _shader(name, folder, root) in SHADERS_WITH_ALPHA) if file else None
    return Material((1.0, 1.0, 1.0) if texture is not None else (0.8, 0.8, 0.8), 1.0, texture, file)


def _read_vertices(
    data: bytes, cursor: int, count: int, layout: np.dtype, color_at: int | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Vertex records, colors (count, 3) in [0, 1], new cursor. A color takes 1 byte (128: white) or 4."""
    colors = np.ones((count, 3))
    if color_at is None:
        return np.frombuffer(data, layout, count, cursor), colors, cursor + layout.itemsize * count
    records = bytearray()
    for row in range(count):
        records += data[cursor : cursor + color_at]
        cursor += color_at
        if data[cursor] != 128:
            colors[row] = np.frombuffer(data, np.uint8, 3, cursor + 1) / 255
            cursor += 3
        cursor += 1
        records += data[cursor : cursor + layout.itemsize - color_at]
        cursor += layout.itemsize - color_at
    return np.frombuffer(bytes(records), layout, count), colors, cursor


def read_spm(path: Path, root: Path) -> Mesh:
    """A mesh in the file's own axes."""
    data = path.read_bytes()
    if data[:2] != b"SP" or data[2] >> 3 != 1:
        raise ValueError(f"{path.name} is not an SPM file of version 1")
    kind, flags = data[2] & 7, data[3]
    has_normals, has_colors, has_tangents = flags & 1, flags & 2, flags & 4
    cursor = 28
    (n_materials,) = struct.unpack_from("<H", data, cursor)
    cursor += 2
    texture_names = []
    for _ in range(2 * n_materials):
        length = data[cursor]
        texture_names.append(data[cursor + 1 : cursor + 1 + length].decode(errors="replace"))
        cursor += 1 + length
    (n_sectors,) = struct.unpack_from("<H", data, cursor)
    cursor += 2
    vertices, faces, uvs, colors, face_materials, n_vertices = [], [], [], [], [], 0
    for _ in range(n_sectors):
        (n_buffers,) = struct.unpack_from("<H", data, cursor)
        cursor += 2
        for _ in range(n_buffers):
            count, n_indices, material = struct.unpack_from("<IIH", data, cursor)
            cursor += 10
            first, second = texture_names[2 * material], texture_names[2 * material + 1]
            head = [("position", "<f4", 3)] + ([("normal", "<u4")] if has_normals else [])
            tail = [("uv", "<f2", 2)] if first else []
            tail += [("uv2", "<f2", 2)] if first and second else []
            tail += [("tangent", "<u4")] if first and has_tangents else []
            tail += [("joints", "<i2", 4), ("weights", "<f2", 4)] if kind == 1 else []
            color_at = np.dtype(head).itemsize if has_colors else None
            records, vertex_colors, cursor = _read_vertices(data, cursor, count, np.dtype(head + tail), color_at)
            index_type = np.dtype("<u2") if count > 255 else np.dtype("u1")
            index = np.frombuffer(data, index_type, n_indices, cursor).astype(int).reshape(-1, 3)
            cursor += index_type.itemsize * n_indices
            uv = records["uv"].astype(float) * (1, -1) + (0, 1) if first else np.zeros((count, 2))
            vertices.append(records["position"].astype(float))
            faces.append(index + n_vertices)
            uvs.append(uv[index])
            if _shader(first, path.parent, root) == "grass":  # there the color says how far the wind bends a leaf
                vertex_colors = np.ones_like(vertex_colors)
            colors.append(vertex_colors[index])
            face_materials.append(np.full(len(index), material))
            n_vertices += count
        if kind == 0:
            cursor += 24  # bounding box
    materials = [_material(name, path.parent, root) for name in texture_names[::2]]
    return Mesh(
        np.concatenate(vertices),
        np.concatenate(faces),
        np.concatenate(uvs),
        np.concatenate(face_materials),
        materials,
        np.concatenate(colors),
    )


def _joined(meshes: list[Mesh]) -> Mesh:
    first_vertex = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    first_material = np.cumsum([0, *(len(mesh.materials) for mesh in meshes)])
    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.faces + first for mesh, first in zip(meshes, first_vertex)]),
        np.concatenate([mesh.corner_uvs for mesh in meshes]),
        np.concatenate([mesh.face_materials + first for mesh, first in zip(meshes, first_material)]),
        [material for mesh in meshes for material in mesh.materials],
        np.concatenate([mesh.corner_colors for mesh in meshes]),
    )


def _wheels(kart: Path, root: Path) -> list[Mesh]:
    """The wheels of a kart, moved to the places that kart.xml gives."""
    description = kart.with_name("kart.xml")
    if not description.is_file():
        return []
    wheels = []
    for node in ET.parse(description).getroot().iterfind("wheels/*"):
        file = kart.with_name(node.get("model", ""))
        if file.is_file() and file.suffix == ".spm":
            wheel = read_spm(file, root)
            wheel.vertices = wheel.vertices + np.array(node.get("position", "0 0 0").split(), float)
            wheels.append(wheel)
    return wheels


def load(candidate: Candidate) -> Mesh:
    """A model; karts get their wheels."""
    root = next(parent for parent in candidate.path.parents if parent.name == "data")
    mesh = read_spm(candidate.path, root)
    if candidate.category == "karts":
        mesh = _joined([mesh, *_wheels(candidate.path, root)])
    # Swapping y and z turns left-handed +Y up into right-handed +Z up; it mirrors, so the winding turns too.
    mesh.vertices = mesh.vertices[:, [0, 2, 1]]
    mesh.faces = mesh.faces[:, ::-1]
    mesh.corner_uvs = mesh.corner_uvs[:, ::-1]
    mesh.corner_colors = mesh.corner_colors[:, ::-1]
    return mesh
