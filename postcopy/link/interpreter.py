"""The loop that both sides share: events in their order to the machine, its commands performed in theirs.

Messages, the ends of tasks and timers enter as events; each goes to the machine alone, and what the machine answers is
done before the next one is looked at. Nothing here decides anything: a command that nobody knows how to perform raises.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from postcopy.errors import HostError, KernelError, PostcopyError, ProtocolError, UsageError
from postcopy.limits import BYTES_AHEAD_MAX, MESSAGES_AHEAD_MAX
from postcopy.link.about import About, speak_of
from postcopy.link.control import ControlChannel
from postcopy.session.commands import CloseLinks, Command, DropControl, Finish, Note, Send
from postcopy.session.events import Broken, ControlLost, Elapsed, Event, NotSent, Received, WorkFailed
from postcopy.session.machine import Machine, SessionError
from postcopy.session.states import SWITCHED, State
from postcopy.wire.messages import REFUSE_CODES

# After a time-out, how often the loop may look for what had arrived by then: a message is read, decoded and posted in
# three rounds, a connection that proves itself in some more.
ROUNDS_AFTER_PAUSE = 10

# For who wants to know what came of a wish: it is mostly handled before he looks first.
HANDLED_LOOK_SECONDS = 0.005

# How long a state is kept to oneself: a guest that stands still runs on by then, and who waits in a fault is served.
TELL_SECONDS = 0.02

log = logging.getLogger("postcopy.session")


@functools.cache
def boot_id() -> str:
    """Return the name of this boot of this host: two agents that share it share CLOCK_MONOTONIC."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class Interpreter:
    """Performs one machine's commands; subclasses add a side's own by `performers()`.

    `role` is "source" or "destination", for the log, and `name` whom it is about where an agent has many at a time.
    `run()` returns the Finish with which the machine ended.
    """

    def __init__(self, role: str, machine: Machine[Any], name: str = "") -> None:
        self.role = role
        self.called = f"{role}: {name}" if name else role
        self.about = About(role)
        self.machine = machine
        self.channel: ControlChannel | None = None
        self.finish: Finish | None = None
        # each with the control connection that it came over, if it did, and its bytes: what came over a former one is
        # dropped
        self._events: deque[tuple[Event, ControlChannel | None, int]] = deque()
        self._reading: asyncio.Task[None] | None = None
        self._addressed: ControlChannel | None = None  # whom the commands that are being done were made for
        self._former_bytes = (0, 0)
        self.encrypted = False
        self._untold: list[tuple[float, State, State]] = []  # each with the time of day at which it came
        self._telling: asyncio.TimerHandle | None = None
        self.quiet = False  # nothing is logged of it: it may be anybody's, and whoever let it in says what came of it
        self._arrived = asyncio.Event()
        self._ahead: tuple[int, int] = (0, 0)  # messages, and their bytes
        self._room = asyncio.Event()
        self._room.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._performers: dict[type[Command], Callable[[Any], Awaitable[None]]] = {
            Send: self._send,
            Note: self._note,
            DropControl: self._drop_control,
            CloseLinks: self._close_links,
            Finish: self._finish,
            **self.performers(),
        }

    def performers(self) -> dict[type[Command], Callable[[Any], Awaitable[None]]]:
        """Return how this side performs its own commands."""
        raise NotImplementedError

    # --- events in ----------------------------------------------------------------------------------------

    def post(self, event: Event, channel: ControlChannel | None = None, size: int = 0) -> None:
        """Queue an event, which came over `channel` in `size` bytes if it did; from the loop's thread only."""
        self._events.append((event, channel, size))
        self._arrived.set()

    def post_first(self, event: Event) -> None:
        """Queue an event before all that wait: one that the machine must know of to judge them."""
        self._events.appendleft((event, None, 0))
        self._arrived.set()

    async def handled(self) -> None:
        """Return when the machine knows of all that was posted so far, or has ended."""
        last = self._events[-1] if self._events else None
        while self.finish is None and any(waiting is last for waiting in self._events):
            await asyncio.sleep(HANDLED_LOOK_SECONDS)

    @staticmethod
    def now() -> float:
        """Return the time that events carry: CLOCK_MONOTONIC in seconds."""
        return time.monotonic()

    @property
    def control_bytes(self) -> tuple[int, int]:
        """Bytes of messages sent and received on the control connection."""
        sent, received = self._former_bytes
        if self.channel is not None:
            sent, received = sent + self.channel.bytes_sent, received + self.channel.bytes_received
        return sent, received

    def listen(self, channel: ControlChannel) -> None:
        """Turn what comes over the control channel into events, in place of a former one."""
        self._leave_channel()
        self.channel, self.encrypted = channel, channel.encrypted
        self._reading = self.spawn(self._read(channel))

    def _leave_channel(self) -> None:
        former, self.channel = self.channel, None
        if former is None:
            return
        if self._reading is not None:
            self._reading.cancel()
        sent, received = self._former_bytes
        self._former_bytes = (sent + former.bytes_sent, received + former.bytes_received)
        self.spawn(former.close())  # what was said last may still arrive

    async def _read(self, channel: ControlChannel) -> None:
        while True:
            await self._room.wait()
            before = channel.bytes_received
            try:
                message = await channel.receive()
            except ProtocolError as error:
                return self.post(Broken(self.now(), str(error)), channel)
            except PostcopyError as error:
                return self.post(ControlLost(self.now(), str(error)), channel)
            size = channel.bytes_received - before
            self.post(Received(self.now(), message), channel, size)
            self._count_ahead(1, size)

    def _count_ahead(self, messages: int, size: int) -> None:
        """Count what is read and not judged; at a limit nothing more is read until some of it is."""
        self._ahead = self._ahead[0] + messages, self._ahead[1] + size
        if self._ahead[0] < MESSAGES_AHEAD_MAX and self._ahead[1] < BYTES_AHEAD_MAX:
            self._room.set()
        else:
            self._room.clear()

    # --- the loop -----------------------------------------------------------------------------------------

    async def run(self) -> Finish:
        """Drive the machine to its end, whatever happens on the way: a guest must not be left to a loop that broke."""
        speak_of(self.about)
        try:
            while self.finish is None:
                event = await self._next()
                try:
                    await self._step(event)
                except Exception as error:  # a mistake of ours that no table foresaw
                    await self._give_up(error)
            return self.finish
        finally:
            self._tell_states()
            await self._end_tasks()

    async def _give_up(self, error: Exception) -> None:
        log.error("%s: internal error", self.called, exc_info=error)
        self._addressed = self.channel
        for command in self.machine.give_up(WorkFailed(self.now(), "internal", f"internal error: {error!r}")):
            await self._perform(command)

    async def _next(self) -> Event:
        """Return the next event, which is Elapsed if none comes before the machine's deadline."""
        while True:
            if not self._events and not await self._arrives():
                return Elapsed(self.now())
            event, channel, size = self._events.popleft()
            if isinstance(event, Received) and channel is not None:
                self._count_ahead(-1, -size)
            if channel is None or channel is self.channel:
                return event

    async def _arrives(self) -> bool:
        """Wait for an event; False where the machine's deadline passes before."""
        while not self._events:
            self._arrived.clear()
            deadline = self.machine.deadline
            try:
                async with asyncio.timeout(None if deadline is None else max(0.0, deadline - self.now())):
                    await self._arrived.wait()
            except TimeoutError:
                # This process may have been stopped for a while; what came meanwhile is behind the timer and counts.
                for _ in range(ROUNDS_AFTER_PAUSE):
                    await asyncio.sleep(0)
                if not self._events:
                    return False
        return True

    async def _step(self, event: Event) -> None:
        before = self.machine.state
        try:
            commands = self.machine.handle(event)
        except ProtocolError as error:
            if not self.quiet:
                log.warning("%s: closed %s: %s", self.called, self.channel and self.channel.name, error)
            commands = self.machine.handle(Broken(self.now(), str(error)))
        except SessionError as error:
            log.exception("%s: internal error", self.called)
            commands = self.machine.handle(self._mistake(error))
        self._addressed = self.channel
        if self.channel is not None and self.machine.version:
            self.channel.version = self.machine.version
        self.about.migration = self.machine.migration_id.hex()
        if self.machine.state is not before:
            self._untold.append((time.time(), before, self.machine.state))
            self._telling = self._telling or asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell_states)
        if self.machine.ended:
            self._tell_states()
        for command in commands:
            await self._perform(command)

    def _mistake(self, error: SessionError) -> Event:
        """Return what an event is taken for that no table foresaw: the machine stands where it stood.

        After Run both sides agree on everything anew where the connections are made anew, and nothing is lost by it.
        """
        if self.machine.state in SWITCHED and getattr(self.machine, "recoverable", False):
            return Broken(self.now(), f"internal error: {error}")
        return failure_of(error, self.now())

    def _tell_states(self) -> None:
        """Log the states that were come through, a little later than they came, or before anything else is said.

        The guest may be standing still, and a line takes as long as whoever takes it in: the first ones a millisecond.
        Each line bears the time of its change, not of its writing.
        """
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        if self.quiet:
            return
        for changed, before, state in self._untold:
            if log.isEnabledFor(logging.INFO):
                log.handle(self._line(changed, before, state))
        self._untold.clear()

    def speak(self) -> None:
        """Log it from here on, and what was not logged up to here."""
        self.quiet = False
        self._tell_states()

    def _line(self, changed: float, before: State, state: State) -> logging.LogRecord:
        """Return the line of a change of state: to whoever writes it down, it was made when the state came."""
        words = ("%s: %s -> %s", (self.called, before, state))
        line = log.makeRecord(log.name, logging.INFO, __file__, 0, *words, None, extra={"state": str(state)})
        line.relativeCreated += 1000 * (changed - line.created)
        line.created, line.msecs = changed, 1000 * (changed % 1)
        return line

    async def _perform(self, command: Command) -> None:
        """Do one command. What goes wrong becomes an event: the commands behind it are still owed."""
        try:
            await self._performers[type(command)](command)
        except Exception as error:  # whatever it was, the guest must not hang on it
            self._tell_failure(error, type(command).__name__)

    # --- work beside the loop -----------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Let a coroutine run beside the machine; what it raises becomes WorkFailed."""
        task = asyncio.create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # one that was cancelled before it began
        return task

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # as above
            self._tell_failure(error, "work")

    def _tell_failure(self, error: Exception, what: str) -> None:
        """Make a failure an event; one that nobody expected leaves its trace in the log."""
        if not isinstance(error, PostcopyError | OSError):
            log.error("%s: internal error in %s", self.called, what, exc_info=error)
        self.post(failure_of(error, self.now()))

    async def _end_tasks(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- commands of both sides ---------------------------------------------------------------------------

    async def _send(self, command: Send) -> None:
        if self.channel is not self._addressed:
            return  # the other side came back on another connection while this was being done: it is asked anew there
        try:
            if self.channel is None:
                raise HostError("there is no control connection")
            self.channel.send(command.message)
        except PostcopyError as error:
            # Before all that waits: the end of the connection is surely among it, and would be judged first.
            self.post_first(NotSent(self.now(), command.message, str(error)))

    async def _note(self, command: Note) -> None:
        self._tell_states()
        if not self.quiet:
            log.info("%s: %s", self.called, command.text)

    async def _drop_control(self, _command: DropControl) -> None:
        self._leave_channel()

    async def _close_links(self, _command: CloseLinks) -> None:
        if self.channel is not None:
            await self.channel.close()

    async def _finish(self, command: Finish) -> None:
        self._tell_states()
        if not self.quiet:
            level = logging.INFO if command.exit_status == 0 else logging.WARNING
            log.log(level, "%s: %s", self.called, command.text)
        self.finish = command


def failure_of(error: BaseException, now: float) -> WorkFailed:
    """Say a failure of this side's own work in the words of the protocol; an error of ours may bring its own code."""
    match error:
        case HostError() | KernelError():
            code, text, status = "host", str(error), 3
        case UsageError():
            code, text, status = "layout", str(error), error.exit_status
        case PostcopyError():
            code, text, status = "guest", str(error), 4
        case OSError():
            code, text, status = "host", str(error), 3
        case _:
            code, text, status = "internal", f"internal error: {error!r}", 4
    own = getattr(error, "code", code)  # other people's errors have a `code`, too, and it may be anything
    return WorkFailed(now, own if own in REFUSE_CODES else code, text, status)
