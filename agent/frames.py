"""Maps over a stream, for the admin socket: a length of 4 bytes, little endian, then that many bytes of msgpack."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import msgpack

from postcopy.errors import ProtocolError
from postcopy.limits import ADMIN_ARRAY_MAX, ADMIN_ELEMENTS_MAX, ADMIN_FRAME_BYTES_MAX
from postcopy.wire.unpack import unpack

_LENGTH = struct.Struct("<I")


async def read_map(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """Return the next map, None at the end of the stream; ProtocolError for anything else."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > ADMIN_FRAME_BYTES_MAX:
            raise ProtocolError(f"admin frame of {length} bytes: the limit is {ADMIN_FRAME_BYTES_MAX}")
        payload = await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise ProtocolError("the admin connection ended inside a frame") from error
        return None
    value = unpack(payload, "an admin frame", elements_max=ADMIN_ELEMENTS_MAX, array_max=ADMIN_ARRAY_MAX)
    if not isinstance(value, dict):
        raise ProtocolError("an admin frame is not a map")
    return value


def write_map(writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
    """Queue a map."""
    payload = msgpack.packb(value)
    writer.write(_LENGTH.pack(len(payload)) + payload)
