"""The daemon of a source: one guest, its way out, and the commands of the admin socket.

A source and its guest enter, which began here (agent/new_source.py) or was kept (agent/returned_source.py); answers
and figures leave, and the exit status.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from agent import metrics
from agent.admin import Tell
from agent.counts import Totals
from agent.daemon import DaemonOptions, Stop, end_without_cleaning
from agent.departure import Departure
from agent.kept import Kept
from agent.look import CELLS, look
from agent.one_source import describe_source, figures_of_source
from agent.running_guest import CHECK, Use, check_guest, describe_guest
from postcopy.errors import UsageError
from postcopy.guest import WorkloadGuest
from postcopy.link.address import UnixAddress
from postcopy.link.keeping import KeptGuest
from postcopy.link.source import Source


@dataclass(frozen=True, kw_only=True)
class LeavingOptions(DaemonOptions):
    """What the command line of every source says."""

    keeper: UnixAddress | None = None
    tls_dir: Path | None = None


class SourceDaemon:
    """One guest, its source, and the commands of its admin socket. `over` is set where nothing is left to do."""

    def __init__(self, options: LeavingOptions) -> None:
        self.options = options
        self.over = asyncio.Event()
        self.use = Use()
        self._home: WorkloadGuest | KeptGuest | None = None
        self.departure: Departure | None = None
        self._totals = Totals()

    def depart_by(self, source: Source, guest: WorkloadGuest | KeptGuest, kept: Kept | None = None) -> Departure:
        """Have the guest leave by this way; with one that was `kept` this agent is over, too."""
        options = self.options
        self._home = guest
        self.departure = Departure(
            source,
            self.use,
            self.over,
            self._totals,
            tls_dir=options.tls_dir,
            keeper=options.keeper,
            kept=kept,
        )
        return self.departure

    async def finish(self, stop: Stop) -> None:
        """Bring what uses the guest to its end, or the process in the middle of it."""
        await self._departing().finish(stop, lambda: end_without_cleaning(self.verdict(), self.options.admin))

    def verdict(self) -> int:
        """Say who owns the guest now, and return the exit status that says the same."""
        return self._departing().verdict()

    def _departing(self) -> Departure:
        if self.departure is None:
            raise UsageError("this agent is still filling its guest's memory")
        return self.departure

    # --- the admin socket's commands ------------------------------------------------------------------------------

    def commands(self) -> dict[str, Any]:
        """Return the commands of the admin socket."""
        return {
            "status": self.status,
            "look": self.look,
            "check": self.check,
            **self._departing().commands(),
        }

    async def status(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Say where the guest and the latest migration are."""
        guest = self._guest()
        shown = {"workload": guest.workload, **describe_guest(guest)} if guest is not None else None
        return describe_source(self._departing().source, shown, self.use.what)

    async def look(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Say how the migration goes, for whoever looks again and again."""
        source = self._departing().source
        return look(self.figures(), source.layout.size, self._guest(), source.residency(CELLS), source)

    def _guest(self) -> WorkloadGuest | None:
        """Return the guest while it is here."""
        return self._home_guest() if self._departing().guest_here else None

    def _home_guest(self) -> WorkloadGuest | None:
        """Return the guest, also once it has left; None where it never ran in this process."""
        return cast("WorkloadGuest | None", self._home.guest if isinstance(self._home, KeptGuest) else self._home)

    async def check(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Compare every byte of the guest's memory while it stands still, and let it go on."""
        with self.use.take(CHECK):
            guest = self._guest()
            if guest is None:
                raise UsageError("the guest cannot be checked here: it has left")
            found = await check_guest(guest, lambda: self._guest() is guest)
            return {"schema_version": 1, "role": "source", **found}

    # --- metrics --------------------------------------------------------------------------------------------------

    def _standing(self) -> metrics.Figures:
        return metrics.Figures("source") if self.departure is None else figures_of_source(self.departure.source)

    def figures(self) -> metrics.Figures:
        """Return how it stands, and what its latest migration has counted."""
        return replace(self._standing(), counts=self._totals.latest("source"))

    def scraped(self) -> metrics.Figures:
        """Return what a scrape shows."""
        figures, guest = self._standing(), self._home_guest()
        figures.counts = self._totals.counts()
        figures.counts.stall = guest.stall if guest is not None else None
        return figures
