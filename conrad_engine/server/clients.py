"""What is on its way to each client. Pure: a message leaves by a function that says whether there was room for it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from ..protocol import Ack, JobState, Preview, Progress

FORGET_AFTER_S = 30.0
"""A client that has been silent for this long is forgotten until its next hello."""
MAX_UNREAD_STATES = 64
"""States that a client may have on its way without having acknowledged them; further ones wait here."""
MAX_WAITING = 50_000
"""A client that lets more pile up here is forgotten; its next hello brings it everything."""

_numbers = itertools.count(1)


class Client:
    """One connection that has said hello."""

    def __init__(self, route: bytes, name: str, now_s: float) -> None:
        self.route = route
        self.name = name
        self.number = next(_numbers)
        self.heard_s = now_s
        self.is_lost = False
        self._waiting: deque[Any] = deque()
        self._unread: set[tuple[str, int]] = set()
        self._newest: dict[tuple[type, str], Any] = {}
        self._in_flight: dict[tuple[type, str], int] = {}

    def tell(self, message: Any) -> None:
        """An answer or a change of state: sent in order, never dropped."""
        self._waiting.append(message)
        self.is_lost = self.is_lost or len(self._waiting) > MAX_WAITING

    def offer(self, message: Progress | Preview) -> None:
        """Replaces an older one of the same job that has not left yet."""
        self._newest[type(message), message.job] = message

    def acknowledge(self, ack: Ack) -> None:
        """The client has read this far."""
        self._unread -= {
            (ack.job, revision) for job, revision in self._unread if job == ack.job and revision <= ack.revision
        }
        for kind, number in ((Progress, ack.progress), (Preview, ack.preview)):
            if self._in_flight.get((kind, ack.job), number + 1) <= number:
                del self._in_flight[kind, ack.job]

    def flush(self, send: Callable[[bytes, Any], bool]) -> None:
        """Send what may be sent; `send` answers False when there is no room, and then the rest waits."""
        while self._waiting:
            message = self._waiting[0]
            is_state = isinstance(message, JobState)
            if is_state and len(self._unread) >= MAX_UNREAD_STATES:
                return
            if not send(self.route, message):
                return
            self._waiting.popleft()
            if is_state:
                self._unread.add((message.job, message.revision))
        for key in [key for key in self._newest if key not in self._in_flight]:
            message = self._newest[key]
            if not send(self.route, message):
                return
            del self._newest[key]
            self._in_flight[key] = message.number


class Clients:
    """Everyone who has said hello and is still heard."""

    def __init__(self, send: Callable[[bytes, Any], bool]) -> None:
        self._send = send
        self._by_route: dict[bytes, Client] = {}

    def __iter__(self) -> Iterator[Client]:
        return iter(list(self._by_route.values()))

    def __len__(self) -> int:
        return len(self._by_route)

    def get(self, route: bytes) -> Client | None:
        return self._by_route.get(route)

    def numbered(self, number: int) -> Client | None:
        return next((client for client in self._by_route.values() if client.number == number), None)

    def greet(self, route: bytes, name: str, now_s: float) -> Client:
        """A client for this connection, with nothing on its way."""
        self._by_route[route] = Client(route, name, now_s)
        return self._by_route[route]

    def tell(self, route: bytes, message: Any) -> None:
        client = self._by_route.get(route)
        if client is not None:
            client.tell(message)
            client.flush(self._send)

    def tell_all(self, message: Any) -> None:
        for client in self:
            client.tell(message)
            client.flush(self._send)

    def offer(self, client: Client, message: Progress | Preview) -> None:
        client.offer(message)
        client.flush(self._send)

    def acknowledge(self, client: Client, ack: Ack) -> None:
        client.acknowledge(ack)
        client.flush(self._send)

    def sweep(self, now_s: float) -> list[Client]:
        """Try again to send what waits, and drop those who are gone; they are returned."""
        for client in self:
            client.flush(self._send)
        gone = [c for c in self if c.is_lost or now_s - c.heard_s > FORGET_AFTER_S]
        for client in gone:
            del self._by_route[client.route]
        return gone
