"""TLS on a data connection, before a pump has it: the migration's token is its key, and nothing else proves anything.

A connected, non-blocking socket and what its preamble says enter; a session whose handshake is over leaves, or
LinkError says why there is none.
"""

from __future__ import annotations

import asyncio
import socket

from postcopy.errors import LinkError
from postcopy.limits import HANDSHAKE_SECONDS
from postcopy.link.sockets import ready
from postcopy.pump.tls import TlsSession
from postcopy.wire.preamble import ACCEPTED, Preamble, psk_identity


async def shake_hands(connection: socket.socket, preamble: Preamble, token: bytes, *, listens: bool) -> TlsSession:
    """Prove the token to the other end and have it proved; the session is the caller's, the socket stays so."""
    identity = psk_identity(preamble.role, preamble.migration_id)
    session = TlsSession(connection.fileno(), listens=listens, identity=identity, key=token)
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            while (wanted := session.handshake()) != "done":
                await ready(connection, writable=wanted == "write")
    except TimeoutError:
        session.close()
        raise LinkError(f"no TLS: no handshake within {HANDSHAKE_SECONDS:g} s") from None
    except BaseException:
        session.close()
        raise
    return session


async def await_accepted(connection: socket.socket, session: TlsSession) -> None:
    """Wait for the byte that says that the connection is attached; LinkError if another comes, or none."""
    while (answer := session.receive(1)) is None:
        await ready(connection)
    if answer != ACCEPTED:
        raise LinkError("it was not accepted")
