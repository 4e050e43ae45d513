"""Writing files so that a final name never holds half a file."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from threading import Thread
from typing import Any

from .errors import InputError

CANNOT_WRITE = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EACCES: "this user may not write there; choose another folder",
    errno.EPERM: "this user may not write there; choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EEXIST: "a file of this name is in the way; choose another folder",
}


def writing_failed(path: Path, error: OSError) -> InputError:
    """The error in one sentence that says what to do."""
    reason = CANNOT_WRITE.get(error.errno or 0, error.strerror or str(error))
    return InputError(f"cannot write {path}: {reason}")


def make_folder(folder: Path) -> Path:
    """The folder, created and known to be writable.

    Raises:
        InputError: It cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise writing_failed(folder, error) from None


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it.

    Raises:
        InputError: The file cannot be written; the former file, if any, is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise writing_failed(path, error) from None


class BackgroundWriter:
    """Writes files beside other work, one after the other; the end of its block waits for the last.

    What could not be written is said whatever else ended the block: a cancelled job counts on its checkpoint.
    """

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: InputError | None = None

    def write(self, path: Path, content: bytes) -> None:
        """Begin to write a file as `write_atomic` does, once the one before is written.

        Args:
            content: Must not change any more.

        Raises:
            InputError: The file before could not be written.
        """
        self.wait()
        self._thread = Thread(target=self._write, args=(path, content))
        self._thread.start()

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
            InputError: It could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, path: Path, content: bytes) -> None:
        try:
            write_atomic(path, content)
        except InputError as error:
            self._error = error

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()


def remove_unfinished(folder: Path) -> None:
    """Remove what `write_atomic` has left in a folder where its process was killed; for the one process that writes there."""
    for rest in folder.glob(".*.tmp"):
        rest.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    write_atomic(path, json.dumps(data, indent=1).encode())
