"""The worker's side of the line to the server: a thread that talks while the job computes."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq

from ..protocol import Progress, decode, encode
from .worker_messages import TO_WORKER, Guess, Quit, Run, WorkerBeat, WorkerHello, WorkerPreview

BEAT_EVERY_S = 1.0
PROGRESS_EVERY_S = 0.05
"""Progress is sent at most this often; the newest one replaces those in between."""


class Link:
    """Sends for the job and receives orders, in a thread of its own, so that neither waits for the other.

    Of each stage's progress and of each client's preview only the newest waits to be sent. `tasks` holds what is to be
    done; other orders are given, in the link's thread, to whom `attach` names.
    """

    def __init__(self, endpoint: str, name: str, secret: str) -> None:
        self.tasks: queue.SimpleQueue[Run | Guess] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._take: Callable[[Any], None] | None = None
        self._early: list[Any] = []
        self._messages: list[Any] = []
        self._newest: dict[Any, Any] = {}
        self._flushes: list[threading.Event] = []
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, name.encode())
        self._socket.setsockopt(zmq.PLAIN_USERNAME, b"worker")
        self._socket.setsockopt(zmq.PLAIN_PASSWORD, secret.encode())
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(endpoint)
        self._bell = self._context.socket(zmq.PAIR)
        self._bell.bind("inproc://bell")
        self._rope = self._context.socket(zmq.PAIR)
        self._rope.connect("inproc://bell")
        self._rope_lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="link", daemon=True)
        self._thread.start()

    def attach(self, take: Callable[[Any], None] | None) -> None:
        """Give orders to `take`, first those that came since the job did; None lets them wait for the next one."""
        with self._lock:
            self._take = take
            early, self._early = self._early, []
            for order in early if take is not None else ():
                take(order)

    def send(self, message: Any) -> None:
        """Send in order; nothing is dropped. What was known before it goes first."""
        with self._lock:
            self._messages += [*self._newest.values(), message]
            self._newest.clear()
        self._ring()

    def offer(self, message: Progress | WorkerPreview) -> None:
        """Send unless a newer one of the same view, or of the same stage of the job, comes before its turn."""
        key = (type(message), message.stage if isinstance(message, Progress) else message.view)
        with self._lock:
            self._newest[key] = message
        if isinstance(message, WorkerPreview):
            self._ring()

    def flush(self) -> None:
        """Wait until ZeroMQ has what was handed over so far: its own thread delivers that, whatever ours do next."""
        is_sent = threading.Event()
        with self._lock:
            self._flushes.append(is_sent)
        self._ring()
        is_sent.wait()

    def _ring(self) -> None:
        with self._rope_lock:
            try:
                self._rope.send(b"", zmq.NOBLOCK)
            except zmq.Again:
                pass  # It has been ringing for long enough to be heard.

    def _work(self) -> None:
        self._post(WorkerHello(os.getpid()))
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        beat_s = time.monotonic()
        while True:
            ready = dict(poller.poll(PROGRESS_EVERY_S * 1000))
            if self._bell in ready:
                self._bell.recv()
            if self._socket in ready:
                order = decode(self._socket.recv_multipart(), TO_WORKER)
                self._obey(order)
            with self._lock:
                messages = [*self._messages, *self._newest.values()]
                self._messages, self._newest = [], {}
                flushes, self._flushes = self._flushes, []
            if time.monotonic() - beat_s > BEAT_EVERY_S:
                beat_s = time.monotonic()
                messages.append(WorkerBeat())
            for message in messages:
                self._post(message)
            for is_sent in flushes:
                is_sent.set()

    def _obey(self, order: Any) -> None:
        if isinstance(order, Quit):
            os._exit(0)
        if isinstance(order, (Run, Guess)):
            self.tasks.put(order)
            return
        with self._lock:
            if self._take is not None:
                self._take(order)
            else:
                self._early.append(order)

    def _post(self, message: Any) -> None:
        self._socket.send_multipart(encode(message), copy=False)
