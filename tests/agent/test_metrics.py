"""Metrics as a scrape shows them, over HTTP, and what a scrape may not do."""

import asyncio
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent import metrics
from postcopy.link.address import TcpAddress
from postcopy.pump.histogram import BUCKETS, Histogram


@pytest.fixture
def figures():
    recorded = Histogram(tuple(range(BUCKETS)), 10**9, 10**7)
    made = metrics.Figures("destination", fault_latency=recorded, stall=recorded, remaining_bytes=1 << 40)
    made.migrations["destination", "minor", "failed"] = 3
    made.downtime_seconds = 1.5e-7
    return made


def scraped(figures, scrape):
    """Serve the metrics while `scrape(url)` runs in a thread; return what it returns."""

    async def body():
        url = metrics.serve(TcpAddress("127.0.0.1", 0), figures)
        return await asyncio.to_thread(scrape, url)

    return asyncio.run(body())


def fetch(url):
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read().decode()


def test_everything_is_told_with_its_labels(figures):
    families = list(text_string_to_metric_families(scraped(lambda: figures, fetch)))
    kinds = {family.name: family.type for family in families}
    assert kinds["postcopy_pages"] == "counter"
    assert kinds["postcopy_fault_latency_seconds"] == "histogram"
    samples = {(one.name, *sorted(one.labels.values())): one.value for family in families for one in family.samples}
    assert samples["postcopy_remaining_bytes",] == 1 << 40
    assert samples["postcopy_migrations_total", "destination", "failed", "minor"] == 3
    assert samples["postcopy_migrations_total", "completed", "destination", "minor"] == 0  # there before it rises
    assert samples["postcopy_migration_downtime_seconds",] == 1.5e-7
    for le, count in figures.fault_latency.prometheus_buckets():
        assert samples["postcopy_fault_latency_seconds_bucket", str(float(le)) if le != "+Inf" else le] == count
    assert samples["postcopy_stall_seconds_count",] == sum(range(BUCKETS))
    assert samples["process_resident_memory_bytes",] > 0


def test_who_answers_a_scrape_gives_way_to_everybody_else(figures):
    def threads():
        return {int(one.name) for one in Path("/proc/self/task").iterdir()}

    def answering():
        nice.update({thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in threads()})
        return figures

    def scrape(url):
        before = threads()
        fetch(url)
        return before

    nice = {}
    before = scraped(answering, scrape)
    assert [value for thread, value in nice.items() if thread not in before] == [metrics.SCRAPE_NICE]
    assert nice[threading.get_native_id()] < metrics.SCRAPE_NICE


def test_a_mistake_of_ours_is_an_answer_and_ends_nothing(figures, capfd):
    def broken_once():
        if not mistakes:
            mistakes.append(True)
            raise ZeroDivisionError
        return figures

    def twice(url):
        with pytest.raises(urllib.error.HTTPError, match="500"):
            fetch(url)
        return fetch(url)

    mistakes = []
    assert "postcopy_build_info" in scraped(broken_once, twice)


def test_what_many_files_tell_is_read_once_a_second(figures, monkeypatch):
    reads = []
    monkeypatch.setattr(metrics, "host_families", lambda: reads.append(1) or [])

    def thrice(url):
        for now in (100.0, 100.9, 101.0):
            monkeypatch.setattr(metrics.time, "monotonic", lambda now=now: now)
            fetch(url)

    scraped(lambda: figures, thrice)
    assert len(reads) == 2
