"""Who is known when a source comes back, and what it is told, with nothing but what is looked at of a migration."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

from postcopy.errors import HostError
from postcopy.link.returning import Known
from postcopy.wire.control import AllPlaced, Refuse, Resume, Welcome
from tests.wire.examples import LATENCIES

TOKEN = b"t" * 32


class Channel:
    """One that a source has dialled; it lets go of its memory whatever it is told."""

    def __init__(self):
        self.name, self.version, self.said, self.open = "a source", 0, [], True

    def send(self, message):
        self.said.append(type(message))
        self.last = message

    async def receive(self):
        pass

    async def close(self):
        self.open = False


class Migration:
    """One whose pages come, or that is over."""

    def __init__(self, number, finish=None, *, ended=False):
        self.finish, self.report, self.latencies, self.rejoined = finish, None, LATENCIES, []
        self.machine = SimpleNamespace(
            migration_id=number.to_bytes(16), version=3, software="", first_token=TOKEN, ended=ended,
            refusal_of_return=lambda: None,
        )  # fmt: skip

    def rejoin(self, channel, _token):
        self.rejoined.append(channel)


def come_back(play, known, migration):
    channel = Channel()
    with contextlib.suppress(HostError):  # it is told why, and the listener has its line
        play(lambda: known.take(channel, Resume(migration.machine.migration_id, TOKEN)))
    return channel


def test_a_migration_that_goes_on_is_known_however_many_come_and_fail(play):
    known, going_on = Known(4), Migration(0)
    known.add(going_on)
    failed = [Migration(number, "failed") for number in range(1, 9)]
    for one in failed:
        known.add(one)
    come_back(play, known, going_on)
    assert len(going_on.rejoined) == 1
    told = [come_back(play, known, one).said for one in failed]
    assert told == [[Refuse]] * 5 + [[Welcome, AllPlaced]] * 3  # of those that are over the latest


def test_all_that_go_on_are_known(play):
    known, several = Known(4), [Migration(number) for number in range(9)]
    for one in several:
        known.add(one)
    for one in several:
        come_back(play, known, one)
    assert [len(one.rejoined) for one in several] == [1] * 9


@pytest.mark.parametrize("finish", [None, "completed"])
def test_one_that_has_ended_answers_also_while_its_links_are_closed(play, finish):
    known, ended = Known(), Migration(0, finish, ended=True)
    known.add(ended)
    channel = come_back(play, known, ended)
    assert channel.said == [Welcome, AllPlaced]
    assert channel.last == AllPlaced({}, LATENCIES)
    assert not channel.open
    assert not ended.rejoined
