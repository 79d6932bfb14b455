"""Huge pages are reserved for as long as a bench runs, and the pool is as large as before when it has ended."""

from __future__ import annotations

import pytest

from agent.bench.pool import HUGE_POOL, free_pages, reserved
from postcopy.errors import HostError
from postcopy.kernel.hugetlb import Hugetlb, Pool
from tests.lacking import lacking


class SmallMachine(Hugetlb):
    """A machine that finds at most `most` huge pages, of which `used` are in use."""

    def __init__(self, folder, most, used):
        super().__init__("hugetlb-2M", 2 << 20)
        self.pool_folder = folder
        self.most, self.used = most, used
        (folder / "nr_hugepages").write_text(str(used))

    def pool(self):
        total = min(self.most, int((self.pool_folder / "nr_hugepages").read_text()))
        return Pool(total=total, free=total - self.used, reserved=0, more=0)


def test_the_kernel_gives_them_and_gets_them_back():
    before = HUGE_POOL.pool()
    try:
        with reserved(before.unclaimed + 2):
            during = HUGE_POOL.pool().total
    except HostError as refused:
        lacking(str(refused))
    assert during == before.total + 2
    assert HUGE_POOL.pool().total == before.total


def test_what_is_free_already_is_not_reserved_again(tmp_path):
    machine = SmallMachine(tmp_path, most=10, used=3)
    with reserved(4, machine):
        assert free_pages(machine) == 4
        with reserved(4, machine):
            assert free_pages(machine) == 4
        assert free_pages(machine) == 4, "only who reserved them gives them back"
    assert machine.pool().total == 3


def test_a_machine_without_them_says_so_and_keeps_none(tmp_path):
    machine = SmallMachine(tmp_path, most=10, used=3)
    with pytest.raises(HostError, match="8 more huge pages were asked for, the kernel found 7"), reserved(8, machine):
        pytest.fail("the block is not entered")
    assert machine.pool().total == 3


def test_they_are_given_back_when_the_bench_fails(tmp_path):
    machine = SmallMachine(tmp_path, most=10, used=3)
    with pytest.raises(KeyboardInterrupt), reserved(4, machine):
        raise KeyboardInterrupt
    assert machine.pool().total == 3


def test_who_may_not_change_the_pool_is_told(tmp_path):
    machine = SmallMachine(tmp_path, most=10, used=3)
    machine.pool_folder = tmp_path / "nowhere"
    machine.pool = lambda: Pool(total=3, free=0, reserved=0, more=0)
    with pytest.raises(HostError, match="the pool cannot be changed"), reserved(1, machine):
        pytest.fail("the block is not entered")
