"""Metrics as a scrape shows them: what is told, in the format that Prometheus reads."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from agent import metrics
from agent.exposition import Exposition, Family
from postcopy.pump.histogram import BUCKETS, Histogram


@pytest.fixture
def figures():
    recorded = Histogram(tuple(range(BUCKETS)), 10**9, 10**7)
    made = metrics.Figures("destination", remaining_bytes=1 << 40)
    made.counts.fault_latency = made.counts.stall = recorded
    made.counts.migrations["destination", "minor", "failed"] = 3
    made.downtime_seconds = 1.5e-7
    return made


def test_everything_is_told_with_its_labels(figures):
    families = list(text_string_to_metric_families(metrics.Metrics(lambda: figures).text()))
    kinds = {family.name: family.type for family in families}
    assert kinds["postcopy_pages"] == "counter"
    assert kinds["postcopy_fault_latency_seconds"] == "histogram"
    samples = {(one.name, *sorted(one.labels.values())): one.value for family in families for one in family.samples}
    assert samples["postcopy_remaining_bytes",] == 1 << 40
    assert samples["postcopy_migrations_total", "destination", "failed", "minor"] == 3
    assert samples["postcopy_migrations_total", "completed", "destination", "minor"] == 0  # there before it rises
    assert samples["postcopy_migrations_total", "completed", "minor", "source"] == 0  # of a guest that goes on
    assert samples["postcopy_migration_downtime_seconds",] == 1.5e-7
    for le, count in figures.counts.fault_latency.prometheus_buckets():
        assert samples["postcopy_fault_latency_seconds_bucket", str(float(le)) if le != "+Inf" else le] == count
    assert samples["postcopy_stall_seconds_count",] == sum(range(BUCKETS))
    assert samples["process_resident_memory_bytes",] > 0


def test_a_text_is_what_prometheus_client_writes_whatever_its_numbers():
    """It is written whole once, and into that numbers are filled."""
    exposition = Exposition()
    odd = 'of 100 %s, "a\\b"\n'
    for number in (0, 7, 7, 0.25, 3e-7, 1 << 60, 2.5e20, 0):
        registry = CollectorRegistry()
        counter = CounterMetricFamily("p_odd", odd, labels=("b", "a"))
        counter.add_metric(("x", odd), number)
        counter.add_metric(("y", ""), number + 1)
        buckets = [("0.5", number), ("+Inf", number + 2)]
        written = [
            counter,
            GaugeMetricFamily("p_one", "One.", value=number),
            HistogramMetricFamily("p_long", "Long.", buckets=buckets, sum_value=number / 3),
        ]
        registry.register(type("Known", (), {"collect": lambda _, written=written: written})())
        ours = exposition.text_of(
            [
                (Family("p_odd", "counter", odd, ("b", "a"), (("x", odd), ("y", ""))), [number, number + 1]),
                (Family("p_one", "gauge", "One."), [number]),
                (
                    Family("p_long", "histogram", "Long.", ("le",), tuple((le,) for le, _ in buckets)),
                    [*(count for _, count in buckets), number + 2, number / 3],
                ),
            ]
        )
        assert [with_number(line) for line in ours.splitlines()] == [
            with_number(line) for line in generate_latest(registry).decode().splitlines()
        ]


def with_number(line):
    start, _, number = line.rpartition(" ")
    return line if line.startswith("#") else (start, float(number))


def test_what_comes_and_goes_is_told_while_it_is_there(figures):
    told = metrics.Metrics(lambda: figures)
    stalls = 'postcopy_stall_seconds_bucket{le="+Inf"}'
    with_guest, recorded = told.text(), figures.counts.stall
    figures.counts.stall = None
    assert stalls in with_guest
    assert stalls not in told.text()
    figures.counts.stall, figures.counts.reconnects = recorded, 5
    assert told.text().count("\n") == with_guest.count("\n")
    assert "postcopy_reconnects_total 5\n" in told.text()


def test_what_many_files_tell_is_read_once_in_four_seconds(figures, monkeypatch):
    reads = []
    monkeypatch.setattr(metrics, "host_families", lambda: reads.append(1) or [])
    told = metrics.Metrics(lambda: figures)
    for now in (100.0, 103.9, 104.0):
        monkeypatch.setattr(metrics.time, "monotonic", lambda now=now: now)
        assert "process_open_fds" in told.text()
    assert len(reads) == 2


def test_one_number_or_one_series_more_changes_its_line_alone():
    exposition = Exposition()

    def text(first, second, total=1.0, more=()):
        found = exposition.text_of(
            [
                (Family("p_first", "gauge", "One.", ("a",), (("x",), *more)), [first, *(7 for _ in more)]),
                (Family("p_second", "histogram", "Two.", ("le",), (("1",), ("+Inf",))), [0, second, second, total]),
            ]
        )
        return [line for line in found.splitlines() if not line.startswith("#")]

    before = text(1, 2)
    assert before == ['p_first{a="x"} 1', *before[1:]]
    assert changed(before, text(5, 2)) == ['p_first{a="x"} 5']
    assert changed(text(5, 2), text(5, 3)) == ['p_second_bucket{le="+Inf"} 3', "p_second_count 3"]
    assert changed(text(5, 3), text(5, 3, 2.5)) == ["p_second_sum 2.5"]
    assert text(5, 3, more=[("y",)])[:2] == ['p_first{a="x"} 5', 'p_first{a="y"} 7']
    assert text(5, 3) == text(5, 3, more=[])
    assert len(text(5, 3)) == len(before)


def changed(before, after):
    assert len(before) == len(after)
    return [new for old, new in zip(before, after, strict=True) if new != old]
