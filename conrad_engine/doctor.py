"""What this installation has, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import __version__
from .device import resolve_device

REQUIRED = ("numpy", "scipy", "pillow", "opencv-python-headless", "torch", "safetensors", "PyMCubes", "xatlas",
            "fast-simplification", "trimesh", "scikit-image", "pyzmq", "jaxtyping", "tqdm")  # fmt: skip
OPTIONAL = {
    "sd": ("diffusers", "transformers", "accelerate"),
    "matting": ("rembg", "onnxruntime"),
    "cluster": ("ray",),
}
"""Extras of the package and what they bring."""
UNMANAGED = {"tinycudann": "build it from source: https://github.com/NVlabs/tiny-cuda-nn (needs a CUDA compiler)"}
MIN_MEMORY = 4 << 30
"""What the main job needs on a CPU."""


@dataclass(frozen=True)
class Missing:
    name: str
    command: str
    """What installs or mends it."""
    is_required: bool


@dataclass(frozen=True)
class Report:
    version: str
    python: str
    platform: str
    device: str
    device_name: str
    memory_bytes: int
    """Free memory of the device a job would run on."""
    threads: int
    packages: dict[str, str]
    missing: list[Missing] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(item.is_required for item in self.missing)

    def to_json(self) -> dict:
        return asdict(self) | {"ok": self.ok, "torch": self.packages.get("torch", "")}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def free_memory(device: torch.device) -> int:
    """Free bytes of a GPU, or available bytes of the machine; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


def diagnose() -> Report:
    """Look at the installation; nothing is changed and nothing is downloaded."""
    device = resolve_device("auto")
    packages, missing, warnings = {}, [], []
    extras = {name: extra for extra, names in OPTIONAL.items() for name in names}
    for name in (*REQUIRED, *extras, *UNMANAGED):
        version = _version(name)
        if version is not None:
            packages[name] = version
        elif name in REQUIRED:
            missing.append(Missing(name, f"{sys.executable} -m pip install {name}", True))
        else:
            extra = extras.get(name)
            command = f'{sys.executable} -m pip install "conrad-engine[{extra}]"' if extra else UNMANAGED[name]
            missing.append(Missing(name, command, False))
    if not _has_weights():
        command = f"{sys.executable} -m pip install --force-reinstall --no-deps conrad-engine"
        missing.append(Missing("embedded prior weights", command, True))
    memory = free_memory(device)
    if device.type == "cpu" and 0 < memory < MIN_MEMORY:
        warnings.append(f"only {memory / 2**30:.1f} GiB of memory are free; a job needs about {MIN_MEMORY >> 30} GiB")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return Report(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        device=str(device),
        device_name=name,
        memory_bytes=memory,
        threads=torch.get_num_threads(),
        packages=packages,
        missing=missing,
        warnings=warnings,
    )


def _has_weights() -> bool:
    from .guidance.embedded.weights import DETAIL, ELEVATION, PRIOR, shipped_path

    return all(shipped_path(name).is_file() for name in (PRIOR, ELEVATION, DETAIL))


def format_report(report: Report) -> str:
    lines = [
        f"ConRad engine {report.version}, Python {report.python}, {report.platform}",
        f"device   {report.device} ({report.device_name}), {report.memory_bytes / 2**30:.1f} GiB free, "
        f"{report.threads} threads",
        "packages " + ", ".join(f"{name} {version}" for name, version in report.packages.items()),
    ]
    for item in report.missing:
        lines.append(f"{'MISSING ' if item.is_required else 'optional'} {item.name}: {item.command}")
    lines += [f"warning  {text}" for text in report.warnings]
    lines.append("ready" if report.ok else "not ready: run the commands after MISSING")
    return "\n".join(lines)
