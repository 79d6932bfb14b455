"""The control channel: messages of the wire over one asyncio stream.

Bytes of the other agent enter; typed messages leave, or the one error that ended the channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque

from postcopy.errors import LinkError
from postcopy.wire.control import ControlDecoder, Message, encode
from postcopy.wire.version import VERSION

READ_BYTES = 64 << 10

# What was said last (a refusal, Released) should arrive; for an agent that reads no more nobody waits longer.
FLUSH_SECONDS = 2.0


class ControlChannel:
    """One control connection, after its preamble. `name` is the other end, for people."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> None:
        self.name = name
        self._reader = reader
        self._writer = writer
        self.version = VERSION  # set it once one is agreed on
        self._decoder = ControlDecoder()
        self._ready: deque[Message] = deque()
        self.bytes_sent = 0
        self.bytes_received = 0

    @classmethod
    async def over(cls, connection: socket.socket, name: str) -> ControlChannel:
        """Take a connected socket over."""
        reader, writer = await asyncio.open_connection(sock=connection, limit=READ_BYTES)
        return cls(reader, writer, name)

    def send(self, message: Message) -> None:
        """Queue a message; LinkError if the connection is known to be gone: not a byte of it was sent then."""
        if self._writer.is_closing() or self._reader.exception() is not None or self._reader.at_eof():
            raise LinkError(f"the connection to {self.name} is closed")
        data = encode(message, self.version)
        self.bytes_sent += len(data)
        self._writer.write(data)

    async def receive(self) -> Message:
        """Wait for a message; ProtocolError for bytes that are none, LinkError at the connection's end."""
        while not self._ready:
            try:
                data = await self._reader.read(READ_BYTES)
            except OSError as error:
                raise LinkError(f"the connection to {self.name} broke: {error.strerror or error}") from error
            if not data:
                self._decoder.end()
                raise LinkError(f"{self.name} closed the connection")
            self.bytes_received += len(data)
            self._decoder.version = self.version
            self._ready.extend(self._decoder.feed(data))
        return self._ready.popleft()

    async def close(self) -> None:
        """Send what is queued, for a short while, and close."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                await self._writer.drain()
                self._writer.close()
                await self._writer.wait_closed()
        self.abort()

    def abort(self) -> None:
        """Close at once."""
        self._writer.transport.abort()
