"""Sweet Home 3D furniture catalogues: OBJ + MTL, +Y up, front towards +Z, indexed by a properties file."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..meshes import Candidate, Material, Mesh, load_texture, triangulate_all, y_up_to_z_up
from ..unpack import unpack_furniture

SOURCE = "sweethome3d"
LICENSES = {
    "BlendSwap-CC-0": "CC0-1.0",
    "BlendSwap-CC-BY": "CC-BY-3.0",
    "KatorLegaz": "CC-BY-3.0-US",
    "Reallusion": "CC-BY-3.0-US",
    "Scopia": "CC-BY-3.0",
}
MIN_GLASS_ALPHA = 0.4
"""Clear glass would leave nothing to see on a transparent background."""


def candidates(sources: Path, work: Path) -> list[Candidate]:
    """Every catalogue entry with a model."""
    root = unpack_furniture(sources, work / SOURCE)
    found = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        properties = (folder / "PluginFurnitureCatalog.properties").read_text(encoding="latin-1")
        entries: dict[str, dict[str, str]] = defaultdict(dict)
        for name, number, value in re.findall(r"^(\w+)#(\d+)\s*=\s*(.*?)\s*$", properties, re.MULTILINE):
            entries[number][name] = re.sub(r"\\u([0-9a-fA-F]{4})", lambda code: chr(int(code[1], 16)), value)
        for entry in entries.values():
            path = folder / entry["model"].lstrip("/")
            rotation = (
                tuple(float(number) for number in entry["modelRotation"].split()) if "modelRotation" in entry else None
            )
            found.append(
                Candidate(
                    SOURCE,
                    f"{folder.name}/{path.parent.name}/{path.stem}",
                    entry["name"],
                    entry.get("category", ""),
                    path,
                    LICENSES[folder.name],
                    entry.get("creator", ""),
                    rotation,
                )
            )
    return found


@lru_cache(maxsize=4)
def _files_by_name(folder: Path) -> dict[str, Path]:
    return {path.name.lower(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _find(folder: Path, name: str) -> Path | None:
    """A file named in an OBJ or MTL: exact, else by its base name in any case, else its last word."""
    name = name.replace("\\", "/").strip().strip('"')
    if (folder / name).is_file():
        return folder / name
    files = _files_by_name(folder)
    for spelling in (name, name.split()[-1] if name.split() else name):
        if (base := spelling.rsplit("/", 1)[-1].lower()) in files:
            return files[base]
    return None


def read_mtl(path: Path) -> dict[str, Material]:
    """Materials by name: diffuse color, opacity, diffuse map."""
    materials: dict[str, Material] = {}
    current = Material()
    for line in path.read_text(errors="replace").splitlines():
        words = line.split()
        if not words:
            continue
        keyword = words[0].lower()
        if keyword == "newmtl":
            current = materials[" ".join(words[1:])] = Material()
        elif keyword == "kd" and len(words) >= 4:
            current.color = tuple(min(max(float(word), 0.0), 1.0) for word in words[1:4])
        elif keyword == "d":
            current.alpha = min(max(float(words[-1]), 0.0), 1.0)
        elif keyword == "map_kd" and len(words) > 1:
            current.file = _find(path.parent, line.strip().split(None, 1)[1])
            current.texture = load_texture(current.file) if current.file else None
    for material in materials.values():
        material.alpha = max(material.alpha, MIN_GLASS_ALPHA)
        if material.texture is not None:
            material.color = (1.0, 1.0, 1.0)
    return materials


def read_obj(path: Path) -> Mesh:
    """A mesh in the file's own axes."""
    positions: list[list[str]] = []
    uvs: list[list[str]] = []
    polygons: list[list[int]] = []
    polygon_uvs: list[list[int]] = []
    polygon_materials: list[int] = []
    names: dict[str, int] = {}
    library: dict[str, Material] = {}
    material = -1
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("v "):
            positions.append(line.split()[1:4])
        elif line.startswith("vt "):
            uvs.append((line.split()[1:] + ["0"])[:2])
        elif line.startswith("f "):
            if material < 0:
                material = names.setdefault("", len(names))
            corners = [(word.split("/") + [""])[:2] for word in line.split()[1:]]
            if len(corners) >= 3:
                polygons.append([int(v) - 1 if int(v) > 0 else len(positions) + int(v) for v, _ in corners])
                polygon_uvs.append([(int(t) - 1 if int(t) > 0 else len(uvs) + int(t)) if t else -1 for _, t in corners])
                polygon_materials.append(material)
        elif line.startswith("usemtl"):
            material = names.setdefault(line[6:].strip(), len(names))
        elif line.startswith("mtllib") and (found := _find(path.parent, line[6:])):
            library.update(read_mtl(found))
    vertices = np.array(positions, float).reshape(-1, 3)
    texture_points = np.array([*uvs, ["0", "0"]], float)
    owners, places = triangulate_all(vertices, polygons)
    faces = np.array(
        [[polygons[owner][k] for k in corner] for owner, corner in zip(owners.tolist(), places.tolist())], int
    ).reshape(-1, 3)
    uv_ids = np.array(
        [[polygon_uvs[owner][k] for k in corner] for owner, corner in zip(owners.tolist(), places.tolist())], int
    ).reshape(-1, 3)
    materials = [library.get(name, Material()) for name in names]
    return Mesh(vertices, faces, texture_points[uv_ids], np.array(polygon_materials, int)[owners], materials)


def load(candidate: Candidate) -> Mesh:
    """A catalogue model, turned as its catalogue entry says."""
    mesh = read_obj(candidate.path)
    if candidate.rotation:
        mesh.vertices = mesh.vertices @ np.array(candidate.rotation).reshape(3, 3).T
    mesh.vertices = y_up_to_z_up(mesh.vertices)
    return mesh
