"""Puts fused group norms into a frozen diffusers network: about half of its small kernels, and no change of memory layout."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .frozen_encoder import PlainResidual

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
    """Stands for an `nn.GroupNorm` whose weights never change again, for the addition of `shift` before it, and for a SiLU
    after it if `silu`.

    Fast for channels-last pictures on CUDA, where its result can be differentiated once; the library's own elsewhere.
    """

    def __init__(self, norm: nn.GroupNorm, silu: bool, shift: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.shift = nn.Parameter(torch.zeros_like(norm.bias), requires_grad=False) if shift is None else shift
        self.n_groups, self.epsilon, self.silu = norm.num_groups, norm.eps, silu

    def forward(self, x: Float[Tensor, "n c *pixels"]) -> Float[Tensor, "n c *pixels"]:
        is_fast = x.is_cuda and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        kernels = _kernels() if is_fast else None
        if kernels is not None:
            return kernels.group_norm(x, self.weight, self.bias, self.n_groups, self.epsilon, self.silu, self.shift)
        shift = self.shift.view(-1, *[1] * (x.dim() - 2))
        y = F.group_norm(x + shift, self.n_groups, self.weight, self.bias, self.epsilon)
        return F.silu(y) if self.silu else y


def fuse_norms(network: nn.Module) -> None:
    """Replace the group norms of a UNet or autoencoder of diffusers in place; what it computes stays the same."""
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


def _is_residual_block(module: nn.Module) -> bool:
    """A diffusers `ResnetBlock2D` whose norms are each followed by SiLU alone."""
    norms = (getattr(module, name, None) for name in ("norm1", "norm2"))
    return (
        all(isinstance(norm, nn.GroupNorm) for norm in norms)
        and isinstance(getattr(module, "nonlinearity", None), nn.SiLU)
        and getattr(module, "time_embedding_norm", "") == "default"
    )
