"""Work that Blender does not wait for. No bpy.

`in_thread` calls a function in a thread. Longer work is a generator of `Steps`: it does itself what only Blender's main
thread may do, and yields what any thread may; `go_on` takes it from one to the next, a tick each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any

Steps = Generator[Callable[[], Any], Any, Any]

_running: list[tuple[Steps, Future]] = []
wake: Callable[[], object] = int
"""Has the timer running; set by whoever owns it."""


def in_thread(function: Callable[[], Any]) -> Future:
    """Call a function in a thread of its own, which does not keep Blender from quitting."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def finish(steps: Steps) -> Any:
    """Go through all steps now; returns what they return. What fails in one is theirs, as in a thread."""
    try:
        work = next(steps)
        while True:
            try:
                done = work()
            except Exception as error:
                work = steps.throw(error)
            else:
                work = steps.send(done)
    except StopIteration as end:
        return end.value


def start(steps: Steps) -> None:
    """Go through steps at the ticks to come; the first one begins now."""
    _advance(steps, None)
    wake()


def go_on() -> bool:
    """Take every work whose thread is done to its next step; true while there is work."""
    for steps, future in [entry for entry in _running if entry[1].done()]:
        _running.remove((steps, future))
        _advance(steps, future)
    return bool(_running)


def clear() -> None:
    """Forget all work: the add-on is switched off."""
    _running.clear()


def _advance(steps: Steps, done: Future | None) -> None:
    try:
        if done is None:
            work = next(steps)
        elif done.exception() is not None:
            work = steps.throw(done.exception())
        else:
            work = steps.send(done.result())
    except StopIteration:
        return
    _running.append((steps, in_thread(work)))
