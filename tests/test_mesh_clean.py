"""Cleaning and unwrapping of meshes whose shape is known."""

import numpy as np
import pytest

from conrad_engine.config import MeshConfig
from conrad_engine.errors import MeshError
from conrad_engine.mesh.clean import clean_mesh, decimate, keep_components, manifold_share, taubin, weld
from conrad_engine.mesh.mesh import Mesh, vertex_normals
from conrad_engine.mesh.outline import SurfaceView, islands
from conrad_engine.mesh.raster import rasterize_projected
from conrad_engine.mesh.unwrap import unwrap

from .mesh_scenes import ball, box_mesh, camera, euler_number, sphere_mesh, trace, union, volume


def joined(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    faces = np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts)])
    return Mesh(np.concatenate([mesh.vertices for mesh in meshes]), faces.astype(np.int32))


def moved(mesh: Mesh, x: float) -> Mesh:
    return Mesh(mesh.vertices + np.array([x, 0, 0], np.float32), mesh.faces)


def test_largest_parts_are_kept_and_dust_is_not():
    parts = joined(moved(sphere_mesh(0.2, 12), 2.0), sphere_mesh(0.5, 20), moved(sphere_mesh(0.003, 4), -1.0))
    assert np.abs(keep_components(parts, 1).vertices).max() <= 0.5
    assert len(keep_components(parts, 2).faces) == len(sphere_mesh(0.5, 20).faces) + len(sphere_mesh(0.2, 12).faces)
    assert len(keep_components(parts, 0).faces) == len(keep_components(parts, 2).faces)


def test_what_the_picture_shows_apart_is_kept():
    """A lamp beside its table is a part of the picture; what hides behind the table, or is a crumb of the mask, is not."""
    body = union(ball(0.4), ball(0.15, (0.65, 0, 0)), ball(0.02, (-0.6, 0, 0.3)))
    mask, distances = trace(body, camera(0.0, 0.0, 512))
    view = SurfaceView(camera(0.0, 0.0, 512), mask, distances)
    table, lamp = sphere_mesh(0.4, 20), moved(sphere_mesh(0.15, 12), 0.65)
    behind = Mesh(sphere_mesh(0.2, 16).vertices + np.array([0, 0.8, 0], np.float32), sphere_mesh(0.2, 16).faces)
    crumb = Mesh(sphere_mesh(0.02, 6).vertices + np.array([-0.6, 0, 0.3], np.float32), sphere_mesh(0.02, 6).faces)
    parts = joined(lamp, table, behind, crumb)
    assert len(islands(mask > 0.5)) == 2
    kept = keep_components(parts, 1, [view])
    assert len(kept.faces) == len(table.faces) + len(lamp.faces)
    assert kept.vertices[:, 0].max() > 0.75 and kept.vertices[:, 1].max() < 0.5
    assert len(keep_components(parts, 1).faces) == len(table.faces), "nothing tells without a picture"
    assert len(clean_mesh(parts, MeshConfig(), [view]).faces) == len(kept.faces)


def test_what_only_one_part_shows_of_a_silhouette_in_one_piece_is_kept():
    """A crest that came out behind its helmet: the front would lose it. What shows a few pixels more is no part of its own."""
    body = union(ball(0.4), ball(0.2, (0.45, 0, 0)))
    mask, distances = trace(body, camera(0.0, 0.0, 512))
    view = SurfaceView(camera(0.0, 0.0, 512), mask, distances)
    helmet, crest = sphere_mesh(0.4, 20), sphere_mesh(0.21, 12)
    crest = Mesh(crest.vertices + np.array([0.46, 0.9, 0], np.float32), crest.faces)
    hidden = Mesh(sphere_mesh(0.2, 16).vertices + np.array([-0.22, 0.8, 0], np.float32), sphere_mesh(0.2, 16).faces)
    kept = keep_components(joined(crest, helmet, hidden), 1, [view])
    assert len(islands(mask > 0.5)) == 1
    assert len(kept.faces) == len(helmet.faces) + len(crest.faces)
    assert kept.vertices[:, 0].max() > 0.6 and kept.vertices[:, 0].min() > -0.41


def test_a_silhouette_too_thin_for_its_pixels_asks_for_no_part():
    view = SurfaceView(camera(0.0, 0.0, 512), np.full((512, 512), 0.3, np.float32), np.ones((64, 64), np.float32))
    parts = joined(moved(sphere_mesh(0.2, 12), 0.65), sphere_mesh(0.4, 20))
    assert len(keep_components(parts, 1, [view]).faces) == len(sphere_mesh(0.4, 20).faces)


