"""Write protection: told and taken away by hand, or asynchronous and read back with PAGEMAP_SCAN."""

from errno import EINVAL, EPERM

import pytest

from postcopy.errors import KernelError
from postcopy.kernel import Feature, Mode, Outcome, Placed, Userfaultfd, calls
from postcopy.kernel.abi import Category, FaultFlag
from postcopy.kernel.pagemap import Filter, Pagemap, PageRange
from tests.kernel.bodies import PAGE, Touch, in_child, next_message
from tests.kernel.memory import KINDS, allocate, fill, page_size, registered
from tests.lacking import lacking

WP = Feature.WP | Feature.WP_HUGETLB_SHMEM


@pytest.fixture
def kind(request, huge_pages):
    if request.param.startswith("hugetlb"):
        huge_pages(request.param, 4)
    return request.param


@pytest.fixture(autouse=True)
def _kernel_has_it_all():
    wanted = WP | Feature.WP_ASYNC | Feature.WP_UNPOPULATED
    with Userfaultfd.open(optional=wanted) as uffd:
        if uffd.features != wanted:
            lacking(f"this kernel only has {uffd.features!r}")


kinds = pytest.mark.parametrize("kind", KINDS, indirect=True)


@kinds
@in_child
def test_a_write_to_a_protected_page_waits_until_that_is_taken_away(kind):
    uffd, mapping = registered(kind, Mode.WP, features=WP)
    size = page_size(kind)
    calls.write_memory(mapping.address, b"old")
    assert uffd.writeprotect(mapping.address, size, protect=True) == Placed(Outcome.PLACED, size)
    assert Touch(mapping.address, 3).finish() == b"old"
    touch = Touch(mapping.address, content=b"new")
    fault = next_message(uffd)
    assert fault.flags == FaultFlag.WP | FaultFlag.WRITE
    assert not fault.missing
    assert calls.read_memory(mapping.address, 3) == b"old"
    uffd.writeprotect(mapping.address, size, protect=False)
    touch.finish()
    assert calls.read_memory(mapping.address, 3) == b"new"


@kinds
@in_child
def test_a_page_can_be_placed_protected(kind):
    uffd, mapping = registered(kind, Mode.MISSING | Mode.WP, features=WP)
    size = page_size(kind)
    uffd.copy(mapping.address, b"x" * size, protect=True)
    touch = Touch(mapping.address, content=b"new")
    assert next_message(uffd).flags & FaultFlag.WP
    uffd.writeprotect(mapping.address, size, protect=False)
    touch.finish()


@pytest.mark.parametrize("kind", ["shmem", "hugetlb-2M"], indirect=True)
@in_child
def test_a_page_can_be_continued_protected(kind):
    uffd, mapping = registered(kind, Mode.MISSING | Mode.MINOR | Mode.WP, features=WP | Feature.MINOR_SHMEM)
    size = page_size(kind)
    fill(mapping, 0, b"a")
    uffd.continue_(mapping.address, size, protect=True)
    touch = Touch(mapping.address, content=b"new")
    assert next_message(uffd).flags & FaultFlag.WP
    uffd.writeprotect(mapping.address, size, protect=False)
    touch.finish()
    assert calls.read_memory(mapping.address, 4) == b"newa"


@pytest.mark.parametrize("unpopulated", [True, False])
@in_child
def test_anonymous_pages_that_are_not_there_are_protected_only_on_request(unpopulated):
    features = WP | (Feature.WP_UNPOPULATED if unpopulated else Feature(0))
    uffd, mapping = registered("anonymous", Mode.WP, features=features)
    uffd.writeprotect(mapping.address, PAGE, protect=True)
    touch = Touch(mapping.address, content=b"w")
    if unpopulated:
        assert next_message(uffd).flags & FaultFlag.WP
        uffd.writeprotect(mapping.address, PAGE, protect=False)
    touch.finish()
    assert uffd.read() == []


@pytest.mark.parametrize("kind", ["shmem", "hugetlb-2M"], indirect=True)
@in_child
def test_shared_pages_that_are_not_there_are_always_protected(kind):
    uffd, mapping = registered(kind, Mode.WP, features=WP)
    uffd.writeprotect(mapping.address, page_size(kind), protect=True)
    touch = Touch(mapping.address, content=b"w")
    assert next_message(uffd).flags & FaultFlag.WP
    uffd.writeprotect(mapping.address, page_size(kind), protect=False)
    touch.finish()


