"""Views shared by two processes give what one process gives."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch

from conrad_engine import cli
from conrad_engine import optimize as loop
from conrad_engine import step as steps
from conrad_engine.config import preset, with_overrides
from conrad_engine.errors import Cancelled, InputError, OptimizationError
from conrad_engine.guidance.interfaces import Priors
from conrad_engine.monitor import Command, Monitor
from conrad_engine.ranks import Ranks, helped, taken
from conrad_engine.state import n_total_steps
from conrad_engine.step import TrainStep

from .test_optimize import CPU, BallPrior, toy
from .test_step import Buffered, SplitBallPrior, embedded_step


def run_toy(ranks: Ranks, monitor: Monitor | None = None):
    """Several processes run what is captured on a GPU from buffers that are refilled, as a graph has them."""
    state, config, frame, _ = toy(steps=8, warm=6)
    arguments = (monitor or Monitor(), lambda s: None, lambda s: None, ranks)
    with mock.patch.object(steps, "GraphedStep", Buffered) if ranks.count > 1 else nullcontext():
        prior = SplitBallPrior()
        priors = Priors(sampler=prior, late=lambda: Priors(prior))
        loop.optimize(state, priors, frame.condition, config, *arguments)
    return state


def help_toy(ranks: Ranks, device: torch.device) -> None:
    try:
        run_toy(ranks)
    except Cancelled:
        pass


def leave_early(ranks: Ranks, device: torch.device) -> None:
    """A process that ends before its time."""


@pytest.mark.timeout(600)
def test_two_processes_end_where_one_does_and_stop_together():
    alone = run_toy(Ranks())

    class StopAt(Monitor):
        last = 14

        def progress(self, progress):
            self.step = progress.step

        def command(self):
            return Command.CANCEL if getattr(self, "step", 0) >= self.last else Command.RUN

    with helped(2, CPU, help_toy) as ranks:
        assert (ranks.rank, ranks.count) == (0, 2)
        shared = run_toy(ranks)
    assert shared.step == alone.step == 14 and shared.n_skipped == 0
    for a, b in zip(alone.field.parameters(), shared.field.parameters()):
        assert float((a - b).detach().norm() / a.detach().norm()) < 1e-3
    for a, b in zip(alone.constrained.views, shared.constrained.views):
        assert torch.equal(a.surface.isfinite(), b.surface.isfinite())
    stopping = StopAt()
    stopping.last = 9
    with pytest.raises(Cancelled, match="step 9 of 14"), helped(2, CPU, help_toy) as ranks:
        run_toy(ranks, stopping)


@pytest.mark.timeout(600)
def test_a_lost_process_is_one_sentence():
    with pytest.raises(OptimizationError, match="lost each other"), helped(2, CPU, leave_early) as ranks:
        run_toy(ranks)


def test_shares_are_neighbors_and_what_views_have_in_common_is_kept():
    assert [Ranks(rank, 3).share(6) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    common, noise, nested = torch.tensor(0.5), torch.arange(4), (torch.arange(8).view(4, 2),)
    found = taken((common, noise, nested), slice(2, 4))
    assert found[0] is common and found[1].tolist() == [2, 3] and found[2][0].tolist() == [[4, 5], [6, 7]]


def test_what_cannot_be_shared_is_said():
    with pytest.raises(InputError, match="1 views of a step cannot be shared by 2 GPUs"):
        with_overrides(preset("draft"), {"optimize.n_gpus": 2})
    state, config, frame, _ = toy()
    with pytest.raises(InputError, match="cannot be split"):
        TrainStep(state, BallPrior(), frame.condition, config, Ranks(0, 2))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="without a number"), helped(2, torch.device("cpu", 1), leave_early):
            raise AssertionError("was not entered")
        with pytest.raises(InputError, match="shows 0 GPUs"), helped(2, torch.device("cuda"), leave_early):
            raise AssertionError("was not entered")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_job_is_shared(tmp_path):
    settings = """optimize.warm_start_steps=6 optimize.warm_start_views=2 optimize.warm_start_sampling=2 optimize.n_steps=4
    optimize.n_views=2 field.resolution=32 mesh.resolution=32 mesh.n_faces=1000 mesh.texture_size=64 mesh.turntable_frames=0"""
    sets = [word for item in settings.split() for word in ("--set", item)]
    picture = str(Path(__file__).parent / "pictures" / "robot.png")
    options = ["--preset", "draft", "--device", "cpu", "--threads", "1", "--gpus", "2", "--quiet"]
    assert cli.main(["generate", picture, "--out", str(tmp_path), *options, *sets]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 10


def step_on_gpu(ranks: Ranks, device: torch.device, capture: str, field: str) -> tuple[list[torch.Tensor], list[float]]:
    """Parameters at the end, and what must be 1, 0 and 0: the share of processes that captured, the largest difference
    between their parameters, and the steps that were skipped."""
    train_step = embedded_step(device, capture, ranks, field=field)
    state = train_step.state
    while state.step < n_total_steps(train_step.config):
        train_step()
        state.step += 1
    own = [p.detach().clone() for p in state.field.parameters()]
    means = [p.clone() for p in own]
    captured = torch.full((1,), float(train_step.graphed.is_captured), device=device)
    ranks.average([captured, *means])
    apart = max(float((a - b).abs().max()) for a, b in zip(own, means))
    return own, [float(captured), apart, float(state.n_skipped)]


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("field", ["dense_volume", "hash_grid"])
def test_two_gpus_capture_their_gradients_and_end_where_uncaptured_ones_do(field):
    ends = {}
    for capture in ("off", "auto"):
        with helped(2, torch.device("cuda"), step_on_gpu, capture, field) as ranks:
            ends[capture], found = step_on_gpu(ranks, torch.device("cuda"), capture, field)
        assert found == [float(capture == "auto"), 0.0, 0.0]
    # Sums by atomic additions come out in another order each time, and Adam enlarges that.
    for a, b in zip(ends["off"], ends["auto"]):
        assert float((a - b).norm() / a.norm()) < 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_whole_job_is_shared_by_two_gpus(tmp_path):
    picture = str(Path(__file__).parent / "pictures" / "robot.png")
    assert cli.main(["generate", picture, "--out", str(tmp_path), "--gpus", "2", "--device", "cuda", "--quiet"]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["n_skipped_steps"] == 0
