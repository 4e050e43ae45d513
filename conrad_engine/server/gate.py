"""Who may connect: decided before ZeroMQ takes a single message from a peer (ZAP, https://rfc.zeromq.org/spec/27/)."""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from pathlib import Path

import zmq

from ..errors import InputError
from ..protocol import EngineUnavailable, load_key_file

CLIENTS, WORKERS = b"clients", b"workers"
"""The two domains: the sockets that peers knock at."""


@dataclass(frozen=True)
class ServerKeys:
    """The CURVE keys of an engine that is reached from other machines."""

    public: bytes
    secret: bytes
    clients: frozenset[bytes]
    """Public keys of the clients that may connect, Z85 text."""

    @staticmethod
    def load(folder: Path) -> ServerKeys:
        """Read `server.key_secret` and `clients/*.key` of a key folder, as `conrad keys` makes it.

        Raises:
            InputError: A key is missing or broken.
        """
        try:
            public, secret = load_key_file(folder / "server.key_secret")
            clients = frozenset(load_key_file(path)[0] for path in sorted((folder / "clients").glob("*.key")))
        except EngineUnavailable as error:
            raise InputError(f"{error}; make keys with `conrad keys {folder} --client NAME`") from None
        if secret is None or not clients:
            raise InputError(f"{folder} holds no client key: make one with `conrad keys {folder} --client NAME`")
        return ServerKeys(public, secret, clients)


def check_address(address: str, keys: ServerKeys | None) -> None:
    """An address other than loopback needs keys.

    Raises:
        InputError: It has none, or is no IP address.
    """
    try:
        is_loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        raise InputError(
            f"--bind takes an IP address of this machine, such as 127.0.0.1 or 0.0.0.0, not {address!r}"
        ) from None
    if not is_loopback and keys is None:
        raise InputError(
            f"binding {address} would let other machines send jobs unencrypted and unchecked: "
            "make keys with `conrad keys FOLDER --client NAME` and name the folder with --keys"
        )


class Gate:
    """Answers ZeroMQ's question whether a peer may connect."""

    def __init__(self, context: zmq.Context, token: str, worker_secret: str, keys: ServerKeys | None) -> None:
        self._passwords = {CLIENTS: token.encode(), WORKERS: worker_secret.encode()}
        self._keys = keys
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind("inproc://zeromq.zap.01")

    def protect(self, socket: zmq.Socket, domain: bytes) -> None:
        """Let a socket ask here; call it before `bind`."""
        socket.setsockopt(zmq.ZAP_DOMAIN, domain)
        if domain == CLIENTS and self._keys is not None:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
        else:
            socket.setsockopt(zmq.PLAIN_SERVER, 1)

    def answer(self) -> None:
        """Answer one question, if one waits."""
        try:
            version, number, domain, _, _, mechanism, *credentials = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        is_welcome = self._is_welcome(domain, mechanism, credentials)
        status, text = (b"200", b"OK") if is_welcome else (b"400", b"refused")
        self.socket.send_multipart([version, number, status, text, b"", b""])

    def _is_welcome(self, domain: bytes, mechanism: bytes, credentials: list[bytes]) -> bool:
        if domain == CLIENTS and self._keys is not None:
            return mechanism == b"CURVE" and zmq.utils.z85.encode(credentials[0]) in self._keys.clients
        password = self._passwords.get(domain)
        return mechanism == b"PLAIN" and bool(password) and hmac.compare_digest(credentials[1], password)
