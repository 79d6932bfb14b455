"""A second process that maps the same file: its faults are served, and a page that both wait for wakes both."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from postcopy.errors import UsageError
from postcopy.kernel import Mode, Userfaultfd
from postcopy.kernel.abi import IOC_CONTINUE
from postcopy.pump.destination import VIEWS_MAX
from postcopy.pump.regions import Placement
from postcopy.wire.frame import FrameType, Header, pack
from tests.backend import Backend
from tests.child import run_in_child
from tests.pump.changing import changes, take
from tests.pump.stage import Stage, until

ABSENT, REQUESTED, PLACING, PLACED, ZERO, WATCHED, DROPPED = range(7)
BOTH = Mode.MISSING | Mode.MINOR
# Memory, how its pages are placed, and what the second process registers.
WAYS = [
    pytest.param("shmem", Placement.COPY, BOTH, id="shmem-copy"),
    pytest.param("shmem", Placement.COPY, Mode.MISSING, id="shmem-copy-missing"),
    pytest.param("shmem", Placement.CONTINUE, BOTH, id="shmem-continue"),
    pytest.param("hugetlb-2M", Placement.CONTINUE, BOTH, id="hugetlb-continue"),
]


@pytest.fixture(autouse=True)
def _pool(request: pytest.FixtureRequest) -> None:
    if "hugetlb" in request.node.name:
        request.getfixturevalue("huge_pages")("hugetlb-2M", 16)


@contextmanager
def two(type_name: str, placement: Placement, modes: Mode, pages: int = 8) -> Iterator[tuple[Stage, Backend]]:
    with (
        Stage(type_name, pages, placement) as stage,
        Backend(stage.mapping.fd, stage.region.size, type_name, modes) as backend,
    ):
        stage.pump.add_view(backend.uffd.fd, [backend.address])
        yield stage, backend
        backend.process.kill()
        stage.pump.close()
        backend.uffd.close()


def head(fill: int) -> bytes:
    return bytes([fill]) * 16


def told(*fills: tuple[int, int]) -> set[str]:
    return {f"read {page} {head(fill).hex()}" for page, fill in fills}


def everything(type_name: str, placement: Placement, modes: Mode) -> None:
    with two(type_name, placement, modes) as (stage, backend):
        # A page that only the other process waits for: asked for, and its own.
        backend.ask("read", 1)
        stage.request(1)
        stage.urgent.sendall(stage.pages(1, 0x11))
        assert backend.told() in told((1, 0x11))
        assert stage.touch(1).done() == b"\x11" * 4096
        # One that both wait for is asked for once, whoever was first, and wakes both.
        guest = stage.touch(2)
        stage.request(2)
        backend.ask("read", 2)
        backend.ask("read", 3)
        stage.request(3)
        other = stage.touch(3)
        until(lambda: stage.pump.snapshot().pending == 4, "four faults")
        stage.no_request()
        stage.urgent.sendall(stage.pages(3, 0x13))
        stage.push.sendall(stage.pages(2, 0x12))
        assert {backend.told(), backend.told()} == told((2, 0x12), (3, 0x13))
        assert (guest.done(), other.done()) == (b"\x12" * 4096, b"\x13" * 4096)
        # Known to be zero, and pushed before anybody looked; what one writes the other sees, and no late copy undoes.
        stage.push.sendall(stage.frame(FrameType.ZERO, 4) + stage.pages(5, 0x15))
        until(lambda: stage.pump.snapshot().pages_resident == 5, "a page of zeros and a pushed one")
        assert backend.read(4) == head(0)
        assert backend.read(5) == head(0x15)
        backend.ask("write", 5, "abcd")
        assert backend.told() == "wrote 5"
        assert stage.touch(5).done()[:3] == b"\xab\xcd\x15"
        stage.push.sendall(stage.pages(5, 0x55))
        until(lambda: stage.pump.snapshot().pages_duplicate == 1, "the late copy")
        assert backend.read(5)[:3] == b"\xab\xcd\x15"
        until(lambda: stage.pump.snapshot().pending == 0, "the end of every fault")
        assert stage.pump.snapshot().views_ended == 0
        assert stage.pump.status().state == "running"


@pytest.mark.parametrize(("type_name", "placement", "modes"), WAYS)
def test_another_process_is_served_like_the_guest(type_name: str, placement: Placement, modes: Mode) -> None:
    run_in_child(everything, type_name, placement, modes)


def two_others() -> None:
    """Two processes that do not tell their threads (both say 0) wait for one page."""
    with (
        two("shmem", Placement.COPY, BOTH) as (stage, one),
        Backend(stage.mapping.fd, stage.region.size, "shmem") as other,
    ):
        stage.pump.add_view(other.uffd.fd, [other.address])
        one.ask("read", 1)
        other.ask("read", 1)
        until(lambda: stage.pump.snapshot().pending == 2, "both faults")
        stage.request(1)
        stage.no_request()
        stage.urgent.sendall(stage.pages(1, 0x71))
        assert one.told() in told((1, 0x71))
        assert other.told() in told((1, 0x71))
        other.process.kill()
        stage.pump.close()
        other.uffd.close()


def test_a_page_is_for_everybody_who_waits_for_it() -> None:
    run_in_child(two_others)


def changing() -> None:
    with two("shmem", Placement.COPY, BOTH) as (stage, backend):
        changes(3, of=IOC_CONTINUE)
        backend.ask("read", 1)
        stage.request(1)
        stage.push.sendall(stage.pages(1, 0x81))
        assert backend.told() in told((1, 0x81))
        assert stage.pump.snapshot().outcomes["retry"] == 3


@pytest.mark.usefixtures("changing_kernel")
def test_a_kernel_that_cannot_map_a_page_just_now_is_asked_again() -> None:
    """Where nothing else happens that would have the pump look again."""
    run_in_child(changing)


def half_a_page(type_name: str) -> None:
    with two(type_name, Placement.CONTINUE, BOTH) as (stage, backend):
        frame = stage.pages(1, 0x21)
        stage.push.sendall(frame[:-1])
        until(lambda: stage.state(1) == PLACING, "the push's claim")
        backend.ask("read", 1)
        until(lambda: stage.state(1) == WATCHED, "the other process's fault")
        assert stage.pump.snapshot().faults_minor + stage.pump.snapshot().faults_missing == 1
        stage.push.sendall(frame[-1:])
        assert backend.told() in told((1, 0x21))
        stage.no_request()


@pytest.mark.parametrize("type_name", ["shmem", "hugetlb-2M"])
def test_a_page_whose_bytes_are_coming_in_is_not_seen_before_it_is_whole(type_name: str) -> None:
    run_in_child(half_a_page, type_name)


def given_back(type_name: str, placement: Placement) -> None:
    with two(type_name, placement, BOTH) as (stage, backend):
        stage.push.sendall(stage.pages(1, 0x31))
        until(lambda: stage.state(1) == PLACED)
        assert backend.read(1) == head(0x31)
        backend.ask("read", 2)
        stage.request(2)
        stage.pump.discard(0, 0, 3 * stage.page_size)
        assert backend.told() in told((2, 0))
        stage.mapping.punch_hole(0, 3 * stage.page_size)
        for page in range(3):
            assert backend.read(page) == head(0)
        stage.urgent.sendall(stage.pages(2, 0x32))
        until(lambda: stage.pump.snapshot().pages_duplicate == 1, "the late answer")
        assert backend.read(2) == head(0)
        until(lambda: stage.pump.snapshot().pending == 0, "the end of every fault")


@pytest.mark.parametrize(
    ("type_name", "placement"),
    [("shmem", Placement.COPY), ("shmem", Placement.CONTINUE), ("hugetlb-2M", Placement.CONTINUE)],
)
def test_what_is_given_back_is_zeros_for_both(type_name: str, placement: Placement) -> None:
    run_in_child(given_back, type_name, placement)


def gone(how: str) -> None:
    """The other process goes while it waits for a page: that is no business of the guest's."""
    with two("shmem", Placement.COPY, BOTH) as (stage, backend):
        backend.ask("read", 1)
        stage.request(1)
        if how == "killed":
            backend.process.kill()
            backend.process.wait(10)
        else:
            backend.ask("unmap")
        stage.urgent.sendall(stage.pages(1, 0x41))
        until(lambda: stage.pump.snapshot().pending == 0, "the end of every fault")
        if how == "killed":
            assert stage.pump.snapshot().views_ended == 1
        assert stage.touch(1).done() == b"\x41" * 4096
        for page in (0, *range(2, 8)):
            stage.push.sendall(stage.pages(page, page))
        stage.push.sendall(pack(Header(FrameType.END, 0, 0, 0)))
        stage.finished()
        assert stage.pump.status().error is None


