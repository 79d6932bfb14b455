"""guest_memfd: what this kernel answers is tried, and where it cannot be trapped that is one line, on either side."""

from pathlib import Path

import pytest

from postcopy.errors import HostError
from postcopy.kernel import Ioctl, Mode, calls, memory_type
from postcopy.kernel.memory_type import PROBED_MODES
from postcopy.pages.regions import Region
from tests.kernel.bodies import PAGE, open_descriptors
from tests.lacking import lacking

NEEDED = Mode.MISSING | Mode.MINOR


@pytest.fixture
def kind():
    known = memory_type("guest_memfd")
    grants = known.probe()
    if not grants.modes:
        lacking(grants.reason)
    return known


def test_the_probe_says_what_was_answered_and_leaves_nothing_behind(kind):
    before = open_descriptors()
    grants = kind.probe()
    assert open_descriptors() == before
    assert [grant.modes for grant in grants.modes] == list(PROBED_MODES)
    granted = grants.granted(NEEDED)
    if granted is None:
        assert "guest_memfd: kernel " in grants.reason
        assert "cannot trap its faults: REGISTER answers Invalid argument (EINVAL)" in grants.reason
        assert "\n" not in grants.reason
    else:
        assert grants.reason is None
        assert granted & Ioctl.CONTINUE


def test_it_is_allocated_where_it_can_be_trapped_and_refused_with_the_reason_elsewhere(kind):
    region = Region(0, "guest_memfd", PAGE, 16 * PAGE)
    before = open_descriptors()
    if kind.probe().granted(NEEDED) is None:
        with pytest.raises(HostError, match="cannot trap its faults"):
            kind.allocate(region)
        assert open_descriptors() == before
        return
    with kind.allocate(region) as mapping:
        calls.write_memory(mapping.alias, b"shared")
        assert calls.read_memory(mapping.address, 6) == b"shared"


def test_the_memory_itself_is_real(kind):
    fd = kind.create_file("", 4 * PAGE)
    address = calls.map_shared(fd, 4 * PAGE)
    calls.write_memory(address + PAGE, b"guest")
    assert calls.read_memory(address + PAGE, 5) == b"guest"
    calls.unmap(address, 4 * PAGE)


def test_without_kvm_that_is_the_reason(kind, monkeypatch):
    monkeypatch.setattr("postcopy.kernel.guest_memfd.DEVICE", Path("/dev/no-kvm"))
    with pytest.raises(HostError, match="guest_memfd: open /dev/no-kvm: No such file"):
        kind.check_room(PAGE)
