"""Fairing of surfaces whose true shape is known."""

import numpy as np
import pytest
import torch

from conrad_engine.config import MeshConfig
from conrad_engine.errors import InputError
from conrad_engine.mesh.clean import clean_mesh
from conrad_engine.mesh.fairing import faired, neighbors, smooth_normals, stitched
from conrad_engine.mesh.mesh import Mesh, dots, face_crosses, lengths, vertex_normals
from conrad_engine.mesh.outline import SurfaceView, hull_distances

from .mesh_scenes import ball, box_mesh, camera, sphere_mesh, trace, volume

SCALE = 0.03


def lumpy(mesh: Mesh, height: float, wavelength: float = 0.06) -> Mesh:
    """Waves along all axes on a surface."""
    waves = np.sin(mesh.vertices * (2 * np.pi / wavelength) + np.array([0.3, 1.1, 2.0])).prod(1)
    normals = vertex_normals(mesh.vertices, mesh.faces)
    return Mesh((mesh.vertices + height * waves[:, None] * normals).astype(np.float32), mesh.faces)


def rough(distances: np.ndarray) -> float:
    return float(np.sqrt(np.square(distances).mean()))


def unit_normals(mesh: Mesh) -> np.ndarray:
    crosses = face_crosses(mesh.vertices, mesh.faces)
    return crosses / lengths(crosses)[:, None]


def fine_box(n: int = 40) -> Mesh:
    """A cube of side 0.8 whose sides have n x n cells."""
    line = np.linspace(-0.4, 0.4, n + 1)
    across, along = (part.ravel() for part in np.meshgrid(line, line, indexing="ij"))
    cell = np.arange(n)[:, None] * (n + 1) + np.arange(n)
    corners = np.stack([cell, cell + n + 1, cell + n + 2, cell + 1], -1).reshape(-1, 4)
    square = np.concatenate([corners[:, [0, 1, 2]], corners[:, [0, 2, 3]]])
    vertices, faces = [], []
    for axis in range(3):
        for side in (-0.4, 0.4):
            points = np.zeros((len(across), 3))
            points[:, axis], points[:, (axis + 1) % 3], points[:, (axis + 2) % 3] = side, across, along
            faces.append((square if side > 0 else square[:, ::-1]) + sum(map(len, vertices)))
            vertices.append(points)
    places, index = np.unique(np.concatenate(vertices).round(6), axis=0, return_inverse=True)
    return Mesh(places.astype(np.float32), index.reshape(-1)[np.concatenate(faces)].astype(np.int32))


def test_lumps_go_and_the_shape_stays():
    true = sphere_mesh(0.5, 48)
    given = lumpy(true, 0.006)
    result = faired(given, SCALE)
    before, after = lengths(given.vertices) - 0.5, lengths(result.vertices) - 0.5
    assert rough(after) < 0.45 * rough(before)
    assert volume(result) == pytest.approx(volume(true), rel=0.01)


def test_edges_stay_sharp():
    true = fine_box()
    result = faired(lumpy(true, 0.006), SCALE)
    angles = np.degrees(np.arccos(np.clip(dots(unit_normals(result), unit_normals(true)), -1, 1)))
    near_edge = np.sort(np.abs(true.vertices[true.faces].mean(1)), axis=1)[:, 1] > 0.4 - 0.04
    assert np.median(angles[~near_edge]) < 2 and np.median(angles[near_edge]) < 5
    bumps = np.abs(np.abs(result.vertices).max(1) - 0.4)
    assert rough(bumps) < 0.35 * rough(np.abs(np.abs(lumpy(true, 0.006).vertices).max(1) - 0.4))


def test_a_rod_thinner_than_the_scale_stays():
    rod = sphere_mesh(0.5, 64)
    rod = Mesh(rod.vertices * np.array([0.02, 0.02, 1], np.float32), rod.faces)
    result = faired(rod, SCALE)
    assert volume(result) == pytest.approx(volume(rod), rel=0.03)
    assert np.abs(result.vertices - rod.vertices).max() < 0.002


