"""Triton's kernels without a GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

KERNELS = ("hash_grid_triton", "heads_triton", "group_norm_triton")


def import_anew(name: str) -> ModuleType:
    """A module of kernels anew: whether Triton interprets or compiles is decided while Triton itself is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    for loaded in list(sys.modules):
        if loaded.split(".")[0] == "triton" and not loaded.startswith("triton._C") or loaded.endswith(KERNELS):
            del sys.modules[loaded]
    return importlib.import_module(name)


@contextmanager
def runnable_kernels(name: str) -> Iterator[ModuleType]:
    """A module of kernels: compiled on a GPU, interpreted elsewhere."""
    if torch.cuda.is_available():
        yield import_anew(name)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield import_anew(name)
    import_anew(name)
