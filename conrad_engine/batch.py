"""A folder of pictures into a folder of objects, on every GPU of this machine or of a Ray cluster.

OUT/manifest.json     what is done, failed or still to do; the same command goes on from it
OUT/NAME/             mesh.glb and the other results of FOLDER/NAME.png
OUT/report.html       one page to look at
FOLDER/NAME.json      optional settings of one picture: see `SIDE_CAR_KEYS`
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from .config import AUTO, PRESETS, PipelineConfig, from_json, preset, to_json, with_overrides
from .errors import ConradError, InputError
from .files import make_folder, write_atomic, write_json

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
SIDE_CAR_KEYS = ("preset", "seed", "prompt", "guidance", "mask", "depth", "depth_kind", "init", "camera", "set")
"""mask, depth and init name files beside it; camera is a file or its content; set holds settings by dotted name."""
DONE, FAILED, TODO = "done", "failed", "todo"
POLL_S = 1.0


@dataclass(frozen=True)
class Task:
    """One picture, with all it needs on another machine."""

    name: str
    """Path of the picture in its folder, without suffix."""
    config: dict
    """`config.to_json`."""
    picture: bytes
    mask: bytes | None = None
    depth: bytes | None = None
    depth_kind: str = "relative"
    init_mesh: bytes | None = None
    camera: dict | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a task."""

    name: str
    files: dict[str, bytes] = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    seconds: float = 0.0
    where: str = ""
    """Device or machine."""
    code: str = ""
    """Empty when it is done."""
    message: str = ""
    is_lost: bool = False
    """The process or machine that worked on it is gone; another may do better."""


@dataclass(frozen=True)
class Entry:
    """A picture's line in the manifest."""

    picture: str
    fingerprint: str
    """Of the picture, its side-car files and its settings: what is done is done again when it changes."""
    state: str = TODO
    attempts: int = 0
    seconds: float = 0.0
    where: str = ""
    metrics: dict = field(default_factory=dict)
    code: str = ""
    message: str = ""


class Runner(Protocol):
    """Something that does tasks, several at a time."""

    def n_free(self) -> int:
        """Tasks it can take now."""

    def start(self, task: Task) -> None:
        """Begin a task."""

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Outcomes since the last call; returns early when there is one."""

    def close(self) -> None:
        """Stop everything."""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add the command `batch`."""
    parser = subparsers.add_parser("batch", help="a folder of pictures into a folder of objects")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--pattern", default="*", help="which pictures, such as 'chair*.png' or '**/*.jpg'")
    parser.add_argument("--preset", default="standard", metavar="|".join(PRESETS))
    parser.add_argument(
        "--elevation",
        metavar="DEG|auto",
        default=AUTO,
        help="of all cameras (default: auto, guessed picture by picture)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any setting, for all pictures"
    )
    parser.add_argument(
        "--devices", default="auto", help="auto (default: all GPUs), or a list such as cuda:0,cuda:1 or cpu"
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="use the Ray cluster at this address, or 'auto'")
    parser.add_argument(
        "--retries", type=int, default=2, help="for pictures whose process or machine was lost (default 2)"
    )
    parser.add_argument("--retry-failed", action="store_true", help="try those again that failed before")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="give a picture up after this long")
    parser.add_argument("--pipeline", default="conrad_engine.pipeline", help=argparse.SUPPRESS)
    parser.set_defaults(run=run_batch)


def config_from(arguments: argparse.Namespace) -> PipelineConfig:
    """The settings of all pictures, as far as the command line says them."""
    overrides = dict(_overrides(arguments.set))
    if arguments.elevation != AUTO:
        overrides["picture.elevation_deg"] = arguments.elevation
    return with_overrides(preset(arguments.preset), overrides)


def run_batch(arguments: argparse.Namespace) -> int:
    """`conrad batch`: 0 when every picture is done, 2 when some failed."""
    from tqdm import tqdm

    from .batch_runners import make_runner

    out = make_folder(arguments.out)
    config = config_from(arguments)
    pictures = find_pictures(arguments.folder, arguments.pattern)
    runner = make_runner(arguments.ray, arguments.devices, arguments.pipeline, out, arguments.time_limit)
    try:
        with tqdm(total=len(pictures), unit="picture", dynamic_ncols=True) as bar:
            entries = convert(
                arguments.folder, pictures, out, config, runner, arguments.retries, arguments.retry_failed, bar
            )
    finally:
        runner.close()
    n_done = sum(entry.state == DONE for entry in entries.values())
    for name, entry in entries.items():
        if entry.state == FAILED:
            print(f"failed: {name}: {entry.message}")
    print(f"{n_done} of {len(entries)} done; look at {out / 'report.html'}")
    return 0 if n_done == len(entries) else 2


