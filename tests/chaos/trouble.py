"""What happens to a migration, drawn from a seed: a list of troubles, each with its moment, that an actor then makes.

A seed enters and the same troubles always leave, in words, so that a round that failed is had again by its number.
"""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from dataclasses import dataclass, field

from agent.admin import admin_address, ask
from postcopy.errors import PostcopyError

from .link import CONTROL, PUSH, URGENT

ROLES = (CONTROL, URGENT, PUSH)
LOOK_SECONDS = 0.004
# Long enough to be noticed (2.5 s), which few rounds can afford.
LONG_SECONDS = 2.8
LONG_CHANCE = 0.03
# In a round of those whose agents may be killed. Others begin behind it, which takes seconds.
KILL_CHANCE = 0.3


@dataclass
class Trouble:
    """Something that is done `at` so many seconds after the start, and what ends it `after` so many more."""

    what: str
    at: float
    after: float = 0.0
    with_what: dict = field(default_factory=dict)

    def __str__(self):
        details = "".join(f" {key}={getattr(value, 'name', value)}" for key, value in self.with_what.items())
        return f"{self.at * 1e3:.0f} ms: {self.what}{details}" + (
            f" for {self.after * 1e3:.0f} ms" if self.after else ""
        )


class Course:
    """How a migration goes: the arguments of `migrate`, and the troubles on its way, by their moments."""

    def __init__(self, seed, kind):
        chance = random.Random(seed)
        encrypted = kind.tls
        # Half of them begin when the guest has left. Without a push pages are at both ends while there is trouble.
        self.behind_run = chance.random() < 0.5
        push = not self.behind_run and chance.random() < 0.5
        self.arguments = {"push": push, "rate": chance.choice([0, 4 << 20, 16 << 20, 64 << 20])}
        draw = [DRAWN[name] for name in chance.choices(list(DRAWN), WEIGHTS, k=chance.choice([1, 1, 2, 2, 3, 4]))]
        made = [one(chance, encrypted) for one in draw]
        if kind.mortal and chance.random() < KILL_CHANCE:
            made.append(_kill(chance))
        self.troubles = sorted(made, key=lambda trouble: trouble.at)

    def __str__(self):
        said = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        begin = "from Run on" if self.behind_run else "from the start"
        return f"{said}; {begin}: " + "; ".join(map(str, self.troubles))


def _moment(chance):
    """The switchover comes within some milliseconds."""
    return chance.choice([0.0, chance.uniform(0, 0.03), chance.uniform(0, 0.3), chance.uniform(0, 0.3)])


def _while(chance):
    return LONG_SECONDS if chance.random() < LONG_CHANCE else chance.choice([0.02, 0.1, 0.3]) * chance.uniform(0.5, 1.5)


def _bytes(chance, role):
    """From the first byte to as many as travel there, each number as likely as ten times as much."""
    return int(10 ** chance.uniform(0, {CONTROL: 4, URGENT: 5.5, PUSH: 6.5}[role]))


def _cut_after(chance, _encrypted):
    role = chance.choice(ROLES)
    details = {"role": role, "count": _bytes(chance, role)}
    return Trouble("cut", 0.0 if chance.random() < 0.5 else _moment(chance), with_what=details)


def _cut_now(chance, _encrypted):
    role = chance.choice([None, *ROLES])
    return Trouble("cut_now", _moment(chance), with_what={"role": role, "reset": chance.random() < 0.5})


def _slow(chance, _encrypted):
    return Trouble(
        "delay", 0.0, with_what={"role": chance.choice(ROLES), "seconds": chance.choice([0.001, 0.005, 0.03])}
    )


def _narrow(chance, _encrypted):
    return Trouble(
        "rate", 0.0, with_what={"role": chance.choice([URGENT, PUSH]), "rate": chance.choice([4, 16, 64]) << 20}
    )


def _hole(chance, _encrypted):
    return Trouble("hole", _moment(chance), _while(chance), {"lose": chance.random() < 0.5})


def _away(chance, _encrypted):
    return Trouble(chance.choice(["refuse", "deaf"]), _moment(chance), _while(chance))


def _link(chance, _encrypted):
    return Trouble("link_down", _moment(chance), _while(chance))


def _stop(chance, _encrypted):
    return Trouble("stop", _moment(chance), _while(chance), {"agent": chance.choice(["leaving", "coming"])})


def _hand(chance, _encrypted):
    return Trouble("pause", _moment(chance), _while(chance), {"agent": chance.choice(["leaving", "coming"])})


