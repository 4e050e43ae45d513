"""Sparse least squares over edges against dense twins."""

import numpy as np
import pytest

from conrad_engine.mesh.laplacian import divergence, half_cotangents, solver

from .mesh_scenes import sphere_mesh


def test_solver_and_divergence_against_a_dense_twin():
    rng, n = np.random.default_rng(3), 12
    first, second = rng.integers(0, n, (2, 40))
    first, second = first[first != second], second[first != second]
    weights, masses, wanted = rng.random(len(first)), rng.random(n) + 0.1, rng.normal(size=(n, 2))
    differences = rng.normal(size=(len(first), 2))
    # Least squares: sqrt(w) (x_a - x_b) = differences / sqrt(w), sqrt(m) x = wanted / sqrt(m).
    rows = np.zeros((len(first), n))
    rows[np.arange(len(first)), first] += 1
    rows[np.arange(len(first)), second] -= 1
    left = np.concatenate([np.sqrt(weights)[:, None] * rows, np.diag(np.sqrt(masses))])
    right = np.concatenate([differences / np.sqrt(weights)[:, None], wanted / np.sqrt(masses)[:, None]])
    expected = np.linalg.lstsq(left, right, rcond=None)[0]
    given = divergence(first, second, differences, n) + wanted
    np.testing.assert_allclose(solver(first, second, weights, masses)(given), expected, atol=1e-10)


def test_cotangents_of_a_known_triangle():
    vertices = np.array([[0.0, 0, 0], [1, 0, 0], [0, 2, 0]])
    assert half_cotangents(vertices, np.array([[0, 1, 2]]))[0] == pytest.approx([0, 0.25, 1.0])


def test_cotangent_weights_integrate_the_gradient():
    """Of a coordinate on a closed surface: the integral of 1 minus its normal's square, 2/3 of the area of a sphere."""
    ball = sphere_mesh(0.5, 40)
    weights = half_cotangents(ball.vertices.astype(np.float64), ball.faces)
    for axis in range(3):
        x = ball.vertices[ball.faces][..., axis].astype(np.float64)
        squares = np.square(x[:, [1, 2, 0]] - x[:, [2, 0, 1]])
        assert (weights * squares).sum() == pytest.approx(2 / 3 * np.pi, rel=0.01)
