"""The client side: one object, one thread, never blocking unless asked to. Standard library + pyzmq."""

from __future__ import annotations

import dataclasses
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from .codec import decode, encode
from .connection import Connection, CurveKeys
from .errors import EngineUnavailable, ProtocolError, RequestRefused, VersionMismatch, which_side_to_update
from .messages import (
    ARRAYS,
    FINAL_STATES,
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Ack,
    ElevationGuess,
    Error,
    Fetch,
    Forgotten,
    GuessElevation,
    Hello,
    JobState,
    Listed,
    ListJobs,
    Ping,
    Preview,
    Progress,
    Result,
    ResultFile,
    Status,
    Welcome,
)

PING_EVERY_S = 1.0
SILENCE_S = 5.0
"""An engine that has not answered for this long counts as not responding."""

CONNECTING, READY, NOT_RESPONDING, REFUSED, CLOSED = "connecting", "ready", "not_responding", "refused", "closed"

_REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


def new_job_id() -> str:
    """A name for a job that no other job has."""
    return uuid.uuid4().hex


class EngineClient:
    """A connection to an engine.

    Call `poll()` often (from a timer, say): it keeps the connection alive and returns what has come in. `send()` returns
    at once. Requests wait until the engine answers hello and are sent again after the connection was lost, until they
    are answered. Not for use from several threads.

    Args:
        endpoint: Such as tcp://127.0.0.1:50123.
        token: The secret of a loopback engine.
        keys: Instead of a token, for an engine on another machine.
        name: Shown in the engine's log.
    """

    def __init__(self, endpoint: str, token: str = "", keys: CurveKeys | None = None, name: str = "") -> None:
        self.jobs: dict[str, JobState] = {}
        """The newest state of every job the engine knows."""
        self.welcome: Welcome | None = None
        self.status: Status | None = None
        self._name = name
        self._inbox: deque[Any] = deque()
        self._unanswered: dict[int, Any] = {}
        self._listed: set[str] | None = None
        self._next_request = 1
        self._is_welcome = self._is_refused = False
        self._heard_s = self._pinged_s = time.monotonic()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._secure(token, keys)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        self._monitor = self._socket.get_monitor_socket(_REFUSALS)
        # Sockets first, then their context, also when nobody calls `close`: in the other order the process would hang.
        self._let_go = weakref.finalize(self, _let_go, self._socket, self._monitor, self._context)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise EngineUnavailable(f"{endpoint!r} is no address of an engine: {error}") from None
        self._post(Hello(name))

    @classmethod
    def from_connection_file(cls, path: Path, name: str = "") -> EngineClient:
        """A client of the engine that wrote this file.

        Raises:
            EngineUnavailable: No engine is announced there.
        """
        connection = Connection.read(path)
        return cls(connection.endpoint, connection.token, name=name)

    @property
    def state(self) -> str:
        """connecting, ready, not_responding, refused or closed."""
        if self._is_closed or self._is_refused:
            return CLOSED if self._is_closed else REFUSED
        if self.welcome is None:
            return CONNECTING
        return READY if self._is_welcome and self.silence_s < SILENCE_S else NOT_RESPONDING

    @property
    def silence_s(self) -> float:
        """Seconds since the engine was heard."""
        return time.monotonic() - self._heard_s

    def send(self, request: Any) -> int:
        """Send any request and return the number that its answer will carry.

        Raises:
            ProtocolError: The request is outside the protocol's bounds.
            EngineUnavailable: The client is closed, or the engine refused it.
        """
        if self._is_closed or self._is_refused:
            raise EngineUnavailable("the connection to the engine is closed")
        number, self._next_request = self._next_request, self._next_request + 1
        request = dataclasses.replace(request, request=number)
        encode(request)  # checked now, where the caller can be told
        self._unanswered[number] = request
        if self._is_welcome:
            self._post(request)
        return number

    def poll(self, timeout_s: float = 0.0, budget_s: float | None = None) -> list[Any]:
        """Everything that has come in since the last call, oldest first; of previews and progress only the newest.

        Args:
            timeout_s: Wait this long for a first message.
            budget_s: Stop reading after this long; the rest comes with the next call.
        """
        if self._is_closed:
            return []
        self._keep_alive()
        if not self._inbox and timeout_s > 0:
            self._socket.poll(timeout_s * 1000)
        self._read_refusals()
        started_s = time.monotonic()
        while budget_s is None or time.monotonic() - started_s < budget_s:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            self._heard_s = time.monotonic()
            self._take(frames)
        messages, self._inbox = list(self._inbox), deque()
        self._acknowledge(messages)
        return _newest_only(messages)

    def request(self, request: Any, timeout_s: float = 30.0, on_message: Callable[[Any], None] | None = None) -> Any:
        """Send a request and wait for its answer, for scripts; other messages go to `on_message`.

        Raises:
            RequestRefused: The engine answered with an error.
            EngineUnavailable: No answer came in time, or the engine refused the connection.
        """
        number = self.send(request)
        answer = None

        def look(message: Any) -> None:
            nonlocal answer
            # The states of a list carry the request's number too; the answer is what ends the list.
            if message.request == number and not isinstance(message, JobState):
                answer = message
            elif on_message is not None:
                on_message(message)

        self._pump(look, lambda: answer is not None, timeout_s)
        if isinstance(answer, Error):
            raise RequestRefused(answer.code, answer.message)
        return answer

    def wait(
        self, job: str, timeout_s: float | None = None, on_message: Callable[[Any], None] | None = None
    ) -> JobState:
        """Wait until a job has ended, for scripts.

        Raises:
            RequestRefused: The engine knows no such job.
            EngineUnavailable: It has not ended in time, or the engine refused the connection.
        """

        def is_over() -> bool:
            if self._is_welcome and self._listed is None and not self._unanswered and job not in self.jobs:
                raise RequestRefused("unknown_job", f"the engine knows no job {job}")
            return job in self.jobs and self.jobs[job].state in FINAL_STATES

        # Once the list has come, a job that is not in it does not exist.
        self.send(ListJobs())
        self._pump(on_message or (lambda message: None), is_over, timeout_s)
        return self.jobs[job]

    def fetch(self, job: str, part: str = ARRAYS, timeout_s: float = 60.0) -> Result | ResultFile:
        """A part of a job's newest result, for scripts; raises what `request` raises."""
        return self.request(Fetch(job, part), timeout_s)

    def guess_elevation(
        self, picture: bytes, mask: bytes | None = None, fov_deg: float = 40.0, timeout_s: float = 60.0
    ) -> ElevationGuess:
        """How high the camera of a picture seems to stand, for scripts; file bytes in, raises what `request` raises."""
        return self.request(GuessElevation(picture, mask=mask, fov_deg=fov_deg), timeout_s)

    def close(self) -> None:
        """Let go of the connection at once; nothing is waited for."""
        self._let_go()

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _is_closed(self) -> bool:
        return not self._let_go.alive

    def _secure(self, token: str, keys: CurveKeys | None) -> None:
        if keys is None:
            self._socket.setsockopt(zmq.PLAIN_USERNAME, b"conrad")
            self._socket.setsockopt(zmq.PLAIN_PASSWORD, token.encode() or b"-")
        else:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server_public)
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.client_public)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.client_secret)

    def _post(self, message: Any) -> None:
        """Hand a message to ZeroMQ; what its queue has no room for is lost, and sent again by later hellos and pings."""
        try:
            self._socket.send_multipart(encode(message), zmq.NOBLOCK, copy=False)
        except zmq.Again:
            pass

    def _keep_alive(self) -> None:
        now_s = time.monotonic()
        # An engine that does not answer is asked less often, so that nothing piles up for it.
        if now_s - self._pinged_s > (PING_EVERY_S if now_s - self._heard_s < SILENCE_S else SILENCE_S):
            self._pinged_s = now_s
            self._post(Ping())

    def _read_refusals(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            if event["event"] in (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL):
                self._is_refused = True
                self._inbox.append(
                    Error("refused", "the engine refused the connection: the token or key is not its own")
                )

    def _take(self, frames: list[zmq.Frame]) -> None:
        try:
            message = decode([frame.buffer for frame in frames])
        except VersionMismatch as error:
            self._refuse("version", which_side_to_update(engine=error.theirs, client=PROTOCOL_VERSION))
            return
        except ProtocolError as error:
            message = Error("protocol", f"the engine sent something unreadable: {error}")
        match message:
            case Welcome():
                self.welcome, self._is_welcome, self._listed = message, True, set()
                for request in self._unanswered.values():
                    self._post(request)
            case Error(code="hello"):
                # The engine was started anew or has forgotten this client.
                self._is_welcome = False
                self._post(Hello(self._name))
                return
            case Error(code="version"):
                self._refuse(message.code, message.message)
                return
            case Status():
                self.status = message
            case JobState():
                self.jobs[message.job] = message
                if self._listed is not None:
                    self._listed.add(message.job)
            case Listed(request=0):
                # The end of what follows a welcome: a job that was not listed was forgotten while we were away.
                self.jobs = {job: state for job, state in self.jobs.items() if job in (self._listed or ())}
                self._listed = None
            case Forgotten():
                self.jobs.pop(message.job, None)
        if message.request and not isinstance(message, JobState):
            self._unanswered.pop(message.request, None)
        self._inbox.append(message)

    def _refuse(self, code: str, text: str) -> None:
        self._is_refused = True
        self._inbox.append(Error(code, text))

    def _acknowledge(self, messages: list[Any]) -> None:
        newest: dict[str, dict[str, int]] = {}
        for message in messages:
            match message:
                case JobState():
                    newest.setdefault(message.job, {})["revision"] = message.revision
                case Progress():
                    newest.setdefault(message.job, {})["progress"] = message.number
                case Preview():
                    newest.setdefault(message.job, {})["preview"] = message.number
        for job, numbers in newest.items():
            self._post(Ack(job, **numbers))

    def _pump(self, take: Callable[[Any], None], is_done: Callable[[], bool], timeout_s: float | None) -> None:
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not is_done():
            for message in self.poll(timeout_s=0.05):
                take(message)
            if self._is_refused or self._is_closed:
                raise EngineUnavailable("the engine refused the connection: token, key or version do not fit")
            if end_s is not None and time.monotonic() > end_s:
                raise EngineUnavailable(f"the engine has not answered within {timeout_s:g} s")


def _let_go(socket: zmq.Socket, monitor: zmq.Socket, context: zmq.Context) -> None:
    socket.disable_monitor()
    monitor.close(linger=0)
    socket.close(linger=0)
    context.term()


def _newest_only(messages: list[Any]) -> list[Any]:
    """The messages without previews and progress that a later one of the same job replaces."""
    newest = {(type(m), m.job): index for index, m in enumerate(messages) if isinstance(m, (Preview, Progress))}
    return [
        message
        for index, message in enumerate(messages)
        if not isinstance(message, (Preview, Progress)) or newest[type(message), message.job] == index
    ]
