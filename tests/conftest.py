"""Shared by all tests: one thread, explicit randomness, and a small synthetic picture."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from .engine_process import running, until

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A real engine process whose pipeline is a toy; one a test file."""
    with running(tmp_path_factory.mktemp("engine") / "data") as engine:
        yield engine


@pytest.fixture
def client(engine):
    with engine.client() as client:
        until(client, lambda: client.state == "ready" and client.status)
        yield client


@pytest.fixture
def torchrun() -> Callable[[str, list], None]:
    """Runs a module in two processes that train together."""

    def run(module: str, arguments: list) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
        command = [*launcher, "-m", module, *(str(x) for x in arguments)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]

    return run


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what tests have measured, whether their output is shown or not."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    figures = [value for report in reports for name, value in report.user_properties if name == "figure"]
    if figures:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(figures))


def figure_rgba(height: int = 96, width: int = 96) -> np.ndarray:
    """A figure with a red arm on the left of the picture, a blue one on the right and a green body: nothing symmetric."""
    rgba = np.zeros((height, width, 4), np.uint8)
    v, u = (np.mgrid[:height, :width] + 0.5) / [[[height]], [[width]]]
    body = (np.abs(u - 0.5) < 0.14) & (np.abs(v - 0.52) < 0.36)
    left = (u > 0.16) & (u < 0.4) & (np.abs(v - 0.4) < 0.07)
    right = (u < 0.84) & (u > 0.6) & (np.abs(v - 0.55) < 0.07)
    stripes = (np.sin(v * 60) > 0) & body
    for mask, color in (
        (body, (40, 160, 60)),
        (stripes, (230, 220, 90)),
        (left, (210, 30, 30)),
        (right, (30, 40, 210)),
    ):
        rgba[mask] = (*color, 255)
    return rgba


@pytest.fixture
def figure() -> np.ndarray:
    return figure_rgba()


def png_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()
