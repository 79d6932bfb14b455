"""Whose turn it is among sources that wait for a process: order and memory of it, with the waiting itself as it is."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace

import pytest

from postcopy.guest.outside.serving import OutsideDestination
from postcopy.guest.outside.turns import Turns
from postcopy.limits import ORIGINS_MAX
from postcopy.link.address import UnixAddress
from postcopy.link.sockets import network_of
from postcopy.session.states import State
from tests.outside.test_stubborn import Handed


class Source:
    """The channel of a source that made an offer, as far as its turn goes."""

    def __init__(self, origin):
        self.origin = origin


def order(turns, sources):
    """Let all wait in this order and return in which they get their turn."""
    if not sources:
        return []
    waits = [turns.asked(one) for one in sources]
    for wait in waits:
        wait.__enter__()
    (first,) = [one for one in sources if turns.is_next(one)]
    for wait in waits:
        wait.__exit__(None, None, None)
    return [first, *order(turns, [one for one in sources if one is not first])]


def test_who_waits_longest_is_next():
    sources = [Source("a"), Source("b"), Source("a")]
    assert order(Turns(), sources) == sources


def test_who_comes_from_where_an_offer_came_to_nothing_gives_way_and_the_last_one_most():
    turns = Turns()
    for origin in ("a", "b", "c", "b"):
        turns.came_to_nothing(origin)
    sources = [Source(origin) for origin in "bacdb"]
    assert order(turns, sources) == [sources[number] for number in (3, 1, 2, 0, 4)]


def test_so_many_origins_are_remembered_and_those_that_failed_last():
    turns = Turns()
    for number in range(ORIGINS_MAX):
        turns.came_to_nothing(f"host {number}")
    turns.came_to_nothing("host 0")
    turns.came_to_nothing("one more")
    sources = [Source("host 2"), Source("host 0"), Source("host 1")]
    assert order(turns, sources) == [sources[2], sources[0], sources[1]]
    assert len(turns._failed) == ORIGINS_MAX


@pytest.mark.parametrize(("probed", "remembered"), [(False, ["a"]), (True, [])])
def test_an_offer_that_came_to_nothing_is_remembered_and_no_question(tmp_path, probed, remembered):
    async def scene():
        served = OutsideDestination(UnixAddress(f"{tmp_path}/uffd.sock"))
        interpreter = served._begin(Handed(), None)
        interpreter.channel, interpreter.machine.probed = Source("a"), probed
        await asyncio.wait_for(served._follow(interpreter, SimpleNamespace(state=State.CANCELLED, text="over")), 10)
        return list(served._turns._failed)

    assert asyncio.run(scene()) == remembered


class Waiting:
    """What is looked at of a process that waits for a source."""

    lives = True


@pytest.fixture
def served(tmp_path):
    """Return a destination at which one process is held by somebody up to Run."""
    served = OutsideDestination(UnixAddress(f"{tmp_path}/uffd.sock"))
    served.current = [SimpleNamespace(machine=SimpleNamespace(state=State.SETUP))]
    return served


async def asked(served, *origins):
    """Return the tasks of sources that wait for a process, in this order."""
    tasks = [asyncio.create_task(served._next_waiting(Source(origin))) for origin in origins]
    while len(served._turns._asking) < len(tasks):
        await asyncio.sleep(0)
    return tasks


def free(served, count=1):
    freed = [Waiting() for _ in range(count)]
    served.waiting.extend(freed)
    served._freed.set()
    return freed


def test_processes_that_are_freed_together_reach_all_who_wait(served):
    async def scene():
        served._turns.came_to_nothing("a")
        tasks = await asked(served, "a", "b", "c")
        freed = free(served, 3)
        async with asyncio.timeout(5):
            return [freed.index(await task) for task in tasks]

    assert asyncio.run(scene()) == [2, 0, 1]


def test_who_goes_as_it_is_its_turn_lets_the_next_one_have_it(served):
    async def scene():
        served._turns.came_to_nothing("a")
        second, first = await asked(served, "a", "b")
        (freed,) = free(served)
        first.cancel()  # which it hears when the other one has seen that it is not next
        async with asyncio.timeout(5):
            return await second is freed

    assert asyncio.run(scene())


def test_two_addresses_of_one_socket_for_both_kinds_are_two_networks():
    with socket.socket(socket.AF_INET6) as listening:
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind(("::", 0))
        listening.listen()
        found = []
        for host in ("127.0.0.1", "127.0.0.2"):
            with socket.create_connection(("127.0.0.1", listening.getsockname()[1]), 5, (host, 0)):
                connection, _ = listening.accept()
                with connection:
                    found.append(network_of(connection))
    assert found == ["127.0.0.1", "127.0.0.2"]
