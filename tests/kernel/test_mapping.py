"""Mappings: the alias, the extents that hold data, huge pages kept out, and the end."""

import os
from errno import ENOTTY
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from postcopy.errors import HostError, KernelError
from postcopy.kernel import Mapping, Mode, Outcome, Pagemap, Userfaultfd, calls, memory_type
from postcopy.kernel.snapshot import SnapshotFile, SnapshotPiece
from postcopy.pages.regions import Region
from tests.kernel.bodies import PAGE, open_descriptors
from tests.kernel.memory import PLAIN, allocate, fill
from tests.lacking import lacking

SHMEM_THP = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
HUGE = 1 << 21


def vm_flags(address):
    """Return the kernel's flags of the mapping at that address."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith(f"{address:x}-"):
            found = True
        elif found and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:#x}")


def test_the_alias_is_the_same_memory():
    with allocate("shmem", 2) as mapping:
        assert mapping.alias not in {0, mapping.address}
        calls.write_memory(mapping.alias + PAGE, b"through the alias")
        assert calls.read_memory(mapping.address + PAGE, 17) == b"through the alias"
        assert os.pread(mapping.fd, 17, PAGE) == b"through the alias"


def test_guest_memory_is_not_dumped_not_inherited_and_keeps_its_size():
    with allocate("shmem") as mapping:
        assert "dd" in vm_flags(mapping.address)
        assert "dd" in vm_flags(mapping.alias)
        assert not os.get_inheritable(mapping.fd)
        for size in (0, 2 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(mapping.fd, size)


def test_closing_frees_all_of_it_and_twice_is_no_harm():
    before = open_descriptors()
    mapping = allocate("shmem")
    address = mapping.address
    mapping.close()
    mapping.close()
    assert (mapping.address, mapping.alias, mapping.fd) == (0, 0, -1)
    assert open_descriptors() == before
    with pytest.raises(AssertionError):
        vm_flags(address)


def test_what_cannot_be_mapped_names_the_region_and_closes_the_file():
    descriptor = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(HostError, match="region 3 \\(shmem, 4096 bytes\\): mmap"):
        Mapping(Region(3, "shmem", PAGE, PAGE), descriptor, alias=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


PAGES = 24


@given(
    written=st.sets(st.integers(0, PAGES - 1)),
    start=st.integers(0, PAGES * PAGE - 1),
    length=st.integers(0, PAGES * PAGE),
)
@example(written={0}, start=1, length=0)
@settings(max_examples=200)
def test_data_extents_are_the_written_pages_of_the_range(written, start, length):
    stop = min(start + length, PAGES * PAGE)
    with allocate("shmem", PAGES) as mapping:
        for page in written:
            fill(mapping, page, b"d")
        found = set()
        last = -1
        for offset, size in mapping.data_extents(start, stop):
            assert offset % PAGE == size % PAGE == 0
            assert size > 0
            assert offset > last
            last = offset + size - 1
            found |= set(range(offset // PAGE, (offset + size) // PAGE))
        assert found == {page for page in written if page * PAGE < stop and (page + 1) * PAGE > start and start < stop}


def test_extents_are_whole_pages_of_the_region_where_these_are_larger_than_the_files():
    descriptor = os.memfd_create("pages of two")
    os.ftruncate(descriptor, 8 * PAGE)
    with Mapping(Region(0, "pairs", 2 * PAGE, 8 * PAGE), descriptor, alias=True) as mapping:
        for page in (1, 2, 7):
            calls.write_memory(mapping.alias + page * PAGE, b"d")
        assert list(mapping.data_extents()) == [(0, 4 * PAGE), (6 * PAGE, 2 * PAGE)]
        assert list(mapping.data_extents(7 * PAGE, 8 * PAGE)) == [(6 * PAGE, 2 * PAGE)]


def test_neighbouring_pages_are_one_extent():
    with allocate("shmem", 5) as mapping:
        for page in (0, 1, 3):
            fill(mapping, page, b"d")
        assert list(mapping.data_extents()) == [(0, 2 * PAGE), (3 * PAGE, PAGE)]
        mapping.punch_hole(PAGE, PAGE)
        assert list(mapping.data_extents()) == [(0, PAGE), (3 * PAGE, PAGE)]
        assert calls.read_memory(mapping.address + PAGE, PAGE) == bytes(PAGE)


@pytest.mark.usefixtures("small_pages")
def test_a_page_of_zeros_that_was_written_is_data_and_a_filled_hole_is_none():
    with allocate("shmem", 2) as mapping:
        mapping.fill_holes(0, PAGE)
        fill(mapping, 1, b"\0")
        assert list(mapping.data_extents()) == [(PAGE, PAGE)]


def test_a_hole_that_appears_between_the_two_questions_is_one_page(monkeypatch):
    with allocate("shmem", 3) as mapping:
        answers = {os.SEEK_DATA: lambda offset: offset, os.SEEK_HOLE: lambda offset: offset}
        monkeypatch.setattr(mapping, "_seek", lambda offset, whence: answers[whence](offset))
        assert list(mapping.data_extents()) == [(page * PAGE, PAGE) for page in range(3)]


@given(
    written=st.sets(st.integers(0, PAGES - 1)),
    read=st.sets(st.integers(0, PAGES - 1)),
    start=st.integers(0, PAGES * PAGE - 1),
    length=st.integers(0, 2 * PAGES * PAGE),
)
@settings(max_examples=200)
def test_without_a_file_what_was_written_is_data_and_what_was_only_read_is_not(written, read, start, length):
    with allocate("anonymous", PAGES) as mapping:
        mapping.forbid_huge_pages()
        for page in written:
            calls.write_memory(mapping.address + page * PAGE, b"d")
        for page in read - written:
            calls.read_memory(mapping.address + page * PAGE, 1)  # maps the page of zeros
        stop = start + length
        found = [
            page for at, size in mapping.data_extents(start, stop) for page in range(at // PAGE, (at + size) // PAGE)
        ]
        assert found == sorted(page for page in written if page * PAGE < stop and (page + 1) * PAGE > start and length)


def test_without_a_file_a_page_given_back_is_no_data():
    with allocate("anonymous", 2) as mapping:
        calls.write_memory(mapping.address, b"d" * 2 * PAGE)
        calls.advise(mapping.address, PAGE, calls.MADV_DONTNEED)
        assert list(mapping.data_extents()) == [(PAGE, PAGE)]


def test_where_the_page_tables_cannot_be_asked_all_of_it_is_data(monkeypatch):
    def refuse(*_):
        raise KernelError("PAGEMAP_SCAN", ENOTTY)

    monkeypatch.setattr(Pagemap, "scan", refuse)
    with allocate("anonymous", 3) as mapping:
        assert list(mapping.data_extents()) == [(0, 3 * PAGE)]
        assert list(mapping.data_extents(PAGE + 1, PAGE + 2)) == [(PAGE, PAGE)]


def test_all_of_hugetlb_is_data(huge_pages):
    huge_pages("hugetlb-2M", 4)
    with allocate("hugetlb-2M", 4) as mapping:
        fill(mapping, 2, b"d")
        assert sum(length for _, length in mapping.data_extents()) == 4 * HUGE
        assert list(mapping.data_extents(HUGE, HUGE + 1)) == [(HUGE, HUGE)]


def shmem_huge_settings():
    if not SHMEM_THP.exists():
        lacking("this kernel has no transparent huge pages for shmem")


def write_through_alias(mapping):
    """Write one page in the middle of each 2 MiB; return how many bytes of data the file has then."""
    for offset in range(HUGE // 2, mapping.region.size, HUGE):
        calls.write_memory(mapping.alias + offset, b"w")
    return sum(length for _, length in mapping.data_extents())


@pytest.mark.parametrize("setting", ["always", "advise"])
def test_a_destinations_write_of_one_page_is_one_page_of_data(set_kernel, setting):
    shmem_huge_settings()
    set_kernel(SHMEM_THP, setting)
    size = 4 * HUGE
    with memory_type("shmem").allocate(Region(0, "shmem", PAGE, size)) as mapping:
        assert write_through_alias(mapping) == 4 * PAGE
        # So a run with one page of it received in place can still be copied around it.
        with Userfaultfd.open(optional=PLAIN) as uffd:
            uffd.register(mapping.address, size, Mode.MISSING | Mode.MINOR)
            assert uffd.copy(mapping.address, bytes(HUGE // 2)).outcome is Outcome.PLACED
            assert uffd.continue_(mapping.address + HUGE // 2, PAGE).outcome is Outcome.PLACED


@pytest.mark.parametrize("setting", ["always", "advise"])
def test_huge_pages_come_where_they_are_allowed(set_kernel, setting):
    # That the test above tests something: the same writes fill huge pages once they may.
    shmem_huge_settings()
    set_kernel(SHMEM_THP, setting)
    with memory_type("shmem").allocate(Region(0, "shmem", PAGE, 4 * HUGE)) as mapping:
        mapping.allow_huge_pages()
        assert write_through_alias(mapping) >= HUGE


def test_filling_holes_beyond_the_file_is_an_error():
    with allocate("shmem") as mapping, pytest.raises(KernelError, match="fallocate"):
        mapping.fill_holes(0, 2 * PAGE)


@pytest.mark.parametrize("kind", ["shmem", "anonymous"])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 0), (0, 1), (1, PAGE), (PAGE, PAGE + 1), (0, 3 * PAGE), (2 * PAGE, PAGE), (-PAGE, PAGE), (PAGE, -PAGE)],
)
def test_only_whole_pages_of_the_region_are_given_back(kind, offset, length):
    with allocate(kind, 2) as mapping:
        calls.write_memory(mapping.address, b"d" * 2 * PAGE)
        with pytest.raises(ValueError, match=f"{length} bytes at offset {offset:#x} are no whole pages"):
            mapping.punch_hole(offset, length)
        assert calls.read_memory(mapping.address, 2 * PAGE) == b"d" * 2 * PAGE


@pytest.mark.parametrize("closed_once", [Mapping, Pagemap, Userfaultfd, SnapshotFile, SnapshotPiece])
def test_a_close_that_failed_is_not_tried_again_on_somebody_elses_descriptor(closed_once):
    descriptor = os.open("/dev/null", os.O_RDONLY)
    os.close(descriptor)
    holder = object.__new__(closed_once)
    holder.fd = descriptor
    if closed_once is Mapping:
        holder.address, holder.alias, holder._file_name = 0, 0, None
    with pytest.raises(OSError, match="Bad file descriptor"):
        holder.close()
    elses = os.open("/dev/null", os.O_RDONLY)
    assert elses == descriptor, "the number is given again"
    holder.close()
    os.close(elses)


def test_memory_is_read_and_written_within_its_bounds():
    with memory_type("shmem").allocate(Region(0, "shmem", PAGE, 2 * PAGE), alias=False) as mapping:
        mapping.write(PAGE - 1, b"ab")
        assert mapping.read(PAGE - 2, 4) == b"\0ab\0"
        assert mapping.read(2 * PAGE, 0) == b""
        for offset, length in ((-1, 1), (2 * PAGE, 1), (0, 2 * PAGE + 1), (0, -1), (1 << 64, 1)):
            with pytest.raises(ValueError, match="are not in 8192 bytes that are mapped"):
                mapping.read(offset, length)
        with pytest.raises(ValueError, match="are not in"):
            mapping.write(2 * PAGE - 1, b"ab")
    with pytest.raises(ValueError, match="are not in"):
        mapping.read(0, 1)  # closed
