"""How a running job is watched and steered. Standard library only: the server and the add-on's tests import it too.

`pipeline.generate` calls a `Monitor` between steps, from the thread that runs the job. A monitor must answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Command(Enum):
    """What the caller wants of a running job; asked for between any two steps."""

    RUN = "run"
    PAUSE = "pause"
    """Hold still until another command comes; previews are still answered."""
    KEEP = "keep"
    """Stop optimising now and make the mesh of the current state."""
    CANCEL = "cancel"
    """Stop, keep the checkpoint, make no mesh."""


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    stage: str
    """prepare, warm_start, optimize, mesh, write or done."""
    step: int
    n_steps: int
    eta_s: float | None = None
    """Seconds until the job ends, by the speed so far; None while unknown."""
    losses: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: int = 0
    """Device memory in use on a GPU, resident memory of the process on a CPU."""


class Monitor:
    """Watches nothing and lets the job run. Subclasses override what they need."""

    def progress(self, progress: Progress) -> None:
        """Called at every step and at the start of every stage."""

    def command(self) -> Command:
        """What to do next."""
        return Command.RUN

    def preview_camera(self) -> Any | None:
        """A `cameras.Camera` in the caller's world if a preview is wanted now, else None.

        Rendering a preview costs time, so a monitor answers None most of the time.
        """
        return None

    def preview(self, rgba: Any, camera: Any) -> None:
        """The preview asked for: (height, width, 4) uint8 array, sRGB with straight alpha, and its camera."""

    def warning(self, message: str) -> None:
        """Something the user should know that does not stop the job."""
