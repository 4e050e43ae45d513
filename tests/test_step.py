"""One step: the same numbers as ever, the same from buffers as from fresh tensors, the same captured as not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from conrad_engine import step as steps
from conrad_engine import warm_start
from conrad_engine.adam import Adam
from conrad_engine.config import EmbeddedPriorConfig
from conrad_engine.constraint import ConstrainedField
from conrad_engine.fields.radiance_field import make_field
from conrad_engine.finish import view_pixel
from conrad_engine.graphs import GraphedStep, cloned, flat
from conrad_engine.guidance.embedded.prior import EmbeddedPrior
from conrad_engine.guidance.interfaces import GuidanceResult, ReferencePicture, SplitGuidance
from conrad_engine.ranks import Ranks
from conrad_engine.rendering.renderer import render_picture, render_rays
from conrad_engine.state import make_state, n_total_steps
from conrad_engine.step import SOFT_PX, TrainStep, take_step
from conrad_engine.warm_start import ring_cameras

from .host_reads import HostReads
from .test_optimize import BOX, CPU, BallPrior, ball_picture, run, toy

FROZEN = {
    "warm start": (
        [34.850056, 89.152322, 155.316848],
        [
            0.428009, 0.084262, 0.278438, 0.027309,
            0.458117, 0.029456, 0.335991, 0.025452,
            0.443051, 0.088821, 0.270170, 0.028618,
        ],
    ),
    "loss": (
        [21.545879, 54.713786, 112.307985],
        [
            0.249814, 0.110339, 0.190550, 0.047200,
            0.251283, 0.072672, 0.207684, 0.049796,
            0.249775, 0.109479, 0.189735, 0.048627,
        ],
    ),
    "hash grid": (
        [4.755227, 4.712073, 1.349197, 0.566594, 0.093180, 4.528817, 1.388594, 0.966257, 0.180505],
        [
            0.177427, 0.129702, 0.055946, 0.047050,
            0.177369, 0.105181, 0.072641, 0.070922,
            0.177429, 0.129688, 0.055962, 0.047045,
        ],
    ),
    "shell and depth": (
        [19.154273, 43.280743, 84.606058],
        [
            0.245793, 0.108198, 0.148691, 0.042002,
            0.258993, 0.066734, 0.199790, 0.050440,
            0.247801, 0.112031, 0.148625, 0.043654,
        ],
    ),
}  # fmt: skip
"""Norms of the parameters, and mean opacity and colors of three views, after runs of the first version of the loop: one
function that read results on the host as it went, with Adam unfused. "warm start" was run again when pictures came to be
reduced by exact area, which this case's is, with no other change."""


def bumpy_toy(**settings):
    """A toy whose picture comes with a relative depth map, and whose surface has its shell in the second half."""
    state, config, frame, view = toy(**settings)
    config = replace(config, constraint=replace(config.constraint, shell_from=0.5))
    height, width = view.mask.shape[1:]
    v, u = torch.meshgrid(torch.arange(height) - height / 2 + 0.5, torch.arange(width) - width / 2 + 0.5, indexing="ij")
    depth = (u.square() + v.square()).sqrt() / width + 0.1 * u / width
    view = replace(view, surface=torch.where(view.mask < 0.5, math.nan, depth))
    torch.manual_seed(0)
    return make_state(make_field(config.field_, state.field.aabb), [view], config, CPU), config, frame, view


CASES = {
    "warm start": lambda: toy(steps=20, warm=16),
    "loss": lambda: toy("loss", steps=24),
    "hash grid": lambda: toy(steps=12, field="hash_grid", smooth_weight=0.0),
    "shell and depth": lambda: bumpy_toy(steps=24, depth_weight=0.5),
    "fine stage": lambda: toy(steps=12, fine_steps=6),
}


@pytest.mark.parametrize("case", FROZEN)
def test_runs_end_where_the_first_version_of_the_loop_ended(case, monkeypatch):
    monkeypatch.setattr(warm_start, "RING_ELEVATIONS_DEG", (5.0, 30.0))
    state, config, frame, _ = CASES[case]()
    run(state, config, frame)
    norms = [float(p.detach().double().norm()) for p in state.field.parameters()]
    state.field.prepare()
    cameras, seen = ring_cameras(frame.condition, 3, 0.85, 16), []
    for index in range(3):
        picture = render_picture(state.constrained, cameras[index], 32)
        seen += [float(picture.opacities.mean()), *picture.rgb.mean((0, 1)).tolist()]
    # Adam's tiny epsilon turns rounding of near-zero gradients into steps; what the views show is not moved by them.
    assert norms == pytest.approx(FROZEN[case][0], rel=1e-4)
    assert seen == pytest.approx(FROZEN[case][1], rel=1e-4)