@pytest.mark.parametrize("how", ["killed", "unmapped"])
def test_a_process_that_goes_leaves_the_guest_alone(how: str) -> None:
    run_in_child(gone, how)


def another_file() -> None:
    with (
        Stage("shmem", 4, Placement.COPY) as stage,
        Stage("shmem", 4, Placement.COPY) as elsewhere,
        Backend(elsewhere.mapping.fd, elsewhere.region.size, "shmem") as backend,
    ):
        stage.pump.add_view(backend.uffd.fd, [backend.address])
        backend.ask("read", 1)
        stage.request(1)
        stage.urgent.sendall(stage.pages(1, 0x51))
        until(lambda: stage.pump.snapshot().views_ended == 1, "the end of the view")
        assert stage.touch(1).done() == b"\x51" * 4096
        guest = stage.touch(2)
        stage.request(2)
        stage.urgent.sendall(stage.pages(2, 0x52))
        assert guest.done() == b"\x52" * 4096
        backend.process.kill()
        stage.pump.close()
        backend.uffd.close()


def test_a_mapping_of_some_other_file_is_served_no_more() -> None:
    run_in_child(another_file)


def refused() -> None:
    with Stage("shmem", 4, Placement.COPY) as stage, Userfaultfd.open() as uffd:
        for addresses in ([], [4096, 4096], [4097]):
            with pytest.raises(UsageError, match="one address of whole pages for each region"):
                stage.pump.add_view(uffd.fd, addresses)
        for _ in range(VIEWS_MAX):
            stage.pump.add_view(uffd.fd, [4096])
        with pytest.raises(UsageError, match=f"{VIEWS_MAX} other processes"):
            stage.pump.add_view(uffd.fd, [4096])
        guest = stage.touch(1)
        stage.request(1)
        stage.urgent.sendall(stage.pages(1, 0x61))
        assert guest.done() == b"\x61" * 4096
        stage.pump.close()
    with (
        Stage("anonymous", 4, Placement.COPY) as stage,
        Userfaultfd.open() as uffd,
        pytest.raises(UsageError, match="0 for one without a file"),
    ):
        stage.pump.add_view(uffd.fd, [4096])


def test_what_makes_no_view_is_refused() -> None:
    run_in_child(refused)


def out_of_time() -> int:
    with two("shmem", Placement.COPY, BOTH) as (stage, backend):
        backend.ask("read", 1)
        stage.request(1)
        stage.pump.detach()
        take(1)  # a second passes by each refusal, and that is more than others are waited for
        with ThreadPoolExecutor(1) as thread:  # it passes for all but the first one
            assert thread.submit(stage.pump.poison).result() == 8
        take(0)
        return backend.process.wait(10)


@pytest.mark.usefixtures("changing_kernel")
def test_who_waits_elsewhere_for_a_page_that_could_not_be_poisoned_there_in_time_is_told_later() -> None:
    assert run_in_child(out_of_time) == -signal.SIGBUS
