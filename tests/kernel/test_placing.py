"""Placing pages: what a fault waits for, and what each ioctl answers in each state of a page."""

import threading
from errno import EFAULT, EINVAL

import pytest

from postcopy.errors import KernelError
from postcopy.kernel import Feature, Mode, Outcome, Placed, Userfaultfd, calls
from postcopy.kernel.abi import FaultFlag
from postcopy.kernel.events import PageFault
from tests.kernel.bodies import PAGE, Touch, in_child, next_message
from tests.kernel.memory import KINDS, SHARED, allocate, fill, page_size, registered

BOTH = Mode.MISSING | Mode.MINOR


@pytest.fixture
def kind(request, huge_pages):
    """Give the kind's name, once the pool has pages for it."""
    if request.param.startswith("hugetlb"):
        huge_pages(request.param, 4)
    return request.param


kinds = pytest.mark.parametrize("kind", KINDS, indirect=True)
shared = pytest.mark.parametrize("kind", SHARED, indirect=True)


@kinds
@in_child
def test_a_missing_page_is_told_and_copied(kind):
    uffd, mapping = registered(kind, pages=2)
    size = page_size(kind)
    touch = Touch(mapping.address + size, size)
    fault = next_message(uffd)
    assert fault == PageFault(mapping.address + size, FaultFlag(0), touch.native_id)
    assert fault.missing
    assert uffd.copy(mapping.address + size, b"x" * size) == Placed(Outcome.PLACED, size)
    assert touch.finish() == b"x" * size


@kinds
@in_child
def test_a_write_is_told_as_one(kind):
    uffd, mapping = registered(kind)
    touch = Touch(mapping.address + 1, content=b"!")
    assert next_message(uffd).flags == FaultFlag.WRITE
    uffd.copy(mapping.address, b"x" * page_size(kind))
    touch.finish()
    assert calls.read_memory(mapping.address, 3) == b"x!x"


@kinds
@in_child
def test_a_second_copy_changes_nothing(kind):
    uffd, mapping = registered(kind)
    size = page_size(kind)
    uffd.copy(mapping.address, b"x" * size)
    assert uffd.copy(mapping.address, b"y" * size) == Placed(Outcome.PRESENT, 0)
    assert calls.read_memory(mapping.address, size) == b"x" * size


@shared
@in_child
def test_a_page_in_the_file_is_a_minor_fault_and_continues(kind):
    uffd, mapping = registered(kind, BOTH)
    size = page_size(kind)
    fill(mapping, 0, b"a")
    touch = Touch(mapping.address, size)
    fault = next_message(uffd)
    assert fault.flags == FaultFlag.MINOR
    assert not fault.missing
    assert uffd.continue_(mapping.address, size) == Placed(Outcome.PLACED, size)
    assert touch.finish() == b"a" * size
    assert uffd.continue_(mapping.address, size) == Placed(Outcome.PRESENT, 0)


@shared
@in_child
def test_both_modes_tell_a_hole_as_missing_which_then_continues(kind):
    uffd, mapping = registered(kind, BOTH)
    touch = Touch(mapping.address)
    assert next_message(uffd).missing
    fill(mapping, 0, b"a")
    assert uffd.continue_(mapping.address, page_size(kind)).outcome is Outcome.PLACED
    assert touch.finish() == b"a"


@in_child
def test_minor_alone_lets_holes_of_shmem_read_as_zeros_untold():
    uffd, mapping = registered("shmem", Mode.MINOR)
    assert Touch(mapping.address).finish() == b"\0"
    assert uffd.read() == []


@shared
@in_child
def test_nothing_continues_where_the_file_has_a_hole(kind):
    uffd, mapping = registered(kind, BOTH)
    with pytest.raises(KernelError, match="UFFDIO_CONTINUE") as caught:
        uffd.continue_(mapping.address, page_size(kind))
    assert caught.value.number == EFAULT


