"""A whole job in a process of its own: time from cold start to the GLB and to the last file, its parts, and its peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import ConradError
from .checkpoints import write_stable_diffusion, write_zero123
from .report import Report, Row

GIB = 2**30
_PRELUDE = """
import resource, sys
cap, device = float(sys.argv[1]), sys.argv[2]
if cap and device == "cuda":
    import torch
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2**30 / total))
elif cap:
    resource.setrlimit(resource.RLIMIT_DATA, (int(cap * 2**30),) * 2)
from conrad_engine.cli import main
sys.exit(main(sys.argv[3:]))
"""
"""Sets a hard memory cap, in which an allocation beyond it fails, and hands over to the command line."""


@dataclass(frozen=True)
class JobFigures:
    """What one job took."""

    wall_s: float
    parts_s: dict[str, float]
    """By stage, as the job itself reports them; what is missing to `wall_s` is the start of Python and torch."""
    resident_gib: float
    """Peak resident memory of the process."""
    device_gib: float
    """Peak memory of the job's own tensors on the GPU; 0 on a CPU."""
    error: str = ""
    glb_s: float = 0.0
    """From the start of the process to the written GLB."""
    finish_s: dict[str, float] = field(default_factory=dict)
    """By part of the last stage, `finish`."""
    n_steps: int = 0
    """Steps of the stage `optimize`."""


