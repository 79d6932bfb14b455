"""The source's pump, with the test in the destination's place: what it answers, what it pushes, what it never reads."""

from __future__ import annotations

import os
import select
from types import SimpleNamespace
from typing import Any

import pytest

from postcopy.errors import HostError
from postcopy.limits import AGAIN_BYTES_MAX
from postcopy.pages.bitmap import Bitmap
from postcopy.pages.regions import Layout, Region
from postcopy.plan.push import PushExtent
from postcopy.pump.source import RING_EXTENTS, SourcePump
from postcopy.wire.frame import FrameType, Header, pack
from tests.pump.source_stage import PAGE, Source, frame_from, receive
from tests.pump.stage import until


@pytest.mark.usefixtures("small_pages")
def test_a_request_is_answered_with_the_page_or_the_news_that_it_is_zero(make: Any) -> None:
    source = make(8, data={0, 3}, zeroed={4})
    source.ask(3, 4, 5)
    assert frame_from(source.urgent) == (Header(FrameType.PAGES, 0, 3 * PAGE, PAGE), source.content(3))
    assert frame_from(source.urgent) == (Header(FrameType.ZERO, 0, 4 * PAGE, PAGE), b"")
    assert frame_from(source.urgent) == (Header(FrameType.ZERO, 0, 5 * PAGE, PAGE), b"")
    stats = source.pump.snapshot()
    assert (stats.requests, stats.pages_demand, stats.pages_zero) == (3, 1, 2)
    assert os.fstat(source.fd).st_blocks * 512 == 3 * PAGE, "a hole was read and so allocated"


def test_a_page_asked_for_twice_is_sent_once(make: Any) -> None:
    source = make(4, data={0, 1})
    source.ask(1, 1, 0)
    assert frame_from(source.urgent)[0].offset == PAGE
    assert frame_from(source.urgent)[0].offset == 0
    assert source.pump.snapshot().requests_ignored == 1
    until(lambda: source.pump.snapshot().requests_answered == 2, "the account of both answers")
    assert source.pump.snapshot().answer_seconds > 0


def test_the_owner_hears_once_where_the_latest_request_was(make: Any) -> None:
    source = make(4, data={0, 1, 3})
    assert source.pump.demanded() is None
    source.ask(1, 0)
    frame_from(source.urgent), frame_from(source.urgent)
    assert source.pump.demanded() == (0, 0)
    assert source.pump.demanded() is None
    source.ask(3)
    frame_from(source.urgent)
    assert source.pump.demanded() == (0, 3 * PAGE)


def test_requests_in_pieces(make: Any) -> None:
    source = make(4, data={2})
    request = pack(Header(FrameType.REQUEST, 0, 2 * PAGE, PAGE))
    for byte in request:
        source.urgent.sendall(bytes([byte]))
    assert frame_from(source.urgent)[1] == source.content(2)


def test_more_requests_than_are_answered_at_a_time(make: Any) -> None:
    count = 500
    source = make(count, data=set(range(count)))
    source.ask(*range(count))
    for page in range(count):
        header, content = frame_from(source.urgent)
        assert (header.offset, content) == (page * PAGE, source.content(page))


