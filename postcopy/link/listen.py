"""The destination's one port: who may come in.

Connections of anybody enter; control connections and proven data connections leave to the two callbacks. Everything
else is closed with one log line that names who it was and why, and nothing is allocated for it but its 64 bytes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from postcopy.errors import PostcopyError, ProtocolError, UsageError
from postcopy.link.address import Address, TcpAddress
from postcopy.link.dial import reason
from postcopy.link.sockets import check_peer, name_of, tune
from postcopy.wire.preamble import PREAMBLE_BYTES, Preamble, Role, Security, check_start, unpack

# How long a connection may take to say what it is for. A source sends its preamble with the first packet.
PREAMBLE_SECONDS = 5.0

# Connections that have not proved themselves yet, at one time. A source needs one at a time and three in all.
UNPROVEN_MAX = 16

ACCEPT_BACKLOG = 16

# After accept() failed for want of descriptors or memory: time for some to be given back.
ACCEPT_PAUSE_SECONDS = 0.1

log = logging.getLogger("postcopy.listen")

OnControl = Callable[[socket.socket, str], Awaitable[None]]
OnData = Callable[[Preamble, socket.socket], None]


class Listener:
    """One listening socket. `on_control` owns the socket it gets; `on_data` raises ProtocolError to refuse."""

    def __init__(self, address: Address, on_control: OnControl, on_data: OnData) -> None:
        self.address = address
        self._on_control = on_control
        self._on_data = on_data
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._unproven: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Bind and listen; `address` names the real port then. UsageError where the address cannot be had."""
        self._socket = await asyncio.to_thread(bind, self.address)
        if isinstance(self.address, TcpAddress):
            host, port = self._socket.getsockname()[:2]
            self.address = TcpAddress(host, port)
        self._accepting = asyncio.create_task(self._accept(self._socket))

    async def close(self) -> None:
        """Listen no more and close whatever has not proved itself."""
        tasks = [*self._unproven, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            if not isinstance(self.address, TcpAddress):
                Path(self.address.path).unlink(missing_ok=True)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:
                log.warning("cannot accept a connection: %s", reason(error))
                await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            name = name_of(connection)
            if len(self._unproven) >= UNPROVEN_MAX:
                log.warning("closed %s: %d connections have not proved themselves yet", name, UNPROVEN_MAX)
                connection.close()
                continue
            task = asyncio.create_task(self._prove(connection, name))
            self._unproven.add(task)
            task.add_done_callback(self._unproven.discard)

    async def _prove(self, connection: socket.socket, name: str) -> None:
        """Read the preamble and hand the connection to whom it is for, or close it with one line."""
        try:
            connection.setblocking(False)
            if connection.family == socket.AF_UNIX:
                check_peer(connection)
            async with asyncio.timeout(PREAMBLE_SECONDS):
                preamble = unpack(await self._read_preamble(connection))
            if preamble.security is Security.TLS:
                raise ProtocolError("this agent takes plain connections only")
            tune(connection, preamble.role)
            if preamble.role is Role.CONTROL:
                await self._on_control(connection, name)
            else:
                self._on_data(preamble, connection)
        except TimeoutError:
            self._close(connection, name, f"no preamble within {PREAMBLE_SECONDS:g} s")
        except PostcopyError as error:
            self._close(connection, name, str(error))
        except OSError as error:
            self._close(connection, name, reason(error))
        except asyncio.CancelledError:
            connection.close()
            raise

    @staticmethod
    def _close(connection: socket.socket, name: str, why: str) -> None:
        log.warning("closed %s: %s", name, why)
        connection.close()

    @staticmethod
    async def _read_preamble(connection: socket.socket) -> bytes:
        """Read 64 bytes and never one more: what follows belongs to whoever gets the connection."""
        loop = asyncio.get_running_loop()
        data = b""
        while len(data) < PREAMBLE_BYTES:
            piece = await loop.sock_recv(connection, PREAMBLE_BYTES - len(data))
            if not piece:
                break
            data += piece
            check_start(data)
        if not data:
            raise ProtocolError("the connection ended before it said anything")
        return data


def bind(address: Address) -> socket.socket:
    """Return a listening, non-blocking socket; UsageError says which address cannot be had and why.

    A Unix socket is for its owner and root alone, from its first moment: nobody connects before it listens.
    """
    try:
        if isinstance(address, TcpAddress):
            where: Any
            family, _, _, _, where = socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listening = socket.socket(family, socket.SOCK_STREAM)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            remove_stale(address.path)
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            where = address.path
        try:
            listening.bind(where)
            if not isinstance(address, TcpAddress):
                Path(address.path).chmod(0o600)
            listening.listen(ACCEPT_BACKLOG)
            listening.setblocking(False)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise UsageError(f"cannot listen on {address}: {reason(error)}") from error
    return listening


def remove_stale(path: str) -> None:
    """Remove a socket file that nobody listens on any more; leave everything else for bind() to refuse."""
    try:
        if not stat.S_ISSOCK(Path(path).lstat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                Path(path).unlink(missing_ok=True)
