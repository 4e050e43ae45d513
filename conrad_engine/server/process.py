"""Other processes: is one alive, how is ours started. Standard library only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    if sys.platform == "win32":
        return _is_alive_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        # The state follows the name, which is in parentheses and may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return True


def _is_alive_windows(pid: int) -> bool:
    import ctypes

    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
    synchronize, timeout = 0x00100000, 0x102
    handle = kernel.OpenProcess(synchronize, False, pid)
    if not handle:
        return False
    try:
        return kernel.WaitForSingleObject(handle, 0) == timeout
    finally:
        kernel.CloseHandle(handle)


def python_command(module: str) -> list[str]:
    """The command that runs a module of this package with the interpreter and isolation of this process."""
    return [sys.executable, *(["-I"] if sys.flags.isolated else []), "-m", module]


def child_environment(additions: dict[str, str]) -> dict[str, str]:
    """Our environment, in which a child finds this package wherever it was found here."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **additions}


def start_child(command: list[str], environment: dict[str, str], log: Path, folder: Path) -> subprocess.Popen:
    """Start a process whose standard input ends when we end, and whose output goes to a log file."""
    flags = subprocess.CREATE_NO_WINDOW if sys.platform == "win32" else 0
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            creationflags=flags,
        )


def log_tail(log: Path, n_bytes: int = 2000) -> str:
    """The last line of a log file that says anything."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - n_bytes))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1].strip()[:300] if lines else ""
