"""The interpreter's loop: events in their order, and the one that overtakes them all."""

import asyncio
import os
import socket
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import uvloop

from postcopy.errors import HostError, KernelError, ProtocolError
from postcopy.link import destination_interpreter
from postcopy.link.control import ControlChannel
from postcopy.link.interpreter import Interpreter, failure_of
from postcopy.link.pumping import WORDS_SECONDS, PumpInterpreter, SourcePumpInterpreter
from postcopy.pages.regions import Layout, Region
from postcopy.pump.destination import DestinationStats
from postcopy.pump.status import PumpStatus
from postcopy.session.commands import Finish, ResumeGuest, Send, StartPush, StopPump
from postcopy.session.events import (
    Connected,
    ControlLost,
    DataConnected,
    Elapsed,
    GuestStopped,
    PumpBroken,
    Received,
    Started,
)
from postcopy.wire.control import Alive, Loaded, Progress, Ready, State, Welcome, encode
from postcopy.wire.messages import GONE, REFUSE_CODES, Refuse
from tests.session.samples import IDENTITY, destination, source


class Recorder(Interpreter):
    """A source without a guest: it only writes down what it was told to do."""

    def __init__(self, machine):
        self.done = []
        super().__init__("source", machine)

    def performers(self):
        async def note(command):
            self.done.append(type(command).__name__)

        from postcopy.session import commands

        own = (commands.Connect, commands.DialData, commands.StopGuest, commands.StartPump)
        return dict.fromkeys((*own, ResumeGuest, StartPush, StopPump), note)


def test_a_run_that_meets_a_closed_connection_is_judged_before_the_end_of_the_connection():
    """Loaded and the end of the connection arrive together: Run cannot leave, so the source keeps its guest."""

    async def story():
        near, far = socket.socketpair()
        interpreter = Recorder(source())
        interpreter.channel = await ControlChannel.over(near, "far")
        events = [
            Started(0.0),
            Connected(0.0),
            Received(0.0, Welcome(3, *IDENTITY, "x")),
            Received(0.0, Ready()),
            DataConnected(0.0),
            GuestStopped(0.0, b"", 0.0, "boot"),
        ]
        for event in events:
            await interpreter._step(event)
        far.close()
        reader = interpreter.channel._reader
        while not reader.at_eof() and reader.exception() is None:
            await asyncio.sleep(0.001)
        interpreter.post(Received(0.0, Loaded()))
        interpreter.post(ControlLost(0.0, "far closed the connection"))
        finish = await interpreter.run()
        assert interpreter.done[-2:] == ["ResumeGuest", "StopPump"]
        return finish

    finish = asyncio.run(asyncio.wait_for(story(), 10))
    assert isinstance(finish, Finish)
    assert (finish.state, finish.owner, finish.exit_status) == ("failed", "source", 4)


def test_states_are_logged_when_the_guest_runs_again_or_before_anything_else_is_said(caplog):
    """A line takes as long as whoever takes it in, and the guest stands still meanwhile."""
    caplog.set_level("INFO", logger="postcopy.session")

    def lines():
        return [record.message for record in caplog.records if record.name == "postcopy.session"]

    async def story():
        near, far = socket.socketpair()
        interpreter = Recorder(source())
        interpreter.channel = await ControlChannel.over(near, "far")
        interpreter.machine.step = "attaching"
        running = asyncio.create_task(interpreter.run())
        interpreter.post(DataConnected(interpreter.now()))
        while "StopGuest" not in interpreter.done:
            await asyncio.sleep(0)
        for _ in range(5):  # the loop has nothing to do now
            await asyncio.sleep(0)
        assert lines() == []
        came = time.time()
        while not lines():
            await asyncio.sleep(0.001)
        assert lines() == ["source: setup -> device"]
        told = next(record for record in caplog.records if record.name == "postcopy.session")
        assert told.created <= came  # the time of the change
        assert told.msecs == pytest.approx(1000 * (told.created % 1))
        assert (told.state, told.levelname) == ("device", "INFO")
        interpreter.post(ControlLost(0.0, "cut"))
        far.close()
        return await running

    assert asyncio.run(asyncio.wait_for(story(), 10)).state == "failed"
    assert lines() == ["source: setup -> device", "source: device -> failed", "source: cut"]


def test_a_performer_that_breaks_does_not_keep_the_rest_from_being_done():
    async def story():
        interpreter = Recorder(source())

        async def breaks(command):
            raise ZeroDivisionError("a mistake of ours")

        interpreter._performers[ResumeGuest] = breaks
        interpreter.machine.step = "loading"
        interpreter.post(ControlLost(0.0, "cut"))
        finish = await interpreter.run()
        assert interpreter.done == ["StopPump"]
        return finish

    assert asyncio.run(asyncio.wait_for(story(), 10)).exit_status == 4


