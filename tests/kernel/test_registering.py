"""Registering: what is granted for each mode and memory type, and who is refused."""

from errno import EBUSY, EINVAL

import pytest

from postcopy.errors import KernelError
from postcopy.kernel import Feature, Ioctl, Mode, Userfaultfd, calls, memory_type
from tests.kernel.bodies import PAGE, Touch, in_child, next_message
from tests.kernel.memory import KINDS, PLAIN, allocate, registered
from tests.lacking import lacking

BASE = Ioctl.WAKE | Ioctl.COPY
GRANTED = {
    ("anonymous", Mode.MISSING): BASE | Ioctl.ZEROPAGE,
    ("anonymous", Mode.WP): BASE | Ioctl.ZEROPAGE | Ioctl.WRITEPROTECT,
    ("shmem", Mode.MISSING): BASE | Ioctl.ZEROPAGE,
    ("shmem", Mode.MISSING | Mode.MINOR): BASE | Ioctl.ZEROPAGE | Ioctl.CONTINUE,
    ("shmem", Mode.MISSING | Mode.MINOR | Mode.WP): BASE | Ioctl.ZEROPAGE | Ioctl.CONTINUE | Ioctl.WRITEPROTECT,
    ("hugetlb-2M", Mode.MISSING): BASE,
    ("hugetlb-2M", Mode.MINOR): BASE | Ioctl.CONTINUE,
    ("hugetlb-2M", Mode.MISSING | Mode.MINOR | Mode.WP): BASE | Ioctl.CONTINUE | Ioctl.WRITEPROTECT,
}
# Bits that depend on the type and the mode; POISON and MOVE depend on the kernel.
DECIDED = BASE | Ioctl.ZEROPAGE | Ioctl.CONTINUE | Ioctl.WRITEPROTECT


@pytest.mark.parametrize(("kind", "modes"), GRANTED)
def test_the_ioctls_granted_for_each_mode_and_type(kind, modes, huge_pages):
    if kind != "anonymous" and kind != "shmem":
        huge_pages(kind, 1)
    with allocate(kind) as mapping, Userfaultfd.open(optional=PLAIN) as uffd:
        granted = uffd.register(mapping.address, mapping.region.size, modes)
        assert granted & DECIDED == GRANTED[kind, modes], granted
        if uffd.features & Feature.POISON:
            assert granted & Ioctl.POISON


@pytest.mark.parametrize("name", ["hugetlb-2M", "hugetlb-1G"])
def test_huge_pages_are_granted_both_modes_whether_or_not_the_pool_has_any(name):
    huge = memory_type(name)
    if not huge.pool_folder.exists():
        lacking(f"no {huge.pool_folder}")
    grants = huge.probe()
    # Not one page of 1 GiB is free on most machines.
    assert (grants.reason is None) == (huge.pool().unclaimed + huge.pool().more > 0)
    assert grants.granted(Mode.MISSING | Mode.MINOR) & DECIDED == BASE | Ioctl.CONTINUE


def test_minor_on_anonymous_memory_is_refused():
    with allocate("anonymous") as mapping, Userfaultfd.open(optional=PLAIN) as uffd:
        with pytest.raises(KernelError, match="UFFDIO_REGISTER") as caught:
            uffd.register(mapping.address, PAGE, Mode.MINOR)
        assert caught.value.number == EINVAL


@pytest.mark.parametrize(("shift", "length"), [(1, PAGE), (0, PAGE - 1), (0, 0)])
def test_what_is_no_whole_page_is_refused(shift, length):
    with allocate("shmem", 2) as mapping, Userfaultfd.open(optional=PLAIN) as uffd:
        with pytest.raises(KernelError) as caught:
            uffd.register(mapping.address + shift, length, Mode.MISSING)
        assert caught.value.number == EINVAL


def test_a_range_has_one_userfaultfd():
    uffd, mapping = registered("shmem")
    with mapping, uffd, Userfaultfd.open() as other:
        with pytest.raises(KernelError) as caught:
            other.register(mapping.address, PAGE, Mode.MISSING)
        assert caught.value.number == EBUSY


@pytest.mark.parametrize("kind", KINDS)
def test_unregistering_lets_the_waiting_go_on_to_zeros(kind, huge_pages):
    if kind == "hugetlb-2M":
        huge_pages(kind, 1)
    unregister_under(kind=kind)


@in_child
def unregister_under(kind):
    uffd, mapping = registered(kind)
    touch = Touch(mapping.address)
    next_message(uffd)
    uffd.unregister(mapping.address, mapping.region.size)
    assert touch.finish() == b"\0"
    with pytest.raises(KernelError):
        uffd.unregister(mapping.address + 1, 1)


@in_child
def test_closing_lets_the_waiting_go_on_to_zeros():
    uffd, mapping = registered("shmem")
    touch = Touch(mapping.address)
    next_message(uffd)
    uffd.close()
    uffd.close()
    assert touch.finish() == b"\0"


def test_a_closed_descriptor_is_an_error_and_no_outcome():
    uffd = Userfaultfd.open()
    uffd.close()
    with pytest.raises(KernelError, match="Bad file descriptor"):
        uffd.zeropage(calls.map_anonymous(PAGE), PAGE)
