"""Anonymous memory as a memory type: no file, no alias, one page trapped at a time whatever huge pages are allowed."""

from pathlib import Path

import pytest

from postcopy.errors import HostError, UsageError
from postcopy.kernel import Feature, Ioctl, Mode, Outcome, Userfaultfd, Way, calls, memory_type
from postcopy.pages.regions import Region
from tests.kernel.bodies import PAGE, Touch, in_child, next_message
from tests.kernel.memory import PLAIN
from tests.lacking import lacking

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE = 1 << 21
KIND = memory_type("anonymous")


def test_what_it_declares():
    assert KIND.modes_for(alias=True) == KIND.modes_for(alias=False) == Mode.MISSING
    assert KIND.features_for(Mode.MISSING) == Feature(0)
    assert KIND.features_for(Mode.WP) == Feature.WP
    assert KIND.ioctls_for(Way.MOVE) == Ioctl.MOVE | Ioctl.WAKE
    with pytest.raises(UsageError, match="anonymous: a page cannot be placed by continue"):
        KIND.ioctls_for(Way.CONTINUE)
    assert KIND.zero_way(alias=False) is Way.ZEROPAGE


def test_it_has_neither_file_nor_alias():
    with KIND.allocate(Region(0, "anonymous", PAGE, PAGE), alias=True) as mapping:
        assert (mapping.fd, mapping.alias) == (-1, 0)


def test_more_than_the_machine_has_is_refused():
    with pytest.raises(HostError, match=r"8 TiB .* of anonymous asked for, .* available by"):
        KIND.allocate(Region(0, "anonymous", PAGE, 8 << 40))


def test_the_probe_says_that_minor_is_not_to_be_had():
    grants = KIND.probe()
    assert grants.reason is None
    assert grants.granted(Mode.MINOR) is None
    assert grants.granted(Mode.MISSING) & KIND.ioctls_for(Way.COPY, Way.ZEROPAGE) == KIND.ioctls_for(
        Way.COPY, Way.ZEROPAGE
    )


@pytest.fixture
def huge_pages_always(set_kernel):
    if not THP.exists():
        lacking("this kernel has no transparent huge pages")
    set_kernel(THP, "always")


@pytest.mark.usefixtures("huge_pages_always")
def test_a_trapped_page_is_a_small_one_also_where_huge_pages_are_always_used():
    one_page_at_a_time()


@in_child
def one_page_at_a_time():
    with KIND.allocate(Region(0, "anonymous", PAGE, 4 * HUGE)) as mapping, Userfaultfd.open(optional=PLAIN) as uffd:
        uffd.register(mapping.address, 4 * HUGE, Mode.MISSING)
        mapping.allow_huge_pages()
        touch = Touch(mapping.address + HUGE, content=b"w")
        next_message(uffd)
        assert uffd.copy(mapping.address + HUGE, b"c" * PAGE).outcome is Outcome.PLACED
        touch.finish()
        assert [length for _, length in mapping.data_extents()] == [PAGE]
        # That the setting would have had an effect: where nothing is trapped any more, one touch brings 2 MiB.
        uffd.unregister(mapping.address, 4 * HUGE)
        aligned = -(-mapping.address // HUGE) * HUGE + 2 * HUGE
        calls.write_memory(aligned, b"w")
        assert HUGE in {length for _, length in mapping.data_extents()}
