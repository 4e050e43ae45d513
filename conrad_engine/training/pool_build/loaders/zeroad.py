"""0 A.D.: actor XML (random variants, props at attach points), PMD meshes in bind pose, DDS skins."""

from __future__ import annotations

import random
import struct
import xml.etree.ElementTree as ET
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..meshes import Candidate, Material, Mesh, read_image, shrunk_texture
from ..unpack import unpack_0ad

SOURCE = "0ad"
LICENSE = "CC-BY-SA-3.0"
PLAYER_COLOR = (40, 70, 170)
MAX_DEPTH = 2
"""Props of props are kept, deeper ones are not."""


def candidates(sources: Path, work: Path) -> list[Candidate]:
    """Every actor except particles."""
    art = unpack_0ad(sources, work / SOURCE)
    found = []
    for path in sorted((art / "actors").rglob("*.xml")):
        parts = path.relative_to(art / "actors").parts
        if parts[0] not in ("particle", "common", "labels"):
            category = "/".join(parts[:2]) if parts[0] == "props" and len(parts) > 2 else parts[0]
            name = " ".join([*parts[1:-1], path.stem])
            found.append(Candidate(SOURCE, "/".join(parts), name, category, path, LICENSE, "Wildfire Games"))
    return found


@dataclass(frozen=True)
class _Skeleton:
    """A PMD file: triangles, bind pose bones and attach points, in the file's own axes."""

    vertices: np.ndarray
    uvs: np.ndarray
    faces: np.ndarray
    bones: np.ndarray
    """(n_bones, 7): position, quaternion x, y, z, w."""
    attach_points: dict[str, tuple[np.ndarray, int]]
    """Position and quaternion, bone number (255: none)."""


@lru_cache(maxsize=512)
def read_pmd(path: Path) -> _Skeleton:
    """A mesh file."""
    data = path.read_bytes()
    if data[:4] != b"PSMD":
        raise ValueError(f"{path.name} is not a PMD file")
    version, _, n_vertices = struct.unpack_from("<III", data, 4)
    cursor, n_uvs = 16, 1
    if version >= 4:
        (n_uvs,) = struct.unpack_from("<I", data, cursor)
        cursor += 4
    layout = np.dtype(
        [
            ("position", "<f4", 3),
            ("normal", "<f4", 3),
            ("uv", "<f4", (n_uvs, 2)),
            ("bones", "u1", 4),
            ("weights", "<f4", 4),
        ]
    )
    records = np.frombuffer(data, layout, n_vertices, cursor)
    cursor += layout.itemsize * n_vertices
    (n_faces,) = struct.unpack_from("<I", data, cursor)
    faces = np.frombuffer(data, "<u2", 3 * n_faces, cursor + 4).reshape(-1, 3).astype(int)
    cursor += 4 + 6 * n_faces
    (n_bones,) = struct.unpack_from("<I", data, cursor)
    bones = np.frombuffer(data, "<f4", 7 * n_bones, cursor + 4).reshape(-1, 7).astype(float)
    cursor += 4 + 28 * n_bones
    attach_points = {}
    if version >= 2 and cursor + 4 <= len(data):
        (count,) = struct.unpack_from("<I", data, cursor)
        cursor += 4
        for _ in range(count):
            (length,) = struct.unpack_from("<I", data, cursor)
            name = data[cursor + 4 : cursor + 4 + length].decode()
            cursor += 4 + length
            attach_points[name] = (np.frombuffer(data, "<f4", 7, cursor).astype(float), data[cursor + 28])
            cursor += 29
    return _Skeleton(records["position"].astype(float), records["uv"][:, 0].astype(float), faces, bones, attach_points)


def _rotation(quaternion: np.ndarray) -> np.ndarray:
    x, y, z, w = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


@dataclass
class _Look:
    """What the chosen variants of an actor add up to."""

    mesh: str = ""
    texture: str = ""
    color: tuple[float, ...] | None = None
    props: list[tuple[str, str]] = field(default_factory=list)
    """(attach point, actor)."""


@lru_cache(maxsize=4096)
def _parse(path: Path) -> ET.Element:
    return ET.parse(path).getroot()


def _apply_variant(look: _Look, variant: ET.Element, art: Path, depth: int = 0) -> None:
    """Later variants win; a variant that names an attach point clears what hung there before."""
    if variant.get("file") and depth < 4 and (art / "variants" / variant.get("file")).is_file():
        _apply_variant(look, _parse(art / "variants" / variant.get("file")), art, depth + 1)
    look.mesh = (variant.findtext("mesh") or look.mesh).strip()
    if color := variant.findtext("color"):
        look.color = tuple(float(word) / 255 for word in color.split()[:3])
    for texture in variant.iterfind("textures/texture"):
        if texture.get("name") == "baseTex":
            look.texture = texture.get("file", "")
    look.texture = (variant.findtext("texture") or look.texture).strip()
    props = [(prop.get("attachpoint", ""), prop.get("actor", "")) for prop in variant.iterfind("props/prop")]
    cleared = {attach_point for attach_point, _ in props}
    look.props = [prop for prop in look.props if prop[0] not in cleared] + [prop for prop in props if prop[1]]


