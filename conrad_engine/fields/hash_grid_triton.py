"""Hash encoding in Triton: forward, and gradients to table and positions. Two features a level.

Same function as `hash_grid.encode`. What makes it fast:
- One program does one level of a block of points, so a level's rows stay in cache; both features of a row are one load.
- The output is stored feature by feature: neighboring threads write neighboring numbers.
- Points come ray by ray, so on coarse levels neighbors share a cell. A segmented scan sums such a run first, and only its
  last point issues the atomic addition ("runs summed first"; correct for points in any order, fast for ray-major ones).

Shapes: positions (n, 3) of any strides, table (rows, 2), scales (levels,), extents (levels, 3) as resolution, offset and
size, level_weights (levels,), features stored as (2 * levels, n). Runs in Triton's interpreter too (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128
"""Points a program; 512 was no faster."""
PAIRS = True
"""Whether x neighbors in one pair of rows share an atomic."""
MERGED_RESOLUTION = 200
"""Levels with fewer vertices a side have their runs summed first: finer cells are seldom shared by neighboring samples."""

COUNTS = ["n_points", "first_level"]
"""Arguments that the compiler is told nothing about: it would make the same code again, half a second to a second each time,
for numbers that divide by 16 and for those that do not."""


@triton.jit
def _level(scale_ptr, extent_ptr, level):
    """Scale, resolution, first row, rows, and whether vertices have rows of their own."""
    resolution = tl.load(extent_ptr + 3 * level)
    size = tl.load(extent_ptr + 3 * level + 2)
    dense = resolution.to(tl.int64) * resolution * resolution <= size
    return tl.load(scale_ptr + level), resolution, tl.load(extent_ptr + 3 * level + 1), size, dense


@triton.jit
def _axis(x_ptr, n, live, stride_point, scale, SMOOTH: tl.constexpr):
    """Cell, weight of its upper vertex, and that weight's derivative, along one axis.

    Clamped, so that no position reads outside of the table; a clamped position has no derivative.
    """
    x = tl.load(x_ptr + n.to(tl.int64) * stride_point, mask=live, other=0.0)
    clamped = tl.minimum(tl.maximum(x, 0.0), 1.0)
    scaled = clamped * scale + 0.5
    cell = tl.floor(scaled)
    weight = scaled - cell
    slope = tl.where(x == clamped, scale, 0.0)
    if SMOOTH:
        slope = slope * 6.0 * weight * (1.0 - weight)
        weight = weight * weight * (3.0 - 2.0 * weight)
    return cell.to(tl.int32), weight, slope


@triton.jit
def _row(ix, iy, iz, resolution, size, dense):
    """Row of a vertex in its level: `hash_grid.corner_rows`."""
    if dense:
        row = ix + (iy + iz * resolution) * resolution
        # Same as row % size: a vertex is at most one beyond the last along each axis.
        row = tl.where(row >= size, row - size, row)
    else:
        # A hashed level's size is a power of two.
        hashed = ix.to(tl.uint32) ^ (iy.to(tl.uint32) * 2654435761) ^ (iz.to(tl.uint32) * 805459861)
        row = (hashed & (size - 1).to(tl.uint32)).to(tl.int32)
    return row


@triton.jit
def _features(table_ptr, row, live, HALF: tl.constexpr):
    """Both features of a row, read as one integer of twice their width."""
    packed = tl.load(table_ptr + row, mask=live, other=0)
    if HALF:
        a = (packed & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        b = (packed >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        a = (packed & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        b = (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return a, b


@triton.jit(do_not_specialize=COUNTS)
def _forward(
    x_ptr, table_ptr, out_ptr, scale_ptr, extent_ptr, weight_ptr, n_points, stride_point, stride_axis,
    BLOCK: tl.constexpr, HALF: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    level = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < n_points
    level_weight = tl.load(weight_ptr + level)
    out_ptr += (2 * level).to(tl.int64) * n_points
    a = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    if level_weight > 0:
        scale, resolution, offset, size, dense = _level(scale_ptr, extent_ptr, level)
        ix, wx, _ = _axis(x_ptr, n, live, stride_point, scale, SMOOTH)
        iy, wy, _ = _axis(x_ptr + stride_axis, n, live, stride_point, scale, SMOOTH)
        iz, wz, _ = _axis(x_ptr + 2 * stride_axis, n, live, stride_point, scale, SMOOTH)
        for corner in tl.static_range(8):
            dx = corner & 1
            dy = (corner >> 1) & 1
            dz = corner >> 2
            w = (wx if dx else 1.0 - wx) * (wy if dy else 1.0 - wy) * (wz if dz else 1.0 - wz)
            row = offset + _row(ix + dx, iy + dy, iz + dz, resolution, size, dense)
            feature_a, feature_b = _features(table_ptr, row, live, HALF)
            a += w * feature_a
            b += w * feature_b
    tl.store(out_ptr + n, a * level_weight, mask=live)
    tl.store(out_ptr + n_points + n, b * level_weight, mask=live)


@triton.jit
def _add_run(first_1, a_1, b_1, first_2, a_2, b_2):
    """Segmented addition: a run's first element starts a new sum."""
    return first_1 | first_2, tl.where(first_2 > 0, a_2, a_1 + a_2), tl.where(first_2 > 0, b_2, b_1 + b_2)


