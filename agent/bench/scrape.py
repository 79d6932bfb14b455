"""Reading the daemons' metrics: once, to compare with the report, and again and again, to see what that costs.

Addresses enter; figures leave. Of what is read again and again only the status is looked at: a Prometheus lives on a
host of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

REQUEST = b"GET /metrics HTTP/1.0\r\nHost: agent\r\n\r\n"
REQUEST_AGAIN = b"GET /metrics HTTP/1.1\r\nHost: agent\r\n\r\n"
ANSWERED = b"HTTP/1.1 200"
ANSWER_SECONDS = 5.0
ANSWER_BYTES = 1 << 16

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
    """How often metrics were answered, and how often they should have been asked for; whole once all has ended."""

    answers: int = 0
    wanted: float = 0.0


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
async def scraping(addresses: Sequence[HostPort | None], per_second: int) -> AsyncIterator[Scraped]:
    """Read the metrics of all addresses so often while the block runs, in threads: what they take, nobody else has.

    Whoever has no address should have been asked, too.
    """
    ending = threading.Event()
    scraped = Scraped()
    known = [(one, Scraped()) for one in addresses if one is not None]
    began = time.monotonic()
    starts = [index / len(known) / per_second for index in range(len(known))]  # never all of them at one moment
    readers = [
        asyncio.create_task(asyncio.to_thread(_repeat, one, own, start, 1 / per_second, ending))
        for (one, own), start in zip(known, starts, strict=True)
    ]
    try:
        yield scraped
    finally:
        ending.set()
        scraped.wanted = (time.monotonic() - began) * per_second * len(addresses)
        await asyncio.gather(*readers, return_exceptions=True)
        scraped.answers = sum(own.answers for _, own in known)


def _repeat(address: HostPort, own: Scraped, start: float, period: float, ending: threading.Event) -> None:
    """Read again and again, on a connection that is kept as a Prometheus keeps its own."""
    ending.wait(start)
    while not ending.is_set():
        try:
            with socket.create_connection(address, ANSWER_SECONDS) as connection:
                _read_on(connection, own, period, ending)
        except OSError:
            ending.wait(period)


def _read_on(connection: socket.socket, own: Scraped, period: float, ending: threading.Event) -> None:
    """Ask, and wait for the first piece of the answer; OSError at the end. A longer look would take the guest's time.

    The rest, where an answer comes in more than one piece, is there before the next one is asked for.
    """
    connection.settimeout(None)  # the kernel minds the time: that is a system call less, each time
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(ANSWER_SECONDS), 0))
    answer = bytearray(ANSWER_BYTES)
    while not ending.is_set():
        time.sleep(period)
        with contextlib.suppress(BlockingIOError):
            while connection.recv_into(answer, flags=socket.MSG_DONTWAIT):
                pass
        connection.sendall(REQUEST_AGAIN)
        if not connection.recv_into(answer):
            raise ConnectionError("the agent closed the connection")
        own.answers += answer.startswith(ANSWERED)
