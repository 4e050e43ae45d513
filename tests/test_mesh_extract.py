"""Surfaces of fields whose shape is known."""

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion

from conrad_engine.config import MeshConfig
from conrad_engine.errors import MeshError
from conrad_engine.mesh import extract
from conrad_engine.mesh.clean import clean_mesh, keep_components
from conrad_engine.mesh.extract import BLIND_LEVEL, SurfaceView, extract_mesh
from conrad_engine.mesh.outline import hull_distances, silhouette

from .mesh_scenes import AABB, ball, camera, euler_number, rod, soft_density, trace, union, volume

COARSE = MeshConfig(resolution=48)
CELL = 1.0 / 48


def seen(body, azimuth_deg=0.0, size=192):
    view = camera(azimuth_deg, size=size)
    return SurfaceView(view, *trace(body, view))


def iou(mesh, view):
    covered, mask = silhouette(mesh, view, 512)
    return (covered & (mask > 0.5)).sum() / (covered | (mask > 0.5)).sum()


@pytest.mark.parametrize("size", [40, 41, 42, 43])
@pytest.mark.parametrize("radius_px", [1, 6, 200])
def test_the_box_around_a_cone_has_every_corner_near_it(size, radius_px):
    grid = extract._Grid(np.array([-0.5, -0.6, -0.5]), (size, size + 9, size), 1 / 48).part(
        (slice(1, size), slice(3, size + 8), slice(0, size - 2))
    )
    rows, columns = np.indices((192, 192))
    area = np.hypot(rows - 100, columns - 60) <= radius_px
    cone = hull_distances(area.astype(np.float32), camera(70.0, 20.0))
    for least in (-0.2, 0.0):
        near = grid.evaluate(cone) > least
        box = grid.box_where(cone, least)
        assert near.any() and near[box].sum() == near.sum()
    if radius_px == 1:
        assert near[box].size < near.size / 2, "and not many others"
    nothing = grid.box_where(lambda positions: torch.full((len(positions),), -1e3), 0.0)
    assert near[nothing].size == 0 and grid.part(nothing).evaluate(cone).size == 0


@pytest.mark.parametrize("center", [(0.0, 0.0, 0.0), (0.1, -0.2, 0.15)])
def test_ball_has_its_radius_place_and_topology(center):
    body = ball(0.5, center)
    mesh = extract_mesh(soft_density(body), AABB, MeshConfig(resolution=48, level=25 * np.log(2)), []).mesh
    radii = np.linalg.norm(mesh.vertices - np.array(center), axis=1)
    assert np.abs(radii - 0.5).max() < 0.3 * CELL
    assert euler_number(mesh) == 2
    assert volume(mesh) == pytest.approx(4 / 3 * np.pi * 0.5**3, rel=0.02), "positive: faces look outward"


def test_surface_that_leaves_the_box_is_closed():
    mesh = extract_mesh(soft_density(ball(0.5, (0.6, 0.0, 0.0))), AABB, COARSE, []).mesh
    assert euler_number(mesh) == 2 and mesh.vertices[:, 0].max() < 0.91


def test_level_is_chosen_by_the_silhouette():
    body = ball(0.5)
    # The field is too fat by 0.03: only a higher level than that of the true surface has its silhouette.
    result = extract_mesh(soft_density(lambda p: body(p) - 0.03), AABB, COARSE, [seen(body)])
    assert result.level > 25
    assert np.abs(np.linalg.norm(result.mesh.vertices, axis=1) - 0.5).max() < 0.02
    assert extract_mesh(soft_density(body), AABB, COARSE, []).level == BLIND_LEVEL
    assert extract_mesh(soft_density(body), AABB, MeshConfig(resolution=48, level=9.0), [seen(body)]).level == 9.0