class SplitBallPrior(BallPrior):
    """The ball's prior with noise of its own, drawn ahead."""

    def draw(self, n, progress, generator=None):
        return torch.full((), progress), torch.randn(n, 4, 1, 1, generator=generator)

    def distill(self, rgba, cameras, draws):
        amount, noise = draws
        return GuidanceResult(rgba - ball_picture(cameras) + 0.1 * amount * noise, 0.0)

    def gradient(self, rgba, cameras, progress, generator=None):
        return self.distill(rgba, cameras, self.draw(len(rgba), progress, generator))


class Buffered(GraphedStep):
    """A captured step as far as a CPU can play one: the function sees the same tensors every time, refilled in place, and its
    results are handed out as the same tensors."""

    is_running = False
    """Whether the function of any of them runs."""

    def __init__(self, step, device, generators=(), enabled=True):
        super().__init__(step, device, generators, enabled=False)
        self._wants_capture = enabled
        self.n_captures = 0

    def __call__(self, *inputs):
        if not self._inputs:
            self._inputs, self._held = cloned(inputs), None
            self.n_captures += 1
        assert [t.shape for t in flat(self._inputs)] == [t.shape for t in flat(inputs)], "static shapes"
        torch._foreach_copy_(flat(self._inputs), flat(inputs))
        Buffered.is_running = True
        found, shape = tree_flatten(self._step(*self._inputs))
        Buffered.is_running = False
        if self._held is None:
            self._held, self._shape = [torch.empty_like(value) for value in found], shape
        assert shape == self._shape, "the same terms as at the capture"
        torch._foreach_copy_(self._held, found)
        return tree_unflatten(self._held, shape)


@pytest.mark.parametrize("case", CASES)
def test_refilled_buffers_and_static_shapes_give_the_same_run(case, monkeypatch):
    plain, config, frame, _ = CASES[case]()
    prior = SplitBallPrior()
    assert isinstance(prior, SplitGuidance) and not isinstance(BallPrior(), SplitGuidance)
    run(plain, config, frame, prior)
    made = []

    class Noted(Buffered):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            made.append(self)

    monkeypatch.setattr(steps, "GraphedStep", Noted)
    buffered, *_ = CASES[case]()
    run(buffered, config, frame, prior)
    (graphed,) = made
    assert graphed.is_enabled and 2 <= graphed.n_captures <= 4, "captured again for each new term only"
    for a, b in zip(plain.field.parameters(), buffered.field.parameters()):
        assert float((a - b).detach().norm() / a.detach().norm()) < 2e-3
    for key, value in plain.history[-1].items():
        assert buffered.history[-1][key] == pytest.approx(value, rel=2e-3, abs=1e-5)
    for a, b in zip(plain.constrained.views, buffered.constrained.views):
        assert torch.equal(a.surface.isfinite(), b.surface.isfinite())


class Twins(Ranks):
    """Two processes that do the same: each takes all views, and the mean of equals is what each has."""

    def share(self, n):
        return slice(0, n)

    def average(self, tensors):
        assert not Buffered.is_running, "what processes exchange is no part of what is captured"
        assert all(tensor is not None and tensor.isfinite().all() for tensor in tensors)
        exchanged.append(len(tensors))


exchanged: list[int] = []


@pytest.mark.parametrize("case", ["loss", "hash grid", "fine stage"])
def test_gradients_apart_from_the_update_are_the_whole_step(case, monkeypatch):
    monkeypatch.setattr(steps, "GraphedStep", Watched)
    states = []
    for ranks in (Ranks(), Twins(0, 2)):
        exchanged.clear()
        state, config, frame, _ = CASES[case]()
        train_step = TrainStep(state, SplitBallPrior(), frame.condition, config, ranks)
        for state.step in range(n_total_steps(config)):
            train_step()
        n_exchanged = n_total_steps(config) if ranks.count == 2 else 0
        assert train_step.graphed.is_enabled and exchanged == [1 + len(list(state.field.parameters()))] * n_exchanged
        states.append(state)
    for a, b in zip(*(state.field.parameters() for state in states)):
        torch.testing.assert_close(a, b)
    assert states[1].skipped.tolist() == [0, 0]


