"""`postcopy source`: runs a guest and sends it away when it is asked to.

Options enter; the admin socket is the way to everything else. Ends with the status that says who owns the guest.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from agent import metrics
from agent.admin import AdminServer, Tell
from agent.daemon import Stop, end_without_cleaning, first_of, tell_ready
from agent.parameters import Memory
from agent.running_guest import check_guest, describe_guest, describe_memory
from postcopy import __version__
from postcopy.errors import MigrationFailed, UsageError
from postcopy.guest import Guest
from postcopy.kernel import Mapping, memory_type_at
from postcopy.link.address import TcpAddress, UnixAddress, parse_address
from postcopy.link.source import Source
from postcopy.pages.regions import Region
from postcopy.session.states import Owner, State

log = logging.getLogger("postcopy.agent")

PROGRESS_SECONDS = 0.1


@dataclass(frozen=True)
class SourceOptions:
    """What the command line of `postcopy source` says. Every memory has its size; `thp`: ask for huge pages."""

    memory: tuple[Memory, ...]
    vcpus: int
    workload: str
    seed: int
    cpus: tuple[int, ...]
    admin: UnixAddress | None
    metrics: TcpAddress | None
    ready_fd: int | None
    poll_max_ns: int
    steps_per_second: int
    steps_max: int | None
    blank: float
    thp: bool = False


async def serve_source(options: SourceOptions) -> int:
    """Run the daemon; return its exit status."""
    stop = Stop()
    async with AsyncExitStack() as stack:
        daemon = SourceDaemon(options)
        if options.metrics is not None:
            log.info("metrics: %s", metrics.serve(options.metrics, daemon.figures))
        await daemon.make_guest()
        stack.callback(daemon.drop_guest)
        source = await stack.enter_async_context(daemon.source())
        admin = AdminServer(options.admin, daemon.commands()) if options.admin is not None else None
        if admin is not None:
            await admin.open()
            stack.push_async_callback(admin.close)
        daemon.guest.start()
        memory = ", ".join(one.describe() for one in options.memory)
        log.info("source: a guest of %d vCPUs runs %s on %s", options.vcpus, options.workload, memory)
        tell_ready(options.ready_fd)
        await first_of(stop.asked, daemon.lost)
        if stop.asked.is_set() and source.state is State.POSTCOPY_ACTIVE:
            log.warning(
                "source: pages of the running guest are still here: ending with the last one; signal again to end now"
            )
            await first_of(stop.again, daemon.ended)
            if source.state is State.POSTCOPY_ACTIVE:
                end_without_cleaning(daemon.verdict())
        return daemon.verdict()


class SourceDaemon:
    """One guest, its source, and the commands of its admin socket."""

    def __init__(self, options: SourceOptions) -> None:
        self.options = options
        self.lost = asyncio.Event()
        self.ended = asyncio.Event()
        self.guest: Guest
        self._mappings: list[Mapping] = []
        self._source: Source | None = None
        self._checking = False
        self._migrations: dict[tuple[str, str, str], int] = {}

    async def make_guest(self) -> None:
        """Allocate and fill the guest's memory, in a thread."""
        await asyncio.to_thread(self._make_guest)

    def _make_guest(self) -> None:
        options = self.options
        try:
            for index, memory in enumerate(options.memory):
                self._mappings.append(self._allocate(index, memory))
            self.guest = Guest(
                self._mappings,
                workload=options.workload,
                vcpus=options.vcpus,
                seed=options.seed,
                cpus=options.cpus,
                steps_per_second=options.steps_per_second,
                steps_max=options.steps_max,
                blank=options.blank,
            )
            self.guest.fill()
        except BaseException:
            self._give_back()
            raise

    def _allocate(self, index: int, memory: Memory) -> Mapping:
        kind = memory_type_at(memory.type, memory.place)
        mapping = kind.allocate(Region(index, kind.name, kind.page_size, memory.size or 0), alias=False)
        if self.options.thp:
            mapping.allow_huge_pages()
        return mapping

    def _give_back(self) -> None:
        for mapping in self._mappings:
            mapping.close()

    def drop_guest(self) -> None:
        """End the guest, if it is still here, and give its memory back."""
        self.guest.close()
        self._give_back()

    def source(self) -> Source:
        """Make the way out for the guest."""
        self._source = Source(self._mappings, self.guest, poll_max_ns=self.options.poll_max_ns)
        return self._source

    def verdict(self) -> int:
        """Say who owns the guest now, and return the exit status that says the same."""
        source = self._here()
        if source.state is State.POSTCOPY_ACTIVE or source.owner is Owner.LOST:
            log.error("source: the guest is lost: pages that only this agent held are gone")
            return 6
        if source.owner is Owner.DESTINATION:
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
            "migrate": self.migrate,
            "cancel": self.cancel,
            "check": self.check,
            "set": self.set,
        }

    async def status(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Say where the guest and the latest migration are."""
        source = self._here()
        finish = source.finish
        return {
            "schema_version": 1,
            "role": "source",
            "version": __version__,
            "pid": os.getpid(),
            "state": source.state.value,
            "owner": source.owner.value,
            "guest": {"workload": self.options.workload, **describe_guest(self.guest)} if self._guest_here() else None,
            "memory": describe_memory(source.layout),
            "pages": {"total": source.layout.pages, "placed": source.placed_pages},
            "ended": None if finish is None else {"text": finish.text, "exit_status": finish.exit_status},
            "report": source.report,
        }

    def _guest_here(self) -> bool:
        return self._here().owner is Owner.SOURCE

    async def migrate(self, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Migrate, telling the progress; return the report."""
        source = self._here()
        if self._checking:
            raise MigrationFailed("the guest is being checked: try again")
        source.check_free()
        self.ended.clear()
        running = asyncio.create_task(
            source.migrate(
                parse_address(str(arguments["to"])),
                timeout=arguments.get("timeout"),
                push=bool(arguments.get("push", True)),
                rate=arguments.get("rate"),
            )
        )
        while not running.done():
            await asyncio.wait({running}, timeout=PROGRESS_SECONDS)
            tell({"state": source.state.value, "placed": source.placed_pages, "total": source.layout.pages})
        return self._ended(running, source)

    def _ended(self, running: asyncio.Task[dict[str, Any]], source: Source) -> dict[str, Any]:
        """Take note of how a migration ended, and return its report or raise what ended it."""
        if source.finish is not None:
            mode = source.report["mode"] if source.report is not None else "unknown"
            self._count(str(mode), source.finish.state.value)
        if source.owner is Owner.LOST:
            self.lost.set()
        self.ended.set()
        return running.result()

    def _count(self, mode: str, outcome: str) -> None:
        key = ("source", mode, outcome)
        self._migrations[key] = self._migrations.get(key, 0) + 1

    async def cancel(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Cancel a migration that has not reached its switchover."""
        source = self._here()
        if not source.cancel():
            text = "the guest runs at the destination" if source.owner is not Owner.SOURCE else "there is none"
            raise UsageError(f"no migration can be cancelled: {text}")
        return {"schema_version": 1, "cancelled": True}

    async def check(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Compare every byte of the guest's memory while it stands still, and let it go on."""
        source = self._here()
        if not self._guest_here() or source.busy or self._checking:
            raise UsageError("the guest cannot be checked here now: it has left, or is migrating, or is being checked")
        self._checking = True
        try:
            return {"schema_version": 1, "role": "source", **await check_guest(self.guest)}
        finally:
            self._checking = False

    async def set(self, arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Change the running migration: limit its push, begin a push that was left out."""
        source = self._here()
        if "rate" in arguments:
            source.set_rate(arguments["rate"])
        if arguments.get("push"):
            await source.start_push()
        return {"schema_version": 1, "state": source.state.value}

    # --- metrics --------------------------------------------------------------------------------------------------

    def figures(self) -> metrics.Figures:
        """Return what a scrape shows."""
        figures = metrics.Figures(migrations=dict(self._migrations))
        source = self._source
        if source is None:
            return figures
        figures.state = source.state
        figures.downtime_seconds, figures.duration_seconds = source.downtime, source.duration
        total, left = source.layout.pages, source.layout.pages - source.placed_pages
        figures.remaining_bytes = source.layout.size * left // total if source.owner is not Owner.LOST else 0
        if self._guest_here():
            figures.stall = self.guest.stall
        stats = source.snapshot()
        if stats is not None:
            figures.pages = {
                "demand": stats.pages_demand,
                "push": stats.pages_push,
                "zero": stats.pages_zero,
                "duplicate": stats.pages_again,
            }
            figures.transferred = {
                ("sent", "urgent"): stats.bytes_sent_urgent,
                ("sent", "push"): stats.bytes_sent_push,
            }
        return figures