def _cancel(chance, _encrypted):
    return Trouble("cancel", chance.uniform(0, 0.04), with_what={"agent": chance.choice(["leaving", "coming"])})


def _kill(chance):
    return Trouble("kill", _moment(chance), with_what={"agent": chance.choice(["leaving", "coming"])})


def _spoil(chance, encrypted):
    """Only where something tells: plain connections have no other guard than TCP's own."""
    if not encrypted:
        return _cut_after(chance, encrypted)
    role = chance.choice(ROLES)
    details = {"role": role, "count": _bytes(chance, role), "back": chance.random() < 0.3}
    return Trouble("spoil", _moment(chance), with_what=details)


DRAWN = {
    "cut": _cut_after, "cut_now": _cut_now, "slow": _slow, "narrow": _narrow, "hole": _hole, "away": _away,
    "link": _link, "stop": _stop, "hand": _hand, "cancel": _cancel, "spoil": _spoil,
}  # fmt: skip
WEIGHTS = [6, 4, 2, 2, 3, 2, 2, 3, 2, 1, 4]


class Actor:
    """Makes troubles for a pair, and puts an end to them. `killed`: the agent that it has killed, the last of them."""

    def __init__(self, pair):
        self.killed = None
        self._pair = pair
        self._ends = []  # (when, what ends it)
        self._standing = []  # agents that are stopped, with when they go on
        self._asking = []

    def play(self, troubles, over):
        """Make each at its moment, and end each; leave nothing behind. `over`: whether the migration has ended."""
        began = time.monotonic()
        coming = list(troubles)
        while coming or self._ends or self._standing:
            now = time.monotonic()
            if over() or self.killed is not None:
                coming, now = [], float("inf")
            while coming and began + coming[0].at <= now:
                self._make(coming.pop(0), now)
            self._end(now)
            if not self._standing and self.killed is None:
                self._pair.never_both()
            time.sleep(LOOK_SECONDS)
        for asking in self._asking:
            asking.join(30)

    def _end(self, now):
        for when, agent in list(self._standing):
            if when <= now:
                agent.signal(signal.SIGCONT)
                self._standing.remove((when, agent))
        if self._standing:
            return  # one that stands still answers nobody
        for end in [end for end in self._ends if end[0] <= now]:
            self._ends.remove(end)
            end[1]()

    def _make(self, trouble, now):
        end = getattr(self, f"_{trouble.what}")(until=now + trouble.after, **trouble.with_what)
        if end is not None:
            self._ends.append((now + trouble.after, end))

    def _cut(self, role, count, until):
        self._pair.proxy.budget[role] = count

    def _cut_now(self, role, reset, until):
        self._pair.proxy.cut(*([role] if role is not None else []), reset=reset)

    def _delay(self, role, seconds, until):
        self._pair.proxy.delay[role] = seconds

    def _rate(self, role, rate, until):
        self._pair.proxy.rate[role] = rate

    def _spoil(self, role, count, back, until):
        (self._pair.proxy.spoil_back if back else self._pair.proxy.spoil)[role] = count

    def _hole(self, lose, until):
        proxy = self._pair.proxy
        proxy.swallow(lose=lose)
        return proxy.cut if lose else proxy.wake

    def _refuse(self, until):
        proxy = self._pair.proxy
        proxy.refuses = True
        return proxy.admit

    def _deaf(self, until):
        proxy = self._pair.proxy
        proxy.deaf = True
        return proxy.admit

    def _link_down(self, until):
        self._pair.network.link("down")
        return lambda: self._pair.network.link("up")

    def _stop(self, agent, until):
        stopped = getattr(self._pair, agent)
        stopped.signal(signal.SIGSTOP)
        self._standing.append((until, stopped))

    def _kill(self, agent, until):
        self.killed = getattr(self._pair, agent)
        self.killed.signal(signal.SIGKILL)
        self.killed.wait()

    def _pause(self, agent, until):
        paused = getattr(self._pair, agent)
        if self._standing or not wish(paused, "pause"):
            return None
        return lambda: self._ask(paused, "resume")

    def _cancel(self, agent, until):
        if not self._standing:
            self._ask(getattr(self._pair, agent), "cancel")

    def _ask(self, agent, command):
        """Ask without waiting: an answer may take until the network is better."""
        self._asking.append(threading.Thread(target=wish, args=(agent, command), daemon=True))
        self._asking[-1].start()


def wish(agent, command, **arguments):
    """Ask for what may make no sense just now; return whether it does."""
    try:
        asyncio.run(ask(admin_address(agent.admin), command, arguments))
    except PostcopyError:
        return False
    return True