def _find(folder: Path, name: str, suffixes: tuple[str, ...]) -> Path | None:
    stem = name.rsplit(".", 1)[0]
    spellings = [name + suffix for suffix in suffixes] + [
        stem + kind + suffix for kind in (".dae", ".pmd", ".png", ".dds") for suffix in suffixes
    ]
    return next((folder / spelling for spelling in spellings if (folder / spelling).is_file()), None)


@lru_cache(maxsize=1024)
def _skin(path: Path, material: str, color: tuple[float, ...] | None) -> np.ndarray | None:
    """A texture as the game shows it: its alpha is a mask for player or object color, or a cut-out."""
    rgba = read_image(path)
    if rgba is None:
        return None
    has_mask = "player" in material or ("objectcolor" in material and color is not None)
    if "trans" in material and not has_mask:
        return shrunk_texture(rgba)
    rgba = rgba.copy()
    if has_mask:
        tint = np.array(PLAYER_COLOR if "player" in material else [255 * c for c in color], float)
        mask = 1 - rgba[..., 3:].astype(float) / 255
        # Half of the skin's own shading stays visible through the paint.
        painted = 0.5 * rgba[..., :3] + 0.5 * tint if "player" in material else rgba[..., :3] * tint / 255
        rgba[..., :3] = (rgba[..., :3] * (1 - mask) + painted * mask).clip(0, 255)
    rgba[..., 3] = 255
    return shrunk_texture(rgba)


@dataclass
class _Part:
    vertices: np.ndarray
    skeleton: _Skeleton
    material: Material


def _parts(path: Path, art: Path, rng: random.Random, depth: int = 0) -> list[_Part]:
    """The actor's mesh and those of its props, placed by the bind pose."""
    root = _parse(path)
    if root.tag == "qualitylevels":
        # The last entry is the best quality: another file, the shared 'inline' element, or the actor itself.
        best = root.findall("actor")[-1]
        if best.get("file"):
            return _parts(art / "actors" / best.get("file"), art, rng, depth)
        root = root.find("inline") if "inline" in best.attrib else best
    look, material = _Look(), root.findtext("material") or ""
    for group in root.iterfind("group"):
        variants = group.findall("variant")
        weights = [float(variant.get("frequency") or 0) for variant in variants]
        if variants:
            _apply_variant(look, rng.choices(variants, weights)[0] if sum(weights) > 0 else variants[0], art)
    mesh_file = _find(art / "meshes", look.mesh, (".cached.pmd", "")) if look.mesh else None
    if mesh_file is None:
        return []
    skeleton = read_pmd(mesh_file)
    skin_file = _find(art / "textures" / "skins", look.texture, (".cached.dds", "")) if look.texture else None
    skin = _skin(skin_file, material, look.color) if skin_file else None
    parts = [
        _Part(
            skeleton.vertices,
            skeleton,
            Material((1.0, 1.0, 1.0) if skin is not None else (0.6, 0.6, 0.6), 1.0, skin, skin_file),
        )
    ]
    for attach_point, actor in look.props if depth < MAX_DEPTH else []:
        if not (art / "actors" / actor).is_file():
            continue
        rotation, offset = np.eye(3), np.zeros(3)
        if attach_point != "root":
            found = skeleton.attach_points.get(attach_point) or skeleton.attach_points.get(f"prop-{attach_point}")
            if found is None:
                continue
            placement, bone_id = found
            rotation, offset = _rotation(placement[3:]), placement[:3]
            if bone_id != 255 and bone_id < len(skeleton.bones):
                bone = skeleton.bones[bone_id]
                rotation, offset = _rotation(bone[3:]) @ rotation, _rotation(bone[3:]) @ offset + bone[:3]
        for part in _parts(art / "actors" / actor, art, rng, depth + 1):
            parts.append(_Part(part.vertices @ rotation.T + offset, part.skeleton, part.material))
    return parts


def load(candidate: Candidate) -> Mesh:
    """An actor with props; its random variants depend on its name only."""
    art = next(parent for parent in candidate.path.parents if parent.name == "art")
    parts = _parts(candidate.path, art, random.Random(zlib.crc32(candidate.key.encode())))
    if not parts:
        raise ValueError(f"{candidate.key} has no mesh")
    first_vertex = np.cumsum([0, *(len(part.vertices) for part in parts)])
    vertices = np.concatenate([part.vertices for part in parts])
    faces = np.concatenate([part.skeleton.faces + first for part, first in zip(parts, first_vertex)])
    uvs = np.concatenate([part.skeleton.uvs[part.skeleton.faces] for part in parts])
    face_materials = np.repeat(np.arange(len(parts)), [len(part.skeleton.faces) for part in parts])
    # Swapping y and z turns left-handed +Y up into right-handed +Z up; it mirrors, so the winding turns too.
    return Mesh(vertices[:, [0, 2, 1]], faces[:, ::-1], uvs[:, ::-1], face_materials, [part.material for part in parts])
