"""Mesh files: GLB, OBJ and PLY of results, and any mesh a user brings.

Inside, +Z is up. glTF and, by custom, OBJ are +Y up: (x, y, z) becomes (x, z, -y) in the file, so that importers with their
default axes show the object upright. PLY has no such custom and stays as it is.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..errors import InputError
from ..files import write_atomic
from .mesh import Mesh, TexturedMesh, vertex_normals
from .raster import sample_texture

if TYPE_CHECKING:
    import trimesh

MAX_FACES = 2_000_000
Y_UP = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float64)
"""Rows: where x, y and z of a file come from."""
TO_Y_UP, TO_Z_UP = Y_UP, Y_UP.T
Y_UP_KINDS = ("glb", "gltf", "obj")
KINDS = (*Y_UP_KINDS, "ply", "stl")
ROUGHNESS = 0.9


def png_bytes(texture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(texture).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def write_texture(texture: np.ndarray, path: Path) -> None:
    """(height, width, 3 or 4) uint8 as PNG."""
    write_atomic(path, png_bytes(texture))


def write_glb(mesh: TexturedMesh, path: Path, name: str = "object") -> None:
    """One node, one material, the texture inside.

    Raises:
        InputError: The file cannot be written.
    """
    write_atomic(path, glb_bytes(mesh, name))


def load_writer() -> None:
    """Import what `write_glb` needs: up to a second, for which a thread finds time while others compute outside of Python."""
    import trimesh  # noqa: F401


def glb_bytes(mesh: TexturedMesh, name: str = "object") -> bytes:
    import trimesh

    image = Image.fromarray(mesh.texture)
    material = trimesh.visual.material.PBRMaterial(
        name=name, baseColorTexture=image, metallicFactor=0.0, roughnessFactor=ROUGHNESS, doubleSided=False
    )
    body = trimesh.Trimesh(
        vertices=mesh.vertices @ TO_Y_UP.T,
        faces=mesh.faces,
        vertex_normals=mesh.normals @ TO_Y_UP.T,
        visual=trimesh.visual.TextureVisuals(uv=mesh.uvs, material=material),
        process=False,
    )
    scene = trimesh.Scene()
    scene.add_geometry(body, node_name=name, geom_name=name)
    return scene.export(file_type="glb", include_normals=True)


def write_obj(mesh: TexturedMesh, path: Path, name: str = "object") -> None:
    """OBJ beside its MTL, which names `texture.png` in the same folder (see `write_texture`).

    Raises:
        InputError: A file cannot be written.
    """
    material = path.with_suffix(".mtl")
    write_atomic(material, b"newmtl picture\nKa 0 0 0\nKd 1 1 1\nKs 0 0 0\nmap_Kd texture.png\n")
    name = name.replace("\n", " ") or "object"
    text = f"mtllib {material.name}\no {name}\nusemtl picture\n"
    for word, rows in (("v", mesh.vertices @ TO_Y_UP.T), ("vt", mesh.uvs), ("vn", mesh.normals @ TO_Y_UP.T)):
        # One format of all the numbers: a third of the time of one a line.
        text += f"{word}{' %.6g' * rows.shape[1]}\n" * len(rows) % tuple(rows.ravel().tolist())
    text += "f %d/%d/%d %d/%d/%d %d/%d/%d\n" * len(mesh.faces) % tuple(np.repeat(mesh.faces + 1, 3).tolist())
    write_atomic(path, text.encode())


def write_ply(mesh: TexturedMesh, path: Path) -> None:
    """Binary PLY with normals, texture coordinates and the texture's color at every vertex.

    Raises:
        InputError: The file cannot be written.
    """
    colors = sample_texture(mesh.texture, mesh.uvs).round().astype(np.uint8)
    fields = [(axis, "<f4") for axis in ("x", "y", "z", "nx", "ny", "nz", "s", "t")]
    vertices = np.empty(len(mesh.vertices), [*fields, ("red", "u1"), ("green", "u1"), ("blue", "u1")])
    values = np.concatenate([mesh.vertices, mesh.normals, mesh.uvs], 1)
    for column, (field, _) in enumerate(fields):
        vertices[field] = values[:, column]
    for column, field in enumerate(("red", "green", "blue")):
        vertices[field] = colors[:, column]
    faces = np.empty(len(mesh.faces), [("count", "u1"), ("corners", "<i4", 3)])
    faces["count"], faces["corners"] = 3, mesh.faces
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}"]
    header += [f"property float {field}" for field, _ in fields]
    header += [f"property uchar {field}" for field in ("red", "green", "blue")]
    header += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
    write_atomic(path, "\n".join(header).encode() + b"\n" + vertices.tobytes() + faces.tobytes())


def read_textured(source: Path | bytes) -> TexturedMesh:
    """A GLB with one textured mesh, as `write_glb` makes it.

    Raises:
        InputError: It cannot be read or has no texture.
    """
    body = _load(source, "glb")
    material = getattr(body.visual, "material", None)
    image = getattr(material, "baseColorTexture", None)
    if image is None or getattr(body.visual, "uv", None) is None:
        raise InputError(f"{_title(source)} has no texture; give a GLB that this program wrote")
    vertices, faces = (
        np.asarray(body.vertices, np.float32) @ TO_Z_UP.T.astype(np.float32),
        np.asarray(body.faces, np.int32),
    )
    return TexturedMesh(
        vertices,
        faces,
        np.asarray(body.visual.uv, np.float32),
        vertex_normals(vertices, faces),
        np.array(image.convert("RGB")),
    )


def load_mesh(source: Path | bytes, kind: str = "") -> Mesh:
    """Any mesh file's triangles, +Z up.

    Args:
        source: glb, gltf, obj, ply or stl; a path, or the bytes of one of them but gltf.
        kind: Of the bytes, if known; else it is told from them.

    Raises:
        InputError: It cannot be read, is empty, too large or has coordinates that are not finite.
    """
    body = _load(source, kind)
    vertices, faces = np.asarray(body.vertices, np.float64), np.asarray(body.faces, np.int64)
    kind = kind or _kind(source)
    if kind in Y_UP_KINDS:
        vertices = vertices @ TO_Z_UP.T
    if not len(faces):
        raise InputError(f"{_title(source)} has no triangles; give a mesh with faces")
    if len(faces) > MAX_FACES:
        raise InputError(f"{_title(source)} has {len(faces):,} triangles; reduce it to {MAX_FACES:,} at most")
    if not np.isfinite(vertices).all():
        raise InputError(f"{_title(source)} has coordinates that are not finite; repair it first")
    return Mesh(vertices.astype(np.float32), faces.astype(np.int32))


def _title(source: Path | bytes) -> str:
    return "the mesh" if isinstance(source, bytes) else str(source)


def _kind(source: Path | bytes) -> str:
    if not isinstance(source, bytes):
        return Path(source).suffix.lower().lstrip(".")
    if source[:4] == b"glTF":
        return "glb"
    if source[:3] == b"ply":
        return "ply"
    head = source[:4096]
    if any(line.split(b" ", 1)[0] in (b"v", b"o", b"mtllib") for line in head.splitlines()):
        return "obj"
    return "stl"


def _load(source: Path | bytes, kind: str) -> trimesh.Trimesh:
    kind = kind or _kind(source)
    if kind not in KINDS:
        raise InputError(f"{_title(source)}: meshes can be {', '.join(KINDS)}, not {kind or 'without a suffix'}")
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise InputError(f"{source} does not exist; give the path of a mesh file")
    import trimesh

    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        body = trimesh.load(file, file_type=kind, force="mesh", process=False)
    except Exception as error:  # the readers of a dozen formats raise whatever they meet
        raise InputError(
            f"{_title(source)} cannot be read as {kind}: {str(error)[:120] or type(error).__name__}"
        ) from None
    if not isinstance(body, trimesh.Trimesh):
        raise InputError(f"{_title(source)} has no triangles; give a mesh with faces")
    return body
