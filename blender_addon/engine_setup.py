"""Make the engine's own virtual environment, one child process after the other, never waiting. No bpy.

    find a Python -> create the environment -> install the bundled wheel -> doctor

Blender's own Python is never used: packages put there break Blender and vanish with its next version.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from .background import in_thread
from .child import Child, tail

MIN_PYTHON = (3, 11)
PYTHON_NAMES = ("python3.13", "python3.12", "python3.11", "python3.14", "python3", "python")
EXPECTED_PACKAGES = 40
"""Roughly how many packages pip goes through; only for the progress bar."""
_VERSION_CODE = "import sys, venv, ensurepip; print(*sys.version_info[:2]); print(sys.base_prefix)"


def environment_python(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def candidate_pythons(preferred: str = "") -> list[str]:
    """Interpreters worth asking for their version: the preferred one alone, or those on the PATH and in usual places."""
    if preferred:
        return [preferred]
    found = [shutil.which(name) for name in PYTHON_NAMES]
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", "")) / "Programs" / "Python"
        found += [str(path) for path in sorted(base.glob("Python3*/python.exe"), reverse=True)]
    elif sys.platform == "darwin":
        found += [f"/opt/homebrew/bin/{name}" for name in PYTHON_NAMES]
        found += [f"/Library/Frameworks/Python.framework/Versions/3.{minor}/bin/python3" for minor in (13, 12, 11)]
    return list(dict.fromkeys(path for path in found if path and Path(path).exists()))


@dataclass(frozen=True)
class Doctor:
    """What `conrad doctor --json` says about an environment."""

    is_ok: bool
    version: str = ""
    python: str = ""
    torch: str = ""
    device: str = ""
    memory_bytes: int = 0
    missing: tuple[tuple[str, str], ...] = ()
    """Name and the command that mends it."""
    problem: str = ""
    """Why there is no answer at all."""

    @staticmethod
    def from_text(text: str, exit_code: int) -> Doctor:
        start = text.find("{")
        try:
            data = json.loads(text[start:]) if start >= 0 else None
            if not isinstance(data, dict):
                raise ValueError
            missing = tuple((str(m["name"]), str(m.get("command", ""))) for m in data.get("missing", ()))
            memory = int(data.get("memory_bytes") or 0)
        except (ValueError, KeyError, TypeError):
            last = text.strip().splitlines()[-1:] or [f"it ended with exit code {exit_code}"]
            return Doctor(False, problem=f"The engine's check gave no answer: {last[0]}")
        words = {name: str(data.get(name) or "") for name in ("version", "python", "torch", "device")}
        return Doctor(bool(data.get("ok")), memory_bytes=memory, missing=missing, **words)


class Check:
    """Runs `doctor` in an environment."""

    def __init__(self, python: str, folder: Path):
        """Raises: OSError: The interpreter cannot be started."""
        self._output = folder / "doctor.json"
        command = [python, "-I", "-m", "conrad_engine", "doctor", "--json"]
        self._log = folder / "doctor.log"
        self._log.unlink(missing_ok=True)
        self._child = Child(command, self._log, self._output)

    def poll(self) -> Doctor | None:
        """The answer, or None while it is still looking."""
        code = self._child.poll()
        if code is None:
            return None
        text = self._output.read_text("utf-8", "replace")
        return Doctor.from_text(text if "{" in text else "\n".join(tail(self._log, 1)), code)

    def cancel(self) -> None:
        """Stop at once; Blender does not wait until the process is gone."""
        in_thread(self._child.end)


class SetUp:
    """The whole set-up as a state machine: call `poll` until `is_done`."""

    def __init__(
        self,
        folder: Path,
        wheel: Path,
        preferred_python: str = "",
        find_links: str = "",
        is_offline: bool = False,
        extra_options: tuple[str, ...] = (),
        forbidden_prefix: str = sys.base_prefix,
    ):
        """Prepare; nothing runs before the first `poll`.

        Args:
            folder: Gets `environment/`, `setup.log` and `setup.json`.
            wheel: The engine's wheel.
            preferred_python: Interpreter to build on; one is looked for when empty.
            find_links: Folder of wheels to install from, beside or instead of the internet.
            is_offline: Install from `find_links` only.
            extra_options: More options for pip, such as an index for another torch build.
            forbidden_prefix: Installation that must not be built on: Blender's.

        Raises:
            OSError: The folder cannot be written to.
        """
        self.folder, self.environment = folder, folder / "environment"
        self.log = folder / "setup.log"
        self._wheel, self._find_links, self._is_offline = wheel, find_links, is_offline
        self._extra_options = extra_options
        self._forbidden = Path(forbidden_prefix).resolve()
        self._candidates = candidate_pythons(preferred_python)
        self._refused: list[str] = []
        self._child: Child | None = None
        self._step = "find"
        self._check: Check | None = None
        self.error = ""
        self.doctor: Doctor | None = None
        self.python = ""
        """The interpreter the environment is built on, once found."""
        folder.mkdir(parents=True, exist_ok=True)
        self.log.write_text("", encoding="utf-8")

    @property
    def is_done(self) -> bool:
        return self._step == "done"

    @property
    def progress(self) -> tuple[float, str]:
        """Part done, 0 to 1, and one line of text."""
        if self._step == "install":
            lines = tail(self.log, 400)
            n_packages = sum(line.startswith(("Collecting", "Requirement already")) for line in lines)
            is_last = any(line.startswith("Installing collected") for line in lines)
            part = 0.9 if is_last else 0.75 * min(n_packages / EXPECTED_PACKAGES, 1)
            return 0.1 + 0.8 * part, _short(lines[-1] if lines else "Installing packages")
        texts = {"find": (0.0, "Looking for Python"), "create": (0.03, "Creating the environment")}
        return texts.get(self._step, (0.95, "Checking") if self._step == "check" else (1.0, self.error or "Ready"))

    def cancel(self) -> None:
        """Stop at once. What is there stays incomplete; the next set-up clears it."""
        if self._child is not None:
            in_thread(self._child.end)
        if self._check is not None:
            self._check.cancel()
        if not self.is_done:
            self._finish("Set-up was cancelled: press Set Up Engine to do it again")

    def poll(self) -> None:
        """Go one step on, if the running one has ended."""
        try:
            getattr(self, f"_poll_{self._step}")()
        except OSError as error:
            self._finish(f"Set-up stopped: {error}")

    def _poll_done(self) -> None:
        return

    def _poll_find(self) -> None:
        if self._child is not None:
            if self._child.poll() is None:
                return
            reason = self._why_not_this(self._child.exit_code)
            if not reason:
                self.python = self._candidates[0]
                return self._run(
                    "create", [self.python, "-I", "-m", "venv", "--clear", str(self.environment)], self.environment
                )
            self._refused.append(f"{self._candidates[0]}: {reason}")
            self._candidates.pop(0)
        if not self._candidates:
            tried = "; ".join(self._refused) or "none was found"
            return self._finish(
                f"No Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer to build on ({tried}). "
                "Install one, or name another in the preferences as Base Python"
            )
        self._child = Child([self._candidates[0], "-I", "-c", _VERSION_CODE], self.log, self.folder / "python.txt")

    def _why_not_this(self, exit_code: int | None) -> str:
        # Whatever else an interpreter has to say, a greeting for one, it says before.
        lines = (self.folder / "python.txt").read_text("utf-8", "replace").splitlines()[-2:]
        numbers = lines[0].split() if lines else []
        if exit_code or len(lines) < 2 or [number.isdecimal() for number in numbers] != [True, True]:
            return "does not run, or lacks venv (on Debian: apt install python3-venv)"
        found = tuple(int(number) for number in numbers)
        if found < MIN_PYTHON:
            return f"is Python {found[0]}.{found[1]}"
        if Path(lines[1]).resolve() == self._forbidden:
            return "is Blender's own"
        return ""

    def _poll_create(self) -> None:
        if self._child_failed("The virtual environment could not be created"):
            return
        command = [str(environment_python(self.environment)), "-I", "-m", "pip", "install", "--no-input"]
        command += ["--disable-pip-version-check", "--progress-bar", "off", *self._extra_options]
        if self._find_links:
            command += ["--find-links", self._find_links]
        if self._is_offline:
            command += ["--no-index"]
        self._run("install", [*command, str(self._wheel)])

    def _poll_install(self) -> None:
        if self._child_failed("pip could not install the engine"):
            return
        self._child = None
        self._check = Check(str(environment_python(self.environment)), self.folder)
        self._step = "check"

    def _poll_check(self) -> None:
        assert self._check is not None
        self.doctor = self._check.poll()
        if self.doctor is None:
            return
        if self.doctor.problem:
            return self._finish(self.doctor.problem)
        record = {"wheel": self._wheel.name, "python": self.python, "version": self.doctor.version}
        partial = self.folder / "setup.json.part"
        partial.write_text(json.dumps(record), encoding="utf-8")
        os.replace(partial, self.folder / "setup.json")
        self._step = "done"

    def _run(self, step: str, command: list[str], cleared: Path | None = None) -> None:
        if cleared is not None:
            (self.folder / "setup.json").unlink(missing_ok=True)
        self._child = Child(command, self.log)
        self._step = step

    def _child_failed(self, what: str) -> bool:
        """True while the child runs or when it failed; then the set-up has ended."""
        assert self._child is not None
        code = self._child.poll()
        if code is None:
            return True
        if code:
            errors = [line for line in tail(self.log, 60) if line.startswith("ERROR")] or tail(self.log, 1)
            self._finish(f"{what}: {_short(errors[0] if errors else f'exit code {code}', 300)}")
            return True
        return False

    def _finish(self, error: str) -> None:
        self.error, self._step, self._child = error, "done", None


def is_complete(folder: Path) -> bool:
    """Whether a set-up in this folder was finished."""
    return (folder / "setup.json").exists() and environment_python(folder / "environment").exists()


def installed_wheel(folder: Path) -> str:
    """File name of the wheel the environment was made with, or nothing."""
    try:
        return str(json.loads((folder / "setup.json").read_text(encoding="utf-8"))["wheel"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def bundled_wheel(addon_folder: Path) -> Path | None:
    """The engine's wheel that came with the add-on."""
    return newest_wheel(addon_folder / "engine")


def newest_wheel(folder: Path | str) -> Path | None:
    """The engine's wheel in a folder, the last by name where there are several."""
    found = sorted(Path(folder).glob("conrad_engine-*.whl"))
    return found[-1] if found else None


def _short(text: str, limit: int = 80) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[: limit - 3] + "..."
