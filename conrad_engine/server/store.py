"""What outlives the process: jobs in SQLite, pictures and results in folders that appear by one rename.

jobs.sqlite            one row for each job
lock                   held by the one engine that uses this folder
jobs/ID/input/         what the client sent: picture, mask, depth, init_mesh, request.json
jobs/ID/work/          checkpoint and results folder of the pipeline
jobs/ID/result-N/      arrays.json, arrays.bin and files; the highest N is the newest
incoming/  trash/      folders on their way in and out
"""

from __future__ import annotations

import dataclasses
import errno
import json
import mmap
import os
import re
import shutil
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

from ..errors import ConradError, InputError
from ..protocol import ARRAYS, RESULT_FILES, Array, Result, ResultFile, Submit
from .job_queue import Job

SCHEMA_VERSION = 1
ARRAY_FIELDS = ("vertices", "faces", "uvs", "normals", "texture")
INPUT_FIELDS = ("picture", "pixels", "mask", "mask_pixels", "depth", "depth_pixels") + (
    "init_mesh",
    "init_vertices",
    "init_faces",
)
JOB_ID = re.compile(r"[0-9a-f]{32}")


class DiskFull(ConradError):
    """No space is left where the engine keeps its jobs."""

    code = "disk_full"


class NoResult(ConradError):
    """The job has no such result."""

    code = "no_result"


class FolderInUse(ConradError):
    """Another engine works on this data folder."""

    code = "folder_in_use"


class FolderLock:
    """Held by one process at a time, and let go by the system however that process ends."""

    def __init__(self, path: Path) -> None:
        """Take the lock.

        Raises:
            FolderInUse: Another process holds it.
        """
        self._file = open(path, "a+b")
        try:
            _lock(self._file.fileno())
        except OSError:
            self._file.close()
            raise FolderInUse(
                f"another engine uses the data folder {path.parent}: stop it with `conrad shutdown`, "
                "or name another folder with --data"
            ) from None

    def release(self) -> None:
        self._file.close()


