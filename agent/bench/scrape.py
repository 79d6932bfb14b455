"""Reading the daemons' metrics: once, to compare with the report, and again and again, to see what that costs.

Addresses enter; figures leave. Of what is read again and again only the status is looked at: a Prometheus lives on a
host of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from agent.bench._floor import ffi, lib
from postcopy.errors import HostError

REQUEST = b"GET /metrics HTTP/1.0\r\nHost: agent\r\n\r\n"
ANSWER_SECONDS = 5.0
# Of a connection that is not made.
NOBODY = -1

HostPort = tuple[str, int]


def metrics_address(log: str) -> HostPort | None:
    """Return where a daemon that wrote this log serves its metrics, None where it does not."""
    found = re.search(r"http://(\S+):(\d+)/metrics", log)
    return (found[1], int(found[2])) if found else None


async def read(address: HostPort) -> bytes:
    """Return what is answered, header and all."""
    async with asyncio.timeout(ANSWER_SECONDS):
        reader, writer = await asyncio.open_connection(*address)
        try:
            writer.write(REQUEST)
            return await reader.read()
        finally:
            writer.close()


@dataclass(slots=True)
class Scraped:
    """How often metrics were answered, and how often they should have been asked for; whole once all has ended.

    They were asked for from `since_ns` to `until_ns` of CLOCK_MONOTONIC; `since_ns` 0: never.
    """

    answers: int = 0
    wanted: float = 0.0
    since_ns: int = 0
    until_ns: int = 0


async def scrape(address: HostPort | None) -> dict[str, float]:
    """Return the metrics there; nothing where nobody answers."""
    if address is None:
        return {}
    try:
        answer = await read(address)
    except (OSError, TimeoutError):
        return {}
    return parse_metrics(answer.partition(b"\r\n\r\n")[2].decode())


def parse_metrics(text: str) -> dict[str, float]:
    """Return each metric of the exposition format summed over its labels, buckets left out."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#") and "_bucket{" not in line:
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


@asynccontextmanager
async def scraping(
    addresses: Sequence[HostPort | None], per_second: int, *, window_ns: int = 0
) -> AsyncIterator[Scraped]:
    """Read the metrics of all addresses so often while the block runs, with `window_ns` in every other such window.

    Whoever has no address should have been asked, too.
    """
    known = [one for one in addresses if one is not None]
    scraped = Scraped()
    began, ending = time.monotonic(), os.eventfd(0)
    # A thread that leaves the GIL alone: what it takes, nobody else has.
    asking = asyncio.create_task(asyncio.to_thread(_ask_on, known, per_second, window_ns, ending))
    try:
        yield scraped
    finally:
        scraped.until_ns = time.monotonic_ns()
        scraped.wanted = (time.monotonic() - began) * per_second * len(addresses) * (0.5 if window_ns else 1.0)
        os.eventfd_write(ending, 1)
        scraped.answers, scraped.since_ns = await asking
        os.close(ending)


def asks(at_ns: int, window_ns: int) -> bool:
    """Return whether metrics are asked for at a moment of CLOCK_MONOTONIC."""
    return bool(lib.asker_asks(window_ns, at_ns))


def _ask_on(addresses: Sequence[HostPort], per_second: int, window_ns: int, ending: int) -> tuple[int, int]:
    """Ask until `ending` is readable, on connections that are kept as a Prometheus keeps its own.

    Return how many answers came, and when the first question was asked, 0 where none was.
    """
    if not addresses:
        return 0, 0
    period_ns = 1_000_000_000 // per_second
    connections: list[socket.socket | None] = [None] * len(addresses)
    sockets = ffi.new("int[]", [NOBODY] * len(addresses))
    fields = {"connections": sockets, "count": len(sockets), "ending": ending}
    asker = ffi.new("struct asker *", {**fields, "period_ns": period_ns, "window_ns": window_ns})
    try:
        while 0 <= (ended := lib.asker_run(asker)) < len(sockets):
            if (left := connections[ended]) is not None:
                left.close()
            connections[ended] = _dialled(addresses[ended], period_ns / 1e9)
            sockets[ended] = NOBODY if (made := connections[ended]) is None else made.fileno()
            asker.unanswered &= ~(1 << ended)
    finally:
        for connection in filter(None, connections):
            connection.close()
    if ended < 0:
        raise HostError(f"metrics cannot be asked for any longer: {os.strerror(-ended)}")
    return int(asker.answers), int(asker.first_ns)


def _dialled(address: HostPort, seconds: float) -> socket.socket | None:
    """Return a connection, None where there is none so soon: it is tried again when its turn comes."""
    with contextlib.suppress(OSError):
        return socket.create_connection(address, seconds)
    return None
