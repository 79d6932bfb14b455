"""Rounds: a guest goes to the other host and has troubles on its way, which a number draws; then all must be right."""

from __future__ import annotations

import contextlib
import time

from .pair import Kind, pair
from .trouble import Actor, Course

# Which pair a round is played on follows from its number, too.
KINDS = (
    Kind("shmem"),
    Kind("anonymous-tls", memory="anonymous", tls=True),
    Kind("minor-tls", mode="minor", tls=True, workload="random"),
    Kind("tmpfs-missing", memory="tmpfs:/dev/shm", mode="missing", workload="increment"),
    Kind("hugetlb", memory="hugetlb-2M", size="16MiB"),
)
HUGE_PAGES = 32  # for its guest, twice while it moves, and twice more


def kind_of(seed):
    return KINDS[seed % len(KINDS)]


def play(both, seed):
    """Play one round; return in words what came of it. AssertionError where anything is not as it must be."""
    kind = both.kind
    course = Course(seed, encrypted=kind.tls)
    both.proxy.calm()
    began = time.monotonic()
    migration = both.migrate(**course.arguments)
    leaving = both.leaving
    if course.behind_run:
        both.coming.until(lambda now: now["state"] == "postcopy-active" or not migration.is_alive())
    Actor(both).play(course.troubles, lambda: not migration.is_alive())
    both.proxy.calm()
    if migration.is_alive():
        leaving.ask("set", push=True, rate=0)
    status = migration.result()
    reconnects = leaving.status()["reconnects"]
    both.settle(status)
    outcome = {0: "completed", 4: "failed before", 7: "cancelled"}[status]
    return f"{outcome}, {reconnects} reconnects, {time.monotonic() - began:.2f} s"


class Rounds:
    """Plays rounds by their numbers, each on the pair of its kind, which are made when they are first needed."""

    def __init__(self, folder, say=print):
        self._folder, self._say = folder, say
        self._stack = contextlib.ExitStack()
        self._pairs = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()

    def play(self, seed):
        """Play one; an error names its number and what was done."""
        kind = kind_of(seed)
        if kind not in self._pairs:
            folder = self._folder / kind.name
            folder.mkdir()
            self._pairs[kind] = self._stack.enter_context(pair(folder, kind))
        both = self._pairs[kind]
        way = "a to b" if both.here == 0 else "b to a"
        said = f"round {seed} ({kind.name}, {way}: {Course(seed, encrypted=kind.tls)})"
        try:
            self._say(f"{said}: {play(both, seed)}")
        except BaseException as error:
            logs = "\n".join(f"--- {name}\n{tail(agent.log)}" for name, agent in zip("ab", both.agents, strict=True))
            raise AssertionError(
                f"{said}: {error!r}\n{logs}\nagain: python -m tests.soak --seed {seed} --rounds 1"
            ) from error


def tail(text, lines=40):
    return "\n".join(text.splitlines()[-lines:])


def ring(both, times):
    """Have a guest go to and fro so many times; return its steps at the end."""
    for _ in range(times):
        both.proxy.calm()
        both.settle(both.migrate().result())
    return both.leaving.status()["guest"]["steps"]
