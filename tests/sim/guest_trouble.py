"""What goes wrong in a story of a guest that moves: trouble.py's, and what only its switchover knows.

Cuts at a byte are set beforehand on connections that are yet to be made.
"""

import math

from postcopy.limits import OWED_SECONDS
from postcopy.link import by_hand
from postcopy.session.events import CancelAsked, PushAsked
from postcopy.session.states import ENDED, SWITCHED

from .trouble import Trouble

FIRST_STEP, LAST_STEP = 2, 400


class GuestTrouble(Trouble):
    """`cancelled`: somebody did that."""

    def __init__(self, world, network, source, destination, guest, rules):
        super().__init__(world, network, source, destination)
        self.guest = guest
        self.rules = rules
        self.lurking = []  # what waits for its moment: calls at each step, until one says that it came
        self.waylaying = False
        destination.at_the_door = self._at_the_door
        self.cancelled = False
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
        self.planned = self.plan(kinds, world.one_of((0, 0, 1, 1, 2, 5)), FIRST_STEP, LAST_STEP)
        self.after_run = self.plan(kinds, world.one_of((0, 1, 2, 3, 5, 8)), FIRST_STEP, LAST_STEP)
        if world.likely(0.5):
            for _ in range(world.one_of((1, 3, 6, 9))):
                network.to_be_cut.append(self._cut_at_a_byte())
        network.lagging = world.one_of((0.0, 0.0, 0.2))
        source.failing = destination.failing = world.one_of((0.0, 0.0, 0.05))

    @property
    def spent(self):
        """Whether nothing more is to happen."""
        return not (self.planned or self.after_run or self.lurking or self.waylaying)

    def loops(self):
        """Return the migrations of both sides that have not ended."""
        return [loop for loop in (self.source.loop, self.destination.current) if loop is not None and not loop.finish]

    def mute(self, end):
        self.rules.mute(end)

    def asked(self, loop, act):
        self.rules.asked(loop, act)

    def ballooning(self):
        """Return the guest while it is at the destination."""
        place = self.guest.place
        return self.guest if place is not None and place.name == "destination" else None

    def _cut_at_a_byte(self):
        if self.world.likely(0.5):
            return None
        return self.world.one_of(("here", "there")), 1 + int(math.exp(self.world.between(0.0, math.log(40_000))))

    def look(self):
        """Let happen what is due, some of it counted from Run on."""
        if self.after_run and self.rules.run_sent:
            steps = self.world.steps
            planned = [*self.planned, *((steps + later, act) for later, act in self.after_run)]
            self.planned, self.after_run = sorted(planned, key=lambda one: one[0]), []
        if self.lurking:
            self.lurking = [one for one in self.lurking if not one()]
        super().look()

    def calm(self):
        """Let nothing go wrong any more, and nothing lurk."""
        super().calm()
        self.lurking, self.waylaying, self.after_run = [], False, []
        self.network.to_be_cut.clear()
        self.source.failing = self.destination.failing = 0.0

    # --- the network --------------------------------------------------------------------------------------

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
        self.silence(loops[0].channel.end.connection, False)
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

    def slow(self):
        """Make every connection from here on a slow one."""
        self.network.delay = min(0.12, 3 * self.network.delay)

    # --- the hosts ----------------------------------------------------------------------------------------

    def kill_source(self):
        """End the source's process, now or between two commands, and start it again."""
        self._kill(self.source)

    def kill_destination(self):
        """End the destination's process, and start it again: it knows nothing then."""
        self._kill(self.destination)

    def _kill(self, agent):
        if self.source.loop is not None:
            self.kill(agent.host, agent.start_again)

    # --- people and the guest -----------------------------------------------------------------------------

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
        """Give up a migration that is paused, at one side."""
        any(self.give_up(loop, "given up by the user") for loop in self.loops())

    def balloon_under_way(self, looks=300):
        """Have the guest give a page back of which a part has come."""
        keys = self.destination.under_way()
        if keys and self.guest.place is not None:
            self.give_back(self.guest, [self.world.one_of(keys)])
        elif looks and not self.over:
            self.world.after(0.003, self.balloon_under_way, looks - 1)
