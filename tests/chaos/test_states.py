"""Either agent killed, stopped for a while or told to cancel in every state of the session's diagram.

Each state is reached by holding back the message that would lead out of it (postcopy/session/README.md has the
diagram). What no message leads out of (a destination that prepares, vCPUs that park) takes milliseconds of an agent's
own work, and ends as the state behind it does.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from postcopy.link.tls import Credentials
from tests.agent.agents import Daemon, destination, source
from tests.agent.fakes import FakeSource
from tests.certificates import directory

from .pair import Kind, Migration, Pair, end_keeper, whole
from .proxy import Proxy, upstream_of
from .trouble import wish

AT_ONCE = 4
SLOW = ("--steps-per-second", "1000", "--workload", "random")
SIZE = "4MiB"


@dataclass(frozen=True)
class Held:
    """A state: what is held, what its sides wait for then, and which part of the migration it belongs to.

    `again`: it is held on the way back, after the connections were cut behind Run.
    """

    what: str
    source: str
    destination: str
    part: str
    again: bool = False

    def __str__(self):
        return f"{self.what.lower()}{'-again' if self.again else ''}"


BEFORE, SENT, AFTER, WHOLE, OVER = "before Run", "Run is on its way", "after Run", "whole", "over"
STATES = (
    Held("hello", "greeting", "idle", BEFORE),
    Held("welcome", "greeting", "greeted", BEFORE),
    Held("layout_offer", "offering", "greeted", BEFORE),
    Held("ready", "offering", "waiting", BEFORE),
    Held("URGENT", "attaching", "waiting", BEFORE),
    Held("PUSH", "attaching", "waiting", BEFORE),
    Held("state", "loading", "attached", BEFORE),
    Held("loaded", "loading", "loaded", BEFORE),
    Held("run", "active", "loaded", SENT),
    Held("running", "active", "active", AFTER),
    Held("resume", "rejoining", "paused", AFTER, again=True),
    Held("welcome", "rejoining", "recovering", AFTER, again=True),
    Held("ready", "rejoining", "recovering", AFTER, again=True),
    Held("URGENT", "reattaching", "recovering", AFTER, again=True),
    Held("PUSH", "reattaching", "recovering", AFTER, again=True),
    Held("all_placed", "active", "releasing", WHOLE),
    Held("released", "completed", "releasing", OVER),
)
RUN, LOADING = STATES[8], STATES[6]


def reach(proxy, held, migrate):
    """Begin a migration by `migrate` and bring it into a state; return it."""
    proxy.calm()
    if not held.again:
        proxy.hold(held.what)
        migration = migrate(push=held.part != AFTER)
        proxy.wait_held()
        return migration
    proxy.hold("running")
    migration = migrate(push=False)
    proxy.wait_held()
    proxy.hold(held.what)
    proxy.cut()
    proxy.wait_held()
    return migration


def lose(agent, migration):
    """Give up what is paused, as a person does who knows that nobody comes back."""
    agent.until(lambda now: now["state"] in {"postcopy-paused", "postcopy-recover"})
    now = agent.status()
    assert (now["owner"], now["role"] == "source" and now["guest"] is not None) == ("destination", False)
    agent.ask("cancel", lost=True)
    assert agent.wait() == 6, agent.log
    assert migration.result() == 6


def certificates(folder, tls):
    """Return the directory of both hosts where all is encrypted, what commands are told, and what a proxy needs."""
    if not tls:
        return None, (), None
    mine = directory(folder / "tls")
    return mine, ("--tls-dir", mine), Credentials(mine)


def destination_killed(held, folder, tls):
    _, how, opens = certificates(folder, tls)
    with (
        destination(folder, *how) as there,
        source(folder, *SLOW, *how, size=SIZE) as here,
        Proxy(upstream_of(there.address), watches=True, opens=opens) as proxy,
    ):
        migration = reach(proxy, held, lambda **how: Migration(here, proxy.address, **how))
        if held.part == OVER:  # it had let go: the guest was whole, and ends with its agent
            assert migration.result() == 0
        there.signal(signal.SIGKILL)
        there.wait()
        proxy.cut()  # what was held is lost
        if held.part == BEFORE:  # the guest goes on as if nothing had been
            assert migration.result() == 4
            assert here.status()["owner"] == "source"
            here.runs_on()
            assert here.ask("check")["pages_mismatched"] == 0
        elif held.part == OVER:
            assert here.status()["state"] == "completed"
        else:  # it never takes the guest back by itself: a person has to know that nobody runs it
            lose(here, migration)


def source_killed(held, folder, tls, *, unread=False):
    keeper = f"unix:{folder}/keeper.sock"
    mine, how, opens = certificates(folder, tls)
    with (
        contextlib.ExitStack() as last,
        destination(folder, *how) as there,
        source(folder, "--keeper", keeper, *SLOW, *how, size=SIZE) as here,
        Proxy(upstream_of(there.address), watches=True, opens=opens) as proxy,
    ):
        last.callback(end_keeper, keeper)  # whatever becomes of this, none stays
        migration = reach(proxy, held, lambda **how: Migration(here, proxy.address, **how))
        if unread:  # what is held comes to the destination, and so does the end of every connection
            there.signal(signal.SIGSTOP)
            proxy.release()
            proxy.wait_passed()
        told = migration.result() if held.part == OVER else None
        here.signal(signal.SIGKILL)
        here.wait()
        # 6 where nothing was kept yet; who heard of no switchover waits a moment for a keeper that has nothing to end
        assert migration.result() == (told if held.part == OVER else 6 if held.part == BEFORE else 5)
        proxy.cut()
        there.signal(signal.SIGCONT)
        if held.part == BEFORE:
            there.until(lambda now: now["owner"] is None and now["state"] in {"none", "failed"})
            with FakeSource(there.address, tls=mine) as other:
                other.greet().offer()  # another one is as welcome as ever
        elif held.part == SENT and there.until(decided)["state"] == "failed":
            with returned(folder, keeper, how) as again:
                again.until_log("the guest never ran anywhere else and runs here again")
                assert again.status()["owner"] == "source"
                again.runs_on()
                assert again.ask("check")["pages_mismatched"] == 0
                assert Migration(again, there.address).result() == 0  # and leaves again
                assert again.wait() == 0, again.log
            there.until(whole)
            assert there.ask("check")["pages_mismatched"] == 0
        else:
            comes_back(held, there, folder, keeper, how)


def comes_back(held, there, folder, keeper, how):
    """Have another agent take the killed one's place, unless there is nothing left to do; every byte is right."""
    if held.part != OVER:
        with returned(folder, keeper, how) as again:
            if held.part == AFTER:  # else it pushes at once, and may be through before anybody looks
                there.until(lambda now: now["state"] == "postcopy-active" and now["reconnects"] >= 1)
                again.ask("set", push=True)
            assert again.wait(40) == 0, again.log
    assert there.until(whole)["reconnects"] >= (held.part in {SENT, AFTER})
    assert there.ask("check")["pages_mismatched"] == 0
    there.runs_on()


