"""`postcopy destination`: waits for a guest, runs it while its memory arrives, and keeps it or sends it on.

Options enter; guests come through the listening port. Ends with the status that says who owns the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent import metrics, notify, pausing
from agent.admin import AdminServer, Tell
from agent.config.origin import named
from agent.counts import Totals
from agent.daemon import DaemonOptions, Stop, end_without_cleaning, first_of, reachable, serve_metrics, tidy
from agent.departure import Departure
from agent.look import CELLS, look
from agent.one_source import describe_source, figures_of_source
from agent.running_guest import CHECK, Use, check_guest, describe_end, describe_guest, describe_memory
from postcopy import __version__
from postcopy.errors import UsageError
from postcopy.guest import WorkloadGuest
from postcopy.guest.kinds import kinds
from postcopy.kernel.opening import available_features
from postcopy.limits import PART_FROM_SOURCE_SECONDS, UNHEARD_SECONDS
from postcopy.link.address import Address, TcpAddress, UnixAddress
from postcopy.link.destination import Destination
from postcopy.link.tls import Credentials
from postcopy.pump.histogram import Histogram
from postcopy.pump.trace import FaultTrace
from postcopy.session.commands import Finish
from postcopy.session.states import SWITCHED, Owner, State

log = logging.getLogger("postcopy.agent")


@dataclass(frozen=True, kw_only=True)
class DestinationOptions(DaemonOptions):
    """What the command line of `postcopy destination` says."""

    listen: Address
    mode: str
    removal: str
    memory_dirs: tuple[Path, ...]
    cpus: tuple[int, ...]
    once: bool
    tls: Credentials | None
    trace: Path | None = None
    keeper: UnixAddress | None = None


async def serve_destination(options: DestinationOptions) -> int:
    """Run the daemon; return its exit status. A guest that is not whole ends the process without returning."""
    stop = Stop(options.parent)
    daemon = DestinationDaemon(options)
    # Without it no guest could ever come, but for one whose memory is handed over: better said now than to the first.
    if isinstance(options.listen, TcpAddress):
        await asyncio.to_thread(available_features)
    async with AsyncExitStack() as stack:
        serve_metrics(options, daemon.scraped)
        if options.tls is not None:
            with named("tls_dir"):
                options.tls.for_listening()  # what is wrong with them is said now
        with named("listen"):
            destination = await stack.enter_async_context(daemon.destination)
        address = str(destination.address)
        watching = asyncio.create_task(daemon.watch())
        stack.callback(watching.cancel)
        words = f"destination: listening on {address}{', with TLS' if options.tls is not None else ''}"
        showing = reachable(options, daemon.commands(), daemon.figures, words, address)
        admin = await stack.enter_async_context(showing)
        await first_of(stop.asked, daemon.over)
        await daemon.end_if_lost(admin)
        notify.tell("STOPPING=1\n")
        await daemon.finish(stop)
    # Not before: what was on its way when the end was asked for may have arrived, and gone on, or been lost.
    await daemon.end_if_lost(None)
    return daemon.verdict()


def open_trace(file: Path) -> FaultTrace:
    """Make room for a trace; UsageError where its file could not be written in the end."""
    try:
        file.touch()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    return FaultTrace()


class DestinationDaemon:
    """One place for a guest, and the commands of its admin socket."""

    def __init__(self, options: DestinationOptions) -> None:
        self.options = options
        self.lost = asyncio.Event()
        self.over = asyncio.Event()
        with named("trace"):
            self._trace = open_trace(options.trace) if options.trace is not None else None
        with named("memory_dirs"):
            self.destination = Destination(
                options.listen,
                kinds(options.cpus),
                mode=options.mode,
                removal=options.removal,
                memory_dirs=options.memory_dirs,
                tls=options.tls,
                poll_max_ns=options.poll_max_ns,
                trace=self._trace,
                give_up_after=options.give_up_after,
            )
        self.use = Use()
        self._departure: Departure | None = None
        self._latest: Finish | None = None
        self._totals = Totals()
        self.destination.begun = self._totals.begin

    async def watch(self) -> None:
        """Take note of every migration's end."""
        while True:
            finish = await self.destination.migrated()
            self._latest = finish
            self._totals.note("destination", self.options.mode, finish.state)
            self._write_trace()
            tidy()
            if finish.owner is Owner.LOST:
                self.lost.set()
                if self.destination.lost is not None:
                    log.error("destination: the guest goes on without %d pages", self._lost_pages())
            if self.options.once and finish.state is State.COMPLETED:
                await self._until_heard()
            if self.options.once or (self.lost.is_set() and self.destination.lost is None):
                self.over.set()

    async def _until_heard(self) -> None:
        """Stay for a source that does not know yet that it may let go of its memory: no one else could tell it."""
        hearing = asyncio.create_task(self.destination.known.heard())
        await asyncio.sleep(0)
        given = self.options.give_up_after
        seconds = UNHEARD_SECONDS if given is None else given
        if not hearing.done():
            log.warning(
                "destination: the source has not heard that every page is here: this agent ends once it has, "
                "or in %g s",
                seconds,
            )
        try:
            async with asyncio.timeout(seconds):
                await hearing
        except TimeoutError:
            log.warning(
                "destination: no source asked for %g s: one that is there yet keeps its memory until it is told to end",
                seconds,
            )
        finally:
            hearing.cancel()

    def _write_trace(self) -> None:
        """Write the trace of a migration whose guest came here."""
        layout, file = self.destination.layout, self.options.trace
        if self._trace is None or file is None or layout is None or self.destination.owner is None:
            return
        try:
            count = self._trace.write(file, layout)
            log.info("destination: %d faults of %d are in the trace %s", count, self._trace.recorded, file)
        except OSError as error:
            log.warning("destination: the trace %s cannot be written: %s", file, error.strerror)

    async def end_if_lost(self, admin: AdminServer | None) -> None:
        """End the process if the guest is not whole: threads of it that wait for a page never see zeros.

        Before that the source hears that its pages are wanted no more, and whoever gave the guest up gets his answer.
        """
        destination = self.destination
        if not self.lost.is_set() and destination.state not in {*SWITCHED, State.LOST}:
            return
        with contextlib.suppress(UsageError, TimeoutError):
            destination.lose("the destination's agent ends", paused=False)
            async with asyncio.timeout(PART_FROM_SOURCE_SECONDS):
                await self.lost.wait()
        pages = self._lost_pages()
        what = "pages that were still at the source are" if pages is None else f"{pages} pages that did not come are"
        log.error("destination: the guest is lost: %s gone", what)
        if admin is not None:
            await admin.close()
        end_without_cleaning(6, self.options.admin)

    def _lost_pages(self) -> int | None:
        report = self.destination.report
        return report["pages"].get("lost") if report is not None else None

    async def finish(self, stop: Stop) -> None:
        """Wait for a check that is running: it reads the guest's memory. A second signal ends the process instead.

        A guest that is leaving stays, or is hurried, as at its first source.
        """
        if (departure := self._departing()) is not None:
            await departure.finish(stop, lambda: end_without_cleaning(self.verdict(), self.options.admin))
            return
        self.use.refuse()
        await first_of(stop.again, self.use.over)
        if not self.use.over.is_set():
            end_without_cleaning(self.verdict(), self.options.admin)

    def verdict(self) -> int:
        """Say who owns the guest now, and return the exit status that says the same."""
        departure = self._departing()
        if departure is not None and not departure.guest_here:
            return departure.verdict()
        if self.destination.owner is Owner.DESTINATION:
            log.info("destination: this agent owns the guest, which ends with it")
        elif self.over.is_set() and self._latest is not None:
            log.info("destination: no guest came; the source owns it")
            return self._latest.exit_status
        else:
            log.info("destination: no guest is here")
        return 0

    # --- the admin socket's commands ------------------------------------------------------------------------------

    def commands(self) -> dict[str, Any]:
        """Return the commands of the admin socket."""
        return {
            "status": self.status,
            "look": self.look,
            "migrate": self.migrate,
            "set": self.set,
            "cancel": self.cancel,
            "pause": self.pause,
            "resume": self.resume,
            "check": self.check,
        }

    def _departing(self) -> Departure | None:
        """Return the guest's way out, from the first time that it was asked for until another guest comes."""
        if self._departure is not None and self._departure.source is not self.destination.leaving:
            self._departure = None
        return self._departure

    async def _depart(self) -> Departure:
        """Return the guest's way out; UsageError where there is no guest, or it is not whole."""
        source = await self.destination.onward()
        departure = self._departing()
        if departure is None:
            tls_dir = None if self.options.tls is None else self.options.tls.directory
            known = (source, self.use, self.over, self._totals)
            self._departure = departure = Departure(*known, tls_dir=tls_dir, keeper=self.options.keeper)
        return departure

    async def migrate(self, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Send the guest on, telling the progress; return the report."""
        return await (await self._depart()).migrate(arguments, tell)

    async def set(self, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Change the migration of the guest that leaves."""
        departure = self._departing()
        if departure is None:
            raise UsageError("it is the source that pushes: say it to its agent")
        return await departure.set(arguments, tell)

    def _guest(self) -> WorkloadGuest | None:
        """Return the guest once it runs here, until it has left."""
        departure = self._departing()
        if departure is not None and not departure.guest_here:
            return None
        running = self.destination.state in {*SWITCHED, State.COMPLETED, State.LOST}
        guest = self.destination.guest
        return guest if running and isinstance(guest, WorkloadGuest) else None

    async def status(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Say where the guest and the latest migration are."""
        destination, departure = self.destination, self._departing()
        guest, layout, stats = self._guest(), destination.layout, destination.snapshot()
        if departure is not None and departure.begun:
            told = describe_source(
                departure.source, describe_guest(guest) if guest is not None else None, self.use.what
            )
            return {**told, "address": str(destination.address), "mode": self.options.mode}
        return {
            "schema_version": 1,
            "role": "destination",
            "version": __version__,
            "pid": os.getpid(),
            "state": destination.state.value,
            "owner": destination.owner,  # None: no guest is here or on its way
            "in_use": self.use.what or None,
            "address": str(destination.address),
            "mode": self.options.mode,
            "guest": describe_guest(guest) if guest is not None else None,
            "memory": describe_memory(layout) if layout is not None else [],
            "pages": {
                "total": stats.pages_total if stats is not None else 0,
                "placed": stats.pages_resident if stats is not None else 0,
            },
            "fault_latency_seconds": stats.fault_latency.summary() if stats is not None else None,
            "ended": describe_end(self._latest),
            "paused": destination.pause_state,
            "reconnects": destination.reconnects,
            "report": destination.report,
        }

    async def look(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Say how the migration goes, for whoever looks again and again."""
        layout, departure = self.destination.layout, self._departing()
        if departure is not None and departure.begun:
            source = departure.source
            return look(self.figures(), source.layout.size, self._guest(), source.residency(CELLS), source)
        size = layout.size if layout is not None else 0
        return look(self.figures(), size, self._guest(), self.destination.residency(CELLS))

    async def pause(self, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Close the connections of a migration whose guest runs here, in or out."""
        if (departure := self._departing()) is not None:
            return await departure.pause(arguments, tell)
        self.destination.pause()
        return await pausing.paused(self.destination)

    async def resume(self, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Let the source come back to a migration that was paused here, in or out."""
        if (departure := self._departing()) is not None:
            return await departure.resume(arguments, tell)
        if "to" in arguments:
            raise UsageError("it is the source that dials: say --to to its agent")
        self.destination.resume()
        return {"schema_version": 1, "state": self.destination.state.value, "paused": self.destination.pause_state}

    async def cancel(self, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Cancel a migration that has not reached its switchover; give up one that is paused behind it, in or out."""
        if (departure := self._departing()) is not None:
            return await departure.cancel(arguments, tell)
        if arguments.get("lost"):
            self.destination.lose()
            # Not at its state alone: what is lost is poisoned and counted first.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PART_FROM_SOURCE_SECONDS):
                    await self.lost.wait()
            return await pausing.lost(self.destination)
        if not self.destination.cancel():
            text = "the guest runs here" if self._guest() is not None else "there is none"
            raise UsageError(f"no migration can be cancelled: {text}")
        return {"schema_version": 1, "cancelled": True}

    async def check(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Compare every byte of the guest's memory while it stands still, and let it go on."""
        guest = self._guest()
        if guest is None:
            raise UsageError("there is no guest here to check")
        with self.use.take(CHECK):
            lost = self.destination.lost
            if self.destination.state is not State.COMPLETED and lost is None:
                raise UsageError("the guest cannot be checked now: pages are still at the source")
            found = await check_guest(guest, lambda: self._guest() is guest)
            pages = {"pages_lost": self._lost_pages()} if lost else {}
            return {"schema_version": 1, "role": "destination", **found, **pages}

    # --- metrics --------------------------------------------------------------------------------------------------

    def _standing(self) -> metrics.Figures:
        """Return how the latest migration stands, in or out."""
        destination, departure = self.destination, self._departing()
        if departure is not None and departure.begun:
            return figures_of_source(departure.source)
        figures = metrics.Figures("destination", destination.state)
        figures.owns_guest = destination.owner is Owner.DESTINATION
        if destination.report is not None:
            figures.duration_seconds = destination.report["total_seconds"] or 0.0  # None: it is lost
            figures.downtime_seconds = destination.report["downtime_seconds"] or 0.0
        progress, layout = destination.progress(), destination.layout
        if progress is not None and layout is not None:
            resident, figures.queue_depth = progress
            figures.remaining_bytes = layout.size * (layout.pages - resident) // layout.pages
        return figures

    def figures(self) -> metrics.Figures:
        """Return how the latest migration stands, and what it has counted."""
        figures = self._standing()
        return replace(figures, counts=self._totals.latest(figures.role))

    def scraped(self) -> metrics.Figures:
        """Return what a scrape shows: whatever its guest does, this agent is a destination."""
        figures = self._standing()
        figures.role, figures.counts = "destination", self._totals.counts()
        figures.counts.stall = figures.counts.stall or Histogram()
        return figures
