"""Pixels are means over their squares, in smaller pictures and between the pixels of one."""

import numpy as np
import pytest
import torch

from conrad_engine.mesh.bake import sample_picture
from conrad_engine.resampling import between_pixels, reduced_by_area


def test_a_reduced_picture_has_the_mean_over_each_square():
    picture = torch.rand(2, 15, 8, dtype=torch.float64)
    # Each pixel as 4 x 3 equal ones, of which 10 x 8 make one of the reduced picture's.
    fine = picture.repeat_interleave(4, 1).repeat_interleave(3, 2)
    slow = fine.view(2, 6, 10, 3, 8).mean((2, 4))
    torch.testing.assert_close(reduced_by_area(picture, 6, 3), slow)


def test_reducing_to_the_same_size_changes_nothing():
    picture = torch.rand(3, 7, 5)
    torch.testing.assert_close(reduced_by_area(picture, 7, 5), picture)


def test_the_mean_between_the_borders_of_a_pixel_is_its_color():
    rng = np.random.default_rng(0)
    picture = rng.random((6, 9, 3)).astype(np.float32)
    # Inside a pixel it is one polynomial of degree 2 in each direction, for which Simpson's rule is exact.
    at, weights = np.array([0.0, 0.5, 1.0]), np.array([1, 4, 1]) / 6
    rows, columns = ((np.arange(n)[:, None] + at).ravel() for n in picture.shape[:2])
    grid = np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2)
    values = between_pixels(picture, grid).reshape(6, 3, 9, 3, 3)
    means = np.einsum("iajbc,a,b->ijc", values, weights, weights)
    np.testing.assert_allclose(means, picture, atol=2e-6)


def test_a_slope_stays_one():
    ramp = np.linspace(0.2, 0.8, 24, dtype=np.float32)
    picture = np.broadcast_to(ramp[None, :, None], (8, 24, 1))
    x = np.linspace(8, 16, 33)
    found = between_pixels(picture, np.stack([x, np.full_like(x, 4.2)], 1))[:, 0]
    np.testing.assert_allclose(found, 0.2 + (x - 0.5) * 0.6 / 23, atol=1e-4)


@pytest.mark.parametrize("footprint", [0.3, 1.9, 2.0, 5.7, 400.0])
def test_a_sampled_photo_keeps_its_mean(footprint):
    photo = 0.3 + 0.4 * np.random.default_rng(1).random((64, 96, 3)).astype(np.float32)
    u, v = np.meshgrid((np.arange(192) + 0.5) / 2, (np.arange(128) + 0.5) / 2)
    found = sample_picture(photo, np.stack([u.ravel(), v.ravel()], 1), footprint)
    assert found.dtype == np.float32 and abs(found.mean() - photo.mean()) < 2e-3
    if footprint > 2:
        assert found.std() < photo.std() / footprint**0.5
