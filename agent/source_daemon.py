"""`postcopy source`: runs a guest and sends it away when it is asked to.

Options enter; the admin socket is the way to everything else. Ends with the status that says who owns the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import metrics, notify, pausing
from agent.admin import Tell
from agent.daemon import DaemonOptions, Stop, end_without_cleaning, first_of, reachable, serve_metrics
from agent.kept import Kept, start_keeper
from agent.look import look
from agent.one_source import change, describe_source, figures_of_source
from agent.parameters import Memory
from agent.running_guest import CHECK, MIGRATION, Use, check_guest, describe_guest
from agent.security.options import credentials_of_migration
from postcopy.errors import PostcopyError, UsageError
from postcopy.guest import WorkloadGuest
from postcopy.guest.kinds import kind_named
from postcopy.kernel import Mapping, memory_type_at
from postcopy.link.address import UnixAddress, parse_address
from postcopy.link.source import Source
from postcopy.link.tls import Credentials
from postcopy.pages.regions import Region
from postcopy.session.states import SWITCHED, State

log = logging.getLogger("postcopy.agent")

PROGRESS_SECONDS = 0.1
# For the last words to a destination: it will find out by itself that nobody is here, but not that nobody comes back.
PART_SECONDS = 1.0


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
        self._source: Source | None = None
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
        self._source = Source(
            self._mappings,
            self.guest,
            poll_max_ns=options.poll_max_ns,
            give_up_after=options.give_up_after,
            keeping=self._kept,
        )
        return self._source

    async def finish(self, stop: Stop) -> None:
        """Bring what uses the guest to its end: a check; a migration, cancelled before its switchover or hurried after.

        A second signal ends the process in the middle of it.
        """
        self.use.refuse()
        source = self._here()
        source.cancel("the source's agent ends")
        hurried = False
        while not self.use.over.is_set():
            if stop.again.is_set():
                await self._part(source)
                end_without_cleaning(self.verdict(), self.options.admin)
            if source.state in SWITCHED and not hurried:
                hurried = True
                await self._hurry(source)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROGRESS_SECONDS):
                    await first_of(stop.again, self.use.over)

    async def _hurry(self, source: Source) -> None:
        """Send what is still here as fast as it goes."""
        log.warning(
            "source: pages of the running guest are still here: pushing them without any limit, and ending with the "
            "last one; signal again to end now"
        )
        source.set_rate(None)
        await source.start_push()
        with contextlib.suppress(UsageError):
            source.resume()

    async def _part(self, source: Source) -> None:
        """Tell the destination that the pages which are still here end with this agent."""
        if self._kept is not None:
            return  # they do not
        with contextlib.suppress(UsageError, TimeoutError):
            source.lose("the source's agent ends", paused=False)
            async with asyncio.timeout(PART_SECONDS):
                await self.use.over.wait()

    def verdict(self) -> int:
        """Say who owns the guest now, and return the exit status that says the same."""
        state = self._here().state
        if state in SWITCHED and self._kept is not None:
            text = "source: pages of the running guest stay with the keeper: postcopy source --resume %s goes on"
            log.warning(text, self.options.keeper)
            return 5
        if state in {*SWITCHED, State.LOST}:
            log.error("source: the guest is lost: pages that only this agent held are gone")
            return 6
        if state is State.COMPLETED:
            log.info("source: the guest is at the destination; nothing of it is left here")
        else:
            log.info("source: this agent owns the guest, which ends with it")
        return 0

    def _here(self) -> Source:
        if self._source is None:
            raise UsageError("this agent is still filling its guest's memory")
        return self._source

    # --- the admin socket's commands ------------------------------------------------------------------------------

    def commands(self) -> dict[str, Any]:
        """Return the commands of the admin socket."""
        return {
            "status": self.status,
            "look": self.look,
            "migrate": self.migrate,
            "cancel": self.cancel,
            "pause": self.pause,
            "resume": self.resume,
            "check": self.check,
            "set": self.set,
        }

    async def status(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Say where the guest and the latest migration are."""
        guest = {"workload": self.options.workload, **describe_guest(self.guest)} if self._guest_here() else None
        return describe_source(self._here(), guest, self.use.what)

    async def look(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Say how the migration goes, for whoever looks again and again."""
        guest = self.guest if self._guest_here() else None
        return look(self.figures(), self._here().layout.size, guest, [])

    def _guest_here(self) -> bool:
        # By the state: it changes at once, an owner is named when all is cleaned up.
        return self._here().state not in {*SWITCHED, State.COMPLETED, State.LOST}

    async def migrate(self, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Migrate, telling the progress; return the report."""
        source = self._here()
        where = parse_address(str(arguments["to"]))
        tls = credentials_of_migration(where, self.options.tls_dir, arguments)
        with self.use.take(MIGRATION):
            source.check_free()
            running = asyncio.create_task(
                source.migrate(
                    where,
                    timeout=arguments.get("timeout"),
                    push=bool(arguments.get("push", True)),
                    rate=arguments.get("rate"),
                    tls=tls,
                )
            )
            while not running.done():
                await asyncio.wait({running}, timeout=PROGRESS_SECONDS)
                held = (source.pause_state or {}).get("held", False)
                pages = {"placed": source.placed_pages, "total": source.layout.pages}
                tell({"state": source.state.value, "held": held, **pages})
            self._note_end(source)
            try:
                return running.result()
            except PostcopyError as error:
                error.owner = source.owner.value
                raise

    def _note_end(self, source: Source) -> None:
        """Take note of how a migration ended."""
        if source.state is State.LOST:
            self.lost.set()
            if self._kept is not None:
                self._kept.release()
        if source.finish is not None:
            key = ("source", metrics.mode_of(source.report), source.finish.state.value)
            self._migrations[key] = self._migrations.get(key, 0) + 1

    async def pause(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Close the connections of a migration that has switched over."""
        source = self._here()
        source.pause()
        return await pausing.paused(source)

    async def resume(self, arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Have a paused migration go on."""
        source = self._here()
        source.resume(pausing.another_address(source, arguments))
        return await pausing.resumed(source)

    async def cancel(self, arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Cancel a migration that has not reached its switchover; give up one that is paused behind it."""
        source = self._here()
        if arguments.get("lost"):
            source.lose()
            return await pausing.lost(source)
        if not source.cancel():
            text = "there is none" if self._guest_here() else "the guest runs at the destination"
            raise UsageError(f"no migration can be cancelled: {text}")
        return {"schema_version": 1, "cancelled": True}

    async def check(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Compare every byte of the guest's memory while it stands still, and let it go on."""
        with self.use.take(CHECK):
            if not self._guest_here():
                raise UsageError("the guest cannot be checked here: it has left")
            return {"schema_version": 1, "role": "source", **await check_guest(self.guest, self._guest_here)}

    async def set(self, arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Change the running migration: limit its push, begin a push that was left out."""
        source = self._here()
        return await change(source, arguments)

    # --- metrics --------------------------------------------------------------------------------------------------

    def figures(self) -> metrics.Figures:
        """Return what a scrape shows."""
        figures = metrics.Figures("source")
        if self._source is not None:
            figures = figures_of_source(self._source)
            figures.stall = self.guest.stall if self._guest_here() else None
        figures.migrations = dict(self._migrations)
        return figures
