"""Compositing, sampling, occupancy and pictures against slow twins and closed forms."""

import math

import numpy as np
import pytest
import torch

from conrad_engine.cameras import orbit_camera
from conrad_engine.rendering.compositing import distortion, quantile_distances, render_weights
from conrad_engine.rendering.occupancy import OccupancyGrid
from conrad_engine.rendering.renderer import box_intersections, render_picture, render_rays

from . import reference

BOX = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])


class Ball:
    """A ball of constant density whose color tells the position."""

    aabb = BOX

    def __init__(self, density: float = 300.0, radius: float = 0.5) -> None:
        self.value, self.radius, self.n_evaluated = density, radius, 0

    def density(self, positions):
        self.n_evaluated += len(positions)
        return torch.where(positions.norm(dim=-1) < self.radius, self.value, 0.0)

    def density_and_color(self, positions):
        return self.density(positions), positions / 2 + 0.5


def random_rays(generator, n=7, s=24):
    densities = torch.rand(n, s, generator=generator) * 6
    steps = torch.rand(n, 1, generator=generator) * 0.1 + 0.02
    starts = 2 + steps * torch.arange(s)
    return densities, starts, steps


def test_weights_equal_the_slow_twin(generator):
    densities, _, steps = random_rays(generator)
    weights, transmittance = render_weights(densities, steps)
    colors = np.random.default_rng(0).random((7, 24, 3))
    for ray in range(7):
        slow, color, opacity = reference.composite(densities[ray].tolist(), [float(steps[ray])] * 24, colors[ray])
        assert weights[ray].numpy() == pytest.approx(slow, abs=1e-6)
        assert (weights[ray].numpy()[:, None] * colors[ray]).sum(0) == pytest.approx(color, abs=1e-6)
        assert float(weights[ray].sum()) == pytest.approx(opacity, abs=1e-6)
    last = transmittance[:, -1] * torch.exp(-densities[:, -1] * steps[:, 0])
    assert torch.allclose(weights.sum(-1) + last, torch.ones(7), atol=1e-6), "weights and what is left make 1"


def test_weights_are_exact_behind_a_very_dense_sample():
    weights, _ = render_weights(torch.tensor([[1e-4, 1e6, 5.0]]), torch.tensor([[0.1]]))
    assert weights[0, 0] == pytest.approx(1e-5, rel=1e-3) and weights[0, 2] == 0


def test_distortion_equals_the_slow_twin(generator):
    densities, starts, steps = random_rays(generator)
    weights, _ = render_weights(densities, steps)
    mids = starts + steps / 2
    slow = [reference.distortion(weights[i].tolist(), mids[i].tolist(), [float(steps[i])] * 24) for i in range(7)]
    assert distortion(weights, mids, steps).numpy() == pytest.approx(np.array(slow), rel=1e-4)


@pytest.mark.parametrize("fraction", [0.5, 0.05, 0.01])
def test_quantile_of_an_exponential_medium_has_its_closed_form(fraction):
    """Constant density σ over length L: W(t) = 1 - exp(-σ t), so the quantile is -ln(1 - (1 - f) A) / σ."""
    sigma, length, n = 4.0, 1.0, 4000
    steps = torch.tensor([[length / n]])
    starts = steps * torch.arange(n)
    weights, _ = render_weights(torch.full((1, n), sigma), steps)
    opacity = 1 - math.exp(-sigma * length)
    expected = -math.log(1 - (1 - fraction) * opacity) / sigma
    assert float(quantile_distances(weights, starts, steps, fraction)) == pytest.approx(expected, abs=2e-3)


def test_quantile_exists_where_the_printed_rule_has_no_solution():
    """A thin shell of opacity 0.86: T never falls to 5 % of what is lost, the normalised rule still finds the shell."""
    densities = torch.zeros(1, 200)
    densities[0, 100] = -math.log(0.14) / 0.01
    steps = torch.tensor([[0.01]])
    starts = 2 + steps * torch.arange(200)
    weights, transmittance = render_weights(densities, steps)
    assert transmittance.min() > 0.05 * float(weights.sum())
    assert float(quantile_distances(weights, starts, steps, 0.05)) == pytest.approx(3.0, abs=0.011)


def test_box_intersections():
    origins = torch.tensor([[0.0, -3, 0], [0, -3, 0], [0, 0, 0], [5, -3, 0]])
    directions = torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]])
    near, far = box_intersections(origins, directions, BOX)
    assert near[0] == 2 and far[0] == 4
    assert far[1] == near[1] and far[3] == near[3], "a miss is an empty interval"
    assert near[2] == pytest.approx(1e-3) and far[2] == 1, "from inside the box"


def test_occupancy_leaves_the_picture_and_saves_evaluations(generator):
    ball = Ball(radius=0.4)
    grid = OccupancyGrid(BOX, 24, threshold=1.0)
    grid.update(ball, generator)
    assert 0.02 < grid.is_occupied.float().mean() < 0.2
    origins, directions = orbit_camera(0.3, 0.2, 3.0, math.radians(40), 24).rays()
    pictures, counts = [], []
    for occupancy in (None, grid):
        ball.n_evaluated = 0
        pictures.append(render_rays(ball, origins, directions, 64, occupancy))
        counts.append(ball.n_evaluated)
    assert torch.allclose(pictures[0].rgb, pictures[1].rgb, atol=1e-6)
    assert torch.allclose(pictures[0].weights, pictures[1].weights, atol=1e-6)
    assert counts[1] < counts[0] / 5


def test_an_emptied_cell_fades_out_of_the_grid(generator):
    ball = Ball(radius=0.4)
    grid = OccupancyGrid(BOX, 16, threshold=1.0)
    grid.update(ball, generator)
    ball.radius = 0.0
    for _ in range(80):
        grid.update(ball, generator)
    assert not grid.is_occupied.any()


def test_ball_is_seen_with_its_depth_and_color():
    camera = orbit_camera(0.0, 0.0, 3.0, math.radians(40), 33)
    picture = render_picture(Ball(), camera, 256, max_points=20_000)
    middle = picture.rgb[16, 16], picture.opacities[16, 16], picture.depths[16, 16]
    assert middle[1] == pytest.approx(1, abs=1e-3) and middle[2] == pytest.approx(2.5, abs=0.02)
    assert middle[0].tolist() == pytest.approx([0.5, 0.25, 0.5], abs=0.02)
    assert picture.opacities[0, 0] == 0 and picture.on(1.0)[0, 0].tolist() == [1, 1, 1]


def test_chunks_and_early_stop_do_not_change_a_picture():
    camera = orbit_camera(0.5, 0.4, 3.0, math.radians(40), 20)
    whole = render_picture(Ball(30.0), camera, 96, max_points=10**9, early_stop=0.0)
    parts = render_picture(Ball(30.0), camera, 96, max_points=1000, early_stop=1e-4)
    assert (whole.rgb - parts.rgb).abs().max() < 0.01
