"""Many pictures: the list, its file, side-cars. No bpy.

The list lies in the output folder as `conrad_batch.json` and is written after every change, so that a run goes on after
Blender was closed or killed: finished pictures are skipped, jobs that run in the engine are found again by their id.

A side-car is a JSON file beside a picture (`chair.png` -> `chair.json`) with any of: preset, guidance, prompt, seed,
texture_size, n_faces, size, elevation_deg (or "auto": the engine guesses it), fov_deg, mask (file name), camera (set-up as
in `camera_math.setup_json`), overrides (dotted settings).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from .jobs import is_setup

LIST_NAME = "conrad_batch.json"
LIST_VERSION = 1
AUTO = "auto"
WAITING, SENT, DONE, FAILED = "waiting", "sent", "done", "failed"
SIDECAR_TYPES: dict[str, tuple[type, ...]] = {
    "preset": (str,),
    "guidance": (str,),
    "prompt": (str,),
    "seed": (int,),
    "texture_size": (int,),
    "n_faces": (int,),
    "size": (int, float),
    "elevation_deg": (int, float),
    "fov_deg": (int, float),
    "mask": (str,),
    "camera": (dict,),
    "overrides": (dict,),
}


_writing: dict[Path, Lock] = defaultdict(Lock)
"""One list is written by one thread at a time."""


class BatchError(Exception):
    """A folder, list or side-car that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Source:
    """What lies on disk of one picture."""

    picture: bytes
    settings: dict
    """Its side-car."""
    mask: bytes | None


@dataclass
class Item:
    """One picture of a batch."""

    picture: str
    """Relative to the picture folder, with forward slashes."""
    state: str = WAITING
    job: str = ""
    error: str = ""
    attempts: int = 0
    seconds: float = 0.0
    output: str = ""
    """What came of it: a file name in the output folder, or an object's name."""

    def retry(self) -> None:
        """Have it done again, even if it is finished."""
        self.state, self.error, self.job = WAITING, "", ""


@dataclass
class Batch:
    """A folder of pictures on its way to objects."""

    folder: Path
    out: Path
    items: list[Item] = field(default_factory=list)
    output: str = "GLB"

    @property
    def counts(self) -> dict[str, int]:
        return {state: sum(item.state == state for item in self.items) for state in (WAITING, SENT, DONE, FAILED)}

    @property
    def is_finished(self) -> bool:
        return all(item.state in (DONE, FAILED) for item in self.items)

    def path(self, item: Item) -> Path:
        return self.folder / item.picture

    def by_job(self, job_id: str) -> Item | None:
        return next((item for item in self.items if item.job == job_id and job_id), None)

    def next_waiting(self) -> Item | None:
        return next((item for item in self.items if item.state == WAITING), None)

    def save(self) -> None:
        """Write the list whole or not at all; from any thread, and what is written last is the newest.

        Raises:
            BatchError: The output folder cannot be written to.
        """
        partial = self.out / (LIST_NAME + ".part")
        with _writing[self.out]:
            data = {"version": LIST_VERSION, "folder": str(self.folder), "output": self.output, "items": self.items}
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                # Neither indented nor by `asdict`: of thousands of pictures that takes ten times as long, at every change.
                partial.write_text(json.dumps(data, default=vars), encoding="utf-8")
                os.replace(partial, self.out / LIST_NAME)
            except OSError as error:
                reason = error.strerror or error
                raise BatchError(f"The output folder {self.out} cannot be written to: {reason}") from None


def find_pictures(folder: Path, pattern: str, is_wanted: Callable[[], bool] = lambda: True) -> list[str]:
    """Pictures of a folder, below it too, whose name fits one of the patterns; sorted.

    Raises:
        BatchError: There is no such folder, or nobody wants to know any more.
    """
    if not folder.is_dir():
        raise BatchError(f"{folder} is no folder")
    patterns = [p.lower() for p in pattern.split()] or ["*"]
    found = []
    for inside, _, names in os.walk(folder):
        if not is_wanted():
            raise BatchError("The search for pictures was stopped")
        below = Path(inside).relative_to(folder)
        for name in names:
            is_ours = name.startswith(".") or name == LIST_NAME
            if not is_ours and any(fnmatch.fnmatchcase(name.lower(), p) for p in patterns):
                found.append((below / name).as_posix())
    return sorted(found)


