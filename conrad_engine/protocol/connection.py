"""Where an engine is and how to prove that one may use it: connection files and CURVE keys. Standard library + pyzmq."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import zmq.auth

from .errors import EngineUnavailable

CONNECTION_FILE = "connection.json"


@dataclass(frozen=True)
class Connection:
    """What a running engine announces on its standard output and in its connection file."""

    endpoint: str
    """Such as tcp://127.0.0.1:50123."""
    version: str
    """Of the engine's package."""
    protocol: int
    pid: int
    token: str
    """The secret of a loopback engine; empty where CURVE keys are used instead."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Connection:
        """Read an announcement.

        Raises:
            EngineUnavailable: The text is none.
        """
        try:
            data = json.loads(text)
            return Connection(
                str(data["endpoint"]),
                str(data["version"]),
                int(data["protocol"]),
                int(data["pid"]),
                str(data["token"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise EngineUnavailable(f"the engine's announcement cannot be read: {error!r}") from None

    @staticmethod
    def read(path: Path) -> Connection:
        """The engine that wrote this connection file.

        Raises:
            EngineUnavailable: There is no such file, or it is no connection file.
        """
        try:
            return Connection.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise EngineUnavailable(
                f"no engine is announced in {path} ({error.strerror}): start one with `conrad serve`"
            ) from None


@dataclass(frozen=True)
class CurveKeys:
    """What a client needs to reach an engine on another machine; keys are Z85 text."""

    server_public: bytes
    client_public: bytes
    client_secret: bytes

    @staticmethod
    def load(server_key_file: Path, client_secret_file: Path) -> CurveKeys:
        """Read the engine's public key file and the client's secret key file, as `conrad keys` writes them.

        Raises:
            EngineUnavailable: A file is missing or holds no such key.
        """
        server_public, _ = load_key_file(server_key_file)
        client_public, client_secret = load_key_file(client_secret_file)
        if client_secret is None:
            raise EngineUnavailable(f"{client_secret_file} holds no secret key: name the file ending in .key_secret")
        return CurveKeys(server_public, client_public, client_secret)


def load_key_file(path: Path) -> tuple[bytes, bytes | None]:
    """Public and, if it is there, secret key of a CURVE key file.

    Raises:
        EngineUnavailable: The file is missing or holds no key.
    """
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise EngineUnavailable(f"the key file {path} cannot be used: {error}") from None


def default_data_folder() -> Path:
    """Where `conrad serve` keeps its jobs and its connection file unless told otherwise."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "conrad"
