"""`postcopy source`: makes a guest, runs it and sends it away when it is asked to.

Options enter; the admin socket is the way to everything else. Ends with the status that says who owns the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from contextlib import AsyncExitStack
from dataclasses import dataclass

from agent import notify
from agent.config.origin import named
from agent.daemon import Stop, first_of, reachable, serve_metrics
from agent.parameters import Memory
from agent.source_daemon import LeavingOptions, SourceDaemon
from postcopy.errors import UsageError
from postcopy.guest import WorkloadGuest
from postcopy.guest.kinds import WorkloadKind, kind_named
from postcopy.kernel import Mapping, memory_type_at
from postcopy.link.source import Source
from postcopy.link.tls import Credentials
from postcopy.pages.regions import Region


@dataclass(frozen=True, kw_only=True)
class SourceOptions(LeavingOptions):
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


async def serve_source(options: SourceOptions) -> int:
    """Run the daemon; return its exit status."""
    if options.tls_dir is not None:
        with named("tls_dir"):
            Credentials(options.tls_dir).for_dialling()  # what is wrong with them is said now
    stop = Stop(options.parent)
    daemon = SourceDaemon(options)
    async with AsyncExitStack() as stack:
        serve_metrics(options, daemon.scraped)
        home = Home(options)
        stack.callback(home.close)
        guest = await home.make_guest()
        waits = (options.poll_max_ns, options.give_up_after)
        source = Source(home.mappings, guest, poll_max_ns=waits[0], give_up_after=waits[1])
        await stack.enter_async_context(source)
        with named("keeper"):
            await daemon.depart_by(source, guest).keep()
        guest.start()
        memory = ", ".join(one.describe() for one in options.memory)
        words = f"source: a guest of {options.vcpus} vCPUs runs {options.workload} on {memory}"
        await stack.enter_async_context(reachable(options, daemon.commands(), daemon.figures, words))
        await first_of(stop.asked, daemon.over)
        notify.tell("STOPPING=1\n")
        await daemon.finish(stop)
    # Not before: up to here a migration may have gone on.
    return daemon.verdict()


class Home:
    """The memory of a guest that begins here, and the guest."""

    def __init__(self, options: SourceOptions) -> None:
        self._options = options
        self.mappings: list[Mapping] = []
        self._guest: WorkloadGuest | None = None

    async def make_guest(self) -> WorkloadGuest:
        """Allocate and fill the guest's memory, in threads; return it, parked."""
        options = self._options
        kind = kind_named(options.guest, options.cpus)
        with named("guest"):
            kind.check_host()
        with named("memory"):
            await asyncio.to_thread(self._allocate_all)
        with named("pin", UsageError) if options.cpus else contextlib.nullcontext():
            return await asyncio.to_thread(self._fill, kind)

    def _allocate_all(self) -> None:
        for index, memory in enumerate(self._options.memory):
            self.mappings.append(self._allocate(index, memory))

    def _fill(self, kind: WorkloadKind) -> WorkloadGuest:
        options = self._options
        self._guest = kind.create(
            self.mappings,
            workload=options.workload,
            vcpus=options.vcpus,
            seed=options.seed,
            steps_per_second=options.steps_per_second,
            steps_max=options.steps_max,
            blank=options.blank,
            holes=options.holes,
        )
        self._guest.fill()
        return self._guest

    def _allocate(self, index: int, memory: Memory) -> Mapping:
        kind = memory_type_at(memory.type, memory.place)
        region = Region(index, kind.name, kind.page_size, memory.size or 0)
        mapping = kind.allocate(region, alias=False, data=self._data_of(region))
        if self._options.thp:
            mapping.allow_huge_pages()
        return mapping

    def _data_of(self, region: Region) -> int:
        """Return how many bytes of a region the guest will write: what is blank lies at the end of all memory."""
        options = self._options
        if not options.holes:
            return region.size
        sizes = [memory.size or 0 for memory in options.memory]
        active = math.ceil(sum(sizes) * (1 - options.blank))
        return min(region.size, max(0, active - sum(sizes[: region.index])))

    def close(self) -> None:
        """End the guest, if it is still here, and give its memory back."""
        if self._guest is not None:
            self._guest.close()
        for mapping in self.mappings:
            mapping.close()
