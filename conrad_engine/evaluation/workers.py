"""Runs tasks in worker processes. A worker that dies costs its own task only."""

from __future__ import annotations

import logging
import multiprocessing as mp
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

log = logging.getLogger(__name__)


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    task: Any


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    """The life of a worker: one task after another until None comes."""
    while (task := connection.recv()) is not None:
        connection.send(function(task))


def _start(function: Callable[[Any], Any], task: Any) -> _Worker:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    # Not a daemon: a job may start processes of its own.
    process = context.Process(target=_serve, args=(function, theirs))
    process.start()
    theirs.close()
    ours.send(task)
    return _Worker(process, ours, task)


def run_tasks(
    function: Callable[[Any], Any], tasks: Iterable[Any], n_workers: int, when_dead: Callable[[Any, int], Any]
) -> Iterator[Any]:
    """Yield `function(task)` of every task, in the order they finish.

    Args:
        function: At module level, so that a fresh process can import it. It must not raise.
        tasks: Each can be pickled.
        n_workers: Processes at once, each with its own memory and device context; 0 runs the tasks in this process.
        when_dead: Called with the task and exit code of a worker that died (out of memory, a crash in a library); its
            answer takes the place of the result, and a fresh worker goes on.
    """
    waiting = deque(tasks)
    if n_workers == 0:
        yield from map(function, waiting)
        return
    workers = [_start(function, waiting.popleft()) for _ in range(min(n_workers, len(waiting)))]
    try:
        while workers:
            ready = wait([worker.connection for worker in workers])
            for worker in [w for w in workers if w.connection in ready]:
                try:
                    result = worker.connection.recv()
                    is_alive = True
                except (EOFError, ConnectionError):
                    worker.process.join()
                    result = when_dead(worker.task, worker.process.exitcode or 0)
                    is_alive = False
                yield result
                if waiting and is_alive:
                    worker.task = waiting.popleft()
                    worker.connection.send(worker.task)
                    continue
                workers.remove(worker)
                if is_alive:
                    worker.connection.send(None)
                    worker.process.join()
                elif waiting:
                    workers.append(_start(function, waiting.popleft()))
    finally:
        # Reached with live workers only where the caller stops early.
        for worker in workers:
            worker.process.terminate()
            worker.process.join()
