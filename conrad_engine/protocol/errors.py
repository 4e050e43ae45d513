"""What can go wrong between a client and the engine. Standard library only."""

from __future__ import annotations


class ProtocolError(Exception):
    """Frames that are no message, or a message outside the protocol's bounds."""

    code = "protocol"


class VersionMismatch(ProtocolError):
    """The other side speaks another protocol version; `theirs` is its number."""

    code = "version"

    def __init__(self, theirs: int, ours: int) -> None:
        super().__init__(f"protocol {theirs} was received, protocol {ours} is spoken here")
        self.theirs = theirs


class EngineUnavailable(Exception):
    """No engine answers, or it refused the token or key."""

    code = "unavailable"


class RequestRefused(Exception):
    """The engine answered a request with an error; `code` is the one of the wire."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def which_side_to_update(engine: int, client: int) -> str:
    """One sentence for a person, from the protocol versions of both sides."""
    older = "engine" if engine < client else "client (in Blender: the add-on)"
    return f"the engine speaks protocol {engine} and the client protocol {client}: update the {older}"
