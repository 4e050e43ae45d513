"""What can go wrong, as exceptions whose message is one clear sentence for a person. Standard library only."""

from __future__ import annotations


class ConradError(Exception):
    """Base of every error the engine raises on purpose.

    `code` names the kind of error on the wire and in reports; it never changes once released. The message says what was
    found, what was expected and what to do.
    """

    code = "error"


class InputError(ConradError):
    """A picture, mask, depth map, camera, setting or folder that cannot be used as given."""

    code = "input"


class MissingDependency(ConradError):
    """An optional package or model is not installed; the message names the command that installs it."""

    code = "missing_dependency"


class GuidanceError(ConradError):
    """A diffusion model cannot be loaded or answers with something unusable."""

    code = "guidance"


class OptimizationError(ConradError):
    """The optimisation cannot go on: non-finite values in a row, or out of memory at the smallest batch."""

    code = "optimization"


class MeshError(ConradError):
    """No usable surface, or one that cannot be unwrapped or written."""

    code = "mesh"


class Cancelled(ConradError):
    """The caller asked to stop; what was reached so far is kept."""

    code = "cancelled"


def check(condition: bool, message: str) -> None:
    """Raise an `InputError` with this message unless the condition holds."""
    if not condition:
        raise InputError(message)
