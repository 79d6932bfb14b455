"""One example of each control message, and a strategy for all of them."""

from __future__ import annotations

import zlib

import msgpack
from hypothesis import strategies as st

from postcopy import limits
from postcopy.wire import control
from postcopy.wire.control import Message
from postcopy.wire.latencies import BUCKETS, EMPTY, Latencies, SparseHistogram
from postcopy.wire.messages import PROBE_ANSWERS, REFUSE_CODES
from postcopy.wire.version import FETCH_SINCE

LATENCIES = Latencies(
    SparseHistogram(((352, 2), (500, 1)), 250_000, 180_000),
    (SparseHistogram(((400, limits.HISTOGRAM_COUNT_MAX),), 1 << 63, (1 << 64) - 1), EMPTY),
)

EXAMPLES: list[Message] = [
    control.Hello((2, 3), "postcopy 0.1.0"),
    control.Welcome(
        3, bytes(range(16)), bytes(range(32)), "postcopy 0.1.0", (control.Piece(0, 8192, 4096),), "asked-for"
    ),
    control.Refuse("memory", "the pool of 2 MiB pages has 3, 128 are needed"),
    control.LayoutOffer(
        (control.RegionOffer("shmem", 4096, 8192), control.RegionOffer("hugetlb-2M", 2 << 20, 4 << 20)),
        control.GuestOffer("emulated", 2),
        (4096, 4 << 20),
        "handed-over",
    ),
    control.Ready(),
    control.State(b"\x00\x01\xff", 12.5, "3c5b"),
    control.Loaded(),
    control.Run(),
    control.Running(13.0),
    control.Progress(1, 2, 3, LATENCIES),
    control.AllPlaced({"pages": {"total": 3, "list": [1, None, True, "x", 2.5]}}, LATENCIES),
    control.Released(),
    control.Cancel("the user said so"),
    control.Resume(bytes(range(16)), bytes(range(32))),
    control.Have(1, 4096, 16, zlib.compress(b"\xff\x01")),
    control.Alive(),
    control.Probe((control.RegionOffer("shmem", 4096, 8192),), control.GuestOffer("emulated", 2)),
    control.Probed("memory", "the pool of 2 MiB pages has 3, 128 are needed", "auto", {"kernel": "6.18", "cpus": 2}),
]

_COUNT = st.integers(0, (1 << 64) - 1)
_FLOAT = st.floats(allow_nan=False, allow_infinity=False)
_CHARACTERS = st.characters(exclude_categories=["C", "Z"])
_NAME = st.text(_CHARACTERS, min_size=1, max_size=limits.NAME_CHARS_MAX)
_LINE = st.text(_CHARACTERS, max_size=100)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | _FLOAT | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
_REGION = st.builds(
    control.RegionOffer,
    _NAME,
    st.integers(limits.PAGE_SIZE_MIN, limits.PAGE_SIZE_MAX),
    st.integers(limits.PAGE_SIZE_MIN, (1 << 63) - 1),
)
_BUCKETS = st.dictionaries(st.integers(0, BUCKETS - 1), st.integers(1, limits.HISTOGRAM_COUNT_MAX), max_size=6).map(
    lambda counts: tuple(sorted(counts.items()))
)
_HISTOGRAM = st.builds(SparseHistogram, _BUCKETS, _COUNT, _COUNT)
_LATENCIES = st.builds(Latencies, _HISTOGRAM, st.lists(_HISTOGRAM, max_size=limits.HISTOGRAM_VCPUS_MAX).map(tuple))
_PIECE = st.builds(
    control.Piece,
    st.integers(0, (1 << 63) - 1),
    st.integers(limits.PAGE_SIZE_MIN, (1 << 63) - 1),
    st.integers(limits.PAGE_SIZE_MIN, limits.PAGE_SIZE_MAX),
)

MESSAGES = st.one_of(
    st.builds(
        control.Hello,
        st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(lambda pair: (min(pair), max(pair))),
        _NAME,
    ),
    st.builds(
        control.Welcome,
        st.integers(FETCH_SINCE, 65535),
        st.binary(min_size=16, max_size=16),
        st.binary(min_size=32, max_size=32),
        _NAME,
        st.lists(_PIECE, max_size=4).map(tuple),
        st.sampled_from(["all", "asked-for"]),
    ),
    st.builds(control.Refuse, st.sampled_from(REFUSE_CODES), _LINE),
    st.builds(
        control.LayoutOffer,
        st.lists(_REGION, min_size=1, max_size=4).map(tuple),
        st.builds(control.GuestOffer, _NAME, st.integers(1, limits.VCPUS_MAX)),
        st.lists(_COUNT, max_size=4).map(tuple),
        st.sampled_from(["sent", "handed-over"]),
    ),
    st.builds(control.State, st.binary(max_size=200), _FLOAT, _NAME),
    st.builds(control.Running, _FLOAT),
    st.builds(control.Progress, _COUNT, _COUNT, _COUNT, _LATENCIES),
    st.builds(control.AllPlaced, st.dictionaries(st.text(max_size=8), _JSON, max_size=4), _LATENCIES),
    st.builds(control.Cancel, _LINE),
    st.builds(control.Resume, st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32)),
    st.builds(
        control.Have,
        st.integers(0, limits.REGIONS_MAX - 1),
        _COUNT,
        st.integers(1, limits.HAVE_PAGES_MAX),
        st.binary(min_size=1, max_size=50),
    ),
    st.builds(
        control.Probe,
        st.lists(_REGION, min_size=1, max_size=4).map(tuple),
        st.builds(control.GuestOffer, _NAME, st.integers(1, limits.VCPUS_MAX)),
        st.lists(_COUNT, max_size=4).map(tuple),
    ),
    st.builds(
        control.Probed,
        st.sampled_from(PROBE_ANSWERS),
        _LINE,
        _NAME,
        st.dictionaries(st.text(max_size=8), _JSON, max_size=4),
    ),
    st.sampled_from([control.Ready(), control.Loaded(), control.Run(), control.Released(), control.Alive()]),
)


def wire(values: object) -> bytes:
    """Put any value of msgpack on the wire, as an agent that knows no rules does."""
    return prefixed(msgpack.packb(values))


def prefixed(payload: bytes) -> bytes:
    """Put a length in front."""
    return len(payload).to_bytes(4, "little") + payload


def read(data: bytes) -> dict[str, object]:
    """Return the map of one encoded message."""
    values: dict[str, object] = msgpack.unpackb(data[4:])
    return values
