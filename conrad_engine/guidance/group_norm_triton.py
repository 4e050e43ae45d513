"""Group norm, and SiLU after it, of channels-last pictures in Triton; all its vectors are constants.

The library's group norm has no kernel for channels-last memory, so it rearranges pictures before and after; and it writes
the normalised picture only for SiLU to read it again. Here a picture is read twice and written once; its backward pass reads
picture and gradient twice and writes once.

Constants of the compiler are only what loads and tiles need. Pixels, rounds and chunks are arguments that it is told nothing
about: a Zero123 job has 42 kernels, at 0.2 s each, where it had 70 when every shape of a layer was a constant.

The picture is x + s, s being the bias of the convolution before it and, in a UNet, the time's embedding, which differs from
picture to picture: their own addition would be a pass over memory.
With u = w x̂ + b, x̂ = (x + s - mean) / std over a group's channels and all pixels, y = SiLU(u), and g = w dL/du:
dL/dx = (g - ⟨g⟩ - x̂ ⟨g x̂⟩) / std, ⟨⟩ being the mean over the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4096
"""Elements of a picture that a program holds at once."""
MAX_CHUNKS = 256
"""Programs that share the sums of one picture; a power of two."""


@triton.jit
def _tile(rows, columns, n_pixels, first, N_CHANNELS: tl.constexpr):
    """Offsets of a tile of a (n, pixels, channels) array, and which of them exist."""
    offsets = (first + rows[:, None]).to(tl.int64) * N_CHANNELS + columns[None, :]
    return offsets, (rows[:, None] < n_pixels) & (columns[None, :] < N_CHANNELS)


@triton.jit
def _shifted(x_ptr, shift_ptr, shift_step, picture, offsets, exists, columns, N_CHANNELS: tl.constexpr):
    """x + s of a tile, 0 outside of the picture."""
    shift = tl.load(shift_ptr + picture * shift_step + columns, mask=columns < N_CHANNELS, other=0.0)[None, :]
    return tl.where(exists, tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32) + shift.to(tl.float32), 0.0)


@triton.jit
def _normalised(x_ptr, stats_ptr, shift_ptr, weight_ptr, bias_ptr, shift_step, picture, offsets, exists, columns,
                N_CHANNELS: tl.constexpr, IN_GROUP: tl.constexpr):  # fmt: skip
    """x̂, u, w and 1/std of a tile."""
    is_channel = columns < N_CHANNELS
    group = picture * (N_CHANNELS // IN_GROUP) + columns // IN_GROUP
    mean = tl.load(stats_ptr + 2 * group, mask=is_channel, other=0.0)[None, :]
    inverse = tl.load(stats_ptr + 2 * group + 1, mask=is_channel, other=0.0)[None, :]
    weight = tl.load(weight_ptr + columns, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + columns, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    x = _shifted(x_ptr, shift_ptr, shift_step, picture, offsets, exists, columns, N_CHANNELS)
    normal = (x - mean) * inverse
    return normal, normal * weight + bias, weight, inverse


@triton.jit(do_not_specialize=["n_pixels", "n_rounds"])
def _sums(x_ptr, gradient_ptr, stats_ptr, shift_ptr, weight_ptr, bias_ptr, shift_step, sums_ptr, n_pixels, n_rounds,
          N_CHANNELS: tl.constexpr, IN_GROUP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
          SILU: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
    """Per channel and chunk of pixels: Σx and Σx², or for the backward pass Σg and Σg x̂."""
    chunk = tl.program_id(0)
    picture = tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    one = tl.zeros([ROWS, COLUMNS], tl.float32)
    two = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(n_rounds):
        rows = (chunk * n_rounds + k) * ROWS + tl.arange(0, ROWS)
        offsets, exists = _tile(rows, columns, n_pixels, picture * n_pixels, N_CHANNELS)
        if BACKWARD:
            normal, u, weight, _ = _normalised(
                x_ptr, stats_ptr, shift_ptr, weight_ptr, bias_ptr, shift_step, picture, offsets, exists, columns,
                N_CHANNELS, IN_GROUP,
            )  # fmt: skip
            g = tl.load(gradient_ptr + offsets, mask=exists, other=0.0).to(tl.float32) * weight
            if SILU:
                gate = tl.sigmoid(u)
                g = g * gate * (1.0 + u * (1.0 - gate))
            one += g
            two += g * normal
        else:
            x = _shifted(x_ptr, shift_ptr, shift_step, picture, offsets, exists, columns, N_CHANNELS)
            one += x
            two += x * x
    target = sums_ptr + (picture * tl.num_programs(0) + chunk) * 2 * N_CHANNELS + columns
    tl.store(target, tl.sum(one, 0), mask=columns < N_CHANNELS)
    tl.store(target + N_CHANNELS, tl.sum(two, 0), mask=columns < N_CHANNELS)


@triton.jit(do_not_specialize=["n_chunks"])
def _statistics(sums_ptr, stats_ptr, n_chunks, count, epsilon, N_CHANNELS: tl.constexpr, IN_GROUP: tl.constexpr,
                COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
    """Of one group: mean and 1/std, or for the backward pass both means."""
    group = tl.program_id(0)
    picture = tl.program_id(1)
    columns = tl.arange(0, COLUMNS)[None, :]
    one = tl.zeros([CHUNKS, COLUMNS], tl.float32)
    two = tl.zeros([CHUNKS, COLUMNS], tl.float32)
    for first in range(0, n_chunks, CHUNKS):
        chunks = first + tl.arange(0, CHUNKS)[:, None]
        exists = (chunks < n_chunks) & (columns < IN_GROUP)
        source = sums_ptr + (picture * n_chunks + chunks) * 2 * N_CHANNELS + group * IN_GROUP + columns
        one += tl.load(source, mask=exists, other=0.0)
        two += tl.load(source + N_CHANNELS, mask=exists, other=0.0)
    a = tl.sum(tl.sum(one, 1), 0) / count
    b = tl.sum(tl.sum(two, 1), 0) / count
    if not BACKWARD:
        b = 1.0 / tl.sqrt(tl.maximum(b - a * a, 0.0) + epsilon)
    target = stats_ptr + 2 * (picture * tl.num_programs(0) + group)
    tl.store(target, a)
    tl.store(target + 1, b)


@triton.jit(do_not_specialize=["n_pixels"])
def _apply(x_ptr, gradient_ptr, stats_ptr, means_ptr, shift_ptr, weight_ptr, bias_ptr, shift_step, out_ptr, n_pixels,
           N_CHANNELS: tl.constexpr, IN_GROUP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
           SILU: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
    """y of a tile, or for the backward pass dL/dx."""
    picture = tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets, exists = _tile(rows, columns, n_pixels, picture * n_pixels, N_CHANNELS)
    normal, u, weight, inverse = _normalised(
        x_ptr, stats_ptr, shift_ptr, weight_ptr, bias_ptr, shift_step, picture, offsets, exists, columns,
        N_CHANNELS, IN_GROUP,
    )  # fmt: skip
    value = u
    if BACKWARD:
        value = tl.load(gradient_ptr + offsets, mask=exists, other=0.0).to(tl.float32) * weight
    if SILU:
        gate = tl.sigmoid(u)
        value = value * gate
        if BACKWARD:
            value = value * (1.0 + u * (1.0 - gate))
    if BACKWARD:
        group = picture * (N_CHANNELS // IN_GROUP) + columns // IN_GROUP
        mean_g = tl.load(means_ptr + 2 * group, mask=columns < N_CHANNELS, other=0.0)[None, :]
        mean_gx = tl.load(means_ptr + 2 * group + 1, mask=columns < N_CHANNELS, other=0.0)[None, :]
        value = (value - mean_g - normal * mean_gx) * inverse
    tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=exists)


@dataclass(frozen=True)
class _Launch:
    """How a picture is cut into programs."""

    n: int
    n_pixels: int
    n_channels: int
    n_groups: int
    columns: int
    rows: int
    rounds: int
    n_chunks: int

    @staticmethod
    def of(x: Tensor, n_groups: int) -> _Launch:
        n, n_channels, height, width = x.shape
        columns = triton.next_power_of_2(n_channels)
        rows = max(1, TILE // columns)
        n_tiles = triton.cdiv(height * width, rows)
        rounds = triton.next_power_of_2(triton.cdiv(n_tiles, max(1, MAX_CHUNKS // n)))
        chunks = triton.cdiv(n_tiles, rounds)
        return _Launch(n, height * width, n_channels, n_groups, columns, rows, rounds, chunks)

    def step(self, shift: Tensor) -> int:
        """From a picture's shift to the next one's: one may be all pictures'."""
        return self.n_channels if len(shift) > 1 else 0

    @property
    def in_group(self) -> int:
        return self.n_channels // self.n_groups

    def statistics(self, x: Tensor, gradient: Tensor, stats: Tensor, vectors: tuple[Tensor, Tensor, Tensor], silu: bool,
                   epsilon: float, is_backward: bool) -> Float[Tensor, "n groups 2"]:  # fmt: skip
        sums = torch.empty(self.n, self.n_chunks, 2, self.n_channels, device=x.device)
        _sums[self.n_chunks, self.n](
            x, gradient, stats, *vectors, self.step(vectors[0]), sums, self.n_pixels, self.rounds, N_CHANNELS=self.n_channels,
            IN_GROUP=self.in_group, COLUMNS=self.columns, ROWS=self.rows, SILU=silu and is_backward, BACKWARD=is_backward,
        )  # fmt: skip
        found = torch.empty(self.n, self.n_groups, 2, device=x.device)
        columns = triton.next_power_of_2(self.in_group)
        _statistics[self.n_groups, self.n](
            sums, found, self.n_chunks, float(self.n_pixels * self.in_group), epsilon, N_CHANNELS=self.n_channels,
            IN_GROUP=self.in_group, COLUMNS=columns, CHUNKS=min(MAX_CHUNKS, TILE // columns), BACKWARD=is_backward,
        )  # fmt: skip
        return found

    def apply(self, x: Tensor, gradient: Tensor, stats: Tensor, means: Tensor, vectors: tuple[Tensor, Tensor, Tensor],
              silu: bool, is_backward: bool) -> Tensor:  # fmt: skip
        out = torch.empty_like(x)
        _apply[triton.cdiv(self.n_pixels, self.rows), self.n](
            x, gradient, stats, means, *vectors, self.step(vectors[0]), out, self.n_pixels, N_CHANNELS=self.n_channels,
            IN_GROUP=self.in_group, COLUMNS=self.columns, ROWS=self.rows, SILU=silu, BACKWARD=is_backward,
        )  # fmt: skip
        return out


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, weight, bias, n_groups, epsilon, silu):
        launch, vectors = _Launch.of(x, n_groups), (shift, weight, bias)
        # Arguments that a pass does not read are filled with what is at hand.
        stats = launch.statistics(x, x, x, vectors, silu, epsilon, is_backward=False)
        ctx.save_for_backward(x, stats, *vectors)
        ctx.launch, ctx.silu = launch, silu
        return launch.apply(x, x, stats, stats, vectors, silu, is_backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, stats, *vectors = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        means = ctx.launch.statistics(x, gradient, stats, vectors, ctx.silu, 0.0, is_backward=True)
        out = ctx.launch.apply(x, gradient, stats, means, vectors, ctx.silu, is_backward=True)
        return out, None, None, None, None, None, None


def group_norm(
    x: Float[Tensor, "n c h w"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    n_groups: int,
    epsilon: float,
    silu: bool,
    shift: Float[Tensor, "m c"],
) -> Float[Tensor, "n c h w"]:
    """Group norm, then SiLU if asked for; differentiable once, to `x` alone.

    Args:
        x: Channels-last.
        weight, bias: Constants.
        n_groups: Divides the channels.
        epsilon: Added to the variance.
        silu: Whether SiLU follows.
        shift: Constants added to `x` first: one for all pictures, or one for each.
    """
    return _GroupNorm.apply(x, shift.contiguous(), weight, bias, n_groups, epsilon, silu)