@shared
@in_child
def test_a_page_that_is_only_in_the_file_refuses_a_copy(kind):
    uffd, mapping = registered(kind, BOTH)
    size = page_size(kind)
    fill(mapping, 0, b"a")
    assert uffd.copy(mapping.address, b"x" * size) == Placed(Outcome.PRESENT, 0)
    uffd.continue_(mapping.address, size)
    assert calls.read_memory(mapping.address, size) == b"a" * size


@shared
@in_child
def test_a_run_stops_before_a_present_page_and_says_how_far_it_came(kind):
    uffd, mapping = registered(kind, BOTH, pages=4)
    size = page_size(kind)
    for page in range(4):
        fill(mapping, page, b"abcd"[page : page + 1])
    assert uffd.continue_(mapping.address + 2 * size, size).outcome is Outcome.PLACED
    assert uffd.continue_(mapping.address, 4 * size) == Placed(Outcome.RETRY, 2 * size)
    assert uffd.continue_(mapping.address + 2 * size, 2 * size) == Placed(Outcome.PRESENT, 0)
    assert uffd.continue_(mapping.address + 3 * size, size) == Placed(Outcome.PLACED, size)


@kinds
@in_child
def test_a_copy_stops_before_a_present_page_and_says_how_far_it_came(kind):
    uffd, mapping = registered(kind, pages=3)
    size = page_size(kind)
    source = bytearray(3 * size)
    uffd.copy(mapping.address + 2 * size, source, size)
    assert uffd.copy(mapping.address, memoryview(source)) == Placed(Outcome.RETRY, 2 * size)


@pytest.mark.parametrize("kind", ["anonymous", "shmem"])
@in_child
def test_a_page_of_zeros(kind):
    uffd, mapping = registered(kind, pages=2)
    touch = Touch(mapping.address, PAGE)
    next_message(uffd)
    assert uffd.zeropage(mapping.address, PAGE) == Placed(Outcome.PLACED, PAGE)
    assert touch.finish() == bytes(PAGE)
    assert uffd.zeropage(mapping.address, PAGE) == Placed(Outcome.PRESENT, 0)
    uffd.zeropage(mapping.address + PAGE, PAGE)
    calls.write_memory(mapping.address + PAGE, b"w")
    assert uffd.zeropage(mapping.address + PAGE, PAGE).outcome is Outcome.PRESENT
    assert calls.read_memory(mapping.address + PAGE, 1) == b"w"


@pytest.mark.parametrize("kind", ["hugetlb-2M"], indirect=True)
@in_child
def test_hugetlb_has_no_page_of_zeros(kind):
    uffd, mapping = registered(kind)
    with pytest.raises(KernelError, match="UFFDIO_ZEROPAGE") as caught:
        uffd.zeropage(mapping.address, page_size(kind))
    assert caught.value.number == EINVAL


@shared
@in_child
def test_a_fresh_page_of_the_file_continues_as_zeros(kind):
    uffd, mapping = registered(kind, BOTH, pages=2)
    size = page_size(kind)
    fill(mapping, 1, b"k")
    mapping.fill_holes(0, 2 * size)
    touch = Touch(mapping.address, size)
    next_message(uffd)
    assert uffd.continue_(mapping.address, 2 * size).outcome is Outcome.PLACED
    assert touch.finish() == bytes(size)
    assert calls.read_memory(mapping.address + size, size) == b"k" * size


@in_child
def test_who_was_not_woken_waits_until_he_is():
    uffd, mapping = registered("shmem")
    touch = Touch(mapping.address)
    next_message(uffd)
    assert uffd.copy(mapping.address, b"x" * PAGE, wake=False).outcome is Outcome.PLACED
    # Placed without waking: a second message does not come, and the thread is where it was.
    assert not uffd.poll(0)
    assert touch.is_alive()
    uffd.wake(mapping.address, PAGE)
    assert touch.finish() == b"x"


