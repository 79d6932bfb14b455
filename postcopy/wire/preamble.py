"""The preamble: the first 64 bytes of every connection, which say what it is for.

What enters: the first bytes of a connection that anybody may have opened. What leaves: its role, whether TLS follows,
and for a data connection the migration that it belongs to and, without TLS, its proof; or the reason to close it.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from postcopy.errors import ProtocolError
from postcopy.limits import MIGRATION_ID_BYTES, TOKEN_BYTES
from postcopy.wire.version import FETCH_SINCE, TLS_SINCE, VERSION, VERSION_MIN, check_version

PREAMBLE_MAGIC = b"POSTCOPY"
_LAYOUT = struct.Struct(f"<8sHHI{MIGRATION_ID_BYTES}s{TOKEN_BYTES}s")
PREAMBLE_BYTES = _LAYOUT.size

# What the destination sends on a data connection once it is attached.
ACCEPTED = b"\x06"

# What a destination that takes plain connections only sends in place of a TLS server's first record: the fatal alert
# handshake_failure (RFC 8446, 6.2), which every TLS client understands.
NO_TLS = bytes.fromhex("15 0303 0002 02 28")

# What the source answers to ACCEPTED on a memory connection: the byte that the files of all regions travel with.
FILES = b"\x46"

_NO_ID = bytes(MIGRATION_ID_BYTES)
_NO_TOKEN = bytes(TOKEN_BYTES)


class Role(IntEnum):
    """What a connection is for. Zero means nothing."""

    INVALID = 0
    CONTROL = 1
    URGENT = 2
    PUSH = 3
    MEMORY = 4
    FETCH = 5


# Those over which messages go, which come before there is a migration.
OPENING = frozenset({Role.CONTROL, Role.FETCH})


class Security(IntEnum):
    """What follows the preamble: the connection's own bytes, or a TLS handshake and they inside of it."""

    PLAIN = 0
    TLS = 1


class Preamble(NamedTuple):
    """What a preamble says.

    `version` is the version agreed on; on a control or fetch connection, where none is yet, the lowest that whoever
    dials speaks. `migration_id` (16 bytes) and `token` (32 bytes) are the ones of WELCOME, and all zero on these
    two. With TLS the token does not travel here: it is the key of the handshake that follows.
    """

    role: Role
    version: int = VERSION_MIN
    migration_id: bytes = _NO_ID
    token: bytes = _NO_TOKEN
    security: Security = Security.PLAIN

    def __repr__(self) -> str:
        # A token in a log would let its reader join the migration.
        what = f"{self.role.name}, {self.security.name}, version {self.version}"
        return f"Preamble({what}, migration {self.migration_id.hex()})"


def pack(preamble: Preamble) -> bytes:
    """Return the 64 bytes of a preamble."""
    if len(preamble.migration_id) != MIGRATION_ID_BYTES or len(preamble.token) != TOKEN_BYTES:
        raise ValueError(f"a migration id has {MIGRATION_ID_BYTES} bytes, a token {TOKEN_BYTES}")
    return _LAYOUT.pack(
        PREAMBLE_MAGIC, preamble.version, preamble.role, preamble.security, preamble.migration_id, preamble.token
    )


def psk_identity(role: Role, migration_id: bytes) -> str:
    """Return the name under which a data connection's key is offered: it binds role and migration to the handshake."""
    return f"postcopy {role.name.lower()} {migration_id.hex()}"


def check_start(data: bytes) -> None:
    """Raise ProtocolError as soon as `data`, the bytes so far, cannot become a preamble.

    A stranger that sends less than 64 bytes and then waits is known by its first eight.
    """
    start = data[: len(PREAMBLE_MAGIC)]
    if not PREAMBLE_MAGIC.startswith(start):
        raise ProtocolError(f"not a postcopy connection: it begins with {_readable(start)}")


def unpack(data: bytes) -> Preamble:
    """Return what a preamble says; ProtocolError with the reason if it is none, or none that is spoken here.

    Fewer than 64 bytes are a connection that ended too early. The token is compared by whoever knows the
    right one.
    """
    check_start(data)
    if len(data) != PREAMBLE_BYTES:
        raise ProtocolError(f"the connection ended inside its preamble, after {len(data)} of {PREAMBLE_BYTES} bytes")
    _, version, role_number, security_number, migration_id, token = _LAYOUT.unpack(data)
    # The lowest version of a source that is older than this agent may lie below; HELLO settles it.
    if version == 0 or version > VERSION:
        check_version(version)
    if role_number not in set(Role) - {Role.INVALID}:
        raise ProtocolError(f"preamble refused: unknown role {role_number}")
    if security_number not in set(Security):
        raise ProtocolError("preamble refused: reserved bits are set")
    preamble = Preamble(Role(role_number), version, migration_id, token, Security(security_number))
    _check_proof(preamble)
    return preamble


def _check_proof(preamble: Preamble) -> None:
    """Refuse what a connection of this role and security has no use for, and the lack of what it needs."""
    named, token = preamble.migration_id != _NO_ID, preamble.token != _NO_TOKEN
    tls = preamble.security is Security.TLS
    if tls and preamble.version < TLS_SINCE:
        raise ProtocolError(f"preamble refused: version {preamble.version} has no TLS")
    if preamble.role is Role.FETCH and preamble.version < FETCH_SINCE:
        raise ProtocolError(f"preamble refused: in version {preamble.version} nothing is fetched")
    if preamble.role in OPENING:
        if named or token:
            what = preamble.role.name.lower()
            raise ProtocolError(f"preamble refused: a {what} connection has no migration id and no token")
        return
    check_version(preamble.version)
    if tls and token:
        raise ProtocolError("preamble refused: with TLS a token does not travel in the clear")
    if not named or not (token or tls):
        raise ProtocolError("preamble refused: a data connection needs a migration id and a token")


def _readable(data: bytes) -> str:
    """Quote bytes for a log line: what is no printable ASCII is escaped."""
    return repr(data)[1:]