def test_what_was_for_a_connection_that_another_one_has_replaced_is_said_to_nobody():
    """Two attempts of a source to come back in one moment: the answer to the first is none to the second."""

    async def story():
        (near, far), (again, beyond) = socket.socketpair(), socket.socketpair()
        interpreter = Recorder(source())
        interpreter.listen(await ControlChannel.over(near, "far"))
        await interpreter._step(Started(0.0))
        later = await ControlChannel.over(again, "far")

        async def meanwhile(_command):
            interpreter.listen(later)

        interpreter.machine.handle = lambda _event: [StopPump(), Send(Ready()), Send(Loaded())]
        interpreter._performers[StopPump] = meanwhile
        await interpreter._step(Started(0.0))
        await interpreter._send(Send(Ready()))
        interpreter.machine.handle = lambda _event: [Send(Alive())]
        await interpreter._step(Started(0.0))
        said = await asyncio.get_running_loop().run_in_executor(None, beyond.recv, 4096)
        for end in (far, beyond):
            end.close()
        await asyncio.gather(*interpreter._tasks)
        await later.close()
        return said

    assert asyncio.run(asyncio.wait_for(story(), 10)) == encode(Alive())


def test_an_event_that_no_table_foresaw_is_a_pause_behind_run():
    """The machine stands where it stood, and the way back has both sides agree on everything anew."""

    async def story():
        interpreter = Recorder(source())
        interpreter.machine.step, interpreter.machine.version = "active", 3
        await interpreter._step(Started(0.0))
        return interpreter.machine

    machine = asyncio.run(asyncio.wait_for(story(), 10))
    assert (machine.state, machine.trouble[:15]) == ("postcopy-paused", "the destination")


@pytest.mark.parametrize("step", ["attaching", "loading"])
def test_a_mistake_of_ours_ends_the_migration_with_the_guest_at_the_source(step):
    """Whatever the machine itself trips over: nobody is left behind in the middle of something."""

    async def story():
        near, far = socket.socketpair()
        interpreter = Recorder(source())
        interpreter.channel = await ControlChannel.over(near, "far")
        interpreter.machine.step = step

        def trips(event):
            raise KeyError(event)

        interpreter.machine.handle = trips
        interpreter.post(Received(0.0, Loaded()))
        finish = await interpreter.run()
        assert interpreter.done == (["ResumeGuest", "StopPump"] if step == "loading" else ["StopPump"])
        assert b"internal error: KeyError" in await asyncio.get_running_loop().run_in_executor(None, far.recv, 4096)
        assert far.recv(1) == b""  # closed behind the goodbye
        far.close()
        return finish

    finish = asyncio.run(asyncio.wait_for(story(), 10))
    assert (finish.state, finish.owner, finish.exit_status) == ("failed", "source", 4)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_what_arrived_during_a_pause_counts_before_the_timer(run):
    """The process was stopped for longer than the deadline, and the message that was due came meanwhile."""

    async def story():
        near, far = socket.socketpair()
        interpreter = Recorder(source())
        interpreter.machine.step, interpreter.machine.version = "active", 3
        interpreter.listen(await ControlChannel.over(near, "far"))
        interpreter.machine.deadline = interpreter.now() + 0.05
        waiting = asyncio.create_task(interpreter._next())
        for _ in range(5):
            await asyncio.sleep(0)  # until it waits
        far.sendall(encode(Progress(1, 256, 0)))
        time.sleep(0.1)  # this is the pause: the loop sees both at once
        event = await waiting
        assert isinstance(event, Received), event
        interpreter.machine.deadline = interpreter.now() + 0.01
        assert isinstance(await interpreter._next(), Elapsed)  # and nothing is still nothing
        await interpreter._end_tasks()
        await interpreter.channel.close()
        far.close()

    run(asyncio.wait_for(story(), 10))


class ForeignError(Exception):
    code = 404


class CodedError(HostError):
    code = "memory"


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (ForeignError(), "internal", 4),
        (CodedError("no room"), "memory", 3),
        (KernelError("lseek", 5), "host", 3),
        (ProtocolError("nonsense"), "guest", 4),
        (OSError(5, "broken"), "host", 3),
    ],
)
def test_a_failure_is_told_in_the_words_of_the_protocol(error, code, status):
    failure = failure_of(error, 1.0)
    assert (failure.code, failure.exit_status) == (code, status)
    assert failure.code in REFUSE_CODES


