"""The commands of `conrad` that start an engine or talk to one. `cli` registers them; they print, and return exit codes."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import GUIDANCES, PRESETS
from ..errors import InputError
from ..files import make_folder, write_atomic
from ..protocol import (
    ARRAYS,
    CONNECTION_FILE,
    DONE,
    RESULT_FILES,
    Array,
    Cancel,
    CurveKeys,
    EngineClient,
    EngineUnavailable,
    JobState,
    ListJobs,
    Preview,
    Progress,
    ProtocolError,
    RequestRefused,
    SetPreview,
    Shutdown,
    Submit,
    Welcome,
    default_data_folder,
    new_job_id,
)

FAILED_JOB, NO_ENGINE = 2, 3
"""Exit codes: a job or request that failed, and an engine that does not answer."""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add serve, submit, watch, list, cancel, fetch, shutdown, keys and batch."""
    _add_serve(subparsers)
    _add_submit(subparsers)
    watch = _add_client_command(subparsers, "watch", "follow a job until it ends", run_watch)
    watch.add_argument("job", help="its id or the first digits of it")
    _add_preview_dir(watch)
    _add_client_command(subparsers, "list", "the engine's jobs", run_list)
    cancel = _add_client_command(subparsers, "cancel", "stop a job without a mesh; its checkpoint is kept", run_cancel)
    cancel.add_argument("job")
    fetch = _add_client_command(subparsers, "fetch", "write a job's result into a folder", run_fetch)
    fetch.add_argument("job")
    fetch.add_argument("--out", type=Path, required=True, metavar="DIR")
    _add_client_command(subparsers, "shutdown", "end the engine; unfinished jobs go on at its next start", run_shutdown)
    keys = subparsers.add_parser("keys", help="make CURVE keys for an engine that other machines use")
    keys.add_argument("folder", type=Path)
    keys.add_argument("--client", required=True, metavar="NAME", help="make a key for this client")
    keys.set_defaults(run=run_keys)
    from ..batch import add_arguments as add_batch

    add_batch(subparsers)


def _add_serve(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("serve", help="the engine process that Blender and scripts talk to")
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="jobs and connection file")
    parser.add_argument(
        "--bind", default="127.0.0.1", metavar="ADDRESS", help="IP address; others than loopback need --keys"
    )
    parser.add_argument("--port", type=int, default=0, help="0 (default): a free one")
    parser.add_argument("--keys", type=Path, metavar="DIR", help="CURVE keys, made by `conrad keys`")
    parser.add_argument(
        "--devices", default="auto", help="auto (default: all GPUs), or a list such as cuda:0,cuda:1 or cpu"
    )
    parser.add_argument("--parent-pid", type=int, help="end when this process is gone")
    parser.add_argument("--keep", action="store_true", help="go on although the parent process is gone")
    parser.add_argument(
        "--idle-timeout", type=float, metavar="SECONDS", help="end after this long without clients and work"
    )
    parser.add_argument("--pipeline", default=None, help=argparse.SUPPRESS)
    parser.set_defaults(run=run_serve)


def _add_submit(subparsers: argparse._SubParsersAction) -> None:
    parser = _add_client_command(subparsers, "submit", "send a picture to the engine", run_submit)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--mask", type=Path)
    parser.add_argument("--depth", type=Path)
    parser.add_argument("--depth-kind", choices=("relative", "metric"), default="relative")
    parser.add_argument("--init", type=Path, metavar="MESH.glb", help="start from this mesh")
    parser.add_argument("--camera", type=Path, metavar="FILE", help="as for `conrad generate`")
    parser.add_argument("--preset", default="standard", metavar="|".join(PRESETS))
    parser.add_argument("--guidance", default="", metavar="|".join(GUIDANCES))
    parser.add_argument("--prompt", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texture-size", type=int)
    parser.add_argument("--faces", type=int)
    parser.add_argument("--priority", type=int, default=0, help="-100 to 100, larger first")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting")
    parser.add_argument("--watch", action="store_true", help="follow it until it ends")
    parser.add_argument("--out", type=Path, metavar="DIR", help="follow it and write its result here")
    _add_preview_dir(parser)


def _add_client_command(
    subparsers: argparse._SubParsersAction, name: str, text: str, run: Callable[[EngineClient, Any], int]
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=text)
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="data folder of the engine")
    parser.add_argument("--endpoint", metavar="tcp://HOST:PORT", help="an engine on another machine; needs both keys")
    parser.add_argument("--server-key", type=Path, metavar="FILE", help="the engine's public key (server.key)")
    parser.add_argument("--client-key", type=Path, metavar="FILE", help="our secret key (NAME.key_secret)")
    parser.set_defaults(run=lambda arguments: _with_client(arguments, run))
    return parser


