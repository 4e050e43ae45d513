"""Reading and writing the weights that ship: fp16 safetensors whose header says which architecture they fit."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ...errors import GuidanceError
from .unet import ARCHITECTURE, ViewPrior, in_precision

PRIOR, ELEVATION, DETAIL = "prior.safetensors", "elevation.safetensors", "detail.safetensors"
Network = TypeVar("Network", bound=nn.Module)


def shipped_path(name: str = PRIOR) -> Path:
    return Path(str(resources.files(__package__) / name))


def packed(net: nn.Module, architecture: str, notes: dict[str, str] | None = None) -> bytes:
    """A network as a safetensors file; `notes` go to its header too."""
    tensors = {name: value.detach().half().cpu().contiguous() for name, value in net.state_dict().items()}
    return save(tensors, {"architecture": architecture, **(notes or {})})


def read(path: Path, architecture: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors, in fp32, of a file for this architecture.

    Raises:
        GuidanceError: There is no such file, it is damaged, or it is for another architecture.
    """
    if not path.is_file():
        raise GuidanceError(f"weights for {architecture} are missing at {path}: reinstall the package or name a file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise GuidanceError(f"the weights {path} cannot be read ({error}): the file is damaged, get it again") from None
    found = header.get("architecture", "no architecture")
    if found != architecture:
        raise GuidanceError(f"the weights {path} are for {found}, this version needs {architecture}")
    return header, tensors


def filled(net: Network, tensors: dict[str, Tensor], path: Path) -> Network:
    """The network with the tensors of a file, ready for use.

    Raises:
        GuidanceError: They do not fit it, or are not finite.
    """
    expected = {name: value.shape for name, value in net.state_dict().items()}
    wrong = sorted(
        name for name in expected.keys() | tensors.keys()
        if name not in expected or name not in tensors or tensors[name].shape != expected[name]
    )  # fmt: skip
    if wrong:
        raise GuidanceError(
            f"the weights {path} do not fit their architecture: {len(wrong)} tensors are missing, unknown or of another "
            f"shape (the first is {wrong[0]}): get the file again"
        )
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise GuidanceError(f"the weights {path} hold numbers that are not finite: the file is damaged, get it again")
    net.load_state_dict(tensors)
    return net.requires_grad_(False).eval()


def to_bytes(net: ViewPrior, widths: tuple[int, int, int], notes: dict[str, str] | None = None) -> bytes:
    """The prior's weights as a file; `notes` go to its header too."""
    return packed(net, ARCHITECTURE, {"widths": json.dumps(widths), **(notes or {})})


def load(path: Path | str = "") -> ViewPrior:
    """The prior's network with weights from a file, on the CPU in fp32; the shipped ones when no path is given.

    Raises:
        GuidanceError: There is no such file, it is damaged, or it is for another architecture.
    """
    path = Path(path) if path else shipped_path()
    header, tensors = read(path, ARCHITECTURE)
    return filled(ViewPrior(stated_widths(header, path)), tensors, path)


def load_for_use(path: Path | str, device: torch.device, dtype: torch.dtype) -> ViewPrior:
    """The network where and in the type it will run, kept for whoever asks next, who must not change it: a job without a
    camera asks twice, for the elevation and for the prior."""
    path = Path(path) if path else shipped_path()
    return _kept(path, path.stat().st_mtime_ns if path.is_file() else 0, str(device), dtype)


@lru_cache(maxsize=1)
def _kept(path: Path, changed_ns: int, device: str, dtype: torch.dtype) -> ViewPrior:
    return in_precision(load(path), dtype).to(device).to(memory_format=torch.channels_last)


def stated_widths(header: dict[str, str], path: Path) -> tuple[int, int, int]:
    """Channels of the three levels as the header states them; groups of 32 channels are normalized together."""
    try:
        widths = tuple(json.loads(header.get("widths", "null")))
    except (TypeError, ValueError):
        widths = ()
    if len(widths) != 3 or not all(isinstance(w, int) and 32 <= w <= 2048 and w % 32 == 0 for w in widths):
        raise GuidanceError(
            f"the weights {path} state the widths {header.get('widths')!r}, not three multiples of 32: get the file again"
        )
    return widths
