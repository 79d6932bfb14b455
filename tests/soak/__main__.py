"""`python -m tests.soak`: as many rounds of trouble as one likes, or the ring, between real daemons on two namespaces.

    python -m tests.soak --rounds 5000            other rounds each time; --seed N begins with round N
    python -m tests.soak --seed N --rounds 1      round N again
    python -m tests.soak --ring 100               a guest that goes to and fro so many times

Needs root, for namespaces of its own; nothing else of the host is changed. It gives way to all else that runs, and with
`--cpus 0` (a list as taskset has it) keeps to those; where others take all of them, an agent that does not start within
40 s is taken for a failure. Each round is told of when it has ended, with all that its number drew, and now and then
how many there were; at the end what came of them. Ends with 1 at the first round after which anything is not as it
must be.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from postcopy.kernel import memory_type
from tests.chaos.pair import memory_of, pair
from tests.chaos.rounds import HUGE_PAGES, KINDS, Rounds, kind_of, ring

PART = 100


def main():
    asked = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    asked.add_argument("--rounds", type=int, default=0, metavar="N")
    asked.add_argument("--seed", type=int, default=None, metavar="N", help="the first round; default: drawn")
    asked.add_argument("--ring", type=int, default=0, metavar="N", help="migrations of one guest, to and fro")
    asked.add_argument("--cpus", type=int, nargs="+", default=None, metavar="N", help="run on these only")
    options = asked.parse_args()
    if not options.rounds and not options.ring:
        asked.error("nothing to do: --rounds N, --ring N, or both")
    os.nice(19)
    own = Path("/proc/self/autogroup")  # where the scheduler groups by sessions, niceness counts within one only
    if os.getsid(0) == os.getpid() and os.access(own, os.W_OK):
        own.write_text("19")
    if options.cpus is not None:
        os.sched_setaffinity(0, options.cpus)
    first = random.randrange(10**9) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory(prefix="postcopy-soak-") as folder:
        if options.rounds:
            rounds(Path(folder), first, options.rounds)
        if options.ring:
            rings(Path(folder), options.ring)


def rounds(folder, first, count):
    began, lacking = time.monotonic(), {kind for kind in KINDS if not possible(kind)}
    for kind in lacking:
        say(f"left out, for this host has no huge pages to give: the rounds of {kind.name}")
    seeds = [seed for seed in range(first, first + count) if kind_of(seed) not in lacking]
    told = threading.Lock()

    def ended(text):
        with told:
            say(text)
            done = sum(playing.outcomes.values())
            if done % PART == 0:
                say(f"=== {done} of {len(seeds)} rounds from {first} on, {time.monotonic() - began:.0f} s")

    playing = Rounds(folder, say=ended)
    try:
        playing.play(seeds)
    finally:
        for outcome, times in playing.outcomes.most_common():
            say(f"{times:6} {outcome}")
    seconds = time.monotonic() - began
    say(f"{len(seeds)} rounds from {first} on: every byte right, one owner after each; {seconds:.0f} s")


def possible(kind):
    """Whether this host has memory for such a guest, at two places."""
    if not kind.memory.startswith("hugetlb"):
        return True
    return memory_type(kind.memory).pool().unclaimed >= HUGE_PAGES


def rings(folder, times):
    with pair(folder, KINDS[0]) as both:
        ring(both, 10)
        began, before = time.monotonic(), [memory_of(agent) for agent in both.agents]
        steps = ring(both, times)
        after = [memory_of(agent) for agent in both.agents]
    grown = ", ".join(f"{(b - a) / 2**20:+.1f} MiB" for a, b in zip(before, after, strict=True))
    say(
        f"{times} migrations to and fro: every byte right after each, {min(steps)} steps; "
        f"the agents' own memory {grown}, no more descriptors; {time.monotonic() - began:.0f} s"
    )


def say(text):
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


try:
    main()
except AssertionError as wrong:
    raise SystemExit(str(wrong)) from None
