"""Wires, which are narrower than cells, are whole in the mesh and as thin as in the picture."""

import numpy as np
import pytest

from conrad_engine.config import MeshConfig
from conrad_engine.mesh.clean import clean_mesh, face_components
from conrad_engine.mesh.extract import SurfaceView, extract_mesh
from conrad_engine.mesh.outline import silhouette
from conrad_engine.mesh.threads import WIDENING_CELLS, Threads, find_threads, widened

from .mesh_scenes import AABB, ball, camera, rod, soft_density, trace, union

COARSE = MeshConfig(resolution=48)
CELL_PX = 10.0


def disk_and_wire():
    v, u = np.mgrid[:200, :300]
    disk, wire = np.hypot(u - 60, v - 100) < 40, (np.abs(v - 100) <= 1) & (u > 60) & (u < 280)
    return disk, wire


def test_a_wire_is_a_thread_and_a_disk_is_none():
    disk, wire = disk_and_wire()
    found = find_threads(disk | wire, CELL_PX)
    assert found[wire & ~disk].mean() > 0.95
    assert not found[disk].any()


def test_corners_have_tips_and_no_threads():
    mask = np.zeros((200, 200), bool)
    mask[50:150, 50:150] = True
    assert not find_threads(mask, CELL_PX).any()


def test_where_nothing_was_met_there_are_no_threads():
    view = camera(size=64)
    threads = Threads.of(SurfaceView(view, np.ones((64, 64), np.float32), np.full((8, 8), np.nan)), 0.1)
    assert not threads.mask.any() and threads.distances.max() < 0


def test_threads_are_wider_and_the_holes_of_a_net_stay_open():
    v, u = np.mgrid[:200, :200]
    net = ((u % 12 < 3) | (v % 12 < 3)) & (u < 102)
    wire = (np.abs(u - 150) <= 1) & (v > 20) & (v < 180)
    mask = net | wire
    distances = widened(find_threads(mask, CELL_PX), mask, WIDENING_CELLS * CELL_PX)
    assert (distances[net | wire] > 0).all()
    assert (distances[100, 144:157] > 0).all() and distances[100, 135] < 0
    holes = (u < 99) & (v < 190) & ~net
    assert (distances[holes] < 0).all()


def test_broken_threads_are_those_with_a_gap():
    _, wire = disk_and_wire()
    lower = np.roll(wire, 50, axis=0)
    threads = Threads(camera(), wire | lower, np.zeros(wire.shape, np.float32))
    covered = wire | lower
    assert not threads.broken(covered).any()
    covered[:, 150:180] &= ~wire[:, 150:180]
    assert np.array_equal(threads.broken(covered), wire)


def test_a_threads_depth_is_between_those_of_its_ends():
    disk, wire = disk_and_wire()
    wire &= ~disk
    island = np.roll(wire, 60, axis=0)
    threads = Threads(camera(), wire | island, np.zeros(wire.shape, np.float32))
    known = np.where(disk, 2.0, np.nan)
    known[98:103, 280:285] = 2.5
    v, u = np.mgrid[:200, :300]
    clipped = threads.clipped(1.0 + u / 100, known)
    assert clipped[100, [110, 130, 200]].tolist() == [2.1, 2.3, 2.5]
    assert clipped[160, [110, 270]].tolist() == [2.1, 3.7], "nothing is known beside it"
    assert clipped[10, 270] == 3.7
    nothing = threads.clipped(1.0 + u / 100, np.full(wire.shape, np.nan))
    assert np.array_equal(nothing, 1.0 + u / 100)


@pytest.mark.parametrize("field_has_it", [False, True], ids=["the field lacks it", "the field has bits of it"])
def test_a_wire_thinner_than_a_cell_is_whole_and_thin(field_has_it):
    """Its width is a sixth of a cell's; it runs around the ball, from its top to its side."""
    body, corner = ball(0.35), [0.6, 0.0, 0.6]
    wires = [rod(0.006, [0.0, 0, 0.3], corner), rod(0.006, corner, [0.3, 0, -0.1])]
    bits = rod(0.03, [0.25, 0, 0.42], [0.35, 0, 0.48])
    view = camera(size=512)
    seen = SurfaceView(view, *trace(union(body, *wires), view))
    field = union(body, bits) if field_has_it else body
    mesh = clean_mesh(extract_mesh(soft_density(field), AABB, COARSE, [seen]).mesh, COARSE, [seen])
    assert face_components(mesh.faces, len(mesh.vertices)).max() == 0, "one part"
    covered, soft = silhouette(mesh, seen, 512)
    alone = SurfaceView(view, *trace(body, view))
    wire = (soft > 0.5) & ~(alone.mask > 0.5)
    extra = covered & ~(soft > 0.5)
    assert (covered & wire).sum() > 0.93 * wire.sum()
    assert extra.sum() < 1.5 * wire.sum(), "much thinner than a cell, which is twelve times as wide"
    points = mesh.vertices[np.abs(mesh.vertices[:, 0]) > 0.4]
    assert np.ptp(points[:, 1]) < 0.25, "a wire and no wall along the rays"