def _add_preview_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preview-dir", type=Path, metavar="DIR", help="write previews here as PNG files")


def run_serve(arguments: argparse.Namespace) -> int:
    """`conrad serve`."""
    from .serve import PIPELINE, Options, serve
    from .server import Life

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("conrad.server").setLevel(logging.INFO)
    parent_pid = None if arguments.keep else arguments.parent_pid
    serve(
        Options(
            arguments.data or default_data_folder(),
            arguments.bind,
            arguments.port,
            arguments.keys,
            tuple(arguments.devices.split(",")),
            arguments.pipeline or PIPELINE,
            Life(parent_pid, arguments.idle_timeout),
        )
    )
    return 0


def run_keys(arguments: argparse.Namespace) -> int:
    """`conrad keys`: the engine's pair on first use, and a pair for one client."""
    from .keys import make_keys

    for line in make_keys(arguments.folder, arguments.client):
        print(line)
    return 0


def _with_client(arguments: argparse.Namespace, run: Callable[[EngineClient, Any], int]) -> int:
    try:
        with _connect(arguments) as client:
            return run(client, arguments)
    except RequestRefused as error:
        print(f"conrad: {error}", file=sys.stderr)
        return FAILED_JOB
    except ProtocolError as error:
        raise InputError(f"this cannot be sent: {error}") from None
    except EngineUnavailable as error:
        print(f"conrad: {error}", file=sys.stderr)
        return NO_ENGINE


def _connect(arguments: argparse.Namespace) -> EngineClient:
    if arguments.endpoint is None:
        folder = arguments.data or default_data_folder()
        client = EngineClient.from_connection_file(folder / CONNECTION_FILE, "conrad")
    else:
        if arguments.server_key is None or arguments.client_key is None:
            raise InputError(
                "--endpoint needs --server-key and --client-key, made by `conrad keys` on the engine's machine"
            )
        keys = CurveKeys.load(arguments.server_key, arguments.client_key)
        client = EngineClient(arguments.endpoint, keys=keys, name="conrad")
    client.request(ListJobs(), timeout_s=10.0)
    return client


def run_submit(client: EngineClient, arguments: argparse.Namespace) -> int:
    submit = Submit(
        new_job_id(),
        arguments.picture.stem[:200],
        read_file(arguments.picture),
        mask=_read_optional(arguments.mask),
        depth=_read_optional(arguments.depth),
        depth_kind=arguments.depth_kind,
        init_mesh=_read_optional(arguments.init),
        preset=arguments.preset,
        guidance=arguments.guidance,
        prompt=arguments.prompt,
        seed=arguments.seed,
        texture_size=arguments.texture_size,
        n_faces=arguments.faces,
        overrides=dict(_overrides(arguments.set)),
        priority=arguments.priority,
        **_camera(arguments.camera),
    )
    client.request(submit)
    print(submit.job)
    if not (arguments.watch or arguments.out or arguments.preview_dir):
        return 0
    code = _watch(client, submit.job, arguments.preview_dir)
    if arguments.out is not None and client.jobs[submit.job].result:
        _fetch(client, submit.job, arguments.out)
    return code


def run_watch(client: EngineClient, arguments: argparse.Namespace) -> int:
    return _watch(client, find_job(client, arguments.job), arguments.preview_dir)


def run_list(client: EngineClient, arguments: argparse.Namespace) -> int:
    for job in client.jobs.values():
        print(
            f"{job.job}  {job.state:9}  {job.step:5d}/{job.n_steps or job.n_steps_set:<5d}  {job.name}  {job.error_message}"
        )
    return 0


def run_cancel(client: EngineClient, arguments: argparse.Namespace) -> int:
    client.request(Cancel(find_job(client, arguments.job)))
    return 0


def run_fetch(client: EngineClient, arguments: argparse.Namespace) -> int:
    _fetch(client, find_job(client, arguments.job), arguments.out)
    return 0


def run_shutdown(client: EngineClient, arguments: argparse.Namespace) -> int:
    client.request(Shutdown())
    return 0


def find_job(client: EngineClient, start: str) -> str:
    """The one job whose id or name starts like this.

    Raises:
        InputError: There is none, or more than one.
    """
    found = [job.job for job in client.jobs.values() if job.job.startswith(start) or job.name == start]
    if len(found) != 1:
        raise InputError(f"{len(found)} jobs are called {start!r}; `conrad list` shows all")
    return found[0]


