"""What goes wrong in a story: drawn from its seed, each at a step of the world, until it stops for good.

Cuts at a byte are set beforehand on connections that are yet to be made.
"""

import math

from postcopy.errors import UsageError
from postcopy.limits import OWED_SECONDS
from postcopy.link import by_hand
from postcopy.session.events import CancelAsked, PushAsked
from postcopy.session.states import ENDED, SWITCHED

from .rules import NOTICED_SECONDS

FIRST_STEP, LAST_STEP = 2, 400
LONGEST_SECONDS = 12.0  # that anything lasts


class Trouble:
    """`over` once nothing goes wrong any more; `cancelled`, `gave_up`: somebody did that."""

    def __init__(self, world, network, source, destination, guest, rules):
        self.world = world
        self.network = network
        self.source = source
        self.destination = destination
        self.guest = guest
        self.rules = rules
        self.over = False
        self.lurking = []  # what waits for its moment: calls at each step, until one says that it came
        self.waylaying = False
        destination.at_the_door = self._at_the_door
        self.cancelled = False
        self.gave_up = False
        self.until = 0.0  # when what began has ended by itself
        kinds = [
            *[self.cut] * 6,
            *[self.cut_while_dialling] * 3,
            self.cut_at_the_door,
            *[self.mute_control] * 2,
            *[self.long_pause] * 2,
            *[self.half_open] * 3,
            *[self.dark] * 3,
            *[self.lag] * 3,
            *[self.freeze] * 3,
            self.refuse,
            self.slow,
            *[self.by_hand] * 3,
            self.cancel,
            *[self.balloon] * 3,
            *[self.balloon_under_way] * 2,
            *[self.kill_source] * 3,
            self.kill_destination,
            *([self.lose] if world.likely(0.1) else []),
        ]
        self.planned = self._plan(kinds, world.one_of((0, 0, 1, 1, 2, 5)))
        self.after_run = self._plan(kinds, world.one_of((0, 1, 2, 3, 5, 8)))
        if world.likely(0.5):
            for _ in range(world.one_of((1, 3, 6, 9))):
                network.to_be_cut.append(self._cut_at_a_byte())
        network.lagging = world.one_of((0.0, 0.0, 0.2))
        source.failing = destination.failing = world.one_of((0.0, 0.0, 0.05))

    @property
    def spent(self):
        """Whether nothing more is to happen."""
        return not (self.planned or self.after_run or self.lurking or self.waylaying)

    def _plan(self, kinds, count):
        """Draw what happens, and at which steps."""
        low, high = math.log(FIRST_STEP), math.log(LAST_STEP)
        steps = sorted(int(math.exp(self.world.between(low, high))) for _ in range(count))
        return [(step, self.world.one_of(kinds)) for step in steps]

    def _cut_at_a_byte(self):
        if self.world.likely(0.5):
            return None
        return self.world.one_of(("here", "there")), 1 + int(math.exp(self.world.between(0.0, math.log(40_000))))

    def look(self):
        """Let happen what is due."""
        if self.after_run and self.rules.run_sent:
            steps = self.world.steps
            planned = [*self.planned, *((steps + later, act) for later, act in self.after_run)]
            self.planned, self.after_run = sorted(planned, key=lambda one: one[0]), []
        if self.lurking:
            self.lurking = [one for one in self.lurking if not one()]
        if self.planned and self.world.steps >= self.planned[0][0]:
            _, act = self.planned.pop(0)
            act()

    def calm(self):
        """Let nothing go wrong any more, and have people put right what they did."""
        self.world.tell("world", "is calm from here")
        self.over = True
        self.lurking, self.waylaying = [], False
        self.planned = self.after_run = []
        self.network.to_be_cut.clear()
        self.network.refusing_until = self.network.lagging = 0.0
        self.source.failing = self.destination.failing = 0.0
        for host in (self.source.host, self.destination.host):
            host.commands_left = None

    def _for_a_while(self):
        seconds = math.exp(self.world.between(math.log(0.01), math.log(LONGEST_SECONDS)))
        self.until = max(self.until, self.world.now + seconds)
        return seconds

    # --- the network --------------------------------------------------------------------------------------

    def cut(self):
        """Break connections: one, or all."""
        connections = self.network.open()
        if connections and self.world.likely(0.5):
            connections = [self.world.one_of(connections)]
        for connection in connections:
            connection.cut("cut")

    def cut_all(self):
        """Break all connections at once."""
        for connection in self.network.open():
            connection.cut("cut with all others")

    def long_pause(self):
        """Break all connections, and have nobody listen for longer than a source may owe pages."""
        self.cut_all()
        seconds = OWED_SECONDS + self.world.between(0.5, 5.0)
        self.network.refusing_until = self.world.now + seconds
        self.until = max(self.until, self.network.refusing_until)

    def cut_while_dialling(self):
        """Break control while data connections are dialled, the first of which may be a slow one."""
        self.lurking.append(self._catch)
        if self.rules.run_sent:
            self.cut_all()

    def _catch(self):
        loop = self.source.loop
        if loop is None or loop.channel is None or loop.machine.step not in {"attaching", "reattaching"}:
            return False
        delay, between = self.network.delay, self.world.between
        match self.world.below(3):
            case 0:  # urgent says who it is when the source is on its way back once more
                when = between(2.0, 5.0) * delay
                self.network.hold_next["urgent"] = ("there", when + 0.06 + between(2.0, 8.0) * delay)
            case 1:  # push is let in, and the source does not hear of it before it hears that the guest runs
                when = between(7.0, 12.0) * delay
                self.network.hold_next["push"] = ("here", 20.0 * delay)
            case _:
                when = between(0.0, 8.0) * delay
        self.world.after(when, loop.channel.end.connection.cut, "cut while data connections are dialled")
        return True

    def mute_control(self):
        """Have control carry nothing one way once pages travel, and let nothing else go wrong."""
        self.lurking.append(self._mute)

    def _mute(self):
        loops = self.loops()
        if len(loops) < 2 or any(loop.machine.step != "active" or loop.channel is None for loop in loops):
            return False
        self.planned = self.after_run = []
        self._silence(loops[0].channel.end.connection, False)
        return True

    def cut_at_the_door(self):
        """Break control in the moment in which a data connection is let in."""
        self.waylaying = True
        if self.rules.run_sent:
            self.cut_all()

    def _at_the_door(self):
        current = self.destination.current
        if self.waylaying and current.channel is not None:
            self.waylaying = False
            current.channel.end.connection.cut("cut as a data connection is let in", within=0.0)
            current.channel.end.end("Connection reset by peer", True)

    def half_open(self):
        """Have a connection swallow what it is given."""
        if connections := self.network.open():
            both = self.world.likely(0.3)
            for connection in [self.world.one_of(connections)] if self.world.likely(0.7) else connections:
                self._silence(connection, both)

    def _silence(self, connection, both):
        connection.silence(both)
        for end in (connection.here, connection.there):
            if end.peer.out.mute:
                self.rules.mute(end)

    def dark(self):
        """Let nothing through for a while, and deliver it late."""
        seconds = self._for_a_while()
        self.network.partition(seconds)
        if seconds > NOTICED_SECONDS:
            for connection in self.network.connections:
                self.rules.mute(connection.here)
                self.rules.mute(connection.there)

    def lag(self):
        """Have one connection come behind all others."""
        if connections := self.network.open():
            self.world.one_of(connections).hold(self.world.now + self._for_a_while() / 4)

    def refuse(self):
        """Have nobody listen for a while."""
        self.network.refusing_until = self.world.now + self._for_a_while()

    def slow(self):
        """Make every connection from here on a slow one."""
        self.network.delay = min(0.12, 3 * self.network.delay)

    # --- the hosts ----------------------------------------------------------------------------------------

    def freeze(self):
        """Stop a process for a while."""
        host = self.world.one_of((self.source.host, self.destination.host))
        host.freeze(self._for_a_while())

    def kill_source(self):
        """End the source's process, now or between two commands, and start it again."""
        self._kill(self.source)

    def kill_destination(self):
        """End the destination's process, and start it again: it knows nothing then."""
        self._kill(self.destination)

    def _kill(self, agent):
        host = agent.host
        if not host.alive or self.source.loop is None:
            return
        host.killed[1:] = [lambda: self.world.after(self._for_a_while(), agent.start_again)]
        if self.world.likely(0.5):
            host.commands_left = self.world.below(12)
        else:
            host.kill()

    # --- people and the guest -----------------------------------------------------------------------------

    def loops(self):
        """Return the migrations of both sides that have not ended."""
        return [loop for loop in (self.source.loop, self.destination.current) if loop is not None and not loop.finish]

    def by_hand(self):
        """Pause, or resume what is paused."""
        for loop in self.loops():
            act = self.world.one_of((by_hand.pause, by_hand.resume, None))
            try:
                if act is not None:
                    act(loop)
                    self.rules.asked(loop, act)
                    self.world.tell("somebody", act.__name__, "at the", loop.role)
            except UsageError:
                pass

    def resume_all(self):
        """Have everything go on that somebody holds."""
        for loop in self.loops():
            if loop.machine.held and loop.machine.state in SWITCHED:
                by_hand.resume(loop)
                self.rules.asked(loop, by_hand.resume)
        loop = self.source.loop
        if loop is not None and loop.finish is None and not loop.machine.pushing:
            loop.post(PushAsked(self.world.now))

    def cancel(self):
        """Cancel at one side, where link lets it."""
        for loop in self.loops():
            if self.world.likely(0.5) and loop.machine.state not in {*SWITCHED, *ENDED}:
                self.cancelled = True
                self.world.tell("somebody", "cancels at the", loop.role)
                loop.post(CancelAsked(self.world.now, "cancelled by the user"))
                return

    def lose(self):
        """Give up a migration that is paused."""
        for loop in self.loops():
            try:
                by_hand.lose(loop, "given up by the user")
            except UsageError:
                continue
            self.gave_up = True
            self.world.tell("somebody", "gives up at the", loop.role)
            return

    def balloon(self):
        """Have the guest give pages back, and again after a while."""
        guest = self.guest
        if guest.place is not None and guest.place.name == "destination":
            first = self.world.below(len(guest.keys))
            self._give_back(guest.keys[first : first + 1 + self.world.below(6)])
        if not self.over and self.world.likely(0.6):
            self.world.after(0.01 * self.world.chance(), self.balloon)

    def balloon_under_way(self, looks=300):
        """Have the guest give a page back of which a part has come."""
        keys = self.destination.under_way()
        if keys and self.guest.place is not None:
            self._give_back([self.world.one_of(keys)])
        elif looks and not self.over:
            self.world.after(0.003, self.balloon_under_way, looks - 1)

    def _give_back(self, keys):
        self.world.tell("guest", "gives back", keys)
        self.guest.place.remove(keys)
