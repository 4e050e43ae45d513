"""FlightGear scenery models: AC3D text files (+Y up, noses mostly towards -X), textures beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..meshes import Candidate, Material, Mesh, load_texture, triangulate, y_up_to_z_up

SOURCE = "flightgear"
MODELS = Path("flightgear-data-base/usr/share/games/flightgear/Scenery/Models")
MIN_GLASS_ALPHA = 0.4


def candidates(sources: Path, work: Path) -> list[Candidate]:
    """Every AC3D file of the shared scenery models."""
    root = sources / MODELS
    return [
        Candidate(
            SOURCE,
            path.relative_to(root).as_posix(),
            path.stem,
            path.relative_to(root).parts[0],
            path,
            "GPL-2.0-or-later",
            "FlightGear team and scenery contributors",
        )
        for path in sorted(root.glob("*/*.ac"))
    ]


class _Reader:
    """Recursive reader of AC3D objects; collects triangles in world coordinates."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.lines = path.read_text(errors="replace").splitlines()
        self.cursor = 0
        self.palette: list[tuple[tuple[float, ...], float]] = []
        self.vertices: list[np.ndarray] = []
        self.n_vertices = 0
        self.faces: list[tuple[int, ...]] = []
        self.uvs: list[np.ndarray] = []
        self.face_materials: list[int] = []
        self.materials: list[Material] = []
        self.material_ids: dict[tuple[int, str], int] = {}

    def read(self) -> None:
        """Palette first, then the root object."""
        while self.cursor < len(self.lines):
            line = self.lines[self.cursor].strip()
            self.cursor += 1
            if line.startswith("MATERIAL"):
                color = tuple(float(word) for word in line.split(" rgb ")[1].split()[:3])
                transparency = float(line.split(" trans ")[1].split()[0]) if " trans " in line else 0.0
                self.palette.append((color, max(1 - transparency, MIN_GLASS_ALPHA)))
            elif line.startswith("OBJECT"):
                self._read_object(np.eye(3), np.zeros(3))

    def _material(self, index: int, texture: str) -> int:
        if (index, texture) not in self.material_ids:
            name = texture.replace("\\", "/")
            found = [
                path
                for path in (self.folder / name, self.folder / name.rsplit("/", 1)[-1])
                if texture and path.is_file()
            ]
            pixels = load_texture(found[0]) if found else None
            color, alpha = self.palette[index] if index < len(self.palette) else ((0.8, 0.8, 0.8), 1.0)
            # The simulator multiplies the palette color in, but most models mean plain white where they have a texture.
            self.material_ids[index, texture] = len(self.materials)
            self.materials.append(
                Material((1.0, 1.0, 1.0) if pixels is not None else color, alpha, pixels, found[0] if found else None)
            )
        return self.material_ids[index, texture]

    def _read_object(self, rotation: np.ndarray, offset: np.ndarray) -> None:
        texture, repeat, shift = "", np.ones(2), np.zeros(2)
        local_rotation, local_offset = np.eye(3), np.zeros(3)
        vertices, first = np.zeros((0, 3)), 0
        kind = material = 0
        while self.cursor < len(self.lines):
            words = self.lines[self.cursor].split()
            self.cursor += 1
            if not words:
                continue
            match words[0]:
                case "texture":
                    line = self.lines[self.cursor - 1]
                    texture = line.split('"')[1] if '"' in line else words[1]
                case "texrep":
                    repeat = np.array(words[1:3], float)
                case "texoff":
                    shift = np.array(words[1:3], float)
                case "loc":
                    local_offset = np.array(words[1:4], float)
                case "rot":
                    local_rotation = np.array(words[1:10], float).reshape(3, 3).T
                case "data":
                    self.cursor += 1
                case "numvert":
                    count = int(words[1])
                    rows = [line.split()[:3] for line in self.lines[self.cursor : self.cursor + count]]
                    self.cursor += count
                    vertices = (
                        np.array(rows, float).reshape(-1, 3) @ local_rotation.T + local_offset
                    ) @ rotation.T + offset
                    first = self.n_vertices
                    self.vertices.append(vertices)
                    self.n_vertices += count
                case "SURF":
                    kind, material = int(words[1], 16), 0
                case "mat":
                    material = int(words[1])
                case "refs":
                    count = int(words[1])
                    refs = np.array(
                        [line.split()[:3] for line in self.lines[self.cursor : self.cursor + count]], float
                    ).reshape(-1, 3)
                    self.cursor += count
                    if kind & 0xF == 0 and count >= 3:  # 1 and 2 are lines
                        self._add_polygon(
                            vertices, first, refs, refs[:, 1:] * repeat + shift, self._material(material, texture)
                        )
                case "kids":
                    for _ in range(int(words[1])):
                        while self.cursor < len(self.lines) and not self.lines[self.cursor].startswith("OBJECT"):
                            self.cursor += 1
                        self.cursor += 1
                        self._read_object(rotation @ local_rotation, rotation @ local_offset + offset)
                    return

    def _add_polygon(self, vertices: np.ndarray, first: int, refs: np.ndarray, uvs: np.ndarray, material: int) -> None:
        index = refs[:, 0].astype(int)
        for corners in triangulate(vertices[index]):
            self.faces.append(tuple(int(index[k]) + first for k in corners))
            self.uvs.append(uvs[list(corners)])
            self.face_materials.append(material)


def load(candidate: Candidate) -> Mesh:
    """A scenery model."""
    reader = _Reader(candidate.path)
    reader.read()
    if not reader.faces:
        raise ValueError(f"{candidate.key} has no polygons")
    vertices = y_up_to_z_up(np.concatenate(reader.vertices))
    return Mesh(
        vertices, np.array(reader.faces), np.array(reader.uvs), np.array(reader.face_materials), reader.materials
    )