def test_the_push_sends_runs_once_and_skips_what_was_asked_for(make: Any) -> None:
    source = make(16, data=set(range(10)), zeroed={10, 11}, frame_bytes=4 * PAGE)
    source.ask(2)
    frame_from(source.urgent)
    source.order(0, 12)
    source.order(0, 12)  # again: nothing is left of it
    source.order(12, 4, zero=True)
    source.pump.push_end()
    frames = []
    while not frames or frames[-1][0].type != FrameType.END:
        frames.append(frame_from(source.push))
    told = [(header.type, header.offset // PAGE, header.length // PAGE) for header, _ in frames[:-1]]
    assert told == [(2, 0, 2), (2, 3, 4), (2, 7, 3), (3, 10, 2), (3, 12, 4)]
    for header, content in frames[:3]:
        first = header.offset // PAGE
        assert content == b"".join(source.content(page) for page in range(first, first + header.length // PAGE))
    stats = source.pump.snapshot()
    assert (stats.pages_push, stats.pages_zero, stats.pages_demand) == (9, 6, 1)


def test_frames_are_short_only_while_pages_are_asked_for(make: Any) -> None:
    pages = 1024
    source = make(pages, data=set(range(pages)))
    source.ask(pages - 1)
    frame_from(source.urgent)
    source.order(0, 512)
    source.order(512, 512)
    frames = [frame_from(source.push)[0] for _ in range(3)]
    assert [(frame.offset // PAGE, frame.length // PAGE) for frame in frames] == [(0, 64), (64, 448), (512, 511)]


@pytest.mark.parametrize("page_size", [PAGE, 2 << 20])
def test_a_request_for_a_pushed_page_overtakes_the_push_once(make: Any, page_size: int) -> None:
    source = make(4, data={0, 1}, page_size=page_size)
    source.order(0, 2)
    frame_from(source.push)
    source.ask(0, 0)
    assert frame_from(source.urgent)[1] == source.content(0)
    until(lambda: source.pump.snapshot().requests == 2)
    stats = source.pump.snapshot()
    assert (stats.pages_again, stats.requests_ignored) == (1, 1)


def test_a_page_larger_than_the_limit_is_not_worth_sending_twice(make: Any) -> None:
    size = 2 * AGAIN_BYTES_MAX
    source = make(2, data={0, 1}, page_size=size)
    source.order(0, 1)
    assert frame_from(source.push)[1] == source.content(0)
    source.ask(0, 1)
    header, content = frame_from(source.urgent)
    assert (header.offset, content) == (size, source.content(1))
    assert source.pump.snapshot().requests_ignored == 1


def test_the_ring_says_when_it_runs_low_and_when_it_is_full(make: Any) -> None:
    source = make(64, data=set(range(64)))
    extents = [PushExtent(0, (i % 64) * PAGE, PAGE, True) for i in range(RING_EXTENTS + 100)]
    total = source.pump.push(extents)
    assert RING_EXTENTS <= total <= RING_EXTENTS + 100
    assert select.select([source.pump.low_fd], [], [], 10)[0]
    os.read(source.pump.low_fd, 8)
    assert not select.select([source.pump.low_fd], [], [], 0)[0]
    while total < 2 * RING_EXTENTS:
        total += source.pump.push(extents)
    assert select.select([source.pump.low_fd], [], [], 10)[0]


@pytest.mark.parametrize("extent", [(1, 0, PAGE), (0, 1, PAGE), (0, 0, 0), (0, 3 * PAGE, 2 * PAGE)])
def test_an_order_that_is_no_page_run_is_a_mistake_of_ours(make: Any, extent: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no run of pages"):
        make(4, data={0}).pump.push([PushExtent(*extent, False)])


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (Header(FrameType.REQUEST, 0, 4 * PAGE, PAGE), "range"),
        (Header(FrameType.REQUEST, 1, 0, PAGE), "region"),
        (Header(FrameType.REQUEST, 0, 1, PAGE), "alignment"),
        (Header(FrameType.REQUEST, 0, 0, 2 * PAGE), "limit"),
        (Header(FrameType.PAGES, 0, 0, PAGE), "type"),
        (Header(FrameType.REQUEST, 0, 0, PAGE, magic=0x4745), "magic"),
    ],
)
def test_a_bad_request_ends_it_with_the_reason(make: Any, header: Header, reason: str) -> None:
    source = make(4, data={0})
    source.urgent.sendall(pack(header))
    assert select.select([source.pump.event_fd], [], [], 10)[0]
    status = source.pump.status()
    assert status.state == "broken"
    assert f"refused ({reason})" in str(status.error)


@pytest.mark.parametrize("role", ["urgent", "push"])
def test_a_connection_that_ends_is_told(make: Any, role: str) -> None:
    source = make(4, data={0})
    getattr(source, role).close()
    assert select.select([source.pump.event_fd], [], [], 10)[0]
    assert f"the {role} connection was closed by the destination" in str(source.pump.status().error)


def test_nothing_of_a_running_guest_is_read(make: Any) -> None:
    source = make(4, data={0}, stopped=False)
    with pytest.raises(RuntimeError, match="when the guest has stopped"):
        source.order(0, 1)
    source.ask(0)
    assert select.select([source.pump.event_fd], [], [], 10)[0]
    assert "while the guest still ran here" in str(source.pump.status().error)
    assert source.pump.snapshot().bytes_sent_urgent == 0


def test_it_stops_while_the_other_side_reads_nothing(make: Any) -> None:
    pages = 16384
    source = make(pages, data=set(range(pages)))
    source.order(0, pages)
    source.ask(*range(400))
    until(lambda: source.pump.snapshot().bytes_sent_push > 0)
    source.pump.stop()
    assert source.pump.status().state == "running"


@pytest.mark.parametrize("asked", ["urgent", "push"])
def test_a_file_that_became_shorter_is_an_error_and_not_zeros(asked: str) -> None:
    source = Source(8, data={0, 5}, read=True)
    if asked == "urgent":
        source.ask(2)
        assert frame_from(source.urgent)[0] == Header(FrameType.ZERO, 0, 2 * PAGE, PAGE)
    os.ftruncate(source.fd, 6 * PAGE)  # page 3 begins there
    if asked == "urgent":
        source.ask(3)
    else:
        source.order(0, 8)
    assert select.select([source.pump.event_fd], [], [], 10)[0]
    assert "the file behind the memory cannot be read: it has become shorter" in str(source.pump.status().error)
    stats = source.pump.snapshot()
    assert (stats.pages_push, stats.pages_zero) == (0, int(asked == "urgent"))
    source.close()


@pytest.mark.parametrize("asked", ["urgent", "push", "hole"])
def test_a_file_that_was_emptied_and_grown_again_is_an_error_and_not_zeros(asked: str) -> None:
    source = Source(8, data={0, 5}, read=True)
    size = os.fstat(source.fd).st_size
    os.ftruncate(source.fd, 0)
    os.ftruncate(source.fd, size)
    if asked == "urgent":
        source.ask(5)
    else:
        source.order(0, 8, zero=asked == "hole")
    assert select.select([source.pump.event_fd], [], [], 10)[0]
    assert "it was written to while it was served" in str(source.pump.status().error)
    stats = source.pump.snapshot()
    assert (stats.pages_push, stats.pages_zero, stats.pages_demand) == (0, 0, 0)
    source.close()


def test_a_region_with_neither_mapping_nor_file_is_refused() -> None:
    region = Region(0, "shmem", PAGE, PAGE)
    mapping = SimpleNamespace(region=region, address=0, alias=0, fd=-1, fd_offset=0)
    with pytest.raises(HostError, match="Invalid argument"):
        SourcePump(Layout((region,)), [mapping], poll_max_ns=0)


def test_what_the_destination_has_is_not_pushed_and_yet_answered(make: Any) -> None:
    has = Bitmap(8)
    for page in (1, 2, 7):
        has.set(page)
    source = make(8, data=set(range(8)), has=has)
    source.order(0, 8)
    source.pump.push_end()
    frames = []
    while not frames or frames[-1][0].type != FrameType.END:
        frames.append(frame_from(source.push))
    assert [(header.offset // PAGE, header.length // PAGE) for header, _ in frames[:-1]] == [(0, 1), (3, 4)]
    source.ask(7)
    assert frame_from(source.urgent)[1] == source.content(7)
    with pytest.raises(ValueError, match="no 8 pages from page 1 on"):
        source.pump.skip(0, 1, has)


BEAT = pack(Header(FrameType.BEAT, 0, 0, 0))


def test_both_connections_have_heartbeats_and_silence_counts_once_it_is_watched_for(make: Any) -> None:
    source = make(4, data={0}, beat_ns=20_000_000)
    for end in (source.urgent, source.push):
        assert receive(end, 48) == BEAT + BEAT
    assert source.pump.status().state == "running"
    source.pump.watch()
    assert select.select([source.pump.event_fd], [], [], 10)[0]
    assert "nothing was heard from the destination on the" in str(source.pump.status().error)


@pytest.mark.parametrize("role", ["urgent", "push"])
def test_one_connection_that_is_silent_is_enough(make: Any, role: str) -> None:
    source = make(4, data={0}, beat_ns=200_000_000)
    source.pump.watch()
    other = source.push if role == "urgent" else source.urgent
    while source.pump.status().state == "running":
        assert receive(other, 24) == BEAT
        other.sendall(BEAT)
    assert f"on the {role} connection any more" in str(source.pump.status().error)


def test_heartbeats_keep_a_push_alive_that_sends_nothing_and_end_with_it(make: Any) -> None:
    source = make(4, data={0, 1}, beat_ns=200_000_000)
    source.pump.watch()
    source.order(0, 1)
    assert frame_from(source.push)[1] == source.content(0)
    source.pump.push_end()
    assert frame_from(source.push)[0].type == FrameType.END
    for _ in range(6):
        for end in (source.urgent, source.push):
            assert receive(end, 24) == BEAT
            end.sendall(BEAT)
    source.ask(1)
    assert frame_from(source.urgent)[1] == source.content(1)
    assert source.pump.status().state == "running"
    source.push.sendall(pack(Header(FrameType.REQUEST, 0, 0, PAGE)))
    assert select.select([source.pump.event_fd], [], [], 10)[0]
    assert "refused (type)" in str(source.pump.status().error)


def test_a_destination_that_reads_no_push_is_told_from_one_that_is_gone(make: Any) -> None:
    pages = 16384
    source = make(pages, data=set(range(pages)), beat_ns=200_000_000)
    source.pump.watch()
    source.order(0, pages)
    for _ in range(8):
        assert receive(source.urgent, 24) == BEAT
        source.urgent.sendall(BEAT)
        source.push.sendall(BEAT)
    assert source.pump.status().state == "running"
    while source.pump.status().state == "running":
        source.urgent.sendall(BEAT)
        receive(source.urgent, 24)
    assert "on the push connection any more" in str(source.pump.status().error)
