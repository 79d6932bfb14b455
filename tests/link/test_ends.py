"""How migrations end when several things end at once, with real pumps: each story in a child process."""

import asyncio
import os
import socket

import pytest

from postcopy.errors import MigrationFailed, MigrationLost
from tests.child import run_in_child
from tests.link.test_library import SECONDS, make_destination, make_source, play, until


def told(function):
    """Run a story in a child, on the loop that the daemons use."""
    return run_in_child(play, "uvloop", function, deadline=SECONDS)


# --- the source ---------------------------------------------------------------------------------------------


async def accept_after_the_end():
    """A data connection is accepted when the pump is closed already."""
    from postcopy.link import source_interpreter
    from postcopy.link.address import parse_address
    from postcopy.link.dial import DataConnection
    from postcopy.link.endpoint import Endpoint
    from postcopy.pages.regions import Layout
    from postcopy.session.commands import DialData, StopPump
    from tests.session.samples import source

    accepted, near = asyncio.Event(), socket.socketpair()

    async def dial_data(address, preamble, *, tls):
        await accepted.wait()
        return DataConnection(near[0].detach())

    source_interpreter.dial_data = dial_data
    mapping, guest = make_source("shmem")
    interpreter = source_interpreter.SourceInterpreter(
        source(), Endpoint(parse_address("tcp:127.0.0.1:1")), Layout((mapping.region,)), [mapping], guest,
        poll_max_ns=0, rate=None,
    )  # fmt: skip
    interpreter.machine.version = 3
    await interpreter._dial_data(DialData(b"i" * 16, b"t" * 32))
    await asyncio.sleep(0)
    await interpreter._stop_pump(StopPump())
    accepted.set()
    for _ in range(5):
        await asyncio.sleep(0)
    guest.close()
    return interpreter._dialling.cancelled()


def test_a_data_connection_that_is_accepted_when_all_is_over():
    assert told(accept_after_the_end)


async def wish_for_a_push_as_somebody_pauses():
    """The machine hears of the pause first; the agent is killed before it hears of the wish."""
    from types import SimpleNamespace

    from postcopy.link.address import parse_address
    from postcopy.link.endpoint import Endpoint
    from postcopy.link.keeping import Record
    from postcopy.link.source_interpreter import SourceInterpreter
    from postcopy.pages.regions import Layout, Region
    from postcopy.session.commands import KeepRecord
    from postcopy.session.events import PauseAsked
    from tests.session.samples import source
    from tests.session.test_transcripts import SOURCE_STORY, play, upto

    kept = []
    interpreter = SourceInterpreter(
        play(source(push=False), upto(SOURCE_STORY, "active")), Endpoint(parse_address("tcp:127.0.0.1:1")),
        Layout((Region(0, "shmem", 4096, 1 << 20),)), [], SimpleNamespace(kind="emulated", vcpus=2),
        poll_max_ns=0, rate=None, keeping=SimpleNamespace(keep=kept.append),
    )  # fmt: skip
    await interpreter._keep_record(KeepRecord())
    assert not Record.unpack(kept[-1]).push
    interpreter.post(PauseAsked(interpreter.now(), "somebody asked for it"))
    interpreter.ask_push()
    await interpreter._step(await interpreter._next())
    record = Record.unpack(kept[-1])
    assert interpreter.machine.state == "postcopy-paused"
    return record.held, record.push


def test_a_push_that_is_wished_for_as_somebody_pauses_outlives_the_agent():
    assert told(wish_for_a_push_as_somebody_pauses) == (True, True)


async def fail_to_make_a_pump():
    from postcopy.link import Source

    mapping, guest = make_source("shmem")
    async with make_destination() as destination, Source([mapping], guest, poll_max_ns=-1) as source:
        with pytest.raises(MigrationFailed) as caught:
            await source.migrate(str(destination.address))
        assert (caught.value.exit_status, caught.value.owner, source.owner) == (4, "source", "source")
        assert (await destination.migrated()).state in {"failed", "cancelled"}
        assert destination.owner is None
        steps = guest.steps()
        await until(lambda: min(guest.steps()) > max(steps))
    return str(caught.value)


def test_a_source_that_cannot_make_its_pump_keeps_its_guest():
    assert "internal error: OverflowError" in told(fail_to_make_a_pump)


