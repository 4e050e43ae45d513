"""The rasterizer against a slow twin and simple scenes."""

import math

import numpy as np
import pytest
import torch

from conrad_engine.cameras import orbit_camera
from conrad_engine.mesh.mesh import TexturedMesh, dots, lengths, vertex_normals
from conrad_engine.mesh.raster import (
    AMBIENT,
    GRAY,
    rasterize,
    rasterize_projected,
    reduced,
    render_mesh,
    render_surface,
    render_with_depth,
    sample_texture,
)

from .mesh_scenes import camera as ball_camera
from .mesh_scenes import sphere_mesh


def slow(uv, z, faces, width, height):
    """One pixel and one triangle at a time."""
    best = np.full((height, width), -1)
    depth = np.full((height, width), np.inf)
    for index, face in enumerate(faces):
        if (z[face] <= 1e-4).any():
            continue
        a, b, c = uv[face]
        area = np.cross(b - a, c - a)
        if abs(area) < 1e-12:
            continue
        for y in range(height):
            for x in range(width):
                p = np.array([x + 0.5, y + 0.5])
                weights = np.array([np.cross(c - b, p - b), np.cross(a - c, p - c), np.cross(b - a, p - a)]) / area
                if (weights >= -1e-9).all():
                    d = 1 / (weights / z[face]).sum()
                    if d < depth[y, x]:
                        best[y, x], depth[y, x] = index, d
    return best, np.where(np.isfinite(depth), depth, 0)


@pytest.mark.filterwarnings("ignore:Arrays of 2-dimensional vectors")
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_slow_twin(seed):
    rng = np.random.default_rng(seed)
    uv, z = rng.uniform(-4, 20, (24, 2)), rng.uniform(0.5, 3, 24)
    z[3] = -1.0
    faces = np.stack([rng.permutation(24)[:3] for _ in range(12)])
    fast = rasterize_projected(uv, z, faces, 16, 12)
    best, depth = slow(uv, z, faces, 16, 12)
    assert (fast.faces == best).mean() > 0.99 and np.abs(fast.z_depths - depth).max() < 1e-5
    found = fast.faces >= 0
    assert np.allclose(fast.barycentric[found].sum(1), 1, atol=1e-5)


def test_pieces_change_nothing(monkeypatch):
    """Not even between triangles that are equally near: the later one is seen, in one piece or in many."""
    rng = np.random.default_rng(2)
    uv, z = rng.uniform(-4, 20, (24, 2)), np.ones(24)
    faces = np.stack([rng.permutation(24)[:3] for _ in range(12)])
    faces = np.concatenate([faces, faces])
    whole = rasterize_projected(uv, z, faces, 16, 12)
    monkeypatch.setattr("conrad_engine.mesh.raster.MAX_CANDIDATES", 7)
    pieces = rasterize_projected(uv, z, faces, 16, 12)
    for name in ("faces", "barycentric", "z_depths"):
        assert (getattr(whole, name) == getattr(pieces, name)).all(), name
    assert (whole.faces[whole.faces >= 0] >= 12).all()


def quad(y: float, half: float = 0.5):
    vertices = np.array([[-half, y, -half], [half, y, -half], [half, y, half], [-half, y, half]], np.float32)
    return vertices, np.array([[0, 1, 2], [0, 2, 3]], np.int32)


def test_depth_and_position_of_a_facing_square():
    camera = orbit_camera(0.0, 0.0, 3.0, math.radians(40), 65)
    vertices, faces = quad(0.5)
    fragments = rasterize(vertices, faces, camera)
    assert fragments.z_depths[32, 32] == pytest.approx(3.5, abs=1e-4)
    expected = 65 / 2 / math.tan(math.radians(20)) / 3.5
    assert (fragments.faces[32] >= 0).sum() == pytest.approx(expected, abs=1)
    positions = fragments.interpolate(faces, vertices)
    uv, _ = camera.project(torch.from_numpy(positions[20, 40][None]))
    assert uv[0].tolist() == pytest.approx([40.5, 20.5], abs=1e-3), "interpolated positions project to their pixel"


def test_perspective_correct_on_a_slanted_square():
    camera = orbit_camera(0.0, 0.0, 3.0, math.radians(50), 64)
    vertices = np.array([[-0.5, -1, -0.5], [0.5, 1, -0.5], [0.5, 1, 0.5], [-0.5, -1, 0.5]], np.float32)
    positions = rasterize(vertices, quad(0)[1], camera).interpolate(quad(0)[1], vertices)
    found = np.argwhere(np.abs(positions).sum(-1) > 0)
    for row, column in found[::97]:
        uv, _ = camera.project(torch.from_numpy(positions[row, column][None]))
        assert uv[0].tolist() == pytest.approx([column + 0.5, row + 0.5], abs=1e-2)


