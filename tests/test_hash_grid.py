"""The hash encoding against a brute-force twin, and its backends against each other."""

from __future__ import annotations

import logging
import math
import sys
import types
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from conrad_engine.config import FieldConfig
from conrad_engine.errors import InputError
from conrad_engine.fields import hash_grid
from conrad_engine.fields.hash_grid import HashGrid, encode, grid_levels

from .triton_interpreter import import_anew, runnable_kernels

SMALL = FieldConfig(n_levels=5, log2_table=9, base_resolution=4, max_resolution=64)
"""Two dense levels, three hashed ones."""
COARSE = replace(SMALL, n_levels=3)
"""One dense level, two hashed ones: little, for Triton's interpreter."""
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def brute_force(position: list[float], table: list[list[float]], config: FieldConfig, smooth: bool) -> list[float]:
    """One position, one level, one corner after the other, in Python numbers (instant-ngp, section 3)."""
    answers: list[float] = []
    first_row = 0
    b = (config.max_resolution / config.base_resolution) ** (1 / max(config.n_levels - 1, 1))
    for level in range(config.n_levels):
        scale = config.base_resolution * b**level - 1
        # As in the engine: integers that float64 misses by a hair are meant as integers.
        resolution = math.ceil(scale - 1e-4) + 1
        n_rows = min(math.ceil(resolution**3 / 8) * 8, 2**config.log2_table)
        is_dense = n_rows >= resolution**3
        sums = [0.0] * config.n_features
        for corner in range(8):
            weight, vertex = 1.0, []
            for axis in range(3):
                along = position[axis] * scale + 0.5
                cell = math.floor(along)
                upper = along - cell
                if smooth:
                    upper = 3 * upper**2 - 2 * upper**3
                bit = corner >> axis & 1
                weight *= upper if bit else 1 - upper
                vertex.append(cell + bit)
            if is_dense:
                row = vertex[0] + vertex[1] * resolution + vertex[2] * resolution**2
            else:
                row = 0
                for value, prime in zip(vertex, (1, 2654435761, 805459861)):
                    row ^= value * prime % 2**32
            for feature in range(config.n_features):
                sums[feature] += weight * table[first_row + row % n_rows][feature]
        answers += sums
        first_row += n_rows
    return answers


def filled(config: FieldConfig, seed: int = 0, smooth: bool = False) -> HashGrid:
    """A grid with features of order one, exact in half precision."""
    generator = torch.Generator().manual_seed(seed)
    grid = HashGrid(config, smooth=smooth, generator=generator)
    grid.table.data = (torch.rand(grid.table.shape, generator=generator) * 2 - 1).half().float()
    return grid


def sample_positions(seed: int = 1) -> Tensor:
    """A ray with runs of samples in one cell, scattered points, points outside, and corners of the cube."""
    generator = torch.Generator().manual_seed(seed)
    ray = torch.linspace(0.01, 0.97, 140)[:, None] * torch.tensor([[1.0, 0.5, 0.2]])
    scattered = torch.rand(30, 3, generator=generator)
    outside = torch.rand(9, 3, generator=generator) * 3 - 1
    return torch.cat([ray, scattered, outside, torch.eye(3), torch.ones(1, 3)])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    return float(error.detach())


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(
    "config",
    [SMALL, replace(SMALL, n_features=4, base_resolution=3, max_resolution=50), replace(SMALL, n_levels=1)],
    ids=["two features", "four features", "one level"],
)
def test_equals_brute_force(config: FieldConfig, smooth: bool) -> None:
    grid = filled(config, smooth=smooth).double()
    positions = torch.rand(40, 3, generator=torch.Generator().manual_seed(3))
    positions = torch.cat([positions, torch.ones(1, 3), torch.zeros(1, 3)])
    expected = [brute_force(p, grid.table.tolist(), config, smooth) for p in positions.double().tolist()]
    actual = encode(positions.double(), grid.table, grid.levels, grid.level_weights, smooth)
    # Scales are float32, which is all that separates the two.
    assert relative_error(actual, torch.tensor(expected)) < 1e-5


def test_levels_are_dense_while_they_fit_and_follow_each_other() -> None:
    levels = grid_levels(SMALL)
    assert [level.resolution for level in levels] == [4, 8, 16, 32, 64]
    assert [level.is_dense for level in levels] == [True, True, False, False, False]
    assert [level.size for level in levels] == [64, 512, 512, 512, 512]
    assert [level.offset for level in levels] == [0, 64, 576, 1088, 1600]


def test_published_size() -> None:
    """Table 1 of the paper with b = 2: powers of two stay exact, so 4096 vertices are not 4097."""
    config = FieldConfig(n_levels=9, log2_table=19, base_resolution=16, max_resolution=4096)
    assert [level.resolution for level in grid_levels(config)] == [2**k for k in range(4, 13)]
    assert HashGrid(config).n_outputs == 18


def test_gradients_by_finite_differences() -> None:
    grid = filled(replace(SMALL, n_levels=2, log2_table=6, base_resolution=3, max_resolution=9))
    x = torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    table = grid.table.detach().double().requires_grad_()
    weights = grid.level_weights.double()
    assert torch.autograd.gradcheck(lambda p, t: encode(p, t, grid.levels, weights), (x, table), eps=1e-7, atol=1e-5)


