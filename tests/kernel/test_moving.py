"""MOVE: pages of the caller's own anonymous memory change their place; everything else is refused."""

import ctypes
import os
import socket
import struct
from errno import EINVAL

import pytest

from postcopy.errors import KernelError
from postcopy.kernel import Feature, Outcome, Placed, Userfaultfd, calls
from tests.child import run_in_child
from tests.kernel.bodies import PAGE, Touch, in_child, next_message
from tests.kernel.memory import registered
from tests.lacking import lacking

IO_URING_SETUP, IO_URING_REGISTER, REGISTER_BUFFERS = 425, 427, 0


@pytest.fixture(autouse=True)
def _kernel_has_move():
    with Userfaultfd.open(optional=Feature.MOVE) as uffd:
        if not uffd.features:
            lacking("this kernel has no UFFDIO_MOVE")


def filled(pages, fill=b"m"):
    """Return the address of private anonymous memory that holds one byte everywhere."""
    address = calls.map_anonymous(pages * PAGE)
    # The exclusive small pages that MOVE wants; it would split a huge one, which is no matter of these tests.
    calls.advise_huge_pages(address, pages * PAGE, allow=False)
    calls.write_memory(address, fill * pages * PAGE)
    return address


@in_child
def test_a_page_is_placed_and_gone_from_where_it_was():
    uffd, mapping = registered("anonymous", pages=4)
    source = filled(4)
    touch = Touch(mapping.address, 4 * PAGE)
    next_message(uffd)
    assert uffd.move(mapping.address, source, 4 * PAGE) == Placed(Outcome.PLACED, 4 * PAGE)
    assert touch.finish() == b"m" * 4 * PAGE
    assert calls.read_memory(source, 4 * PAGE) == bytes(4 * PAGE)


@in_child
def test_a_present_page_is_left_alone():
    uffd, mapping = registered("anonymous", pages=2)
    uffd.copy(mapping.address + PAGE, b"x" * PAGE)
    source = filled(2)
    assert uffd.move(mapping.address, source, 2 * PAGE) == Placed(Outcome.RETRY, PAGE)
    assert uffd.move(mapping.address + PAGE, source + PAGE, PAGE) == Placed(Outcome.PRESENT, 0)
    assert calls.read_memory(mapping.address, 2 * PAGE) == b"m" * PAGE + b"x" * PAGE


@in_child
def test_a_hole_at_the_source_is_gone_unless_holes_are_allowed():
    uffd, mapping = registered("anonymous")
    source = calls.map_anonymous(PAGE)
    assert uffd.move(mapping.address, source, PAGE) == Placed(Outcome.GONE, 0)
    assert uffd.move(mapping.address, source, PAGE, allow_holes=True) == Placed(Outcome.PLACED, PAGE)


@in_child
def test_shared_memory_is_refused_although_the_range_is_granted_move():
    uffd, mapping = registered("shmem")
    with pytest.raises(KernelError, match="UFFDIO_MOVE") as caught:
        uffd.move(mapping.address, filled(1), PAGE)
    assert caught.value.number == EINVAL


@in_child
def test_pages_that_a_fork_shares_are_busy_and_can_be_copied():
    uffd, mapping = registered("anonymous", pages=2)
    source = filled(2)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reader, 1)
        os._exit(0)
    try:
        assert uffd.move(mapping.address, source, PAGE) == Placed(Outcome.BUSY, 0)
        assert uffd.copy(mapping.address, source, PAGE) == Placed(Outcome.PLACED, PAGE)
        assert calls.read_memory(mapping.address, PAGE) == b"m" * PAGE
    finally:
        os.write(writer, b"!")
        os.waitpid(child, 0)


@in_child
def test_pages_that_are_pinned_are_busy_until_they_are_not():
    uffd, mapping = registered("anonymous", pages=3)
    source = filled(3)
    ring = pin(source + PAGE, PAGE)
    if ring is None:
        return "this kernel pins no buffers for io_uring"
    # The run ends before the pinned page, and says so by its bytes.
    assert uffd.move(mapping.address, source, 3 * PAGE) == Placed(Outcome.RETRY, PAGE)
    assert uffd.move(mapping.address + PAGE, source + PAGE, 2 * PAGE) == Placed(Outcome.BUSY, 0)
    assert uffd.copy(mapping.address + PAGE, source + PAGE, PAGE) == Placed(Outcome.PLACED, PAGE)
    assert uffd.move(mapping.address + 2 * PAGE, source + 2 * PAGE, PAGE) == Placed(Outcome.PLACED, PAGE)
    assert calls.read_memory(mapping.address, 3 * PAGE) == b"m" * 3 * PAGE
    os.close(ring)
    return None


def pin(address, length):
    """Register the memory as a fixed buffer of a new io_uring, which pins it for good; None where that is refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(120)
    ring = libc.syscall(IO_URING_SETUP, 1, parameters)
    if ring < 0:
        return None
    vector = ctypes.create_string_buffer(struct.pack("=QQ", address, length))
    assert libc.syscall(IO_URING_REGISTER, ring, REGISTER_BUFFERS, vector, 1) == 0, os.strerror(ctypes.get_errno())
    return ring


def test_pinning_was_really_tried():
    # The body above runs in a child, which cannot skip: it says here that it had nothing to pin with.
    libc = ctypes.CDLL(None, use_errno=True)
    ring = libc.syscall(IO_URING_SETUP, 1, ctypes.create_string_buffer(120))
    if ring < 0:
        lacking("this kernel has no io_uring to pin a page with")
    os.close(ring)


@in_child
def test_a_handler_in_another_process_cannot_move_but_can_copy_and_poison():
    uffd, mapping = registered("anonymous", pages=3)
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        uffd.send(here)
        assert run_in_child(handle_from_outside, there, mapping.address) == uffd.features
    assert calls.read_memory(mapping.address, PAGE) == b"o" * PAGE


def handle_from_outside(connection, address):
    with Userfaultfd.receive(connection) as uffd:
        with pytest.raises(KernelError, match="UFFDIO_MOVE") as caught:
            uffd.move(address, filled(1), PAGE)
        assert caught.value.number == EINVAL
        assert uffd.copy(address, b"o" * PAGE) == Placed(Outcome.PLACED, PAGE)
        assert uffd.poison(address + PAGE, PAGE) == Placed(Outcome.PLACED, PAGE)
        return uffd.features
