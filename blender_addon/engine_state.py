"""The states of the engine, how it is started, and what the user interface is told. No bpy."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from enum import Enum


class State(Enum):
    NOT_SET_UP = "Not Set Up"
    STOPPED = "Stopped"
    STARTING = "Starting"
    READY = "Ready"
    BUSY = "Busy"
    NOT_RESPONDING = "Not Responding"
    CRASHED = "Crashed"


@dataclass(frozen=True)
class EngineSettings:
    """Where the engine is and how it is started; from the preferences."""

    python: str = ""
    """Interpreter of the engine's environment; empty while there is none."""
    data_folder: str = ""
    """Jobs and results."""
    device: str = "auto"
    idle_minutes: float = 0.0
    """The engine ends after this long without work; 0 is never."""
    extra_arguments: tuple[str, ...] = ()
    remote_endpoint: str = ""
    """An engine on another machine instead of an own one."""
    server_key_file: str = ""
    client_key_file: str = ""

    @property
    def is_remote(self) -> bool:
        return bool(self.remote_endpoint)

    def arguments(self) -> list[str]:
        """Of `conrad serve`."""
        words = ["--devices", self.device]
        words += ["--data", self.data_folder] if self.data_folder else []
        words += ["--idle-timeout", str(self.idle_minutes * 60)] if self.idle_minutes else []
        return [*words, *self.extra_arguments]


@dataclass(frozen=True)
class Event:
    """Something the user interface should react to."""

    kind: str
    """engine (its state changed), job, preview, thumbnail, result (arrays are there), file, forgotten, elevation (a guess)."""
    job: str = ""


def options_of(text: str, is_windows: bool = sys.platform == "win32") -> tuple[str, ...]:
    """Options for a program, as a person writes them: quotation marks keep words together. One that nothing closes, such as
    the apostrophe of a name, is a letter like any other; on Windows, where every path has some, so is a backslash."""
    reader = shlex.shlex(text, posix=True, punctuation_chars=False)
    reader.whitespace_split, reader.commenters = True, ""
    if is_windows:
        reader.escape = ""
    try:
        return tuple(reader)
    except ValueError:
        return tuple(text.split())


def is_changed(settings: EngineSettings, other: EngineSettings) -> bool:
    """Whether a running engine must be started anew for these settings."""
    return replace(settings, idle_minutes=0.0) != replace(other, idle_minutes=0.0)
