"""The ABI's numbers against what was published, the machine's own header and the C of the data plane."""

import re
from pathlib import Path

import pytest

from postcopy.kernel import abi
from postcopy.kernel.abi import EventCode, Feature, Ioctl, Mode

HEADER = Path("/usr/include/linux/userfaultfd.h")
PLACE = Path(__file__).parents[2] / "postcopy/pump/place.h"
HEADER_NAMES = {
    "PAGEFAULT_FLAG_WP": Feature.WP,
    "MISSING_HUGETLBFS": Feature.MISSING_HUGETLB,
    "MINOR_HUGETLBFS": Feature.MINOR_HUGETLB,
    "WP_HUGETLBFS_SHMEM": Feature.WP_HUGETLB_SHMEM,
}


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (abi.RANGE, 16),
        (abi.API_ARGUMENT, 24),
        (abi.REGISTER_ARGUMENT, 32),
        (abi.PLACE_ARGUMENT, 40),
        (abi.RANGE_ARGUMENT, 32),
        (abi.PROTECT_ARGUMENT, 24),
        (abi.SCAN_ARGUMENT, 96),
        (abi.SCAN_RANGE, 24),
    ],
)
def test_structs_have_the_sizes_of_the_abi(layout, size):
    assert layout.size == size


def test_ioc_packs_direction_size_type_and_number():
    assert abi.ioc(3, 0xAA, 0x03, 40) == 0xC028AA03
    assert abi.ioc(2, 0xAA, 0x01, 16) == 0x8010AA01


def test_feature_bits_are_those_of_the_header():
    found = dict(re.findall(r"#define UFFD_FEATURE_(\w+)\s+\(1\s*<<\s*(\d+)\)", HEADER.read_text()))
    assert len(found) >= 13
    for name, bit in found.items():
        assert HEADER_NAMES.get(name, Feature.__members__.get(name)) == 1 << int(bit), name


def test_modes_events_and_ioctl_numbers_are_those_of_the_header():
    text = HEADER.read_text()
    for mode, bit in re.findall(r"#define UFFDIO_REGISTER_MODE_(\w+)\s+\(\(__u64\)1<<(\d+)\)", text):
        assert Mode[mode] == 1 << int(bit)
    for event, code in re.findall(r"#define UFFD_EVENT_(\w+)\s+(0x\w+)", text):
        assert EventCode[event] == int(code, 16)
    for name, number in re.findall(r"#define _UFFDIO_(\w+)\s+\((0x\w+)\)", text):
        assert Ioctl[name] == 1 << int(number, 16)


def test_the_data_plane_uses_the_same_numbers():
    found = dict(re.findall(r"#define UFFD_(\w+) (0x[0-9A-F]+|\d+)u?$", PLACE.read_text(), re.MULTILINE))
    expected = {
        "IOC_WAKE": abi.IOC_WAKE,
        "IOC_COPY": abi.IOC_COPY,
        "IOC_MOVE": abi.IOC_MOVE,
        "IOC_ZEROPAGE": abi.IOC_ZEROPAGE,
        "IOC_CONTINUE": abi.IOC_CONTINUE,
        "IOC_POISON": abi.IOC_POISON,
        "EVENT_PAGEFAULT": abi.EventCode.PAGEFAULT,
        "FAULT_WP": abi.FaultFlag.WP,
        "FAULT_MINOR": abi.FaultFlag.MINOR,
    }
    assert {name: int(value, 0) for name, value in found.items()} == expected