def open_batch(
    folder: Path, pattern: str, out: Path, output: str, is_wanted: Callable[[], bool] = lambda: True
) -> Batch:
    """The batch of a folder, with what an earlier run finished. A slow drive makes it take any time.

    Args:
        is_wanted: False once nobody waits for it any more: then nothing is written either.

    Raises:
        BatchError: Not wanted, no folder, no pictures, or a list in the output folder that is damaged or of another folder.
    """
    pictures = find_pictures(folder, pattern, is_wanted)
    if out.resolve() != folder.resolve() and out.resolve().is_relative_to(folder.resolve()):
        # What is written there (thumbnails, textures) is no new input.
        inside = out.resolve().relative_to(folder.resolve()).as_posix() + "/"
        pictures = [p for p in pictures if not p.startswith(inside)]
    if not pictures:
        raise BatchError(f"No picture in {folder} fits {pattern!r}")
    known = _read_list(out, folder, output)
    items = [known.get(picture) or Item(picture) for picture in pictures]
    batch = Batch(folder, out, items, output)
    if not is_wanted():
        raise BatchError("The search for pictures was stopped")
    batch.save()
    return batch


def _read_list(out: Path, folder: Path, output: str) -> dict[str, Item]:
    path = out / LIST_NAME
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        names = {f.name for f in dataclasses.fields(Item)}
        items = [Item(**{k: v for k, v in entry.items() if k in names}) for entry in data["items"]]
        same = Path(data["folder"]) == folder
        is_other_output = data["output"] != output
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BatchError(f"{path} is damaged: remove it to start anew") from None
    if not same:
        raise BatchError(f"{path} belongs to the pictures in {data['folder']}: choose another output folder")
    if is_other_output:
        # Finished jobs still have their results in the engine, but they lie here in another form.
        for item in items:
            item.state = WAITING if item.state == DONE else item.state
    return {item.picture: item for item in items}


def sidecar(picture: Path) -> dict:
    """The settings beside a picture; none when there is no side-car.

    Raises:
        BatchError: It is no JSON object, or names something unknown or of the wrong type.
    """
    path = picture.with_suffix(".json")
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BatchError(f"{path.name} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise BatchError(f"{path.name} must be a JSON object with settings")
    for name, value in data.items():
        if name not in SIDECAR_TYPES:
            raise BatchError(f"{path.name} has the unknown setting {name!r}: use {', '.join(SIDECAR_TYPES)}")
        if name == "elevation_deg" and value == AUTO:
            continue
        if not isinstance(value, SIDECAR_TYPES[name]) or isinstance(value, bool):
            raise BatchError(f"{path.name}: {name} must be {SIDECAR_TYPES[name][-1].__name__}, not {value!r}")
        if name == "camera" and not is_setup(value):
            raise BatchError(
                f"{path.name}: camera must have c2w (4 x 4), intrinsics (fx, fy, cx, cy), width, height, "
                "object_center (x, y, z) and object_size"
            )
    return data


def read_source(picture: Path, max_bytes: int) -> Source:
    """Everything that is read of a picture; a slow drive makes it take any time.

    Raises:
        BatchError: A file is missing, unreadable or too large, or the side-car is none.
    """
    settings = sidecar(picture)
    mask = _read(picture.parent / settings["mask"], max_bytes) if "mask" in settings else None
    return Source(_read(picture, max_bytes), settings, mask)


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        n_bytes = path.stat().st_size
        data = path.read_bytes() if n_bytes <= max_bytes else b""
    except (OSError, ValueError) as error:
        raise BatchError(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if n_bytes > max_bytes:
        raise BatchError(f"{path.name} has {n_bytes / 1e6:.0f} MB: at most {max_bytes / 1e6:.0f} MB are sent")
    return data


def output_name(batch: Batch, item: Item, suffix: str) -> str:
    """File name of a result: the picture's with its folders joined; all of it where another picture would have the same."""

    def short(picture: str) -> str:
        return picture.rsplit(".", 1)[0].replace("/", "_")

    name = short(item.picture)
    if sum(short(other.picture).lower() == name.lower() for other in batch.items) > 1:
        name = item.picture.replace("/", "__").replace(".", "_")
    return name + suffix


def grid_place(index: int, n_items: int, spacing: float) -> tuple[float, float, float]:
    """Where the object of a number stands in a grid that is as wide as it is deep, its first row in front."""
    columns = max(1, int(n_items**0.5 + 0.999))
    row, column = divmod(index, columns)
    return ((column - (columns - 1) / 2) * spacing, row * spacing, 0.0)
