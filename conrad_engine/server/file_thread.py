"""One thread for everything that may wait for a disk, so that the server's loop never does."""

from __future__ import annotations

import queue
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Any


class FileThread:
    """Does work in the order it is given; its outcome comes back in the loop that calls `deliver`."""

    def __init__(self) -> None:
        self._todo: queue.SimpleQueue = queue.SimpleQueue()
        self._done: deque = deque()
        self._pending = 0
        self.bell, self._rope = socket.socketpair()
        """Readable when `deliver` has something to do."""
        self.bell.setblocking(False)
        self._rope.setblocking(False)
        self._thread = threading.Thread(target=self._work, name="files", daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        return self._pending == 0

    def do(self, work: Callable[[], Any], then: Callable[[Any], None] | None = None) -> None:
        """Run `work` in the thread, and `then` with its result, or the error it raised, in the loop."""
        self._pending += 1
        self._todo.put((work, then))

    def deliver(self) -> None:
        """Call what waits for finished work."""
        try:
            while self.bell.recv(4096):
                pass
        except BlockingIOError:
            pass
        while self._done:
            then, outcome = self._done.popleft()
            self._pending -= 1
            if then is not None:
                then(outcome)

    def close(self) -> None:
        """Finish what is begun and end."""
        self._todo.put(None)
        self._thread.join(timeout=5)
        self.bell.close()
        self._rope.close()

    def _work(self) -> None:
        while (task := self._todo.get()) is not None:
            work, then = task
            try:
                outcome = work()
            except Exception as error:  # Whatever it is, the loop must hear of it, and the next work gets its turn.
                outcome = error
            self._done.append((then, outcome))
            try:
                self._rope.send(b"!")
            except (BlockingIOError, OSError):
                pass  # The bell is ringing already, or nobody listens any more.
