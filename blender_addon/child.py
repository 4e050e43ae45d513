"""A child process that is looked at from time to time and never waited for. No bpy, no threads.

Output goes to files rather than pipes: a file can be read without blocking on every platform, it never fills up, and it
is still there to be read when the child has died.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

TERMINATE_AFTER_S = 3.0
KILL_AFTER_S = 6.0
MAX_TAIL_BYTES = 64_000


def clean_environment() -> dict[str, str]:
    """This process's environment without what would turn another Python into Blender's."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "BLENDER_"))}


class Child:
    """One started process, its log files, and its end."""

    def __init__(self, command: list[str], log: Path, output: Path | None = None, environment: dict | None = None):
        """Start the process, which takes until the system has loaded the program: a millisecond, some tens on a busy machine.

        Args:
            command: Program and arguments; no shell reads them.
            log: Takes stderr, and stdout too unless `output` is given. Appended to.
            output: Takes stdout. Overwritten, readable by its owner only.

        Raises:
            OSError: The program cannot be started.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self.command, self.log, self.output = command, log, output
        self._stop_asked_at: float | None = None
        flags = (subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP) if sys.platform == "win32" else 0
        with open(log, "ab") as log_file:
            if output is not None:
                output.unlink(missing_ok=True)
                out_file = os.fdopen(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
            else:
                out_file = log_file
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out_file,
                    stderr=log_file,
                    env=environment if environment is not None else clean_environment(),
                    creationflags=flags,
                    start_new_session=sys.platform != "win32",
                )
            finally:
                out_file.close()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def ask_to_stop(self, now: float | None = None) -> None:
        """Start the clock after which `poll` ends the process by force."""
        if self._stop_asked_at is None:
            self._stop_asked_at = time.monotonic() if now is None else now

    @property
    def is_stopping(self) -> bool:
        return self._stop_asked_at is not None

    def poll(self, now: float | None = None) -> int | None:
        """Exit code or None; a process asked to stop is terminated, then killed, when its time is over."""
        code = self.exit_code
        if code is None and self._stop_asked_at is not None:
            waited = (time.monotonic() if now is None else now) - self._stop_asked_at
            if waited > KILL_AFTER_S:
                self.process.kill()
            elif waited > TERMINATE_AFTER_S:
                self.process.terminate()
        return code

    def end(self, patience_s: float = 1.0) -> None:
        """End it now, for good; used when Blender quits and nobody polls any more."""
        if self.exit_code is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(patience_s)

    def terminate(self) -> None:
        """Ask by signal rather than by message; `poll` kills it when that does not help."""
        if self.exit_code is None:
            self.process.terminate()
            self._stop_asked_at = time.monotonic() - TERMINATE_AFTER_S


def tail(path: Path, n_lines: int = 20) -> list[str]:
    """The last lines of a text file; none when it does not exist."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - MAX_TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-n_lines:]
