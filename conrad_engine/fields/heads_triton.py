"""The hash field's small networks in Triton, all heads in one kernel: forward, and gradients to features and parameters.

A head is Linear, ReLU, Linear. Layer by layer, the numbers of its hidden units are written to memory and read again several
times a step, which takes longer than the mathematics. Here they never leave a program, as in tiny-cuda-nn's fully fused
networks (arXiv:2106.12372, section 4); the backward pass computes them anew.

With x a point's features, z = W x + b, h = max(z, 0), y = V h + c and g = dL/dy:
dL/dz = [z > 0] Vᵀ g, dL/dx = Wᵀ dL/dz; and summed over points dL/dW = Σ dL/dz xᵀ, dL/db = Σ dL/dz, dL/dV = Σ g hᵀ, dL/dc = Σ g.
Backward, the heads' W are stacked, and V has a row for each output of both, with zeros for the other head's units: to the
tensor cores the heads are one. Each program walks over many blocks of points with its sums in registers; the programs' sums are
added up afterwards in a fixed order, so that results repeat bit by bit.

Operands of matrix products have 16 bits, sums 32: float16 for z (relative rounding 5e-4, that of TF32), bfloat16 for gradients
(4e-3, unbiased), which are too small for float16. All else is float32.

Shapes: features (width, n), feature by feature as `hash_grid_triton` writes them; outputs (n_out, n). Runs in Triton's
interpreter too (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK, BLOCK_BACKWARD = 128, 64
"""Points a program has at once."""
WARPS, WARPS_BACKWARD = 4, 8
"""Of 32 threads, a program. Compiled for Hopper, a thread has 108 and 224 registers, and none are spilled to memory."""
STAGES_BACKWARD = 2
"""Blocks whose loads are under way at once."""
N_PROGRAMS = 264
"""Of the backward pass, at most: two for each of an H100's multiprocessors."""
GRADIENTS = tl.bfloat16
"""Operands of gradients' products. Triton's interpreter multiplies bfloat16 wrongly; float32 is TF32 on a GPU."""
MAX_SIZE = 64
"""Features and hidden units that registers hold."""
OUTS = 16
"""Outputs of all heads, padded to what a matrix product takes."""


@triton.jit
def _stacked(ptr_0, ptr_1, row, column, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr):
    """The heads' row-major (HIDDEN, WIDTH) matrices, one below the other, padded with zeros."""
    is_column = (column < WIDTH)[None, :]
    offsets = row[:, None] * WIDTH + column[None, :]
    rows = tl.load(ptr_0 + offsets, mask=(row < HIDDEN)[:, None] & is_column, other=0.0)
    if HEADS == 2:
        is_second = ((row >= HIDDEN) & (row < 2 * HIDDEN))[:, None]
        rows += tl.load(ptr_1 + offsets - HIDDEN * WIDTH, mask=is_second & is_column, other=0.0)
    return rows