class Watched(Buffered):
    """Also sees to it that the function keeps to what a CUDA graph can hold."""

    def __call__(self, *inputs):
        step = self._step

        def watched(*held):
            with HostReads() as reads:
                found = step(*held)
            assert reads.found == []
            return found

        self._step = watched
        try:
            return super().__call__(*inputs)
        finally:
            self._step = step


@pytest.mark.parametrize("case", CASES)
def test_no_part_of_a_captured_step_needs_the_host(case, monkeypatch):
    monkeypatch.setattr(steps, "GraphedStep", Watched)
    state, config, frame, _ = CASES[case]()
    train_step = TrainStep(state, SplitBallPrior(), frame.condition, config)
    if case == "warm start":
        state.sampled = ball_picture(ring_cameras(frame.condition, 4, 0.85, 32))
    for state.step in range(0, n_total_steps(config), 5):
        train_step()


def test_a_step_of_the_shipped_prior_needs_no_host(monkeypatch):
    monkeypatch.setattr(steps, "GraphedStep", Watched)
    embedded_step(CPU, "auto")()


def test_masks_and_numbers_from_the_host_are_found():
    values = torch.arange(3.0)
    for act in (lambda: values[values > 1], lambda: float(values[0]), lambda: values * torch.tensor(2.0)):
        with HostReads() as reads:
            act()
        assert reads.found


def test_static_rendering_equals_compacted_rendering_and_its_gradients(generator):
    state, config, frame, _ = toy(steps=40)
    run(state, config, frame)
    state.occupancy.update(state.constrained, generator)
    assert 0.01 < state.occupancy.is_occupied.float().mean() < 0.9
    origins, directions = ring_cameras(frame.condition, 1, 0.85, 24)[0].rays()
    jitter = torch.rand(len(origins), 1, generator=generator)
    weight = torch.randn(len(origins), 4, generator=generator)
    results = []
    for is_static in (False, True):
        state.field.zero_grad()
        state.field.prepare()
        seen = render_rays(state.constrained, origins, directions, 32, state.occupancy, jitter, is_static)
        seen.rgba.backward(weight)
        results.append((seen.rgba.detach(), *(p.grad for p in state.field.parameters())))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_steps_see_the_picture_as_blurred_as_their_views(monkeypatch):
    """In both stages, whose views have 32 and 48 pixels."""
    widths = []
    monkeypatch.setattr(ConstrainedField, "soften", lambda self, width: widths.append(width))
    state, config, frame, _ = toy(steps=2, fine_steps=2)
    run(state, config, frame)
    reach = SOFT_PX * 2 * state.half_frame
    assert sorted(set(widths)) == pytest.approx([reach / 48, reach / 32])


def test_a_field_knows_what_the_finest_views_it_has_seen_show():
    """A job that was ended before its fine stage has seen the coarse ones alone."""
    state, config, *_ = toy(steps=2, fine_steps=2)
    for step, size in ((0, 32), (2, 32), (3, 48), (4, 48)):
        state.step = step
        assert view_pixel(state, config) == pytest.approx(2 * state.half_frame / size)


def test_a_bad_step_changes_nothing_and_is_counted_in_a_row():
    state, *_ = toy()
    parameters = list(state.field.parameters())
    for number, expected in ((1.0, [0, 0]), (math.inf, [1, 1]), (math.nan, [2, 2]), (1.0, [2, 0])):
        is_bad = number != 1.0
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        parameters[1].grad[0, 0, 0, 0, 0] = number
        before = [p.detach().clone() for p in parameters]
        n_taken = float(state.adam.state[parameters[0]]["step"])
        take_step(state, torch.tensor(1.0))
        assert all(torch.equal(a, b) for a, b in zip(before, parameters)) == is_bad
        assert float(state.adam.state[parameters[0]]["step"]) == n_taken + (not is_bad)
        assert state.skipped.tolist() == expected
    take_step(state, torch.tensor(math.nan))
    assert state.n_skipped == 3, "a loss that is not finite counts, too"