def find_pictures(folder: Path, pattern: str) -> list[Path]:
    """Pictures of a folder, sorted.

    Raises:
        InputError: The folder has none, or two of the same name.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give the folder that holds the pictures")
    pictures = sorted(path for path in folder.glob(pattern) if path.suffix.lower() in SUFFIXES and path.is_file())
    if not pictures:
        raise InputError(f"{folder} holds no picture that fits {pattern!r} ({', '.join(SUFFIXES)})")
    names = [name_of(folder, path) for path in pictures]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"several pictures are called {twice[0]!r}; their results would overwrite each other: rename one"
        )
    return pictures


def name_of(folder: Path, picture: Path) -> str:
    return picture.relative_to(folder).with_suffix("").as_posix()


def convert(
    folder: Path,
    pictures: list[Path],
    out: Path,
    config: PipelineConfig,
    runner: Runner,
    retries: int,
    is_retrying_failed: bool,
    bar: Any,
) -> dict[str, Entry]:
    """Do all pictures that are not done, keep the manifest true at every moment, and write the report.

    Args:
        bar: A tqdm bar, or anything with `update` and `set_postfix_str`.

    Returns:
        The manifest's entries by name.
    """
    from .batch_report import write_report

    entries = read_manifest(out)
    entries = {name_of(folder, p): _entry_of(folder, p, config, entries, is_retrying_failed, out) for p in pictures}
    todo = [name for name, entry in entries.items() if entry.state == TODO]
    bar.update(len(entries) - len(todo))
    write_manifest(out, entries)
    running: set[str] = set()
    shown = ""
    try:
        while todo or running:
            while todo and runner.n_free():
                name = todo.pop(0)
                entries[name] = replace(entries[name], attempts=entries[name].attempts + 1)
                try:
                    runner.start(read_task(folder, entries[name].picture, config))
                    running.add(name)
                except ConradError as error:
                    entries[name] = replace(entries[name], state=FAILED, code=error.code, message=str(error))
                    write_manifest(out, entries)
                    bar.update(1)
            for outcome in runner.wait(POLL_S):
                running.discard(outcome.name)
                entries[outcome.name] = settle(out, entries[outcome.name], outcome, retries)
                write_manifest(out, entries)
                if entries[outcome.name].state == TODO:
                    todo.append(outcome.name)
                else:
                    bar.update(1)
            if shown != (shown := ", ".join(sorted(running))[:60]):
                bar.set_postfix_str(shown)
    finally:
        write_report(out, folder, entries)
    return entries


def settle(out: Path, entry: Entry, outcome: Outcome, retries: int) -> Entry:
    """Write what a task brought, and its line in the manifest."""
    told = replace(
        entry, seconds=round(outcome.seconds, 2), where=outcome.where, code=outcome.code, message=outcome.message
    )
    if outcome.code:
        is_retried = outcome.is_lost and entry.attempts <= retries
        return replace(told, state=TODO if is_retried else FAILED)
    folder = make_folder(out / outcome.name)
    for name, content in outcome.files.items():
        write_atomic(folder / name, content)
    return replace(told, state=DONE, metrics=outcome.metrics)


def read_task(folder: Path, picture: str, config: PipelineConfig) -> Task:
    """A picture with its side-car settings.

    Raises:
        InputError: A file cannot be read, or a setting cannot be used.
    """
    path = folder / picture
    side_car = _side_car(path)
    config, extras = _settled(config, side_car), {}
    for key, target in (("mask", "mask"), ("depth", "depth"), ("init", "init_mesh")):
        if key in side_car:
            try:
                extras[target] = _read(path.parent / str(side_car[key]))
            except InputError as error:
                raise InputError(f"{key} of {path.with_suffix('.json').name}: {error}") from None
    camera = side_car.get("camera")
    if isinstance(camera, str):
        camera = _json(path.parent / camera)
    name = name_of(folder, path)
    return Task(
        name, to_json(config), _read(path), camera=camera, depth_kind=side_car.get("depth_kind", "relative"), **extras
    )


def read_manifest(out: Path) -> dict[str, Entry]:
    """The entries of an earlier run; none if there was none.

    Raises:
        InputError: The file is no manifest of this version.
    """
    path = out / MANIFEST
    if not path.exists():
        return {}
    data = _json(path)
    try:
        if data["version"] != MANIFEST_VERSION:
            raise ValueError(f"version {data['version']}")
        return {name: Entry(**entry) for name, entry in data["items"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is no manifest of this version ({error}): move it away, or name another --out"
        ) from None


def write_manifest(out: Path, entries: dict[str, Entry]) -> None:
    write_json(out / MANIFEST, {"version": MANIFEST_VERSION, "items": {name: asdict(e) for name, e in entries.items()}})


def run_task(task: Task, device: str, pipeline: Any, work: Path, where: str) -> Outcome:
    """Do a task here; its errors become an outcome, so that one picture never stops the others."""
    started_s = time.monotonic()
    try:
        config = replace(from_json(task.config), device=device)
        job = pipeline.Job(
            picture=task.picture,
            config=config,
            mask=task.mask,
            depth=task.depth,
            depth_kind=task.depth_kind,
            camera=task.camera,
            init_mesh=task.init_mesh,
            name=Path(task.name).name,
        )
        result = pipeline.generate(job, make_folder(work))
        files = {path.name: path.read_bytes() for path in sorted(work.iterdir()) if _is_result(path)}
        outcome = Outcome(task.name, files, dict(result.metrics))
        shutil.rmtree(work, ignore_errors=True)
    except ConradError as error:
        outcome = Outcome(task.name, code=error.code, message=str(error))
    except Exception as error:  # Whatever it is, it is told in the report and the next picture gets its turn.
        outcome = Outcome(task.name, code="internal", message=f"{type(error).__name__}: {error}"[:1000])
    return replace(outcome, seconds=time.monotonic() - started_s, where=where)


def _is_result(path: Path) -> bool:
    return path.is_file() and not path.name.startswith((".", "checkpoint"))


def _entry_of(
    folder: Path, picture: Path, config: PipelineConfig, former: dict[str, Entry], is_retrying_failed: bool, out: Path
) -> Entry:
    """A picture's entry at the start: as it was if nothing has changed since, else to be done."""
    name = name_of(folder, picture)
    fresh = Entry(picture.relative_to(folder).as_posix(), _fingerprint(folder, picture, config))
    known = former.get(name)
    if known is None or known.fingerprint != fresh.fingerprint:
        return fresh
    if known.state == DONE and (out / name / "mesh.glb").exists():
        return known
    return known if known.state == FAILED and not is_retrying_failed else fresh


