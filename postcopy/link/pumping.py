"""What the interpreters of both sides do alike with a pump: start it, watch for its end, stop it, show its counters.

A pump of either side enters through `_pump`; `_pump_ended` is told of its end, and its last counters stay behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from abc import abstractmethod
from typing import Any, Generic, Protocol, TypeVar

from postcopy.limits import BEAT_SECONDS, PROGRESS_SECONDS
from postcopy.link.interpreter import Interpreter
from postcopy.link.rounds import next_round
from postcopy.pump.source import SourcePump, SourceStats
from postcopy.pump.status import PumpStatus
from postcopy.session.commands import StartPump, StopPump, WatchData
from postcopy.session.events import AliveDue, Event, PumpBroken, PumpFailed, Received
from postcopy.session.machine import Machine
from postcopy.wire.messages import Loaded


class Pump(Protocol):
    """Of either side; see postcopy.pump."""

    @property
    def event_fd(self) -> int:
        """Readable once the pump has ended or is broken."""

    def start(self) -> None:
        """Let the threads run."""

    def watch(self) -> None:
        """Take silence for an end."""

    def status(self) -> PumpStatus:
        """Return the state and, where it failed, why."""

    def snapshot(self) -> Any:
        """Return all counters."""

    def stop(self) -> None:
        """End the threads and wait for them."""

    def close(self) -> None:
        """Close the connections, free the memory."""


# Whoever ends for good says so on the control connection, and closes the others next: the words are to be heard first.
WORDS_SECONDS = 0.02
BEAT_NS = int(BEAT_SECONDS * 1e9)

PumpT = TypeVar("PumpT", bound=Pump)
StatsT = TypeVar("StatsT")


class PumpInterpreter(Interpreter, Generic[PumpT, StatsT]):
    """An interpreter with a pump, which a subclass puts into `_pump`. `stats` are its counters once it has ended."""

    def __init__(self, role: str, machine: Machine[Any], name: str = "") -> None:
        super().__init__(role, machine, name)
        self.stats: StatsT | None = None
        self._pump: PumpT | None = None
        self._watched = False

    async def _start_pump(self, _command: StartPump) -> None:
        if self._pump is not None:
            self._pump.start()
            asyncio.get_running_loop().add_reader(self._pump.event_fd, self._pump_woke)
            self._watched = True

    def _pump_woke(self) -> None:
        if self._pump is None:
            return
        with contextlib.suppress(BlockingIOError):
            os.read(self._pump.event_fd, 8)
        status = self._pump.status()
        if status.state in {"complete", "failed"}:
            self._unwatch()
            self._pump_ended(status)
        elif status.state == "broken":
            asyncio.get_running_loop().call_later(WORDS_SECONDS, self._tell_broken, self._pump)

    def _tell_broken(self, pump: PumpT) -> None:
        """Make an event of broken connections, unless others have taken their place."""
        if self._pump is pump and (broken := self._broken()) is not None:
            self.post(broken)

    def _broken(self) -> PumpBroken | None:
        """Return what has become of the connections, None where the pump knows of nothing."""
        if self._pump is None or (status := self._pump.status()).state != "broken":
            return None
        return PumpBroken(self.now(), status.error or "a data connection broke")

    async def _watch_data(self, _command: WatchData) -> None:
        if self._pump is not None:
            self._pump.watch()

    @abstractmethod
    def _pump_ended(self, status: PumpStatus) -> None:
        """Make an event of the pump's end."""

    def _unwatch(self) -> None:
        if self._watched and self._pump is not None:
            asyncio.get_running_loop().remove_reader(self._pump.event_fd)
            self._watched = False

    async def _stop_pump(self, _command: StopPump) -> None:
        pump = self._pump
        if pump is None:
            return
        self._unwatch()
        await asyncio.to_thread(pump.stop)
        self.stats = pump.snapshot()
        self._pump = None
        pump.close()

    def snapshot(self) -> StatsT | None:
        """Return the pump's counters, the last ones once it has ended, None before it began."""
        if self._pump is None:
            return self.stats
        stats: StatsT = self._pump.snapshot()
        return stats


class SourcePumpInterpreter(PumpInterpreter[SourcePump, SourceStats]):
    """An interpreter with a source's pump: it is the source that says that it is there."""

    def __init__(self, machine: Machine[Any], name: str = "") -> None:
        super().__init__("source", machine, name)
        self._saying_alive: asyncio.Task[None] | None = None

    async def _step(self, event: Event) -> None:
        # Run is not sent over connections that are known to be dead, whatever else may still be heard.
        match event:
            case Received(message=Loaded()) if (broken := self._broken()) is not None:
                await super()._step(broken)
        await super()._step(event)

    def _pump_ended(self, status: PumpStatus) -> None:
        self.post(PumpFailed(self.now(), status.error or "the pump ended"))

    async def _watch_data(self, command: WatchData) -> None:
        await super()._watch_data(command)
        if self._saying_alive is None:
            self._saying_alive = self.spawn(self._say_alive())

    async def _say_alive(self) -> None:
        while True:
            await next_round(PROGRESS_SECONDS)  # it has just heard of Run, and the guest's first page goes first
            self.post(AliveDue(self.now()))
