"""The world that a simulated migration lives in: its clock, its chance, what is due next, and what has happened.

Calls to be made later enter, with the seconds until then; they are made one at a time, each a step, and after each step
the rules are looked at. All chance comes from one Random, so a seed is a whole story.
"""

import hashlib
import heapq
import random
from collections import deque

REMEMBERED = 80  # events of a story that a broken rule tells


class RuleBrokenError(AssertionError):
    """A rule of rules.py does not hold: `rule` is its name."""

    def __init__(self, rule, text):
        super().__init__(f"{rule}: {text}")
        self.rule = rule


class World:
    """Time, chance and what is due. `whole`: remember the whole story, not its end only."""

    def __init__(self, seed, *, whole=False):
        self.seed = seed
        self.random = random.Random(seed)
        self.chance = self.random.random
        self.now = 0.0
        self.steps = 0
        self.story = deque(maxlen=None if whole else REMEMBERED)
        self._due = []
        self._order = 0
        self.each_step = []  # calls after every step

    def after(self, seconds, act, *details):
        """Call `act` when so many seconds have passed; what is due at one time is done in the order of asking."""
        self._order += 1
        heapq.heappush(self._due, (self.now + seconds, self._order, act, details))

    def tell(self, who, what, *details):
        """Take note of something that happened. Nothing is put into words unless somebody reads it."""
        self.story.append((self.steps, self.now, who, what, details))

    def run(self, until, over):
        """Make the calls that are due, to the time `until` or to the first step after which `over()`."""
        due, each_step = self._due, self.each_step
        while due and not over():
            if due[0][0] > until:
                self.now = max(self.now, until)
                return
            self.now, _, act, details = heapq.heappop(due)
            self.steps += 1
            act(*details)
            for look in each_step:
                look()

    # --- chance -------------------------------------------------------------------------------------------

    def likely(self, part):
        """Be true in this part of all cases."""
        return self.chance() < part

    def below(self, count):
        """Return a whole number from 0 on, below `count`."""
        return int(self.chance() * count)

    def between(self, low, high):
        """Return a number in between."""
        return low + (high - low) * self.chance()

    def one_of(self, things):
        """Return one of them."""
        return things[int(self.chance() * len(things))]

    # --- for whoever reads it -----------------------------------------------------------------------------

    def lines(self):
        """Return the story, a line for each event."""
        return [
            f"{step:5} {now:9.4f} {who:12} {what} {' '.join(map(_said, details))}".rstrip()
            for step, now, who, what, details in self.story
        ]

    def digest(self):
        """Return a name of the story: two that differ in anything have two."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()


def _said(detail):
    text = detail if isinstance(detail, str) else repr(detail)
    return text if len(text) <= 160 else text[:159] + "…"


class Host:
    """A process on a machine: it can stand still for a while, and it can be killed, with all that it meant to do.

    `life` counts its lives.
    """

    def __init__(self, world, name):
        self.world = world
        self.name = name
        self.life = 0
        self.alive = True
        self.frozen_until = 0.0
        self.ends = set()  # of its connections
        self.turn = 0.0005  # seconds at most until its loop has its turn
        self.commands_left = None  # to perform until it is killed
        self.killed = []  # calls after its end

    def after(self, seconds, act, *details):
        """Call `act` later, unless this process is killed before; while it stands still it waits."""
        self.world.after(seconds, self._call, self.life, act, details)

    def timer(self, seconds, act, *details):
        """Do the same for a clock, which is looked at when everything that had arrived was taken in."""
        self.world.after(seconds, self._ring, self.life, act, details)

    def _call(self, life, act, details):
        if life != self.life:
            return
        if self.world.now < self.frozen_until:
            self.world.after(self.frozen_until - self.world.now, self._call, life, act, details)
            return
        act(*details)

    def _ring(self, life, act, details):
        if self.world.now < self.frozen_until:
            self.world.after(self.frozen_until - self.world.now + 0.02, self._ring, life, act, details)
            return
        self._call(life, act, details)

    def freeze(self, seconds):
        """Stand still, as after SIGSTOP."""
        self.world.tell(self.name, "stands still", f"{seconds:.3f} s")
        self.frozen_until = max(self.frozen_until, self.world.now + seconds)

    def kill(self):
        """End at once, as after SIGKILL: the kernel closes its connections."""
        self.life += 1
        self.alive = False
        self.frozen_until = 0.0
        self.commands_left = None
        self.world.tell(self.name, "is killed")
        for end in sorted(self.ends, key=lambda end: end.number):
            end.close()
        self.ends.clear()
        for tell in self.killed:
            tell()

    def dies_now(self):
        """Say whether it is killed before the next command."""
        if self.commands_left is None:
            return False
        self.commands_left -= 1
        return self.commands_left < 0
