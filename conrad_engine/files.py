"""Writing files so that a final name never holds half a file."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
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


def remove_unfinished(folder: Path) -> None:
    """Remove what `write_atomic` has left in a folder where its process was killed; for the one process that writes there."""
    for rest in folder.glob(".*.tmp"):
        rest.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    write_atomic(path, json.dumps(data, indent=1).encode())
