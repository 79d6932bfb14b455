"""Versions of the protocol, and how two agents agree on one.

What enters: the range of versions that the other agent speaks. What leaves: the highest that both do, or none. Each
agent speaks the current version and the one before.

    3  memory that is handed over: LAYOUT_OFFER says so, its files come on a connection of their own;
       TLS: a preamble says whether it follows; the fetch connection, and what WELCOME asks for over it;
       recovery: RESUME, HAVE and ALIVE messages, BEAT frames;
       how long faults and vCPUs have waited, in PROGRESS and ALL_PLACED
    2  PROGRESS, PROBE and PROBED messages; how much data there is, in LAYOUT_OFFER
    1  the first
"""

from __future__ import annotations

from postcopy.errors import ProtocolError

VERSION = 3
VERSION_MIN = 2

# From here on a connection may be encrypted; on such a one nothing older is spoken.
TLS_SINCE = 3

# From here on a destination may fetch.
FETCH_SINCE = 3

# From here on an offer may say that the memory itself comes.
HANDED_OVER_SINCE = 3

# From here on both ends tell each other that they are there, and a migration survives its connections.
RECOVERY_SINCE = 3

# From here on a destination tells how long faults and vCPUs have waited there.
LATENCIES_SINCE = 3


def spoken() -> str:
    """Return the range of versions that this agent speaks, for messages: "2 to 3"."""
    return f"{VERSION_MIN} to {VERSION}"


def common(one: tuple[int, int], other: tuple[int, int]) -> int:
    """Return the highest version in both ranges (lowest, highest), 0 if there is none."""
    best = min(one[1], other[1])
    return best if best >= max(one[0], other[0]) else 0


def check_version(version: int) -> int:
    """Return `version` if it is spoken here; else ProtocolError."""
    if not VERSION_MIN <= version <= VERSION:
        raise ProtocolError(f"version {version} is not supported: this agent speaks {spoken()}")
    return version
