"""The device a job runs on, and how many processor threads it takes."""

from __future__ import annotations

import os
from threading import Thread

import torch

from .errors import InputError

MAX_THREADS = 8
"""More threads than this slow the small operations of a CPU run down."""


def resolve_device(name: str) -> torch.device:
    """`auto` is cuda, mps or cpu, the first that works; other names are torch's.

    Raises:
        InputError: The device does not exist here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used here ({reason}); use auto, cuda, mps or cpu") from None
    return device


def set_threads(n_threads: int) -> int:
    """Set torch's threads; 0 takes the cores this process may use, at most `MAX_THREADS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = n_threads or min(cores, MAX_THREADS)
    torch.set_num_threads(count)
    return count


def wake(device: torch.device) -> None:
    """Let a thread make a GPU's context, which takes a third of a second, while the caller reads its picture."""
    if device.type == "cuda":
        Thread(target=torch.zeros, args=(1,), kwargs={"device": device}, daemon=True).start()
