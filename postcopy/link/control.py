"""The control channel: messages of the wire over one asyncio stream.

Bytes of the other agent enter; typed messages leave, or the one error that ended the channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import deque

from postcopy.errors import LinkError
from postcopy.limits import FLUSH_SECONDS
from postcopy.link.sockets import network_of
from postcopy.link.tls import Tunnel, words
from postcopy.wire.control import ControlDecoder, Message, encode
from postcopy.wire.version import VERSION

READ_BYTES = 64 << 10


class ControlChannel:
    """One control connection, after its preamble.

    `name` is the other end, for people, `origin` the network that it comes from; `tunnel` the TLS around it.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        name: str,
        tunnel: Tunnel | None = None,
        origin: str = "",
    ) -> None:
        self.name = name
        self.origin = origin
        self._reader = reader
        self._writer = writer
        self._tunnel = tunnel
        self._broken = ""
        self.version = VERSION  # set it once one is agreed on
        self._decoder = ControlDecoder()
        self._ready: deque[Message] = deque()
        self.bytes_sent = 0
        self.bytes_received = 0

    @classmethod
    async def over(cls, connection: socket.socket, name: str, tunnel: Tunnel | None = None) -> ControlChannel:
        """Take a connected socket over, and the tunnel whose handshake was held on it."""
        origin = network_of(connection)
        reader, writer = await asyncio.open_connection(sock=connection, limit=READ_BYTES)
        return cls(reader, writer, name, tunnel, origin)

    @property
    def encrypted(self) -> bool:
        """Whether TLS is around it."""
        return self._tunnel is not None

    def send(self, message: Message) -> None:
        """Queue a message; LinkError if the connection is known to be gone: not a byte of it was sent then."""
        ended = self._reader.at_eof() or (self._tunnel is not None and self._tunnel.ended)
        if self._writer.is_closing() or self._reader.exception() is not None or ended or self._broken:
            raise LinkError(self._broken or f"the connection to {self.name} is closed")
        data = encode(message, self.version)
        try:
            self._writer.write(data if self._tunnel is None else self._tunnel.sealed(data))
        except ssl.SSLError as error:
            raise LinkError(f"TLS with {self.name}: {words(error)}") from error
        self.bytes_sent += len(data)

    async def receive(self) -> Message:
        """Wait for a message; ProtocolError for bytes that are none, LinkError at the connection's end."""
        while not self._ready:
            try:
                data = await self._read()
            except ssl.SSLError as error:
                self._broken = f"TLS with {self.name}: {words(error)}"  # of more use than that it is closed
                raise LinkError(self._broken) from error
            except OSError as error:
                raise LinkError(f"the connection to {self.name} broke: {error.strerror or error}") from error
            if not data:
                self._decoder.end()
                raise LinkError(f"{self.name} closed the connection")
            self.bytes_received += len(data)
            self._decoder.version = self.version
            self._ready.extend(self._decoder.feed(data))
        return self._ready.popleft()

    async def _read(self) -> bytes:
        """Wait for bytes of messages; none at the end."""
        if self._tunnel is None:
            return await self._reader.read(READ_BYTES)
        while not (data := self._tunnel.opened()) and not self._tunnel.ended:
            came = await self._reader.read(READ_BYTES)
            if not came:
                return b""
            self._tunnel.put(came)
        if answer := self._tunnel.leaving():  # to a change of keys
            self._writer.write(answer)
        return data

    async def close(self) -> None:
        """Send what is queued, for a short while, and close."""
        try:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    if self._tunnel is not None and not self._writer.is_closing():
                        self._writer.write(self._tunnel.farewell())
                    await self._writer.drain()
                    self._writer.close()
                    await self._writer.wait_closed()
        finally:
            self.abort()

    def abort(self) -> None:
        """Close at once."""
        self._writer.transport.abort()
