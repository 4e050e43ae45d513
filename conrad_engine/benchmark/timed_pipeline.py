"""The real pipeline, which also notes when each step ended and when each preview was rendered, for the engine's benchmark.

The times are those of the machine's monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import pipeline
from ..cameras import Camera
from ..files import write_json
from ..monitor import Command, Monitor, Progress

TIMES = "times.json"
"""In the folder of the job's files: `steps` as [step, seconds], `previews` as {c2w, began_s, rendered_s}."""

WHOLE = "whole"
"""A prompt (the embedded prior reads none) by which previews have `WHOLE_SIDE`, however long they take here."""
WHOLE_SIDE = 512

Job = pipeline.Job


class TimedMonitor(Monitor):
    """Passes everything on and notes the time."""

    def __init__(self, inner: Monitor, is_whole: bool) -> None:
        self._inner = inner
        self._is_whole = is_whole
        self._began_s = 0.0
        self.steps: list[tuple[int, float]] = []
        self.previews: list[dict] = []

    def progress(self, progress: Progress) -> None:
        if progress.stage == "optimize":
            self.steps.append((progress.step, time.monotonic()))
        self._inner.progress(progress)

    def command(self) -> Command:
        return self._inner.command()

    def preview_camera(self) -> Any | None:
        camera = self._inner.preview_camera()
        self._began_s = time.monotonic()
        return _of_whole_size(camera) if camera is not None and self._is_whole else camera

    def preview(self, rgb: Any, camera: Any) -> None:
        rendered_s = time.monotonic()
        c2w = [*camera.c2w.reshape(-1).tolist(), 0.0, 0.0, 0.0, 1.0]
        self.previews.append({"c2w": c2w, "began_s": self._began_s, "rendered_s": rendered_s})
        self._inner.preview(rgb, camera)

    def warning(self, message: str) -> None:
        self._inner.warning(message)


def _of_whole_size(camera: Camera) -> Camera:
    """The same view, square, with `WHOLE_SIDE` pixels a side."""
    intrinsics = camera.intrinsics * (WHOLE_SIDE / camera.width)
    return replace(camera, intrinsics=intrinsics, width=WHOLE_SIDE, height=WHOLE_SIDE)


def generate(job: Job, folder: Path, monitor: Monitor) -> pipeline.JobResult:
    """`pipeline.generate`; the times are written however it ends."""
    timed = TimedMonitor(monitor, job.config.prompt == WHOLE)
    try:
        return pipeline.generate(job, folder, timed)
    finally:
        write_json(folder / TIMES, {"steps": timed.steps, "previews": timed.previews})
