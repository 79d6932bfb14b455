"""Histograms: the C bucket index, quantiles within the resolution, Prometheus buckets, merging and differences."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from postcopy.pump._pump import lib
from postcopy.pump.histogram import BUCKETS, Histogram, bucket_lower_ns

NS = st.integers(0, 2**40 - 1)


def recorded(values: list[int]) -> Histogram:
    buckets = [0] * BUCKETS
    for value in values:
        buckets[lib.hist_index_of(value)] += 1
    return Histogram(tuple(buckets), sum(values), max(values, default=0))


@given(NS)
def test_a_value_lies_in_its_bucket(value: int) -> None:
    index = lib.hist_index_of(value)
    assert bucket_lower_ns(index) <= value < bucket_lower_ns(index + 1)
    assert bucket_lower_ns(index + 1) - bucket_lower_ns(index) <= max(1, value / 32)


def test_what_is_too_long_is_counted_in_the_last_bucket() -> None:
    assert lib.HIST_BUCKETS == BUCKETS
    assert lib.hist_index_of(2**63) == lib.hist_index_of(2**40) == BUCKETS - 1


@given(st.lists(NS, min_size=1, max_size=200), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_exact_to_the_resolution(values: list[int], fraction: float) -> None:
    rank = max(1, -(-fraction * len(values) // 1))
    exact = sorted(values)[int(rank) - 1]
    assert abs(recorded(values).quantile(fraction) * 1e9 - exact) <= max(1, exact / 32)


def test_nothing_recorded_is_all_zero() -> None:
    assert set(Histogram().summary().values()) == {0}


@given(st.lists(NS, max_size=20))
def test_a_span_has_all_that_is_not_empty(values: list[int]) -> None:
    histogram = recorded(values)
    first, counts = histogram.span()
    assert [0] * first + list(counts) + [0] * (BUCKETS - first - len(counts)) == list(histogram.buckets)
    assert not values or (counts[0] and counts[-1])


@given(st.lists(NS, max_size=100))
def test_prometheus_buckets_never_claim_more_than_is_below(values: list[int]) -> None:
    histogram = recorded(values)
    pairs = histogram.prometheus_buckets()
    counts = [count for _, count in pairs]
    assert counts == sorted(counts)
    assert counts[-1] == histogram.count == len(values)
    assert [le for le, _ in pairs][:3] == ["1e-06", "2e-06", "4e-06"]
    assert len(pairs) == 25
    for le, count in pairs[:-1]:
        bound = round(float(le) * 1e9)
        assert sum(v <= bound * 31 // 32 for v in values) <= count <= sum(v <= bound for v in values)


@given(st.lists(NS, max_size=50), st.lists(NS, max_size=50))
def test_merging_and_subtracting_are_inverse(first: list[int], second: list[int]) -> None:
    both = recorded(first).merge(recorded(second))
    assert both == recorded(first + second)
    later = both.since(recorded(first))
    assert later.buckets == recorded(second).buckets
    assert later.sum_ns == sum(second)
    assert later.max_ns >= max(second, default=0) * 31 // 32
