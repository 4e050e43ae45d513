"""Worker processes. Light imports only: every worker imports this file."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from conrad_engine.evaluation.workers import run_tasks


def square_or_die(number: int) -> int:
    if number == 3:
        os._exit(7)
    return number**2


@pytest.mark.parametrize("n_workers", [1, 3])
def test_a_dead_worker_costs_its_own_task_only(n_workers: int) -> None:
    results = sorted(run_tasks(square_or_die, range(6), n_workers, lambda task, code: -code * task))
    assert results == [-21, 0, 1, 4, 16, 25]


def test_tasks_run_here_without_workers() -> None:
    here = os.getpid()
    assert list(run_tasks(lambda task: (task, os.getpid()), [1, 2], 0, None)) == [(1, here), (2, here)]
    assert list(run_tasks(square_or_die, [], 2, None)) == []


def test_stopping_early_ends_the_workers() -> None:
    results = run_tasks(slow, [0.0, 60.0, 60.0], 2, lambda task, code: None)
    assert next(results) == 0.0
    results.close()
    assert not multiprocessing.active_children()


def slow(seconds: float) -> float:
    time.sleep(seconds)
    return seconds
