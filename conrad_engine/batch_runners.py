"""Where the tasks of a batch run: processes of this machine, one for each device, or actors of a Ray cluster."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from .batch import Outcome, Runner, Task, run_task
from .errors import InputError, MissingDependency

SCAN_EVERY_S = 5.0
"""Between two looks for machines that have joined the cluster."""


def make_runner(ray_address: str | None, devices: str, pipeline: str, out: Path, time_limit_s: float | None) -> Runner:
    """The cluster if an address is given, else this machine.

    Raises:
        MissingDependency: Ray is not installed.
        InputError: The cluster or a device cannot be used.
    """
    if ray_address is not None:
        return RayRunner(ray_address, pipeline, time_limit_s)
    names = devices.split(",") if devices != "auto" else _all_devices()
    return LocalRunner(names, pipeline, out / ".work", time_limit_s)


def _all_devices() -> list[str]:
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["auto"]


@dataclass
class _Worker:
    """A process of this machine, and the task it has."""

    device: str
    process: Any
    pipe: connection.Connection
    task: str | None = None
    started_s: float = 0.0


class LocalRunner:
    """One process for each device; one that dies is replaced."""

    def __init__(self, devices: list[str], pipeline: str, work: Path, time_limit_s: float | None) -> None:
        self._pipeline = pipeline
        self._work = work
        self._time_limit_s = time_limit_s
        self._context = multiprocessing.get_context("spawn")
        self._workers = [self._started(device) for device in devices]

    def n_free(self) -> int:
        return sum(worker.task is None for worker in self._workers)

    def start(self, task: Task) -> None:
        worker = next(worker for worker in self._workers if worker.task is None)
        worker.task, worker.started_s = task.name, time.monotonic()
        try:
            worker.pipe.send(task)
        except (BrokenPipeError, ConnectionResetError):
            pass  # `wait` finds it dead and says so.

    def wait(self, timeout_s: float) -> list[Outcome]:
        connection.wait([worker.pipe for worker in self._workers], timeout_s)
        outcomes = [self._look_at(index) for index in range(len(self._workers))]
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()

    def _started(self, device: str) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, device, self._pipeline, self._work), daemon=True)
        process.start()
        theirs.close()
        return _Worker(device, process, ours)

    def _look_at(self, index: int) -> Outcome | None:
        worker = self._workers[index]
        try:
            if worker.pipe.poll():
                outcome = worker.pipe.recv()
                worker.task = None
                return outcome
        except (EOFError, OSError):
            return self._replaced(index, "lost", "the process that worked on it has died", is_lost=True)
        seconds = time.monotonic() - worker.started_s
        if worker.task is not None and self._time_limit_s and seconds > self._time_limit_s:
            return self._replaced(index, "timeout", f"it took longer than {self._time_limit_s:g} s", is_lost=False)
        return None

    def _replaced(self, index: int, code: str, message: str, is_lost: bool) -> Outcome | None:
        worker = self._workers[index]
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        self._workers[index] = self._started(worker.device)
        if worker.task is None:
            return None
        seconds = time.monotonic() - worker.started_s
        return Outcome(worker.task, seconds=seconds, where=worker.device, code=code, message=message, is_lost=is_lost)


def _work(pipe: connection.Connection, device: str, pipeline_name: str, work: Path) -> None:
    """The life of a local process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends us.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipeline = importlib.import_module(pipeline_name)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(run_task(task, device, pipeline, work / task.name, device))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(0)


@dataclass
class _Actor:
    """An actor on a node of the cluster, and the task it has."""

    node: str
    host: str
    handle: Any
    task: str | None = None
    reference: Any = None
    started_s: float = 0.0


