"""The command `conrad`: the only place that prints or exits.

Exit codes: 0 done, 1 an unexpected error (with a traceback), 2 an input or a machine that cannot be used (one sentence), 130
stopped with Ctrl-C (a checkpoint is kept).
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .baselines import BASELINES, NEEDS_DEPTH, NEEDS_WORDS, TEXT_ONLY, overrides_of
from .config import AUTO, GUIDANCES, PRESETS, PipelineConfig, preset, with_overrides
from .errors import Cancelled, ConradError, InputError
from .evaluation import commands as evaluation_commands
from .monitor import Command, Monitor, Progress
from .server import commands as server_commands

if TYPE_CHECKING:
    from .pipeline import Job

STOPPED = 130
"""The shell's convention for a program ended by Ctrl-C."""


class TerminalMonitor(Monitor):
    """A progress bar, and Ctrl-C as a request to stop between two steps."""

    def __init__(self, is_quiet: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(disable=is_quiet or None, unit="step", leave=False, dynamic_ncols=True)
        self._is_quiet = is_quiet
        self._stage = ""
        self._is_stopping = False
        self._former = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: object) -> None:
        if self._is_stopping:  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        self._is_stopping = True
        self._bar.write("stopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)

    def progress(self, progress: Progress) -> None:
        if progress.stage != self._stage:
            self._stage = progress.stage
            self._bar.reset(total=progress.n_steps)
            self._bar.set_description(progress.stage)
        self._bar.total = progress.n_steps
        self._bar.n = progress.step
        losses = ", ".join(
            f"{name} {value:.3g}" for name, value in progress.losses.items() if name in ("mask", "fit", "sds")
        )
        self._bar.set_postfix_str(losses, refresh=False)
        self._bar.refresh()

    def command(self) -> Command:
        return Command.CANCEL if self._is_stopping else Command.RUN

    def warning(self, message: str) -> None:
        if not self._is_quiet:
            self._bar.write(f"note: {message}", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        signal.signal(signal.SIGINT, self._former)


def parse_overrides(items: list[str]) -> dict[str, object]:
    """`--set optimize.n_steps=300` as a dictionary."""
    overrides: dict[str, object] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--set needs NAME=VALUE, for example optimize.n_steps=300, not {item!r}")
        overrides[name.strip()] = value.strip()
    return overrides


def elevation(text: str) -> float | str:
    """`auto` or degrees, for argparse."""
    return AUTO if text == AUTO else float(text)


def config_from(arguments: argparse.Namespace) -> PipelineConfig:
    """The settings that the command line asks for: a preset, a baseline's, then the named options, then `--set`."""
    if arguments.constrained and not arguments.baseline:
        raise InputError("--constrained goes with --baseline; without one the constraint is what is used anyway")
    base = preset(arguments.preset)
    if arguments.text_only:
        _check_text_only(arguments)
        base = with_overrides(base, TEXT_ONLY)
    if arguments.baseline:
        base = with_overrides(base, overrides_of(arguments.baseline, arguments.constrained))
    named = {
        "seed": arguments.seed,
        "device": arguments.device,
        "threads": arguments.threads,
        "optimize.n_gpus": arguments.gpus,
        "prompt": arguments.prompt,
        "guidance": arguments.guidance,
        "picture.elevation_deg": None if arguments.elevation == AUTO else arguments.elevation,
        "picture.guess_elevation": True if arguments.elevation == AUTO else None,
        "picture.fov_deg": arguments.fov,
        "mesh.texture_size": arguments.texture_size,
        "mesh.n_faces": arguments.faces,
        "constraint.kind": arguments.constraint,
    }
    given = {name: value for name, value in named.items() if value is not None}
    if arguments.elevation in (None, AUTO) and arguments.camera is None:
        given["picture.is_elevation_known"] = False
    return with_overrides(base, given | parse_overrides(arguments.set))


def _check_text_only(arguments: argparse.Namespace) -> None:
    about_pictures = ("picture", "mask", "depth", "camera", "edit", "caption", "guess_depth", "baseline")
    given = [name.replace("_", "-") for name in about_pictures if getattr(arguments, name)]
    if given:
        raise InputError(f"--text-only makes an object from --prompt alone; leave out: {', '.join(given)}")


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Options of a job's settings, shared by every command that makes objects."""
    parser.add_argument(
        "--preset", default="standard", metavar="|".join(PRESETS), help="time against quality (default: standard)"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", help="auto (default), cuda, mps or cpu")
    parser.add_argument("--threads", type=int, help="processor threads; 0 (default) takes all cores")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs that share the views of each step (default: 1)")
    parser.add_argument("--guidance", metavar="|".join(GUIDANCES), help="diffusion prior (default: embedded)")
    parser.add_argument("--prompt", help="what the picture shows, for priors that read text")
    parser.add_argument("--constraint", metavar="inferred_depth|known_depth|loss")
    parser.add_argument("--texture-size", type=int, help="pixels a side")
    parser.add_argument("--faces", type=int, help="largest number of triangles")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any setting, e.g. optimize.n_steps=300"
    )


def add_generate(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("generate", help="one picture in, one textured object out")
    parser.add_argument("picture", type=Path, nargs="?", help="any picture file; left out, --prompt makes one")
    parser.add_argument(
        "--text-only", action="store_true", help="no picture at all: the object is made from --prompt alone (extra sd)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--camera", type=Path, metavar="FILE", help="JSON: c2w, intrinsics, width, height, object_center, object_size"
    )
    parser.add_argument(
        "--elevation",
        type=elevation,
        metavar="DEG|auto",
        help="height of the camera above the object's horizon (default: auto, guessed from the picture)",
    )
    parser.add_argument("--fov", type=float, metavar="DEG", help="full angle of view of the picture's larger side")
    parser.add_argument(
        "--mask", type=Path, metavar="FILE", help="white where the object is; overrides every other mask"
    )
    parser.add_argument(
        "--depth", type=Path, metavar="FILE", help="depth map of the picture (16-bit PNG, npy, npz, exr)"
    )
    parser.add_argument("--depth-kind", choices=("relative", "metric"), default="relative")
    parser.add_argument(
        "--init", type=Path, metavar="MESH", help="start from this mesh (glb, obj, ply, stl) in the camera's world"
    )
    parser.add_argument("--edit", default="", metavar="WORDS", help="change the picture first (needs the extra sd)")
    parser.add_argument(
        "--caption", action="store_true", help="describe the picture for priors that read text (extra sd)"
    )
    parser.add_argument("--guess-depth", action="store_true", help="estimate a relative depth map (extra sd)")
    parser.add_argument(
        "--baseline", metavar="|".join(BASELINES), help="work as a published system does, for comparison (extra sd)"
    )
    parser.add_argument(
        "--constrained", action="store_true", help="with --baseline: the constraint in place of its picture loss"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no notes")
    add_job_options(parser)
    parser.set_defaults(run=run_generate)


def job_from(arguments: argparse.Namespace) -> Job:
    """The job that the command line asks for; what must be made first (a picture, a caption, an edit) is made here."""
    from .pipeline import Job

    config = config_from(arguments)
    if arguments.picture is None and not arguments.prompt:
        raise InputError("give a picture, or --prompt to make one from words")
    if arguments.text_only:
        return Job(None, config, init_mesh=arguments.init, name=arguments.out.name)
    picture, depth = arguments.picture, arguments.depth
    wants_depth = depth is None and (arguments.guess_depth or arguments.baseline in NEEDS_DEPTH)
    wants_caption = arguments.caption or (not config.prompt and arguments.baseline in NEEDS_WORDS)
    if picture is None or arguments.edit or wants_caption or wants_depth:
        from .device import resolve_device
        from .files import make_folder
        from .seeding import SeedRequest, make_seed

        request = SeedRequest(picture, config.prompt, arguments.edit, wants_caption, wants_depth)
        seed = make_seed(request, config, resolve_device(config.device), make_folder(arguments.out))
        picture, depth, config = seed.picture, seed.depth or depth, replace(config, prompt=seed.prompt)
    return Job(
        picture=picture,
        config=config,
        mask=arguments.mask,
        depth=depth,
        depth_kind=arguments.depth_kind,
        camera=arguments.camera,
        init_mesh=arguments.init,
        name=arguments.out.name if arguments.picture is None else arguments.picture.stem,
    )


def run_generate(arguments: argparse.Namespace) -> int:
    from .pipeline import generate

    job = job_from(arguments)
    monitor = TerminalMonitor(arguments.quiet)
    try:
        result = generate(job, arguments.out, monitor, resume=arguments.resume)
    except Cancelled as stop:
        command = [word for word in sys.argv[1:] if word != "--resume"]
        print(f"{stop}; go on with: conrad {shlex.join([*command, '--resume'])}", file=sys.stderr)
        return STOPPED
    finally:
        monitor.close()
    metrics = result.metrics
    print(f"{result.glb}  ({metrics['n_faces']:,} faces, {metrics['seconds']:.0f} s)")
    print(f"look at {arguments.out / 'sheet.png'}")
    return 0


def add_doctor(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("doctor", help="what is installed, what is missing and what mends it")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run_doctor)


def run_doctor(arguments: argparse.Namespace) -> int:
    from .doctor import diagnose, format_report

    report = diagnose()
    print(json.dumps(report.to_json()) if arguments.json else format_report(report))
    return 0 if report.ok else 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="conrad", description="One picture in, one textured object out.")
    parser.add_argument("--version", action="version", version=f"conrad {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log to the terminal, and tracebacks of expected errors")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    add_generate(subparsers)
    evaluation_commands.add_arguments(subparsers)
    server_commands.add_arguments(subparsers)
    add_doctor(subparsers)
    return parser


def main(arguments: list[str] | None = None) -> int:
    parsed = make_parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    for handler in logging.getLogger().handlers:  # a job's own log file wants more than the terminal
        handler.setLevel(logging.INFO if parsed.verbose else logging.ERROR)
    try:
        return parsed.run(parsed)
    except ConradError as error:
        if parsed.verbose:
            logging.exception("failed")
        print(f"conrad: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return STOPPED
    except BrokenPipeError:
        return 1
