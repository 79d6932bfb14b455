"""HOW do agents talk? Addresses, dialling and listening, the control channel, and the interpreters of both sides.

A guest and its memory enter `Source`, a port and a way to restore guests enter `Destination`; a migrated guest and the
report of its migration leave. Both are imported when they are first named: a command line that only reads an address
need not load the pumps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from postcopy.link.destination import Destination
    from postcopy.link.source import Source

__all__ = ["Destination", "Source"]


def __getattr__(name: str) -> Any:
    if name == "Source":
        from postcopy.link.source import Source  # noqa: PLC0415 - the point of it

        return Source
    if name == "Destination":
        from postcopy.link.destination import Destination  # noqa: PLC0415 - the point of it

        return Destination
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
