"""The control connection: one JSON object a line, both ways, over a stream socket on 127.0.0.1.

Requests carry the secret of `services.json`; whoever cannot read that file cannot control the services. A lease is
nothing but its open connection, so a client that dies in any way gives it back.
"""

import json
import socket
from typing import Any

from ingestion.errors import (
    AuthenticationError,
    ConfigurationError,
    TransientError,
    WarehouseError,
)

MAX_LINE = 1_000_000

_CLASSES: dict[str, type[WarehouseError]] = {
    str(kind.error_class): kind for kind in (WarehouseError, ConfigurationError, AuthenticationError, TransientError)
}


class BrokenConnection(Exception):
    """The other side closed, fell silent, or said something that is no message."""


def encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        raise BrokenConnection("not JSON") from None
    if not isinstance(message, dict):
        raise BrokenConnection("not an object")
    return message


def receive(connection: socket.socket, *, timeout: float) -> dict[str, Any]:
    """The next message, waited for up to `timeout` seconds."""
    connection.settimeout(timeout)
    received = b""
    try:
        while not received.endswith(b"\n"):
            chunk = connection.recv(65_536)
            if not chunk or len(received) > MAX_LINE:
                raise BrokenConnection("closed")
            received += chunk
    except OSError as error:
        raise BrokenConnection(str(error) or type(error).__name__) from None
    return decode(received)


def exchange(connection: socket.socket, message: dict[str, Any], *, timeout: float) -> dict[str, Any]:
    """Send a request and wait up to `timeout` seconds for its answer."""
    connection.settimeout(timeout)
    try:
        connection.sendall(encode(message))
    except OSError as error:
        raise BrokenConnection(str(error) or type(error).__name__) from None
    return receive(connection, timeout=timeout)


def pack_error(error: WarehouseError) -> dict[str, Any]:
    return {
        "ok": False,
        "error": {"class": str(error.error_class), "message": error.message, "hint": error.hint},
    }


def unpack_error(answer: dict[str, Any]) -> WarehouseError:
    """The error an answer carries, of the class it had on the other side."""
    packed = answer.get("error") or {}
    kind = _CLASSES.get(packed.get("class", ""), WarehouseError)
    return kind(packed.get("message", "The services refused the request."), hint=packed.get("hint", ""))
