"""Starting an engine: addresses, secrets, the announcement, the end."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import zmq

from .. import __version__
from ..errors import InputError
from ..protocol import CONNECTION_FILE, PROTOCOL_VERSION, Connection, EngineUnavailable
from .gate import CLIENTS, WORKERS, Gate, ServerKeys, check_address
from .server import Life, Server, make_router
from .store import Store
from .workers import Workers

log = logging.getLogger("conrad.server")

PIPELINE = "conrad_engine.pipeline"


@dataclass(frozen=True)
class Options:
    """How an engine is started."""

    folder: Path
    """Data folder."""
    address: str = "127.0.0.1"
    port: int = 0
    """0 takes the port of the last start if that did not end properly, else a free one."""
    keys: Path | None = None
    """Folder of CURVE keys."""
    devices: tuple[str, ...] = ("auto",)
    pipeline: str = PIPELINE
    """Module with `Job` and `generate`."""
    life: Life = Life()


def serve(options: Options) -> None:
    """Run an engine until it is over.

    Raises:
        InputError: The address, the keys or the data folder cannot be used.
        FolderInUse: Another engine has the data folder.
    """
    keys = None if options.keys is None else ServerKeys.load(options.keys)
    check_address(options.address, keys)
    store = Store(options.folder.resolve())
    context = zmq.Context()
    try:
        _serve(options, keys, store, context)
    finally:
        (store.folder / CONNECTION_FILE).unlink(missing_ok=True)
        store.close()
        context.destroy(linger=0)


def _serve(options: Options, keys: ServerKeys | None, store: Store, context: zmq.Context) -> None:
    former = _former_connection(store.folder / CONNECTION_FILE)
    token = "" if keys is not None else (former.token if former and former.token else secrets.token_hex(32))
    worker_secret = secrets.token_hex(32)
    gate = Gate(context, token, worker_secret, keys)
    clients_socket, workers_socket = make_router(context), make_router(context)
    gate.protect(clients_socket, CLIENTS)
    gate.protect(workers_socket, WORKERS)
    endpoint = _bind(clients_socket, options, former)
    workers_endpoint = f"tcp://127.0.0.1:{workers_socket.bind_to_random_port('tcp://127.0.0.1')}"
    server = Server(
        store,
        gate,
        clients_socket,
        workers_socket,
        lambda send: Workers(options.devices, workers_endpoint, worker_secret, options.pipeline, store.folder, send),
        options.life,
    )
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: server.stop())
    connection = Connection(endpoint, __version__, PROTOCOL_VERSION, os.getpid(), token)
    write_private(store.folder / CONNECTION_FILE, connection.to_json())
    print(connection.to_json(), flush=True)
    log.info("engine %s on %s, data in %s", __version__, endpoint, store.folder)
    server.run()


def _bind(socket: zmq.Socket, options: Options, former: Connection | None) -> str:
    """Bind the clients' socket and return its endpoint."""
    address = f"[{options.address}]" if ":" in options.address else options.address
    if ":" in options.address:
        socket.setsockopt(zmq.IPV6, 1)
    if options.port:
        try:
            socket.bind(f"tcp://{address}:{options.port}")
        except zmq.ZMQError as error:
            raise InputError(f"port {options.port} of {options.address} cannot be used: {error.strerror}") from None
        return f"tcp://{address}:{options.port}"
    # Clients of an engine that was killed find the next one at the same place.
    if former is not None and former.endpoint.startswith(f"tcp://{address}:"):
        try:
            socket.bind(former.endpoint)
            return former.endpoint
        except zmq.ZMQError:
            log.info("the former port is taken")
    try:
        return f"tcp://{address}:{socket.bind_to_random_port(f'tcp://{address}')}"
    except zmq.ZMQError as error:
        raise InputError(f"the address {options.address} cannot be used: {error.strerror}") from None


def _former_connection(path: Path) -> Connection | None:
    """What an engine that was killed left behind; nothing if it ended properly, or if others may read the file."""
    try:
        if sys.platform != "win32" and path.stat().st_mode & 0o077:
            return None
        return Connection.read(path)
    except (OSError, EngineUnavailable):
        return None


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, at no moment otherwise.

    Raises:
        InputError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
