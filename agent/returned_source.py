"""`postcopy source --resume unix:PATH`: an agent that takes the place of one that was killed after the switchover.

The address of a keeper enters; the agent sends what is left and ends with the last page. Its admin socket knows what is
of use then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import metrics, notify, pausing
from agent.admin import Tell
from agent.daemon import DaemonOptions, Stop, first_of, reachable, serve_metrics
from agent.kept import take_place
from agent.one_source import change, describe_source, figures_of_source
from agent.security.options import credentials
from postcopy.errors import PostcopyError, UsageError
from postcopy.guest.kinds import kind_named
from postcopy.link.address import UnixAddress, parse_address
from postcopy.link.keeping import KeptGuest, Record
from postcopy.link.source import Source
from postcopy.link.tls import Credentials
from postcopy.session.states import SWITCHED, State

log = logging.getLogger("postcopy.agent")


@dataclass(frozen=True, kw_only=True)
class ReturnOptions(DaemonOptions):
    """What the command line says."""

    keeper: UnixAddress
    tls_dir: Path | None = None


async def serve_return(options: ReturnOptions) -> int:
    """Go on with what was left; return the exit status."""
    stop = Stop(options.parent)
    kept, record, mappings = await asyncio.to_thread(take_place, options.keeper)
    tls = credentials_for(record, options.tls_dir)
    kind = kind_named(record.guest[0])
    guest = KeptGuest(record, mappings, lambda memory, state: kind.empty(memory, record.guest[1]).load(state))
    source = Source(mappings, guest, poll_max_ns=options.poll_max_ns, give_up_after=options.give_up_after, keeping=kept)
    daemon = ReturnedSource(source, guest)
    serve_metrics(options, daemon.figures)
    words = f"source: takes the place of an agent that was killed, with {record.address}"
    async with reachable(options, daemon.commands(), daemon.figures, words):
        running = asyncio.create_task(source.take_up(record, tls=tls))
        over = asyncio.Event()
        running.add_done_callback(lambda _: over.set())
        await first_of(stop.asked, over)
        notify.tell("STOPPING=1\n")
        if stop.asked.is_set() and not over.is_set():
            await daemon.hurry()
            await first_of(stop.again, over)
        with contextlib.suppress(PostcopyError):
            if over.is_set():
                running.result()
        if source.state is State.FAILED:
            log.info("source: the guest never ran anywhere else and runs here again, until this agent ends")
            await stop.asked.wait()
    if source.state in {State.LOST, State.COMPLETED}:
        kept.release()
    return daemon.verdict()


def credentials_for(record: Record, tls_dir: Path | None) -> Credentials | None:
    """Return what the migration is encrypted with, as it was; UsageError where that is not had."""
    if not record.tls:
        return None
    if tls_dir is None:
        raise UsageError("the migration that is to be resumed is encrypted: --tls-dir")
    return credentials(parse_address(record.address), tls_dir, insecure=False)


class ReturnedSource:
    """The commands of its admin socket, and its end."""

    def __init__(self, source: Source, guest: KeptGuest) -> None:
        self._source = source
        self._guest = guest

    def commands(self) -> dict[str, Any]:
        """Return the commands of the admin socket."""
        return {
            "status": self.status,
            "set": self.set,
            "pause": self.pause,
            "resume": self.resume,
            "cancel": self.cancel,
        }

    async def hurry(self) -> None:
        """Send what is still here as fast as it goes."""
        log.warning("source: pages of the running guest are still here: signal again to end now")
        self._source.set_rate(None)
        await self._source.start_push()

    def verdict(self) -> int:
        """Say who owns the guest now, and return the exit status that says the same."""
        state = self._source.state
        if state in SWITCHED:
            log.warning("source: pages of the running guest stay with the keeper: take them up again with --resume")
            return 5
        if state is State.LOST:
            log.error("source: the guest is lost: pages that were still here are given up")
            return 6
        if state is State.COMPLETED:
            log.info("source: the guest is at the destination; nothing of it is left here")
        return 0

    async def status(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Say where the migration is."""
        return describe_source(self._source)

    async def set(self, arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Change the running migration: limit its push, begin a push that was left out."""
        return await change(self._source, arguments)

    async def pause(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Close the connections."""
        self._source.pause()
        return await pausing.paused(self._source)

    async def resume(self, arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Have it go on."""
        self._source.resume(pausing.another_address(self._source, arguments))
        return await pausing.resumed(self._source)

    async def cancel(self, arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Give up what is paused; nothing else can be cancelled any more."""
        if not arguments.get("lost"):
            raise UsageError("no migration can be cancelled: the guest runs at the destination")
        self._source.lose()
        return await pausing.lost(self._source)

    def figures(self) -> metrics.Figures:
        """Return what a scrape shows."""
        return figures_of_source(self._source)
