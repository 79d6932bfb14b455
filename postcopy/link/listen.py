"""An agent's one port: who may come in.

Connections of anybody enter; control channels and proven data connections leave to the two callbacks. Everything
else is closed with one log line that names who it was and why, and nothing is allocated for it but its 64 bytes and,
where TLS is taken, its handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import stat
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from postcopy.errors import LinkError, PostcopyError, ProtocolError, UsageError
from postcopy.limits import (
    ACCEPT_BACKLOG,
    ACCEPT_PAUSE_SECONDS,
    FIRST_MESSAGE_SECONDS,
    LINES_MAX,
    LINES_SECONDS,
    PREAMBLE_SECONDS,
    UNPROVEN_MAX,
)
from postcopy.link.address import Address, TcpAddress
from postcopy.link.control import ControlChannel
from postcopy.link.dial import reason
from postcopy.link.sockets import check_peer, name_of, network_of, tune
from postcopy.link.tls import Credentials, Tunnel, farewell, greet
from postcopy.link.users import check_dialler
from postcopy.wire.control import Message, Refuse
from postcopy.wire.preamble import NO_TLS, OPENING, PREAMBLE_BYTES, Preamble, Role, Security, check_start, unpack

log = logging.getLogger("postcopy.listen")

# What whoever dials with the other opening role has got wrong.
_MISTAKEN = {
    Role.CONTROL: "nothing can migrate to this agent, it is a source",
    Role.FETCH: "nothing can be fetched from this agent, it is a destination",
}

OnControl = Callable[[ControlChannel], Awaitable[None]]
OnData = Callable[[Preamble, socket.socket], Awaitable[None]]


def why(error: PostcopyError | OSError) -> str:
    """Say why a connection that did not prove itself is closed."""
    if isinstance(error, TimeoutError):
        return f"no preamble within {PREAMBLE_SECONDS:g} s"
    return reason(error) if isinstance(error, OSError) else str(error)


class Listener:
    """One listening socket. `on_control` and `on_data` own what they get when they return, and raise to refuse it.

    With `tls` a plain connection comes in only to be told so, without it one that announces TLS. A data connection
    goes to `on_data` as it is behind its preamble: the key of its handshake is its migration's. `opening` is the role
    with which messages begin here: CONTROL at a destination, FETCH at a source.
    """

    def __init__(
        self,
        address: Address,
        on_control: OnControl,
        on_data: OnData,
        tls: Credentials | None = None,
        *,
        opening: Role = Role.CONTROL,
    ) -> None:
        self.address = address
        self._opening = opening
        self._on_control = on_control
        self._on_data = on_data
        self._tls = tls
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._unproven: dict[asyncio.Task[None], str] = {}  # and from where each comes, the oldest first
        self._lines = _Lines()

    async def open(self) -> None:
        """Bind and listen; `address` names the real port then. UsageError where the address cannot be had."""
        if self._tls is not None:
            self._tls.for_listening()  # what is wrong with them is said now
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
        self._lines.sum_up()
        if self._socket is not None:
            unbind(self._socket, self.address)
            self._socket = None

    async def _accept(self, listening: socket.socket) -> None:
        async for connection in connections(listening):
            task = asyncio.create_task(self._prove(connection, name_of(connection)))
            self._unproven[task] = network_of(connection)
            task.add_done_callback(lambda task: self._unproven.pop(task, None))
            if len(self._unproven) > UNPROVEN_MAX:
                self._evict()

    def _evict(self) -> None:
        ((crowd, _),) = Counter(self._unproven.values()).most_common(1)
        oldest = next(task for task, network in self._unproven.items() if network == crowd)
        del self._unproven[oldest]
        oldest.cancel()

    async def _prove(self, connection: socket.socket, name: str) -> None:
        """Read the preamble and hand the connection to whom it is for, or close it with one line."""
        close = connection.close
        try:
            connection.setblocking(False)
            if connection.family == socket.AF_UNIX:
                check_peer(connection)
            async with asyncio.timeout(PREAMBLE_SECONDS):
                preamble = self._judge(unpack(await self._read_preamble(connection)))
            tune(connection, preamble.role)
            if (preamble.security is Security.TLS) != (self._tls is not None):
                await self._refuse_security(preamble, connection, name)
            elif preamble.role is not self._opening:
                await self._on_data(preamble, connection)
            else:
                if self._tls is None and isinstance(self.address, TcpAddress) and self.address.loopback:
                    await self._check_user(preamble, connection, name)
                tunnel = None if self._tls is None else await self._greet(self._tls, connection)
                channel = await ControlChannel.over(connection, name, tunnel)
                close = channel.abort
                if self._tls is not None and tunnel is not None:
                    await self._check_name(self._tls, tunnel, channel)
                await self._on_control(channel)
        except (PostcopyError, OSError) as error:
            self._close(close, name, why(error))
        except asyncio.CancelledError:
            if asyncio.current_task() in self._unproven:
                close()  # the listener itself is closed
                raise
            self._close(close, name, f"{UNPROVEN_MAX} younger connections have not proved themselves either")
        except Exception:  # a mistake of ours: whoever called hears of it at once, and all others are still served
            log.exception("closed %s: internal error", name)
            close()

    def _close(self, close: Callable[[], None], name: str, why: str) -> None:
        self._lines.write(name, why)
        close()

    def _judge(self, preamble: Preamble) -> Preamble:
        """Return a preamble of a role that has a use here; ProtocolError for whoever took this agent for another."""
        if preamble.role in OPENING and preamble.role is not self._opening:
            raise ProtocolError(f"a {preamble.role.name.lower()} connection: {_MISTAKEN[preamble.role]}")
        return preamble

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

    @staticmethod
    async def _greet(tls: Credentials, connection: socket.socket) -> Tunnel:
        """Hold the TLS handshake; LinkError says why there is none."""
        tunnel = Tunnel(tls.for_listening())
        try:
            await greet(connection, tunnel)
        except LinkError as error:
            await farewell(connection)  # the alert that says why
            raise LinkError(f"no TLS: {error}") from error
        return tunnel

    async def _check_user(self, preamble: Preamble, connection: socket.socket, name: str) -> None:
        """Tell whoever is of another user than this agent's and root; ProtocolError then."""
        try:
            await check_dialler(connection)
        except ProtocolError as error:
            await _tell(await ControlChannel.over(connection, name), str(error), hears=preamble.role is Role.CONTROL)
            raise

    async def _check_name(self, tls: Credentials, tunnel: Tunnel, channel: ControlChannel) -> None:
        """Tell whoever has a certificate and is not wanted; ProtocolError then."""
        names = tunnel.names()
        if not tls.admits(names):
            who = ", ".join(sorted(names)) or "no name"
            takes = "destination takes no guest from" if self._opening is Role.CONTROL else "source gives nothing to"
            text = f"this {takes} {who}: its --allow names others"
            await _tell(channel, text, hears=self._opening is Role.CONTROL)
            raise ProtocolError(f"the certificate's name is not one that may come in: {who}")

    async def _refuse_security(self, preamble: Preamble, connection: socket.socket, name: str) -> None:
        """Answer in plain what wants TLS here and in plain what does not; ProtocolError in any case."""
        if preamble.security is Security.TLS:
            await farewell(connection, NO_TLS)
            raise ProtocolError("it wants TLS, and this agent takes plain connections only")
        if preamble.role in OPENING:
            ours, theirs = ("destination", "source") if preamble.role is Role.CONTROL else ("source", "destination")
            channel = await ControlChannel.over(connection, name)
            text = f"this {ours} takes TLS only: the {theirs} needs --tls-dir"
            await _tell(channel, text, hears=preamble.role is Role.CONTROL)
        raise ProtocolError("it wants no TLS, and this agent takes nothing else")


