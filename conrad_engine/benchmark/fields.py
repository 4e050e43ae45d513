"""Fields: the hash grid's backends, the dense volume, and rendering with each."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..cameras import Camera, orbit_camera
from ..config import FieldConfig
from ..fields.dense_volume import DenseVolume
from ..fields.hash_grid import HashGrid, encode
from ..fields.radiance_field import HashField
from ..rendering.renderer import render_rays, sample_rays
from .ceilings import Ceilings
from .report import EXPECTED_ERRORS, Report, Row, relative_error

PAPER_GRID = FieldConfig(kind="hash_grid", max_resolution=4096, start_levels=16)
"""The grid that threestudio's dreamfusion-sd asks for: 16 levels of 2 features, tables of 2^19, 16 to 4096 vertices."""
SMALL_GRID = replace(PAPER_GRID, n_levels=4, log2_table=12, max_resolution=64, start_levels=4)
N_CHECKED = 20_000
"""Points of the comparisons in float64."""


def unit_box(device: torch.device) -> Tensor:
    return torch.tensor([[-1.0] * 3, [1.0] * 3], device=device)


def orbit_cameras(n_views: int, size: int, device: torch.device) -> Camera:
    """Random cameras at distance 2.5; made by device operations alone, so it can be captured."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n_views, device=device)

    constant = torch.ones(n_views, device=device)
    return orbit_camera(uniform(-math.pi, math.pi), uniform(-0.2, 0.8), 2.5 * constant, 0.7 * constant, size)


def orbit_rays(n_views: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rays of `orbit_cameras`, all views in one batch."""
    origins, directions = orbit_cameras(n_views, size, device).rays()
    return origins.reshape(-1, 3), directions.reshape(-1, 3)


def ray_points(size: int, n_samples: int, device: torch.device) -> Tensor:
    """Samples along the rays of one camera, ray by ray, in the unit cube."""
    origins, directions = orbit_rays(1, size, device)
    jitter = torch.rand(len(origins), 1, device=device)
    t_starts, steps = sample_rays(origins, directions, unit_box(device), n_samples, jitter)
    positions = origins[:, None] + (t_starts + steps / 2)[..., None] * directions[:, None]
    return ((positions.reshape(-1, 3) + 1) / 2).clamp(0, 1)


def random_features(grid: HashGrid) -> None:
    """Features of order one in place of the tiny initial ones, so that errors mean something."""
    with torch.no_grad():
        grid.table.uniform_(-1, 1)


def run(report: Report, ceilings: Ceilings) -> None:
    """Errors, speed of the encoders alone, and speed of rendering."""
    torch.manual_seed(0)
    config = SMALL_GRID if report.is_small else PAPER_GRID
    size, n_samples = (64, 256) if report.device.type == "cuda" else (16, 16) if report.is_small else (32, 64)
    encoders = ("torch", "triton", "tinycudann") if report.device.type == "cuda" else ("torch",)
    _errors(report, config, encoders)
    points = ray_points(size, n_samples, report.device)
    _encoders(report, ceilings, config, encoders, points)
    _heads(report, ceilings, HashField(replace(config, encoder="auto"), unit_box(report.device)), len(points))
    _renders(report, config, encoders, size, n_samples)


def check_backend(grid: HashGrid, device: torch.device) -> None:
    """Make sure that what is timed is what its name says.

    Raises:
        RuntimeError: Another backend would stand in for the one asked for.
    """
    if grid.backend(device) != grid.encoder:
        raise RuntimeError(f"encoder {grid.encoder} is not usable here")


