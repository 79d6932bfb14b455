"""Source and Destination as a library, on the real kernel: each story in a child process, so that no fault can hang."""

import asyncio
import os
import threading

import pytest
import uvloop

from postcopy.errors import MigrationCancelled, MigrationFailed, MigrationLost, UsageError
from postcopy.session.destination_steps import Step
from tests.certificates import directory
from tests.child import run_in_child

SIZE = 16 << 20
SECONDS = 60
WAIT = 30  # for one condition: below what a story has in all, so that it is told which one did not come


def make_source(memory, workload="random", steps_per_second=0, size=SIZE):
    from postcopy.guest import Guest
    from postcopy.kernel import memory_type
    from postcopy.pages.regions import Region

    kind = memory_type(memory)
    mapping = kind.allocate(Region(0, memory, kind.page_size, size), alias=False)
    guest = Guest([mapping], workload=workload, vcpus=2, seed=7, steps_per_second=steps_per_second)
    guest.fill()
    guest.start()
    return mapping, guest


def make_destination(mode="auto", restore=None, tls=None, removal="auto", closed=lambda: None):
    from postcopy.guest import kinds
    from postcopy.link import Destination

    known = kinds.kinds()
    if restore is not None:
        emulated = known["emulated"]
        emulated.empty = lambda mappings, vcpus: Loading(lambda state: restore(mappings, state), closed)
    return Destination("tcp:127.0.0.1:0", known, mode=mode, removal=removal, tls=tls)


class Loading:
    """A guest that is still without a state, of which a test makes what it likes."""

    def __init__(self, load, close=lambda: None):
        self.load = load
        self.close = close


async def until(wanted):
    async with asyncio.timeout(WAIT):
        while not wanted():
            await asyncio.sleep(0.002)


async def switched_over(destination, migration):
    """Wait until the guest runs at the destination; a migration that ends before that raises its own reason."""
    await until(lambda: destination.state == "postcopy-active" or migration.done())
    if migration.done():
        migration.result()


def play(loop, story, *arguments):
    return (uvloop.run if loop == "uvloop" else asyncio.run)(story(*arguments))


