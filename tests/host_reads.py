"""What a CUDA graph cannot hold, found on a CPU."""

from __future__ import annotations

import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "unique", "aten.equal")


class HostReads(TorchDispatchMode):
    """Collects operations that read device numbers on the host, bring host numbers to the device, or whose shapes depend on
    values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        if any(word in name for word in FORBIDDEN):
            self.found.append(f"{name} at {_place()}")
        if "aten.index" in name and isinstance(args[1], list | tuple):
            # A mask as an index is counted first.
            self.found += [
                f"{name} by a mask at {_place()}"
                for index in args[1]
                if index is not None and index.dtype == torch.bool
            ]
        return operation(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line outside of torch and of this file."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno}"
