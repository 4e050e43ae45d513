"""The processes that train one network together, a GPU each."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


class Workers:
    """The processes that train together; alone without torchrun."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        has_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if has_gpu else torch.device("cpu")
        if has_gpu:
            torch.cuda.set_device(self.device)
        if self.count > 1:
            dist.init_process_group("nccl" if has_gpu else "gloo")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part(self) -> None:
        """Once the first one has written everything: the last call of a program."""
        if self.count > 1:
            dist.barrier()
            dist.destroy_process_group()

    def average(self, values: Tensor) -> None:
        """In place, over all processes."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count

    def agree(self, value: float) -> float:
        """The first process's value."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)