def _lock(descriptor: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Store:
    """The data folder of one engine.

    The database is written by the server's loop (a commit in WAL mode waits for no disk); all else here is for the
    thread that does the server's file work.
    """

    def __init__(self, folder: Path) -> None:
        """Open or make a data folder.

        Raises:
            FolderInUse: Another engine has it.
            InputError: It cannot be written, or was made by a newer engine.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in ("jobs", "incoming", "trash", "empty"):
                (folder / name).mkdir(exist_ok=True, mode=0o700)
            self._lock = FolderLock(folder / "lock")
        except OSError as error:
            raise InputError(
                f"the data folder {folder} cannot be used: {error.strerror}; name another with --data"
            ) from None
        try:
            self._database = _open_database(folder / "jobs.sqlite")
        except ConradError:
            self._lock.release()
            raise

    def load(self) -> list[Job]:
        """All jobs; rows of unknown fields (of a newer engine) are refused by the version before."""
        rows = self._database.execute("SELECT body FROM jobs").fetchall()
        jobs = []
        for (body,) in rows:
            data = json.loads(body)
            jobs.append(Job(**{**data, "parts": tuple(data["parts"]), "warnings": tuple(data["warnings"])}))
        return jobs

    def save(self, job: Job) -> None:
        """Write a job's row.

        Raises:
            DiskFull: There is no space for it.
        """
        try:
            with self._database:
                self._database.execute(
                    "INSERT OR REPLACE INTO jobs (id, body) VALUES (?, ?)",
                    (job.id, json.dumps(dataclasses.asdict(job))),
                )
        except sqlite3.Error as error:
            raise DiskFull(
                f"the engine's job list cannot be written: {error}; free some space in its data folder"
            ) from None

    def remove(self, job_id: str) -> None:
        """Remove a job's row; raises what `save` raises."""
        try:
            with self._database:
                self._database.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
        except sqlite3.Error as error:
            raise DiskFull(
                f"the engine's job list cannot be written: {error}; free some space in its data folder"
            ) from None

    def close(self) -> None:
        self._database.close()
        self._lock.release()

    def job_folder(self, job_id: str) -> Path:
        assert JOB_ID.fullmatch(job_id)
        return self.folder / "jobs" / job_id

    # For the file thread.

    def checkpoint_database(self) -> None:
        """Move what the write-ahead log holds into the database.

        Raises:
            sqlite3.Error: It cannot be done now, and the log stays longer; a full disk is told by `save`.
        """
        with closing(sqlite3.connect(self.folder / "jobs.sqlite", timeout=1)) as database:
            database.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def put_inputs(self, submit: Submit) -> None:
        """Write what came with a job; the folder appears complete or not at all.

        Raises:
            DiskFull: There is no space for it.
        """
        incoming = self.folder / "incoming" / uuid.uuid4().hex
        try:
            (incoming / "input").mkdir(parents=True)
            (incoming / "work").mkdir()
            arrays = {}
            for name in INPUT_FIELDS:
                value = getattr(submit, name)
                if value is None:
                    continue
                if isinstance(value, Array):
                    arrays[name] = {"dtype": value.dtype, "shape": list(value.shape)}
                    value = value.data
                _write(incoming / "input" / name, value)
            camera = {key: getattr(submit, key) for key in ("c2w", "intrinsics", "width", "height", "object_center")}
            request = {**camera, "object_size": submit.object_size, "depth_kind": submit.depth_kind, "arrays": arrays}
            _write(incoming / "input" / "request.json", json.dumps(request).encode())
            os.replace(incoming, self.job_folder(submit.job))
        except OSError as error:
            shutil.rmtree(incoming, ignore_errors=True)
            raise _named(error) from None

    def read_part(self, job_id: str, number: int, part: str, request: int) -> Result | ResultFile:
        """A part of a result, mapped into memory rather than read.

        Raises:
            NoResult: It is not there.
        """
        folder = self.job_folder(job_id) / f"result-{number}"
        try:
            if part in RESULT_FILES:
                return ResultFile(job_id, number, part, _map(folder / part), request)
            described = json.loads((folder / "arrays.json").read_text())
            data = _map(folder / "arrays.bin")
        except OSError:
            raise NoResult(f"this job has no {part if part != ARRAYS else 'mesh'}") from None
        arrays, start = {}, 0
        for name in ARRAY_FIELDS:
            blank = Array(described[name]["dtype"], tuple(described[name]["shape"]), b"")
            arrays[name] = dataclasses.replace(blank, data=data[start : start + blank.n_bytes])
            start += blank.n_bytes
        return Result(job_id, number, **arrays, metrics=described["metrics"], request=request)

    def discard(self, job_id: str) -> None:
        """Remove a job's folder."""
        source = self.job_folder(job_id)
        if source.exists():
            target = self.folder / "trash" / uuid.uuid4().hex
            os.replace(source, target)
            shutil.rmtree(target, ignore_errors=True)

    def discard_results_before(self, job_id: str, number: int) -> None:
        """Remove the results that a newer one has replaced."""
        for folder in self.job_folder(job_id).glob("result-*"):
            if folder.name.removeprefix("result-") in map(str, range(number)):
                shutil.rmtree(folder, ignore_errors=True)

    def sweep(self, known: set[str]) -> None:
        """Remove what an earlier engine left half-way: arrivals, trash, and folders of jobs that are not in the list."""
        for name in ("incoming", "trash"):
            for entry in (self.folder / name).iterdir():
                shutil.rmtree(entry, ignore_errors=True)
        for entry in (self.folder / "jobs").iterdir():
            if entry.name not in known:
                shutil.rmtree(entry, ignore_errors=True)


def _open_database(path: Path) -> sqlite3.Connection:
    try:
        database = sqlite3.connect(path, timeout=1)
        database.execute("PRAGMA journal_mode=WAL")
        # Enough against the death of any process; the log is moved over by the file thread.
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute("PRAGMA wal_autocheckpoint=0")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            with database:
                database.execute("CREATE TABLE IF NOT EXISTS jobs (id TEXT PRIMARY KEY, body TEXT NOT NULL)")
                database.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            database.close()
            raise InputError(
                f"{path} was made by another engine version (schema {version}): name another folder with --data"
            )
        return database
    except sqlite3.Error as error:
        raise InputError(
            f"the job list {path} cannot be used ({error}): move it away, or name another folder with --data"
        ) from None


def _write(path: Path, data: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _map(path: Path) -> memoryview:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _named(error: OSError) -> ConradError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull("the engine's disk is full: free some space in its data folder and send the job again")
    return InputError(f"the engine cannot write its data folder: {error.strerror}")
