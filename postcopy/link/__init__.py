"""HOW do agents talk? Addresses, dialling and listening, the control channel, and the interpreters of both sides.

A guest and its memory enter `Source`, a port and a way to restore guests enter `Destination`; a migrated guest and the
report of its migration leave. `GuestBase` and `KindFromState` make a guest of one's own of what runs on the memory;
`Credentials` are the certificates that a migration is encrypted with. All are imported when they are first named: a
command line that only reads an address need not load the pumps.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from postcopy.link.destination import Destination
    from postcopy.link.guest import GuestBase, KindFromState
    from postcopy.link.source import Source
    from postcopy.link.tls import Credentials

__all__ = ["Credentials", "Destination", "GuestBase", "KindFromState", "Source"]

_HOMES = {
    "Credentials": "tls",
    "Destination": "destination",
    "GuestBase": "guest",
    "KindFromState": "guest",
    "Source": "source",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