def run_job(
    picture: Path, preset: str, device: str, n_threads: int, cap_gib: float = 0.0, options: tuple[str, ...] = ()
) -> JobFigures:
    """Generate one object in a fresh process.

    Args:
        picture: What to make an object of.
        preset: Name of the preset.
        device: cuda or cpu.
        n_threads: Processor threads.
        cap_gib: Hard cap of memory, of the GPU or of the process's data; 0 is none.
        options: Further ones of `conrad generate`.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out", Path(folder) / "log"
        command = [sys.executable, "-c", _PRELUDE, str(cap_gib), device, "generate", str(picture), "--out", str(out)]
        command += ["--preset", preset, "--device", device, "--threads", str(n_threads), "--quiet", *options]
        started, started_at = time.perf_counter(), time.time()
        with open(log, "wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        resident_gib = usage.ru_maxrss * 1024 / GIB
        metrics_path = out / "metrics.json"
        if process.returncode != 0 or not metrics_path.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {process.returncode}"
            return JobFigures(wall_s, {}, resident_gib, 0.0, reason)
        metrics = json.loads(metrics_path.read_text(encoding="utf-8"))
        on_device = metrics["memory_bytes"] / GIB if device == "cuda" else 0.0
        return JobFigures(
            wall_s,
            metrics["seconds_by_stage"],
            resident_gib,
            on_device,
            glb_s=(out / "mesh.glb").stat().st_mtime - started_at,
            finish_s=metrics.get("seconds_of_finish", {}),
            n_steps=metrics["steps"],
        )


def drawn_picture(path: Path, size: int = 512) -> Path:
    """A picture with alpha to run jobs on when none is given: a striped body with two arms of different color."""
    v, u = (np.mgrid[:size, :size] + 0.5) / size
    rgba = np.zeros((size, size, 4), np.uint8)
    body = np.hypot((u - 0.5) / 0.2, (v - 0.5) / 0.38) < 1
    for mask, color in (
        ((u > 0.14) & (u < 0.5) & (np.abs(v - 0.42) < 0.06), (200, 40, 40)),
        ((u > 0.5) & (u < 0.86) & (np.abs(v - 0.55) < 0.06), (40, 60, 200)),
        (body, (60, 160, 80)),
        (body & (np.sin(v * 50) > 0), (230, 210, 90)),
    ):
        rgba[mask] = (*color, 255)
    Image.fromarray(rgba).save(path)
    return path


def run(report: Report, presets: list[str], picture: Path | None) -> None:
    """Wall times by preset, cold start included."""
    report.begin(
        "asset", "a fresh process, cold start included: seconds to the last file (wall) and to the written GLB"
    )
    with tempfile.TemporaryDirectory() as folder:
        picture = picture or drawn_picture(Path(folder) / "figure.png")
        for preset in presets:
            figures = run_job(picture, preset, report.device.type, torch.get_num_threads())
            report.add(job_row(f"preset {preset}, {picture.name}", figures))


@dataclass(frozen=True)
class LatentJob:
    """A job as long as its kind of model needs."""

    name: str
    guidance: str
    n_steps: int
    n_views: int
    write: Callable[[Path, torch.device, bool], Path]
    settings: dict[str, object] = field(default_factory=dict)


LATENT_JOBS = (
    LatentJob("Zero123", "zero123", 600, 4, write_zero123),
    # As in `steps`: DreamFusion's step, which knows no Perp-Neg.
    LatentJob(
        "SD 2.1 without Perp-Neg",
        "stable_diffusion",
        5000,
        1,
        write_stable_diffusion,
        settings={"guidance.perp_neg": False},
    ),
)


FULL_FIELD = {"field.kind": "hash_grid", "field.encoder": "auto", "render.n_samples": 128}
"""As latent priors are used with."""
RANDOM_STRENGTH = 0.01
"""Of the gradient of random weights, so that the object stays one."""
N_CACHING_STEPS = 20
"""Steps of a job that is run only to fill the caches of compilers; a step is compiled and captured in the first few."""


def run_latent(report: Report, picture: Path | None) -> None:
    """The same for latent priors of the published sizes, read from disk; the files are in the system's cache by then, and a
    short job, which has its own row, has filled the caches of compilers.

    No network is compiled: even from a full cache that takes 12 s in every process, and 5,000 steps save less.
    """
    report.begin(
        "asset, latent priors",
        "wall seconds as above; hash grid, 64 px views x 128 samples, random weights of the published sizes (their gradient "
        "counts a hundredth, so that the object stays one)",
    )
    with tempfile.TemporaryDirectory() as folder:
        picture = picture or drawn_picture(Path(folder) / "figure.png")
        for job in LATENT_JOBS:
            n_steps = 4 if report.is_small else job.n_steps
            try:
                model = job.write(Path(folder) / job.guidance, report.device, report.is_small)
            except (ConradError, ImportError, OSError) as error:
                report.add(Row(job.name, error=str(error)))
                continue
            settings = {
                "guidance.model": model,
                "guidance.strength": RANDOM_STRENGTH,
                "optimize.n_views": job.n_views,
                **job.settings,
            }
            if not report.is_small:
                settings |= FULL_FIELD
            options = ["--guidance", job.guidance, "--prompt", "a figure"]
            for key, value in settings.items():
                options += ["--set", f"{key}={value}"]
            preset = "draft" if report.is_small else "standard"
            device, n_threads = report.device.type, torch.get_num_threads()
            for n in [min(n_steps, N_CACHING_STEPS), n_steps]:
                figures = run_job(
                    picture, preset, device, n_threads, options=(*options, "--set", f"optimize.n_steps={n}")
                )
                report.add(job_row(f"{job.name}, {n} steps, {job.n_views} views", figures))


def job_row(name: str, figures: JobFigures) -> Row:
    if figures.error:
        return Row(name, error=figures.error[:200])
    notes = {"wall s": figures.wall_s, "picture to GLB s": figures.glb_s}
    notes |= {f"{part} s": seconds for part, seconds in figures.parts_s.items()}
    notes |= {f"finish: {part} s": seconds for part, seconds in figures.finish_s.items()}
    if figures.parts_s.get("optimize") and figures.n_steps:
        notes["optimize: steps/s"] = figures.n_steps / figures.parts_s["optimize"]
    notes["start s"] = round(figures.wall_s - sum(figures.parts_s.values()), 2)
    notes["process GiB"] = figures.resident_gib
    if figures.device_gib:
        notes["GPU GiB"] = figures.device_gib
    return Row(name, notes=notes)


def run_capped(report: Report, presets: list[str], picture: Path | None, caps_gib: list[float]) -> None:
    """Whether jobs finish under hard memory caps."""
    where = "the GPU's memory" if report.device.type == "cuda" else "the process's data"
    report.begin("memory, whole jobs", f"presets with a hard cap on {where} (an allocation beyond it fails)")
    with tempfile.TemporaryDirectory() as folder:
        picture = picture or drawn_picture(Path(folder) / "figure.png")
        for preset in presets:
            for cap in caps_gib:
                figures = run_job(picture, preset, report.device.type, torch.get_num_threads(), cap)
                report.add(job_row(f"preset {preset}, cap {cap:g} GiB", figures))
