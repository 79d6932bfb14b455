"""`postcopy source --resume unix:PATH`: an agent that takes the place of one that was killed after the switchover.

The address of a keeper enters; the agent sends what is left and ends with the last page. It is a source like any other:
where it turns out that the guest never ran anywhere else it runs on here, and may leave again.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from agent import notify
from agent.daemon import Stop, first_of, reachable, serve_metrics
from agent.kept import take_place
from agent.security.options import credentials
from agent.source_daemon import LeavingOptions, SourceDaemon
from postcopy.errors import PostcopyError, UsageError
from postcopy.guest.kinds import kind_named
from postcopy.link.address import UnixAddress, parse_address
from postcopy.link.keeping import KeptGuest, Record
from postcopy.link.source import Source
from postcopy.link.tls import Credentials
from postcopy.session.states import State

log = logging.getLogger("postcopy.agent")


@dataclass(frozen=True, kw_only=True)
class ReturnOptions(LeavingOptions):
    """What the command line says."""

    keeper: UnixAddress


async def serve_return(options: ReturnOptions) -> int:
    """Go on with what was left; return the exit status."""
    stop = Stop(options.parent)
    kept, record, mappings = await asyncio.to_thread(take_place, options.keeper)
    tls = credentials_for(record, options.tls_dir)
    kind = kind_named(record.guest[0])
    try:
        kind.check_host()
    except PostcopyError as error:  # mostly there are pages to be sent and no more, which needs nothing of it
        log.warning("source: should the guest turn out to have run nowhere else, it cannot run here: %s", error)
    guest = KeptGuest(record, mappings, lambda memory, state: kind.empty(memory, record.guest[1]).load(state))
    source = Source(mappings, guest, poll_max_ns=options.poll_max_ns, give_up_after=options.give_up_after)
    daemon = SourceDaemon(options)
    departure = daemon.depart_by(source, guest, kept)
    serve_metrics(options, daemon.scraped)

    async def go_on() -> None:
        try:
            await departure.take_up(record, tls)
        except BaseException:  # it never began
            daemon.over.set()
            raise
        if source.state is State.FAILED:
            log.info("source: the guest never ran anywhere else and runs here again, until this agent ends")

    if record.held:
        log.warning("source: somebody paused this migration: it waits for postcopy resume")
    going_on = asyncio.create_task(go_on())
    words = f"source: takes the place of an agent that was killed, with {record.elsewhere or record.address}"
    try:
        async with reachable(options, daemon.commands(), daemon.figures, words):
            await first_of(stop.asked, daemon.over)
            notify.tell("STOPPING=1\n")
            await daemon.finish(stop)
            await going_on
    finally:
        guest.close()
    return daemon.verdict()


def credentials_for(record: Record, tls_dir: Path | None) -> Credentials | None:
    """Return what the migration is encrypted with, as it was; UsageError where that is not had."""
    if not record.tls:
        return None
    if tls_dir is None:
        raise UsageError("the migration that is to be resumed is encrypted: --tls-dir")
    return credentials(parse_address(record.address), tls_dir, insecure=False)
