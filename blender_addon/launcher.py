"""Start, watch and stop the engine process. No bpy, no sockets: it ends at the address the engine announces."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from .child import Child, tail
from .protocol import Connection, EngineUnavailable

MIN_PAUSE_S = 5.0
MAX_FAILURES = 3
START_TIMEOUT_S = 60.0


class CannotStart(Exception):
    """The engine is not started; the message says why and what to do."""


@dataclass
class Breaker:
    """Keeps a crashing engine from being restarted for ever."""

    failures: int = 0
    last_start: float = field(default=float("-inf"))

    def why_not(self, now: float) -> str:
        """The reason not to start on its own now, or nothing."""
        if self.failures >= MAX_FAILURES:
            return f"The engine failed {self.failures} times in a row: read its log, then press Start Engine"
        if now - self.last_start < MIN_PAUSE_S:
            return f"The engine was started {now - self.last_start:.0f} s ago: wait a moment"
        return ""

    def started(self, now: float) -> None:
        self.last_start = now

    def failed(self) -> None:
        self.failures += 1

    def reset(self) -> None:
        """A person asked for a start, or the engine answered."""
        self.failures = 0
        self.last_start = float("-inf")


class Launcher:
    """The one engine process this Blender started, or none."""

    def __init__(self, folder: Path):
        """Args: folder: For the log and the announcement; created when needed."""
        self.log = folder / "engine.log"
        self._output = folder / "engine.announce"
        self.child: Child | None = None
        self.announcement: Connection | None = None
        self.breaker = Breaker()
        self.exit_code: int | None = None
        """Of the last engine that ended by itself; None if the last one ended because it was asked to."""

    @property
    def is_running(self) -> bool:
        return self.child is not None

    def start(self, python: str, arguments: list[str], by_person: bool, now: float | None = None) -> None:
        """Start the engine.

        Args:
            python: The engine's interpreter.
            arguments: Of `conrad serve`, beside the parent's pid.
            by_person: A person pressed the button: the breaker is closed again.

        Raises:
            CannotStart: The breaker is open, or the interpreter does not start.
        """
        now = time.monotonic() if now is None else now
        if self.child is not None:
            return
        if by_person:
            self.breaker.reset()
        reason = self.breaker.why_not(now)
        if reason:
            raise CannotStart(reason)
        command = [python, "-I", "-m", "conrad_engine", "serve", "--parent-pid", str(os.getpid()), *arguments]
        self.breaker.started(now)
        self.announcement, self.exit_code = None, None
        _shorten(self.log)
        try:
            self.child = Child(command, self.log, self._output)
        except OSError as error:
            self.breaker.failed()
            raise CannotStart(f"{python} cannot be started: {error.strerror or error}") from None

    def poll(self, now: float | None = None) -> str:
        """Look at the process.

        Returns:
            "announced" once, when the address is known; "ended" once, when the process is gone; else nothing.
        """
        now = time.monotonic() if now is None else now
        if self.child is None:
            return ""
        code = self.child.poll(now)
        if code is not None:
            was_asked = self.child.is_stopping
            self.exit_code = None if was_asked else code
            if not was_asked:
                self.breaker.failed()
            self.child, self.announcement = None, None
            self._output.unlink(missing_ok=True)
            return "ended"
        if self.announcement is None:
            self.announcement = _announced(self._output)
            if self.announcement is not None:
                return "announced"
            if now - self.breaker.last_start > START_TIMEOUT_S and not self.child.is_stopping:
                self.child.terminate()
                self.breaker.failed()
        return ""

    def answered(self) -> None:
        """The engine speaks: whatever went wrong before is forgotten."""
        self.breaker.failures = 0

    def ask_to_stop(self, now: float | None = None) -> None:
        """The engine was told to shut down; `poll` uses force when it does not."""
        if self.child is not None:
            self.child.ask_to_stop(now)

    def end(self) -> None:
        """End it now: Blender quits or the add-on is switched off."""
        if self.child is not None:
            self.child.end()
            self.child, self.announcement = None, None
            self._output.unlink(missing_ok=True)

    def crash_report(self, n_lines: int = 8) -> str:
        """Why the engine is gone: its exit code and the end of its log."""
        if self.exit_code is None:
            return ""
        how = f"signal {-self.exit_code}" if self.exit_code < 0 else f"exit code {self.exit_code}"
        return "\n".join([f"The engine ended with {how}", *tail(self.log, n_lines)])


def _announced(output: Path) -> Connection | None:
    """What the engine printed, once the line is there as a whole."""
    for line in tail(output):
        try:
            return Connection.from_json(line)
        except EngineUnavailable:
            continue
    return None


def _shorten(log: Path, limit_bytes: int = 5_000_000) -> None:
    """Start a new log when the old one has grown long; one old one is kept."""
    try:
        if log.stat().st_size > limit_bytes:
            os.replace(log, log.with_suffix(".old.log"))
    except OSError:
        return
