"""`postcopy source --memory file:PATH`: serves a snapshot's memory file to every destination that fetches it.

Options enter; destinations come through the listening port. What becomes of one of them is no matter of this daemon's.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import metrics, notify
from agent.admin import Tell
from agent.counts import Totals, busiest, mode_of
from agent.daemon import DaemonOptions, Stop, reachable, serve_metrics
from agent.running_guest import describe_end
from postcopy import __version__
from postcopy.errors import UsageError
from postcopy.link.address import Address
from postcopy.link.fetched import FetchedInterpreter
from postcopy.link.snapshot import Snapshot
from postcopy.link.tls import Credentials
from postcopy.pages.units import format_size
from postcopy.session.commands import Finish
from postcopy.session.states import State

# Commands of the admin socket that this agent has no use for.
NEED_GUEST = ("migrate", "cancel", "check", "pause", "resume")

log = logging.getLogger("postcopy.agent")


@dataclass(frozen=True, kw_only=True)
class SnapshotOptions(DaemonOptions):
    """What the command line of `postcopy source --memory file:PATH` says."""

    path: Path
    listen: Address
    rate: int | None
    tls: Credentials | None


async def serve_snapshot(options: SnapshotOptions) -> int:
    """Run the daemon; return its exit status."""
    stop = Stop(options.parent)
    daemon = SnapshotDaemon(options)
    serve_metrics(options, daemon.figures)
    async with daemon.snapshot as snapshot:
        address = str(snapshot.address)
        words = f"source: {options.path} ({format_size(snapshot.file.size)}) is served at {address}"
        async with reachable(options, daemon.commands(), daemon.figures, words, address):
            await stop.asked.wait()
            notify.tell("STOPPING=1\n")
            return daemon.verdict()


class SnapshotDaemon:
    """One file, the destinations that fetch it, and the commands of the admin socket."""

    def __init__(self, options: SnapshotOptions) -> None:
        self.options = options
        self.snapshot = Snapshot(
            options.path,
            options.listen,
            rate=options.rate,
            poll_max_ns=options.poll_max_ns,
            ended=self._note,
            tls=options.tls,
        )
        self._latest: Finish | None = None
        self._totals = Totals()

    def _note(self, one: FetchedInterpreter) -> None:
        """Take note of a destination's end."""
        self._latest = one.finish
        self._totals.end(one)
        if one.finish is not None:
            self._totals.note("source", mode_of(one.machine.report), one.finish.state)

    def verdict(self) -> int:
        """Say who still needed this daemon, and return the exit status that says the same."""
        unserved = self.snapshot.unserved
        if unserved:
            log.error(
                "source: %d destinations lack pages of this snapshot, and wait until it is served again", unserved
            )
            return 5
        log.info("source: ends; every destination has what it needs")
        return 0

    # --- the admin socket's commands ------------------------------------------------------------------------------

    def commands(self) -> dict[str, Any]:
        """Return the commands of the admin socket."""
        return {"status": self.status, "set": self.set, **dict.fromkeys(NEED_GUEST, self.refuse)}

    async def refuse(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Refuse what needs a guest."""
        raise UsageError(
            "this source serves a snapshot: it has no guest; whoever fetches from it (--from) dials, and is paused, "
            "resumed and given up where he is"
        )

    async def status(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Say who fetches and how far each is."""
        current = list(self.snapshot.current)
        return {
            "schema_version": 1,
            "role": "source",
            "version": __version__,
            "pid": os.getpid(),
            "state": busiest(one.machine.state for one in current).value,
            "owner": None,
            "in_use": None,
            "address": str(self.snapshot.address),
            "snapshot": str(self.options.path),
            "guest": None,
            "memory": [{"type": "file", "page_size": 4096, "size_bytes": self.snapshot.file.size}],
            "pages": {
                "total": sum(one.machine.pages for one in current),
                "placed": sum(one.machine.placed_pages for one in current),
            },
            "destinations": [
                {
                    "name": one.name,
                    "state": one.machine.state.value,
                    "pages": {"total": one.machine.pages, "placed": one.machine.placed_pages},
                }
                for one in current
            ],
            "ended": describe_end(self._latest),
            "ended_count": self._totals.ended,
            "report": None,
        }

    async def set(self, arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Limit the push to each destination."""
        if "rate" in arguments:
            self.snapshot.set_rate(arguments["rate"])
        if arguments.get("push"):
            raise UsageError("whether pages are pushed is each destination's own choice (--no-push)")
        return {"schema_version": 1, "state": busiest(one.machine.state for one in self.snapshot.current).value}

    # --- metrics --------------------------------------------------------------------------------------------------

    def figures(self) -> metrics.Figures:
        """Return what a scrape shows: all destinations together."""
        current = list(self.snapshot.current)
        figures = metrics.Figures("source", busiest(one.machine.state for one in current))
        figures.counts = self._totals.counts(current)
        for one in current:
            if one.machine.state is State.POSTCOPY_ACTIVE and one.layout is not None:
                left = one.machine.pages - one.machine.placed_pages
                figures.remaining_bytes += one.layout.size * left // one.machine.pages
        return figures
