"""The way to the other agent, for whoever dials: the source, or a destination that fetches.

An address enters; a connected control channel leaves, or a data connection that the other agent accepted.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, NamedTuple

from postcopy.errors import LinkError, ProtocolError
from postcopy.link.address import Address, TcpAddress
from postcopy.link.control import ControlChannel
from postcopy.link.data import await_accepted, shake_hands
from postcopy.link.sockets import check_peer, tune
from postcopy.link.tls import Credentials, Tunnel, dialled_name, greet
from postcopy.link.users import check_listener
from postcopy.pump.tls import TlsSession
from postcopy.wire.preamble import ACCEPTED, OPENING, Preamble, Role, Security, pack
from postcopy.wire.version import FETCH_SINCE, TLS_SINCE, VERSION_MIN


async def dial_control(address: Address, tls: Credentials | None = None) -> ControlChannel:
    """Connect and say that this is a control connection, encrypted where there is `tls`; LinkError says why not."""
    return await _dial_opening(address, Role.CONTROL, VERSION_MIN, tls)


async def dial_fetch(address: Address, tls: Credentials | None = None) -> ControlChannel:
    """Connect and say that memory is to be fetched, encrypted where there is `tls`; LinkError says why not."""
    return await _dial_opening(address, Role.FETCH, FETCH_SINCE, tls)


async def _dial_opening(address: Address, role: Role, version: int, tls: Credentials | None) -> ControlChannel:
    if tls is None:
        return await ControlChannel.over(await _dial(address, Preamble(role, version)), str(address))
    tunnel = Tunnel(tls.for_dialling(), dialled_name(address))
    connection = await _dial(address, Preamble(role, max(version, TLS_SINCE), security=Security.TLS))
    try:
        await greet(connection, tunnel)
    except (LinkError, OSError) as error:
        connection.close()
        why = reason(error) if isinstance(error, OSError) else error
        raise LinkError(f"TLS with {address}: {why}") from error
    except BaseException:
        connection.close()
        raise
    return await ControlChannel.over(connection, str(address), tunnel)


class DataConnection(NamedTuple):
    """A data connection that was accepted: a descriptor and, where it is encrypted, the session on it."""

    fd: int
    tls: TlsSession | None = None

    def close(self) -> None:
        """Close both."""
        if self.tls is not None:
            self.tls.close()
        os.close(self.fd)


async def dial_data(address: Address, preamble: Preamble, *, tls: bool = False) -> DataConnection:
    """Connect a data connection, prove it, wait until it is accepted; it is the caller's.

    With `tls` the preamble's token is not said but is the key.
    """
    role = preamble.role.name.lower()
    if tls:
        return await _dial_encrypted(address, preamble, role)
    connection = await _dial(address, preamble)
    try:
        answer = await asyncio.get_running_loop().sock_recv(connection, 1)
    except OSError as error:
        connection.close()
        raise LinkError(f"{address}, {role} connection: {reason(error)}") from error
    except BaseException:
        connection.close()
        raise
    if answer != ACCEPTED:
        connection.close()
        raise LinkError(f"{address} did not accept the {role} connection")
    connection.setblocking(True)
    return DataConnection(connection.detach())


async def _dial_encrypted(address: Address, preamble: Preamble, role: str) -> DataConnection:
    said = Preamble(preamble.role, preamble.version, preamble.migration_id, security=Security.TLS)
    connection = await _dial(address, said)
    session = None
    try:
        session = await shake_hands(connection, said, preamble.token, listens=False)
        await await_accepted(connection, session)
    except BaseException as error:
        if session is not None:
            session.close()
        connection.close()
        if isinstance(error, OSError):
            raise LinkError(f"{address}, {role} connection: {reason(error)}") from error
        if isinstance(error, LinkError):
            raise LinkError(f"{address} did not accept the {role} connection: {error}") from error
        raise
    return DataConnection(connection.detach(), session)


async def _dial(address: Address, preamble: Preamble) -> socket.socket:
    """Return a connected, tuned, non-blocking socket on which the preamble was sent."""
    loop = asyncio.get_running_loop()
    failure = OSError("its name has no address")
    for family, where in await _resolve(address):
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            tune(connection, preamble.role)
            await loop.sock_connect(connection, where)
            if connection.family == socket.AF_UNIX:
                check_peer(connection)
            elif preamble.security is Security.PLAIN and preamble.role in OPENING and address.loopback:
                await check_listener(connection)
            await loop.sock_sendall(connection, pack(preamble))
        except OSError as error:
            connection.close()
            failure = error
        except ProtocolError as error:
            connection.close()
            raise LinkError(f"{address}: {error}") from error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise LinkError(f"cannot connect to {address}: {reason(failure)}") from failure


async def _resolve(address: Address) -> list[tuple[int, Any]]:
    if not isinstance(address, TcpAddress):
        return [(socket.AF_UNIX, address.path)]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LinkError(f"cannot find the host of {address}: {reason(error)}") from error
    except UnicodeError as error:  # an empty label, or one of more than 63 characters
        raise LinkError(f"cannot find the host of {address}: this is no name of a host") from error
    return [(family, where) for family, _, _, _, where in found]


def reason(error: OSError) -> str:
    """Say what an OSError means, without its number; asyncio puts words of its own in place of the system's."""
    if error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__
