"""Views of one job spread over several processes, a GPU each: every one renders and guides its share, gradients are averaged.

Apart from that all do the same, with the same random numbers. The first one also talks to the user and writes files.
"""

from __future__ import annotations

import datetime
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .errors import InputError, OptimizationError

LONGEST_START = datetime.timedelta(minutes=5)
"""Until all processes run; what they load comes later."""
LONGEST_PAUSE = datetime.timedelta(days=7)
"""The other processes wait for the first one while the user has paused it."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job."""

    rank: int = 0
    count: int = 1

    def share(self, n: int) -> slice:
        """This process's part of n views, which `count` divides."""
        size = n // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over all processes."""
        if self.count == 1:
            return
        # In one piece: a message costs more than its bytes.
        joined = torch.cat([tensor.detach().flatten() for tensor in tensors])
        _told(lambda: torch.distributed.all_reduce(joined))
        parts = (joined / self.count).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts):
            tensor.detach().copy_(part.view_as(tensor))

    def take_over(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by the first process's."""
        for tensor in tensors if self.count > 1 else ():
            _told(lambda tensor=tensor: torch.distributed.broadcast(tensor.detach(), 0))

    def agree(self, number: float) -> float:
        """The first process's number."""
        told = torch.tensor([number], dtype=torch.float64)
        self.take_over([told])
        return float(told)


def taken(draws: tuple[Any, ...], views: slice) -> tuple[Any, ...]:
    """Of guidance's numbers those of some views; see `SplitGuidance.draw`."""
    return tuple(
        taken(item, views) if isinstance(item, tuple) else item[views] if item.dim() else item for item in draws
    )


def _told(message: Callable[[], object]) -> None:
    try:
        message()
    except RuntimeError as error:
        raise OptimizationError(
            f"the processes of this job lost each other ({str(error).splitlines()[0]}); one of them may have run out of "
            "memory: use fewer views (optimize.n_views) or one GPU"
        ) from error


@contextmanager
def helped(count: int, device: torch.device, help_: Callable[..., None], *arguments: Any) -> Iterator[Ranks]:
    """Processes that help this one, until the end of the block.

    Args:
        count: Processes in all.
        device: The first one's: cuda or cpu.
        help_: What the others run, in fresh processes: `help_(ranks, device, *arguments)`.

    Raises:
        InputError: There are not as many GPUs, or the first one is not the first.
    """
    if count == 1:
        yield Ranks()
        return
    if device.type == "cuda" and torch.cuda.device_count() < count:
        raise InputError(f"optimize.n_gpus is {count}, but this machine shows {torch.cuda.device_count()} GPUs")
    if device.index:
        raise InputError("several GPUs are taken from the first one on: use --device cuda, without a number")
    with TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        others = [
            get_context("spawn").Process(target=_run, args=(rank, count, device.type, meeting, help_, arguments))
            for rank in range(1, count)
        ]
        for process in others:
            process.daemon = True  # ends with this one
            process.start()
        try:
            with _joined(0, count, device.type, meeting) as ranks:
                yield ranks
            for process in others:
                process.join()
        finally:
            for process in others:
                process.terminate()


def _run(
    rank: int, count: int, device: str, meeting: str, help_: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """What another process does. Ctrl-C is for the first one, which tells the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    with _joined(rank, count, device, meeting) as ranks:
        help_(ranks, torch.device(device, rank) if device == "cuda" else torch.device(device), *arguments)


@contextmanager
def _joined(rank: int, count: int, device: str, meeting: str) -> Iterator[Ranks]:
    # Commands are numbers on the host: they go beside what the GPUs exchange, without waiting for it.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    store = torch.distributed.FileStore(meeting, count)
    store.set(f"process {rank}", "here")
    everyone = [f"process {other}" for other in range(count)]
    _told(lambda: store.wait(everyone, LONGEST_START))
    _told(
        lambda: torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=count, timeout=LONGEST_PAUSE
        )
    )
    try:
        yield Ranks(rank, count)
    finally:
        torch.distributed.destroy_process_group()