async def push_on_demand():
    """Asked for at once, before the guest has left; the guest makes no step, so nothing else would bring its pages."""
    from postcopy.link import Source

    mapping, guest = make_source("shmem")
    owners = []
    close = guest.close
    guest.close = lambda: (owners.append(source.owner), close())
    async with make_destination() as destination, Source([mapping], guest) as source:
        migration = asyncio.create_task(source.migrate(str(destination.address), push=False))
        await until(lambda: source.busy)
        await source.start_push()
        await source.start_push()
        report = await migration
        assert (await destination.migrated()).state == "completed"
    assert owners == ["destination"]  # while its memory is being freed, too
    parts = report["details"]["downtime_parts_seconds"]
    assert sum(parts.values()) == pytest.approx(report["downtime_seconds"])
    return report["pages"]


def test_a_push_that_is_wished_for_early_is_begun():
    assert told(push_on_demand)["push"] > 0


# --- the destination ----------------------------------------------------------------------------------------


async def lose_the_source_with_every_page_here():
    """Every page is here and the report is not made yet, since nobody has seen the first step: nothing can be lost."""
    from postcopy.guest import Guest
    from postcopy.link import Source

    class Shy(Guest):
        first_step_at = None

    mapping, guest = make_source("shmem")
    async with make_destination(restore=Shy.restore) as destination, Source([mapping], guest) as source:
        migration = asyncio.create_task(source.migrate(str(destination.address)))
        await until(lambda: destination.state == "completed")
        assert destination.owner == "destination"
        assert destination.finish is None
        source._current.channel.abort()
        told = await migration  # it came back, and was told
        assert told["pages"] == destination.report["pages"]
        finish = await destination.migrated()
        arrived = destination.guest
        steps = arrived.steps()
        await until(lambda: min(arrived.steps()) > max(steps))
        await asyncio.to_thread(arrived.stop)
        result = await asyncio.to_thread(arrived.check)
        assert destination.report["pages"]["total"] == 4096
        return finish.state, finish.exit_status, result.pages_mismatched


def test_a_whole_guest_is_not_lost_for_want_of_a_report():
    assert told(lose_the_source_with_every_page_here) == ("completed", 0, 0)


class CompletePump:
    """What is left of a pump whose last page is placed; nobody has looked at it yet."""

    def __init__(self):
        self.event_fd = os.eventfd(1)

    def status(self):
        from postcopy.pump.status import PumpStatus

        return PumpStatus("complete", None, resident=True)

    def snapshot(self):
        return None

    def glance(self):
        return 1, 4096, b""

    def stop(self):
        pass

    def close(self):
        self.event_fd = -1


def active(machine=None):
    """A destination's interpreter in the middle of a migration, without the guest."""
    from postcopy.link.destination_interpreter import DestinationInterpreter
    from tests.session.samples import destination

    async def claim(_):
        pass

    machine = destination()
    interpreter = DestinationInterpreter(machine, {}, {}, claim=claim, mode="auto", poll_max_ns=0)
    machine.step, machine.version = "active", 3
    interpreter._pump, interpreter._watched = CompletePump(), True
    return interpreter


async def judge_what_is_older_than_the_look():
    from postcopy.session.events import ControlLost

    interpreter = active()
    interpreter.post(ControlLost(0.0, "cut"))
    return await interpreter.run()


def test_an_end_that_was_queued_before_the_pump_was_looked_at_loses_nothing():
    finish = asyncio.run(judge_what_is_older_than_the_look())
    assert (finish.state, finish.owner, finish.exit_status) == ("completed", "destination", 0)


async def trip_after_run():
    """A mistake of the destination's own machine while the guest runs: lost, and its threads wait for ever."""
    from postcopy.link import Source

    mapping, guest = make_source("shmem", workload="sequential", steps_per_second=2000)
    destination = make_destination()
    await destination.__aenter__()
    source = Source([mapping], guest)
    migration = asyncio.create_task(source.migrate(str(destination.address), push=False))
    await until(lambda: destination.state == "postcopy-active" and source.state == "postcopy-active")

    def trips(event):
        raise KeyError(event)

    current = destination._current
    current.machine.handle = trips
    finish = await destination.migrated()
    with pytest.raises(MigrationLost):
        await migration
    await destination.close()
    assert current.held
    os.fstat(current.memory.uffd.fd)
    assert destination.owner == "lost"
    return finish.state, finish.exit_status


def test_a_mistake_after_run_is_a_loss_and_shows_nobody_zeros():
    assert told(trip_after_run) == ("lost", 6)


