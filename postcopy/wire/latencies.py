"""How long something took at the other agent, as it travels: histograms, of which only what is not empty is said.

What enters: bytes that arrived, or the histograms of this agent. What leaves: the other one, plain data within its
limits: whoever adds such counts up, or takes those of before from them, needs to check nothing any more.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from operator import lt
from typing import Annotated

from postcopy.limits import HISTOGRAM_COUNT_MAX, HISTOGRAM_VCPUS_MAX
from postcopy.wire.fields import Count, IllTypedError
from postcopy.wire.records import Record, Records

# Those of a log-linear histogram of nanoseconds: 32 to an octave, up to 2^40 ns.
BUCKETS = 1152

# Of each bucket that is not empty: its number in 2 bytes and its count in 8.
_BYTES_EACH = 10

Pairs = tuple[tuple[int, int], ...]


class Buckets:
    """Pairs of a bucket's number and its count, the numbers rising, as bytes: all numbers, behind them all counts."""

    def take(self, value: object) -> Pairs:
        """Return the pairs that the bytes say."""
        if type(value) is not bytes or len(value) % _BYTES_EACH or len(value) > BUCKETS * _BYTES_EACH:
            raise IllTypedError(f"wanted {_BYTES_EACH} bytes for each of 0 to {BUCKETS} buckets")
        size = len(value) // _BYTES_EACH
        words = struct.unpack(f"<{size}H{size}Q", value)
        _check(words[:size], words[size:])
        return tuple(zip(words[:size], words[size:], strict=True))

    def give(self, value: Pairs) -> bytes:
        """Return the bytes that say the pairs."""
        numbers, counts = tuple(zip(*value, strict=True)) or ((), ())
        _check(numbers, counts)
        return struct.pack(f"<{len(value)}H{len(value)}Q", *numbers, *counts)


def _check(numbers: tuple[int, ...], counts: tuple[int, ...]) -> None:
    if not numbers:
        return
    if not (numbers[0] >= 0 and numbers[-1] < BUCKETS and all(map(lt, numbers, numbers[1:]))):
        raise IllTypedError(f"wanted rising numbers of buckets from 0 to {BUCKETS - 1}")
    if not 1 <= min(counts) <= max(counts) <= HISTOGRAM_COUNT_MAX:
        raise IllTypedError(f"wanted counts from 1 to {HISTOGRAM_COUNT_MAX}")


@dataclass(frozen=True, slots=True)
class SparseHistogram:
    """Those `buckets` of a histogram that are not empty, as (number, count); `sum_ns` and `max_ns` of all values."""

    buckets: Annotated[Pairs, Buckets()] = ()
    sum_ns: Count = 0
    max_ns: Count = 0


EMPTY = SparseHistogram()
_RECORD = Record(SparseHistogram)


def fits(histogram: SparseHistogram) -> bool:
    """Whether a histogram can be told: nothing of it is beyond what is taken at the other end."""
    try:
        _RECORD.give(histogram)
    except (IllTypedError, struct.error):
        return False
    return True


@dataclass(frozen=True, slots=True)
class Latencies:
    """What was waited for at the destination: how long `faults` took, and the accesses that stalled each vCPU.

    `stalls` are by the vCPU's number; none where nobody clocks them, or where there are too many vCPUs.
    """

    faults: Annotated[SparseHistogram, _RECORD] = EMPTY
    stalls: Annotated[tuple[SparseHistogram, ...], Records(_RECORD, HISTOGRAM_VCPUS_MAX, 0)] = ()


NOTHING = Latencies()
