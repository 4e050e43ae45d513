"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ..device import resolve_device, set_threads
from ..errors import ConradError
from . import assets, engine, fields, guidance, memory, shared, steps
from .ceilings import Ceilings, measure_ceilings
from .report import Report

SECTIONS = ("field", "guidance", "step", "asset", "memory", "server", "shared")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conrad_engine.benchmark",
        description="Speed and memory, measured on this machine beside its floors. Networks of the latent models have "
        "random weights of the published sizes.",
    )
    parser.add_argument("sections", nargs="+", choices=SECTIONS, metavar="|".join(SECTIONS))
    parser.add_argument("--device", default="auto", help="auto (default), cuda, mps or cpu")
    parser.add_argument("--threads", type=int, default=0, help="processor threads; 0 (default) takes all cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.add_argument(
        "--compile", action="store_true", help="guidance and step: also time compiled networks (takes minutes)"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes: tests the benchmark, not the machine")
    parser.add_argument("--budget", type=float, default=3.0, metavar="S", help="seconds a measurement (default: 3)")
    parser.add_argument("--preset", action="append", help="asset and memory: preset to run; may be repeated")
    parser.add_argument("--picture", type=Path, help="asset and memory: the picture; a drawn one if none is given")
    parser.add_argument(
        "--latent", action="store_true", help="asset: also Zero123 and SD 2.1 (writes 5 GB for a while)"
    )
    parser.add_argument("--gpus", type=int, default=2, metavar="N", help="shared: GPUs that share a step (default: 2)")
    parser.add_argument("--cap", action="append", type=float, metavar="GIB", help="memory: hard cap; may be repeated")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parsed = make_parser().parse_args(arguments)
    try:
        device = resolve_device(parsed.device)
        set_threads(parsed.threads)
        report = Report(device, parsed.small, parsed.budget)
        print("  ".join(f"{key} {value}" for key, value in report.machine.items()))
        needs_ceilings = any(section in ("field", "guidance", "step") for section in parsed.sections)
        ceilings = measure_ceilings(report) if needs_ceilings else None
        for section in parsed.sections:
            _run(section, report, ceilings, parsed)
            if parsed.json is not None:
                report.write(parsed.json)
    except ConradError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    return 0


def _run(section: str, report: Report, ceilings: Ceilings | None, parsed: argparse.Namespace) -> None:
    on_gpu = report.device.type == "cuda"
    presets = parsed.preset or (["draft", "standard"] if on_gpu else ["draft"])
    match section:
        case "field":
            fields.run(report, ceilings)
        case "guidance":
            guidance.run(report, ceilings, parsed.compile)
        case "step":
            steps.run(report, ceilings, parsed.compile)
        case "asset":
            assets.run(report, presets, parsed.picture)
            if parsed.latent:
                assets.run_latent(report, parsed.picture)
        case "memory":
            memory.run(report)
            assets.run_capped(report, presets, parsed.picture, parsed.cap or ([2.0] if on_gpu else [4.0]))
        case "server":
            engine.run(report)
        case "shared":
            shared.run(report, parsed.gpus)
    if on_gpu:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