def test_adam_is_torchs_own_and_takes_over_its_state():
    torch.manual_seed(0)
    ours, theirs = torch.randn(5).requires_grad_(), torch.zeros(5).requires_grad_()
    with torch.no_grad():
        theirs.copy_(ours)
    adam = Adam([{"params": [ours], "lr": 0.5}], betas=(0.9, 0.95), eps=1e-10)
    reference = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-10)
    adam.param_groups[0]["lr"] = 0.1
    for _ in range(3):
        ours.grad = torch.randn(5)
        theirs.grad = ours.grad.clone()
        adam.step()
        reference.step()
        torch.testing.assert_close(ours, theirs)
    other = ours.detach().clone().requires_grad_()
    resumed = Adam([{"params": [other], "lr": 0.1}], betas=(0.9, 0.95), eps=1e-10)
    resumed.load_state_dict(reference.state_dict())
    resumed.load_state_dict(resumed.state_dict())
    other.grad, theirs.grad = ours.grad, ours.grad.clone()
    resumed.step()
    reference.step()
    torch.testing.assert_close(other, theirs)
    assert float(resumed.state[other]["step"]) == 4


def test_a_step_with_tinycudann_is_not_captured(monkeypatch):
    """It would end the process."""
    _, config, frame, view = toy(steps=4)
    config = replace(config, field_=replace(config.field_, kind="hash_grid", n_levels=2, log2_table=10))
    state = make_state(make_field(config.field_, BOX), [view], config, CPU)
    monkeypatch.setattr(steps, "GraphedStep", Buffered)
    assert TrainStep(state, SplitBallPrior(), frame.condition, config).graphed.is_enabled
    monkeypatch.setattr(type(state.field.encoding), "backend", lambda self, device: "tinycudann")
    assert not TrainStep(state, SplitBallPrior(), frame.condition, config).graphed.is_enabled


def test_long_runs_look_for_surfaces_less_often(monkeypatch):
    looks = []
    for n_steps in (100, 1000):
        state, config, frame, _ = toy(steps=n_steps)
        step = TrainStep(state, SplitBallPrior(), frame.condition, config)
        found = []
        monkeypatch.setattr(state.constrained, "infer_surfaces", lambda *a, found=found: found.append(1))
        for state.step in range(20):
            step._look_around()
        looks.append(len(found))
    assert looks == [10, 4]


def embedded_step(device: torch.device, capture: str, ranks: Ranks = steps.ALONE, **settings) -> TrainStep:
    """Steps with the shipped prior."""
    _, config, frame, view = toy(steps=40, capture=capture, **settings)
    torch.manual_seed(0)
    field = make_field(
        replace(config.field_, encoder="auto"), torch.tensor([[-0.85, -1, -0.85], [0.85, 1, 0.85]]).to(device)
    )
    config = replace(config, render=replace(config.render, size=64))
    state = make_state(field, [view.to(device)], config, device)
    prior = EmbeddedPrior(EmbeddedPriorConfig(precision="float32"), device)
    rgba = ball_picture(ring_cameras(frame.condition, 1, 0.75, 64))[0]
    prior.set_reference(ReferencePicture(rgba.to(device), frame.condition.to(device, torch.float32)))
    return TrainStep(state, prior, frame.condition, config, ranks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("field", "fine_steps"), [("dense_volume", 0), ("hash_grid", 0), ("dense_volume", 10)])
def test_a_captured_run_equals_a_plain_one(field, fine_steps):
    results = []
    for capture in ("off", "auto"):
        train_step = embedded_step(torch.device("cuda"), capture, field=field, fine_steps=fine_steps)
        state = train_step.state
        while state.step < n_total_steps(train_step.config):
            terms = {name: float(value) for name, value in train_step().items()}
            state.step += 1
        assert train_step.graphed.is_captured == (capture == "auto")
        results.append(([p.detach().clone() for p in state.field.parameters()], terms, state.n_skipped))
    (plain, plain_terms, _), (captured, captured_terms, n_skipped) = results
    assert n_skipped == 0
    # Sums by atomic additions come out in another order each time, and Adam enlarges that.
    for a, b in zip(plain, captured):
        assert float((a - b).norm() / a.norm()) < 2e-2
    assert captured_terms == pytest.approx(plain_terms, rel=5e-2, abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_preview_between_captured_steps_disturbs_nothing():
    """What a preview leaves on the default stream must not be waited for by a later capture."""
    train_step = embedded_step(torch.device("cuda"), "auto", field="dense_volume")
    for _ in range(20):
        train_step.state.field.prepare()
        train_step()
        train_step.state.step += 1
    assert train_step.graphed.is_captured