async def migrate_and_check(memory, mode, folder=None):
    from postcopy.link import Source
    from postcopy.link.tls import Credentials

    mapping, guest = make_source(memory)
    await until(lambda: min(guest.steps()) > 1000)
    tls = Credentials(folder) if folder else None
    async with make_destination(mode, tls=tls) as destination, Source([mapping], guest) as source:
        report = await source.migrate(str(destination.address), tls=tls)
        assert report["environment"]["tls"] == bool(tls)
        finish = await destination.migrated()
        arrived = destination.guest
        assert (source.owner, finish.owner) == ("destination", "destination")
        assert mapping.fd == -1  # given back
        steps = arrived.steps()
        await until(lambda: min(arrived.steps()) > max(steps))
        await asyncio.to_thread(arrived.stop)
        result = await asyncio.to_thread(arrived.check)
        return report["pages"], result.pages_checked, result.pages_mismatched


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("mode", ["auto", "minor", "missing"])
def test_a_migration(loop, mode):
    pages, checked, wrong = run_in_child(play, loop, migrate_and_check, "shmem", mode, deadline=SECONDS)
    assert (checked, wrong) == (SIZE // 4096, 0)
    assert pages["demand"] + pages["push"] + pages["zero"] == pages["total"] == SIZE // 4096


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("mode", ["auto", "minor"])
def test_an_encrypted_migration(loop, mode, tmp_path):
    folder = directory(tmp_path / "tls")
    pages, checked, wrong = run_in_child(play, loop, migrate_and_check, "shmem", mode, folder, deadline=SECONDS)
    assert (checked, wrong) == (SIZE // 4096, 0)
    assert pages["demand"] + pages["push"] + pages["zero"] == pages["total"] == SIZE // 4096


async def fail_and_try_again():
    """A restore that fails the first time: the source's guest runs on, the same destination takes it afterwards."""
    from postcopy.guest import Guest
    from postcopy.link import Source

    tries = []

    def restore(mappings, state):
        tries.append(state)
        if len(tries) == 1:
            raise RuntimeError("not today")
        return Guest.restore(mappings, state)

    mapping, guest = make_source("shmem")
    async with make_destination(restore=restore) as destination, Source([mapping], guest) as source:
        with pytest.raises(MigrationFailed, match="not today") as caught:
            await source.migrate(str(destination.address))
        assert (caught.value.owner, caught.value.exit_status) == ("source", 4)
        steps = guest.steps()
        await until(lambda: min(guest.steps()) > max(steps))
        assert (await destination.migrated()).state == "failed"
        await source.migrate(str(destination.address))
        assert (await destination.migrated()).state == "completed"
    return len(tries)


def test_a_failure_before_run_leaves_both_as_they_were():
    assert run_in_child(play, "uvloop", fail_and_try_again, deadline=SECONDS) == 2


async def try_again_while_the_former_is_thrown_away():
    """The source hears of the refusal before the destination is rid of what had come."""
    from postcopy.guest import Guest
    from postcopy.link import Source

    throwing, thrown = threading.Event(), threading.Event()

    def restore(mappings, state):
        if not throwing.is_set():
            raise RuntimeError("not today")
        return Guest.restore(mappings, state)

    def closed():
        throwing.set()
        thrown.wait(WAIT)

    mapping, guest = make_source("shmem")
    async with make_destination(restore=restore, closed=closed) as destination, Source([mapping], guest) as source:
        with pytest.raises(MigrationFailed, match="not today"):
            await source.migrate(str(destination.address))
        await until(throwing.is_set)
        again = asyncio.create_task(source.migrate(str(destination.address)))
        await until(lambda: again.done() or [one.step for one in greeted(destination)] == [Step.PREPARING])
        assert not again.done(), again.exception()
        thrown.set()
        await again
        return [(await destination.migrated()).state for _ in range(2)]


def greeted(destination):
    return [interpreter.machine for interpreter in destination._greeted]


def test_who_tries_again_at_once_waits_until_the_former_try_is_thrown_away():
    states = run_in_child(play, "uvloop", try_again_while_the_former_is_thrown_away, deadline=SECONDS)
    assert states == ["failed", "completed"]


async def with_a_guest_of_ones_own():
    """The state makes no sense to the destination: its own words come back, and the guest goes on at the source."""
    from postcopy.errors import ProtocolError
    from postcopy.kernel import memory_type
    from postcopy.link import Destination, GuestBase, KindFromState, Source
    from postcopy.pages import Region

    class Idle(GuestBase):
        kind = "idle"
        starts = 0

        def start(self):
            self.starts += 1
            self.first_step_at = None
            self.stepped()

        def stop(self, deadline=10.0):
            pass

        def save(self):
            return {"starts": self.starts}

    def load(mappings, state):
        if state != {"starts": 2}:
            raise ProtocolError(f"no state of ours: {state}")
        return Idle()

    region = Region(0, "shmem", 4096, SIZE)
    with memory_type("shmem").allocate(region, alias=False) as mapping:
        mapping.write(4096, b"one page of data")
        guest = Idle()
        guest.start()
        kinds = {"idle": KindFromState(load, vcpus_max=1)}
        async with Destination("tcp:127.0.0.1:0", kinds) as destination, Source([mapping], guest) as source:
            with pytest.raises(MigrationFailed, match=r"no state of ours: \{'starts': 1\}") as caught:
                await source.migrate(str(destination.address))
            assert (caught.value.owner, guest.starts) == ("source", 2)
            report = await source.migrate(str(destination.address))
            assert destination.guest.starts == 1
            assert report["downtime_seconds"] > 0
            return report["pages"]


def test_a_guest_of_ones_own():
    pages = run_in_child(play, "asyncio", with_a_guest_of_ones_own, deadline=SECONDS)
    assert (pages["total"], pages["zero"]) == (4096, 4095)


async def cancel_on_leaving():
    """Leaving the source's block cancels what has not switched over; here the other side never answers."""
    from postcopy.link import Source

    greeted = asyncio.Event()

    async def say_nothing(reader, writer):
        while await reader.read(4096):
            greeted.set()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    address = f"tcp:127.0.0.1:{server.sockets[0].getsockname()[1]}"
    mapping, guest = make_source("shmem")
    async with Source([mapping], guest) as source:
        migration = asyncio.create_task(source.migrate(address))
        await greeted.wait()
        assert source.state == "setup"
        with pytest.raises(UsageError, match="running already"):
            await source.migrate(address)
    with pytest.raises(MigrationCancelled) as caught:
        await migration
    assert caught.value.owner == source.owner == "source"
    steps = guest.steps()
    await until(lambda: min(guest.steps()) > max(steps))
    server.close()
    return True


def test_leaving_the_block_cancels():
    assert run_in_child(play, "uvloop", cancel_on_leaving, deadline=SECONDS)


async def lose_the_source(how, bears):
    """One side gives up after Run. Whatever is missing stays missing: no thread gets on, nothing reads as zeros."""
    from postcopy.link import Source

    mapping, guest = make_source("shmem", workload="sequential", steps_per_second=2000)
    destination = make_destination()
    await destination.__aenter__()
    source = Source([mapping], guest)
    migration = asyncio.create_task(source.migrate(str(destination.address), push=False))
    await until(lambda: (stats := destination.snapshot()) is not None and stats.pages_demand > 20)
    if not bears:
        destination.guest.lose = None
    if how == "source":
        source.lose("it ends", paused=False)
    else:
        destination.lose("it ends", paused=False)
    with pytest.raises(MigrationLost, match=r"it ends|given up") as caught:
        await migration
    assert (caught.value.owner, caught.value.exit_status) == ("lost", 6)
    finish = await destination.migrated()
    assert (finish.state, finish.exit_status) == ("lost", 6)
    with pytest.raises(UsageError, match="pages of it are lost"):
        await destination.onward()
    arrived = destination.guest
    if bears:
        return await goes_on_without(destination, arrived)
    assert destination.lost is None
    steps = []
    await until(lambda: steps.append(sum(arrived.steps())) or (len(steps) > 50 and steps[-1] == steps[-50]))
    await destination.close()  # and even that lets nobody go on
    current = destination._current
    assert current.held
    os.fstat(current.memory.uffd.fd)
    missing = bytes(current._pump.page_map(0)).count(0)
    for _ in range(20):
        await asyncio.sleep(0.005)
        assert sum(arrived.steps()) == steps[-1]
    return missing


async def goes_on_without(destination, arrived):
    lost = sum(extent.length for extent in destination.lost) // 4096
    assert lost == destination.snapshot().pages_poisoned == destination.report["pages"]["lost"]
    await until(lambda: arrived.lost_steps > 20)
    await asyncio.to_thread(arrived.stop)
    found = await asyncio.to_thread(arrived.check)
    assert (found.pages_checked, found.pages_mismatched) == (destination.layout.size // 4096 - lost, 0)
    await destination.close()
    os.fstat(destination._current.memory.uffd.fd)
    return lost


@pytest.mark.parametrize("how", ["source", "destination"])
@pytest.mark.parametrize("bears", [True, False])
def test_after_a_loss_no_thread_ever_sees_zeros(how, bears):
    # a guest that cannot bear it waits in faults: its threads go with the child
    assert run_in_child(play, "uvloop", lose_the_source, how, bears, deadline=SECONDS) > 0
