"""The source's way to the destination: every connection is dialled from here.

An address enters; a connected control channel leaves, or a data connection that the destination accepted.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

from postcopy.errors import LinkError, ProtocolError
from postcopy.link.address import Address, TcpAddress
from postcopy.link.control import ControlChannel
from postcopy.link.sockets import check_peer, tune
from postcopy.wire.preamble import ACCEPTED, Preamble, Role, pack


async def dial_control(address: Address) -> ControlChannel:
    """Connect and say that this is a control connection; LinkError says why it could not."""
    connection = await _dial(address, Preamble(Role.CONTROL))
    return await ControlChannel.over(connection, str(address))


async def dial_data(address: Address, preamble: Preamble) -> int:
    """Connect a data connection, prove it, wait until it is accepted; its descriptor is the caller's."""
    role = preamble.role.name.lower()
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
    return connection.detach()


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
    return [(family, where) for family, _, _, _, where in found]


def reason(error: OSError) -> str:
    """Say what an OSError means, without its number; asyncio puts words of its own in place of the system's."""
    if error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__