@triton.jit
def _answer(x, w_ptr, b_ptr, v_ptr, c_ptr, y_ptr, n, n_points, WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
            N_OUT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Stores one head's outputs for points x, (points, COLUMNS)."""
    row = tl.arange(0, ROWS)
    w = _stacked(w_ptr, w_ptr, row, tl.arange(0, COLUMNS), HIDDEN, WIDTH, 1).to(tl.float16)
    z = tl.dot(x, tl.trans(w)) + tl.load(b_ptr + row, mask=row < HIDDEN, other=0.0)[None, :]
    h = tl.maximum(z, 0.0)
    for k in tl.static_range(N_OUT):
        v = tl.load(v_ptr + k * HIDDEN + row, mask=row < HIDDEN, other=0.0)
        y = tl.sum(h * v[None, :], 1) + tl.load(c_ptr + k)
        tl.store(y_ptr + k * n_points.to(tl.int64) + n, y, mask=n < n_points)


@triton.jit(do_not_specialize=["n_points"])
def _forward(
    x_ptr, w_0, b_0, v_0, c_0, y_0, w_1, b_1, v_1, c_1, y_1, n_points, WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
    N_OUT_0: tl.constexpr, N_OUT_1: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, COLUMNS)
    exists = (n < n_points)[:, None] & (k < WIDTH)[None, :]
    x = tl.load(x_ptr + k.to(tl.int64)[None, :] * n_points + n[:, None], mask=exists, other=0.0).to(tl.float16)
    _answer(x, w_0, b_0, v_0, c_0, y_0, n, n_points, WIDTH, HIDDEN, N_OUT_0, COLUMNS, ROWS)
    if N_OUT_1 > 0:
        _answer(x, w_1, b_1, v_1, c_1, y_1, n, n_points, WIDTH, HIDDEN, N_OUT_1, COLUMNS, ROWS)


@triton.jit(do_not_specialize=["n_points"])
def _backward(
    x_ptr, w_0, b_0, v_0, g_0, w_1, b_1, v_1, g_1, grad_x_ptr, sums_ptr, n_points, WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr, N_OUT_0: tl.constexpr, N_OUT_1: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    OUTS: tl.constexpr, BLOCK: tl.constexpr, GRADIENTS: tl.constexpr,
):  # fmt: skip
    """Gradients to features, and of each program the sums for W, b, V and c: of both heads, one after the other."""
    HEADS: tl.constexpr = 2 if N_OUT_1 > 0 else 1
    k = tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    out = tl.arange(0, OUTS)
    is_first = row < HIDDEN
    is_second = (row >= HIDDEN) & (row < HEADS * HIDDEN)
    out_0 = out < N_OUT_0
    out_1 = (out >= N_OUT_0) & (out < N_OUT_0 + N_OUT_1)
    w = _stacked(w_0, w_1, row, k, HIDDEN, WIDTH, HEADS)
    b = tl.load(b_0 + row, mask=is_first, other=0.0)
    v = tl.load(v_0 + out[None, :] * HIDDEN + row[:, None], mask=is_first[:, None] & out_0[None, :], other=0.0)
    if HEADS == 2:
        b += tl.load(b_1 + row - HIDDEN, mask=is_second, other=0.0)
        v_1 += (out - N_OUT_0)[None, :] * HIDDEN + (row - HIDDEN)[:, None]
        v += tl.load(v_1, mask=is_second[:, None] & out_1[None, :], other=0.0)
        g_1 -= N_OUT_0 * n_points.to(tl.int64)
    v = v.to(GRADIENTS)
    start_of_feature = k.to(tl.int64)[:, None] * n_points
    start_of_output = out.to(tl.int64)[:, None] * n_points
    grad_w = tl.zeros([ROWS, COLUMNS], tl.float32)
    grad_b = tl.zeros([ROWS], tl.float32)
    grad_v = tl.zeros([ROWS, OUTS], tl.float32)
    grad_c = tl.zeros([OUTS], tl.float32)
    for first in range(tl.program_id(0) * BLOCK, n_points, tl.num_programs(0) * BLOCK):
        n = first + tl.arange(0, BLOCK)[None, :]
        exists = (k < WIDTH)[:, None] & (n < n_points)
        x = tl.load(x_ptr + start_of_feature + n, mask=exists, other=0.0)
        g = tl.load(g_0 + start_of_output + n, mask=out_0[:, None] & (n < n_points), other=0.0)
        if HEADS == 2:
            g += tl.load(g_1 + start_of_output + n, mask=out_1[:, None] & (n < n_points), other=0.0)
        grad_c += tl.sum(g, 1)
        g = g.to(GRADIENTS)
        z = tl.dot(w.to(tl.float16), x.to(tl.float16)) + b[:, None]
        grad_v += tl.dot(tl.maximum(z, 0.0).to(GRADIENTS), tl.trans(g))
        grad_z = tl.where(z > 0.0, tl.dot(v, g), 0.0)
        grad_b += tl.sum(grad_z, 1)
        grad_z = grad_z.to(GRADIENTS)
        grad_w += tl.dot(grad_z, tl.trans(x.to(GRADIENTS)))
        # Points first: this order of the factors is one that Hopper reads from shared memory as they are.
        grad_x = tl.dot(tl.trans(grad_z), w.to(GRADIENTS))
        tl.store(grad_x_ptr + start_of_feature + n, tl.trans(grad_x), mask=exists)
    is_row = (row < HEADS * HIDDEN)[:, None]
    sums_ptr += tl.program_id(0) * (HEADS * HIDDEN * (WIDTH + 1) + (N_OUT_0 + N_OUT_1) * (HIDDEN + 1))
    tl.store(sums_ptr + row[:, None] * WIDTH + k[None, :], grad_w, mask=is_row & (k < WIDTH)[None, :])
    sums_ptr += HEADS * HIDDEN * WIDTH
    tl.store(sums_ptr + row, grad_b, mask=row < HEADS * HIDDEN)
    sums_ptr += HEADS * HIDDEN
    unit = tl.where(is_first, row, row - HIDDEN)
    is_own = (is_first[:, None] & out_0[None, :]) | (is_second[:, None] & out_1[None, :])
    tl.store(sums_ptr + out[None, :] * HIDDEN + unit[:, None], grad_v, mask=is_own)
    tl.store(sums_ptr + (N_OUT_0 + N_OUT_1) * HIDDEN + out, grad_c, mask=out < N_OUT_0 + N_OUT_1)


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, *parameters):
        heads = _by_head(parameters)
        (width, n), hidden = features.shape, len(heads[0][1])
        outputs = tuple(features.new_empty(len(c), n) for *_, c in heads)
        if n > 0:
            (first, second), (y_0, y_1) = (heads[0], heads[-1]), (outputs[0], outputs[-1])
            _forward[(triton.cdiv(n, BLOCK),)](
                features, *first, y_0, *second, y_1, n, WIDTH=width, HIDDEN=hidden, **_outs(heads), COLUMNS=_padded(width),
                ROWS=_padded(hidden), BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        ctx.save_for_backward(features, *parameters)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        features, *parameters = ctx.saved_tensors
        heads, gradients = _by_head(parameters), [gradient.contiguous() for gradient in gradients]
        (width, n), hidden = features.shape, len(heads[0][1])
        n_out = sum(len(c) for *_, c in heads)
        # The sums of all heads' W, then b, V and c.
        sizes = [len(heads) * hidden * width, len(heads) * hidden, n_out * hidden, n_out]
        grad_features = torch.empty_like(features)
        sums = features.new_empty(min(N_PROGRAMS, triton.cdiv(n, BLOCK_BACKWARD)), sum(sizes))
        if n > 0:
            (*first, _), (*second, _) = heads[0], heads[-1]
            _backward[(len(sums),)](
                features, *first, gradients[0], *second, gradients[-1], grad_features, sums, n, WIDTH=width,
                HIDDEN=hidden, **_outs(heads), COLUMNS=_padded(width), ROWS=_padded(len(heads) * hidden), OUTS=OUTS,
                BLOCK=BLOCK_BACKWARD, GRADIENTS=GRADIENTS, num_warps=WARPS_BACKWARD, num_stages=STAGES_BACKWARD,
            )  # fmt: skip
        of_kind = sums.sum(0).split(sizes)
        of_head = [kind.split([p.numel() for p in of_heads]) for kind, of_heads in zip(of_kind, zip(*heads))]
        grads = [grad.view_as(p) for grads, head in zip(zip(*of_head), heads) for grad, p in zip(grads, head)]
        return grad_features, *grads


def _by_head(parameters: tuple[Tensor, ...] | list[Tensor]) -> list[tuple[Tensor, ...]]:
    """W, b, V and c of each head."""
    return [tuple(parameters[i : i + 4]) for i in range(0, len(parameters), 4)]


def _outs(heads: list[tuple[Tensor, ...]]) -> dict[str, int]:
    """Outputs of the first head and of the second, if there is one."""
    return {"N_OUT_0": len(heads[0][3]), "N_OUT_1": len(heads[1][3]) if len(heads) == 2 else 0}


def _padded(n: int) -> int:
    """A size that matrix products take."""
    return max(16, triton.next_power_of_2(n))


def can_run(device: torch.device, width: int, hidden: int) -> bool:
    """Whether a GPU has bfloat16, and networks of this size fit in it."""
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return has_bfloat16 and max(width, hidden) <= MAX_SIZE


def evaluate(features: Float[Tensor, "n width"], *heads: nn.Sequential) -> list[Float[Tensor, "n n_out"]]:
    """Outputs of one or two heads; not differentiable twice.

    Args:
        features: Copied unless they lie feature by feature, as a transposed view.
        heads: Linear, ReLU, Linear, float32, with the same number of hidden units.
    """
    parameters = [parameter for head in heads for layer in (head[0], head[2]) for parameter in layer.parameters()]
    return [output.t() for output in _Heads.apply(features.t().contiguous(), *parameters)]
