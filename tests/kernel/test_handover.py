"""Memory handed to another process as files: what is sent arrives, and what is no memory is refused and not kept."""

import fcntl
import os
import socket
import time

import pytest

from postcopy.errors import ProtocolError, UsageError
from postcopy.kernel import calls
from postcopy.kernel.handover import FIXED_SIZE, receive_files, seal_files, send_files
from postcopy.pages.regions import Region
from tests.child import run_in_child
from tests.kernel.bodies import PAGE, open_descriptors
from tests.kernel.memory import SHARED, allocate, page_size

WORD = b"F"
SIZE = 16 * PAGE
REGION = Region(0, "shmem", PAGE, SIZE)


@pytest.fixture
def pair():
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        yield here, there


def memfd(size=SIZE, flags=os.MFD_ALLOW_SEALING):
    fd = os.memfd_create("a test", flags)
    os.ftruncate(fd, size)
    return fd


@pytest.fixture
def files():
    """Keep files until the test's end."""
    kept = []
    yield lambda fd: kept.append(fd) or fd
    for fd in kept:
        os.close(fd)


def read_first_and_write_second_page(connection, kind, size):
    from postcopy.kernel import Mapping

    region = Region(0, kind, size, 2 * size)
    (file,) = receive_files(connection, WORD, 1)
    assert not os.get_inheritable(file)
    seal_files([region], [file])
    with Mapping(region, file, alias=False) as mapping:
        calls.write_memory(mapping.address + size, b"there")
        return calls.read_memory(mapping.address, 4)


@pytest.mark.parametrize("kind", SHARED)
def test_both_processes_have_the_same_memory(kind, pair, huge_pages):
    if kind != "shmem":
        huge_pages(kind, 2)
    here, there = pair
    with allocate(kind, 2) as mapping:
        calls.write_memory(mapping.address, b"here")
        send_files(here, WORD, [mapping.fd])
        assert run_in_child(read_first_and_write_second_page, there, kind, page_size(kind)) == b"here"
        assert calls.read_memory(mapping.address + page_size(kind), 5) == b"there"


@pytest.mark.parametrize(
    ("word", "count", "why"),
    [
        (WORD, 0, "0 files came for 2 regions"),
        (WORD, 1, "1 files came for 2 regions"),
        (WORD, 3, "more than 2 files came for 2 regions"),
        (WORD, 100, "more than 2 files came for 2 regions"),
        (b"x", 2, "carries the byte 78, not 46 and files"),
        (b"", 0, "ended before the files came"),
    ],
)
def test_what_is_no_hand_over_is_refused_and_nothing_is_kept(word, count, why, pair, files):
    here, there = pair
    file = files(memfd())
    before = open_descriptors()
    if word:
        send_files(here, word, [file] * count)
    here.close()
    with pytest.raises(ProtocolError, match=why):
        receive_files(there, WORD, 2)
    closed(before - 1)


def closed(count):
    """Wait until no more than `count` descriptors are open: what strangers sent is closed in a thread."""
    end = time.monotonic() + 10
    while open_descriptors() > count:
        assert time.monotonic() < end, open_descriptors()
        time.sleep(0.001)


def test_nothing_that_has_come_yet_is_no_error(pair):
    _, there = pair
    there.setblocking(False)
    with pytest.raises(BlockingIOError):
        receive_files(there, WORD, 1)


def test_a_file_is_sealed_before_its_size_is_believed(files):
    file = files(memfd())
    seal_files([REGION], [file])
    assert fcntl.fcntl(file, fcntl.F_GET_SEALS) & FIXED_SIZE == FIXED_SIZE
    with pytest.raises(PermissionError):
        os.ftruncate(file, 0)
    seal_files([REGION], [file])  # once more is no harm


def sealed(seals, size=SIZE):
    fd = memfd(size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def reopened(flags):
    fd = memfd()
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: memfd(SIZE - PAGE), f"its file has {SIZE - PAGE} bytes, not {SIZE}"),
        (lambda: memfd(SIZE + PAGE), f"its file has {SIZE + PAGE} bytes, not {SIZE}"),
        (lambda: memfd(0), "its file has 0 bytes"),
        (lambda: memfd(flags=0), "does not let itself be sealed"),
        (lambda: sealed(fcntl.F_SEAL_SEAL), "does not let itself be sealed"),
        (lambda: sealed(FIXED_SIZE | fcntl.F_SEAL_WRITE), "is sealed against writing"),
        (lambda: sealed(FIXED_SIZE | 0x10), "is sealed against writing"),
        (lambda: reopened(os.O_RDONLY), "is not open for reading and writing"),
        (lambda: reopened(os.O_WRONLY), "is not open for reading and writing"),
        (lambda: reopened(os.O_PATH), "is not open for reading and writing"),
        (lambda: os.open("/dev/null", os.O_RDWR), "is none of shmem or hugetlbfs"),
        (lambda: os.open("/dev/zero", os.O_RDWR), "is none of shmem or hugetlbfs"),
        (lambda: socket.socket().detach(), "is none of shmem or hugetlbfs"),
        (lambda: os.eventfd(0), "is none of shmem or hugetlbfs"),
        (lambda: os.open("/tmp", os.O_TMPFILE | os.O_RDWR), "is none of shmem|does not let itself be sealed"),
        (lambda: os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR), "does not let itself be sealed"),
    ],
)
def test_what_is_not_the_regions_memory_is_refused(make, why, files):
    with pytest.raises(UsageError, match=rf"region 0 \(shmem\) cannot be handed over: .*({why})"):
        seal_files([REGION], [files(make())])


def test_pages_of_another_size(files):
    huge = files(memfd(1 << 21, os.MFD_ALLOW_SEALING | os.MFD_HUGETLB))
    with pytest.raises(UsageError, match=r"its file has pages of 2 MiB, not 4 KiB"):
        seal_files([Region(0, "shmem", PAGE, 1 << 21)], [huge])
    small = files(memfd(1 << 21))
    with pytest.raises(UsageError, match=r"its file has pages of 4 KiB, not 2 MiB"):
        seal_files([Region(0, "hugetlb-2M", 1 << 21, 1 << 21)], [small])


def test_one_file_for_two_regions(files):
    file = files(memfd())
    again = files(os.dup(file))
    reopened_again = files(os.open(f"/proc/self/fd/{file}", os.O_RDWR))
    for other in (again, reopened_again):
        with pytest.raises(UsageError, match=r"region 1 \(shmem\) is the same file as region 0"):
            seal_files([REGION, Region(1, "shmem", PAGE, SIZE)], [file, other])


def test_private_memory_has_nothing_to_hand_over():
    with allocate("anonymous", alias=False) as mapping, pytest.raises(UsageError, match="no other process can map"):
        seal_files([mapping.region], [mapping.fd])