class RayRunner:
    """One actor for each GPU of the cluster, or for each machine if there is no GPU; results come back as bytes."""

    def __init__(self, address: str, pipeline: str, time_limit_s: float | None) -> None:
        try:
            import ray
        except ImportError:
            raise MissingDependency("--ray needs Ray: pip install 'conrad-engine[cluster]'") from None
        self._ray = ray
        self._pipeline = pipeline
        self._time_limit_s = time_limit_s
        self._actors: list[_Actor] = []
        self._is_owner = not ray.is_initialized()
        if self._is_owner:
            try:
                ray.init(address=address, log_to_driver=False, logging_level="WARNING")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise InputError(f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}") from None
        self._scanned_s = 0.0
        self._scan()
        if not self._actors:
            raise InputError("the Ray cluster has no machine with a processor or GPU to spare")

    def n_free(self) -> int:
        self._scan()
        return sum(actor.task is None for actor in self._actors)

    def start(self, task: Task) -> None:
        actor = next(actor for actor in self._actors if actor.task is None)
        actor.task, actor.started_s = task.name, time.monotonic()
        actor.reference = actor.handle.run.remote(task)

    def wait(self, timeout_s: float) -> list[Outcome]:
        at_work = [actor for actor in self._actors if actor.task is not None]
        if not at_work:
            time.sleep(min(timeout_s, 0.2))
            return []
        ready, _ = self._ray.wait([actor.reference for actor in at_work], num_returns=1, timeout=timeout_s)
        outcomes = [self._taken(actor) for actor in at_work if actor.reference in ready]
        for actor in at_work:
            is_late = self._time_limit_s and time.monotonic() - actor.started_s > self._time_limit_s
            if actor.task is not None and is_late:
                outcomes.append(self._lost(actor, "timeout", f"it took longer than {self._time_limit_s:g} s", False))
        return outcomes

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor.handle)
        if self._is_owner:
            self._ray.shutdown()

    def _taken(self, actor: _Actor) -> Outcome:
        """The outcome of an actor that has one, or the news of its death."""
        try:
            outcome = self._ray.get(actor.reference)
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError):
            return self._lost(actor, "lost", f"the machine {actor.host} or its process was lost", True)
        except self._ray.exceptions.RayError as error:
            # Such as a machine where the engine is not installed.
            return self._lost(actor, "cluster", f"{actor.host}: {str(error).splitlines()[-1]}"[:1000], True)
        actor.task = actor.reference = None
        return outcome

    def _lost(self, actor: _Actor, code: str, message: str, is_lost: bool) -> Outcome:
        self._actors.remove(actor)
        self._ray.kill(actor.handle)
        self._scanned_s = 0.0
        assert actor.task is not None
        seconds = time.monotonic() - actor.started_s
        return Outcome(actor.task, seconds=seconds, where=actor.host, code=code, message=message, is_lost=is_lost)

    def _scan(self) -> None:
        """Have an actor in every place of every living machine."""
        if time.monotonic() - self._scanned_s < SCAN_EVERY_S:
            return
        self._scanned_s = time.monotonic()
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        has_gpus = any(node["Resources"].get("GPU", 0) >= 1 for node in nodes)
        alive = {node["NodeID"] for node in nodes}
        self._actors = [actor for actor in self._actors if actor.task is not None or actor.node in alive]
        for node in nodes:
            places = int(node["Resources"].get("GPU", 0)) if has_gpus else int(node["Resources"].get("CPU", 0) >= 1)
            taken = sum(actor.node == node["NodeID"] for actor in self._actors)
            for _ in range(places - taken):
                self._actors.append(self._made(node, has_gpus))

    def _made(self, node: dict, has_gpu: bool) -> _Actor:
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        made = self._ray.remote(BatchActor).options(
            num_gpus=1 if has_gpu else 0, num_cpus=0 if has_gpu else 1, max_restarts=0, scheduling_strategy=strategy
        )
        host = node.get("NodeManagerHostname") or node["NodeManagerAddress"]
        return _Actor(node["NodeID"], host, made.remote(self._pipeline, f"{host} ({node['NodeID'][:6]})"))


class BatchActor:
    """Lives on a machine of the cluster and does one task at a time."""

    def __init__(self, pipeline: str, where: str) -> None:
        self._pipeline = importlib.import_module(pipeline)
        self._where = where

    def run(self, task: Task) -> Outcome:
        # Ray shows an actor its own GPU only, so "auto" is the right one.
        with tempfile.TemporaryDirectory(prefix="conrad-") as folder:
            return run_task(task, "auto", self._pipeline, Path(folder) / "work", self._where)
