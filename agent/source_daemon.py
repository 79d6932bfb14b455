"""`postcopy source`: runs a guest and sends it away when it is asked to.

Options enter; the admin socket is the way to everything else. Ends with the status that says who owns the guest.
"""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import metrics, notify
from agent.admin import Tell
from agent.daemon import DaemonOptions, Stop, end_without_cleaning, first_of, reachable, serve_metrics
from agent.departure import Departure
from agent.kept import Kept, start_keeper
from agent.look import look
from agent.one_source import describe_source, figures_of_source
from agent.parameters import Memory
from agent.running_guest import CHECK, Use, check_guest, describe_guest
from postcopy.errors import UsageError
from postcopy.guest import WorkloadGuest
from postcopy.guest.kinds import kind_named
from postcopy.kernel import Mapping, memory_type_at
from postcopy.link.address import UnixAddress
from postcopy.link.source import Source
from postcopy.link.tls import Credentials
from postcopy.pages.regions import Region

log = logging.getLogger("postcopy.agent")


@dataclass(frozen=True, kw_only=True)
class SourceOptions(DaemonOptions):
    """What the command line of `postcopy source` says. Every memory has its size.

    `thp`: ask for huge pages. `holes`: what is blank is never written.
    """

    memory: tuple[Memory, ...]
    guest: str
    vcpus: int
    workload: str
    seed: int
    cpus: tuple[int, ...]
    steps_per_second: int
    steps_max: int | None
    blank: float
    thp: bool = False
    holes: bool = False
    keeper: UnixAddress | None = None
    tls_dir: Path | None = None


async def serve_source(options: SourceOptions) -> int:
    """Run the daemon; return its exit status."""
    if options.tls_dir is not None:
        Credentials(options.tls_dir).for_dialling()  # what is wrong with them is said now
    stop = Stop(options.parent)
    daemon = SourceDaemon(options)
    async with AsyncExitStack() as stack:
        serve_metrics(options, daemon.figures)
        await daemon.make_guest()
        await asyncio.to_thread(daemon.start_keeper)
        stack.callback(daemon.drop_guest)
        await stack.enter_async_context(daemon.source())
        daemon.guest.start()
        memory = ", ".join(one.describe() for one in options.memory)
        words = f"source: a guest of {options.vcpus} vCPUs runs {options.workload} on {memory}"
        await stack.enter_async_context(reachable(options, daemon.commands(), daemon.figures, words))
        await first_of(stop.asked, daemon.lost)
        notify.tell("STOPPING=1\n")
        await daemon.finish(stop)
    # Not before: up to here a migration may have gone on.
    return daemon.verdict()


class SourceDaemon:
    """One guest, its source, and the commands of its admin socket."""

    def __init__(self, options: SourceOptions) -> None:
        self.options = options
        self.lost = asyncio.Event()
        self.use = Use()
        self.guest: WorkloadGuest
        self._mappings: list[Mapping] = []
        self.departure: Departure | None = None
        self._kept: Kept | None = None
        self._migrations: dict[tuple[str, str, str], int] = {}

    async def make_guest(self) -> None:
        """Allocate and fill the guest's memory, in a thread."""
        await asyncio.to_thread(self._make_guest)

    def _make_guest(self) -> None:
        options = self.options
        kind = kind_named(options.guest, options.cpus)
        kind.check_host()
        try:
            for index, memory in enumerate(options.memory):
                self._mappings.append(self._allocate(index, memory))
            self.guest = kind.create(
                self._mappings,
                workload=options.workload,
                vcpus=options.vcpus,
                seed=options.seed,
                steps_per_second=options.steps_per_second,
                steps_max=options.steps_max,
                blank=options.blank,
                holes=options.holes,
            )
            self.guest.fill()
        except BaseException:
            self._give_back()
            raise

    def _allocate(self, index: int, memory: Memory) -> Mapping:
        kind = memory_type_at(memory.type, memory.place)
        region = Region(index, kind.name, kind.page_size, memory.size or 0)
        mapping = kind.allocate(region, alias=False, data=self._data_of(region))
        if self.options.thp:
            mapping.allow_huge_pages()
        return mapping

    def _data_of(self, region: Region) -> int:
        """Return how many bytes of a region the guest will write: what is blank lies at the end of all memory."""
        options = self.options
        if not options.holes:
            return region.size
        sizes = [memory.size or 0 for memory in options.memory]
        active = math.ceil(sum(sizes) * (1 - options.blank))
        return min(region.size, max(0, active - sum(sizes[: region.index])))

    def _give_back(self) -> None:
        for mapping in self._mappings:
            mapping.close()

    def start_keeper(self) -> None:
        """Have the guest's memory kept by another process, where that is wanted."""
        if self.options.keeper is not None:
            self._kept = start_keeper(self.options.keeper, self._mappings)

    def drop_guest(self) -> None:
        """End the guest, if it is still here, and give its memory back."""
        self.guest.close()
        self._give_back()

    def source(self) -> Source:
        """Make the way out for the guest."""
        options = self.options
        source = Source(
            self._mappings,
            self.guest,
            poll_max_ns=options.poll_max_ns,
            give_up_after=options.give_up_after,
            keeping=self._kept,
        )
        self.depart_by(source)
        return source

    def depart_by(self, source: Source) -> None:
        """Have the guest leave by this way."""
        options = self.options
        known = (source, self.use, self.lost, self._migrations)
        self.departure = Departure(*known, tls_dir=options.tls_dir, kept=self._kept, keeper=options.keeper)

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
        guest = {"workload": self.options.workload, **describe_guest(self.guest)} if self._guest_here() else None
        return describe_source(self._departing().source, guest, self.use.what)

    async def look(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Say how the migration goes, for whoever looks again and again."""
        guest = self.guest if self._guest_here() else None
        return look(self.figures(), self._departing().source.layout.size, guest, [])

    def _guest_here(self) -> bool:
        return self._departing().guest_here

    async def check(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Compare every byte of the guest's memory while it stands still, and let it go on."""
        with self.use.take(CHECK):
            if not self._guest_here():
                raise UsageError("the guest cannot be checked here: it has left")
            return {"schema_version": 1, "role": "source", **await check_guest(self.guest, self._guest_here)}

    # --- metrics --------------------------------------------------------------------------------------------------

    def figures(self) -> metrics.Figures:
        """Return what a scrape shows."""
        figures = metrics.Figures("source")
        if self.departure is not None:
            figures = figures_of_source(self.departure.source)
            figures.stall = self.guest.stall if self._guest_here() else None
        figures.migrations = dict(self._migrations)
        return figures