def _watch(client: EngineClient, job: str, preview_dir: Path | None) -> int:
    """Show one line that lives until the job ends."""
    if preview_dir is not None:
        make_folder(preview_dir)
        client.send(SetPreview(job))
    line = _Line()

    def show(message: Any) -> None:
        if isinstance(message, Welcome) and preview_dir is not None:
            client.send(SetPreview(job))  # An engine that was started anew knows no views.
        if getattr(message, "job", None) != job:
            return
        if isinstance(message, Progress):
            line.show(progress_line(message))
        elif isinstance(message, JobState):
            before = f", {message.position} before it" if message.position else ""
            line.show(f"{message.name or job[:8]}: {message.state}{before}")
        elif isinstance(message, Preview) and preview_dir is not None:
            write_atomic(preview_dir / f"{message.step:06d}.png", png_bytes(message.rgb))

    try:
        state = client.wait(job, on_message=show)
    except KeyboardInterrupt:
        line.end(f"the job goes on; follow it again with: conrad watch {job}")
        raise
    words = {DONE: f"done in {state.elapsed_s:.0f} s"}.get(state.state, f"{state.state} {state.error_message}".strip())
    line.end(f"{state.name or job[:8]}: {words}")
    return 0 if state.state == DONE else FAILED_JOB


def _fetch(client: EngineClient, job: str, out: Path) -> None:
    make_folder(out)
    parts = [part for part in client.jobs[job].parts if part in RESULT_FILES]
    if not parts:
        client.fetch(job, ARRAYS)  # Refused with the reason.
        raise InputError("this result has arrays only, and no files")
    for part in parts:
        write_atomic(out / part, bytes(client.fetch(job, part).data))
        print(out / part)


class _Line:
    """A line that replaces itself on a terminal; elsewhere, one line at most every few seconds."""

    EVERY_S = 5.0

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._shown_s = -self.EVERY_S

    def show(self, text: str) -> None:
        now_s = time.monotonic()
        if self._is_terminal:
            # A line that wraps would not be replaced but pile up.
            sys.stderr.write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")
        elif now_s - self._shown_s >= self.EVERY_S:
            self._shown_s = now_s
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def end(self, text: str) -> None:
        sys.stderr.write(f"\r\x1b[K{text}\n" if self._is_terminal else f"{text}\n")


def progress_line(progress: Progress, width: int = 24) -> str:
    """Stage, bar, steps, time left and losses in one line."""
    share = progress.step / progress.n_steps if progress.n_steps else 0.0
    bar = ("#" * round(share * width)).ljust(width, ".")
    left = "" if progress.eta_s is None else f"  {int(progress.eta_s) // 60}:{int(progress.eta_s) % 60:02d} left"
    losses = "".join(f"  {name} {value:.3g}" for name, value in list(progress.losses.items())[:3] if value is not None)
    return f"{progress.stage:10} [{bar}] {progress.step}/{progress.n_steps}{left}{losses}"


def png_bytes(pixels: Array) -> bytes:
    """A PNG file of u1 (height, width, 3 or 4) pixels, without any imaging package."""
    height, width, channels = pixels.shape
    row = width * channels
    data = bytes(pixels.data)
    lines = b"".join(b"\0" + data[start : start + row] for start in range(0, height * row, row))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 1)) + chunk(b"IEND", b"")


def read_file(path: Path) -> bytes:
    """A file the user named.

    Raises:
        InputError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give the path of an existing file") from None


def _read_optional(path: Path | None) -> bytes | None:
    return None if path is None else read_file(path)


def _overrides(items: list[str]) -> list[tuple[str, str]]:
    for item in items:
        if "=" not in item:
            raise InputError(f"--set needs NAME=VALUE, for example optimize.n_steps=300, not {item!r}")
    return [(name.strip(), value.strip()) for name, _, value in (item.partition("=") for item in items)]


def _camera(path: Path | None) -> dict:
    """The camera fields of a `Submit` from a camera file."""
    if path is None:
        return {}
    try:
        data = json.loads(read_file(path))
        rows = [float(x) for row in data["c2w"] for x in row]
        return {
            "c2w": tuple(rows if len(rows) == 16 else [*rows, 0.0, 0.0, 0.0, 1.0]),
            "intrinsics": tuple(float(x) for x in data["intrinsics"]),
            "width": int(data["width"]),
            "height": int(data["height"]),
            "object_center": tuple(float(x) for x in data.get("object_center") or ()),
            "object_size": data.get("object_size"),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the camera file {path} cannot be used: {error!r}; it needs c2w, intrinsics, width, height"
        ) from None
