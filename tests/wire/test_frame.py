"""Frame headers: bytes and back, each refusal, and a judge of its own for random headers."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from postcopy.errors import ProtocolError
from postcopy.limits import FRAME_BYTES_MAX
from postcopy.pages import Layout, Region
from postcopy.wire import frame
from postcopy.wire.frame import Direction, FrameRefusal, FrameType, Header

SMALL, HUGE, GIANT = 4096, 2 << 20, 1 << 30
LAYOUT = Layout(
    (
        Region(0, "shmem", SMALL, 64 << 20),
        Region(1, "hugetlb-2M", HUGE, 64 << 20),
        Region(2, "hugetlb-1G", GIANT, 4 << 30),
    )
)
U64 = (1 << 64) - 1
R = FrameRefusal


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Headers that are mostly nearly right: a random one fails at its magic and tests nothing else."""
    rarely = st.sampled_from([0] * 12 + [1])
    numbers = st.one_of(
        st.sampled_from([0, SMALL, HUGE, GIANT, FRAME_BYTES_MAX, 64 << 20, (64 << 20) - SMALL, U64, U64 - SMALL + 1]),
        st.integers(0, 1 << 15).map(lambda pages: pages * SMALL),
        st.integers(0, U64),
    )
    return Header(
        draw(st.integers(0, 6)),
        draw(st.sampled_from([0, 0, 1, 2, 3, 65535])),
        draw(numbers),
        draw(numbers),
        frame.FRAME_MAGIC ^ draw(rarely),
        draw(rarely),
        draw(rarely),
    )


def reasons(header: Header, direction: Direction) -> set[FrameRefusal]:
    """Everything that is wrong with a header, each judged by itself: slow, plain, and in no order."""
    wrong = set()
    if header.magic != 0x5043:
        wrong.add(R.MAGIC)
    allowed = {
        Direction.TO_SOURCE: {1, 5},
        Direction.PUSH_TO_SOURCE: {5},
        Direction.URGENT: {2, 3, 5},
        Direction.PUSH: {2, 3, 4, 5},
    }
    if header.type not in allowed[direction]:
        wrong.add(R.TYPE)
    if header.flags != 0 or header.reserved != 0:
        wrong.add(R.RESERVED)
    if header.type in {4, 5}:
        return wrong | ({R.RESERVED} if (header.region, header.offset, header.length) != (0, 0, 0) else set())
    if header.region > 2:
        return wrong | {R.REGION}
    page, size = [(SMALL, 64 << 20), (HUGE, 64 << 20), (GIANT, 4 << 30)][header.region]
    if header.offset % page or header.length % page or header.length == 0:
        wrong.add(R.ALIGNMENT)
    if header.length > {1: page, 2: max(page, FRAME_BYTES_MAX)}.get(header.type, header.length):
        wrong.add(R.LIMIT)
    if header.offset + header.length > size:
        wrong.add(R.RANGE)
    return wrong


ORDER = [R.MAGIC, R.TYPE, R.RESERVED, R.REGION, R.ALIGNMENT, R.LIMIT, R.RANGE]


@given(headers(), st.sampled_from(Direction))
@example(Header(FrameType.ZERO, 0, U64 - SMALL + 1, SMALL), Direction.PUSH)
@example(Header(FrameType.END, 0, 0, 0), Direction.PUSH)
def test_the_first_reason_in_order_is_named(header: Header, direction: Direction) -> None:
    wrong = reasons(header, direction)
    wanted = next((reason for reason in ORDER if reason in wrong), R.OK)
    assert frame.refusal(header, LAYOUT, direction) is wanted
    if wanted is R.OK:
        frame.validate(header, LAYOUT, direction)
    else:
        with pytest.raises(ProtocolError, match="frame refused: "):
            frame.validate(header, LAYOUT, direction)


