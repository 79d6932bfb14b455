"""Failures of an agent's own in the middle of taking a process: it is poisoned or kept, never left to zeros."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
from types import SimpleNamespace

import pytest

from postcopy.errors import HostError, KernelError
from postcopy.guest.outside import handing
from postcopy.guest.outside.handing import HandedOver, take
from postcopy.guest.outside.keeping import Migration
from postcopy.guest.outside.message import USERFAULTFD, Given, Message
from postcopy.guest.outside.serving import OutsideDestination
from postcopy.guest.outside.session import OutsideInterpreter
from postcopy.kernel import Outcome, Placed
from postcopy.link.address import UnixAddress
from postcopy.session.states import State
from tests.outside.vmm import PAGE

MESSAGE = Message((Given(0, PAGE, 0, PAGE), Given(2 * PAGE, PAGE, PAGE, PAGE)), (USERFAULTFD,))


class Done(list):
    """What was done, by name."""

    def __getattr__(self, name):
        return lambda *_: self.append(name)


@pytest.fixture
def agent(tmp_path):
    return OutsideDestination(UnixAddress(f"{tmp_path}/uffd.sock"))


def failing(error):
    def fail(*_arguments):
        raise error

    return fail


@pytest.mark.parametrize("poisons", [True, False])
def test_a_kept_process_that_cannot_be_watched_is_poisoned_before_it_is_let_go(agent, monkeypatch, caplog, poisons):
    monkeypatch.setattr(HandedOver, "take_up", failing(HostError("process 7 cannot be watched: Too many open files")))
    done = Done()
    kept = SimpleNamespace(poison=done.poison if poisons else failing(HostError("before 6.6")), forget=done.forget)
    asyncio.run(agent._go_on(kept))
    assert done == (["poison", "forget"] if poisons else [])
    assert "cannot be watched: Too many open files" in caplog.text
    assert ("waits for its pages for ever: before 6.6" in caplog.text) is not poisons


def test_a_take_up_that_fails_is_known_as_lost_to_the_source_that_comes_back(agent, monkeypatch):
    monkeypatch.setattr(OutsideInterpreter, "take_up", failing(OSError("no memory")))
    done = Done()
    handed = SimpleNamespace(
        process="process 7", memory_fd=-1, message=MESSAGE, lives=True, kept=None,
        states=list, poison=lambda _maps: done.append("poison") or 1, close=done.close,
    )  # fmt: skip
    asyncio.run(agent._take_up(handed, Migration(3, b"i" * 16, b"t" * 32, ("shmem", "shmem"))))
    assert done == ["poison", "close"]
    assert agent.current == []
    (known,) = agent._known._interpreters.values()
    assert known.machine.refusal_of_return().code == "lost"
    assert known.finish.state is State.LOST  # and so it gives its place to others


def test_a_process_that_is_looked_at_as_the_agent_ends_is_poisoned(monkeypatch, caplog):
    looks, goes_on, done = threading.Event(), threading.Event(), Done()

    def look(process, _message, _descriptors, **_options):
        looks.set()
        assert goes_on.wait(10)
        handed = HandedOver(process, MESSAGE, SimpleNamespace(close=done.close), -1)
        handed.poison = lambda maps: done.append(("poison", len(maps))) or 2
        return handed

    async def scene():
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        with ours, theirs:
            theirs.send(b'[{"base_host_virt_addr": 4096, "size": 4096, "offset": 0}]')
            taking = asyncio.create_task(take(ours))
            await asyncio.to_thread(looks.wait, 10)
            taking.cancel()
            await asyncio.sleep(0)
            assert not taking.done()  # a thread has the descriptors in its hands
            goes_on.set()
            with pytest.raises(asyncio.CancelledError):
                await taking

    monkeypatch.setattr(handing, "_open", look)
    asyncio.run(asyncio.wait_for(scene(), 20))
    assert done == [("poison", 2), "close"]
    assert "loses 2 pages: it came as this agent ended" in caplog.text


class Old:
    """A userfaultfd of a kernel before 6.6, with all of its memory trapped."""

    def poison(self, _address, _length):
        raise KernelError("UFFDIO_POISON", errno.EINVAL, "no such call")

    def copy(self, _address, _source, _length):
        raise KernelError("UFFDIO_COPY", errno.EFAULT, "unreadable")

    def wake(self, _address, _length):
        return Placed(Outcome.PLACED, 0)


def test_what_a_refused_process_will_see_of_an_old_kernel_is_said_once(caplog):
    with caplog.at_level(logging.ERROR):
        handing._poison("process 7", Old(), MESSAGE)
    (line,) = caplog.messages
    assert "is refused, and its pages cannot be poisoned (Linux 6.6 can): it reads zeros" in line


def test_where_nothing_is_trapped_nothing_is_said(caplog):
    old = Old()
    old.copy = lambda *_: Placed(Outcome.GONE, 0)
    handing._poison("process 7", old, MESSAGE)
    assert not caplog.messages
