"""The command `conrad evaluate`: its arguments and what it does. `cli.py` registers it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..errors import InputError

EPILOG = """examples:
  conrad evaluate RESULT --truth SUITE/OBJECT        score one result folder
  conrad evaluate --make-suite POOL --out SUITE      render a suite from a mesh pool
  conrad evaluate --suite SUITE --out DIR --variants constraint loss relief --workers 4
"""


def add_arguments(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `evaluate` to the command line; `run` among the parsed arguments is its handler."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score results against the truth",
        description="Score a result, or run and score a whole suite of objects with known truth.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", nargs="?", type=Path, help="result folder of `conrad generate`")
    parser.add_argument("--truth", type=Path, help="the object's folder in a suite")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    parser.add_argument("--suite", type=Path, help="suite to run and score")
    parser.add_argument("--make-suite", type=Path, metavar="POOL", help="mesh pool to render a suite from")
    parser.add_argument("--out", type=Path, help="folder for what --suite or --make-suite writes")
    parser.add_argument("--variants", nargs="+", default=["constraint"], metavar="NAME", help="what to compare")
    parser.add_argument("--preset", default="standard", help="settings before the variants' own changes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any setting, e.g. optimize.n_steps=300"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--workers", type=int, default=0, help="processes at once; 0 stays in this one")
    parser.add_argument("--limit", type=int, help="only this many objects, spread over the suite or chosen by chance")
    parser.add_argument("--split", default="val", help="split of the pool for --make-suite")
    parser.add_argument("--size", type=int, default=512, help="pixels a side of the pictures of --make-suite")
    parser.add_argument("--elevation", type=float, default=15.0, help="of the pictures of --make-suite, degrees")
    parser.add_argument("--seed", type=int, default=0, help="of --make-suite and of the jobs")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for; print the outcome.

    Returns:
        Exit code 0.

    Raises:
        InputError: The arguments do not say what to do, or name something that cannot be used.
    """
    asked = [arguments.result is not None, arguments.suite is not None, arguments.make_suite is not None]
    if sum(asked) != 1:
        raise InputError(
            "evaluate needs one of: a result folder with --truth, --suite with --out, --make-suite with --out"
        )
    if arguments.result is not None:
        return _run_result(arguments)
    if arguments.out is None:
        raise InputError("say with --out which folder the output goes to")
    return _run_make_suite(arguments) if arguments.make_suite is not None else _run_suite(arguments)


def _run_result(arguments: argparse.Namespace) -> int:
    from .evaluate import field_scores
    from .scoring import evaluate_result
    from .tables import plain_table

    if arguments.truth is None:
        raise InputError("say with --truth which object of a suite the result shows")
    row = evaluate_result(arguments.result, arguments.truth)
    row |= field_scores(row.get("pipeline"))
    if arguments.json:
        print(json.dumps(row, indent=1))
        return 0
    scalars = {key: value for key, value in row.items() if not isinstance(value, list | dict)}
    cells = [["measure", "value"], *([key, _shown(value)] for key, value in scalars.items())]
    print(plain_table([*cells, ["failures", ", ".join(row["failures"]) or "none"]]), end="")
    return 0


def _shown(value: object) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _run_make_suite(arguments: argparse.Namespace) -> int:
    from .suite import make_suite

    objects = make_suite(
        arguments.make_suite,
        arguments.out,
        split=arguments.split,
        count=arguments.limit,
        picture_size=arguments.size,
        elevation_deg=arguments.elevation,
        seed=arguments.seed,
    )
    print(f"{len(objects)} objects in {arguments.out}")
    return 0


def _run_suite(arguments: argparse.Namespace) -> int:
    from ..config import preset, with_overrides
    from .evaluate import evaluate_suite

    overrides: dict[str, object] = {"device": arguments.device, "seed": arguments.seed}
    for item in arguments.set:
        name, separator, value = item.partition("=")
        if not separator:
            raise InputError(f"--set takes NAME=VALUE, not {item!r}")
        overrides[name] = value
    if arguments.workers < 0 or (arguments.limit is not None and arguments.limit < 1):
        raise InputError("--workers must be 0 or more and --limit at least 1")

    def show(variant: str, row: dict) -> None:
        failed = f"  FAILED: {', '.join(row['failures'])}" if row["failures"] else ""
        print(
            f"{variant}  {row['object']}  PSNR {row['novel_psnr']:.2f}  {row['seconds']:.0f} s{failed}", file=sys.stderr
        )

    evaluate_suite(
        arguments.suite,
        arguments.out,
        with_overrides(preset(arguments.preset), overrides),
        tuple(arguments.variants),
        n_workers=arguments.workers,
        limit=arguments.limit,
        on_object=show,
    )
    print((arguments.out / "table.txt").read_text(encoding="utf-8"), end="")
    return 0
