"""Captured steps do what uncaptured ones do."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from conrad_engine.config import FieldConfig
from conrad_engine.fields.dense_volume import DenseVolume
from conrad_engine.graphs import WARM_UP_CALLS, GraphedStep, cloned, flat

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_on_a_cpu_every_call_is_one_step() -> None:
    total = torch.zeros(2)

    def step(amount: Tensor) -> Tensor:
        return total.add_(amount)

    graphed = GraphedStep(step, CPU)
    for _ in range(WARM_UP_CALLS + 3):
        graphed(torch.ones(2))
    assert total.tolist() == [WARM_UP_CALLS + 3] * 2
    assert not graphed.is_captured


def test_errors_of_the_step_reach_the_caller() -> None:
    def step() -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        GraphedStep(step, CPU)()


def test_a_cpu_generator_is_refused() -> None:
    with pytest.raises(ValueError, match="CPU generator"):
        GraphedStep(lambda: None, CUDA, generators=[torch.Generator()])


class FakeGraph:
    """Stands for CUDA's graph where there is none: `replay` runs what was captured."""

    def replay(self) -> None:
        raise AssertionError("nothing was captured")


def test_a_step_that_cannot_be_captured_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class FailingCapture:
        def __init__(self, graph: FakeGraph, stream: None, capture_error_mode: str) -> None:
            pass

        def __enter__(self) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nlong explanation")

        def __exit__(self, *error: object) -> None:
            raise AssertionError("was not entered")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FailingCapture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(GraphedStep, "_on_side_stream", lambda self, inputs: self._step(*inputs))
    calls = []
    graphed = GraphedStep(lambda: calls.append(1), CUDA)
    with caplog.at_level(logging.WARNING):
        for _ in range(WARM_UP_CALLS + 4):
            graphed()
    assert len(calls) == WARM_UP_CALLS + 4
    assert [record.getMessage() for record in caplog.records] == [
        "the step cannot be captured in a CUDA graph, so it runs slower: "
        "operation not permitted when stream is capturing"
    ]


class Descent:
    """A small fit with noise: optimiser state, random numbers and gradients in one step."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.weights = torch.linspace(-1, 1, 8, device=CUDA).requires_grad_()
        self.optimizer = torch.optim.Adam([self.weights], lr=0.1, capturable=True)
        self.generator = generator

    def __call__(self, target: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        noise = torch.randn(8, device=CUDA, generator=self.generator)
        loss = (self.weights - target + 0.1 * noise).square().sum()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("own_generator", [False, True])
def test_captured_equals_uncaptured(own_generator: bool) -> None:
    results = []
    for enabled in (False, True):
        torch.cuda.manual_seed(7)
        generator = torch.Generator(CUDA).manual_seed(7) if own_generator else None
        step = Descent(generator)
        graphed = GraphedStep(step, CUDA, [generator] if generator else [], enabled)
        losses = [float(graphed(torch.full((8,), float(k), device=CUDA))) for k in range(10)]
        assert graphed.is_captured == enabled
        results.append((losses, step.weights.tolist()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4, abs=1e-5)


@pytest.mark.gpu
@needs_gpu
def test_every_replay_draws_new_numbers_and_reset_captures_anew() -> None:
    graphed = GraphedStep(lambda: torch.rand(4, device=CUDA), CUDA)
    drawn = [tuple(graphed().tolist()) for _ in range(8)]
    assert len(set(drawn)) == 8 and graphed.is_captured
    graphed.reset()
    assert not graphed.is_captured


@pytest.mark.gpu
@needs_gpu
def test_a_step_that_reads_results_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    total = torch.zeros((), device=CUDA)

    def step() -> float:
        return float(total.add_(1))

    graphed = GraphedStep(step, CUDA)
    with caplog.at_level(logging.WARNING):
        values = [graphed() for _ in range(WARM_UP_CALLS + 3)]
    assert values == [float(k + 1) for k in range(WARM_UP_CALLS + 3)]
    assert len(caplog.records) == 1


def test_nested_tensors_are_found_in_order_and_cloned() -> None:
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    nested = (a, ((), (b,)), c)
    assert [len(tensor) for tensor in flat(nested)] == [1, 2, 3]
    copies = flat(cloned(nested))
    assert all(torch.equal(x, y) and x is not y for x, y in zip(copies, (a, b, c)))


@pytest.mark.gpu
@needs_gpu
def test_nested_inputs_are_refilled_and_an_inner_step_joins_the_outer_capture() -> None:
    inner = GraphedStep(lambda x: 2 * x, CUDA)
    outer = GraphedStep(lambda x, pair: inner(x) + pair[0] + pair[1][0], CUDA)
    for k in range(WARM_UP_CALLS + 4):
        x = torch.full((3,), float(k), device=CUDA)
        assert outer(x, (x, (x.double(),))).tolist() == [4.0 * k] * 3
    assert outer.is_captured and not inner.is_captured


@pytest.mark.gpu
@needs_gpu
def test_a_dense_volume_is_captured_after_it_was_used_on_the_default_stream() -> None:
    volume = DenseVolume(FieldConfig(resolution=16, coarsest=8), torch.tensor([[-1.0] * 3, [1.0] * 3], device=CUDA))
    positions = torch.rand(64, 3, device=CUDA) * 2 - 1

    def step() -> None:
        volume.zero_grad(set_to_none=True)
        volume.prepare()
        volume.density(positions).sum().backward()

    step()
    expected = [p.grad.clone() for p in volume.parameters()]
    graphed = GraphedStep(step, CUDA)
    for _ in range(WARM_UP_CALLS + 2):
        graphed()
    assert graphed.is_captured
    for parameter, gradient in zip(volume.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)