def test_outlines_of_the_picture_stay():
    seen = camera(20.0, 10.0, 256)
    mask, distances = trace(ball(0.5), seen)
    view = SurfaceView(seen, mask, distances)
    given = lumpy(sphere_mesh(0.5, 48), 0.006)
    result = faired(given, SCALE, [view])
    inside = hull_distances(mask, seen)(torch.from_numpy(given.vertices)).numpy()
    rim = inside < 0.1 * SCALE
    before, after = (_pixels(m, seen)[rim] for m in (given, result))
    assert rim.sum() > 50
    assert np.abs(after - before).max() < 0.1 * np.abs(_pixels(faired(given, SCALE), seen)[rim] - before).max() + 0.02
    assert rough(lengths(result.vertices[inside > SCALE]) - 0.5) < 0.45 * rough(lengths(given.vertices) - 0.5)


def _pixels(mesh: Mesh, seen) -> np.ndarray:
    return seen.to("cpu", torch.float64).project(torch.from_numpy(mesh.vertices).double())[0].numpy()


def test_triangles_that_need_no_turn_stay():
    mesh = lumpy(sphere_mesh(0.5, 24), 0.01)
    vertices = mesh.vertices.astype(np.float64)
    np.testing.assert_allclose(stitched(vertices, mesh.faces, unit_normals(mesh), 1.0), vertices, atol=1e-9)


def test_a_turned_plane_turns():
    """The sheet is projected onto the plane its normals ask for; its middle stays."""
    line = np.linspace(-0.5, 0.5, 21)
    x, y = (part.ravel() for part in np.meshgrid(line, line, indexing="ij"))
    cell = (np.arange(20)[:, None] * 21 + np.arange(20)).ravel()
    faces = np.concatenate([np.stack([cell, cell + 21, cell + 22], 1), np.stack([cell, cell + 22, cell + 1], 1)])
    vertices, angle = np.stack([x, y, 0 * x], 1), 0.2
    normals = np.tile([0, -np.sin(angle), np.cos(angle)], (len(faces), 1))
    turned = np.stack([x, y * np.cos(angle), y * np.sin(angle)], 1) * [1, np.cos(angle), np.cos(angle)]
    np.testing.assert_allclose(stitched(vertices, faces, normals, 1e-6), turned, atol=1e-4)


def test_neighbors_against_a_slow_twin():
    faces = box_mesh().faces
    edges = [{tuple(sorted((f[k], f[(k + 1) % 3]))) for k in range(3)} for f in faces.tolist()]
    expected = {(i, j) for i in range(len(faces)) for j in range(i + 1, len(faces)) if edges[i] & edges[j]}
    assert {tuple(sorted(pair)) for pair in zip(*(part.tolist() for part in neighbors(faces)[:2]))} == expected


def test_degenerate_faces_and_small_meshes_do_no_harm():
    mesh = sphere_mesh(0.5, 12)
    flat = np.concatenate([mesh.faces, mesh.faces[:1, [0, 0, 1]], mesh.faces[:1]]).astype(np.int32)
    assert np.isfinite(faired(Mesh(mesh.vertices, flat), SCALE).vertices).all()
    assert np.isfinite(smooth_normals(mesh.vertices.astype(np.float64), flat, SCALE)).all()
    assert faired(mesh, 0.0) is mesh
    triangle = Mesh(mesh.vertices[:3], np.array([[0, 1, 2]], np.int32))
    assert faired(triangle, SCALE) is triangle


def test_cleaning_fairs_as_the_settings_say():
    given = lumpy(sphere_mesh(0.5, 48), 0.006)
    bumps = [rough(lengths(clean_mesh(given, MeshConfig(fairing=px), pixel=SCALE).vertices) - 0.5) for px in (0.0, 1.0)]
    assert bumps[1] < 0.75 * bumps[0]


@pytest.mark.parametrize("scale", [-0.1, 9.0, float("nan")])
def test_scales_that_make_no_sense(scale):
    with pytest.raises(InputError, match="mesh.fairing"):
        MeshConfig(fairing=scale)
