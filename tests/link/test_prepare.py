"""What is checked before Ready: a guest that could not be loaded, and memory that is not the guest's own."""

import pytest

from postcopy.errors import HostError, UsageError
from postcopy.link.placement import handling
from postcopy.link.prepare import GuestError, RoomError, prepare, staging_bytes
from postcopy.pages.regions import Layout, Region
from postcopy.wire.control import GuestOffer, LayoutOffer, RegionOffer

MIB, GIB = 1 << 20, 1 << 30
SMALL = (RegionOffer("shmem", 4096, MIB),)


class Sixtyfour:
    """A kind of guest of at most 64 vCPUs; `story` is what was done with it."""

    vcpus_max = 64

    def __init__(self):
        self.story = []

    def check_host(self):
        pass

    def empty(self, mappings, vcpus):
        self.story.append(f"{vcpus} vCPUs")
        self.mappings = mappings
        return self

    def close(self):
        self.story += ["mapped" if self.mappings[0].address else "unmapped", "closed"]


KINDS = {"emulated": Sixtyfour()}


@pytest.mark.parametrize(
    ("guest", "text"),
    [
        (GuestOffer("emulated", 65), "a guest of 65 vCPUs: this agent runs at most 64 of emulated"),
        (GuestOffer("poltergeist", 1), "no guest of kind 'poltergeist': known are emulated"),
    ],
)
def test_a_guest_that_could_not_be_loaded(guest, text):
    with pytest.raises(GuestError, match=text):
        prepare(LayoutOffer(SMALL, guest), "auto", KINDS)


def test_a_kind_of_guest_that_this_host_cannot_have_is_told_before_memory_is_taken():
    class Impossible(Sixtyfour):
        def check_host(self):
            raise HostError("this host has no such thing")

        def empty(self, mappings, vcpus):
            raise AssertionError("it was refused")

    with pytest.raises(HostError, match="this host has no such thing"):
        prepare(LayoutOffer(SMALL, GuestOffer("emulated", 1)), "auto", {"emulated": Impossible()})


def test_what_is_made_ready_for_a_guest_is_given_back_with_its_memory():
    made = Sixtyfour()
    prepare(LayoutOffer(SMALL, GuestOffer("emulated", 3)), "auto", {"emulated": made}).close()
    assert made.story == ["3 vCPUs", "mapped", "closed"]


def test_memory_is_given_back_where_the_rest_cannot_be_had():
    class Failing(Sixtyfour):
        def empty(self, mappings, vcpus):
            self.mappings = mappings
            raise HostError("no room for vCPUs")

    failing = Failing()
    with pytest.raises(HostError, match="no room for vCPUs"):
        prepare(LayoutOffer(SMALL, GuestOffer("emulated", 1)), "auto", {"emulated": failing})
    assert [mapping.address for mapping in failing.mappings] == [0]


@pytest.mark.parametrize(
    ("mode", "types", "buffers"),
    [
        ("auto", ["shmem", "hugetlb-2M"], 0),
        ("missing", ["hugetlb-2M"], 0),  # a page is no larger than a frame
        ("auto", ["hugetlb-1G"], 0),  # received where it stays
        ("missing", ["shmem", "hugetlb-1G"], 3 * GIB),  # one for each connection, one of zeros
    ],
)
def test_buffers_of_huge_pages_are_memory_too(mode, types, buffers):
    sizes = {"shmem": 4096, "hugetlb-2M": 2 * MIB, "hugetlb-1G": GIB}
    layout = Layout(tuple(Region(index, name, sizes[name], GIB) for index, name in enumerate(types)))
    assert staging_bytes(layout, [handling(mode, name) for name in types]) == buffers


def test_there_is_no_room_for_the_buffers(monkeypatch):
    from postcopy.kernel import MEMORY_TYPES, memory_type, shmem

    class Roomy(type(memory_type("hugetlb-1G"))):
        def check_room(self, size):
            pass

    monkeypatch.setattr(shmem, "room", lambda: (2 * GIB, "a limit of this test"))
    types = {**MEMORY_TYPES, "hugetlb-1G": Roomy("hugetlb-1G", GIB)}
    offer = LayoutOffer((RegionOffer("hugetlb-1G", GIB, GIB),), GuestOffer("emulated", 1))
    with pytest.raises(RoomError, match="buffers that receive huge pages"):
        prepare(offer, "missing", KINDS, types)


def test_a_mode_that_the_memory_does_not_have_is_told_first():
    with pytest.raises(UsageError, match="cannot be migrated in mode move"):
        prepare(LayoutOffer(SMALL, GuestOffer("emulated", 1)), "move", KINDS)