def test_outline_is_the_masks_where_the_field_is_off():
    truth = union(ball(0.35), rod(0.05, [0.0, 0, 0], [0.55, 0, 0.3]))
    field = union(ball(0.37, (0.02, 0, -0.02)), rod(0.035, [0.0, 0, 0], [0.54, 0, 0.32]))
    view = seen(truth)
    mesh = clean_mesh(extract_mesh(soft_density(field), AABB, COARSE, [view]).mesh, COARSE, [view])
    assert iou(mesh, view) > 0.985
    assert np.abs(mesh.vertices[:, 1]).max() < 0.45, "nothing is drawn out along the rays"


def test_part_that_the_field_lacks_grows_out_of_the_surface():
    truth = union(ball(0.35), rod(0.025, [0.0, 0, 0], [0.0, 0, 0.7]))
    view = seen(truth)
    mesh = extract_mesh(soft_density(ball(0.35)), AABB, COARSE, [view]).mesh
    kept = keep_components(mesh, 1)
    assert iou(kept, view) > 0.96, "the rod is there, and one part with the ball"
    assert kept.vertices[:, 2].max() > 0.66
    tip = kept.vertices[kept.vertices[:, 2] > 0.5]
    assert np.ptp(tip[:, 1]) < 0.25, "the rod is a rod and no wall along the rays"


def test_a_break_in_a_rung_is_a_missing_part_and_a_rim_is_none():
    v, u = np.mgrid[:200, :300]
    seat, rung = np.hypot(u - 60, v - 100) < 40, (np.abs(v - 100) <= 3) & (u > 60) & (u < 280)
    mask = seat | rung
    covered = binary_erosion(mask, iterations=2)  # a rim of two pixels is open everywhere
    assert not extract._open_part(covered, mask, with_breaks=True).any()
    break_ = (u >= 180) & (u < 187)
    assert not extract._open_part(covered & ~break_, mask, with_breaks=False).any()
    found = extract._open_part(covered & ~break_, mask, with_breaks=True)
    assert found[mask & break_].all(), "seven pixels are missing in a rung as thick"
    assert not found[np.abs(u - 183) > 16].any(), "the rim far from it is left alone"


def test_looking_only_near_the_surface_changes_no_bit(monkeypatch):
    truth = union(ball(0.2, (0.0, 0.0, -0.1)), rod(0.04, [0.0, 0, 0], [0.4, 0, 0.3]))
    body, fog = soft_density(ball(0.21, (0.01, 0, -0.1))), ball(0.05, (-0.6, 0.7, 0.6))
    density = lambda p: torch.maximum(body(p), 1.5 * (fog(p) > 0))  # noqa: E731
    near = extract_mesh(density, AABB, COARSE, [seen(truth)])
    monkeypatch.setattr(extract, "MARGIN_CELLS", 1000)
    everywhere = extract_mesh(density, AABB, COARSE, [seen(truth)])
    assert near.level == everywhere.level and len(near.mesh.faces) > 1000
    assert np.array_equal(near.mesh.vertices, everywhere.mesh.vertices)
    assert np.array_equal(near.mesh.faces, everywhere.mesh.faces)


def test_two_pictures_both_fit():
    body = union(ball(0.3), ball(0.2, (0.25, 0.25, 0.2)))
    views = [seen(body), seen(body, 90.0)]
    mesh = extract_mesh(soft_density(lambda p: body(p) - 0.02), AABB, COARSE, views).mesh
    assert min(iou(mesh, view) for view in views) > 0.97


def test_object_that_leaves_the_picture_stays_open_there():
    view = camera().cropped(0.0, 0.0, 192, 96)
    body = ball(0.5)
    mesh = extract_mesh(soft_density(body), AABB, COARSE, [SurfaceView(view, *trace(body, view))]).mesh
    assert mesh.vertices[:, 2].min() < -0.45, "below the picture nothing is cut off"


def test_field_without_a_surface_is_one_sentence():
    with pytest.raises(MeshError, match="no surface"):
        extract_mesh(lambda p: torch.zeros(len(p)), AABB, COARSE, [seen(ball(0.5))])
    with pytest.raises(MeshError, match="no surface"):
        extract_mesh(soft_density(ball(0.5)), AABB, MeshConfig(resolution=48, level=5e4), [])
