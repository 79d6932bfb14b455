"""Log-linear histograms of nanoseconds, as the C threads record them: 32 buckets to an octave, about 3 % resolution.

In: the counters of a `struct hist` (postcopy/pump/histogram.h). Out: quantiles in seconds, a summary for the report,
cumulative power-of-two buckets for Prometheus. A `Histogram` is a value: a snapshot that no longer changes.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import sub
from typing import Any

from postcopy.pump._pump import ffi as pump_ffi
from postcopy.pump._pump import lib
from postcopy.wire import latencies

BUCKETS = latencies.BUCKETS
_SUB_BITS = 5
_SUB = 1 << _SUB_BITS
_PROMETHEUS_OCTAVES = 24  # le = 2**i microseconds, i = 0..23: the buckets of QEMU's postcopy-latency-dist
_NANOSECONDS = 1e9


def bucket_lower_ns(index: int) -> int:
    """Return the smallest value, in nanoseconds, that bucket `index` counts; `index` may be BUCKETS for the end."""
    if index < 2 * _SUB:
        return index
    octave = index // _SUB + _SUB_BITS - 1
    return (_SUB + index % _SUB) << (octave - _SUB_BITS)


_LOWER_NS = tuple(bucket_lower_ns(index) for index in range(BUCKETS + 1))


# A signed word for each count, whatever becomes of the difference of two.
_WORD = "q"
_WORD_BYTES = 8
_NOTHING = bytes(_WORD_BYTES * BUCKETS)


@dataclass(frozen=True, slots=True)
class Histogram:
    """A snapshot: `buckets` holds BUCKETS counts; `sum_ns` and `max_ns` are exact, everything else to 3 %.

    The counts are kept as C's own words: a scrape copies them and adds them up without a Python number for each.
    """

    buckets: Sequence[int] = field(default_factory=lambda: array(_WORD, _NOTHING))
    sum_ns: int = 0
    max_ns: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.buckets, array):
            object.__setattr__(self, "buckets", array(_WORD, self.buckets))

    @classmethod
    def from_words(cls, words: memoryview) -> Histogram:
        """Build from the words of a `struct hist` (format "Q"): count, sum, max, then the buckets.

        The count is taken from the buckets: while a thread records, its own counter may be a record behind.
        """
        buckets = array(_WORD)
        buckets.frombytes(words[3 : 3 + BUCKETS].cast("B"))
        return cls(buckets, words[1], words[2])

    @classmethod
    def from_sparse(cls, sparse: Mapping[str, Any]) -> Histogram:
        """Build from what sparse() returned."""
        buckets = [0] * BUCKETS
        for index, count in sparse["buckets"]:
            buckets[index] = count
        return cls(buckets, sparse["sum_ns"], sparse["max_ns"])

    def sparse(self) -> dict[str, Any]:
        """Return it as plain data: "buckets" are pairs of index and count, those that are empty left out."""
        pairs = [[index, count] for index, count in enumerate(self.buckets) if count]
        return {"buckets": pairs, "sum_ns": self.sum_ns, "max_ns": self.max_ns}

    def span(self) -> tuple[int, Sequence[int]]:
        """Return the counts from the first bucket that is not empty to the last, and that first one's number."""
        whole: bytes = pump_ffi.buffer(_words(self.buckets))[:]
        first = (len(whole) - len(whole.lstrip(b"\0"))) // _WORD_BYTES
        return first, self.buckets[first : -(-len(whole.rstrip(b"\0")) // _WORD_BYTES)]

    @property
    def count(self) -> int:
        """How many values were recorded."""
        return sum(self.buckets)

    def quantile(self, fraction: float) -> float:
        """Return, in seconds, the middle of the bucket in which the given fraction of all values is reached.

        0.0 where nothing was recorded; never more than the recorded maximum.
        """
        count = self.count
        if not count:
            return 0.0
        index = bisect_left(list(accumulate(self.buckets)), max(1, fraction * count))
        middle = (_LOWER_NS[index] + _LOWER_NS[index + 1] - 1) / 2
        return min(middle, self.max_ns) / _NANOSECONDS

    def summary(self) -> dict[str, float]:
        """Return the figures of the report, in seconds: count, p50, p90, p99, p999, max, mean and sum."""
        count = self.count
        return {
            "count": count,
            "p50": self.quantile(0.5),
            "p90": self.quantile(0.9),
            "p99": self.quantile(0.99),
            "p999": self.quantile(0.999),
            "max": self.max_ns / _NANOSECONDS,
            "mean": self.sum_ns / count / _NANOSECONDS if count else 0.0,
            "sum": self.sum_ns / _NANOSECONDS,
        }

    def prometheus_buckets(self) -> list[tuple[str, int]]:
        """Return cumulative (le, count) pairs, le = 2**i / 1e6 seconds for i = 0..23, then +Inf.

        A bucket that straddles a bound (it is 3 % wide) counts as above it.
        """
        return list(zip(PROMETHEUS_BOUNDS, self.cumulative(), strict=True))

    def cumulative(self) -> list[int]:
        """Return the counts of prometheus_buckets() alone: a number for each of PROMETHEUS_BOUNDS."""
        ends = len(PROMETHEUS_BOUNDS)
        lib.hist_below(_words(self.buckets), _ENDS, ends, below := pump_ffi.new("int64_t[]", ends))
        counts: list[int] = pump_ffi.unpack(below, ends)
        return counts

    def bounds(self, width: int = 1) -> list[tuple[float, int]]:
        """Return (upper bound in seconds, count) of every `width` buckets that are not empty together."""
        found = []
        for start in range(0, BUCKETS, width):
            count = sum(self.buckets[start : start + width])
            if count:
                found.append((min(_LOWER_NS[start + width] - 1, self.max_ns) / _NANOSECONDS, count))
        return found

    def merge(self, other: Histogram) -> Histogram:
        """Return the histogram of both sets of values."""
        buckets = self.buckets[:]
        lib.hist_add_up(_words(buckets), _words(other.buckets))
        return Histogram(buckets, self.sum_ns + other.sum_ns, max(self.max_ns, other.max_ns))

    def since(self, earlier: Histogram) -> Histogram:
        """Return what was recorded after the snapshot `earlier` of the same histogram; its maximum is of a bucket."""
        buckets = array(_WORD, map(sub, self.buckets, earlier.buckets))
        last = max((index for index, count in enumerate(buckets) if count), default=0)
        highest = min(self.max_ns, _LOWER_NS[last + 1] - 1) if any(buckets) else 0
        return Histogram(buckets, self.sum_ns - earlier.sum_ns, highest)


def read_histogram(ffi: Any, hist: Any) -> Histogram:
    """Snapshot a `struct hist` that a cffi module declares (each has an `ffi` of its own)."""
    return Histogram.from_words(memoryview(ffi.buffer(ffi.addressof(hist))).cast("B").cast("Q"))


def _words(buckets: Sequence[int]) -> Any:
    return pump_ffi.from_buffer("int64_t[]", buckets)


def _whole_buckets_below(bound_ns: int) -> int:
    """Return how many buckets lie wholly at or below a bound."""
    index = bisect_left(_LOWER_NS, bound_ns + 1)
    return index - 1 if _LOWER_NS[index] > bound_ns + 1 else index


_BELOW = tuple(_whole_buckets_below(2**octave * 1000) for octave in range(_PROMETHEUS_OCTAVES))
PROMETHEUS_BOUNDS = (*(repr(2**octave / 1e6) for octave in range(_PROMETHEUS_OCTAVES)), "+Inf")
_ENDS = pump_ffi.new("uint32_t[]", (*_BELOW, BUCKETS))
