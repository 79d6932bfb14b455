"""Performs what a destination's machine wants done while a migration is paused, and on its way back.

A source that came back enters with its connection; the pump is detached, tells what it has, and goes on. Or it does
not: what is missing then is given up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from postcopy.errors import HostError
from postcopy.link.control import ControlChannel
from postcopy.link.destination_figures import DestinationFigures
from postcopy.link.report import gone
from postcopy.link.residence import Extent, extents_of, what_is_here
from postcopy.pages.ledger import PageState
from postcopy.pages.regions import Layout
from postcopy.pump.destination import DestinationPump
from postcopy.session.commands import Command, DetachData, Poison, ResumePump, Send, TellResidence
from postcopy.session.events import Rejoined

log = logging.getLogger("postcopy.session")


class WayBack(DestinationFigures):
    """The part of a destination's interpreter that outlives connections."""

    lost: list[Extent] | None
    _attached: set[str]

    def performers_of_pauses(self) -> dict[type[Command], Callable[[Any], Awaitable[None]]]:
        """Return how these commands are performed."""
        return {
            DetachData: self._detach_data,
            TellResidence: self._tell_residence,
            ResumePump: self._resume_pump,
            Poison: self._poison,
        }

    def rejoin(self, channel: ControlChannel, token: bytes) -> None:
        """Take the connection of a source that came back and proved itself."""
        channel.version = self.machine.version
        self.listen(channel)
        self.post(Rejoined(self.now(), token), channel)

    async def _detach_data(self, _command: DetachData) -> None:
        self._attached.clear()
        if self._pump is not None:
            await asyncio.to_thread(self._pump.detach)

    async def _tell_residence(self, _command: TellResidence) -> None:
        if self._pump is not None and self.memory is not None:
            for have in await asyncio.to_thread(what_is_here, self.memory.layout, self._pump):
                await self._send(Send(have))
        self.machine.wait_from(self.now())  # of much memory it takes a second, on a slow host some

    async def _resume_pump(self, _command: ResumePump) -> None:
        if self._pump is not None:
            await asyncio.to_thread(self._pump.resume)

    async def _poison(self, _command: Poison) -> None:
        if self._pump is None or self.memory is None or self.guest is None:
            return
        # Of a guest that cannot take it, who touches a page that is lost goes on waiting.
        lose = getattr(self.guest, "lose", None)
        if lose is not None:
            await asyncio.to_thread(self._lose, lose, self.memory.layout, self._pump)
        stats = self._pump.snapshot()
        course = self._course.columns(stats.pages_total)
        known = (self.mode, self.memory.layout, stats, self.guest, self.timing())
        self.report = gone(*known, course=course, tls=self.encrypted, lost=self.lost or [])

    def _lose(self, lose: Callable[[list[Extent]], None], layout: Layout, pump: DestinationPump) -> None:
        """Have what is missing poisoned, once the guest knows of it."""
        lose(extents_of(layout, pump, PageState.ABSENT, PageState.REQUESTED))
        try:
            count = pump.poison()
        except HostError as refused:
            log.error("destination: %s; whoever touches one waits for ever", refused)  # noqa: TRY400
        else:
            log.warning("destination: %d pages are lost: whoever touches one gets SIGBUS", count)
            self.lost = extents_of(layout, pump, PageState.POISONED)
