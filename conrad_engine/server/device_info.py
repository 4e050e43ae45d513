"""What a worker can compute on and with. Imports torch."""

from __future__ import annotations

import importlib.util
import platform

import torch

from ..device import resolve_device
from ..doctor import free_memory
from .worker_messages import WorkerReady


def describe_device(name: str) -> WorkerReady:
    """The device behind a name, and the guidances whose packages are installed."""
    device = resolve_device(name)
    total, label = 0, platform.processor() or platform.machine() or "CPU"
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # it takes no device without a number
        total, label = torch.cuda.get_device_properties(device).total_memory, torch.cuda.get_device_name(device)
    elif device.type == "mps":
        label = "Apple GPU"
    guidances = ["embedded"]
    if importlib.util.find_spec("diffusers") is not None and importlib.util.find_spec("transformers") is not None:
        guidances += ["stable_diffusion", "zero123", "mixture"]
    n_devices = torch.cuda.device_count() if device.type == "cuda" else 1
    return WorkerReady(f"{device.type}: {label}", n_devices, free_memory(device), total, tuple(guidances))
