"""Options of every socket that carries a migration, in one place, with the reason beside each.

A fresh socket enters; it leaves without delay, with an end to silence, and with as much buffer as its role may have.
Of a Unix socket the kernel says who is at the other end. Who reads and writes by himself waits here until he may.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import struct

from postcopy.errors import ProtocolError
from postcopy.limits import (
    KEEPALIVE_COUNT,
    KEEPALIVE_IDLE_SECONDS,
    KEEPALIVE_INTERVAL_SECONDS,
    PUSH_RECEIVE_BYTES,
    PUSH_SEND_BYTES,
    UNACKNOWLEDGED_MS,
)
from postcopy.wire.preamble import Role

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def tune(connection: socket.socket, role: Role) -> None:
    """Set the options that `role` wants. Unix sockets know no TCP and keep the kernel's buffers."""
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
    if role is Role.PUSH:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PUSH_SEND_BYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PUSH_RECEIVE_BYTES)


async def ready(connection: socket.socket, *, writable: bool = False) -> None:
    """Wait until a socket can be read, or else written."""
    loop = asyncio.get_running_loop()
    came = asyncio.Event()
    watch, leave = (loop.add_writer, loop.remove_writer) if writable else (loop.add_reader, loop.remove_reader)
    watch(connection.fileno(), came.set)
    try:
        await came.wait()
    finally:
        leave(connection.fileno())


def name_of(connection: socket.socket) -> str:
    """Name the other end for a log line."""
    if connection.family == socket.AF_UNIX:
        pid, uid = peer_of(connection)
        return f"process {pid} of user {uid}"
    try:
        host, port = connection.getpeername()[:2]
    except OSError:
        return "a connection that is gone"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def network_of(connection: socket.socket) -> str:
    """Name where a connection comes from: its address, of IPv6 the part that a single host cannot choose."""
    if connection.family == socket.AF_UNIX:
        return ""
    try:
        address = ipaddress.ip_address(connection.getpeername()[0].partition("%")[0])
    except (OSError, ValueError):
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:  # over a socket that takes both kinds
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address), 64), strict=False))


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return the process at the other end of a Unix socket, as it was when it connected or listened, and its user."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(packed)
    return pid, uid


def comes_in(user: int) -> bool:
    """Whether processes of a user may speak to this one within a host: root's and its own."""
    return user in {0, os.geteuid()}


def check_peer(connection: socket.socket) -> int:
    """Return the process at the other end of a Unix socket; ProtocolError unless it is root's or this user's."""
    pid, uid = peer_of(connection)
    if not comes_in(uid):
        raise ProtocolError(f"process {pid} of user {uid} is neither of this agent's user nor root")
    return pid
