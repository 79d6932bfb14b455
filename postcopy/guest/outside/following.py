"""What becomes of a process that is served: its migration, the time after it, and every end that there is.

Interpreters with their processes enter; each process leaves with all of its pages, with those that never come poisoned,
or with nothing said because it has ended. What goes wrong with one of them ends that one alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence

from postcopy.errors import HostError, PostcopyError
from postcopy.guest.outside.handing import HandedOver
from postcopy.guest.outside.session import OutsideInterpreter
from postcopy.guest.outside.turns import Turns
from postcopy.limits import ANSWER_SECONDS, PROCESSES_MAX
from postcopy.link.control import ControlChannel
from postcopy.link.returning import Known
from postcopy.session.commands import Finish
from postcopy.session.states import SWITCHED, State

log = logging.getLogger("postcopy.destination")


class Following:
    """The processes that are served now, and those that wait for a source. `fetches`: none of them waits for long."""

    def __init__(
        self,
        *,
        fetches: bool,
        ended: Callable[[OutsideInterpreter, Finish], None],
        left: Callable[[OutsideInterpreter], None],
    ) -> None:
        self.current: list[OutsideInterpreter] = []
        self.waiting: deque[HandedOver] = deque()
        self._fetches = fetches
        self._ended = ended
        self._left = left
        self._known = Known(PROCESSES_MAX)
        self._freed = asyncio.Event()  # a process waits again, or for the first time; or a turn is over
        self._turns = Turns()

    async def _drive(self, interpreter: OutsideInterpreter, channel: ControlChannel | None) -> None:
        if channel is not None:
            interpreter.listen(channel)
        watching = asyncio.create_task(self._watch(interpreter))
        try:
            finish = await interpreter.run()
        finally:
            watching.cancel()
        await self._follow(interpreter, finish)

    async def _watch(self, interpreter: OutsideInterpreter) -> None:
        await interpreter.handed.gone_for_good()
        await interpreter.process_ended()

    async def _follow(self, interpreter: OutsideInterpreter, finish: Finish) -> None:
        handed = interpreter.handed
        if finish.state is State.COMPLETED:
            self._ended(interpreter, finish)
            await self._served(interpreter)
        elif finish.state is State.LOST or self._fetches or not handed.lives:
            await self._abandon(interpreter, finish.text)
            self._ended(interpreter, finish)
        else:
            await self._remove(interpreter)
            self._ended(interpreter, finish)
            if interpreter.channel is not None and not interpreter.machine.probed:
                self._turns.came_to_nothing(interpreter.channel.origin)
            self.waiting.appendleft(handed)  # nothing was served: another source may come, and it has waited longest
            self._freed.set()
            if handed.process.ended.is_set():  # and then nobody may be left who waits for its end
                await self._wait(handed)

    async def _wait_for_turn(self, channel: ControlChannel) -> HandedOver | None:
        """Take the process that has waited longest; None where there is none, and none is about to be freed."""
        until = OutsideInterpreter.now() + ANSWER_SECONDS  # half of what a source waits here
        while True:
            self._freed.clear()
            while self.waiting and not self.waiting[0].lives:
                self.waiting.popleft().close()
            if self.waiting and self._turns.is_next(channel):
                return self.waiting.popleft()
            left = until - OutsideInterpreter.now()
            none = not self.waiting and all(one.machine.state in {*SWITCHED, State.COMPLETED} for one in self.current)
            if left <= 0 or none:
                return None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._freed.wait()

    async def _wait(self, handed: HandedOver) -> None:
        """Keep a process for a source that dials; its end may come before."""
        await handed.gone_for_good()
        if handed in self.waiting:  # and not with a migration, which then is told
            self.waiting.remove(handed)
            log.info("destination: %s has ended, and no source had come", handed.process)
            handed.close()

    async def _served(self, interpreter: OutsideInterpreter) -> None:
        """Let a process go when it ends, or when its pump does: then nobody serves what it gives back."""
        gone = asyncio.create_task(interpreter.handed.gone_for_good())
        failed = asyncio.create_task(interpreter.failed.wait())
        try:
            await asyncio.wait({gone, failed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            failed.cancel()
        if interpreter.failed.is_set():
            await self._abandon(interpreter, interpreter.trouble)
        else:
            await self._forget(interpreter)

    async def _abandon(self, interpreter: OutsideInterpreter, text: str) -> None:
        """End a process's memory that never comes: poisoned, so that nobody waits for it and nobody sees zeros."""
        handed = interpreter.handed
        if not handed.lives:
            log.info("destination: %s has ended: %s", handed.process, text)
            await self._forget(interpreter)
            return
        await self._lose(handed, await interpreter.stop(), text)
        await self._forget(interpreter)

    async def _lose(self, handed: HandedOver, maps: Sequence[bytes], text: str) -> None:
        try:
            poisoned = await asyncio.to_thread(handed.poison, maps)
        except PostcopyError as error:
            log.error("destination: %s: %s; it waits for its pages for ever: %s", handed.process, text, error)  # noqa: TRY400
            await handed.gone_for_good()
        else:
            log.warning("destination: %s: %s; %d pages are poisoned", handed.process, text, poisoned)

    async def _forget(self, interpreter: OutsideInterpreter) -> None:
        await self._remove(interpreter)
        interpreter.handed.close()

    async def _remove(self, interpreter: OutsideInterpreter) -> None:
        await interpreter.end()
        if interpreter in self.current:
            self.current.remove(interpreter)
            self._left(interpreter)

    async def _leave(self, handed: HandedOver, interpreter: OutsideInterpreter | None) -> bool:
        """Leave one process to itself; return whether it lacks pages."""
        poisoned = 0
        if handed.lives:
            try:
                maps = handed.states() if interpreter is None else await interpreter.stop()
                poisoned = await asyncio.to_thread(handed.poison, maps)
            except HostError as error:
                log.error("destination: %s waits for its pages for ever: %s", handed.process, error)  # noqa: TRY400
                return True
            if poisoned:
                log.error("destination: %s loses %d pages that were still at the source", handed.process, poisoned)
        if interpreter is not None:
            await self._remove(interpreter)
        handed.close()
        return poisoned > 0
