"""An agent's side of a keeper, in this process: what is kept, what stays at the agent's end, what goes wrong."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgpack
import pytest

from agent import keeper as process
from agent import kept as keeping
from agent import returned_source
from agent.counts import Totals
from agent.daemon import Parent
from agent.departure import Departure
from agent.kept import NothingKeptError, read_head, start_keeper, take_place
from agent.running_guest import Use
from postcopy.errors import HostError, PostcopyError, UsageError
from postcopy.kernel import memory_type
from postcopy.link.address import UnixAddress
from postcopy.pages.regions import Region
from postcopy.session.states import State
from postcopy.wire.control import Refuse, Resume
from postcopy.wire.messages import UNRUN
from tests.chaos.proxy import wait_for

from .agents import Command, run
from .fakes import Channel, FakeDestination
from .keepers import RECORD, end_keepers_of, gone, stop


@pytest.fixture
def kept(tmp_path):
    address = UnixAddress(f"{tmp_path}/kept.sock")
    with memory_type("shmem").allocate(Region(0, "shmem", 4096, 8192), alias=False) as mapping:
        mapping.write(4096, b"here")
        kept = start_keeper(address, [mapping])
        yield kept
        kept.release()
        end_keepers_of(tmp_path)
        kept._process.wait(20)


def leave(kept):
    """Be killed, as far as the keeper can see: the connection ends, and nothing is said."""
    kept._released = True  # or another keeper would be started
    kept._connection.shutdown(socket.SHUT_RDWR)


def test_no_keeper_is_waited_for_once_the_guest_stands_still(kept, tmp_path):
    stop(kept._pid)
    for record in (RECORD, replace(RECORD, state=b"s" * 100_000), RECORD):
        kept.keep(record.pack())  # nobody is there to answer
    leave(kept)
    again, record, mappings = take_place(kept.address)
    assert record == RECORD
    assert mappings[0].read(4096, 4) == b"here"
    again.release()
    gone(str(kept.address))
    for mapping in mappings:
        mapping.close()


def lying(record):
    packed = record.pack()
    return process.HEAD.pack(process.HEAD.size, len(packed)) + packed


@pytest.mark.parametrize(
    ("written", "why"),
    [
        (process.HEAD.pack(16, 1 << 60), "what was kept cannot be read"),
        (process.HEAD.pack(16, 5) + b"\xc1junk", "what was kept cannot be read"),
        (process.HEAD.pack(1 << 50, 5) + b"12345", "what was kept cannot be read"),
        (lying(replace(RECORD, version="three")), "what was kept cannot be read: version"),
        (lying(replace(RECORD, regions=(("shmem", 4096, 1 << 40),))), "are not the memory"),
        (lying(replace(RECORD, regions=(("shmem", 4096, 4096),) * 2)), "are not the memory"),
        (lying(replace(RECORD, regions=(("shmem", 4096, 4097),))), "is not a multiple"),
        (lying(replace(RECORD, regions=(("shmem", 4096),))), "what was kept cannot be read"),
    ],
    ids=["huge", "junk", "beyond", "type", "small-file", "a-file-less", "size", "regions"],
)
def test_a_record_of_nonsense_is_refused_and_harms_no_keeper(kept, written, why):
    os.pwrite(kept._files[0], written, 0)
    leave(kept)
    with pytest.raises(UsageError, match=why):
        take_place(kept.address)
    kept._write(RECORD.pack())
    again, record, mappings = take_place(kept.address)
    assert record == RECORD
    mappings[0].close()
    again.release()


def test_a_record_of_an_agent_that_kept_no_pauses_is_one_of_a_migration_that_goes_on(kept):
    before = msgpack.unpackb(RECORD.pack())
    del before["held"]
    kept.keep(msgpack.packb(before))
    leave(kept)
    again, record, mappings = take_place(kept.address)
    assert record == RECORD
    mappings[0].close()
    again.release()


def test_a_record_that_leads_nowhere_is_said(kept):
    kept._write(replace(RECORD, address="elsewhere").pack())
    leave(kept)
    refused = run("source", "--resume", str(kept.address), deadline=20)
    assert refused.status == 2
    assert "elsewhere" in refused.err


def test_a_guest_that_ran_nowhere_and_cannot_be_made_here_stays_with_its_keeper(kept, tmp_path):
    """The state is another version's: whoever took the former agent's place must not throw it away."""
    with FakeDestination() as there:
        record = replace(RECORD, address=there.address, state=b"\x80")
        kept.keep(record.pack())
        leave(kept)
        with Command("source", "--resume", str(kept.address)) as again:
            _, connection = there.accept()
            there.control = Channel(connection)
            there.control.expect(Resume)
            there.control.send(Refuse(UNRUN, "it never ran"))
            refused = again.result()
    assert refused.status == 3
    assert "the guest never ran anywhere else, and cannot be made here" in refused.err
    assert "Traceback" not in refused.err
    another, left, mappings = take_place(kept.address)
    assert left == record
    mappings[0].close()
    another.release()


def test_a_host_that_cannot_have_the_guest_sends_its_pages_all_the_same(kept, monkeypatch, caplog):
    def check_host():
        raise HostError("there is no /dev/kvm")

    kept._write(replace(RECORD, address="elsewhere").pack())
    leave(kept)
    taken = take_place(kept.address)
    monkeypatch.setattr(returned_source, "take_place", lambda _: taken)
    monkeypatch.setattr(returned_source, "kind_named", lambda _: SimpleNamespace(check_host=check_host))
    options = returned_source.ReturnOptions(
        keeper=kept.address, admin=None, metrics=None, ready_fd=None, poll_max_ns=0, parent=Parent()
    )
    with pytest.raises(UsageError, match="elsewhere"):  # so far it came
        asyncio.run(returned_source.serve_return(options))
    assert "it cannot run here: there is no /dev/kvm" in caplog.text
    again, _, mappings = taken
    mappings[0].close()
    again.release()
    gone(str(kept.address))


# --- the end of an agent that has a keeper ----------------------------------------------------------------------------


def departure_of(kept, state):
    """A way out of an agent that is being ended, with the keeper; `told`: the destination was, that pages are gone."""
    told = []
    source = SimpleNamespace(state=state, lose=lambda *_, **__: told.append(True))
    departure = Departure(source, Use(), asyncio.Event(), Totals(), keeper=kept.address, kept=kept)
    return departure, told


def test_what_is_kept_stays(kept):
    kept.keep(RECORD.pack())
    departure, told = departure_of(kept, State.POSTCOPY_ACTIVE)
    asyncio.run(departure._part())
    assert (departure.verdict(), told) == (5, [])


def test_nothing_stays_of_a_migration_that_nobody_can_go_on_with(kept):
    """Its destination is of version 2, or the memory was handed over: nothing is kept."""
    departure, told = departure_of(kept, State.POSTCOPY_ACTIVE)
    asyncio.run(departure._part())
    assert (departure.verdict(), told) == (6, [True])


def test_nothing_stays_where_no_keeper_can_be_had(kept, monkeypatch):
    kept.keep(RECORD.pack())
    departure, told = departure_of(kept, State.POSTCOPY_PAUSED)
    break_starting(monkeypatch)
    os.kill(kept._pid, signal.SIGKILL)
    kept._process.wait()
    asyncio.run(departure._part())
    assert (departure.verdict(), told) == (6, [True])


def test_a_keeper_that_has_just_ended_is_followed_before_it_is_said_what_stays(kept):
    kept.keep(RECORD.pack())
    departure, told = departure_of(kept, State.POSTCOPY_ACTIVE)
    os.kill(kept._pid, signal.SIGKILL)
    kept._process.wait()
    asyncio.run(departure._part())
    assert (departure.verdict(), told) == (5, [])


@pytest.mark.parametrize("state", [State.COMPLETED, State.LOST])
def test_nothing_is_left_with_a_keeper_that_nobody_needs(kept, state):
    """Also where the agent is ended between the last page and its letting go of the memory."""
    kept.keep(RECORD.pack())
    departure, _ = departure_of(kept, state)
    asyncio.run(departure._part())
    gone(str(kept.address))


# --- what goes wrong on an agent's side of it -------------------------------------------------------------------------


def break_starting(monkeypatch):
    def none_left(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(keeping, "socket", SimpleNamespace(**{**vars(socket), "socketpair": none_left}))  # its alone


def test_the_lack_of_a_descriptor_is_said_and_is_no_end(kept, monkeypatch, caplog):
    with monkeypatch.context() as lacking:
        break_starting(lacking)
        lacking.setattr(keeping, "AGAIN_SECONDS", 0.01)
        os.kill(kept._pid, signal.SIGKILL)
        wait_for(lambda: "no keeper can be started: [Errno 24]" in caplog.text, "nothing is said")
        with pytest.raises(PostcopyError, match="kept by nobody: no keeper can be started"):
            kept.ensure()
        assert not Path(kept.address.path).exists()
    wait_for(lambda: "follows it" in caplog.text, "nobody tries again")
    kept.ensure()


def test_memory_whose_file_cannot_be_had_twice_is_not_kept(tmp_path, monkeypatch):
    def none_left(*_):
        raise OSError(24, "Too many open files")

    with memory_type("shmem").allocate(Region(0, "shmem", 4096, 8192), alias=False) as mapping:
        monkeypatch.setattr(keeping.os, "dup", none_left)
        with pytest.raises(HostError, match=r"no keeper can be started: .*Too many open files"):
            start_keeper(UnixAddress(f"{tmp_path}/kept.sock"), [mapping])
        monkeypatch.undo()


def test_a_keeper_of_an_agent_with_many_descriptors_stays(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limit[1]), limit[1]))
    many = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        with memory_type("shmem").allocate(Region(0, "shmem", 4096, 8192), alias=False) as mapping:
            kept = start_keeper(UnixAddress(f"{tmp_path}/kept.sock"), [mapping])
            kept.keep(RECORD.pack())
            leave(kept)
            again, record, mappings = take_place(kept.address)
            assert record == RECORD
            again.release()
            mappings[0].close()
            assert kept._process.wait(20) == 0
    finally:
        for one in many:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        end_keepers_of(tmp_path)


def test_keepers_that_end_at_once_do_not_follow_each_other_in_haste(kept, monkeypatch):
    waits = []

    def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(keeping, "time", SimpleNamespace(monotonic=lambda: 100.0, sleep=sleep))
    for _ in range(2):
        former = kept._pid
        os.kill(former, signal.SIGKILL)
        wait_for(lambda former=former: kept._pid != former, "nobody follows")
    wait_for(lambda: len(waits) >= 2, "nobody waits")
    assert waits == [0.0, keeping.AGAIN_SECONDS]


def test_what_is_written_late_is_not_kept_for_ever(kept, monkeypatch):
    """`set` while the last page arrives: the record is written again as the keeper is let go."""
    record, written = os.dup(kept._files[0]), os.pwrite
    letting_go = threading.Thread(target=kept.release)

    def pwrite(file, data, offset):
        if offset and not letting_go.ident:
            letting_go.start()
            letting_go.join(0.2)  # as far as it comes
        return written(file, data, offset)

    monkeypatch.setattr(keeping.os, "pwrite", pwrite)
    monkeypatch.setattr(keeping, "wake", lambda _: False)
    stop(kept._pid)  # so that letting go takes until this test says
    kept.keep(RECORD.pack())
    os.kill(kept._pid, signal.SIGCONT)
    letting_go.join()
    assert read_head(record) == (0, 0)
    os.close(record)
    kept.keep(RECORD.pack())  # and that is no harm
    kept.forget()


def test_a_keeper_that_ends_as_it_is_asked_had_nothing(tmp_path, monkeypatch):
    """It lost its agent, whose guest had not left, or the last page arrived."""
    address = UnixAddress(f"{tmp_path}/kept.sock")
    with socket.socket(socket.AF_UNIX) as ending:
        ending.bind(address.path)
        ending.listen(1)

        def end(_pid):
            Path(address.path).unlink()
            ending.close()

        monkeypatch.setattr(keeping, "wake", end)  # between the connection and the answer
        with pytest.raises(NothingKeptError, match="no keeper is there") as told:
            take_place(address)
    assert told.value.exit_status == 8
    with pytest.raises(NothingKeptError):  # and now it has
        take_place(address)
    late = keeping.refusal(ConnectionRefusedError(), address)  # the name was there and the keeper was not
    assert isinstance(late, NothingKeptError)


def test_a_keeper_that_was_killed_is_not_one_that_had_nothing(kept):
    kept.keep(RECORD.pack())
    kept._released = True  # or another keeper would be started
    os.kill(kept._pid, signal.SIGKILL)
    kept._process.wait()
    with pytest.raises(UsageError, match="its keeper was killed, and what it had went with it"):
        take_place(kept.address)
    Path(kept.address.path).unlink()


def test_a_keeper_that_does_not_answer_may_be_asked_again(tmp_path, monkeypatch):
    """All of it may be swapped out: not a mistake of the user's, after which nobody tries again."""
    monkeypatch.setattr(keeping, "KEEPER_ANSWER_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX) as deaf, contextlib.ExitStack() as waiting:
        deaf.bind(f"{tmp_path}/kept.sock")
        deaf.listen(1)
        for _ in range(4):  # the third finds no room to wait in
            with pytest.raises(PostcopyError, match="its keeper does not answer") as refused:
                take_place(UnixAddress(f"{tmp_path}/kept.sock"))
            assert refused.value.exit_status == 1
            one = waiting.enter_context(socket.socket(socket.AF_UNIX))
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(f"{tmp_path}/kept.sock")
