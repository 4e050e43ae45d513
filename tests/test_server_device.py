"""What a worker tells about its device."""

from types import SimpleNamespace

import pytest
import torch
from torch.cuda._utils import _get_device_index

from conrad_engine.server import device_info


def test_a_worker_describes_a_gpu_without_a_number(monkeypatch):
    """`auto` is such a device, and torch's `set_device` refuses it."""
    chosen = []
    monkeypatch.setattr(device_info, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(device_info, "free_memory", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(_get_device_index(device)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=7))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    ready = device_info.describe_device("auto")
    assert chosen == [0]
    assert (ready.device, ready.n_devices, ready.free_memory_bytes, ready.total_memory_bytes) == ("cuda: Card", 1, 5, 7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_worker_describes_this_gpu():
    assert device_info.describe_device("auto").device.startswith("cuda: ")
