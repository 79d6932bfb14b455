"""`postcopy destination --handover unix:PATH`: serves the memory of processes that hand their userfaultfd over.

Options enter; processes come through the Unix socket. The daemon outlives them all, and goes with none of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from typing import Any

from agent import metrics, notify, pausing
from agent.admin import Tell
from agent.counts import Totals, busiest
from agent.daemon import DaemonOptions, Stop, reachable, serve_metrics
from agent.outside.store import Store, close, left_behind
from agent.running_guest import describe_end, describe_memory
from postcopy import __version__
from postcopy.errors import UsageError
from postcopy.guest.outside.keeping import sort
from postcopy.guest.outside.serving import OutsideDestination
from postcopy.guest.outside.session import OutsideInterpreter
from postcopy.link import by_hand
from postcopy.link.address import Address, UnixAddress
from postcopy.link.tls import Credentials
from postcopy.session.commands import Finish
from postcopy.session.states import State

log = logging.getLogger("postcopy.agent")


@dataclass(frozen=True, kw_only=True)
class OutsideOptions(DaemonOptions):
    """What the command line of `postcopy destination --handover` says. `fetch` or `listen` is None."""

    handover: UnixAddress
    fetch: Address | None
    listen: Address | None
    push: bool
    tls: Credentials | None
    keep: bool


async def serve_outside(options: OutsideOptions) -> int:
    """Run the daemon; return its exit status."""
    stop = Stop(options.parent)
    daemon = OutsideDaemon(options)
    serve_metrics(options, daemon.figures)
    async with daemon.destination as destination:
        address = str(destination.address)
        pages = f"pages come from {options.fetch}" if options.fetch is not None else f"sources dial {address}"
        words = f"destination: processes hand their memory over at {options.handover}, {pages}"
        async with reachable(options, daemon.commands(), daemon.figures, words, address):
            await stop.asked.wait()
            notify.tell("STOPPING=1\n")
            return daemon.verdict(await destination.close())


class OutsideDaemon:
    """The processes that are served, and the commands of the admin socket."""

    def __init__(self, options: OutsideOptions) -> None:
        self.options = options
        store = Store() if options.keep else None
        taken_up, strange = sort(store, left_behind()) if store is not None else ([], left_behind())
        close(strange)
        self.destination = OutsideDestination(
            options.handover,
            fetch=options.fetch,
            listen=options.listen,
            push=options.push,
            poll_max_ns=options.poll_max_ns,
            ended=self._note,
            left=self._end,
            tls=options.tls,
            give_up_after=options.give_up_after,
            store=store,
            taken_up=taken_up,
        )
        self._latest: Finish | None = None
        self._report: dict[str, Any] | None = None
        self._totals = Totals()

    def _note(self, one: OutsideInterpreter, finish: Finish) -> None:
        """Take note of how a migration ended."""
        self._latest = finish
        self._report = one.report or self._report
        self._totals.note("destination", one.mode, finish.state)

    def _end(self, one: OutsideInterpreter) -> None:
        """Keep the counters of a process that is served no more."""
        self._totals.end(one)

    @staticmethod
    def verdict(lacking: int) -> int:
        """Say whom this daemon leaves without pages, and return the exit status that says the same."""
        if lacking:
            log.error("destination: %d processes are lost: pages that were still at the source are gone", lacking)
            return 6
        log.info("destination: ends; no process needs anything of it any more")
        return 0

    @property
    def _state(self) -> State:
        return busiest(one.machine.state for one in self.destination.current)

    # --- the admin socket's commands ------------------------------------------------------------------------------

    def commands(self) -> dict[str, Any]:
        """Return the commands of the admin socket."""
        return {
            "status": self.status,
            "pause": self.pause,
            "resume": self.resume,
            "cancel": self.cancel,
            "check": self.refuse,
        }

    async def pause(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Close the connections of all migrations that miss pages."""
        count = self.destination.pause()
        asked = [pausing.paused(One(one)) for one in self.destination.current if one.machine.recoverable]
        await asyncio.gather(*asked)
        return {"schema_version": 1, "state": self._state.value, "migrations": count}

    async def resume(self, arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Have all paused migrations go on; where this agent dials, wait until that has worked, or has not."""
        paused = [one for one in self.destination.current if by_hand.describe(one) is not None]
        address = pausing.another_address(One(paused[0]), arguments) if paused else None
        count = self.destination.resume(address)
        if self.options.fetch is not None:
            results = await asyncio.gather(*(pausing.resumed(One(one)) for one in paused), return_exceptions=True)
            for failed in results:
                if isinstance(failed, BaseException):
                    raise failed
        return {"schema_version": 1, "state": self._state.value, "migrations": count}

    async def cancel(self, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Give up what the sources of paused migrations have; nothing else can be cancelled here."""
        if not arguments.get("lost"):
            return await self.refuse(arguments, tell)
        return {"schema_version": 1, "migrations": self.destination.lose(), "lost_pages": None}

    async def refuse(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Refuse what needs a guest of this agent's own."""
        raise UsageError("the guests here are other processes, which this agent can neither stop nor check")

    async def status(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Say which processes are served and how far each is."""
        current = self.destination.current
        processes = [describe(one) for one in current]
        return {
            "schema_version": 1,
            "role": "destination",
            "version": __version__,
            "pid": os.getpid(),
            "state": self._state.value,
            "owner": None,
            "in_use": None,
            "address": str(self.destination.address),
            "guest": None,
            "memory": [],
            "pages": {key: sum(one["pages"][key] for one in processes) for key in ("total", "placed")},
            "processes": processes,
            "waiting": len(self.destination.waiting),
            "ended": describe_end(self._latest),
            "report": self._report,
        }

    # --- metrics --------------------------------------------------------------------------------------------------

    def figures(self) -> metrics.Figures:
        """Return what a scrape shows: all processes together."""
        current = self.destination.current
        figures = metrics.Figures("destination", self._state)
        figures.counts = self._totals.counts(current)
        figures.counts.stall = None  # which only a guest's own clock tells
        for one in current:
            stats = one.snapshot()
            if stats is not None and one.memory is not None:
                figures.queue_depth += stats.pending
                left = stats.pages_total - stats.pages_resident
                figures.remaining_bytes += one.memory.layout.size * left // stats.pages_total
        return figures


class One:
    """One process's migration, as pausing.py looks at a side."""

    def __init__(self, one: OutsideInterpreter) -> None:
        self._one = one
        self.handled = one.handled

    @property
    def state(self) -> State:
        """Where it stands."""
        return self._one.machine.state

    @property
    def pause_state(self) -> dict[str, Any] | None:
        """Why it is paused."""
        return by_hand.describe(self._one)

    @property
    def encrypted(self) -> bool:
        """Whether it is."""
        return self._one.encrypted


def describe(one: OutsideInterpreter) -> dict[str, Any]:
    """Return what `status` shows of one process."""
    stats = one.snapshot()
    total = sum(given.size // given.page_size for given in one.handed.message.mappings)
    return {
        "pid": one.handed.process.pid,
        "state": one.machine.state.value,
        "mode": one.mode,
        "memory": [] if one.memory is None else describe_memory(one.memory.layout),
        "pages": {"total": total, "placed": 0 if stats is None else stats.pages_resident},
        "faults": 0 if stats is None else stats.faults_missing + stats.faults_minor,
        "removed": 0 if stats is None else stats.pages_removed,
        "paused": by_hand.describe(one),
        "reconnects": one.machine.reconnects,
        "report": one.report,
    }