def _errors(report: Report, config: FieldConfig, encoders: tuple[str, ...]) -> None:
    device = report.device
    report.begin(
        "hash grid, errors",
        f"against float64 on {N_CHECKED} fresh random points and along rays; the gradient to positions jumps at cell "
        "borders, where points within rounding of one count in full",
    )
    points = torch.cat([torch.rand(N_CHECKED // 2, 3, device=device), ray_points(100, 1, device)[: N_CHECKED // 2]])
    reference = HashGrid(config).to(device)
    random_features(reference)
    weight = torch.randn(len(points), reference.n_outputs, device=device)
    x, table = points.double().requires_grad_(), reference.table.detach().double().requires_grad_()
    expected = encode(x, table, reference.levels, reference.level_weights.double())
    expected.backward(weight.double())
    for encoder in encoders:
        try:
            grid = HashGrid(replace(config, encoder=encoder)).to(device)
            grid.load_state_dict(reference.state_dict())
            check_backend(grid, device)
            own = points.clone().requires_grad_()
            actual = grid(own)
            actual.backward(weight)
        except EXPECTED_ERRORS as error:
            report.fail(encoder, error)
            continue
        errors = {
            "output": relative_error(actual, expected),
            "gradient to table": relative_error(grid.table.grad, table.grad),
            "gradient to positions": relative_error(own.grad, x.grad),
        }
        report.add(Row(encoder, notes=errors))


def _encoders(
    report: Report, ceilings: Ceilings, config: FieldConfig, encoders: tuple[str, ...], points: Tensor
) -> None:
    n = len(points)
    report.begin("hash grid", f"{n} points along rays; floor: reading and writing points, features and table once")
    for encoder in encoders:
        try:
            grid = HashGrid(replace(config, encoder=encoder)).to(report.device)
            random_features(grid)
            check_backend(grid, report.device)
            # The layout in which the matrix product behind the encoding hands its gradient back.
            weight = torch.randn(grid.n_outputs, n, device=report.device).t()
            weight = weight if encoder == "triton" else weight.contiguous()
            forward, both = _encode_functions(grid, points, weight)
        except EXPECTED_ERRORS as error:
            report.fail(encoder, error)
            continue
        streams, table = points.nbytes + weight.nbytes, grid.table.nbytes
        report.time(f"{encoder}, forward", forward, ceilings.floor_ms(streams + table))
        floor_ms = ceilings.floor_ms(2 * streams + 3 * table)
        n_calls = 5 if encoder == "torch" else 40
        report.time(f"{encoder}, forward + backward", both, floor_ms, n_calls=n_calls)
        if encoder != "tinycudann":  # it cannot be captured
            report.time(f"{encoder}, forward + backward, captured", both, floor_ms, is_captured=True, n_calls=n_calls)
        if encoder == "triton":
            _triton_variants(report, grid, points, weight, floor_ms)


def _encode_functions(
    grid: HashGrid, points: Tensor, weight: Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    def forward() -> Tensor:
        with torch.no_grad():
            return grid(points)

    def both() -> None:
        grid.table.grad = None
        grid(points).backward(weight)

    return forward, both


def _triton_variants(report: Report, grid: HashGrid, points: Tensor, weight: Tensor, floor_ms: float) -> None:
    """What the choices in `hash_grid_triton` are worth."""
    from ..fields import hash_grid_triton

    def variant(n_merged: int, half_reads: bool, x: Tensor) -> Callable[[], object]:
        def both() -> None:
            grid.table.grad = x.grad = None
            hash_grid_triton.encode(
                x, grid.table, grid.scales, grid.extents, grid.level_weights, n_merged, False, half_reads
            ).backward(weight)

        return both

    chosen = hash_grid_triton.n_merged_levels([level.resolution for level in grid.levels])
    for n_merged in (0, 5, 9, 11):
        name = f"triton, runs of {n_merged} levels summed (chosen: {chosen})"
        report.time(name, variant(n_merged, True, points), floor_ms)
    hash_grid_triton.PAIRS = not hash_grid_triton.PAIRS
    name = f"triton, pairs of rows in one atomic: {hash_grid_triton.PAIRS} (chosen: {not hash_grid_triton.PAIRS})"
    report.time(name, variant(chosen, True, points), floor_ms)
    hash_grid_triton.PAIRS = not hash_grid_triton.PAIRS
    report.time("triton, float32 reads", variant(chosen, False, points), floor_ms)
    leaf = points.clone().requires_grad_()
    report.time("triton, with gradient to positions", variant(chosen, True, leaf), floor_ms)


def _heads(report: Report, ceilings: Ceilings, field: HashField, n: int) -> None:
    """The field's networks as torch's layers and in one kernel."""
    device, heads = report.device, (field.density_head, field.color_head)
    width, n_out = field.encoding.n_outputs, 4
    # Features of order one, as a trained grid has them, in the layout of the Triton encoder.
    features = torch.randn(width, n, device=device).t().requires_grad_()
    weights = [torch.randn(k, n, device=device).t() for k in (1, 3)]
    evaluations: dict[str, Callable[..., list[Tensor]]] = {"layers": lambda x, *heads: [head(x) for head in heads]}
    if field.encoding.backend(device) == "triton":
        from ..fields import heads_triton

        evaluations["fused"] = heads_triton.evaluate

    report.begin(
        "heads, errors", f"against float64 on {N_CHECKED} points; units that rounding turns on or off count in full"
    )
    for name, evaluate in evaluations.items():
        try:
            report.add(Row(name, notes=_head_errors(evaluate, heads, features[:N_CHECKED], weights)))
        except EXPECTED_ERRORS as error:
            report.fail(name, error)

    report.begin(
        "heads",
        f"density and color from features of {n} points; floor: features, outputs and their gradients moved once, or the "
        "products at the rate of bfloat16",
    )
    n_bytes = 4 * n * (width + n_out)
    flop = 2 * n * field.config.hidden * (2 * width + n_out)
    forward_floor_ms = ceilings.floor_ms(n_bytes, flop)
    # Backward: features and gradients of outputs read, gradients of features written; hidden units anew, two products.
    floor_ms = ceilings.floor_ms(2 * n_bytes + 4 * n * width, 4 * flop)
    for name, evaluate in evaluations.items():

        def forward(evaluate: Callable[..., list[Tensor]] = evaluate) -> None:
            with torch.no_grad():
                evaluate(features, *heads)

        def both(evaluate: Callable[..., list[Tensor]] = evaluate) -> None:
            features.grad = None
            field.zero_grad(set_to_none=True)
            torch.autograd.backward(evaluate(features, *heads), weights)

        report.time(f"{name}, forward", forward, forward_floor_ms)
        report.time(f"{name}, forward + backward", both, floor_ms)
        report.time(f"{name}, forward + backward, captured", both, floor_ms, is_captured=True)
        if name == "fused":
            _head_variants(report, both, floor_ms)


def _head_errors(
    evaluate: Callable[..., list[Tensor]], heads: tuple[nn.Sequential, ...], features: Tensor, weights: list[Tensor]
) -> dict[str, float]:
    """Relative errors against float64."""

    def run(dtype: torch.dtype, evaluate: Callable[..., list[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        own = [deepcopy(head).to(dtype) for head in heads]
        x = features.detach().to(dtype).requires_grad_()
        outputs = evaluate(x, *own)
        inputs = [x, *(parameter for head in own for parameter in head.parameters())]
        grads = torch.autograd.grad(outputs, inputs, [w[: len(x)].to(dtype) for w in weights])
        return torch.cat(outputs, 1).detach(), grads[0], torch.cat([grad.flatten() for grad in grads[1:]])

    exact = run(torch.float64, lambda x, *heads: [head(x) for head in heads])
    names = ("output", "gradient to features", "gradient to parameters")
    return {name: relative_error(*pair) for name, *pair in zip(names, run(torch.float32, evaluate), exact)}


def _head_variants(report: Report, both: Callable[[], object], floor_ms: float) -> None:
    """What the choices in `heads_triton` are worth; each row differs from the chosen ones in what it names."""
    from ..fields import heads_triton

    choices: tuple[dict[str, object], ...] = (
        {"BLOCK": 64},
        {"WARPS": 8},
        {"BLOCK_BACKWARD": 32},
        {"BLOCK_BACKWARD": 32, "WARPS_BACKWARD": 4},
        {"BLOCK_BACKWARD": 128},
        {"STAGES_BACKWARD": 1},
        {"STAGES_BACKWARD": 3},
        {"N_PROGRAMS": 132},
        {"N_PROGRAMS": 528},
        {"GRADIENTS": heads_triton.tl.float32},
    )
    for choice in choices:
        chosen = {name: getattr(heads_triton, name) for name in choice}
        for name, value in choice.items():
            setattr(heads_triton, name, value)
        report.time("fused, " + ", ".join(f"{name} {value}" for name, value in choice.items()), both, floor_ms)
        for name, value in chosen.items():
            setattr(heads_triton, name, value)


def _renders(report: Report, config: FieldConfig, encoders: tuple[str, ...], size: int, n_samples: int) -> None:
    report.begin(
        "render", f"{size}x{size} rays x {n_samples} samples, forward and backward: encode, networks, compositing"
    )
    box = unit_box(report.device)
    fields: dict[str, Callable[[], DenseVolume | HashField]] = {
        f"hash grid, {encoder}": lambda encoder=encoder: HashField(replace(config, encoder=encoder), box)
        for encoder in encoders
    }
    volume = replace(config, kind="dense_volume", resolution=24 if report.is_small else 96)
    fields[f"dense volume, {volume.resolution}³"] = lambda: DenseVolume(volume, box)
    origins, directions = orbit_rays(1, size, report.device)
    weight = torch.randn(len(origins), 4, device=report.device)
    for name, make in fields.items():
        try:
            field = make()
            if isinstance(field, HashField):
                check_backend(field.encoding, report.device)
        except EXPECTED_ERRORS as error:
            report.fail(name, error)
            continue

        def both(field: DenseVolume | HashField = field) -> None:
            field.zero_grad(set_to_none=True)
            field.prepare()
            jitter = torch.rand(len(origins), 1, device=origins.device)
            render_rays(field, origins, directions, n_samples, jitter=jitter).rgba.backward(weight)

        n_calls = 5 if name.endswith("torch") else 20
        report.time(name, both, n_calls=n_calls)
        if field.can_be_captured:
            report.time(f"{name}, captured", both, is_captured=True, n_calls=n_calls)
