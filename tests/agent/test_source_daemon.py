"""Who may use the guest of a source daemon, and what it says at its end: with a guest and a source that are played."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from agent.daemon import Parent
from agent.new_source import SourceOptions
from agent.source_daemon import SourceDaemon
from postcopy.errors import MigrationFailed, UsageError
from postcopy.session.commands import Finish
from postcopy.session.states import OWNERS, Owner, State

TO = {"to": "tcp:127.0.0.1:1"}
DEADLINE = 10


class PlayedGuest:
    """Stands still or runs; its check takes until it is let go on."""

    def __init__(self):
        self.running = True
        self.checking = threading.Event()
        self.go_on = threading.Event()

    def stop(self):
        self.running = False

    def start(self):
        self.running = True

    def check(self, threads):
        self.checking.set()
        assert self.go_on.wait(DEADLINE)
        return SimpleNamespace(pages_checked=1, pages_mismatched=0, first_mismatch=None)

    def steps(self):
        return [1]


class PlayedSource:
    """Stops the guest and has it run at the destination, until the migration is let end."""

    def __init__(self, guest):
        self.guest = guest
        self.state = State.NONE
        self.busy = False
        self.finish = self.report = None
        self.placed_pages = 0
        self.layout = SimpleNamespace(pages=1)
        self.active = asyncio.Event()
        self.end = asyncio.Event()
        self.pushed = False
        self.rate = 1

    @property
    def owner(self):
        return OWNERS[self.state]

    def check_free(self):
        if self.busy:
            raise UsageError("busy")

    async def migrate(self, _where, **_options):
        self.busy = True
        self.guest.stop()
        await asyncio.sleep(0)
        self.state = State.POSTCOPY_ACTIVE
        self.active.set()
        await self.end.wait()
        self.state, self.busy = State.COMPLETED, False
        self.finish = Finish(State.COMPLETED, Owner.DESTINATION, "done", 0)
        return self.report

    def cancel(self, _text=""):
        return False

    def set_rate(self, rate):
        self.rate = rate

    async def start_push(self):
        self.pushed = True
        self.end.set()

    @property
    def pause_state(self):
        return None  # its connections never break

    def resume(self, _where=None):
        raise UsageError("the migration is not paused")


@pytest.fixture
def played():
    """Run a coroutine function with a daemon whose guest and source are played."""

    def play(scene):
        async def on_stage():
            options = SourceOptions(
                memory=(), guest="emulated", vcpus=1, workload="random", seed=1, cpus=(), admin=None, metrics=None,
                ready_fd=None, poll_max_ns=0, steps_per_second=0, steps_max=None, blank=0.0, parent=Parent(),
            )  # fmt: skip
            daemon = SourceDaemon(options)
            guest = PlayedGuest()
            source = PlayedSource(guest)
            daemon.depart_by(source, guest)
            async with asyncio.timeout(DEADLINE):
                await scene(daemon, guest, source)

        asyncio.run(on_stage())

    return play


def tell(_progress):
    pass


def stop():
    return SimpleNamespace(asked=asyncio.Event(), again=asyncio.Event())


def test_a_check_and_a_migration_of_one_moment(played):
    async def scene(daemon, guest, source):
        migration = asyncio.create_task(daemon.departure.migrate(TO, tell))
        check = asyncio.create_task(daemon.check({}, tell))
        guest.go_on.set()
        with pytest.raises(UsageError, match="a migration is running already"):
            await check
        await source.active.wait()
        assert not guest.running
        source.end.set()
        await migration
        assert not guest.running  # there is one, and it is at the destination

    played(scene)


def test_a_migration_and_a_check_of_one_moment(played):
    async def scene(daemon, guest, source):
        check = asyncio.create_task(daemon.check({}, tell))
        migration = asyncio.create_task(daemon.departure.migrate(TO, tell))
        with pytest.raises(MigrationFailed, match="the guest is being checked: try again"):
            await migration
        guest.go_on.set()
        assert (await check)["pages_checked"] == 1
        assert guest.running
        assert source.state is State.NONE

    played(scene)


def test_a_check_does_not_start_a_guest_that_has_left(played):
    async def scene(daemon, guest, source):
        check = asyncio.create_task(daemon.check({}, tell))
        await asyncio.to_thread(guest.checking.wait, DEADLINE)
        source.state = State.COMPLETED
        guest.go_on.set()
        await check
        assert not guest.running

    played(scene)


def test_the_end_waits_for_a_check(played):
    async def scene(daemon, guest, _source):
        check = asyncio.create_task(daemon.check({}, tell))
        await asyncio.to_thread(guest.checking.wait, DEADLINE)
        ending = asyncio.create_task(daemon.finish(stop()))
        while not daemon.use.ending:
            await asyncio.sleep(0)
        with pytest.raises(MigrationFailed, match="this agent is ending"):
            await daemon.check({}, tell)
        assert not ending.done()
        guest.go_on.set()
        await check
        await ending

    played(scene)


def test_the_end_hurries_a_migration_that_has_switched_over(played):
    async def scene(daemon, _guest, source):
        migration = asyncio.create_task(daemon.departure.migrate(TO, tell))
        await source.active.wait()
        await daemon.finish(stop())
        assert source.pushed
        assert source.rate is None
        await migration
        assert daemon.verdict() == 0

    played(scene)


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (State.NONE, 0),
        (State.DEVICE, 0),
        (State.POSTCOPY_ACTIVE, 6),
        (State.LOST, 6),  # also before anybody has taken note of it
        (State.COMPLETED, 0),
        (State.FAILED, 0),
    ],
)
def test_the_verdict_follows_the_state(played, state, status):
    async def scene(daemon, _guest, source):
        source.state = state
        assert daemon.verdict() == status

    played(scene)


@pytest.mark.parametrize("report", [None, {}, {"mode": "magic"}, {"mode": ["auto"]}, "nonsense"])
def test_a_report_of_nonsense_is_no_label(played, report):
    async def scene(daemon, _guest, source):
        source.report = report
        source.end.set()
        await daemon.departure.migrate(TO, tell)
        assert daemon.use.over.is_set()
        assert daemon._totals.counts().migrations == {("source", "none", "completed"): 1}

    played(scene)


def test_what_is_said_while_a_keeper_starts_is_heard_by_the_migration(played):
    async def scene(daemon, guest, source):
        kept = asyncio.Event()
        daemon.departure.keep = kept.wait
        migration = asyncio.create_task(daemon.departure.migrate(TO, tell))
        change = asyncio.create_task(daemon.departure.set({"push": True}, tell))
        for _ in range(5):
            await asyncio.sleep(0)
        assert (source.busy, source.pushed) == (False, False)
        kept.set()
        await change
        assert source.pushed
        await migration

    played(scene)


def test_an_agent_that_ends_while_a_keeper_starts_sends_nothing_away(played):
    async def scene(daemon, guest, source):
        kept = asyncio.Event()
        daemon.departure.keep = kept.wait
        migration = asyncio.create_task(daemon.departure.migrate(TO, tell))
        await asyncio.sleep(0)
        ending = asyncio.create_task(daemon.finish(stop()))
        while not daemon.use.ending:
            await asyncio.sleep(0)
        kept.set()
        with pytest.raises(MigrationFailed, match="this agent is ending"):
            await migration
        await ending
        assert guest.running
        assert (source.state, daemon.verdict()) == (State.NONE, 0)

    played(scene)


def test_an_agent_that_ends_as_a_migration_begins_cancels_it(played):
    """In the one round of the event loop in which nobody can be told of it yet."""

    async def scene(daemon, _guest, source):
        cancelled = []
        source.cancel = lambda text: cancelled.append((text, source.busy))

        async def keep():
            asyncio.get_running_loop().call_soon(daemon.use.refuse)

        daemon.departure.keep = keep
        source.end.set()
        await daemon.departure.migrate(TO, tell)
        assert cancelled == [("the source's agent ends", True)]

    played(scene)
