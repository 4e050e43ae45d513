"""The hash field's networks in one Triton kernel, against the same networks in torch."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from conrad_engine.config import FieldConfig
from conrad_engine.fields import radiance_field
from conrad_engine.fields.radiance_field import HashField

from .triton_interpreter import import_anew, runnable_kernels

MODULE = "conrad_engine.fields.heads_triton"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = 2e-3 if DEVICE == "cuda" else 1e-5
"""Operands are exact in half precision, so interpreted kernels have no error but that of float32 sums; a GPU rounds those of
gradients to TF32."""


@pytest.fixture(scope="module")
def kernels() -> Iterator[types.ModuleType]:
    with runnable_kernels(MODULE) as module, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GRADIENTS", module.tl.float32)
        # So that each program has several blocks, not all of them the same number.
        patch.setattr(module, "N_PROGRAMS", 2)
        yield module


def make_heads(width: int, hidden: int, outs: tuple[int, ...]) -> list[nn.Sequential]:
    """Networks with a first layer that is exact in half precision."""
    torch.manual_seed(0)
    heads = [nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, n)).to(DEVICE) for n in outs]
    for head in heads:
        head[0].weight.data = head[0].weight.data.half().float()
    return heads


def make_features(n: int, width: int) -> Tensor:
    """Feature by feature, as the hash grid stores them."""
    features = torch.randn(width, n, generator=torch.Generator().manual_seed(1)).half().float()
    return features.to(DEVICE).t().requires_grad_()


def gradients_of(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    return list(torch.autograd.grad(outputs, inputs, weights))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    return float(error.detach())


@pytest.mark.parametrize(
    ("n", "width", "hidden", "outs"),
    [
        (300, 32, 64, (1, 3)),
        (256, 32, 64, (1,)),
        (1, 32, 64, (1, 3)),
        (201, 10, 24, (1, 3)),
        (77, 6, 16, (2,)),
        (140, 64, 48, (3, 5)),
    ],
    ids=str,
)
def test_equals_torch(kernels: types.ModuleType, n: int, width: int, hidden: int, outs: tuple[int, ...]) -> None:
    """Outputs and all gradients against float64, with sizes and counts that fill no block."""
    heads, features = make_heads(width, hidden, outs), make_features(n, width)
    parameters = [parameter for head in heads for parameter in head.parameters()]
    actual = kernels.evaluate(features, *heads)
    found = gradients_of(actual, [features, *parameters])
    exact = [head.double() for head in heads]
    exact_features = features.detach().double().requires_grad_()
    expected = [head(exact_features) for head in exact]
    wanted = gradients_of(expected, [exact_features, *(parameter for head in exact for parameter in head.parameters())])
    for y, reference in zip(actual, expected):
        assert y.shape == reference.shape and relative_error(y, reference) < 1e-5
    for gradient, reference in zip(found, wanted):
        assert gradient.shape == reference.shape and relative_error(gradient, reference) < TOLERANCE


def test_takes_features_of_any_strides_and_none_at_all(kernels: types.ModuleType) -> None:
    heads, features = make_heads(6, 16, (1, 3)), make_features(70, 6)
    for y, reference in zip(kernels.evaluate(features.contiguous(), *heads), kernels.evaluate(features, *heads)):
        torch.testing.assert_close(y, reference, rtol=0, atol=0)
    parameters = [parameter for head in heads for parameter in head.parameters()]
    empty = kernels.evaluate(features[:0], *heads)
    assert [y.shape for y in empty] == [(0, 1), (0, 3)]
    assert all(float(gradient.abs().sum()) == 0 for gradient in gradients_of(empty, parameters))


def test_an_output_that_nothing_depends_on(kernels: types.ModuleType) -> None:
    heads, features = make_heads(6, 16, (1, 3)), make_features(70, 6)
    density, _ = kernels.evaluate(features, *heads)
    density.sum().backward()
    assert float(heads[0][0].weight.grad.abs().sum()) > 0 and float(heads[1][2].weight.grad.abs().sum()) == 0
    features.grad, found = None, features.grad
    heads[0](features).sum().backward()
    assert relative_error(found, features.grad) < TOLERANCE


def test_results_repeat_bit_by_bit(kernels: types.ModuleType) -> None:
    heads, features = make_heads(6, 16, (1, 3)), make_features(300, 6)
    parameters = [features, *(parameter for head in heads for parameter in head.parameters())]
    first, second = (gradients_of(kernels.evaluate(features, *heads), parameters) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(
    ("backend", "fits", "is_wanted", "is_fused"),
    [
        ("triton", True, True, True),
        ("triton", False, True, False),
        ("torch", True, True, False),
        ("triton", True, False, False),
    ],
)
def test_the_field_asks_for_the_kernel_where_triton_encodes(
    backend: str, fits: bool, is_wanted: bool, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FieldConfig(kind="hash_grid", n_levels=3, log2_table=8, max_resolution=32, fused_heads=is_wanted)
    field = HashField(config, torch.tensor([[-1.0] * 3, [1.0] * 3]))
    asked: list[tuple[nn.Module, ...]] = []

    def evaluate(features: Tensor, *heads: nn.Module) -> list[Tensor]:
        asked.append(heads)
        return [head(features) for head in heads]

    monkeypatch.setattr(field.encoding, "backend", lambda device: backend)
    monkeypatch.setattr(field.encoding, "forward", lambda x: x.new_ones(len(x), 6))
    fake = types.SimpleNamespace(evaluate=evaluate, can_run=lambda device, width, hidden: fits)
    monkeypatch.setattr(radiance_field, "_heads_module", lambda: fake)
    density, color = field.density_and_color(torch.zeros(5, 3))
    assert density.shape == (5,) and color.shape == (5, 3)
    torch.testing.assert_close(field.density(torch.zeros(5, 3)), density)
    wanted = [(field.density_head, field.color_head), (field.density_head,)]
    assert asked == (wanted if is_fused else [])


@pytest.mark.slow
def test_kernels_compile_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles without a GPU. The products must be warp-group ones, which take operands from shared memory."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels = import_anew(MODULE)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    sizes = {"WIDTH": 32, "HIDDEN": 64, "N_OUT_0": 1, "COLUMNS": 32}
    forward = sizes | {"ROWS": 64, "BLOCK": kernels.BLOCK}
    backward = sizes | {"OUTS": kernels.OUTS, "BLOCK": kernels.BLOCK_BACKWARD, "GRADIENTS": kernels.GRADIENTS}
    stages = {"num_warps": kernels.WARPS_BACKWARD, "num_stages": kernels.STAGES_BACKWARD}
    for kernel, constants, options in (
        (kernels._forward, forward | {"N_OUT_1": 3}, {"num_warps": kernels.WARPS}),
        (kernels._forward, forward | {"N_OUT_1": 0}, {"num_warps": kernels.WARPS}),
        (kernels._backward, backward | {"N_OUT_1": 3, "ROWS": 128}, stages),
        (kernels._backward, backward | {"N_OUT_1": 0, "ROWS": 64}, stages),
    ):
        signature = {name: "i32" if name == "n_points" else "*fp32" for name in kernel.arg_names}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name] == "*fp32"
        }
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        ptx = triton_compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        assert "wgmma.mma_async" in ptx and "mma.sync" not in ptx


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("n", [1, 1000, 100_003])
def test_the_field_is_the_same_with_and_without_the_kernel(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 rounds z by 5e-4, which turns a few units on or off, and bfloat16 each factor of a gradient by up to 4e-3."""
    from conrad_engine.fields import heads_triton

    torch.manual_seed(0)
    config = FieldConfig(kind="hash_grid", encoder="triton", start_levels=16, fused_heads=True)
    field = HashField(config, torch.tensor([[-1.0] * 3, [1.0] * 3], device="cuda"))
    field.encoding.table.data.uniform_(-1, 1)
    points = torch.rand(n, 3, device="cuda") * 2 - 1

    def run() -> list[Tensor]:
        density, color = field.density_and_color(points)
        loss = density.mean() + (color * torch.arange(3, device="cuda")).mean()
        return [density, color, *torch.autograd.grad(loss, list(field.parameters()))]

    fused = run()
    monkeypatch.setattr(heads_triton, "can_run", lambda *_: False)
    for actual, expected in zip(fused, run()):
        assert relative_error(actual, expected) < 4e-2


@pytest.mark.gpu
@needs_gpu
def test_a_captured_call_repeats() -> None:
    from conrad_engine.fields import heads_triton
    from conrad_engine.graphs import GraphedStep

    heads, features = make_heads(32, 64, (1, 3)), make_features(5000, 32)
    parameters = [features, *(parameter for head in heads for parameter in head.parameters())]

    def step() -> list[Tensor]:
        outputs = heads_triton.evaluate(features, *heads)
        return [y.detach() for y in outputs] + list(torch.autograd.grad(sum(y.sum() for y in outputs), parameters))

    graphed = GraphedStep(step, torch.device("cuda"))
    expected = [value.clone() for value in step()]
    for _ in range(6):
        actual = graphed()
    assert graphed.is_captured and all(torch.equal(a, b) for a, b in zip(actual, expected))
