"""What goes wrong in any story: with the network, with hosts, and by people; each drawn from the seed, at a step.

Whose story it is says what stands here for it: which agents, which migrations, and who notices.
"""

import math

from postcopy.errors import UsageError
from postcopy.link import by_hand

from .rules import NOTICED_SECONDS

LONGEST_SECONDS = 12.0  # that anything lasts


class Trouble:
    """Trouble between a `source` and a `destination`, which are agents with a `host`, until it stops for good.

    `over` once nothing goes wrong any more; `gave_up`: somebody did that; `until`: when what began has ended by itself.
    Subclasses say who is there: `loops()`, `mute(end)`, `asked(loop, act)` and `ballooning()`.
    """

    def __init__(self, world, network, source, destination):
        self.world = world
        self.network = network
        self.source = source
        self.destination = destination
        self.over = False
        self.gave_up = False
        self.until = 0.0
        self.planned = []

    def loops(self):
        """Return the migrations that have not ended."""
        raise NotImplementedError

    def mute(self, end):
        """Have it looked whether it is noticed that nothing comes to this end any more."""
        raise NotImplementedError

    def asked(self, loop, act):
        """Hear what somebody asked for."""
        raise NotImplementedError

    def ballooning(self):
        """Return the guest that gives pages back, or None."""
        raise NotImplementedError

    # --- its course ---------------------------------------------------------------------------------------

    def plan(self, kinds, count, first, last):
        """Draw what happens, and at which steps."""
        low, high = math.log(first), math.log(last)
        steps = sorted(int(math.exp(self.world.between(low, high))) for _ in range(count))
        return [(step, self.world.one_of(kinds)) for step in steps]

    def look(self):
        """Let happen what is due."""
        if self.planned and self.world.steps >= self.planned[0][0]:
            _, act = self.planned.pop(0)
            act()

    def calm(self):
        """Let nothing go wrong any more."""
        self.world.tell("world", "is calm from here")
        self.over, self.planned = True, []
        self.network.refusing_until = self.network.lagging = 0.0
        for agent in (self.source, self.destination):
            agent.host.commands_left = None

    def for_a_while(self):
        """Draw for how many seconds something lasts."""
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

    def half_open(self):
        """Have a connection swallow what it is given, or all of them."""
        if connections := self.network.open():
            both = self.world.likely(0.3)
            for connection in [self.world.one_of(connections)] if self.world.likely(0.7) else connections:
                self.silence(connection, both)

    def silence(self, connection, both):
        """Have a connection swallow what it is given, both ways or one, and see that it is noticed."""
        connection.silence(both)
        for end in (connection.here, connection.there):
            if end.peer.out.mute:
                self.mute(end)

    def dark(self):
        """Let nothing through for a while, and deliver it late."""
        seconds = self.for_a_while()
        self.network.partition(seconds)
        if seconds > NOTICED_SECONDS:
            for connection in self.network.connections:
                self.mute(connection.here)
                self.mute(connection.there)

    def lag(self):
        """Have one connection come behind all others."""
        if connections := self.network.open():
            self.world.one_of(connections).hold(self.world.now + self.for_a_while() / 4)

    def refuse(self):
        """Have nobody listen for a while."""
        self.network.refusing_until = self.world.now + self.for_a_while()

    # --- the hosts ----------------------------------------------------------------------------------------

    def freeze(self):
        """Stop a process for a while."""
        host = self.world.one_of((self.source.host, self.destination.host))
        host.freeze(self.for_a_while())

    def kill(self, host, start_again):
        """End a process, now or between two commands, and have it started again by `start_again`."""
        if not host.alive:
            return
        host.killed[1:] = [lambda: self.world.after(self.for_a_while(), lambda: host.alive or start_again())]
        if self.world.likely(0.5):
            host.commands_left = self.world.below(12)
        else:
            host.kill()

    # --- people and guests --------------------------------------------------------------------------------

    def by_hand(self):
        """Pause, or resume what is paused."""
        for loop in self.loops():
            act = self.world.one_of((by_hand.pause, by_hand.resume, None))
            try:
                if act is not None:
                    act(loop)
                    self.asked(loop, act)
                    self.world.tell("somebody", act.__name__, "at the", loop.role)
            except UsageError:
                pass

    def give_up(self, loop, why):
        """Give up a migration, and say whether that could be done: it has to be paused."""
        try:
            by_hand.lose(loop, why)
        except UsageError:
            return False
        self.gave_up = True
        self.world.tell("somebody", "gives up at the", loop.role)
        return True

    def balloon(self):
        """Have a guest give pages back, and again after a while."""
        guest = self.ballooning()
        if guest is not None:
            first = self.world.below(len(guest.keys))
            self.give_back(guest, guest.keys[first : first + 1 + self.world.below(6)])
        if not self.over and self.world.likely(0.6):
            self.world.after(0.01 * self.world.chance(), self.balloon)

    def give_back(self, guest, keys):
        """Have a guest give these pages back."""
        self.world.tell("guest", "gives back", keys)
        guest.place.remove(keys)
