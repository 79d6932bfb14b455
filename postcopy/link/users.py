"""Whose the other end of a TCP connection within this host is: the kernel's own table of sockets says so.

A Unix socket has a mode and tells who dialled; loopback has neither, and anybody on this host may dial or listen there.
So where nothing else proves who that is, its user has to be this agent's or root, as with a Unix socket.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from postcopy.errors import ProtocolError
from postcopy.link.sockets import comes_in

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTENS = "0A"
_MAPPED = bytes(10) + b"\xff\xff"

Endpoint = tuple[bytes, int]
"""An address of 16 bytes, those of IPv4 mapped, and a port."""


class Row(NamedTuple):
    """One socket of this network namespace."""

    here: Endpoint
    there: Endpoint
    listens: bool
    user: int


async def check_dialler(connection: socket.socket) -> None:
    """ProtocolError unless whoever dialled is of this agent's user or root."""
    here, there = _endpoint(connection.getsockname()), _endpoint(connection.getpeername())
    rows = await asyncio.to_thread(_rows)
    _check({row.user for row in rows if (row.here, row.there) == (there, here)}, "dialled")


async def check_listener(connection: socket.socket) -> None:
    """ProtocolError unless whoever listens where this connection was dialled to is of this agent's user or root.

    The listening socket is looked for first: a connection has no user, which reads as root, until it is accepted.
    """
    here, there = _endpoint(connection.getsockname()), _endpoint(connection.getpeername())
    anywhere = {there[0], bytes(16), _MAPPED + bytes(4)}
    rows = await asyncio.to_thread(_rows)
    listening = {row.user for row in rows if row.listens and row.here[1] == there[1] and row.here[0] in anywhere}
    accepted = {row.user for row in rows if (row.here, row.there) == (there, here)}
    _check(listening or accepted, "listens there")


def _check(users: set[int], does: str) -> None:
    if not users:
        raise ProtocolError("the kernel does not say whose connection within this host that is")
    others = [user for user in users if not comes_in(user)]
    if others:
        who = f"user {min(others)} {does}"
        raise ProtocolError(f"{who}, who is neither this agent's user nor root: between users it takes --tls-dir")


def _rows() -> list[Row]:
    return [row for table in TABLES for row in _read(table)]


def _read(table: Path) -> Iterator[Row]:
    try:
        lines = table.read_text(encoding="ascii").splitlines()
    except OSError:  # a kernel without IPv6 has no table of it
        return
    for line in lines[1:]:
        _, here, there, state, _, _, _, user, *_ = line.split()
        yield Row(_parsed(here), _parsed(there), state == _LISTENS, int(user))


def _parsed(text: str) -> Endpoint:
    """Return an endpoint as these tables have it: words of the address in the host's order, and the port."""
    words, _, port = text.partition(":")
    address = b"".join(struct.pack("=I", int(words[at : at + 8], 16)) for at in range(0, len(words), 8))
    return _widened(address), int(port, 16)


def _endpoint(name: tuple[str, int]) -> Endpoint:
    address = ipaddress.ip_address(name[0].partition("%")[0]).packed
    return _widened(address), name[1]


def _widened(address: bytes) -> bytes:
    return address if len(address) == 16 else _MAPPED + address
