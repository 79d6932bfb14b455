"""A guest's way out of an agent: the commands that send it away, and the end that it leads to.

A Source enters, with what else its guest is used for; the answers of the admin socket leave, and the exit status.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from agent import pausing
from agent.admin import Handler, Tell
from agent.counts import Totals, mode_of
from agent.daemon import Stop, first_of, tidy
from agent.kept import Kept, start_keeper
from agent.one_source import change
from agent.running_guest import MIGRATION, Use
from agent.security.options import credentials_of_migration
from postcopy.errors import PostcopyError, UsageError
from postcopy.limits import PART_FROM_DESTINATION_SECONDS
from postcopy.link.address import UnixAddress, parse_address
from postcopy.link.keeping import Record
from postcopy.link.report import Report
from postcopy.link.rounds import next_round
from postcopy.link.source import Source
from postcopy.link.tls import Credentials
from postcopy.session.states import SWITCHED, State

log = logging.getLogger("postcopy.agent")

LOOK_SECONDS = 0.1
ENDS = "the source's agent ends"


class Departure:
    """One guest's way out. `over` is set where its pages are lost; `totals` count its migrations.

    `tls_dir` is what a migration is encrypted with that says nothing of it. `keeper` is where another process has the
    memory, too, so that no page of a guest that has left is lost with this agent. `kept` is what a former agent left
    with one: then this one is here for nothing else, and `over` is set where it all has arrived, too.
    """

    def __init__(
        self,
        source: Source,
        use: Use,
        over: asyncio.Event,
        totals: Totals,
        *,
        tls_dir: Path | None = None,
        keeper: UnixAddress | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.source = source
        self._use = use
        self._over = over
        self._totals = totals
        source.begun = totals.begin
        self._tls_dir = tls_dir
        self._keeper = keeper
        self._kept = kept
        self._beginning = asyncio.Lock()  # what is said meanwhile waits until there is a migration that can hear it
        self._ends = {State.LOST} if kept is None else {State.LOST, State.COMPLETED}
        source.keeping = kept

    @property
    def guest_here(self) -> bool:
        """Whether the guest has not left."""
        # By the state: it changes at once, an owner is named when all is cleaned up.
        return self.source.state not in {*SWITCHED, State.COMPLETED, State.LOST}

    @property
    def begun(self) -> bool:
        """Whether a migration was tried at all."""
        return self.source.state is not State.NONE

    async def keep(self) -> None:
        """See that the guest's memory is kept by another process, where that is wanted. UsageError, HostError."""
        if self._keeper is None:
            return
        if self._kept is None:
            self._kept = await asyncio.to_thread(start_keeper, self._keeper, self.source.mappings)
            self.source.keeping = self._kept
        await asyncio.to_thread(self._kept.ensure)

    # --- commands -------------------------------------------------------------------------------------------------

    def commands(self) -> dict[str, Handler]:
        """Return the commands of the admin socket that are about it."""
        return {
            "migrate": self.migrate,
            "cancel": self.cancel,
            "pause": self.pause,
            "resume": self.resume,
            "set": self.set,
        }

    async def migrate(self, arguments: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Migrate, telling the progress; return the report."""
        source = self.source
        where = parse_address(str(arguments["to"]))
        tls = credentials_of_migration(where, self._tls_dir, arguments)
        with self._use.take(MIGRATION):
            async with self._beginning:
                source.check_free()
                await self.keep()  # while the guest runs: nobody is waited for once it stands still
                self._use.check_open()  # a keeper takes a moment to come up
                running = asyncio.create_task(
                    source.migrate(
                        where,
                        timeout=arguments.get("timeout"),
                        push=bool(arguments.get("push", True)),
                        rate=arguments.get("rate"),
                        tls=tls,
                    )
                )
                await asyncio.sleep(0)  # from here on there is somebody who can be told of changes
                if self._use.ending:
                    source.cancel(ENDS)
            return await self._follow(running, tell)

    async def take_up(self, record: Record, tls: Credentials | None) -> None:
        """Go on with a migration whose agent is gone, to its end, whatever that is; raise where it does not begin."""
        with self._use.take(MIGRATION):
            try:
                await self._follow(asyncio.create_task(self.source.take_up(record, tls=tls)), lambda _progress: None)
            except PostcopyError:
                if self.source.finish is None:
                    raise

    async def _follow(self, running: asyncio.Task[Report], tell: Tell) -> Report:
        """Bring a migration to its end, telling the progress; return the report."""
        tell(self._progress())  # at once, for whoever asks has to know who keeps the memory should this agent be killed
        while not running.done():
            pause = asyncio.create_task(next_round())
            await asyncio.wait({running, pause}, return_when=asyncio.FIRST_COMPLETED)
            pause.cancel()
            tell(self._progress())
        await self._note_end()
        try:
            return running.result()
        except PostcopyError as error:
            error.owner = self.source.owner.value
            raise

    def _progress(self) -> dict[str, Any]:
        source = self.source
        return {
            "state": source.state.value,
            "held": (source.pause_state or {}).get("held", False),
            "kept": str(self._keeper) if self._kept is not None else None,
            "placed": source.placed_pages,
            "total": source.layout.pages,
        }

    async def _note_end(self) -> None:
        """Take note of how a migration ended."""
        source = self.source
        if source.state is State.LOST and self._kept is not None:
            await asyncio.to_thread(self._kept.release)
        if source.state in self._ends:
            self._over.set()
        if source.finish is not None:
            self._totals.note("source", mode_of(source.report), source.finish.state)
        tidy()

    async def pause(self, _arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Close the connections of a migration that has switched over."""
        self.source.pause()
        return await pausing.paused(self.source)

    async def resume(self, arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Have a paused migration go on."""
        self.source.resume(pausing.another_address(self.source, arguments))
        return await pausing.resumed(self.source)

    async def cancel(self, arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Cancel a migration that has not reached its switchover; give up one that is paused behind it."""
        if arguments.get("lost"):
            self.source.lose()
            return await pausing.lost(self.source)
        async with self._beginning:
            cancelled = self.source.cancel()
        if not cancelled:
            text = "there is none" if self.guest_here else "the guest runs at the destination"
            raise UsageError(f"no migration can be cancelled: {text}")
        return {"schema_version": 1, "cancelled": True}

    async def set(self, arguments: dict[str, Any], _tell: Tell) -> dict[str, Any]:
        """Change the running migration: limit its push, begin a push that was left out."""
        async with self._beginning:
            return await change(self.source, arguments)

    # --- the agent's end ------------------------------------------------------------------------------------------

    async def finish(self, stop: Stop, end: Callable[[], NoReturn]) -> None:
        """Bring what uses the guest to its end: a check; a migration, cancelled before its switchover or hurried after.

        A second signal ends the process in the middle of it, by `end`.
        """
        self._use.refuse()
        self.source.cancel(ENDS)
        hurried = False
        while not self._use.over.is_set():
            if stop.again.is_set():
                await self._part()
                end()
            if self.source.state in SWITCHED and not hurried:
                hurried = True
                await self._hurry()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await first_of(stop.again, self._use.over)

    async def _hurry(self) -> None:
        """Send what is still here as fast as it goes."""
        log.warning(
            "source: pages of the running guest are still here: pushing them without any limit, and ending with the "
            "last one; signal again to end now"
        )
        self.source.set_rate(None)
        await self.source.start_push()
        with contextlib.suppress(UsageError):
            self.source.resume()

    async def _part(self) -> None:
        """Tell the destination where pages that are still here end with this agent; leave nothing kept for nobody."""
        kept = self._kept
        if self.source.state in SWITCHED and not (kept is not None and await asyncio.to_thread(kept.stays)):
            with contextlib.suppress(UsageError, TimeoutError):
                self.source.lose(ENDS, paused=False)
                async with asyncio.timeout(PART_FROM_DESTINATION_SECONDS):
                    await self._use.over.wait()
        if kept is not None and self.source.state in {State.COMPLETED, State.LOST}:
            await asyncio.to_thread(kept.release)

    def verdict(self) -> int:
        """Say who owns the guest now, and return the exit status that says the same."""
        state = self.source.state
        if state in SWITCHED and self._kept is not None and self._kept.keeps:
            text = "source: pages of the running guest stay with the keeper: postcopy source --resume %s goes on"
            log.warning(text, self._keeper)
            return 5
        if state in {*SWITCHED, State.LOST}:
            log.error("source: the guest is lost: pages that only this agent held are gone")
            return 6
        if state is State.COMPLETED:
            log.info("source: the guest is at the destination; nothing of it is left here")
        else:
            log.info("source: this agent owns the guest, which ends with it")
        return 0