def frozen_source(address):
    """A source that has sent a guest's state, was told that it is loaded, and says nothing more."""
    import msgpack

    from postcopy.guest import Guest
    from postcopy.kernel import memory_type
    from postcopy.pages.regions import Region
    from postcopy.wire.control import Loaded, State
    from tests.agent.fakes import FakeSource

    mapping = memory_type("shmem").allocate(Region(0, "shmem", 4096, 1 << 20), alias=False)
    with Guest([mapping], vcpus=1) as guest:
        saved = msgpack.packb(guest.save())
    fake = FakeSource(address).greet().offer().attach()
    fake.control.send(State(saved, 1.0, "boot"))
    fake.control.expect(Loaded)
    return fake


async def close_with_a_frozen_source():
    from postcopy.link import destination as room

    room.CLOSE_SECONDS = 0.3
    destination = make_destination()
    await destination.__aenter__()
    fake = await asyncio.to_thread(frozen_source, str(destination.address))
    assert (destination.state, destination.owner) == ("device", "source")
    await asyncio.wait_for(destination.close(), 10)
    fake.control.socket.close()
    return destination.state


def test_closing_does_not_wait_for_a_source_that_is_frozen():
    assert told(close_with_a_frozen_source) == "failed"


async def come_while_others_only_greet():
    """Whoever says no more than Hello holds nothing up, however many they are; one that has made its offer does."""
    from postcopy.limits import UNPROVEN_MAX
    from postcopy.link import Source
    from postcopy.wire.control import Refuse
    from tests.agent.fakes import OFFER, FakeSource

    mapping, guest = make_source("shmem")
    async with make_destination() as destination, Source([mapping], guest) as source:
        address = str(destination.address)
        fakes = [await asyncio.to_thread(lambda: FakeSource(address).greet()) for _ in range(3)]
        assert (destination.state, destination.owner) == ("none", None)
        with await asyncio.to_thread(fakes[0].offer):
            assert (destination.state, destination.owner) == ("setup", "source")
            with pytest.raises(MigrationFailed, match="in the middle of a migration"):
                await source.migrate(address)
            fakes[1].control.send(OFFER)
            refusal = await asyncio.to_thread(fakes[1].control.expect, Refuse)
            assert refusal.code == "busy"
        await destination.migrated()
        many = [await asyncio.to_thread(lambda: FakeSource(address).greet()) for _ in range(UNPROVEN_MAX + 1)]
        for fake in (fakes[2], many[0]):
            assert await asyncio.to_thread(fake.control.receive) is None, "who waits longest gives his place"
        assert len(destination._greeted) == UNPROVEN_MAX
        await source.migrate(address)
        assert (await destination.migrated()).state == "completed"
        for fake in (*fakes, *many):
            fake.control.close()
    return True


def test_whoever_only_greets_does_not_keep_others_out():
    assert told(come_while_others_only_greet)


# --- what is still trapped ----------------------------------------------------------------------------------


class FakeUffd:
    def __init__(self, refused):
        self.refused = refused
        self.unregistered = []

    def unregister(self, address, length):
        from postcopy.errors import KernelError

        if address in self.refused:
            raise KernelError("UFFDIO_UNREGISTER", 22)
        self.unregistered.append(address)


class FakeMapping:
    def __init__(self, address):
        from postcopy.pages.regions import Region

        self.address = address
        self.region = Region(0, "shmem", 4096, 4096)
        self.asked = False

    def allow_huge_pages(self):
        from postcopy.errors import KernelError

        self.asked = True
        raise KernelError("madvise", 22)


def trapped(refused):
    from postcopy.link.prepare import Memory

    mappings = [FakeMapping(address) for address in (1, 2, 3)]
    return Memory(None, mappings, FakeUffd(refused), [], [], None)


def test_one_region_that_cannot_be_let_go_does_not_keep_the_others_trapped():
    from postcopy.errors import KernelError

    memory = trapped({1})
    with pytest.raises(KernelError, match="UFFDIO_UNREGISTER"):
        memory.trap_no_more()
    assert memory.uffd.unregistered == [2, 3]
    memory = trapped(set())
    memory.trap_no_more()  # an advice that is not taken is none
    assert memory.uffd.unregistered == [1, 2, 3]
    assert all(mapping.asked for mapping in memory.mappings)


def test_while_anything_is_trapped_somebody_serves_it():
    from postcopy.errors import KernelError
    from postcopy.session.commands import Settle, StopPump

    async def story():
        interpreter = active()
        interpreter.memory, pump = trapped({2}), interpreter._pump
        with pytest.raises(KernelError):
            await interpreter._settle(Settle())
        await interpreter._stop_pump(StopPump())
        assert interpreter._pump is pump
        os.close(pump.event_fd)

    asyncio.run(story())
