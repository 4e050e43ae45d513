"""Puts fused group norms into a frozen diffusers network: about half of its small kernels, and no change of memory layout.

A residual block of a UNet becomes one that adds its first convolution's bias and the time embedding in passing, as part of the
norm that reads them: each was a pass over memory of its own.
"""

from __future__ import annotations

import functools
import logging
from types import MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .frozen_encoder import PlainResidual, merge_last_biases

logger = logging.getLogger(__name__)


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from . import group_norm_triton
    except ImportError as error:
        logger.warning("group norms are not fused (%s): install triton for a faster step", error)
        return None
    return group_norm_triton


class FusedGroupNorm(nn.Module):
    """Stands for an `nn.GroupNorm` whose weights never change again, for the addition of `shift` and of another one given
    with the pictures before it, and for a SiLU after it if `silu`.

    Fast for channels-last pictures on CUDA, where its result can be differentiated once; the library's own elsewhere.
    """

    def __init__(self, norm: nn.GroupNorm, silu: bool, shift: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.shift = nn.Parameter(torch.zeros_like(norm.bias), requires_grad=False) if shift is None else shift
        self.n_groups, self.epsilon, self.silu = norm.num_groups, norm.eps, silu

    def forward(
        self, x: Float[Tensor, "n c *pixels"], added: Float[Tensor, "n c"] | None = None
    ) -> Float[Tensor, "n c *pixels"]:
        shift = self.shift[None] if added is None else self.shift + added
        is_fast = x.is_cuda and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        kernels = _kernels() if is_fast else None
        if kernels is not None:
            return kernels.group_norm(x, self.weight, self.bias, self.n_groups, self.epsilon, self.silu, shift)
        y = F.group_norm(
            x + shift.view(*shift.shape, *[1] * (x.dim() - 2)), self.n_groups, self.weight, self.bias, self.epsilon
        )
        return F.silu(y) if self.silu else y


class TimedResidual(nn.Module):
    """Stands for a diffusers `ResnetBlock2D` that knows the time, changes no size and divides by one."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv_shortcut = block.conv1, block.conv2, block.conv_shortcut
        # The block uses its activation on the time's embedding, too.
        self.time = block.time_emb_proj if block.skip_time_act else nn.Sequential(nn.SiLU(), block.time_emb_proj)
        self.norm1, self.norm2 = FusedGroupNorm(block.norm1, True), FusedGroupNorm(block.norm2, True, block.conv1.bias)
        self.conv1.bias = None
        merge_last_biases(self)

    @staticmethod
    def fits(block: nn.Module) -> bool:
        return (
            _is_residual_block(block)
            and getattr(block, "time_emb_proj", None) is not None
            and getattr(block, "upsample", None) is None
            and getattr(block, "downsample", None) is None
            and block.dropout.p == 0
            and block.output_scale_factor == 1
            and block.conv1.bias is not None
        )

    def forward(self, x: Float[Tensor, "n c h w"], temb: Float[Tensor, "n e"]) -> Float[Tensor, "n d h w"]:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x)), self.time(temb)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


def fuse_norms(network: nn.Module) -> None:
    """Replace the group norms of a UNet or autoencoder of diffusers in place; what it computes stays the same."""
    keep_layout(network)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if TimedResidual.fits(child):
                setattr(module, name, TimedResidual(child))
    for module in list(network.modules()):
        if _is_residual_block(module):
            shift = None
            if isinstance(module, PlainResidual):
                # Added by the norm that reads it, the first convolution's bias is no pass over memory of its own.
                shift, module.conv1.bias = module.conv1.bias, None
            module.norm1, module.norm2 = FusedGroupNorm(module.norm1, True), FusedGroupNorm(module.norm2, True, shift)
            if module.time_emb_proj is not None and not module.skip_time_act:
                # The block uses its activation here, too.
                module.time_emb_proj = nn.Sequential(nn.SiLU(), module.time_emb_proj)
            module.nonlinearity = nn.Identity()
        elif isinstance(getattr(module, "conv_norm_out", None), nn.GroupNorm) and isinstance(module.conv_act, nn.SiLU):
            module.conv_norm_out, module.conv_act = FusedGroupNorm(module.conv_norm_out, True), nn.Identity()
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm) and child.affine:
                setattr(module, name, FusedGroupNorm(child, False))


def keep_layout(network: nn.Module) -> None:
    """Let the transformer blocks of a UNet of diffusers, in place, answer in the memory layout of what they are given.

    Those with linear projections rearrange their answer, so that a third of the norms after them, and every convolution, find
    channels-last pictures no more.
    """
    for module in network.modules():
        if hasattr(module, "_get_output_for_continuous_inputs") and hasattr(module, "use_linear_projection"):
            module._get_output_for_continuous_inputs = MethodType(_output_as_it_lies, module)


def _output_as_it_lies(
    block: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
) -> Tensor:
    """The library's own method without its `contiguous()`."""

    def pictures(tokens: Tensor) -> Tensor:
        return tokens.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)

    if block.use_linear_projection:
        return pictures(block.proj_out(hidden_states)) + residual
    return block.proj_out(pictures(hidden_states)) + residual


def _is_residual_block(module: nn.Module) -> bool:
    """A diffusers `ResnetBlock2D` whose norms are each followed by SiLU alone."""
    norms = (getattr(module, name, None) for name in ("norm1", "norm2"))
    return (
        all(isinstance(norm, nn.GroupNorm) for norm in norms)
        and isinstance(getattr(module, "nonlinearity", None), nn.SiLU)
        and getattr(module, "time_embedding_norm", "") == "default"
    )