def textured_quad(y=0.0):
    vertices, faces = quad(y)
    texture = np.zeros((2, 2, 3), np.uint8)
    texture[0, 0], texture[0, 1], texture[1, 0], texture[1, 1] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    uvs = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    return TexturedMesh(vertices, faces, uvs, vertex_normals(vertices, faces), texture)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_blocks_are_reduced_as_numpy_does(n):
    samples = np.random.default_rng(n).random((5 * n, 7 * n, 4), np.float32)
    blocks = samples.reshape(5, n, 7, n, 4)
    assert np.array_equal(reduced(samples, n) / np.float32(n * n), blocks.mean((1, 3)))
    assert np.array_equal(reduced(samples, n, np.minimum), blocks.min((1, 3)))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_row_products_are_numpy_s(kind):
    a, b = np.random.default_rng(0).normal(size=(2, 500, 3)).astype(kind)
    assert np.array_equal(dots(a, b), (a * b).sum(1))
    assert np.array_equal(lengths(a), np.linalg.norm(a, axis=1))


def test_texture_lies_upright():
    camera = orbit_camera(0.0, 0.0, 3.0, math.radians(40), 64)
    rgba, depth = render_with_depth(textured_quad(), camera)
    assert np.array_equal(rgba, render_mesh(textured_quad(), camera))
    rows, columns = np.nonzero(rgba[..., 3] > 0.9)
    top, bottom, left, right = rows.min() + 2, rows.max() - 2, columns.min() + 2, columns.max() - 2
    assert rgba[top, left, 0] > 0.8 > 0.3 > rgba[top, left, 2], "red is top left"
    assert rgba[top, right, 1] > 0.8 and rgba[bottom, left, 2] > 0.8 and rgba[bottom, right].min() > 0.8
    assert (depth[rgba[..., 3] == 0] == 0).all()


def test_square_behind_the_camera_is_not_drawn():
    camera = orbit_camera(0.0, 0.0, 3.0, math.radians(40), 16)
    assert (rasterize(*quad(-5.0), camera).faces == -1).all()


def test_texel_centers_are_exact():
    texture = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    uvs = np.array([[0.125, 1 - 1 / 6], [0.875, 1 / 6], [0.5, 1 - 1 / 6]])
    assert sample_texture(texture, uvs)[:, 0].tolist() == pytest.approx([0, 11, 1.5])


def test_many_small_triangles_and_one_large_one():
    axis = np.linspace(-1, 1, 150)
    x, z = np.meshgrid(axis, axis)
    vertices = np.stack([x, 0.02 * np.sin(9 * x), z], -1).reshape(-1, 3).astype(np.float32)
    index = np.arange(150 * 150).reshape(150, 150)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]
    faces = np.concatenate([np.stack(t, -1).reshape(-1, 3) for t in ((a, b, c), (b, d, c))])
    vertices = np.concatenate([vertices, quad(0.5, 5.0)[0]])
    faces = np.concatenate([faces, quad(0.5)[1] + 150 * 150])
    fragments = rasterize(vertices, faces, orbit_camera(0.0, 0.0, 3.0, math.radians(30), 200))
    assert (fragments.faces >= 0).all(), "the large square fills what the small ones leave, and there are no cracks"
    assert (fragments.faces[100, 60:140] < len(faces) - 2).all()


@pytest.mark.parametrize("azimuth_deg", [0.0, 130.0])
def test_surfaces_are_lit_over_the_left_shoulder(azimuth_deg):
    ball = sphere_mesh(0.5, 24)
    normals = ball.vertices / np.linalg.norm(ball.vertices, axis=1, keepdims=True)
    mesh = TexturedMesh(
        ball.vertices, ball.faces, np.zeros((len(normals), 2), np.float32), normals, np.zeros((4, 4, 3), np.uint8)
    )
    rgba = render_surface(mesh, ball_camera(azimuth_deg, 20.0, 64))
    assert rgba[0, 0].tolist() == [0, 0, 0, 0] and rgba[32, 32, 3] == 1
    assert np.array_equal(rgba[..., 0], rgba[..., 2]) and rgba.max() <= 1 + 1e-6
    upper_left, middle, lower_right = (float(rgba[i, i, 0]) for i in (22, 32, 42))
    assert upper_left > middle > lower_right >= AMBIENT * GRAY - 1e-6
    assert upper_left == pytest.approx(GRAY, abs=0.05)
