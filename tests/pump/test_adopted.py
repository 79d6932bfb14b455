"""Memory that was handed over and is trapped all the same: a touch maps what is there, and nothing is fetched."""

import select
import threading

import pytest

from postcopy.kernel import Feature, Mode, Userfaultfd, Way, calls, memory_type
from postcopy.pages.regions import Layout, Region
from postcopy.pump.destination import DestinationPump, DestinationStats
from postcopy.pump.regions import Placement
from tests.child import run_in_child
from tests.pump.stage import Stage, Toucher, connection, until

PAGES = 8
KINDS = ["shmem", "hugetlb-2M"]


class Adopted:
    """A region whose file holds data on its even pages and holes between them, trapped by a pump that adopted it."""

    def __init__(self, kind="shmem", start=True):
        self.type = memory_type(kind)
        self.size = self.type.page_size
        region = Region(0, kind, self.size, PAGES * self.size)
        self.mapping = self.type.allocate(region, alias=True)
        for page in range(0, PAGES, 2):
            calls.write_memory(self.mapping.alias + page * self.size, bytes([page + 1]) * 4096)
        modes = Mode.MISSING | Mode.MINOR
        self.uffd = Userfaultfd.open(self.type.features_for(modes) | Feature.THREAD_ID)
        self.uffd.register(self.mapping.address, region.size, modes)
        self.pump = DestinationPump(
            Layout((region,)),
            [self.mapping],
            self.uffd.fd,
            demand=[Placement.CONTINUE],
            push=[Placement.CONTINUE],
            zeropage=[self.type.zero_way(alias=True) is Way.ZEROPAGE],
            poll_max_ns=0,
        )
        self.pump.adopt()
        if start:
            self.pump.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pump.close()
        self.uffd.close()
        self.mapping.close()

    def read(self, page):
        address = self.mapping.address + page * self.size
        return Toucher(memoryview(calls.ffi.buffer(calls.ffi.cast("char *", address), 4096)).cast("B")).done()


def every_page_is_what_it_was(kind):
    with Adopted(kind) as adopted:
        for page in range(PAGES):
            assert adopted.read(page) == bytes([0 if page % 2 else page + 1]) * 4096, page
        until(lambda: adopted.pump.snapshot().fault_latency.count == PAGES, "the record of every fault")
        stats = adopted.pump.snapshot()
        assert (stats.faults_minor, stats.faults_missing, stats.requests) == (PAGES // 2, PAGES // 2, 0)
        assert stats.pages_total == stats.pages_resident == stats.pages_handed_over == PAGES
        assert (stats.bytes_placed, stats.bytes_received_urgent, stats.bytes_received_push) == (0, 0, 0)
        assert (stats.pages_demand, stats.pages_push, stats.pages_zero) == (0, 0, 0)
        for page in range(PAGES):  # mapped for good: no second fault
            adopted.read(page)
        assert adopted.pump.snapshot().faults_minor == PAGES // 2
        assert adopted.pump.status().state == "running"


@pytest.mark.parametrize("kind", KINDS)
def test_every_page_is_what_it_was(kind, huge_pages):
    if kind != "shmem":
        huge_pages(kind, PAGES + 1)
    run_in_child(every_page_is_what_it_was, kind)


def many_threads_on_one_page():
    with Adopted() as adopted:
        begin = threading.Barrier(16)

        def touch():
            begin.wait()
            seen.append(adopted.read(2))

        seen = []
        threads = [threading.Thread(target=touch, daemon=True) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert seen == [bytes([3]) * 4096] * 16


def test_many_threads_on_one_page():
    run_in_child(many_threads_on_one_page)


def a_hole_that_is_made_meanwhile():
    with Adopted() as adopted:
        assert adopted.read(2)[0] == 3
        adopted.pump.discard(0, 2 * adopted.size, adopted.size)
        adopted.mapping.punch_hole(2 * adopted.size, adopted.size)
        adopted.pump.discard(0, 4 * adopted.size, adopted.size)
        adopted.mapping.punch_hole(4 * adopted.size, adopted.size)
        assert adopted.read(2) == adopted.read(4) == bytes(4096)
        assert adopted.read(6)[0] == 7


def test_pages_that_are_given_back_are_zeros():
    run_in_child(a_hole_that_is_made_meanwhile)


def a_failure_is_told_and_whoever_waits_can_be_let_go():
    with Adopted() as adopted:
        # a fault that the pump cannot know of: it ends, and says so although nothing was to come any more
        stray = calls.map_anonymous(4096)
        adopted.uffd.register(stray, 4096, Mode.MISSING)
        touch = threading.Thread(target=calls.read_memory, args=(stray, 1), daemon=True)
        touch.start()
        until(lambda: adopted.pump.status().state == "failed", "the end")
        assert select.select([adopted.pump.event_fd], [], [], 10)[0]
        # what it served goes on without it, on the content that is there
        reader = threading.Thread(target=lambda: seen.append(adopted.read(2)), daemon=True)
        seen = []
        reader.start()
        adopted.uffd.unregister(adopted.mapping.address, PAGES * adopted.size)
        adopted.uffd.unregister(stray, 4096)
        reader.join(10)
        touch.join(10)
        assert seen == [bytes([3]) * 4096]


def test_a_failure_is_told_and_whoever_waits_can_be_let_go():
    run_in_child(a_failure_is_told_and_whoever_waits_can_be_let_go)


def it_wants_no_connections():
    for role in ("urgent", "push"):
        with Stage() as stage, pytest.raises(ValueError, match="adopt: Invalid argument"):
            stage.pump.adopt()
        with Adopted(start=False) as adopted:
            adopted.pump.start()
            near, far = connection()
            with near, pytest.raises(ValueError, match=role):
                adopted.pump.attach(role, far.detach())


def test_a_pump_that_has_connections_cannot_adopt():
    run_in_child(it_wants_no_connections)


def test_without_a_pump_there_is_as_much_to_tell():
    layout = Layout((Region(0, "shmem", 4096, 1 << 20), Region(1, "hugetlb-2M", 1 << 21, 1 << 22)))
    stats = DestinationStats.of_handed_over(layout)
    assert stats.pages_total == stats.pages_resident == stats.pages_handed_over == 258
    assert (stats.bytes_placed, stats.cpu_seconds, stats.fault_latency.count) == (0, 0.0, 0)
    assert set(stats.outcomes) == {"placed", "present", "retry", "gone", "busy"}