def copy_over_poison(uffd, mapping):
    placed = uffd.poison(mapping.address, PAGE, wake=False)
    # Who was woken before the mark is taken away gets a SIGBUS.
    assert uffd.copy(mapping.address, b"p" * PAGE, wake=False).outcome is Outcome.PLACED
    return placed


def move_without_waking(uffd, mapping):
    source = calls.map_anonymous(PAGE)
    calls.advise_huge_pages(source, PAGE, allow=False)
    calls.write_memory(source, b"m" * PAGE)
    return uffd.move(mapping.address, source, PAGE, wake=False)


def continue_without_waking(uffd, mapping):
    fill(mapping, 0, b"c")
    return uffd.continue_(mapping.address, PAGE, wake=False)


def zeropage_without_waking(uffd, mapping):
    return uffd.zeropage(mapping.address, PAGE, wake=False)


@pytest.mark.parametrize(
    ("kind", "modes", "place", "content"),
    [
        ("shmem", BOTH, continue_without_waking, b"c"),
        ("shmem", BOTH, zeropage_without_waking, b"\0"),
        ("anonymous", Mode.MISSING, zeropage_without_waking, b"\0"),
        ("anonymous", Mode.MISSING, move_without_waking, b"m"),
        ("anonymous", Mode.MISSING, copy_over_poison, b"p"),
    ],
)
@in_child
def test_no_way_of_placing_wakes_unless_it_is_to(kind, modes, place, content):
    uffd, mapping = registered(kind, modes)
    touch = Touch(mapping.address)
    next_message(uffd)
    assert place(uffd, mapping) == Placed(Outcome.PLACED, PAGE)
    # A thread that was woken ends soon, for the page is there; a deadline is all that can tell of one that was not.
    touch.join(0.2)
    assert touch.is_alive()
    assert not uffd.poll(0)
    uffd.wake(mapping.address, PAGE)
    assert touch.finish() == content


@pytest.mark.parametrize("number", [-1, 1 << 64])
def test_numbers_that_the_kernel_cannot_be_told_are_named(number):
    with Userfaultfd.open() as uffd:
        for call, name in (
            (lambda: uffd.register(number, PAGE, Mode.MISSING), "address"),
            (lambda: uffd.unregister(0, number), "length"),
            (lambda: uffd.wake(number, PAGE), "address"),
            (lambda: uffd.copy(0, number, PAGE), "source"),
            (lambda: uffd.move(0, 0, number), "length"),
            (lambda: uffd.zeropage(number, PAGE), "address"),
            (lambda: uffd.writeprotect(0, number, protect=True), "length"),
        ):
            with pytest.raises(ValueError, match=f"{name} {number:#x} is no number of 64 bits"):
                call()


@in_child
def test_who_is_woken_without_a_page_faults_again():
    uffd, mapping = registered("shmem")
    touch = Touch(mapping.address)
    first = next_message(uffd)
    uffd.wake(mapping.address, PAGE)
    assert next_message(uffd) == first
    uffd.zeropage(mapping.address, PAGE)
    assert touch.finish() == b"\0"


@in_child
def test_present_wakes_nobody():
    uffd, mapping = registered("shmem", BOTH)
    fill(mapping, 0, b"a")
    touch = Touch(mapping.address)
    next_message(uffd)
    assert uffd.copy(mapping.address, b"x" * PAGE).outcome is Outcome.PRESENT
    assert touch.is_alive()
    uffd.continue_(mapping.address, PAGE)
    assert touch.finish() == b"a"


@kinds
@in_child
def test_a_range_that_is_not_registered_is_gone(kind):
    uffd, mapping = registered(kind)
    size = page_size(kind)
    uffd.unregister(mapping.address, size)
    assert uffd.copy(mapping.address, b"x" * size) == Placed(Outcome.GONE, 0)
    mapping.close()
    assert uffd.copy(uffd.fd * size, b"x" * size) == Placed(Outcome.GONE, 0)