@pytest.mark.parametrize(("size", "most"), [(1 << 20, 3), (64, 64)])
def test_no_more_is_read_ahead_than_there_is_room_for(size, most):
    """The machine is busy: what the other side says meanwhile waits on the connection, large messages as many."""

    async def story():
        near, far = socket.socketpair()
        far.setblocking(False)
        interpreter = Recorder(source())
        interpreter.listen(await ControlChannel.over(near, "far"))
        count = 200 if size < 1000 else 8
        said = encode(Loaded()) + encode(State(b"x" * size, 0.0, "boot")) * count
        sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(far, said))
        while len(interpreter._events) < min(most, 2):
            await asyncio.sleep(0.001)
        for _ in range(200):  # rounds in which more would have been read
            await asyncio.sleep(0)
        held = len(interpreter._events)
        taken = 0
        while taken < 1 + count:  # and all of it comes as it is taken
            await interpreter._next()
            taken += 1
        await sending
        await interpreter._end_tasks()
        await interpreter.channel.close()
        far.close()
        return held

    assert asyncio.run(asyncio.wait_for(story(), 20)) <= most


def test_a_look_at_the_pump_tells_of_what_the_kernel_put_off(monkeypatch):
    """The kernel's refusals are no silence of the source; see the session's _starved."""

    async def at_once(_seconds):
        await asyncio.sleep(0)

    class Pump:
        def snapshot(self):
            stats = DestinationStats.of_handed_over(Layout((Region(0, "shmem", 4096, 1 << 20),)))
            return replace(stats, outcomes=stats.outcomes | {"retry": 7})

    monkeypatch.setattr(destination_interpreter, "next_round", at_once)

    async def story():
        interpreter = destination_interpreter.DestinationInterpreter(
            destination(), {}, {}, claim=None, mode="auto", poll_max_ns=0
        )
        interpreter._pump = Pump()
        looking = interpreter.spawn(interpreter._watch_progress())
        event = await interpreter._next()
        looking.cancel()
        return event.retries

    assert asyncio.run(asyncio.wait_for(story(), 10)) == 7


class Breaking(PumpInterpreter):
    """Of either side; its pump is one whose connections have just been closed."""

    def performers(self):
        return {}

    def _pump_ended(self, _status):
        raise AssertionError


@pytest.mark.parametrize("another", [False, True])
def test_what_was_said_before_the_connections_were_closed_is_heard_first(another):
    """Whoever ends says so, and then closes: taken for a connection that broke, it would be dialled for ever."""

    def pump():
        read_fd, write_fd = os.pipe()
        os.write(write_fd, b"12345678")
        fds.extend((read_fd, write_fd))
        return SimpleNamespace(event_fd=read_fd, status=lambda: PumpStatus("broken", "closed"))

    async def story():
        interpreter = Breaking("source", source())
        interpreter._pump = pump()
        interpreter._pump_woke()
        if another:
            interpreter._pump = pump()
            await asyncio.sleep(2 * WORDS_SECONDS)
            assert not interpreter._events  # nothing is broken that anybody still has
            return
        goodbye = Received(interpreter.now(), Refuse(GONE, "the destination's agent ends"))
        asyncio.get_running_loop().call_soon(interpreter.post, goodbye)
        while len(interpreter._events) < 2:
            await asyncio.sleep(0)
        assert [type(event) for event, _, _ in interpreter._events] == [Received, PumpBroken]

    fds = []
    asyncio.run(asyncio.wait_for(story(), 10))
    for one in fds:
        os.close(one)


class BreakingSource(SourcePumpInterpreter):
    """One that writes down what it was told to do; its pump is one that lost a connection."""

    performers = Recorder.performers

    def __init__(self, machine):
        self.done = []
        super().__init__(machine)


@pytest.mark.parametrize("version", [2, 3])
def test_a_source_does_not_run_its_guest_elsewhere_over_connections_that_it_knows_are_dead(version):
    async def story():
        near, far = socket.socketpair()
        interpreter = BreakingSource(source())
        interpreter.channel = await ControlChannel.over(near, "far")
        events = [
            Started(0.0),
            Connected(0.0),
            Received(0.0, Welcome(version, *IDENTITY, "x")),
            Received(0.0, Ready()),
            DataConnected(0.0),
            GuestStopped(0.0, b"", 0.0, "boot"),
        ]
        for event in events:
            await interpreter._step(event)
        read_fd, write_fd = os.pipe()
        os.write(write_fd, b"12345678")
        interpreter._pump = SimpleNamespace(event_fd=read_fd, status=lambda: PumpStatus("broken", "urgent closed"))
        interpreter._pump_woke()
        interpreter.post(Received(0.0, Loaded()))
        finish = await interpreter.run()
        assert interpreter.done[-2:] == ["ResumeGuest", "StopPump"]
        for end in (read_fd, write_fd):
            os.close(end)
        far.close()
        return finish

    finish = asyncio.run(asyncio.wait_for(story(), 10))
    assert (finish.state, finish.owner, finish.text) == ("failed", "source", "urgent closed")