def _fingerprint(folder: Path, picture: Path, config: PipelineConfig) -> str:
    digest = hashlib.sha256()
    try:
        task = read_task(folder, picture.relative_to(folder).as_posix(), config)
        described = [task.config, task.camera, task.depth_kind]
        contents = [task.picture, task.mask, task.depth, task.init_mesh, json.dumps(described, sort_keys=True).encode()]
    except ConradError as error:
        contents = [str(error).encode()]
    for content in contents:
        digest.update(b"-" if content is None else len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def _side_car(picture: Path) -> dict:
    path = picture.with_suffix(".json")
    if not path.exists():
        return {}
    data = _json(path)
    unknown = set(data) - set(SIDE_CAR_KEYS) if isinstance(data, dict) else {"not an object"}
    if unknown:
        raise InputError(f"{path.name} has {', '.join(sorted(unknown))}; known are {', '.join(SIDE_CAR_KEYS)}")
    return data


def _settled(config: PipelineConfig, side_car: dict) -> PipelineConfig:
    """The settings of one picture: those of all, then its own."""
    if "preset" in side_car:
        base = preset(str(side_car["preset"]))
        config = replace(base, seed=config.seed, prompt=config.prompt, device=config.device, threads=config.threads)
    named = {key: side_car[key] for key in ("seed", "prompt", "guidance") if key in side_car}
    further = side_car.get("set", {})
    if not isinstance(further, dict):
        raise InputError("'set' of a side-car file must be an object such as {\"optimize.n_steps\": 300}")
    return with_overrides(config, {**named, **further})


def _overrides(items: list[str]) -> list[tuple[str, str]]:
    for item in items:
        if "=" not in item:
            raise InputError(f"--set needs NAME=VALUE, for example optimize.n_steps=300, not {item!r}")
    return [(name.strip(), value.strip()) for name, _, value in (item.partition("=") for item in items)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {error.strerror}") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise InputError(f"{path.name} is not JSON: {error}") from None