@pytest.mark.parametrize(("shift", "length"), [(1, PAGE), (0, PAGE + 1), (0, 0)])
def test_what_is_no_whole_page_is_an_error(shift, length):
    uffd, mapping = registered("shmem", pages=2)
    with mapping, uffd:
        for place in (lambda at, size: uffd.copy(at, bytes(2 * PAGE), size), uffd.zeropage, uffd.continue_):
            with pytest.raises(KernelError) as caught:
                place(mapping.address + shift, length)
            assert caught.value.number == EINVAL


def test_a_source_that_is_not_mapped_is_an_error():
    uffd, mapping = registered("shmem")
    with mapping, uffd:
        with pytest.raises(KernelError) as caught:
            uffd.copy(mapping.address, 4096, PAGE)
        assert caught.value.number == EFAULT


@in_child
def test_messages_come_in_batches_that_are_bounded():
    threads = 8
    uffd, mapping = registered("shmem", pages=threads)
    assert uffd.read() == []
    touches = [Touch(mapping.address + page * PAGE) for page in range(threads)]
    seen = []
    while len(seen) < threads:
        assert uffd.poll(10)
        batch = uffd.read(3)
        assert 1 <= len(batch) <= 3
        seen += batch
    assert sorted(message.address for message in seen) == [mapping.address + page * PAGE for page in range(threads)]
    assert {message.thread for message in seen} == {touch.native_id for touch in touches}
    uffd.zeropage(mapping.address, threads * PAGE)
    assert [touch.finish() for touch in touches] == [b"\0"] * threads


@pytest.mark.parametrize("exact", [True, False])
@in_child
def test_the_address_is_exact_only_where_that_was_asked_for(exact):
    uffd, mapping = registered("shmem", features=Feature.EXACT_ADDRESS if exact else Feature(0))
    touch = Touch(mapping.address + 123)
    fault = next_message(uffd)
    assert fault.address == mapping.address + (123 if exact else 0)
    assert fault.thread == 0
    uffd.zeropage(mapping.address, PAGE)
    touch.finish()


@in_child
def test_one_page_wakes_all_who_wait_for_it():
    uffd, mapping = registered("shmem")
    gate = threading.Barrier(5)

    def touch_together():
        gate.wait(10)
        return calls.read_memory(mapping.address, 1)

    touches = [Touch(action=touch_together) for _ in range(4)]
    gate.wait(10)
    seen = set()
    while len(seen) < 4:
        assert uffd.poll(10)
        seen |= {fault.thread for fault in uffd.read()}
    uffd.copy(mapping.address, b"x" * PAGE)
    assert [touch.finish() for touch in touches] == [b"x"] * 4


@in_child
def test_a_copy_out_of_memory_that_is_itself_missing_waits_without_the_gil():
    # The kernel reads the source inside the ioctl, and this thread must be able to serve that fault meanwhile.
    uffd, mapping = registered("shmem")
    other, source = registered("shmem")
    copying = Touch(action=lambda: uffd.copy(mapping.address, source.address, PAGE))
    fault = next_message(other)
    assert fault.address == source.address
    other.copy(source.address, b"s" * PAGE)
    assert copying.finish() == Placed(Outcome.PLACED, PAGE)
    assert calls.read_memory(mapping.address, 1) == b"s"


@in_child
def test_a_mapping_without_an_alias_has_none():
    with allocate("shmem", alias=False) as mapping:
        assert mapping.alias == 0


def test_more_than_the_source_holds_is_never_read():
    uffd, mapping = registered("shmem", pages=2)
    with mapping, uffd:
        with pytest.raises(ValueError, match="8192 bytes of a source of 4096"):
            uffd.copy(mapping.address, bytes(PAGE), 2 * PAGE)
        with pytest.raises(ValueError, match="a length is needed"):
            uffd.copy(mapping.address, mapping.alias)