def decided(now):
    """Whether a destination has made up its mind whether Run came."""
    return now["state"] in {"failed", "postcopy-paused", "completed"}


def killed_with_run_unread(held, folder, tls):
    """Run has arrived together with the end of the connections: which of them is read first decides, for all."""
    source_killed(held, folder, tls, unread=True)


def returned(folder, keeper, how):
    (folder / "again").mkdir()
    return Daemon(folder / "again", "source", "--resume", keeper, *how)


def stopped(held, side, both):
    """One stands still while the message that leads on comes to it, or goes from it, and goes on: nothing is lost."""
    agent, other = (both.leaving, both.coming) if side == "source" else (both.coming, both.leaving)
    proxy = both.proxy
    migration = reach(proxy, held, both.migrate)
    agent.signal(signal.SIGSTOP)
    proxy.release()
    proxy.wait_passed()
    if held.what == "running":  # long enough to be noticed: a pause, which mends itself
        other.until(lambda now: now["state"] == "postcopy-paused")
    agent.signal(signal.SIGCONT)
    if migration.is_alive():
        both.leaving.ask("set", push=True)
    both.settle(migration.result())
    assert migration.status == 0, migration.error


def cancelled(held, side, both):
    """Before Run the guest goes on at the source, whoever cancels; from Run on nobody can."""
    proxy = both.proxy
    migration = reach(proxy, held, both.migrate)
    assert wish(both.leaving if side == "source" else both.coming, "cancel") is (held.part == BEFORE)
    proxy.release()
    if held.part != BEFORE and migration.is_alive():
        both.leaving.ask("set", push=True)
    both.settle(migration.result())
    assert migration.status == (7 if held.part == BEFORE else 0), migration.error


