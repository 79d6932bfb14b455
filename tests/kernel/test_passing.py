"""Handing a userfaultfd over: another process serves the faults of this one."""

import array
import os
import socket

import pytest

from postcopy.errors import KernelError
from postcopy.kernel import Mode, Outcome, Placed, Userfaultfd
from postcopy.kernel.opening import OpenedBy
from tests.child import run_in_child
from tests.kernel.bodies import PAGE, Touch, in_child, next_message, open_descriptors
from tests.kernel.memory import registered


@pytest.fixture
def pair():
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        yield here, there


@in_child
def test_another_process_serves_the_fault():
    here, there = socket.socketpair(socket.AF_UNIX)
    uffd, mapping = registered("shmem")
    uffd.send(here)
    touch = Touch(mapping.address, PAGE)
    assert run_in_child(serve_one, there) == mapping.address
    assert touch.finish() == b"o" * PAGE


def serve_one(connection):
    with Userfaultfd.receive(connection) as uffd:
        fault = next_message(uffd)
        assert uffd.copy(fault.address, b"o" * PAGE) == Placed(Outcome.PLACED, PAGE)
        return fault.address


@in_child
def test_an_address_space_that_has_ended_is_gone():
    here, there = socket.socketpair(socket.AF_UNIX)
    address = run_in_child(send_and_end, there)
    with Userfaultfd.receive(here) as uffd:
        for place in (
            lambda: uffd.copy(address, bytes(PAGE)),
            lambda: uffd.continue_(address, PAGE),
            lambda: uffd.zeropage(address, PAGE),
            lambda: uffd.poison(address, PAGE),
            lambda: uffd.writeprotect(address, PAGE, protect=True),
        ):
            assert place() == Placed(Outcome.GONE, 0)
        uffd.wake(address, PAGE)


def send_and_end(connection):
    uffd, mapping = registered("shmem", Mode.MISSING | Mode.MINOR | Mode.WP)
    uffd.send(connection)
    return mapping.address


def test_the_features_come_along_and_the_descriptor_is_closed_on_exec(pair):
    here, there = pair
    uffd, mapping = registered("shmem")
    with mapping, uffd:
        uffd.send(here)
        with Userfaultfd.receive(there) as received:
            assert received.features == uffd.features
            assert received.opened_by is OpenedBy.HANDED_OVER
            assert received.fd != uffd.fd
            assert not os.get_inheritable(received.fd)


def test_what_is_no_hand_over_is_refused_and_nothing_is_kept(pair):
    here, there = pair
    before = open_descriptors()
    here.send(b"12345678")
    with pytest.raises(KernelError, match="8 bytes, 0 descriptors"):
        Userfaultfd.receive(there)
    here.sendmsg([b"short"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
    with pytest.raises(KernelError, match="5 bytes, 1 descriptors"):
        Userfaultfd.receive(there)
    here.close()
    with pytest.raises(KernelError, match="0 bytes, 0 descriptors"):
        Userfaultfd.receive(there)
    assert open_descriptors() == before - 1