def test_weld_joins_corners_and_drops_empty_faces():
    soup = sphere_mesh(0.5, 8)
    soup = Mesh(soup.vertices[soup.faces].reshape(-1, 3), np.arange(3 * len(soup.faces), dtype=np.int32).reshape(-1, 3))
    soup = joined(soup, Mesh(soup.vertices[:3], np.array([[0, 1, 1], [0, 1, 2]], np.int32)))
    welded = weld(soup)
    assert euler_number(welded) == 2 and manifold_share(welded.faces) == 1.0


def test_a_flap_without_thickness_goes_as_a_whole():
    ball = sphere_mesh(0.5, 8)
    a, b = ball.faces[0][:2]
    flap = np.array([[a, b, len(ball.vertices)], [len(ball.vertices), b, a]], np.int32)
    apex = ball.vertices[[a]] * 1.5
    welded = weld(Mesh(np.concatenate([ball.vertices, apex]), np.concatenate([ball.faces, flap])))
    assert len(welded.faces) == len(ball.faces) and len(welded.vertices) == len(ball.vertices)
    assert euler_number(welded) == 2 and manifold_share(welded.faces) == 1.0


def test_decimation_keeps_shape_and_manifold_edges():
    mesh = decimate(sphere_mesh(0.5, 80), 2000)
    assert 1500 < len(mesh.faces) <= 2000 and manifold_share(mesh.faces) >= 0.99
    assert volume(mesh) == pytest.approx(4 / 3 * np.pi * 0.125, rel=0.01)


def test_smoothing_takes_stairs_and_keeps_size():
    mesh = sphere_mesh(0.5, 60)
    steps = np.round(mesh.vertices / 0.02) * 0.02
    smooth = taubin(Mesh(steps.astype(np.float32), mesh.faces), 4)
    away = lambda points: np.abs(np.linalg.norm(points, axis=1) - 0.5).mean()  # noqa: E731
    assert away(smooth.vertices) < 0.6 * away(steps)
    assert volume(smooth) == pytest.approx(volume(Mesh(steps, mesh.faces)), rel=0.01)


def test_nothing_left_is_one_sentence():
    with pytest.raises(MeshError, match="nothing is left"):
        clean_mesh(Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32)), MeshConfig())


def test_normals_look_outward_and_agree_across_seams():
    mesh = sphere_mesh(0.5, 24)
    corners = Mesh(mesh.vertices[mesh.faces].reshape(-1, 3), np.arange(3 * len(mesh.faces)).reshape(-1, 3))
    normals = vertex_normals(corners.vertices, corners.faces)
    assert (normals * corners.vertices / 0.5).sum(1).min() > 0.99
    assert np.allclose(normals.reshape(-1, 3, 3), vertex_normals(mesh.vertices, mesh.faces)[mesh.faces], atol=1e-6)


@pytest.mark.parametrize("mesh", [sphere_mesh(0.5, 30), box_mesh()], ids=["sphere", "box"])
def test_charts_do_not_overlap_and_keep_the_surface(mesh):
    size = 256
    result = unwrap(mesh, MeshConfig(texture_size=size))
    before = np.sort(mesh.vertices[mesh.faces].reshape(len(mesh.faces), -1), axis=0)
    after = np.sort(result.vertices[result.faces].reshape(len(result.faces), -1), axis=0)
    assert len(result.faces) == len(mesh.faces) and np.allclose(before.sum(), after.sum(), atol=1e-2)
    assert volume(Mesh(result.vertices, result.faces)) == pytest.approx(volume(mesh), rel=1e-5)
    assert result.uvs.min() >= 0 and result.uvs.max() <= 1
    uv = np.stack([result.uvs[:, 0] * size, (1 - result.uvs[:, 1]) * size], 1).astype(np.float64)
    # Covered once: the texels hit are as many as the triangles' areas say.
    (ax, ay), (bx, by) = (
        (uv[result.faces[:, 1]] - uv[result.faces[:, 0]]).T,
        (uv[result.faces[:, 2]] - uv[result.faces[:, 0]]).T,
    )
    hit = (rasterize_projected(uv, np.ones(len(uv)), result.faces, size, size).faces >= 0).sum()
    area = np.abs(ax * by - ay * bx).sum() / 2
    assert hit == pytest.approx(area, rel=0.03) and area > 0.3 * size**2


def test_empty_mesh_cannot_be_unwrapped():
    with pytest.raises(MeshError, match="without faces"):
        unwrap(Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32)), MeshConfig())
