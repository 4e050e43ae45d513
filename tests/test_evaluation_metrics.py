"""Picture and shape measures against slow, obvious twins and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conrad_engine.cameras import Camera, look_at, orbit_camera
from conrad_engine.evaluation import geometry, metrics


def random_rgba(rng: np.random.Generator, size: int = 24) -> np.ndarray:
    rgba = rng.random((size, size, 4))
    rgba[..., 3] = rgba[..., 3] > 0.4
    return rgba


def slow_psnr(rgba: np.ndarray, truth: np.ndarray, only_foreground: bool) -> float:
    total, count = 0.0, 0
    for i in range(truth.shape[0]):
        for j in range(truth.shape[1]):
            if only_foreground and truth[i, j, 3] <= 0.5:
                continue
            for k in range(3):
                ours = rgba[i, j, k] * rgba[i, j, 3] + 1 - rgba[i, j, 3]
                theirs = truth[i, j, k] * truth[i, j, 3] + 1 - truth[i, j, 3]
                total, count = total + (ours - theirs) ** 2, count + 1
    return 10 * math.log10(1 / (total / count))


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13, with an 11 x 11 Gaussian window; the border of 5 pixels is left out."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    values = []
    for k in range(3):
        for i in range(5, a.shape[0] - 5):
            for j in range(5, a.shape[1] - 5):
                x, y = (p[i - 5 : i + 6, j - 5 : j + 6, k] for p in (a, b))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2
                cov = (window * x * y).sum() - mx * my
                values.append(
                    (2 * mx * my + 0.01**2) * (2 * cov + 0.03**2) / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2))
                )
    return float(np.mean(values))


def test_view_scores_equal_their_twins() -> None:
    rng = np.random.default_rng(1)
    ours, truth = random_rgba(rng), random_rgba(rng)
    scores = metrics.view_scores(ours, truth)
    assert scores["psnr"] == pytest.approx(slow_psnr(ours, truth, False))
    assert scores["foreground"] == pytest.approx(slow_psnr(ours, truth, True))
    assert scores["ssim"] == pytest.approx(slow_ssim(metrics.on_white(ours), metrics.on_white(truth)), abs=1e-6)
    both = sum(a > 0.5 and b > 0.5 for a, b in zip(ours[..., 3].ravel(), truth[..., 3].ravel()))
    any_ = sum(a > 0.5 or b > 0.5 for a, b in zip(ours[..., 3].ravel(), truth[..., 3].ravel()))
    assert scores["iou"] == pytest.approx(both / any_)


def test_equal_pictures_end_at_the_limits() -> None:
    truth = random_rgba(np.random.default_rng(2))
    assert metrics.view_scores(truth, truth) == pytest.approx({"psnr": 60, "foreground": 60, "ssim": 1, "iou": 1})


def test_empty_masks() -> None:
    empty = np.zeros((16, 16, 4))
    scores = metrics.view_scores(empty, empty)
    assert scores["iou"] == 1 and math.isnan(scores["foreground"])


def test_solid_pixels_of_a_soft_mask_and_of_a_hair() -> None:
    mask = np.array([0.0, 0.4, 1.0, 0.995, 0.6])
    assert metrics.solid_pixels(mask).tolist() == [False, False, True, True, False]
    assert metrics.solid_pixels(mask * 0.5).tolist() == [False, False, True, False, False]


def test_gradient_energy_of_a_ramp_and_of_the_outline() -> None:
    rgba = np.zeros((32, 32, 4))
    rgba[4:28, 4:28, 3] = 1
    assert metrics.gradient_energy(rgba) == 0
    rgba[..., :3] = (np.arange(32) * 0.02)[None, :, None]
    # One of two directions changes, by 0.02 a pixel.
    assert metrics.gradient_energy(rgba) == pytest.approx(0.02**2 / 2)
    # What is black outside of the silhouette is no detail.
    rgba[rgba[..., 3] == 0] = 0
    assert metrics.gradient_energy(rgba) == pytest.approx(0.02**2 / 2)
    assert metrics.gradient_energy(np.zeros((8, 8, 4))) == 0


def slow_correlation(a: np.ndarray, b: np.ndarray) -> float:
    pairs = []
    common = [(i, j) for i in range(a.shape[0]) for j in range(a.shape[1]) if a[i, j, 3] > 0.5 and b[i, j, 3] > 0.5]
    for k in range(3):
        mean_a = sum(a[i, j, k] for i, j in common) / len(common)
        mean_b = sum(b[i, j, k] for i, j in common) / len(common)
        pairs += [(a[i, j, k] - mean_a, b[i, j, k] - mean_b) for i, j in common]
    top = sum(x * y for x, y in pairs)
    return top / math.sqrt(sum(x * x for x, _ in pairs) * sum(y * y for _, y in pairs))


def test_color_correlation_equals_its_twin() -> None:
    rng = np.random.default_rng(3)
    a, b = random_rgba(rng), random_rgba(rng)
    b[..., :3] = 0.5 * a[..., :3] + 0.5 * b[..., :3]
    assert metrics.color_correlation(a, b) == pytest.approx(slow_correlation(a, b))


def test_color_correlation_ignores_brightness_and_refuses_plain_colors() -> None:
    rng = np.random.default_rng(4)
    a = random_rgba(rng)
    darker = a.copy()
    darker[..., :3] = 0.3 * a[..., :3] + np.array([0.1, 0.4, 0.2])
    assert metrics.color_correlation(a, darker) == pytest.approx(1)
    plain = np.ones_like(a)
    assert metrics.color_correlation(a, plain) is None
    assert metrics.color_correlation(a[:4, :4], a[:4, :4]) is None


def test_detail_tells_a_print_from_a_likeness() -> None:
    """Two sides dark below and bright above correlate; their fine patterns do not, unless one is a print of the other."""
    rng = np.random.default_rng(5)
    shade = np.linspace(0.2, 0.8, 64)[:, None, None]
    front, back = (np.concatenate([shade + 0.1 * rng.normal(size=(64, 64, 3)), np.ones((64, 64, 1))], -1) for _ in "ab")
    likeness, printed = metrics.print_through(back, front), metrics.print_through(front, front)
    assert likeness["print_through"] > 0.6 and abs(likeness["print_through_detail"]) < 0.1
    assert printed["print_through_detail"] == pytest.approx(1)


@pytest.mark.parametrize("elevation_rad", [0.0, 0.5, -0.3])
def test_back_camera_looks_back_along_the_axis(elevation_rad: float) -> None:
    camera = orbit_camera(0.7, elevation_rad, 2.0, 0.6, 64).to(dtype=torch.float64)
    center = np.array([0.0, 0.0, 0.0])
    back = metrics.back_camera(camera, center)
    assert torch.allclose(back.positions, -camera.positions, atol=1e-9)
    assert torch.allclose(back.forward, -camera.forward, atol=1e-9)
    assert torch.linalg.det(back.c2w[:, :3]).item() == pytest.approx(1)
    # A point in the plane through the center appears mirrored left to right.
    point = camera.unproject(torch.tensor([[20.0, 40.0]], dtype=torch.float64), torch.tensor([2.0]).double())
    assert torch.allclose(back.project(point)[0], torch.tensor([[44.0, 40.0]]).double(), atol=1e-3)


def test_back_camera_keeps_the_mirror_with_an_off_center_principal_point() -> None:
    position = torch.tensor([0.0, -2.0, 0.0], dtype=torch.float64)
    camera = Camera(look_at(position, torch.zeros(3).double()), torch.tensor([50.0, 60, 20, 30]).double(), 64, 48)
    back = metrics.back_camera(camera, np.zeros(3))
    point = torch.tensor([[0.3, 0.0, -0.2]], dtype=torch.float64)
    (u, v), (u_back, v_back) = camera.project(point)[0][0], back.project(point)[0][0]
    assert float(u_back) == pytest.approx(64 - float(u)) and float(v_back) == pytest.approx(float(v))


def test_printed_through_follows_the_rays_of_the_reference() -> None:
    """On a wall behind the object's center, every back pixel shows the picture's pixel on the same reference ray."""
    rng = np.random.default_rng(6)
    camera = orbit_camera(0.4, 0.3, 3.0, 0.7, 40).to(dtype=torch.float64)
    back = metrics.back_camera(camera, np.zeros(3))
    picture = np.concatenate([rng.random((40, 40, 3)), np.ones((40, 40, 1))], -1)
    z_depths = np.full((40, 40), 2.5)
    z_depths[:5] = 0
    printed = metrics.printed_through(picture, camera, back, z_depths)
    assert (printed[:5] == 0).all()
    for row, column in [(10, 10), (20, 31), (35, 7)]:
        center = torch.tensor([[column + 0.5, row + 0.5]], dtype=torch.float64)
        point = back.unproject(center, torch.tensor([2.5]).double())
        u, v = camera.project(point)[0][0].tolist()
        # The wall is nearer to the back camera than to the front one, so the front sees it smaller.
        assert abs(u - 20) < abs(40 - (column + 0.5) - 20) and abs(v - 20) <= abs(row + 0.5 - 20)
        assert np.array_equal(printed[row, column], picture[int(v), int(u)])


def test_perceptual_distance_is_absent_without_weights(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert metrics.perceptual_distance() is None


def cube(size: float = 1.0, center: tuple[float, float, float] = (0, 0, 0)) -> tuple[np.ndarray, np.ndarray]:
    vertices = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float) - 0.5
    faces = [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1]]
    faces += [[2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]
    return vertices * size + np.asarray(center), np.array(faces)


def test_sample_surface_is_uniform_by_area() -> None:
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 5], [3, 0, 5], [0, 3, 5]], float)
    points = geometry.sample_surface(vertices, np.array([[0, 1, 2], [3, 4, 5]]), 20_000, np.random.default_rng(0))
    large = points[points[:, 2] == 5]
    assert len(large) / 20_000 == pytest.approx(0.9, abs=0.01)
    assert (large[:, :2].sum(1) <= 3 + 1e-9).all()
    assert np.allclose(large[:, :2].mean(0), 1, atol=0.03)
    assert len(geometry.sample_surface(vertices, np.zeros((0, 3), int), 10, np.random.default_rng(0))) == 0


def test_chamfer_and_f_score_equal_their_twins() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random((60, 3)), rng.random((50, 3))
    distances = np.linalg.norm(a[:, None] - b[None], axis=-1)
    to_b, to_a = distances.min(1), distances.min(0)
    assert geometry.chamfer(a, b) == pytest.approx((to_b.mean() + to_a.mean()) / 2)
    precision, recall = (to_b < 0.15).mean(), (to_a < 0.15).mean()
    assert geometry.f_score(a, b, 0.15) == pytest.approx(2 * precision * recall / (precision + recall))
    assert geometry.f_score(a, b + 10) == 0


@pytest.mark.parametrize("seed", range(4))
def test_alignment_finds_scale_and_translation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vertices, faces = cube()
    vertices = vertices * (1, 0.6, 0.3)
    truth = geometry.sample_surface(vertices, faces, geometry.N_POINTS, rng)
    moved = vertices * rng.uniform(0.5, 2) + rng.normal(size=3)
    scores = geometry.shape_scores(moved, faces, truth)
    # Two samplings of one surface are about 0.006 apart.
    assert scores["chamfer"] < 0.008 and scores["f_score"] > 0.999
    assert scores["chamfer_unaligned"] > 0.02


def test_alignment_is_better_than_matched_boxes_where_a_spike_deceives() -> None:
    rng = np.random.default_rng(0)
    vertices, faces = cube()
    truth = geometry.sample_surface(vertices, faces, 4000, rng)
    spike = np.stack([np.zeros(40), np.zeros(40), np.linspace(0.5, 1.5, 40)], 1)
    points = np.concatenate([geometry.sample_surface(vertices * 0.8, faces, 4000, rng), spike])
    by_boxes = geometry.box_alignment(points, truth)
    found = geometry.align(points, truth)
    assert geometry.chamfer(found(points), truth) < 0.6 * geometry.chamfer(by_boxes(points), truth)
    assert found.scale == pytest.approx(1 / 0.8, rel=0.06)


def test_shape_scores_are_in_units_of_the_longest_side() -> None:
    vertices, faces = cube()
    truth = geometry.sample_surface(vertices, faces, 5000, np.random.default_rng(0))
    other = vertices * (1, 1, 0.5)
    small, large = (geometry.shape_scores(other * s, faces, truth * s) for s in (1.0, 7.0))
    assert small == pytest.approx(large, rel=1e-6)
    assert geometry.shape_scores(vertices, faces[:0], truth) == {}


def test_topology_of_closed_open_and_separate_meshes() -> None:
    vertices, faces = cube()
    assert geometry.topology(vertices, faces) == {
        "components": 1,
        "manifold_edges": 1.0,
        "boundary_edges": 0.0,
        "n_faces": 12,
    }
    # Split at every edge, as a file with UV seams stores it, the cube is the same cube.
    assert geometry.topology(vertices[faces].reshape(-1, 3), np.arange(36).reshape(-1, 3))["manifold_edges"] == 1
    without_a_face = geometry.topology(vertices, faces[1:])
    assert without_a_face["boundary_edges"] == pytest.approx(3 / 18)
    other, _ = cube(0.3, (2, 0, 0))
    two = geometry.topology(np.concatenate([vertices, other]), np.concatenate([faces, faces + 8]))
    assert two["components"] == 2
    assert geometry.topology(vertices, faces[:0])["components"] == 0
