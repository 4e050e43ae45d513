"""Steps of a job whose views several GPUs share, beside the same job on one of them; on a CPU, processes."""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..config import preset, with_overrides
from ..errors import Cancelled, ConradError
from ..monitor import Command, Monitor, Progress
from .assets import FULL_FIELD, LATENT_JOBS, RANDOM_STRENGTH, drawn_picture
from .report import Report, Row

N_VIEWS = 4
N_FIRST, N_TIMED = 50, 300
"""Steps of distillation before the clock starts, a multiple of those after which the host looks; steps on the clock."""


@dataclass
class Stopwatch(Monitor):
    """Times the steps after `first` up to `last`, and ends the job there."""

    first: int
    last: int
    started_s: float = 0.0
    seconds: float = 0.0

    def progress(self, progress: Progress) -> None:
        if progress.stage != "optimize":
            return
        if progress.step == self.first:
            self.started_s = time.perf_counter()
        elif progress.step == self.last:
            self.seconds = time.perf_counter() - self.started_s

    def command(self) -> Command:
        return Command.CANCEL if self.seconds else Command.RUN


def timed_steps(picture: Path, folder: Path, settings: dict[str, object], n_timed: int) -> float:
    """Seconds a step of a job in this process.

    Raises:
        ConradError: The job cannot be run.
    """
    from ..pipeline import Job, generate

    n_first = min(N_FIRST, n_timed)
    config = with_overrides(preset("standard"), settings)
    n_warm = config.optimize.warm_start_steps
    config = with_overrides(config, {"optimize.n_steps": n_first + n_timed + 1})
    watch = Stopwatch(n_warm + n_first, n_warm + n_first + n_timed)
    with suppress(Cancelled):
        generate(Job(picture, config), folder, watch, resume=False)
    return watch.seconds / n_timed


def run(report: Report, n_gpus: int) -> None:
    """Milliseconds a step, of the embedded prior and of Zero123's size, with as many views as `N_VIEWS`."""
    report.begin(
        "shared",
        f"{N_VIEWS} views a step in a whole job's loop: one GPU beside {n_gpus}, which exchange gradients (wall clock)",
    )
    common = {"device": report.device.type, "optimize.n_views": N_VIEWS}
    n_timed = N_TIMED
    if report.is_small:
        n_timed = 10
        common |= {"optimize.warm_start_views": 2, "optimize.warm_start_sampling": 2, "optimize.warm_start_steps": 10}
    with tempfile.TemporaryDirectory() as folder:
        picture = drawn_picture(Path(folder) / "figure.png")
        jobs = {"embedded prior": common}
        if not report.is_small:
            zero123 = LATENT_JOBS[0]
            model = zero123.write(Path(folder) / "zero123", report.device, False)
            named = {"guidance": zero123.guidance, "guidance.model": str(model), "guidance.strength": RANDOM_STRENGTH}
            jobs["Zero123"] = common | FULL_FIELD | named
        for name, settings in jobs.items():
            alone_s = 0.0
            for count in (1, n_gpus):
                row = f"{name}, {count} {report.device.type}"
                try:
                    out = Path(folder) / f"{name} {count}"
                    seconds = timed_steps(picture, out, settings | {"optimize.n_gpus": count}, n_timed)
                except ConradError as error:
                    report.add(Row(row, error=str(error)))
                    continue
                alone_s = alone_s or seconds
                notes = {"ms a step": 1000 * seconds, "steps/s": 1 / seconds, "x one": alone_s / seconds}
                report.add(Row(row, notes=notes))