def test_torch_is_twice_differentiable() -> None:
    """Losses on normals need the gradient of a gradient."""
    grid = filled(SMALL, smooth=True)
    x = torch.rand(5, 3, generator=torch.Generator().manual_seed(6)).requires_grad_()
    (normals,) = torch.autograd.grad(grid(x).sum(), x, create_graph=True)
    normals.square().sum().backward()
    assert grid.table.grad is not None and float(grid.table.grad.abs().sum()) > 0


@pytest.mark.parametrize("n_active", [0, 2, 2.25, 5])
def test_active_levels(n_active: float) -> None:
    grid = filled(SMALL)
    x = sample_positions()
    everything = grid(x).detach()
    grid.active_levels = n_active
    factors = torch.tensor([min(max(n_active - level, 0), 1) for level in range(5)]).repeat_interleave(2)
    encoded = grid(x)
    assert encoded.shape == (len(x), 10)
    torch.testing.assert_close(encoded, everything * factors)
    if n_active:
        encoded.sum().backward()
        rows_of_inactive = grid.table.grad[grid.levels[math.ceil(n_active) - 1].offset + 512 :]
        assert float(rows_of_inactive.abs().sum()) == 0


def test_positions_outside_answer_as_the_nearest_point_of_the_cube() -> None:
    grid = filled(SMALL)
    x = torch.tensor([[-3.0, 0.5, 2.0], [0.2, 1.5, 0.7]], requires_grad=True)
    torch.testing.assert_close(grid(x), grid(x.detach().clamp(0, 1)))
    grid(x).sum().backward()
    assert x.grad[0, 0] == x.grad[0, 2] == x.grad[1, 1] == 0 and x.grad[0, 1] != 0


def test_state_is_the_table_alone() -> None:
    assert list(filled(SMALL).state_dict()) == ["table"]


@pytest.mark.parametrize(
    "changes", [{"n_levels": 0}, {"log2_table": 30}, {"base_resolution": 1}, {"max_resolution": 3}, {"encoder": "cuda"}]
)
def test_bad_settings_are_refused(changes: dict) -> None:
    with pytest.raises(InputError, match="needs|unknown encoder"):
        HashGrid(replace(SMALL, **changes))


# Backends


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    for cached in (hash_grid._report_once, hash_grid._tinycudann_module, hash_grid._triton_module):
        cached.cache_clear()
    with caplog.at_level(logging.WARNING, logger=hash_grid.__name__):
        yield caplog
    for cached in (hash_grid._report_once, hash_grid._tinycudann_module, hash_grid._triton_module):
        cached.cache_clear()


@pytest.mark.parametrize("encoder", ["triton", "tinycudann"])
def test_gpu_backends_on_a_cpu_fall_back_and_say_so_once(encoder: str, warnings: pytest.LogCaptureFixture) -> None:
    x = sample_positions()
    grid = HashGrid(replace(SMALL, encoder=encoder))
    grid.table.data = filled(SMALL).table.data
    torch.testing.assert_close(grid(x), filled(SMALL)(x))
    grid(x)
    assert [record.getMessage() for record in warnings.records] == [
        f"encoder {encoder} needs a CUDA device, not cpu: using torch"
    ]


