"""The engine's loop: frames in, frames out. It computes nothing, waits for no disk, and never imports torch."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq

from .. import __version__
from ..protocol import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Error,
    Hello,
    ProtocolError,
    VersionMismatch,
    Welcome,
    decode,
    encode,
    which_side_to_update,
)
from .clients import Clients
from .dispatch import Dispatch
from .file_thread import FileThread
from .gate import Gate
from .process import is_alive
from .store import Store
from .worker_messages import FROM_WORKER
from .workers import Workers

log = logging.getLogger("conrad.server")

CAPABILITIES = (
    *("preview_camera", "pause", "keep", "extract", "continue", "init_mesh", "depth", "free_memory"),
    "guess_elevation",
)
TICK_S = 0.1
BURST = 64
"""Messages read from one socket before the others get their turn."""
SHUTDOWN_LIMIT_S = 5.0
"""Time that jobs get at the end to save their checkpoint."""
SAVE_PROGRESS_S = 5.0
CHECKPOINT_DATABASE_S = 30.0


@dataclass(frozen=True)
class Life:
    """When the engine ends by itself."""

    parent_pid: int | None = None
    """End when this process is gone."""
    idle_timeout_s: float | None = None
    """End after this long without clients and work."""


class Server:
    """One engine on one data folder; `run` returns when it is over.

    Args:
        store: The data folder.
        gate: Decides who may connect; it already protects both sockets.
        clients_socket, workers_socket: Bound ROUTER sockets.
        make_workers: Makes the workers, given how to send to them.
        life: When to end.
    """

    def __init__(
        self,
        store: Store,
        gate: Gate,
        clients_socket: zmq.Socket,
        workers_socket: zmq.Socket,
        make_workers: Callable[[Callable[[bytes, Any], bool]], Workers],
        life: Life,
    ) -> None:
        self._store = store
        self._gate = gate
        self._clients_socket, self._workers_socket = clients_socket, workers_socket
        self._files = FileThread()
        self._clients = Clients(lambda route, message: post(clients_socket, route, message))
        self._workers = make_workers(lambda route, message: post(workers_socket, route, message))
        self._dispatch = Dispatch(store, self._files, self._clients, self._workers, self.stop)
        self._life = life
        self._told_status: Any = None
        self._busy_s = self._ticked_s = self._progress_s = self._database_s = time.monotonic()
        self._closing_s: float | None = None

    def run(self) -> None:
        """Serve until told to stop, or until `Life` says so."""
        poller = zmq.Poller()
        for socket in (self._gate.socket, self._clients_socket, self._workers_socket, self._files.bell):
            poller.register(socket, zmq.POLLIN)
        while not self._is_over():
            poller.poll(TICK_S * 1000)
            self._gate.answer()
            self._files.deliver()
            _drain(self._clients_socket, self._on_client_frames)
            _drain(self._workers_socket, self._on_worker_frames)
            if time.monotonic() - self._ticked_s >= TICK_S:
                self._tick()
            if self._closing_s is None:
                self._dispatch.schedule()
        self._workers.close()
        self._files.close()

    def stop(self) -> None:
        """End soon: jobs at work save their state and go on at the next start."""
        if self._closing_s is None:
            log.info("the engine ends")
            self._closing_s = time.monotonic()
            self._workers.stop_jobs()

    def _is_over(self) -> bool:
        if self._closing_s is None:
            return False
        is_at_work = self._workers.are_at_work or not self._files.is_idle
        return not is_at_work or time.monotonic() - self._closing_s > SHUTDOWN_LIMIT_S

    def _on_client_frames(self, route: bytes, frames: list[memoryview]) -> None:
        job, request = "", 0
        try:
            message = decode(frames)
            job, request = getattr(message, "job", ""), message.request
            client = self._clients.get(route)
            if isinstance(message, Hello):
                self._greet(route, message)
            elif client is None:
                self._answer(route, Error("hello", "say hello first", job, request))
            else:
                client.heard_s = time.monotonic()
                self._dispatch.on_request(client, message)
        except VersionMismatch as error:
            hint = which_side_to_update(engine=PROTOCOL_VERSION, client=error.theirs)
            self._answer(route, Error(error.code, hint))
        except ProtocolError as error:
            self._answer(route, Error(error.code, str(error)[:2000]))
        except Exception:  # A mistake of ours in one request must not take the engine from everyone else.
            log.exception("a request failed")
            self._answer(route, Error("internal", "the engine made a mistake; its log says more", job, request))

    def _answer(self, route: bytes, error: Error) -> None:
        if self._clients.get(route) is not None:
            self._clients.tell(route, error)
        else:
            post(self._clients_socket, route, error)

    def _greet(self, route: bytes, hello: Hello) -> None:
        former = self._clients.get(route)
        if former is not None:
            self._dispatch.forget_client(former)
        client = self._clients.greet(route, hello.client[:100], time.monotonic())
        log.info("client %d is %r", client.number, client.name)
        client.tell(Welcome(__version__, os.getpid(), CAPABILITIES, hello.request))
        client.tell(self._dispatch.status())
        self._dispatch.list_jobs(client)

    def _on_worker_frames(self, route: bytes, frames: list[memoryview]) -> None:
        worker = self._workers.by_route(route)
        if worker is None:
            return  # A process that was given up.
        try:
            message = decode(frames, FROM_WORKER)
        except ProtocolError as error:
            log.error("worker %d sent something unreadable: %s", worker.number, error)
            return
        worker.heard_s = time.monotonic()
        self._dispatch.on_worker(worker, message)

    def _tick(self) -> None:
        now_s = self._ticked_s = time.monotonic()
        for lost in self._workers.poll(may_start=self._closing_s is None):
            if self._closing_s is None:
                self._dispatch.on_lost(lost)
        for client in self._clients.sweep(now_s):
            log.info("client %d is gone", client.number)
            self._dispatch.forget_client(client)
        self._dispatch.save_again()
        status = self._dispatch.status()
        if status != self._told_status:
            self._told_status = status
            self._clients.tell_all(status)
        if now_s - self._progress_s > SAVE_PROGRESS_S:
            self._progress_s = now_s
            self._dispatch.save_progress()
        if now_s - self._database_s > CHECKPOINT_DATABASE_S:
            self._database_s = now_s
            self._files.do(self._store.checkpoint_database)
        self._look_whether_to_end(now_s)

    def _look_whether_to_end(self, now_s: float) -> None:
        if len(self._clients) or not self._dispatch.is_idle:
            self._busy_s = now_s
        if self._life.idle_timeout_s is not None and now_s - self._busy_s > self._life.idle_timeout_s:
            self.stop()
        if self._life.parent_pid is not None and not is_alive(self._life.parent_pid):
            self.stop()


def make_router(context: zmq.Context) -> zmq.Socket:
    """A ROUTER that tells when a message cannot leave, and takes no oversized ones."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    # Few messages of up to that size wait in memory for each peer; the rest waits at the peer's own end.
    socket.setsockopt(zmq.RCVHWM, 64)
    # A peer whose machine is gone without a word is found out, and its memory given back.
    socket.setsockopt(zmq.HEARTBEAT_IVL, 5_000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 30_000)
    return socket


def post(socket: zmq.Socket, route: bytes, message: Any) -> bool:
    """Hand a message to ZeroMQ. False when there is no room for it now; a peer that is gone counts as told."""
    try:
        socket.send_multipart([route, *encode(message)], zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return False
    except zmq.ZMQError as error:
        if error.errno != zmq.EHOSTUNREACH:
            raise
    except ProtocolError as error:
        log.error("a message cannot be sent: %s", error)
    return True


def _drain(socket: zmq.Socket, take: Callable[[bytes, list[memoryview]], None]) -> None:
    for _ in range(BURST):
        try:
            route, *frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return
        take(route.bytes, [frame.buffer for frame in frames])