@pytest.mark.parametrize(
    ("header", "direction", "reason"),
    [
        (Header(1, 0, 0, SMALL), Direction.TO_SOURCE, R.OK),
        (Header(1, 2, GIANT, GIANT), Direction.TO_SOURCE, R.OK),
        (Header(1, 0, 0, 2 * SMALL), Direction.TO_SOURCE, R.LIMIT),
        (Header(1, 0, 0, SMALL), Direction.PUSH, R.TYPE),
        (Header(2, 0, 0, SMALL), Direction.TO_SOURCE, R.TYPE),
        (Header(2, 0, 0, FRAME_BYTES_MAX), Direction.PUSH, R.OK),
        (Header(2, 0, 0, FRAME_BYTES_MAX + SMALL), Direction.PUSH, R.LIMIT),
        (Header(2, 2, 0, GIANT), Direction.URGENT, R.OK),
        (Header(2, 2, 0, 2 * GIANT), Direction.URGENT, R.LIMIT),
        (Header(2, 0, 0, 0), Direction.PUSH, R.ALIGNMENT),
        (Header(2, 0, 1, SMALL), Direction.PUSH, R.ALIGNMENT),
        (Header(2, 1, SMALL, HUGE), Direction.PUSH, R.ALIGNMENT),
        (Header(2, 0, 64 << 20, SMALL), Direction.PUSH, R.RANGE),
        (Header(2, 0, (64 << 20) - SMALL, 2 * SMALL), Direction.PUSH, R.RANGE),
        (Header(2, 0, U64 - SMALL + 1, SMALL), Direction.PUSH, R.RANGE),
        (Header(2, 0, U64 - SMALL + 1, 2 * SMALL), Direction.PUSH, R.RANGE),
        (Header(3, 0, 0, 64 << 20), Direction.PUSH, R.OK),
        (Header(3, 0, SMALL, 64 << 20), Direction.PUSH, R.RANGE),
        (Header(3, 0, 0, 128 << 20), Direction.PUSH, R.RANGE),
        (Header(3, 3, 0, SMALL), Direction.PUSH, R.REGION),
        (Header(4, 0, 0, 0), Direction.PUSH, R.OK),
        (Header(4, 0, 0, 0), Direction.URGENT, R.TYPE),
        (Header(4, 1, 0, 0), Direction.PUSH, R.RESERVED),
        (Header(4, 0, 0, SMALL), Direction.PUSH, R.RESERVED),
        (Header(0, 0, 0, SMALL), Direction.PUSH, R.TYPE),
        (Header(2, 0, 0, SMALL, flags=1), Direction.PUSH, R.RESERVED),
        (Header(2, 0, 0, SMALL, reserved=1), Direction.PUSH, R.RESERVED),
        (Header(2, 0, 0, SMALL, magic=0x4350), Direction.PUSH, R.MAGIC),
    ],
)
def test_the_cases_that_matter(header: Header, direction: Direction, reason: FrameRefusal) -> None:
    assert frame.refusal(header, LAYOUT, direction) is reason


@given(headers())
def test_bytes_and_back(header: Header) -> None:
    data = frame.pack(header)
    assert len(data) == 24 == frame.HEADER_BYTES
    assert frame.unpack(data) == header


@pytest.mark.parametrize("size", [0, 23, 25])
def test_a_truncated_header(size: int) -> None:
    with pytest.raises(ProtocolError, match=f"truncated, {size} of 24 bytes"):
        frame.unpack(bytes(size))


def test_only_pages_have_a_payload() -> None:
    assert Header(FrameType.PAGES, 0, 0, SMALL).payload_bytes == SMALL
    for kind in (FrameType.REQUEST, FrameType.ZERO, FrameType.END, FrameType.BEAT):
        assert Header(kind, 0, 0, SMALL).payload_bytes == 0


def test_what_may_arrive_where_as_bits() -> None:
    assert Direction.TO_SOURCE.allowed == 0b100010
    assert Direction.PUSH_TO_SOURCE.allowed == 0b100000
    assert Direction.URGENT.allowed == 0b101100
    assert Direction.PUSH.allowed == 0b111100
