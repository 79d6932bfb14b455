"""The control channel: messages to bytes, and bytes to messages as they trickle in.

What enters: messages to send; bytes of the other agent, cut anywhere. What leaves: bytes; messages, or a
ProtocolError that names the message, the field and the reason, and never anything else.
On the wire a message is its length (4 bytes, little endian) and a map of msgpack: "t" and its fields.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack

from postcopy.errors import ProtocolError
from postcopy.limits import CONTROL_BYTES_MAX, FIRST_BYTES_MAX
from postcopy.wire.fields import IllTypedError
from postcopy.wire.messages import (
    MESSAGES,
    SINCE,
    Alive,
    AllPlaced,
    Cancel,
    GuestOffer,
    Have,
    Hello,
    LayoutOffer,
    Loaded,
    Message,
    Piece,
    Probe,
    Probed,
    Progress,
    Ready,
    Refuse,
    RegionOffer,
    Released,
    Resume,
    Run,
    Running,
    State,
    Welcome,
)
from postcopy.wire.records import Record, quote
from postcopy.wire.unpack import unpack
from postcopy.wire.version import VERSION, VERSION_MIN

__all__ = [
    "Alive",
    "AllPlaced",
    "Cancel",
    "ControlDecoder",
    "GuestOffer",
    "Have",
    "Hello",
    "LayoutOffer",
    "Loaded",
    "Message",
    "Piece",
    "Probe",
    "Probed",
    "Progress",
    "Ready",
    "Refuse",
    "RegionOffer",
    "Released",
    "Resume",
    "Run",
    "Running",
    "State",
    "Welcome",
    "encode",
    "speaks",
]

_PREFIX = struct.Struct("<I")
_RECORDS: dict[tuple[str, int], Record[Any]] = {
    (name, version): Record(shape, version)
    for name, shape in MESSAGES.items()
    for version in range(VERSION_MIN, VERSION + 1)
}
_NAMES = {shape: name for name, shape in MESSAGES.items()}


def speaks(shape: type[Message], version: int) -> bool:
    """Say whether a message of this type exists in `version`."""
    return version >= SINCE.get(_NAMES[shape], 1)


def encode(message: Message, version: int = VERSION) -> bytes:
    """Return the bytes of a message, its length in front; ValueError if it would be refused."""
    name = _NAMES[type(message)]
    if isinstance(message, Welcome):
        version = _agreed_on(message.version, version)
    if not speaks(type(message), version):
        raise ValueError(f"message {name} is not part of version {version}")
    try:
        payload: bytes = msgpack.packb({"t": name, **_RECORDS[name, version].give(message)})
    except IllTypedError as error:
        raise ValueError(f"message {name}: {error}") from None
    try:
        # A report is as free as its maker likes: what could not be read again is found here, not by the
        # other agent.
        _decode(payload, version)
    except ProtocolError as error:
        raise ValueError(str(error)) from None
    if len(payload) > CONTROL_BYTES_MAX:
        raise ValueError(f"message {name}: {len(payload)} bytes, the limit is {CONTROL_BYTES_MAX}")
    return _PREFIX.pack(len(payload)) + payload


class ControlDecoder:
    """Turns one direction of a control connection into messages.

    Set `version` once it is agreed on. After a ProtocolError the decoder stays broken and raises it again.
    """

    def __init__(self, version: int = VERSION) -> None:
        self.version = version
        self._buffer = bytearray()
        self._bytes_max = FIRST_BYTES_MAX
        self._broken: ProtocolError | None = None

    def feed(self, data: bytes) -> list[Message]:
        """Take the next bytes and return the messages that are complete with them.

        ProtocolError for bad ones; what stood before them in the same bytes is dropped with the connection.
        """
        if self._broken is not None:
            raise self._broken
        self._buffer += data
        messages = []
        try:
            while (payload := self._next_payload()) is not None:
                messages.append(_decode(payload, self.version))
                self._bytes_max = CONTROL_BYTES_MAX
        except ProtocolError as error:
            self._broken = error
            self._buffer.clear()
            raise
        return messages

    def _next_payload(self) -> bytes | None:
        """Cut the next message off the buffer; None while it is not complete."""
        if len(self._buffer) < _PREFIX.size:
            return None
        (length,) = _PREFIX.unpack_from(self._buffer)
        if length == 0:
            raise ProtocolError("control message of no bytes")
        # Judged before its bytes are there: nobody makes this agent wait for, or hold, what it would refuse.
        if length > self._bytes_max:
            raise ProtocolError(f"control message of {length} bytes: the limit is {self._bytes_max} here")
        stop = _PREFIX.size + length
        if len(self._buffer) < stop:
            return None
        payload = bytes(memoryview(self._buffer)[_PREFIX.size : stop])
        del self._buffer[:stop]
        return payload

    def end(self) -> None:
        """Take note that the connection ended; ProtocolError if that was inside a message."""
        if self._broken is not None:
            raise self._broken
        if self._buffer:
            raise ProtocolError(f"the connection ended inside a control message, {len(self._buffer)} bytes of it came")


def _decode(payload: bytes, version: int) -> Message:
    """Return the message that a payload says; ProtocolError."""
    values = unpack(payload, "control message refused")
    if type(values) is not dict:
        raise ProtocolError("control message refused: wanted a map")
    name = values.pop("t", None)
    if type(name) is not str or name not in MESSAGES:
        raise ProtocolError(f"control message refused: unknown type {quote(name)}")
    if not speaks(MESSAGES[name], version):
        raise ProtocolError(f"message {name} is not part of version {version}")
    if MESSAGES[name] is Welcome:
        version = _agreed_on(values.get("version"), version)
    try:
        message: Message = _RECORDS[name, version].take_fields(values)
    except IllTypedError as error:
        raise ProtocolError(f"message {name}: {error}") from None
    return message


def _agreed_on(said: object, version: int) -> int:
    """Return the version that WELCOME is written in: the one it says, since its reader knows of none before."""
    return said if type(said) is int and VERSION_MIN <= said <= VERSION else version
