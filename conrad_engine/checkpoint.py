"""Checkpoints: what a job needs to go on after it was stopped, cancelled or killed."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from .config import PipelineConfig
from .errors import InputError
from .files import BackgroundWriter
from .state import State

CHECKPOINT_VERSION = 2
"""1 was of object frames around the silhouette's middle, whatever the user's center was."""
FILE_NAME = "checkpoint.pt"


def fingerprint(parts: Iterable[bytes]) -> str:
    """Identity of a job's inputs: a checkpoint only continues the job it came from."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def _shape(config: PipelineConfig) -> dict:
    """The settings that decide the shapes inside a checkpoint."""
    field = asdict(config.field_)
    del field["fused_heads"]  # only says how they are computed
    return {
        "field": field,
        "occupancy": config.render.occupancy_resolution,
        "depth": config.constraint.depth_size,
    }


def save_checkpoint(folder: Path, state: State, config: PipelineConfig, inputs: str, writer: BackgroundWriter) -> None:
    """Write the state as it is now, atomically, beside what follows.

    Raises:
        InputError: The checkpoint before could not be written; an older one is untouched.
    """
    buffer = io.BytesIO()
    content = {"version": CHECKPOINT_VERSION, "inputs": inputs, "shape": _shape(config), "state": state.to_dict()}
    torch.save(content, buffer)
    writer.write(folder / FILE_NAME, buffer.getbuffer())


def load_checkpoint(folder: Path, state: State, config: PipelineConfig, inputs: str) -> bool:
    """Take over the folder's checkpoint; False if there is none.

    Raises:
        InputError: It is broken, of another version, of another picture or of other field settings.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return False
    advice = "start it again as a new job (on the command line choose another folder, or leave out --resume)"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content["version"]
    except (OSError, RuntimeError, KeyError, EOFError, TypeError, pickle.UnpicklingError):
        raise InputError(f"{path} is not a checkpoint that can be read; {advice}") from None
    if version != CHECKPOINT_VERSION:
        raise InputError(f"{path} has version {version}, this program writes version {CHECKPOINT_VERSION}; {advice}")
    if content["inputs"] != inputs:
        raise InputError(f"{path} belongs to another picture, mask, camera or start mesh; {advice}")
    content["shape"]["field"].pop("fused_heads", None)  # written by earlier versions
    if content["shape"] != _shape(config):
        raise InputError(f"{path} was made with other field settings or another preset; {advice}")
    state.load(content["state"])
    if not config.optimize.symmetry:  # switched off since
        state.plane = None
    return True
