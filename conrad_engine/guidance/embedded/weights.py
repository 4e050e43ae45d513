"""Reading and writing the network's weights: fp16 safetensors whose header says which architecture they fit."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ...errors import GuidanceError
from .unet import ARCHITECTURE, ViewPrior

SHIPPED = "prior.safetensors"


def to_bytes(net: ViewPrior, widths: tuple[int, int, int], notes: dict[str, str] | None = None) -> bytes:
    """The weights as a safetensors file; `notes` go to its header too."""
    tensors = {name: value.detach().half().cpu().contiguous() for name, value in net.state_dict().items()}
    return save(tensors, {"architecture": ARCHITECTURE, "widths": json.dumps(widths), **(notes or {})})


def shipped_path() -> Path:
    return Path(str(resources.files(__package__) / SHIPPED))


def load(path: Path | str = "") -> ViewPrior:
    """The network with weights from a file, on the CPU in fp32; the shipped ones when no path is given.

    Raises:
        GuidanceError: There is no such file, it is damaged, or it is for another architecture.
    """
    path = Path(path) if path else shipped_path()
    if not path.is_file():
        raise GuidanceError(f"the embedded prior's weights are missing at {path}: reinstall the package or name a file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise GuidanceError(
            f"the prior's weights {path} cannot be read ({error}): the file is damaged, get it again"
        ) from None
    found = header.get("architecture", "no architecture")
    if found != ARCHITECTURE:
        raise GuidanceError(f"the weights {path} are for {found}, this version needs {ARCHITECTURE}")
    net = ViewPrior(_widths(header, path))
    expected = {name: value.shape for name, value in net.state_dict().items()}
    wrong = sorted(
        name for name in expected.keys() | tensors.keys()
        if name not in expected or name not in tensors or tensors[name].shape != expected[name]
    )  # fmt: skip
    if wrong:
        raise GuidanceError(
            f"the weights {path} do not fit {ARCHITECTURE}: {len(wrong)} tensors are missing, unknown or of another shape "
            f"(the first is {wrong[0]}): get the file again"
        )
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise GuidanceError(f"the weights {path} hold numbers that are not finite: the file is damaged, get it again")
    net.load_state_dict(tensors)
    return net.requires_grad_(False).eval()


def _widths(header: dict[str, str], path: Path) -> tuple[int, int, int]:
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