@triton.jit
def _shares_cell(x_ptr, n, other, live, stride_point, stride_axis, scale, ix, iy, iz):
    """Whether point `other` lies in the cell (ix, iy, iz)."""
    jx, _, _ = _axis(x_ptr, other, live, stride_point, scale, False)
    jy, _, _ = _axis(x_ptr + stride_axis, other, live, stride_point, scale, False)
    jz, _, _ = _axis(x_ptr + 2 * stride_axis, other, live, stride_point, scale, False)
    return (ix == jx) & (iy == jy) & (iz == jz)


@triton.jit
def _add_row(grad_ptr, row, a, b, writes):
    """Adds to both features of a row: one [BLOCK, 2] operation, which Hopper does as one vector atomic."""
    pair = tl.arange(0, 2)[None, :]
    mask = writes[:, None] & (pair >= 0)
    tl.atomic_add(grad_ptr + row[:, None] * 2 + pair, tl.join(a, b), mask=mask, sem="relaxed")


@triton.jit
def _add_edge(grad_ptr, low, high, low_a, low_b, high_a, high_b, writes, PAIRS: tl.constexpr):
    """Adds to the rows of two vertices that are neighbors along x.

    Their rows form an aligned pair half of the time (when x is even: the first prime is one), and then one atomic of four
    numbers takes the place of two.
    """
    if PAIRS:
        is_pair = (low ^ high) == 1
        is_turned = low > high
        first = tl.join(tl.where(is_turned, high_a, low_a), tl.where(is_turned, low_a, high_a))
        second = tl.join(tl.where(is_turned, high_b, low_b), tl.where(is_turned, low_b, high_b))
        quad = tl.arange(0, 4)[None, :]
        start = tl.multiple_of(low // 2 * 4, 4)
        values = tl.reshape(tl.join(first, second), [low.shape[0], 4])
        mask = (writes & is_pair)[:, None] & (quad >= 0)
        tl.atomic_add(grad_ptr + start[:, None] + quad, values, mask=mask, sem="relaxed")
        writes = writes & (is_pair == 0)
    _add_row(grad_ptr, low, low_a, low_b, writes)
    _add_row(grad_ptr, high, high_a, high_b, writes)


@triton.jit(do_not_specialize=COUNTS)
def _backward_table(
    x_ptr, grad_out_ptr, grad_ptr, scale_ptr, extent_ptr, weight_ptr, first_level, n_points, stride_point, stride_axis,
    BLOCK: tl.constexpr, SMOOTH: tl.constexpr, RUNS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Adds each point's share to its eight rows; with RUNS, neighbors in one cell are summed before."""
    level = first_level + tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    n = tl.program_id(0) * BLOCK + lane
    live = n < n_points
    level_weight = tl.load(weight_ptr + level)
    if level_weight > 0:
        scale, resolution, offset, size, dense = _level(scale_ptr, extent_ptr, level)
        ix, wx, _ = _axis(x_ptr, n, live, stride_point, scale, SMOOTH)
        iy, wy, _ = _axis(x_ptr + stride_axis, n, live, stride_point, scale, SMOOTH)
        iz, wz, _ = _axis(x_ptr + 2 * stride_axis, n, live, stride_point, scale, SMOOTH)
        grad_out_ptr += (2 * level).to(tl.int64) * n_points
        grad_a = tl.load(grad_out_ptr + n, mask=live, other=0.0) * level_weight
        grad_b = tl.load(grad_out_ptr + n_points + n, mask=live, other=0.0) * level_weight
        writes = live
        if RUNS:
            has_before = live & (lane > 0)
            has_after = live & (lane < BLOCK - 1) & (n + 1 < n_points)
            joins_before = has_before & _shares_cell(
                x_ptr, n, n - 1, has_before, stride_point, stride_axis, scale, ix, iy, iz
            )
            joins_after = has_after & _shares_cell(
                x_ptr, n, n + 1, has_after, stride_point, stride_axis, scale, ix, iy, iz
            )
            first = 1 - joins_before.to(tl.int32)
            writes = live & (joins_after == 0)
        for edge in tl.static_range(4):
            dy = edge & 1
            dz = edge >> 1
            side = (wy if dy else 1.0 - wy) * (wz if dz else 1.0 - wz)
            low_a = (1.0 - wx) * side * grad_a
            low_b = (1.0 - wx) * side * grad_b
            high_a = wx * side * grad_a
            high_b = wx * side * grad_b
            if RUNS:
                _, low_a, low_b = tl.associative_scan((first, low_a, low_b), 0, _add_run)
                _, high_a, high_b = tl.associative_scan((first, high_a, high_b), 0, _add_run)
            low = offset + _row(ix, iy + dy, iz + dz, resolution, size, dense)
            high = offset + _row(ix + 1, iy + dy, iz + dz, resolution, size, dense)
            _add_edge(grad_ptr, low, high, low_a, low_b, high_a, high_b, writes, PAIRS)


@triton.jit(do_not_specialize=COUNTS)
def _backward_positions(
    x_ptr, table_ptr, grad_out_ptr, grad_ptr, scale_ptr, extent_ptr, weight_ptr, n_points,
    stride_point, stride_axis, N_LEVELS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """One program sums all levels of its points, so nothing is added atomically."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < n_points
    grad_x = tl.zeros([BLOCK], tl.float32)
    grad_y = tl.zeros([BLOCK], tl.float32)
    grad_z = tl.zeros([BLOCK], tl.float32)
    row_ptr = grad_out_ptr
    for level in range(N_LEVELS):
        level_weight = tl.load(weight_ptr + level)
        if level_weight > 0:
            scale, resolution, offset, size, dense = _level(scale_ptr, extent_ptr, level)
            ix, wx, slope_x = _axis(x_ptr, n, live, stride_point, scale, SMOOTH)
            iy, wy, slope_y = _axis(x_ptr + stride_axis, n, live, stride_point, scale, SMOOTH)
            iz, wz, slope_z = _axis(x_ptr + 2 * stride_axis, n, live, stride_point, scale, SMOOTH)
            grad_a = tl.load(row_ptr + n, mask=live, other=0.0) * level_weight
            grad_b = tl.load(row_ptr + n_points + n, mask=live, other=0.0) * level_weight
            for corner in tl.static_range(8):
                dx = corner & 1
                dy = (corner >> 1) & 1
                dz = corner >> 2
                row = offset + _row(ix + dx, iy + dy, iz + dz, resolution, size, dense)
                feature_a, feature_b = _features(table_ptr, row, live, HALF)
                # What the loss gains by this corner's weight; then the product rule over the three axes.
                gain = feature_a * grad_a + feature_b * grad_b
                ux = wx if dx else 1.0 - wx
                uy = wy if dy else 1.0 - wy
                uz = wz if dz else 1.0 - wz
                grad_x += gain * uy * uz * (slope_x if dx else -slope_x)
                grad_y += gain * ux * uz * (slope_y if dy else -slope_y)
                grad_z += gain * ux * uy * (slope_z if dz else -slope_z)
        row_ptr += 2 * n_points
    tl.store(grad_ptr + 3 * n, grad_x, mask=live)
    tl.store(grad_ptr + 3 * n + 1, grad_y, mask=live)
    tl.store(grad_ptr + 3 * n + 2, grad_z, mask=live)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, positions, table, scales, extents, level_weights, smooth, half_reads, n_merged):
        n, n_levels = len(positions), len(scales)
        rows = table.detach().half().view(torch.int32) if half_reads else table.detach().view(torch.int64)
        features = torch.empty(2 * n_levels, n, device=table.device, dtype=torch.float32)
        if n > 0:
            _forward[triton.cdiv(n, BLOCK), n_levels](
                positions, rows, features, scales, extents, level_weights, n, *positions.stride(),
                BLOCK=BLOCK, HALF=half_reads, SMOOTH=smooth,
            )  # fmt: skip
        # The rows are needed again only for the gradient to positions.
        rows = rows if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(positions, rows, scales, extents, level_weights)
        ctx.table_shape, ctx.smooth, ctx.half_reads, ctx.n_merged = table.shape, smooth, half_reads, n_merged
        return features.t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        positions, rows, scales, extents, level_weights = ctx.saved_tensors
        n, n_levels = len(positions), len(scales)
        # A gradient that comes from a matrix product has this layout already.
        grad = grad.t().contiguous()
        n_blocks = triton.cdiv(n, BLOCK)
        grad_positions = grad_table = None
        if ctx.needs_input_grad[0]:
            grad_positions = torch.zeros(n, 3, device=grad.device, dtype=torch.float32)
            if n > 0:
                _backward_positions[(n_blocks,)](
                    positions, rows, grad, grad_positions, scales, extents, level_weights, n,
                    *positions.stride(), N_LEVELS=n_levels, BLOCK=BLOCK, HALF=ctx.half_reads, SMOOTH=ctx.smooth,
                )  # fmt: skip
        if ctx.needs_input_grad[1]:
            grad_table = torch.zeros(ctx.table_shape, device=grad.device, dtype=torch.float32)
            for first, last, runs in ((0, ctx.n_merged, True), (ctx.n_merged, n_levels, False)):
                if n > 0 and last > first:
                    _backward_table[n_blocks, last - first](
                        positions, grad, grad_table, scales, extents, level_weights, first, n, *positions.stride(),
                        BLOCK=BLOCK, SMOOTH=ctx.smooth, RUNS=runs, PAIRS=PAIRS,
                    )  # fmt: skip
        return grad_positions, grad_table, None, None, None, None, None, None


def n_merged_levels(resolutions: list[int]) -> int:
    """How many of the levels, coarsest first, have their runs summed first."""
    return sum(resolution < MERGED_RESOLUTION for resolution in resolutions)


def encode(
    positions: Float[Tensor, "n 3"],
    table: Float[Tensor, "rows 2"],
    scales: Float[Tensor, " levels"],
    extents: Int[Tensor, "levels 3"],
    level_weights: Float[Tensor, " levels"],
    n_merged: int,
    smooth: bool = False,
    half_reads: bool = True,
) -> Float[Tensor, "n level_features"]:
    """`hash_grid.encode` on a GPU; not differentiable twice.

    Args:
        positions: Moved into [0, 1] where they are outside.
        table: float32.
        scales: Cells across the unit cube, by level.
        extents: Vertices a side, first row and number of rows, by level; int32.
        level_weights: Factors of the levels' features; a level of weight zero costs nothing.
        n_merged: Levels, coarsest first, whose runs are summed first: `n_merged_levels`.
        smooth: Smoothstep interpolation.
        half_reads: Read features rounded to half precision.

    Returns:
        Features, a transposed view of a (2 * levels, n) tensor.
    """
    return _Encode.apply(positions, table, scales, extents, level_weights, smooth, half_reads, n_merged)
