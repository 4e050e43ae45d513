"""Fewer triangles with UVs and material borders kept: quadric edge collapse, one material at a time."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import MissingDependency
from ..raster import Rasterizer, default_light, orbit_camera
from .meshes import Mesh, select_faces
from .packing import index_mesh

try:
    import pymeshlab
except ImportError:
    raise MissingDependency("building the mesh pool needs pymeshlab: pip install 'conrad-engine[training]'") from None

TARGET_FACES = 6000
MOST_FACES = 12000
"""Allowed where fewer faces would show."""
LEAST_OVERLAP = 0.955
"""Intersection over union of the silhouettes before and after, worst of four views."""
LARGEST_COLOR_ERROR = 0.045
"""Mean absolute difference on the common silhouette, [0, 1], worst of four views."""


def _add_textured(meshes: pymeshlab.MeshSet, vertices: np.ndarray, faces: np.ndarray, uvs: np.ndarray) -> None:
    """Hand a mesh with corner UVs over as an OBJ file: set from arrays, UVs count as having no texture."""
    points, ids = np.unique(np.round(uvs.reshape(-1, 2), 6), axis=0, return_inverse=True)
    ids = ids.reshape(-1, 3) + 1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.obj"
        Image.new("RGB", (4, 4)).save(file.with_suffix(".png"))
        file.with_suffix(".mtl").write_text("newmtl part\nmap_Kd part.png\n")
        lines = ["mtllib part.mtl", "usemtl part"]
        lines += [f"v {x:.9g} {y:.9g} {z:.9g}" for x, y, z in vertices]
        lines += [f"vt {u:.9g} {v:.9g}" for u, v in points]
        lines += [f"f {a}/{i} {b}/{j} {c}/{k}" for (a, b, c), (i, j, k) in zip(faces + 1, ids)]
        file.write_text("\n".join(lines))
        meshes.load_new_mesh(str(file))


def _collapsed(
    vertices: np.ndarray, faces: np.ndarray, uvs: np.ndarray | None, n_target: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices, faces and corner UVs of one material after edge collapse to about `n_target` faces."""
    used, local = np.unique(faces, return_inverse=True)
    local = local.reshape(-1, 3)
    meshes = pymeshlab.MeshSet(verbose=False)
    options = {"targetfacenum": n_target, "preserveboundary": True, "preservenormal": True, "qualitythr": 0.3}
    if uvs is None:
        meshes.add_mesh(pymeshlab.Mesh(vertices[used], local))
        meshes.meshing_decimation_quadric_edge_collapse(**options, planarquadric=True, planarweight=0.002)
    else:
        _add_textured(meshes, vertices[used], local, uvs)
        meshes.meshing_decimation_quadric_edge_collapse_with_texture(**options)
    result = meshes.current_mesh()
    n_faces = result.face_number()
    corner_uvs = np.zeros((n_faces, 3, 2)) if uvs is None else result.wedge_tex_coord_matrix().reshape(-1, 3, 2)
    return result.vertex_matrix(), result.face_matrix(), corner_uvs


def simplified(mesh: Mesh, n_target: int) -> Mesh:
    """The mesh with about `n_target` faces, shared out over the materials in proportion to their faces."""
    counts = np.bincount(mesh.face_materials, minlength=len(mesh.materials))
    vertices, faces, uvs, face_materials, n_vertices = [], [], [], [], 0
    for material in np.flatnonzero(counts):
        part = select_faces(mesh, mesh.face_materials == material)
        share = max(8, int(n_target * counts[material] / counts.sum()))
        if counts[material] > share:
            has_texture = mesh.materials[material].texture is not None
            v, f, t = _collapsed(part.vertices, part.faces, part.corner_uvs if has_texture else None, share)
        else:
            used, f = np.unique(part.faces, return_inverse=True)
            v, f, t = part.vertices[used], f.reshape(-1, 3), part.corner_uvs
        vertices.append(v)
        faces.append(f + n_vertices)
        uvs.append(t)
        face_materials.append(np.full(len(f), material))
        n_vertices += len(v)
    return Mesh(
        np.concatenate(vertices),
        np.concatenate(faces),
        np.concatenate(uvs),
        np.concatenate(face_materials),
        mesh.materials,
    )


def views(mesh: Mesh, size: int = 96) -> np.ndarray:
    """Four views (4, size, size, 4) in [0, 1] from one common distance."""
    rasterizer = Rasterizer(index_mesh(mesh))
    fov_rad, elevation_rad = math.radians(40), math.radians(20)
    azimuths_rad = [math.radians(azimuth) for azimuth in (30, 120, 210, 300)]
    images = [
        rasterizer.render(orbit_camera(a, elevation_rad, 2.2), fov_rad, size, default_light(a)) for a in azimuths_rad
    ]
    return np.stack(images).astype(np.float32) / 255


def difference(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """(worst silhouette overlap, worst mean color error) between two sets of `views`."""
    overlaps, errors = [], []
    for a, b in zip(before, after):
        both, either = np.minimum(a[..., 3], b[..., 3]), np.maximum(a[..., 3], b[..., 3])
        overlaps.append(both.sum() / max(either.sum(), 1e-6))
        errors.append((np.abs(a[..., :3] - b[..., :3]).mean(axis=-1) * both).sum() / max(both.sum(), 1e-6))
    return float(min(overlaps)), float(max(errors))


def fitted_to_budget(mesh: Mesh) -> tuple[Mesh | None, str]:
    """A mesh of at most `TARGET_FACES`, or `MOST_FACES` where that looks wrong, or None; and how it was reached.

    Goes down in steps, each from the result of the last one, as long as the renders stay like the original's.
    """
    n_faces = len(mesh.faces)
    if n_faces <= TARGET_FACES:
        return mesh, "as is"
    best, how = (mesh, "kept large") if n_faces <= MOST_FACES else (None, "cannot be simplified")
    if mesh.corner_colors is not None and mesh.corner_colors.min() < 0.995:
        return best, how
    before, current = views(mesh), mesh
    for n_target in (MOST_FACES, 9000, TARGET_FACES):
        # Small closed parts stop collapsing early, so ask for less until the budget is met.
        for factor in (1.0, 0.8, 0.55):
            if len(current.faces) > n_target:
                current = simplified(current, int(n_target * factor))
        overlap, color_error = difference(before, views(current))
        if overlap < LEAST_OVERLAP or color_error > LARGEST_COLOR_ERROR:
            break
        if len(current.faces) <= n_target:
            best, how = current, f"simplified to {n_target}"
    return best, how
