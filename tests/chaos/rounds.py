"""Rounds: a guest goes to the other host and has troubles on its way, which a number draws; then all must be right."""

from __future__ import annotations

import collections
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from .pair import Kind, empty, pair, whole
from .trouble import Actor, Course, wish

# Which pair a round is played on follows from its number, too.
KINDS = (
    Kind("shmem"),
    Kind("anonymous-tls", memory="anonymous", tls=True),
    Kind("minor-tls", mode="minor", tls=True, workload="random"),
    Kind("tmpfs-missing", memory="tmpfs:/dev/shm", mode="missing", workload="increment"),
    Kind("hugetlb", memory="hugetlb-2M", size="16MiB"),
    Kind("mortal-tls", tls=True, mortal=True),
    Kind("mortal", workload="random", mortal=True),
)
HUGE_PAGES = 32  # for its guest, twice while it moves, and twice more
PAUSED = {"postcopy-paused", "postcopy-recover"}
OUTCOMES = {0: "completed", 4: "failed before", 7: "cancelled"}


def kind_of(seed):
    return KINDS[seed % len(KINDS)]


def play(both, seed):
    """Play one round; return in words what came of it. AssertionError where anything is not as it must be."""
    course = Course(seed, both.kind)
    both.proxy.calm()
    migration = both.migrate(**course.arguments)
    leaving = both.leaving
    if course.behind_run:
        both.coming.until(lambda now: now["state"] == "postcopy-active" or not migration.is_alive())
    actor = Actor(both)
    actor.play(course.troubles, lambda: not migration.is_alive())
    both.proxy.calm()
    if actor.killed is not None:
        outcome = (without_source if actor.killed is leaving else without_destination)(both, migration)
        both.renew()
        return outcome
    if migration.is_alive():
        leaving.ask("set", push=True, rate=0)
    status = migration.result()
    reconnects = leaving.status()["reconnects"]
    both.settle(status)
    return f"{OUTCOMES[status]}, {reconnects} reconnects"


# --- an agent that was killed -----------------------------------------------------------------------------------------


def without_destination(both, migration):
    """See that the source lost nothing by it: it runs the guest, or keeps what it has until a person gives that up."""
    here = both.leaving
    now = here.until(lambda now: not migration.is_alive() or now["state"] in PAUSED)
    if migration.is_alive():
        assert (now["owner"], now["role"] == "source" and now["guest"] is not None) == ("destination", False), now
        here.ask("cancel", lost=True)
        assert migration.result() == 6
        return "destination killed, the guest with it, said so"
    status = migration.result()
    if status == 0:  # it was whole there, and ended with its agent
        return "destination killed when all was over"
    assert status in {4, 7}, migration.error
    is_right(here)
    return f"destination killed, {OUTCOMES[status]}"


def without_source(both, migration):
    """See that the guest is right wherever it is, once another agent has taken the killed one's place."""
    there = both.coming
    now = there.until(lambda now: empty(now) or whole(now) or now["state"] in PAUSED)
    assert migration.result() in {0, 5, 6}  # as far as the command can know
    again = both.another_source() if left_behind(both) else None
    try:
        if empty(now):
            if again is None or not again.ready:
                return "source killed, the guest with it"
            again.until_log("the guest never ran anywhere else and runs here again")
            is_right(again)
            return "source killed and followed, the guest never left"
        if not whole(now):
            assert again is not None, "nobody kept what is still there"
            assert again.ready, again.log
            wish(again, "set", push=True, rate=0)
            both.coming.until(whole)
        ended = 0 if again is None else again.wait(40)
        assert ended in {0, 2}, again.log
        is_right(there)
        return "source killed and followed, completed"
    finally:
        if again is not None:
            again.__exit__()


def left_behind(both):
    """Whether there is a keeper still: one that has nothing to keep ends when its agent does."""
    return Path(both.keeper(both.here).removeprefix("unix:")).exists()


def is_right(agent):
    """See that the guest runs here, and every byte of it."""
    assert agent.ask("check")["pages_mismatched"] == 0
    agent.runs_on()


# --- many of them -----------------------------------------------------------------------------------------------------


class Rounds:
    """Plays rounds by their numbers, those of each kind on a pair of hosts of its own, all kinds at once.

    A round mostly waits: for processes, for links, for silence to be noticed. `say` is told of each when it has ended,
    and of the first that failed with all that is known of it; then no other is begun.
    """

    def __init__(self, folder, say=lambda text: None):
        self.outcomes = collections.Counter()
        self._folder, self._say = Path(folder), say
        self._failed = threading.Event()

    def play(self, seeds):
        """Play all of these; AssertionError for those that failed."""
        seeds = list(seeds)
        kinds = [kind for kind in KINDS if any(kind_of(seed) is kind for seed in seeds)]
        with ThreadPoolExecutor(len(kinds)) as pool:
            playing = [pool.submit(self._play, kind, [one for one in seeds if kind_of(one) is kind]) for kind in kinds]
            try:
                wait(playing)
            except BaseException:  # Ctrl-C: those that are being played come to their end
                self._failed.set()
                raise
        failures = [str(one.exception()) for one in playing if one.exception() is not None]
        assert not failures, "\n\n".join(failures)

    def _play(self, kind, seeds):
        folder = self._folder / kind.name
        folder.mkdir()
        with pair(folder, kind) as both:
            for seed in seeds:
                if self._failed.is_set():
                    return
                self._one(both, seed)

    def _one(self, both, seed):
        """Play one; an error names its number and what was done."""
        began = time.monotonic()
        way = "a to b" if both.here == 0 else "b to a"
        said = f"round {seed} ({both.kind.name}, {way}: {Course(seed, both.kind)})"
        try:
            outcome = play(both, seed)
        except BaseException as error:
            self._failed.set()
            agents = zip("ab", both.agents, strict=False)  # one that does not come up may be the first
            logs = "\n".join(f"--- {name}\n{tail(agent.log)}" for name, agent in agents)
            raise AssertionError(
                f"{said}: {error!r}\n{logs}\nagain: python -m tests.soak --seed {seed} --rounds 1"
            ) from error
        self.outcomes[outcome.partition(", ")[0] if "reconnects" in outcome else outcome] += 1
        self._say(f"{said}: {outcome}, {time.monotonic() - began:.2f} s")


def tail(text, lines=40):
    return "\n".join(text.splitlines()[-lines:])


def ring(both, times):
    """Have a guest go to and fro so many times; return its steps at the end."""
    for _ in range(times):
        both.proxy.calm()
        both.settle(both.migrate().result())
    return both.leaving.status()["guest"]["steps"]
