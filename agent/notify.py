"""What systemd is told of a daemon: that it is ready, how it stands, that it lives, that it ends (sd_notify(3)).

Words enter; datagrams to the socket that NOTIFY_SOCKET names leave, and nothing where it names none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Sequence

from agent.metrics import Figures
from postcopy.link.rounds import next_round
from postcopy.pages.units import format_size
from postcopy.session.states import ENDED, State

# How often a status that changed is told, where no watchdog asks for more.
STATUS_SECONDS = 1.0

UNKNOWN = "how it stands is not known: see its log"

log = logging.getLogger("postcopy.agent")


def tell(lines: str) -> None:
    """Send lines, each NAME=value; one that cannot be sent is none that anybody waits for."""
    with contextlib.suppress(OSError):
        send(lines)


def send(lines: str, descriptors: Sequence[int] = ()) -> None:
    """Send lines and descriptors, if anybody is there to listen; OSError where they cannot be sent."""
    where = os.environ.get("NOTIFY_SOCKET")
    if not where:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        connection.connect("\0" + where[1:] if where.startswith("@") else where)
        socket.send_fds(connection, [lines.encode()], descriptors)


async def keep_telling(figures: Callable[[], Figures]) -> None:
    """Tell the status whenever it has changed, and the watchdog, in the event loop, that this very loop goes round.

    What is wrong with the figures is no reason to have systemd end a daemon that a guest may need.
    """
    patience = watchdog_seconds()
    told = now = ""
    while os.environ.get("NOTIFY_SOCKET"):
        try:
            now = in_words(figures())
        except Exception:
            if now != UNKNOWN:
                log.exception("internal error: how this agent stands cannot be told")
            now = UNKNOWN
        if now != told or patience is not None:
            tell(f"STATUS={now}\n" + ("WATCHDOG=1\n" if patience is not None else ""))
        told = now
        await next_round(STATUS_SECONDS if patience is None else min(STATUS_SECONDS, patience / 2))


def in_words(now: Figures) -> str:
    """Say in a line how a daemon stands, for `systemctl status`."""
    if now.state is State.POSTCOPY_ACTIVE:
        return f"{now.state}: {format_size(now.remaining_bytes)} of the guest's memory are still at the source"
    if now.owns_guest:
        return "owns a guest" if now.state is State.NONE else f"owns a guest; latest migration: {now.state}"
    if now.state in {State.NONE, *ENDED}:
        return f"no guest is here; latest migration: {now.state}"
    return f"{now.state}: a guest is about to come"


def watchdog_seconds() -> float | None:
    """Return how long systemd waits for a sign of life of this process; None: it does not (sd_watchdog_enabled(3))."""
    meant = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if meant and microseconds.isdigit() and int(microseconds) else None
