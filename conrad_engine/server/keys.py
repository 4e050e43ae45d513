"""CURVE key files for an engine that is reached from other machines."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import zmq.auth

from ..errors import InputError


def make_keys(folder: Path, client: str) -> list[str]:
    """Make the engine's key pair, if it is not there, and one for a client.

    server.key, server.key_secret    the engine's; the secret stays on its machine
    clients/NAME.key                 who may connect; remove the file to shut a client out at the next start
    NAME.key_secret                  to be carried to the client, with server.key

    Returns:
        What to do with the files, for people.

    Raises:
        InputError: The name cannot be used, or the files cannot be written.
    """
    if not re.fullmatch(r"[\w-]{1,60}", client) or client == "server":
        raise InputError(f"a client's name has letters, digits, - and _, and is not 'server': {client!r}")
    try:
        (folder / "clients").mkdir(parents=True, exist_ok=True, mode=0o700)
        former_mask = os.umask(0o077)
        try:
            if not (folder / "server.key_secret").exists():
                zmq.auth.create_certificates(folder, "server")
            zmq.auth.create_certificates(folder, client)
        finally:
            os.umask(former_mask)
        os.replace(folder / f"{client}.key", folder / "clients" / f"{client}.key")
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from None
    python = "conrad" if sys.argv[0].endswith("conrad") else "python -m conrad_engine"
    return [
        f"engine: {python} serve --bind ADDRESS --port PORT --keys {folder}",
        f"client: carry {folder / 'server.key'} and {folder / f'{client}.key_secret'} to it, and give them with",
        f"        --endpoint tcp://ADDRESS:PORT --server-key server.key --client-key {client}.key_secret",
    ]
