"""What the front process and the engine process say to each other: typed messages, msgpack, a length before each.

A frame is four bytes of length (big endian) and one message. What comes in is checked against the types below, so
neither side can be made to build anything else. Knows nothing about HTTP or engines.
"""

import socket
import struct
from typing import Final

import msgspec

from quantlab.errors import QuantlabError
from quantlab.runtime.options import EngineInfo, EngineOptions, EngineStats
from quantlab.runtime.request import Request, TokenEvent

LENGTH: Final = struct.Struct(">I")
MAX_FRAME: Final = 1 << 28  # a prompt of a million tokens is 5 MB; anything larger is not a message


class Start(msgspec.Struct, tag="start", frozen=True):
    """The first command: what to build."""

    folder: str
    options: EngineOptions


class Add(msgspec.Struct, tag="add", frozen=True):
    """Begin a request."""

    request: Request


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """Forget a request and free what it holds."""

    request_id: str


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """End the process."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The engine is built."""

    info: EngineInfo


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The engine could not be built, or cannot go on; the process ends after it. The fields of a QuantlabError."""

    code: str
    message: str
    where: str | None = None
    fix: str | None = None


class Step(msgspec.Struct, tag="step", frozen=True):
    """What one step gave, and the engine's counts after it."""

    events: list[TokenEvent]
    stats: EngineStats


Command = Start | Add | Abort | Stop
Report = Ready | Failed | Step
ENCODER: Final = msgspec.msgpack.Encoder()
COMMANDS: Final = msgspec.msgpack.Decoder(Command)
REPORTS: Final = msgspec.msgpack.Decoder(Report)


def frame(message: Command | Report) -> bytes:
    """The bytes of one message on the wire."""
    body = ENCODER.encode(message)
    assert len(body) <= MAX_FRAME
    return LENGTH.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """Bytes of the message that follow `header`; raises ValueError for a length that no message has."""
    (length,) = LENGTH.unpack(header)
    if length > MAX_FRAME:
        raise ValueError(f"a message of {length} bytes")
    return int(length)


def receive_command(connection: socket.socket) -> Command | None:
    """The next command, or None when the other side has closed; raises ValueError for anything else."""
    header = _receive(connection, LENGTH.size)
    body = header and _receive(connection, frame_length(header))
    return COMMANDS.decode(body) if body else None


def _receive(connection: socket.socket, count: int) -> bytes | None:
    """Exactly `count` bytes, or None at the end of the stream."""
    data = bytearray()
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


def failure(error: Exception) -> Failed:
    """The message that tells `error`."""
    if isinstance(error, QuantlabError):
        return Failed(error.code, error.message, error.where, error.fix)
    told = str(error).strip().split("\n")[0]
    return Failed(QuantlabError.code, f"{type(error).__name__}: {told}" if told else type(error).__name__)


def raised(failed: Failed) -> QuantlabError:
    """The error that `failed` tells, of the class that it was of."""
    kinds = {kind.code: kind for kind in QuantlabError.__subclasses__()} | {QuantlabError.code: QuantlabError}
    return kinds.get(failed.code, QuantlabError)(failed.message, where=failed.where, fix=failed.fix)
