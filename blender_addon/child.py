"""A child process that is looked at from time to time and never waited for. No bpy.

Output goes to files rather than pipes: a file can be read without blocking on every platform, it never fills up, and it
is still there to be read when the child has died.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import wait
from pathlib import Path
from typing import BinaryIO

from .background import in_thread

CANNOT_RUN = 126
"""Exit code of a program that the system could not load, as a shell gives it."""
TERMINATE_AFTER_S = 3.0
KILL_AFTER_S = 6.0
MAX_TAIL_BYTES = 64_000


def clean_environment() -> dict[str, str]:
    """This process's environment without what would turn another Python into Blender's."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "BLENDER_"))}


class Child:
    """One started process, its log files, and its end."""

    def __init__(self, command: list[str], log: Path, output: Path | None = None, environment: dict | None = None):
        """Have the process started by a thread: until the system has loaded the program, on a busy machine some tens of
        milliseconds, Blender would wait.

        Args:
            command: Program and arguments; no shell reads them.
            log: Takes stderr, and stdout too unless `output` is given. Appended to.
            output: Takes stdout. Overwritten, readable by its owner only.

        Raises:
            OSError: There is no such program, or a file cannot be written.
        """
        if shutil.which(command[0]) is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such program", command[0])
        log.parent.mkdir(parents=True, exist_ok=True)
        self.command, self.log, self.output = command, log, output
        self._stop_asked_at: float | None = None
        log_file = open(log, "ab")  # noqa: SIM115
        try:
            out_file = log_file if output is None else _new_file(output)
        except OSError:
            log_file.close()
            raise
        environment = clean_environment() if environment is None else environment
        self._started = in_thread(lambda: _popen(command, out_file, log_file, environment))

    @property
    def process(self) -> subprocess.Popen:
        """The process itself, waited for while it is being started.

        Raises:
            OSError: The system could not load the program.
        """
        return self._started.result()

    @property
    def exit_code(self) -> int | None:
        """None while it runs or is being started."""
        if not self._started.done():
            return None
        return self.process.poll() if self._started.exception() is None else CANNOT_RUN

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
        if code is None and self._stop_asked_at is not None and self._started.done():
            waited = (time.monotonic() if now is None else now) - self._stop_asked_at
            if waited > KILL_AFTER_S:
                self.process.kill()
            elif waited > TERMINATE_AFTER_S:
                self.process.terminate()
        return code

    def end(self, patience_s: float = 1.0) -> None:
        """End it now, for good; used when Blender quits and nobody polls any more."""
        wait([self._started])
        if self.exit_code is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(patience_s)

    def terminate(self) -> None:
        """Have the next `poll` ask by signal rather than by message, and later ones kill it when that does not help."""
        self._stop_asked_at = time.monotonic() - TERMINATE_AFTER_S


def _new_file(path: Path) -> BinaryIO:
    """A file that only its owner can read, in place of the one that was there."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _popen(command: list[str], out_file: BinaryIO, log_file: BinaryIO, environment: dict[str, str]) -> subprocess.Popen:
    """Start a process that writes to these files, and close them here; why it cannot be started goes into the log."""
    flags = (subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP) if sys.platform == "win32" else 0
    with log_file, out_file:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=log_file,
                env=environment,
                creationflags=flags,
                start_new_session=sys.platform != "win32",
            )
        except OSError as error:
            log_file.write(f"{command[0]} cannot be started: {error.strerror or error}\n".encode())
            raise


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
