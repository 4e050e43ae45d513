"""Signed distances and smooth continuation against slow twins."""

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from conrad_engine.mesh.mesh import Mesh
from conrad_engine.mesh.outline import (
    HINT_PX,
    SurfaceView,
    continued,
    fit_outline,
    hull_distances,
    outline_distances,
    silhouette,
    surface_distances,
)

from .mesh_scenes import ball, camera, sphere_mesh, trace


def disk(size, center, radius):
    """Soft coverage of a disk, by 8 x 8 samples a pixel."""
    axis = (np.arange(size * 8) + 0.5) / 8
    inside = np.hypot(axis[None] - center[0], axis[:, None] - center[1]) < radius
    return inside.reshape(size, 8, size, 8).mean((1, 3)).astype(np.float32)


def test_outline_distances_of_a_soft_disk_are_subpixel():
    v, u = np.mgrid[:48, :48] + 0.5
    truth = 14.3 - np.hypot(u - 23.7, v - 24.2)
    assert np.abs(outline_distances(disk(48, (23.7, 24.2), 14.3)) - truth).max() < 0.75
    near = np.abs(truth) < 4
    assert np.abs(outline_distances(disk(48, (23.7, 24.2), 14.3)) - truth)[near].mean() < 0.15


def test_distances_of_hard_outlines_are_those_to_the_nearest_border_pixel():
    inside = disk(40, (17.2, 22.9), 11.6) > 0.5
    border = np.argwhere(binary_dilation(inside) & binary_dilation(~inside))
    to_border = np.sqrt(np.square(np.indices(inside.shape)[..., None] - border.T[:, None, None]).sum(0)).min(-1)
    found = outline_distances(inside.astype(np.float32))
    truth = np.where(inside, to_border, -to_border)
    nearest_offset = np.where(np.abs(found - truth - 0.5) < 1e-6, 0.5, -0.5)
    assert np.abs(found - truth - nearest_offset).max() < 1e-6, (
        "half a pixel from a border pixel's center to the outline"
    )


@pytest.mark.parametrize("value, sign", [(0.0, -1), (1.0, 1)])
def test_empty_and_full_masks_have_no_outline(value, sign):
    assert (sign * outline_distances(np.full((5, 7), value, np.float32)) > 1000).all()


def test_surface_distances_of_a_distorted_ball():
    axis = np.linspace(-1, 1, 41)
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    truth = 0.6 - np.sqrt(x * x + y * y + z * z)
    found = surface_distances(np.clip(np.tanh(3 * truth), -0.4, 0.4), 0.05)
    error = np.abs(found - truth)[np.abs(truth) < 0.2]
    assert error.max() < 0.05 and error.mean() < 0.015, "within a cell, a third of one on the average"


@pytest.mark.parametrize("sign", [-1, 1])
def test_without_a_surface_everything_is_far_from_it(sign):
    found = surface_distances(np.full((4, 5, 6), 0.01 * sign), 0.05)
    assert (sign * found > 0.05 * np.hypot(np.hypot(4, 5), 6)).all()


def test_hull_is_the_cone_of_the_mask():
    view = camera(elevation_deg=0.0)
    mask, _ = trace(ball(0.5), view)
    hull = hull_distances(mask, view)
    # Seen from distance 3, a ball's cone touches it nearer than its middle.
    points = torch.tensor([[0.0, 0, 0], [0.4, 0, 0], [0.6, 0, 0], [0.0, 1.0, 0.6], [0.0, -5.0, 0.0]])
    values = hull(points)
    assert values[0] == pytest.approx(0.5, abs=0.03) and values[1] == pytest.approx(0.11, abs=0.02)
    assert values[2] < 0 < values[3] and values[4] > 0, "open behind the camera"


def test_continuation_minimizes_its_energy():
    rng = np.random.default_rng(0)
    mask = np.ones((12, 10), bool)
    mask[:2, 4:] = False
    known = np.where(rng.random(mask.shape) < 0.15, rng.random(mask.shape), np.nan)
    known[~mask] = np.nan
    hint = rng.random(mask.shape)
    found = continued(known, mask, hint)
    assert np.allclose(found[np.isfinite(known)], known[np.isfinite(known)])
    shifted = hint - np.median((hint - known)[np.isfinite(known)])

    def energy(x):
        total = ((x - shifted)[mask & np.isnan(known)] ** 2).sum() / HINT_PX**2
        for axis in (0, 1):
            both = np.minimum(mask, np.roll(mask, -1, axis))
            both[(slice(None),) * axis + (-1,)] = False
            total += ((np.roll(x, -1, axis) - x)[both > 0] ** 2).sum()
        return total

    best = energy(found.astype(np.float64))
    for y, x in np.argwhere(mask & np.isnan(known)):
        for step in (-1e-2, 1e-2):
            other = found.astype(np.float64)
            other[y, x] += step
            assert energy(other) > best


def test_fit_moves_the_outline_and_not_the_middle():
    view = camera()
    seen = SurfaceView(view, *trace(ball(0.5), view))
    small = sphere_mesh(0.493)
    fitted = fit_outline(small, [seen])
    covered, mask = silhouette(fitted, seen, 512)
    before, _ = silhouette(small, seen, 512)
    wrong = lambda c: (c != (mask > 0.5)).sum()  # noqa: E731
    assert wrong(covered) < 0.4 * wrong(before)
    toward = np.array([0.0, -np.cos(np.radians(10)), np.sin(np.radians(10))])
    middle = np.abs(small.vertices @ toward) > 0.3
    assert np.allclose(fitted.vertices[middle], small.vertices[middle], atol=1e-4)
    assert isinstance(fitted, Mesh) and (fitted.faces == small.faces).all()
