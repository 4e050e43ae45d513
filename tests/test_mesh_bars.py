"""Straight slender parts of a picture come out round, where they are, and nothing else changes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from conrad_engine.config import MeshConfig
from conrad_engine.mesh.bars import Bar, _joined, find_bars
from conrad_engine.mesh.extract import extract_mesh
from conrad_engine.mesh.lines import Line, narrower_than, straight_lines
from conrad_engine.mesh.outline import SurfaceView, silhouette
from conrad_engine.mesh.raster import rasterize

from .mesh_scenes import AABB, ball, camera, rod, soft_density, trace, union

FINE = MeshConfig(resolution=112)
NO_THREADS = np.zeros((512, 512), bool)


def box(half_sides, center):
    """Signed distance to a box along the axes."""
    half_sides, center = torch.tensor(half_sides), torch.tensor(center)

    def distance(p):
        rest = (p - center).abs() - half_sides
        return rest.clamp(min=0).norm(dim=-1) + rest.amax(-1).clamp(max=0)

    return distance


def view_of(body, size: int = 256) -> SurfaceView:
    seen = camera(elevation_deg=0.0, size=size)
    return SurfaceView(seen, *trace(body, seen))


def surface(body, view: SurfaceView, round_bars: bool = True):
    return extract_mesh(soft_density(body), AABB, replace(FINE, round_bars=round_bars), [view]).mesh


def depth_extent(mesh, low: float, high: float) -> np.ndarray:
    """Least and largest y of a mesh at heights between two."""
    chosen = mesh.vertices[(mesh.vertices[:, 2] > low) & (mesh.vertices[:, 2] < high)]
    return np.array([chosen[:, 1].min(), chosen[:, 1].max()])


BASE = ball(0.3, (0.0, 0.0, -0.4))
BLADE = box((0.02, 0.045, 0.35), (0.0, 0.0, 0.2))
"""0.04 wide, and 0.09 deep as the picture sees it."""


def test_a_blade_becomes_a_round_bar_with_the_same_picture():
    body = union(BASE, BLADE)
    view = view_of(body)
    before, after = surface(body, view, round_bars=False), surface(body, view)
    assert np.ptp(depth_extent(before, 0.05, 0.45)) == pytest.approx(0.09, abs=0.02)
    front, back = depth_extent(after, 0.05, 0.45)
    assert front == pytest.approx(-0.045, abs=0.015) and back - front == pytest.approx(0.04, abs=0.015)
    covered, soft = silhouette(after, view, 256)
    assert (covered & (soft > 0.5)).sum() / (covered | (soft > 0.5)).sum() > 0.97
    # What is no bar is as it was.
    assert depth_extent(after, -0.6, -0.2) == pytest.approx(depth_extent(before, -0.6, -0.2), abs=1e-3)


def test_a_plate_seen_from_its_edge_and_a_rod_towards_the_camera_stay():
    for part in (box((0.02, 0.1, 0.35), (0.0, 0.0, 0.2)), rod(0.03, (0.0, 0.5, 0.0), (0.0, -0.5, 0.2))):
        body = union(BASE, part)
        view = view_of(body)
        before, after = surface(body, view, round_bars=False), surface(body, view)
        assert np.array_equal(before.vertices, after.vertices)


def test_what_passes_behind_a_bar_stays_whole():
    stub = rod(0.024, (0.15, 0.25, 0.19), (0.15, 0.25, 0.35))  # too short for a bar
    post = rod(0.06, (-0.1, -0.1, -0.3), (-0.1, -0.1, 0.25))
    body = union(ball(0.4, (0.0, 0.0, -0.4)), rod(0.018, (-0.1, -0.1, 0.25), (0.4, -0.1, 0.25)), post, stub)
    view = view_of(body)
    vertices = surface(body, view).vertices
    near = (np.hypot(vertices[:, 0] - 0.15, vertices[:, 1] - 0.25) < 0.04) & (vertices[:, 2] > 0.1)
    heights = np.sort(vertices[near][:, 2])
    assert np.ptp(heights) > 0.15 and np.diff(heights).max() < 0.03
    (bar,) = find_bars(surface(body, view, round_bars=False), view, NO_THREADS).bars
    assert bar.line.length > 100  # pixels, on both sides of the stub


def test_what_crosses_before_a_rung_does_not_say_how_deep_it_is():
    posts = [rod(0.026, (x, -0.2, -0.35), (x, -0.2, 0.5)) for x in (np.arange(-3, 4) * 0.1).tolist()]
    ends = (-0.38, -0.1, 0.25), (0.38, 0.3, 0.25)
    body = union(box((0.38, 0.25, 0.08), (0.0, 0.0, -0.4)), rod(0.018, *ends), *posts)
    view = view_of(body)
    found = find_bars(surface(body, view, round_bars=False), view, NO_THREADS)
    (rung,) = [bar for bar in found.bars if abs(bar.line.along[0]) > 0.9]  # what is seen of it between some of them
    uv, z_depths = (x.numpy() for x in found.camera.project(torch.tensor(ends)))
    where = rung.line.start[0] + np.array([0, rung.line.length]) * rung.line.along[0]
    assert 1 / rung.depths(np.array([0, rung.line.length])) == pytest.approx(
        np.interp(where, uv[:, 0], 1 / z_depths), abs=0.003
    )


def test_a_thread_is_strung_anew_between_what_it_hangs_on():
    """At the back of a blade, which is gone then: the wire comes forward with it."""
    other = rod(0.03, (0.45, 0.03, -0.4), (0.45, 0.03, 0.5))
    wire = rod(0.006, (0.0, 0.04, 0.42), (0.45, 0.04, 0.42))
    body = union(BASE, BLADE, other, wire)
    mesh = surface(body, view_of(body, 384))
    middle = (np.abs(mesh.vertices - [0.15, 0.0, 0.42]) < [0.05, 0.2, 0.03]).all(1)
    assert mesh.vertices[middle][:, 1].mean() < 0.038  # 0.045 where it hung before


def test_several_pictures_know_how_deep_it_is():
    body = union(BASE, BLADE)
    aside = camera(azimuth_deg=90.0, elevation_deg=0.0, size=256)
    views = [view_of(body), SurfaceView(aside, *trace(body, aside))]
    mesh = extract_mesh(soft_density(body), AABB, FINE, views).mesh
    assert np.ptp(depth_extent(mesh, 0.05, 0.45)) == pytest.approx(0.09, abs=0.02)


def test_a_slanted_rod_is_where_it_is():
    ends = (-0.3, -0.3, 0.0), (0.3, 0.2, 0.3)
    body = union(rod(0.02, *ends), BASE)
    view = view_of(body)
    mesh = without = surface(body, view)
    bars = find_bars(without, view, NO_THREADS)
    (bar,) = bars.bars
    middles = torch.tensor(ends) + torch.tensor([[0.1], [-0.1]]) * (torch.tensor(ends[1]) - torch.tensor(ends[0]))
    uv, z_depths = bars.camera.project(middles)
    along, across = bar.line.coordinates(uv.numpy())
    assert across.max() < 1
    assert np.abs(bar.depths(along) - z_depths.numpy()).max() < 0.012
    axis, ray = torch.tensor(ends[1]) - torch.tensor(ends[0]), torch.tensor([0.0, 1.0, 0.0])
    expected = float(torch.linalg.cross(axis, ray).norm() / axis.norm())
    assert bar.sine(bars.camera) == pytest.approx(expected, abs=0.05)
    near = rasterize(mesh.vertices, mesh.faces, bars.camera)
    assert (near.z_depths[tuple(uv.numpy().astype(int).T[::-1])] > 0).all()


def drawn(*rods: tuple[tuple[float, float], tuple[float, float]], half: float = 4.0) -> np.ndarray:
    v, u = np.mgrid[:200, :200] + 0.5
    mask = np.zeros((200, 200), bool)
    for a, b in rods:
        a, way = np.array(a), np.subtract(b, a)
        t = np.clip(((u - a[0]) * way[0] + (v - a[1]) * way[1]) / (way @ way), 0, 1)
        mask |= np.hypot(u - a[0] - t * way[0], v - a[1] - t * way[1]) < half
    return mask


def lines_of(mask: np.ndarray, widest: float = 12.0) -> list[Line]:
    deep = distance_transform_edt(mask)
    return list(straight_lines(narrower_than(widest, deep), deep, 30.0))


def test_bars_that_cross_are_two_lines():
    first, second = ((20.0, 100.0), (180.0, 100.0)), ((60.0, 20.0), (120.0, 180.0))
    lines = lines_of(drawn(first, second))
    assert len(lines) == 2
    for (a, b), line in zip((second, first), sorted(lines, key=lambda line: -line.length)):
        assert line.length == pytest.approx(math.dist(a, b), abs=12)
        assert max(line.coordinates(np.array([a, b]))[1]) < 2
        assert line.halves == pytest.approx((4.0, 4.0), abs=0.8)


def test_a_line_does_not_jump_over_what_is_not_the_object():
    lines = lines_of(
        drawn(((20.0, 100.0), (90.0, 100.0)), ((110.0, 100.0), (180.0, 100.0)), ((90.0, 60.0), (110.0, 60.0)))
    )
    assert sorted(round(line.length / 10) for line in lines) == [7, 7]


def test_leaves_disks_and_curves_are_no_bars():
    v, u = np.mgrid[:200, :200] + 0.5
    leaf = (np.abs(v - 100) < (u - 20) * 0.06) & (u < 180)
    disk = np.hypot(u - 100, v - 100) < 40
    ring = np.abs(np.hypot(u - 100, v - 100) - 40) < 4
    assert not lines_of(leaf, 20.0) and not lines_of(disk) and not lines_of(ring)


def test_an_end_joins_what_it_touches_but_not_what_lies_far_behind():
    seen = camera(size=200)
    post = Bar(Line(np.array([50.0, 20.0]), np.array([0.0, 1.0]), 160.0, (5.0, 5.0)), (1 / 3.0, 1 / 3.0), 0.0, 2.0)
    rung = Bar(Line(np.array([56.0, 100.0]), np.array([1.0, 0.0]), 80.0, (4.0, 4.0)), (1 / 3.1, 1 / 3.1), 0.0, 1.0)
    nothing = np.zeros((200, 200), bool)
    flat = np.full((200, 200), 3.0)
    joined = _joined(rung, [post], nothing, flat, flat, seen, 0.15 / 3)
    assert joined.depths(np.array([0.0, 80.0])) == pytest.approx([3.0, 3.1])
    assert _joined(rung, [post], nothing, flat, flat, seen, 0.02) == rung
    body = nothing.copy()
    body[:, 140:] = True
    inner = 4.0 / float(seen.intrinsics[0]) * 3.1
    joined = _joined(rung, [], body, np.full((200, 200), 2.8), np.full((200, 200), 3.0), seen, 0.15 / 3)
    assert joined.depths(np.array([0.0, 80.0])) == pytest.approx([3.1, 3.0 - inner])


def test_known_depths_stay():
    posts = [rod(0.025, (x, y, -0.4), (x, y, 0.5)) for x, y in ((-0.3, -0.1), (0.3, 0.0))]
    body = union(BASE, *posts, rod(0.018, (-0.3, -0.1, 0.2), (0.28, -0.1, 0.25)))
    view = view_of(body)
    mesh = surface(body, view, round_bars=False)
    found = [find_bars(mesh, view, NO_THREADS, may_move).bars for may_move in (True, False)]
    moved, kept = (1 / np.array(min(bars, key=lambda bar: bar.trust).inverse_depths) for bars in found)
    assert np.ptp(kept) < 0.02
    assert np.ptp(moved) == pytest.approx(0.1, abs=0.03)  # as the posts


def test_nothing_is_found_where_nothing_is():
    view = view_of(union(BASE, BLADE))
    whole = surface(union(BASE, BLADE), view)
    assert find_bars(whole, view, NO_THREADS) is not None
    assert find_bars(whole, view, ~NO_THREADS) is None
    empty = SurfaceView(view.camera, np.zeros_like(view.mask), view.distances)
    assert find_bars(whole, empty, NO_THREADS) is None
