"""Pages that are lost: a vCPU that touches one gets a machine check, never zeros, and nobody waits for it."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Callable

import pytest

from postcopy.guest import Guest
from postcopy.guest.kvm.guest import GuestTroubleError, KvmGuest
from postcopy.kernel import Feature, Mapping, MemoryType, Mode, Outcome, Userfaultfd, calls, memory_type
from postcopy.kernel.kvm import DEVICE
from postcopy.pages.regions import Region
from tests.child import ChildFailedError, run_in_child
from tests.lacking import lacking

SECONDS = 10.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def lose(mapping: Mapping, kind: MemoryType, *pages: int) -> Userfaultfd:
    """Take pages away from a filled memory, for good."""
    size = kind.page_size
    for page in pages:
        if mapping.fd >= 0:
            mapping.punch_hole(page * size, size)
        calls.advise(mapping.address + page * size, size, calls.MADV_DONTNEED)
    uffd = Userfaultfd.open(Feature.POISON | kind.features_for(Mode.MISSING))
    for page in pages:
        uffd.register(mapping.address + page * size, size, Mode.MISSING)
        assert uffd.poison(mapping.address + page * size, size).outcome is Outcome.PLACED
    return uffd


def going_on(type_name: str, workload: str, pace: int) -> None:
    kind = memory_type(type_name)
    per, pages = kind.page_size // 4096, 4 if kind.page_size > 4096 else 64
    mapping = kind.allocate(Region(0, type_name, kind.page_size, pages * kind.page_size))
    total = pages * per
    with Guest([mapping], workload=workload, vcpus=3, seed=7, stride=5, steps_per_second=pace) as guest:
        guest.fill()
        guest.start()
        until(lambda: min(guest.steps()) > 100)
        guest.stop()
        assert guest.lost_steps == 0
        guest.lose([(0, kind.page_size, 2 * kind.page_size)])
        uffd = lose(mapping, kind, 1, 2)
        for _ in range(3):
            before, met = guest.steps(), guest.lost_steps
            guest.start()
            until(lambda met=met, before=before: guest.lost_steps > met + 10 and min(guest.steps()) > min(before) + 100)
            guest.stop()
            found = guest.check(threads=2)
            assert (found.pages_checked, found.pages_mismatched) == (total - 2 * per, 0)
        state = guest.save()
    with Guest.restore([mapping], state) as again:
        again.lose([(0, kind.page_size, kind.page_size), (0, 2 * kind.page_size, kind.page_size)])
        chosen = bytes([0xFF] * (total // 8 // 2)).ljust(total // 8, b"\0")
        found = again.check(chosen)
        assert (found.pages_checked, found.pages_mismatched) == (total // 2 - min(2 * per, total // 2 - per), 0)
    uffd.close()
    mapping.close()


@pytest.mark.parametrize("workload", ["sequential", "stride", "random", "zipf", "increment"])
def test_an_emulated_vcpu_goes_on_behind_a_page_that_is_lost(workload: str) -> None:
    run_in_child(going_on, "shmem", workload, 0)


@pytest.mark.parametrize(("type_name", "pace"), [("anonymous", 0), ("shmem", 20000), ("hugetlb-2M", 0)])
def test_whatever_the_memory_and_the_pace(type_name: str, pace: int, huge_pages: Callable[[str, int], None]) -> None:
    if type_name.startswith("hugetlb"):
        huge_pages(type_name, 4)
    run_in_child(going_on, type_name, "random", pace)


def paced() -> tuple[int, float]:
    kind, pages = memory_type("shmem"), 64
    mapping = kind.allocate(Region(0, "shmem", 4096, pages * 4096))
    with Guest([mapping], vcpus=1, steps_per_second=2000) as guest:
        guest.fill()
        guest.lose([(0, 0, (pages - 1) * 4096)])
        uffd = lose(mapping, kind, *range(pages - 1))
        began = time.monotonic()
        guest.start()
        until(lambda: guest.lost_steps > 300)
        guest.stop()
        made, took = max(guest.steps()), time.monotonic() - began
    uffd.close()
    return made, took


def test_a_step_that_meets_a_lost_page_is_due_like_any_other() -> None:
    made, took = run_in_child(paced)
    assert made <= 2000 * (took + 0.02)  # what it may catch up, and the first


def passed_on(how: str) -> None:
    """Somebody else's SIGBUS: a file that ends before its mapping does, or a page that nobody said is lost."""
    kind = memory_type("shmem")
    mapping = kind.allocate(Region(0, "shmem", 4096, 16 * 4096))
    guest = Guest([mapping], vcpus=1)
    guest.fill()
    guest.lose([(0, 4096, 4096)])
    if how == "of a vCPU":
        calls.advise(mapping.address, 4096, calls.MADV_DONTNEED)
        mapping.punch_hole(0, 4096)
        uffd = Userfaultfd.open(Feature.SIGBUS)
        uffd.register(mapping.address, 4096, Mode.MISSING)
        guest.start()
        time.sleep(SECONDS)
        return
    fd = os.memfd_create("short")
    os.ftruncate(fd, 4096)
    short = mmap.mmap(fd, 4096)
    os.ftruncate(fd, 0)
    short[0] = 1
    time.sleep(SECONDS)


@pytest.mark.parametrize("how", ["of a vCPU", "of another thread"])
def test_what_is_no_lost_page_ends_the_process_as_ever(how: str) -> None:
    with pytest.raises(ChildFailedError, match=f"ended with exit code {-signal.SIGBUS}"):
        run_in_child(passed_on, how)


def stopped(page: int) -> str:
    kind = memory_type("shmem")
    mapping = kind.allocate(Region(0, "shmem", 4096, 1024 * 4096))
    guest = KvmGuest([mapping], workload="sequential", vcpus=2, seed=1)
    guest.fill()
    guest.lose([(0, page * 4096, 4096)])
    uffd = lose(mapping, kind, page)
    guest.start()
    until(lambda: guest.trouble is not None)
    if page >= 10:  # the other vCPU begins elsewhere, and goes on
        before = max(guest.steps())
        until(lambda: max(guest.steps()) > before + 10)
    guest.stop()
    trouble = str(guest.trouble)
    with pytest.raises(GuestTroubleError, match=r"it cannot be checked: vCPU [01]: "):
        guest.check()
    guest.close()
    uffd.close()
    return trouble


def test_a_vcpu_of_kvm_stops_where_it_touches_a_page_that_is_lost() -> None:
    if not DEVICE.exists():
        lacking(f"there is no {DEVICE}")
    trouble = run_in_child(stopped, 300)
    assert "it touched a page that is lost" in trouble
    assert trouble.startswith("vCPU 0: ")
    trouble = run_in_child(stopped, 0)  # that of its program: nothing can be run any more
    assert trouble.startswith("vCPU ")