def test_what_cannot_be_protected_is_an_outcome_or_an_error():
    uffd, mapping = registered("shmem", Mode.WP, features=WP)
    with mapping, uffd:
        with pytest.raises(KernelError, match="UFFDIO_WRITEPROTECT") as caught:
            uffd.writeprotect(mapping.address + 1, PAGE, protect=True)
        assert caught.value.number == EINVAL
        with pytest.raises(KernelError) as caught:
            uffd.writeprotect(mapping.address, PAGE, protect=True, wake=False)
        assert caught.value.number == EINVAL
        uffd.unregister(mapping.address, PAGE)
        assert uffd.writeprotect(mapping.address, PAGE, protect=True) == Placed(Outcome.GONE, 0)


@kinds
@in_child
def test_asynchronous_protection_logs_each_written_page_once(kind):
    uffd, mapping = registered(kind, Mode.WP, pages=4, features=WP | Feature.WP_ASYNC)
    size = page_size(kind)
    start, stop = mapping.address, mapping.address + 4 * size
    calls.write_memory(start, b"a")
    with Pagemap() as pagemap:
        uffd.writeprotect(start, 4 * size, protect=True)
        assert pagemap.written(start, stop) == []
        calls.write_memory(start, b"b")
        calls.write_memory(start + 2 * size, b"c")
        expected = [
            PageRange(start, start + size, Category.WRITTEN),
            PageRange(start + 2 * size, start + 3 * size, Category.WRITTEN),
        ]
        assert pagemap.written(start, stop) == expected
        assert pagemap.written_and_protect(start, stop) == expected
        assert pagemap.written_and_protect(start, stop) == []
        calls.write_memory(start + 2 * size, b"d")
        assert pagemap.written_and_protect(start, stop) == expected[1:]
    assert uffd.read() == []


@in_child
def test_no_write_is_lost_between_scans():
    pages, writes = 64, 4000
    uffd, mapping = registered("shmem", Mode.WP, pages=pages, features=WP | Feature.WP_ASYNC)
    start, stop = mapping.address, mapping.address + pages * PAGE
    uffd.writeprotect(start, pages * PAGE, protect=True)

    def write():
        for number in range(writes):
            calls.write_memory(start + number * 7 % pages * PAGE, number.to_bytes(4, "little"))

    # What a follower copies by the log alone is in the end what was written.
    copy = bytearray(pages * PAGE)

    def follow():
        for first, end, _ in pagemap.written_and_protect(start, stop):
            copy[first - start : end - start] = calls.read_memory(first, end - first)

    with Pagemap() as pagemap:
        touch = Touch(action=write)
        while touch.is_alive():
            follow()
        touch.finish()
        follow()
        assert copy == calls.read_memory(start, pages * PAGE)


@in_child
def test_a_scan_of_more_runs_than_one_answer_holds_is_whole():
    pages = 3000
    uffd, mapping = registered("shmem", Mode.WP, pages=pages, features=WP | Feature.WP_ASYNC)
    start = mapping.address
    uffd.writeprotect(start, pages * PAGE, protect=True)
    for page in range(0, pages, 2):
        calls.write_memory(start + page * PAGE, b"w")
    with Pagemap() as pagemap:
        expected = [PageRange(at, at + PAGE, Category.WRITTEN) for at in range(start, start + pages * PAGE, 2 * PAGE)]
        assert pagemap.written_and_protect(start, start + pages * PAGE) == expected
        assert pagemap.written(start, start + pages * PAGE) == []


def test_protecting_what_is_not_asynchronous_is_refused():
    with allocate("shmem") as mapping, Pagemap() as pagemap:
        with pytest.raises(KernelError, match="PAGEMAP_SCAN") as caught:
            pagemap.written_and_protect(mapping.address, mapping.address + PAGE)
        assert caught.value.number == EPERM


def test_a_filter_takes_every_some_and_inverted():
    with allocate("anonymous", 3) as mapping, Pagemap() as pagemap:
        calls.write_memory(mapping.address, b"w")
        calls.read_memory(mapping.address + PAGE, 1)
        stop = mapping.address + 3 * PAGE
        shown = Category.PRESENT | Category.PFNZERO

        def found(**conditions):
            ranges = pagemap.scan(mapping.address, stop, Filter(report=shown, **conditions))
            return [((at - mapping.address) // PAGE, (end - at) // PAGE, kinds) for at, end, kinds in ranges]

        written, zero = (0, 1, Category.PRESENT), (1, 1, shown)
        assert found(every=Category.PRESENT) == [written, zero]
        assert found(every=Category.PFNZERO) == [zero]
        assert found(some=Category.PFNZERO | Category.SWAPPED) == [zero]
        assert found(every=Category.PRESENT | Category.PFNZERO, inverted=Category.PFNZERO) == [written]
        assert found(every=Category.PRESENT, inverted=Category.PRESENT) == [(2, 1, Category(0))]


def test_a_process_that_is_not_there_has_no_pagemap():
    with pytest.raises(KernelError, match="/proc/999999999/pagemap"):
        Pagemap(999999999)
