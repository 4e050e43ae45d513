"""One network under training: its gradients in one buffer, its optimizer and the running average of its weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..graphs import GraphedStep
from .muon import Muon, is_for_muon
from .workers import Workers

MAX_NORM = 1.0


class RowGroupNorm(nn.GroupNorm):
    """Group normalization that a compiler turns into sums along rows of channels, which is how the pictures are stored.

    `nn.GroupNorm` is decomposed into a view by groups, for which pictures stored channels last are copied, forth and back.
    Same values, up to rounding.
    """

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        b, c, height, width = x.shape
        per_group = c // self.num_groups
        rows = x.permute(0, 2, 3, 1).reshape(b, height * width, c).float()
        sums, squares = (y.sum(1).view(b, self.num_groups, per_group).sum(2) for y in (rows, rows * rows))
        mean = sums / (height * width * per_group)
        variance = (squares / (height * width * per_group) - mean * mean).clamp(min=0)
        scale = torch.rsqrt(variance + self.eps).repeat_interleave(per_group, 1) * self.weight
        shift = self.bias - mean.repeat_interleave(per_group, 1) * scale
        return (rows * scale[:, None] + shift[:, None]).view(b, height, width, c).permute(0, 3, 1, 2)


class Descent:
    """Network, average and optimizer; `backward` of any loss fills `gradients`, in each of the processes.

    On a GPU a step is a few thousand kernels, and launching them takes longer than they do (120 ms a step of the prior against
    77 on one H100): so both its halves are captured in CUDA graphs, on a stream that all of the training runs on.
    """

    def __init__(self, net: nn.Module, workers: Workers, ema_decay: float, with_muon: bool, log: Path) -> None:
        """Take the network, the same in all processes; the first one notes what happens in `log`, a line of JSON each."""
        self.workers, self.device, self.ema_decay, self.log = workers, workers.device, ema_decay, log
        on_gpu = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None
        if on_gpu:
            torch.cuda.set_stream(self.stream)
        for module in net.modules():
            if type(module) is nn.GroupNorm:
                module.__class__ = RowGroupNorm
        self.net = net.to(self.device).to(memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.parameters, self.averages = list(self.net.parameters()), list(self.ema.parameters())
        inner, rest = [], []
        for name, p in self.net.named_parameters():
            (inner if with_muon and is_for_muon(name, p) else rest).append(p)
        rate = torch.zeros((), device=self.device)
        fast = {"fused": True, "capturable": True} if on_gpu else {}
        adam = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, **fast)
        self.optimizers = [adam, Muon(inner, lr=rate, weight_decay=0.01)] if inner else [adam]
        # All gradients lie in one buffer, so averaging over processes and clipping are single calls.
        self.gradients = torch.zeros(sum(p.numel() for p in self.parameters), device=self.device)
        offset = 0
        for p in self.parameters:
            p.grad = self.gradients.as_strided(p.size(), p.stride(), offset)
            offset += p.numel()
        self.step, self.n_bad = 0, torch.zeros((), device=self.device)
        self.graphed_step = self.graphed(self._clipped_step)

    def graphed(self, step: Callable[..., Any]) -> GraphedStep:
        """A part of the step that keeps to the rules of `GraphedStep`."""
        return GraphedStep(step, self.device, stream=self.stream)

    def update(self, rate: float) -> Tensor:
        """One optimizer step on the gradient, averaged over the processes and clipped; returns its norm.

        A non-finite one is counted and left out.
        """
        self.workers.average(self.gradients)
        for optimizer in self.optimizers:
            for settings in optimizer.param_groups:
                settings["lr"].fill_(rate)
        norm = self.graphed_step().clone()
        self.step += 1
        torch._foreach_lerp_(self.averages, self.parameters, 1 - min(self.ema_decay, self.step / (self.step + 10)))
        return norm

    def _clipped_step(self) -> Tensor:
        norm = self.gradients.norm()
        is_good = torch.isfinite(norm)
        self.n_bad += ~is_good
        # Selected, not multiplied: 0 * nan would be nan.
        clipped = self.gradients * (MAX_NORM / norm.clamp(min=MAX_NORM))
        self.gradients.copy_(torch.where(is_good, clipped, torch.zeros_like(clipped)))
        for optimizer in self.optimizers:
            optimizer.step()
        return norm

    def note(self, values: dict) -> None:
        if self.workers.is_first:
            print(json.dumps(values), flush=True)
            with self.log.open("a") as log:
                log.write(json.dumps(values) + "\n")
