"""What stands between a machine and the world: the library's own interpreter loop, without asyncio under it.

`postcopy.link.interpreter.Interpreter` is used as it is: the queue of events and which of them come first, what came
over a former connection, refusals and mistakes that become events, the sending. Its coroutines never wait here, so each
is driven to its end at once. Modelled is what asyncio would do: messages off a connection, timers, and turns of the
loop between which others have theirs.
"""

from postcopy.errors import LinkError, PostcopyError, ProtocolError
from postcopy.limits import OWED_SECONDS, SILENCE_SECONDS
from postcopy.link.interpreter import Interpreter
from postcopy.session.events import Broken, ControlLost, Elapsed, Progressed, Received
from postcopy.session.machine import SessionError
from postcopy.wire.control import ControlDecoder, encode
from postcopy.wire.version import VERSION

from .world import RuleBrokenError

SAID = object()  # in place of a timer: the log is not waited for


class KilledError(BaseException):
    """This process was killed between two commands."""


def driven(coroutine):
    """Run a coroutine that waits for nothing, and return what it does."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a coroutine waits in a world without asyncio")


class Channel:
    """A control connection after its preamble: `postcopy.link.control.ControlChannel` over an End."""

    encrypted = False

    def __init__(self, end, name):
        self.name = name
        self.version = VERSION
        self.end = end
        self.bytes_sent = self.bytes_received = 0
        self.loop = None  # who gets its events
        self._decoder = ControlDecoder()
        self._first = None

    def send(self, message):
        if self.end.closed or self.end.known_over:
            raise LinkError(f"the connection to {self.name} is closed")
        data = encode(message, self.version)
        self.bytes_sent += len(data)
        self.end.send(data)

    def begin(self, loop):
        """Give what comes to a loop, as events."""
        self.loop = loop
        self.end.listen(self._taken, self._over)

    def begin_alone(self, first):
        """Give the first message, or the None that stands for none, to whoever finds out whose connection it is."""
        self._first = first
        self.end.listen(self._taken, self._over)

    def _taken(self, data):
        self.bytes_received += len(data)
        self._decoder.version = self.version
        try:
            messages = self._decoder.feed(data)
        except ProtocolError as error:
            self._tell(Broken, str(error))
            return
        for message in messages:
            if self.loop is None:
                self._first(message)
            else:
                self.loop.received(message, self)

    def _over(self, why, broken):
        try:
            if not broken:
                self._decoder.end()
        except ProtocolError as error:
            self._tell(Broken, str(error))
            return
        self._tell(ControlLost, why)

    def _tell(self, kind, text):
        if self.loop is None:
            self._first(None)
        else:
            self.loop.post(kind(self.loop.now(), text), self)

    async def close(self):
        self.end.close()


class Loop(Interpreter):
    """One machine's interpreter in a process of the world. Subclasses add a side's commands."""

    def __init__(self, role, machine, host):
        self.host = host
        self.world = host.world
        self._turning = False
        self._armed = None
        self._active_since = 0.0
        super().__init__(role, machine)
        self._telling = SAID
        self._handle, machine.handle = machine.handle, self._watched_handle

    def now(self):
        return self.world.now

    def post(self, event, channel=None, size=0):
        super().post(event, channel, size)
        self._turn_soon()

    def received(self, message, channel):
        """Queue a message, and count it as the real one does."""
        self.post(Received(self.now(), message), channel)
        self._count_ahead(1, 0)

    def post_first(self, event):
        super().post_first(event)
        self._turn_soon()

    def listen(self, channel):
        self._leave_channel()
        self.channel = channel
        channel.begin(self)

    def spawn(self, work):
        driven(self._guarded(work))

    async def _perform(self, command):
        if self.host.dies_now():
            raise KilledError
        await super()._perform(command)

    def _tell_failure(self, error, what):
        if isinstance(error, RuleBrokenError):
            raise error
        if not isinstance(error, PostcopyError | OSError):
            raise RuleBrokenError("no-mistake", f"{self.role}: {error!r} in {what}") from error
        super()._tell_failure(error, what)

    def _tell_states(self):
        self._untold.clear()  # nobody reads the log

    def work(self, seconds, act, *details):
        """Do something beside the machine; what it raises becomes WorkFailed."""
        self.host.after(seconds, self._work, act, details)

    def _work(self, act, details):
        try:
            act(*details)
        except Exception as error:
            self._tell_failure(error, "work")

    def begin(self):
        """Take the first turn."""
        self._turn_soon()

    def _turn_soon(self):
        if not self._turning and self.finish is None:
            self._turning = True
            self.host.after(self.host.turn * self.world.chance(), self._turn)

    def _turn(self):
        self._turning = False
        if self.finish is not None:
            return
        # where nothing waits _next() would: it says Elapsed, which is nothing to a machine whose time has not come
        event = driven(self._next()) if self._events else Elapsed(self.now())
        try:
            driven(self._step(event))
        except KilledError:
            self.host.kill()
            return
        except RuleBrokenError:
            raise
        except Exception as error:
            raise RuleBrokenError("no-mistake", f"{self.role}: {error!r} at {event}") from error
        if self.finish is not None:
            self.ended()
        elif self._events:
            self._turn_soon()
        else:
            self._arm()

    async def _arrives(self):
        return False  # what waited was a former connection's

    def _watched_handle(self, event):
        step = self.machine.step
        try:
            commands = self._handle(event)
        except SessionError as error:
            raise RuleBrokenError("no-mistake", f"{self.role}: {error}") from error
        except ProtocolError as error:
            raise RuleBrokenError("no-breach", f"{self.role}: {error}") from error
        self._look_at_patience(step, event)
        self.world.tell(self.role, f"{step} <-", event)
        for command in commands:
            self.world.tell(self.role, f"{self.machine.step} ->", command)
        return commands

    def _look_at_patience(self, before, event):
        """Nobody takes the other side for dead before it had its time since the connections stand."""
        step = self.machine.step
        if step == "active" and before != "active":
            self._active_since = event.now
        elif before == "active" and step == "paused":
            least = {Elapsed: SILENCE_SECONDS, Progressed: OWED_SECONDS}.get(type(event), 0.0)
            if event.now - self._active_since < least:
                text = f"the {self.role} gives a connection up {event.now - self._active_since:.3f} s after it stands"
                raise RuleBrokenError("patience", text)

    def _arm(self):
        deadline = self.machine.deadline
        if deadline is not None and (self._armed is None or deadline < self._armed):
            self._armed = deadline
            # a little behind it, since sums of times are rounded
            self.host.timer(max(0.0, deadline - self.now()) + 1e-6, self._ring, deadline)

    def _ring(self, deadline):
        if self._armed != deadline:
            return
        self._armed = None
        if self.finish is not None or self._turning:
            return  # a turn that is due looks at the clock itself
        if self.machine.deadline is not None and self.machine.deadline <= self.now():
            self._turn_soon()
        else:
            self._arm()

    def ended(self):
        """Take note that the machine has ended."""
