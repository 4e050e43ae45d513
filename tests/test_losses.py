"""Depth losses against their slow twins; rays that do not count leave no trace."""

from __future__ import annotations

import pytest
import torch

from conrad_engine import losses

from . import reference

TWINS = {
    "correlation": (losses.correlation_loss, lambda a, b: 1 - reference.correlation(a, b)),
    "ranking": (losses.ranking_loss, reference.ranking),
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("is_masked", [False, True])
def test_depth_losses_equal_their_twins(name, is_masked, generator):
    loss, twin = TWINS[name]
    depths, relative = (torch.rand(40, generator=generator, dtype=torch.float64) for _ in range(2))
    is_usable = torch.rand(40, generator=generator) < 0.6 if is_masked else torch.ones(40, dtype=torch.bool)
    relative[~is_usable] = torch.nan
    depths.requires_grad_()
    found = loss(depths, relative, is_usable if is_masked else None)
    kept = depths.detach()[is_usable], relative[is_usable]
    assert float(found.detach()) == pytest.approx(twin(*(x.numpy() for x in kept)), rel=1e-9)
    found.backward()
    assert torch.isfinite(depths.grad).all() and (depths.grad[~is_usable] == 0).all()
    few = depths.detach()[is_usable].requires_grad_()
    loss(few, relative[is_usable]).backward()
    torch.testing.assert_close(depths.grad[is_usable], few.grad)


@pytest.mark.parametrize("name", TWINS)
def test_depths_in_the_right_order_cost_nothing_and_none_at_all_are_no_fault(name):
    loss, _ = TWINS[name]
    relative = torch.linspace(0, 1, 9)
    assert float(loss(2 + 3 * relative, relative)) == pytest.approx(0, abs=1e-6)
    assert float(loss(2 - 3 * relative, relative)) > 0.5
    depths = relative.clone().requires_grad_()
    loss(depths, torch.full((9,), torch.nan), torch.zeros(9, dtype=torch.bool)).backward()
    assert torch.isfinite(depths.grad).all()
    assert losses.ranking_loss(relative.square(), relative) == 0, "only the order counts"


def test_descending_the_ranking_loss_sorts_the_depths(generator):
    relative = torch.rand(20, generator=generator)
    depths = torch.rand(20, generator=generator).requires_grad_()
    adam = torch.optim.Adam([depths], lr=0.05)
    for _ in range(200):
        adam.zero_grad()
        losses.ranking_loss(depths, relative).backward()
        adam.step()
    assert float(losses.ranking_loss(depths, relative)) < 1e-3
