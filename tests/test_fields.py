"""Fields: look-ups against the grid's own cells, the initial blob, and starting from a shape."""

import pytest
import torch

from conrad_engine.config import FieldConfig, OptimizeConfig
from conrad_engine.fields.dense_volume import DenseVolume
from conrad_engine.fields.radiance_field import HashField, make_field

BOX = torch.tensor([[-0.8, -1.0, -0.6], [0.8, 1.0, 0.6]])
CONFIG = FieldConfig(resolution=20, coarsest=5, n_levels=4, log2_table=10, max_resolution=40, start_levels=2)


def fields():
    torch.manual_seed(0)
    return [make_field(CONFIG, BOX), make_field(FieldConfig(**{**CONFIG.__dict__, "kind": "hash_grid"}), BOX)]


def test_kinds():
    dense, hashed = fields()
    assert isinstance(dense, DenseVolume) and isinstance(hashed, HashField)


@pytest.mark.parametrize("index", [0, 1])
def test_blob_is_dense_inside_and_empty_outside(index):
    field = fields()[index]
    inside, rim, outside = field.density(torch.tensor([[0.0, 0, 0], [0, 0.45, 0], [0, 0.95, 0]])).tolist()
    assert inside > 100 and 5 < rim < 40 and outside < 0.1
    assert field.density(torch.tensor([[0.0, 1.4, 0.0]])).item() < 0.01, "nothing outside the box"


@pytest.mark.parametrize("index", [0, 1])
def test_density_agrees_with_density_and_color(index):
    field = fields()[index]
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    density, color = field.density_and_color(points)
    assert torch.allclose(density, field.density(points), rtol=1e-4, atol=1e-4)
    assert color.shape == (50, 3) and 0 <= color.min() and color.max() <= 1


def test_cell_centers_read_their_own_cell():
    field = fields()[0]
    torch.nn.init.normal_(field.grids[-1])
    field.prepare()
    centers = field.centers()
    raw = field.volume[0, 0]
    expected = field.density_scale * torch.nn.functional.softplus(raw.flatten())
    assert torch.allclose(field.density(centers.reshape(-1, 3)), expected, rtol=1e-3, atol=1e-3)


def test_every_level_gets_a_gradient_and_x_is_x():
    field = fields()[0]
    field.prepare()
    field.density(torch.tensor([[0.5, 0.0, 0.0]])).sum().backward()
    for grid in field.grids:
        assert grid.grad[0, 0].abs().sum() > 0
    finest = field.grids[-1].grad[0, 0].abs()
    assert finest.sum((0, 1)).argmax() > finest.shape[2] / 2, "a point at +x touches cells at the end of the last axis"


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_start_from_a_shape(index):
    field = fields()[index]
    axes = [torch.linspace(low, high, 40) for low, high in BOX.T]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    # A slab at +x: asymmetric, so that swapped axes show.
    field.initialize(torch.minimum(x - 0.2, 0.6 - x).clamp(-1, 1))
    field.prepare()
    density = field.density(torch.tensor([[0.4, 0.0, 0.0], [-0.4, 0.0, 0.0], [0.0, 0.4, 0.0], [0.4, 0.6, 0.3]]))
    assert density[0] > 20 and density[3] > 5 and density[1] < 2 and density[2] < 5


def test_coarse_to_fine_levels():
    field = fields()[1]
    assert field.encoding.active_levels == 2
    field.set_progress(0.5)
    assert field.encoding.active_levels == 4


def test_smoothness_compares_each_place_with_its_own_neighbour():
    field = fields()[1]
    torch.nn.init.normal_(field.encoding.table)
    places, moves = field.draw_smoothness(torch.Generator().manual_seed(0))
    points = BOX[0] + places * (BOX[1] - BOX[0])
    here, there = (torch.tanh(field.density(x) / CONFIG.density_scale) for x in (points, points + 0.02 * moves))
    torch.testing.assert_close(field.smoothness(places, moves), (here - there).square().mean())


def test_roughness_and_its_gradient_are_those_of_plain_differences():
    field = fields()[0].double()
    for grid in field.grids:
        torch.nn.init.normal_(grid)
    field.prepare()
    ours, volume = field.smoothness(), field.volume
    plain = sum(volume.diff(dim=axis).square().mean() for axis in (2, 3, 4))
    torch.testing.assert_close(ours, plain)
    weight = 0.3
    expected = torch.autograd.grad(weight * plain, list(field.grids), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(weight * ours, list(field.grids)), expected)


def test_parameter_groups_cover_all_parameters():
    for field in fields():
        listed = {id(p) for group in field.parameter_groups(OptimizeConfig()) for p in group["params"]}
        assert listed == {id(p) for p in field.parameters()}