def test_tinycudann_without_its_gpu_is_reported_once(
    warnings: pytest.LogCaptureFixture, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real package raises EnvironmentError while it is imported on a machine without a GPU."""
    (tmp_path / "tinycudann.py").write_text('raise EnvironmentError("Unknown compute capability.")\n')
    monkeypatch.syspath_prepend(tmp_path)
    grid = HashGrid(replace(SMALL, encoder="tinycudann"))
    for _ in range(2):
        assert grid.backend(torch.device("cuda")) in ("triton", "torch")
    assert sum("Unknown compute capability" in record.getMessage() for record in warnings.records) == 1


class FakeEncoding(nn.Module):
    """tinycudann.Encoding by its documentation: flat `params`, settings by their JSON names."""

    def __init__(self, n_input_dims: int, settings: dict, dtype: torch.dtype) -> None:
        super().__init__()
        assert n_input_dims == 3 and dtype == torch.float32 and settings["otype"] == "HashGrid"
        base, n_levels = settings["base_resolution"], settings["n_levels"]
        self.config = FieldConfig(
            n_levels=n_levels,
            n_features=settings["n_features_per_level"],
            log2_table=settings["log2_hashmap_size"],
            base_resolution=base,
            max_resolution=round(base * settings["per_level_scale"] ** (n_levels - 1)),
        )
        self.smooth = settings["interpolation"] == "Smoothstep"
        last = grid_levels(self.config)[-1]
        self.params = nn.Parameter(torch.zeros((last.offset + last.size) * self.config.n_features))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.params.view(-1, self.config.n_features)
        return encode(x, rows, grid_levels(self.config), torch.ones(self.config.n_levels), self.smooth)


def test_tinycudann_is_called_with_our_parameter(warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tinycudann", types.SimpleNamespace(Encoding=FakeEncoding))
    ours, theirs = filled(SMALL, smooth=True), filled(replace(SMALL, encoder="tinycudann"), smooth=True)
    ours.active_levels = 3.5
    theirs.active_levels = 3.5
    x = sample_positions()
    assert theirs.backend(torch.device("cuda")) == "tinycudann"
    encoded = theirs._encode_tinycudann(x)
    torch.testing.assert_close(encoded, ours(x))
    encoded.square().sum().backward()
    ours(x).square().sum().backward()
    torch.testing.assert_close(theirs.table.grad, ours.table.grad)
    assert not warnings.records


MODULE = "conrad_engine.fields.hash_grid_triton"


@pytest.fixture(scope="module")
def kernels() -> Iterator[types.ModuleType]:
    with runnable_kernels(MODULE) as module:
        yield module


@pytest.mark.parametrize(
    ("smooth", "n_merged", "half_reads", "pairs"),
    [(False, 0, True, True), (True, 2, False, False), (False, 3, True, True), (True, 0, False, False)],
)
def test_triton_equals_torch(
    kernels: types.ModuleType,
    smooth: bool,
    n_merged: int,
    half_reads: bool,
    pairs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "PAIRS", pairs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid = filled(COARSE, smooth=smooth).to(device)
    grid.active_levels = 2.5
    x = sample_positions().to(device)
    reference_x, triton_x = x.double().requires_grad_(), x.clone().requires_grad_()
    reference_table, triton_table = (
        grid.table.detach().to(kind).requires_grad_() for kind in (x.double().dtype, x.dtype)
    )
    # Positions as the kernel has them, in float32; everything after in float64.
    expected = encode(reference_x, reference_table, grid.levels, grid.level_weights.double(), smooth)
    actual = kernels.encode(
        triton_x, triton_table, grid.scales, grid.extents, grid.level_weights, n_merged, smooth, half_reads
    )
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4)).to(device)
    expected.backward(gradient.double())
    actual.backward(gradient)
    assert relative_error(actual, expected) < 1e-5
    assert relative_error(triton_table.grad, reference_table.grad) < 1e-5
    assert relative_error(triton_x.grad, reference_x.grad) < 1e-5


def test_triton_takes_positions_of_any_strides_and_none_at_all(kernels: types.ModuleType) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid = filled(COARSE).to(device)
    x = sample_positions().to(device)

    def run(positions: Tensor) -> Tensor:
        return kernels.encode(positions, grid.table, grid.scales, grid.extents, grid.level_weights, 1)

    torch.testing.assert_close(run(x.t().contiguous().t()), run(x))
    empty = run(x[:0])
    empty.sum().backward()
    assert empty.shape == (0, 6) and float(grid.table.grad.abs().sum()) == 0


@pytest.mark.slow
def test_triton_kernels_compile_for_hopper_with_vector_atomics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles without a GPU. Two scalar atomics in place of one vector atomic would double the backward pass."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels = import_anew(MODULE)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    types_of = {"table_ptr": "*i32", "extent_ptr": "*i32", "n_points": "i32", "first_level": "i32"}
    types_of |= {"stride_point": "i32", "stride_axis": "i32"}
    for kernel, constants in (
        (kernels._forward, {"BLOCK": 128, "HALF": True, "SMOOTH": False}),
        (kernels._backward_table, {"BLOCK": 128, "SMOOTH": False, "RUNS": True, "PAIRS": True}),
        (kernels._backward_positions, {"N_LEVELS": 16, "BLOCK": 128, "HALF": True, "SMOOTH": True}),
    ):
        signature = {name: types_of.get(name, "*fp32") for name in kernel.arg_names}
        signature |= dict.fromkeys(constants, "constexpr")
        # What the launcher knows of real tensors: they start at multiples of 16 bytes.
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        ptx = triton_compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert ".entry" in ptx
        for width in ("v2", "v4"):
            assert (f"add.{width}.f32" in ptx) == (kernel is kernels._backward_table)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("encoder", ["triton", "tinycudann"])
def test_backends_agree_on_a_gpu(encoder: str, smooth: bool) -> None:
    if encoder == "tinycudann":
        pytest.importorskip("tinycudann", reason="tinycudann is not installed")
    config = FieldConfig()
    fast, plain = filled(replace(config, encoder=encoder), smooth=smooth), filled(config, smooth=smooth)
    fast, plain = fast.cuda(), plain.cuda()
    x = torch.rand(20_000, 3, device="cuda")
    fast_x, plain_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = fast(fast_x), plain(plain_x)
    gradient = torch.randn_like(expected)
    actual.backward(gradient)
    expected.backward(gradient)
    assert relative_error(actual, expected) < 1e-3
    assert relative_error(fast.table.grad, plain.table.grad) < 1e-3
    # Without smoothing it jumps at cell borders: of 20 000 points a few lie within rounding of one in the finest levels.
    assert relative_error(fast_x.grad, plain_x.grad) < (1e-3 if smooth else 5e-2)
