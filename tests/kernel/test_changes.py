"""Events: the watched process forks, moves, gives back and unmaps, and placing waits until that has been read."""

import multiprocessing
import os
import socket

import pytest

from postcopy.kernel import Feature, Outcome, Placed, Userfaultfd, calls
from postcopy.kernel.events import Fork, PageFault, Remap, Remove, Unmap
from tests.kernel.bodies import PAGE, WAIT, Touch, in_child, next_message
from tests.kernel.memory import registered


@in_child
def test_a_fork_gives_the_childs_own_userfaultfd():
    # os.fork() keeps the GIL while it waits for its event to be read, so the reader must be another process.
    here, there = socket.socketpair(socket.AF_UNIX)
    process = multiprocessing.get_context("spawn").Process(target=fork_and_touch, args=(there,))
    process.start()
    there.close()
    uffd = Userfaultfd.receive(here)
    address = int.from_bytes(here.recv(8, socket.MSG_WAITALL), "little")
    event = next_message(uffd)
    assert isinstance(event, Fork)
    with Userfaultfd.from_fd(event.descriptor, uffd.features) as childs:
        fault = next_message(childs)
        assert isinstance(fault, PageFault)
        assert fault.address == address
        assert not uffd.poll(0)
        assert childs.copy(address, b"c" * PAGE) == Placed(Outcome.PLACED, PAGE)
        assert here.recv(5, socket.MSG_WAITALL) == b"cccc!"
        # The child has ended, and its address space with it; its parent has not.
        assert childs.copy(address + PAGE, b"c" * PAGE) == Placed(Outcome.GONE, 0)
    assert uffd.copy(address + PAGE, b"p" * PAGE) == Placed(Outcome.PLACED, PAGE)
    here.close()
    process.join(WAIT)
    assert process.exitcode == 0
    assert uffd.copy(address, b"p" * PAGE) == Placed(Outcome.GONE, 0)


def fork_and_touch(connection):
    uffd, mapping = registered("shmem", pages=2, features=Feature.EVENT_FORK)
    uffd.send(connection)
    connection.send(mapping.address.to_bytes(8, "little"))
    child = os.fork()
    if child == 0:
        connection.send(calls.read_memory(mapping.address, 4))
        os._exit(0)
    os.waitpid(child, 0)
    connection.send(b"!")
    connection.recv(1)


@in_child
def test_a_move_of_the_mapping_is_told_and_faults_follow_it():
    uffd, mapping = registered("anonymous", pages=2, features=Feature.EVENT_REMAP)
    place = calls.map_anonymous(2 * PAGE)
    moving = Touch(action=lambda: calls.remap(mapping.address, 2 * PAGE, to=place))
    assert next_message(uffd) == Remap(mapping.address, place, 2 * PAGE)
    moving.finish()
    touch = Touch(place + PAGE)
    assert next_message(uffd).address == place + PAGE
    uffd.zeropage(place + PAGE, PAGE)
    assert touch.finish() == b"\0"


@pytest.mark.parametrize("kind", ["anonymous", "shmem"])
@in_child
def test_pages_given_back_are_told(kind):
    uffd, mapping = registered(kind, pages=4, features=Feature.EVENT_REMOVE)
    uffd.copy(mapping.address, b"x" * 4 * PAGE)
    advice = calls.MADV_REMOVE if kind == "shmem" else calls.MADV_DONTNEED
    removing = Touch(action=lambda: calls.advise(mapping.address + PAGE, 2 * PAGE, advice))
    assert next_message(uffd) == Remove(mapping.address + PAGE, mapping.address + 3 * PAGE)
    removing.finish()
    touch = Touch(mapping.address + PAGE)
    assert next_message(uffd).missing
    uffd.zeropage(mapping.address + PAGE, PAGE)
    assert touch.finish() == b"\0"


@in_child
def test_nothing_is_placed_while_a_remove_is_unread():
    uffd, mapping = registered("shmem", pages=2, features=Feature.EVENT_REMOVE)
    uffd.copy(mapping.address, b"x" * PAGE)
    removing = Touch(action=lambda: calls.advise(mapping.address, PAGE, calls.MADV_REMOVE))
    assert uffd.poll(10)
    for place in (
        lambda: uffd.copy(mapping.address + PAGE, b"y" * PAGE),
        lambda: uffd.zeropage(mapping.address + PAGE, PAGE),
        lambda: uffd.continue_(mapping.address + PAGE, PAGE),
        lambda: uffd.poison(mapping.address + PAGE, PAGE),
    ):
        assert place() == Placed(Outcome.RETRY, 0)
    assert uffd.read() == [Remove(mapping.address, mapping.address + PAGE)]
    removing.finish()
    assert uffd.copy(mapping.address + PAGE, b"y" * PAGE) == Placed(Outcome.PLACED, PAGE)


@in_child
def test_a_hole_punched_through_the_file_is_not_told():
    uffd, mapping = registered("shmem", features=Feature.EVENT_REMOVE)
    uffd.copy(mapping.address, b"x" * PAGE)
    mapping.punch_hole(0, PAGE)
    assert not uffd.poll(0)
    touch = Touch(mapping.address)
    assert next_message(uffd).missing
    uffd.zeropage(mapping.address, PAGE)
    assert touch.finish() == b"\0"


@in_child
def test_an_unmapped_range_is_told():
    uffd, mapping = registered("anonymous", pages=3, features=Feature.EVENT_UNMAP)
    unmapping = Touch(action=lambda: calls.unmap(mapping.address + PAGE, PAGE))
    assert next_message(uffd) == Unmap(mapping.address + PAGE, mapping.address + 2 * PAGE)
    unmapping.finish()
    assert uffd.copy(mapping.address + PAGE, b"x" * PAGE) == Placed(Outcome.GONE, 0)
    assert uffd.copy(mapping.address, b"x" * PAGE) == Placed(Outcome.PLACED, PAGE)
