"""What does not answer, and what is too many: a source that accepts nothing, descriptors beyond those of select()."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import threading
from types import SimpleNamespace

import pytest

from postcopy.guest.outside import serving
from postcopy.guest.outside.process import Process
from postcopy.guest.outside.serving import OutsideDestination
from postcopy.guest.outside.session import OutsideInterpreter
from postcopy.limits import REJOIN_SECONDS
from postcopy.link.address import UnixAddress, parse_address
from postcopy.link.control import ControlChannel
from postcopy.link.destination_interpreter import DestinationInterpreter
from postcopy.link.endpoint import Endpoint
from postcopy.pump.status import PumpStatus
from postcopy.session.commands import StartPump, StopPump, TellResidence
from postcopy.session.events import Received
from postcopy.session.states import State
from postcopy.wire.control import Cancel, ControlDecoder, GuestOffer, Hello, LayoutOffer, RegionOffer, encode
from postcopy.wire.preamble import PREAMBLE_BYTES, Role, unpack
from postcopy.wire.version import FETCH_SINCE
from tests.outside.vmm import MIB, PAGE, Vmm, destination
from tests.session.samples import destination as destination_machine
from tests.session.test_fetching import BACK, HELLO, fetching
from tests.session.test_transcripts import play, upto

NOWHERE = Endpoint(parse_address("tcp:127.0.0.1:1"))


@pytest.fixture
def many_descriptors():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 2048), before[1]))
    taken = [os.dup(0) for _ in range(1100)]
    yield
    for one in taken:
        os.close(one)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_process_is_seen_with_more_descriptors_than_select_knows(many_descriptors):
    async def look():
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        with ours, theirs:
            process = Process(ours)
            lives = process.lives
            waiting = asyncio.create_task(process.ended.wait())
            process.close()
            await asyncio.wait_for(waiting, 10)  # whoever waits for the end of one that is closed would for ever
            return lives, process.lives

    assert asyncio.run(look()) == (True, False)


def cancelling_source(listening, stop):
    """Offer what is asked for, never accept a data connection, and cancel once one waits to be accepted."""

    def receive(connection, count):
        data = b""
        while len(data) < count and (piece := connection.recv(count - len(data))):
            data += piece
        return data

    control, _ = listening.accept()
    assert unpack(receive(control, PREAMBLE_BYTES)).role is Role.FETCH
    control.sendall(encode(Hello((FETCH_SINCE, FETCH_SINCE), "stubborn")))
    decoder = ControlDecoder()
    while not decoder.feed(control.recv(4096)):
        pass
    offer = LayoutOffer((RegionOffer("file", PAGE, 8 * MIB),), GuestOffer("outside", 1))
    control.sendall(encode(offer, FETCH_SINCE))
    data, _ = listening.accept()
    receive(data, PREAMBLE_BYTES)
    control.sendall(encode(Cancel("enough"), FETCH_SINCE))
    stop.wait(60)
    data.close()
    control.close()


def test_a_source_that_accepts_no_data_connection_holds_no_process(tmp_path):
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        playing = threading.Thread(target=cancelling_source, args=(listening, stop))
        playing.start()
        try:
            address = f"tcp:127.0.0.1:{listening.getsockname()[1]}"
            with destination(tmp_path, "--from", address) as there, Vmm(f"{tmp_path}/uffd.sock") as vmm:
                there.until_log(rf"process {vmm.pid}: cancelled by the source: enough; 2048 pages are poisoned")
                vmm.ask("read", 0)
                assert vmm.ends_with() == -signal.SIGBUS
        finally:
            stop.set()
            playing.join()


def test_a_source_whose_name_can_be_none_is_said_in_one_line(tmp_path):
    path = f"{tmp_path}/uffd.sock"
    with destination(tmp_path, "--from", "tcp:a..b:1", "--insecure") as there, Vmm(path) as vmm:
        why = "cannot find the host of tcp:a..b:1: this is no name of a host"
        there.until_log(rf"process {vmm.pid}: {why}; 2048 pages are poisoned")
        vmm.ask("read", 0)
        assert vmm.ends_with() == -signal.SIGBUS


def test_a_pump_that_fails_after_the_last_page_is_noticed(tmp_path):
    class Failing:
        event_fd = os.eventfd(0, os.EFD_NONBLOCK)

        def status(self):
            return SimpleNamespace(state="failed", error="the kernel refused")

    async def fail():
        handed = SimpleNamespace(memory_fd=-1, process="process 1", message=SimpleNamespace(mappings=()))
        interpreter = OutsideDestination(UnixAddress(f"{tmp_path}/uffd.sock"))._begin(handed, None)
        interpreter._pump, interpreter._course = Failing(), SimpleNamespace(look=lambda _pump: None)
        interpreter._resident()
        os.eventfd_write(Failing.event_fd, 1)
        await asyncio.wait_for(interpreter.failed.wait(), 10)
        return interpreter.trouble

    assert asyncio.run(fail()) == "the kernel refused"
    os.close(Failing.event_fd)


class EndedPump:
    """One that failed. `resident`: right behind its last page, both told of with the one event that has been read."""

    def __init__(self, *, resident):
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._resident = resident

    def start(self):
        pass

    def status(self):
        return PumpStatus("failed", "it broke", resident=self._resident)


def test_a_pump_that_failed_right_behind_its_last_page_is_heard():
    async def scene():
        handed = SimpleNamespace(memory_fd=-1, process="process 1")
        interpreter = OutsideInterpreter(SimpleNamespace(), handed, endpoint=None, poll_max_ns=0)
        interpreter._pump = EndedPump(resident=True)
        interpreter._course = SimpleNamespace(look=lambda _pump: None)
        interpreter._resident()
        await asyncio.wait_for(interpreter.failed.wait(), 10)
        return interpreter.trouble

    assert asyncio.run(scene()) == "it broke"


def test_what_the_source_said_as_the_last_page_was_given_back_is_of_a_connection_that_is_left():
    async def scene():
        handed = SimpleNamespace(memory_fd=-1, process="process 1")
        machine = play(fetching(), upto(BACK, "rejoining"))
        interpreter = OutsideInterpreter(machine, handed, endpoint=NOWHERE, poll_max_ns=0)
        interpreter._pump, interpreter._watched = EndedPump(resident=True), True
        interpreter._course = SimpleNamespace(look=lambda _pump: None)
        near, far = socket.socketpair()
        with far:
            interpreter.channel = channel = await ControlChannel.over(near, "the source")
            await interpreter._step(Received(9.0, HELLO))
            await interpreter._end_tasks()
            await channel.close()
        return machine.step, interpreter.channel

    assert asyncio.run(scene()) == ("settling", None)


def test_a_source_has_its_time_to_answer_however_long_it_took_to_say_what_is_here():
    async def scene():
        handed = SimpleNamespace(memory_fd=-1, process="process 1")
        machine = play(fetching(), upto(BACK, "reloading"))  # long ago
        interpreter = OutsideInterpreter(machine, handed, endpoint=NOWHERE, poll_max_ns=0)
        now = interpreter.now()
        await interpreter._tell_residence(TellResidence())
        return machine.deadline - now

    assert asyncio.run(scene()) >= REJOIN_SECONDS


def test_a_pump_that_fails_after_a_hand_over_is_over_leaves_the_faults_to_the_kernel():
    """Memory of ours that was handed over and is trapped: its pump serves on when the migration has completed."""

    async def scene():
        untrapped = threading.Event()
        interpreter = DestinationInterpreter(destination_machine(), {}, {}, claim=None, mode="minor", poll_max_ns=0)
        interpreter.memory = SimpleNamespace(resident=True, trap_no_more=untrapped.set)
        interpreter._pump = pump = EndedPump(resident=False)
        await interpreter._start_pump(StartPump())
        await interpreter._stop_pump(StopPump())  # as at the end of a migration
        os.eventfd_write(pump.event_fd, 1)
        assert await asyncio.to_thread(untrapped.wait, 10)

    asyncio.run(scene())


class Handed:
    """What is looked at of a process that was handed over, whose end nobody sees."""

    def __init__(self):
        self.process, self.lives = SimpleNamespace(ended=asyncio.Event()), True
        self.message = SimpleNamespace(mappings=(), describe=lambda: "nothing")
        self.memory_fd, self.kept, self.poisoned, self.closed = -1, None, False, False

    def keep(self, _store, _connection):
        raise OSError(24, "Too many open files")

    def states(self):
        return []

    async def gone_for_good(self):
        await self.process.ended.wait()

    def poison(self, _maps):
        self.poisoned = True
        return 0

    def close(self):
        self.closed = True
        self.process.ended.set()


@pytest.mark.parametrize("why", ["too many", "not kept"])
def test_a_process_that_cannot_be_served_waits_for_nothing(tmp_path, monkeypatch, why):
    async def scene():
        served = OutsideDestination(UnixAddress(f"{tmp_path}/uffd.sock"), store=object() if why == "not kept" else None)
        handed = Handed()
        monkeypatch.setattr(serving, "take", lambda _connection, **_: asyncio.sleep(0, handed))
        if why == "too many":
            served.current += [None] * serving.PROCESSES_MAX
        ours, theirs = socket.socketpair()
        with theirs:
            await served._hearings.acquire()
            await served._hear(ours)
        return handed.poisoned, handed.closed, list(served.waiting)

    assert asyncio.run(scene()) == (True, True, [])


def test_failed_attempts_leave_no_task_behind(tmp_path):
    async def scene():
        served = OutsideDestination(UnixAddress(f"{tmp_path}/uffd.sock"))
        handed = Handed()
        for _ in range(3):
            interpreter = served._begin(handed, None)
            finish = SimpleNamespace(state=State.FAILED, text="it came to nothing")
            await asyncio.wait_for(served._follow(interpreter, finish), 10)
            assert served.waiting.pop() is handed
        handed.process.ended.set()  # meanwhile: nobody else waits for it
        await served._follow(served._begin(handed, None), finish)
        return handed.closed, list(served.waiting)

    assert asyncio.run(scene()) == (True, [])