def stopped_for_too_long(held, both):
    """A destination that stands still for longer than the source leaves its guest standing: the source goes on."""
    proxy = both.proxy
    migration = reach(proxy, held, both.migrate)
    coming = both.coming
    coming.signal(signal.SIGSTOP)
    proxy.release()
    assert migration.result() == 4
    assert "did not answer in time (loading)" in str(migration.error)
    both.leaving.runs_on()
    coming.signal(signal.SIGCONT)
    both.settle(4)
    assert both.migrate().result() == 0
    both.settle(0)


def cases():
    """Every case by its name, with how it is played and whether all is encrypted.

    That alternates: from state to state within each way to trouble an agent, and from way to way within each state. So
    half of either are encrypted and half are plain, and no case is played twice.
    """
    # a destination has nothing to cancel before the offer, and once it has said Loaded Run may be on its way
    mine = [held for held in STATES if held.destination in {"waiting", "attached", "active"}]
    ways = [
        ("destination-killed", STATES, (destination_killed,)),
        ("source-killed", STATES, (source_killed,)),
        ("source-stopped", STATES, (stopped, "source")),
        ("destination-stopped", STATES, (stopped, "destination")),
        ("source-cancelled", STATES, (cancelled, "source")),
        ("destination-cancelled", mine, (cancelled, "destination")),
        ("source-killed-with-run-unread", [RUN], (killed_with_run_unread,)),
        ("destination-stopped-for-too-long", [LOADING], (stopped_for_too_long,)),
    ]
    found = {}
    for number, (way, states, (play, *side)) in enumerate(ways):
        for held in states:
            tls = (number + STATES.index(held)) % 2 == 1
            found[f"{held}-{way}{'-tls' if tls else ''}"] = (tls, play, held, *side)
    return found


class Play:
    """All cases that were asked for, some at a time: each waits for processes, and few need a processor."""

    def __init__(self, folder, wanted):
        self._folder, self._numbers = folder, itertools.count()
        self._stack = contextlib.ExitStack()
        self._pairs = {tls: queue.SimpleQueue() for tls in (False, True)}  # one of each
        pool = self._stack.enter_context(ThreadPoolExecutor(AT_ONCE))
        for tls in {tls for name, (tls, how, *_) in cases().items() if name in wanted and how in ON_A_PAIR}:
            self._pairs[tls].put(self._pair(tls))
        self._results = {name: pool.submit(self._play, *how) for name, how in cases().items() if name in wanted}

    def close(self):
        for result in self._results.values():
            result.cancel()
        self._stack.close()
        for pairs in self._pairs.values():
            while not pairs.empty():
                pairs.get().__exit__()

    def result(self, name):
        return self._results[name].result()

    def _fresh(self):
        folder = self._folder / str(next(self._numbers))
        folder.mkdir()
        return folder

    def _pair(self, tls):
        kind = Kind("shmem", size=SIZE, workload="random", tls=tls)
        return Pair(self._fresh(), kind, watches=True).__enter__()

    def _play(self, tls, play, *arguments):
        if play not in ON_A_PAIR:
            play(*arguments, self._fresh(), tls)
            return
        both = self._pairs[tls].get()
        try:
            play(*arguments, both)
        except BaseException:
            both.__exit__()  # whatever is the matter with it, the next case gets another one
            both = self._pair(tls)
            raise
        finally:
            self._pairs[tls].put(both)


ON_A_PAIR = {stopped, cancelled, stopped_for_too_long}


@pytest.fixture(scope="module")
def play(request, tmp_path_factory):
    wanted = {one.callspec.id for one in request.session.items if one.path == request.path}
    playing = Play(tmp_path_factory.mktemp("states"), wanted)
    yield playing
    playing.close()


@pytest.mark.parametrize("name", cases())
def test_in_every_state(name, play):
    play.result(name)