async def first_message(channel: ControlChannel) -> Message:
    """Return the first message; LinkError where it does not come in time, ProtocolError where it is none."""
    try:
        async with asyncio.timeout(FIRST_MESSAGE_SECONDS):
            return await channel.receive()
    except TimeoutError:
        raise LinkError(f"no message within {FIRST_MESSAGE_SECONDS:g} s") from None


async def _tell(channel: ControlChannel, text: str, *, hears: bool = True) -> None:
    """Refuse and close, behind the first message where the other end speaks first."""
    try:
        with contextlib.suppress(PostcopyError):  # it went without an answer
            if hears:
                await first_message(channel)
            channel.send(Refuse("host", text))
            await channel.close()
    finally:
        channel.abort()


class _Lines:
    """Lines of the log that strangers cause: so many in a while, and then the number of the others."""

    def __init__(self) -> None:
        self._caused = 0
        self._timer: asyncio.TimerHandle | None = None

    def write(self, name: str, why: str) -> None:
        """Write a line, or count it."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LINES_SECONDS, self.sum_up)
        self._caused += 1
        if self._caused <= LINES_MAX:
            log.warning("closed %s: %s", name, why)

    def sum_up(self) -> None:
        """Say how many lines were left out, and begin anew."""
        if self._timer is not None:
            self._timer.cancel()
        if self._caused > LINES_MAX:
            log.warning("closed %d more connections within %g s", self._caused - LINES_MAX, LINES_SECONDS)
        self._timer, self._caused = None, 0


async def connections(listening: socket.socket) -> AsyncIterator[socket.socket]:
    """Accept for ever, whatever one connection or another comes to."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            connection, _ = await loop.sock_accept(listening)
        except OSError as error:
            log.warning("cannot accept a connection: %s", reason(error))
            await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
        else:
            yield connection


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


def unbind(listening: socket.socket, address: Address) -> None:
    """Listen no more; the file of a Unix socket goes with it."""
    listening.close()
    if not isinstance(address, TcpAddress):
        Path(address.path).unlink(missing_ok=True)


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
