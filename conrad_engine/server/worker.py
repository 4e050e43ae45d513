"""The process that does jobs, one after the other. It is the only one of the server's that loads torch."""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import logging
import os
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

from ..errors import Cancelled, ConradError
from ..files import CANNOT_WRITE, remove_unfinished
from ..monitor import Progress
from .inputs import numbers_of, picture_file, read_inputs
from .link import Link
from .requests import pipeline_config
from .results import flat_metrics, write_result
from .steering import SteeredMonitor, turning_camera
from .store import FolderInUse, FolderLock
from .worker_messages import DONE, FAILED, STOPPED, Ended, Guess, Guessed, Run, WorkerReady
from .workers import SECRET_VARIABLE

log = logging.getLogger("conrad_engine.worker")

LOCK_LIMIT_S = 30.0
"""Time that a former worker gets to let go of a job's folder."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A worker of the engine; started by it.")
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--pipeline", required=True, help="module with Job and generate")
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    threading.Thread(target=_end_with_server, daemon=True).start()
    link = Link(parsed.endpoint, parsed.name, os.environ.pop(SECRET_VARIABLE))
    log.info("%s loads %s", parsed.name, parsed.pipeline)
    try:
        pipeline = importlib.import_module(parsed.pipeline)
        ready = _describe(pipeline, parsed.device)
    except Exception as error:  # The last line of the log is what people are shown.
        log.exception("the worker does not start")
        log.error("%s: %s", type(error).__name__, error)
        os._exit(1)
    while True:
        link.send(ready)
        task = link.tasks.get()
        link.send(guess(task, pipeline) if isinstance(task, Guess) else do_job(task, pipeline, link))
        _free_memory()
        ready = _describe(pipeline, parsed.device)


def do_job(run: Run, pipeline: ModuleType, link: Link) -> Ended:
    """Run one job; whatever goes wrong with it is told, not raised."""
    try:
        lock = _lock_job(Path(run.folder))
    except FolderInUse as error:
        return Ended(run.job, FAILED, error.code, str(error))
    try:
        return _run(run, pipeline, link)
    except Cancelled:
        return Ended(run.job, STOPPED)
    except ConradError as error:
        log.info("the job failed: %s", error)
        code = "disk_full" if CANNOT_WRITE[errno.ENOSPC] in str(error) else error.code
        return _failed(run, code, str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            log.exception("the job failed")
            return _failed(run, "internal", f"{type(error).__name__}: {error.strerror}")
        return _failed(run, "disk_full", "the engine's disk is full", "Free some space and resume the job.")
    except Exception as error:  # Only here does an exception become a message: the worker lives on for the next job.
        log.exception("the job failed")
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
            hint = "Close other programs that use it, or choose a smaller preset."
            return _failed(run, "out_of_memory", "the device has not enough memory for this job", hint)
        return _failed(run, "internal", f"{type(error).__name__}: {error}", "The log of the engine's worker says more.")
    finally:
        link.attach(None)
        lock.release()


def guess(task: Guess, pipeline: ModuleType) -> Guessed:
    """Estimate an elevation; whatever goes wrong with it is told, not raised."""
    try:
        picture = picture_file("picture", task.picture, numbers_of(task.pixels))
        mask = picture_file("mask", task.mask, numbers_of(task.mask_pixels))
        found = pipeline.elevation_of_picture(picture, mask, task.fov_deg, task.device)
        return Guessed(found.elevation_deg, found.spread_deg, found.is_sure)
    except ConradError as error:
        return Guessed(code=error.code, message=str(error)[:2000])
    except Exception as error:  # As in `do_job`.
        log.exception("the elevation could not be estimated")
        return Guessed(
            code="internal", message=f"the elevation could not be estimated: {type(error).__name__}: {error}"
        )


def _run(run: Run, pipeline: ModuleType, link: Link) -> Ended:
    folder = Path(run.folder)
    settings = {
        "preset": run.preset,
        "guidance": run.guidance,
        "prompt": run.prompt,
        "seed": run.seed,
        "texture_size": run.texture_size,
        "n_faces": run.n_faces,
        "overrides": run.overrides,
    }
    setup: dict = {}
    monitor = SteeredMonitor(run, link, lambda *view: turning_camera(setup["camera"])(*view))
    link.attach(monitor.take)
    remove_unfinished(folder / "work")
    # The server kills a worker that is here for too long; it must know before a decoder keeps the interpreter for itself.
    monitor.progress(Progress("decode", 0, 1))
    link.flush()
    setup.update(read_inputs(folder / "input"))
    monitor.progress(Progress("prepare", 0, 1))
    job = pipeline.Job(config=pipeline_config(settings, run.device), name=run.name or "object", **setup)
    result = pipeline.generate(job, folder / "work", monitor)
    metrics = flat_metrics(result.metrics)
    parts = write_result(folder, run.result, result.mesh, folder / "work", metrics)
    return Ended(run.job, DONE, result=run.result, parts=parts, metrics=metrics)


def _failed(run: Run, code: str, message: str, hint: str = "") -> Ended:
    return Ended(run.job, FAILED, code, message[:4000], hint)


def _lock_job(folder: Path) -> FolderLock:
    """The job's folder for this process alone: one that lost its server may still be about to end."""
    end_s = time.monotonic() + LOCK_LIMIT_S
    while True:
        try:
            return FolderLock(folder / "lock")
        except FolderInUse:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.1)


def _describe(pipeline: ModuleType, device: str) -> WorkerReady:
    if hasattr(pipeline, "describe_device"):
        return pipeline.describe_device(device)
    from .device_info import describe_device

    return describe_device(device)


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _end_with_server() -> None:
    """The server holds the other end of our standard input: when it ends, however it ends, so do we, at once."""
    while os.read(0, 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
