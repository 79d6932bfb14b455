"""Metrics as text: what prometheus_client reads and would write, served to whoever asks properly."""

import asyncio
import logging

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from agent import exposition, metrics
from postcopy.pump.histogram import BUCKETS, Histogram


@pytest.fixture
def figures():
    recorded = Histogram(tuple(range(BUCKETS)), 10**9, 10**7)
    made = metrics.Figures("destination", fault_latency=recorded, stall=recorded, remaining_bytes=1 << 40)
    made.migrations["destination", "minor", "failed"] = 3
    made.downtime_seconds = 1.5e-7
    return made


def test_prometheus_client_reads_it_and_would_write_the_same(figures):
    text = "".join(metrics.Exporter(lambda: figures).lines())
    families = list(text_string_to_metric_families(text))
    assert len(families) > 20

    class Again(Collector):
        def collect(self):
            return families

    registry = CollectorRegistry()
    registry.register(Again())
    assert list(text_string_to_metric_families(generate_latest(registry).decode())) == families
    kinds = {family.name: family.type for family in families}
    assert kinds["postcopy_pages"] == "counter"
    assert kinds["postcopy_fault_latency_seconds"] == "histogram"
    samples = {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}
    assert samples["postcopy_remaining_bytes",] == 1 << 40
    assert samples["postcopy_migrations_total", "minor", "failed", "destination"] == 3
    assert samples["postcopy_migration_downtime_seconds",] == 1.5e-7
    for le, count in figures.fault_latency.prometheus_buckets():
        assert samples["postcopy_fault_latency_seconds_bucket", le] == count
    assert samples["postcopy_stall_seconds_count",] == sum(range(BUCKETS))


def served(text, *requests):
    """Serve `text` and return what each request is answered."""

    async def ask(port, request):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        writer.write_eof()
        try:
            return (await reader.read()).decode()
        except ConnectionResetError:
            return ""
        finally:
            writer.close()

    async def body():
        server = await asyncio.start_server(exposition.Exposition(text).client, "127.0.0.1", 0)
        async with server:
            return [await ask(server.sockets[0].getsockname()[1], request) for request in requests]

    return asyncio.run(body())


def test_only_metrics_are_served():
    good = b"GET /metrics?x=y HTTP/1.1\r\nHost: x\r\n\r\n"
    bad = [b"GET /etc/passwd HTTP/1.1\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n", b"\r\n\r\n"]
    cut = b"GET /metr"
    endless = b"GET /" + b"x" * (1 << 17)
    *answers, first, second, last = served(lambda: ["a 1\n", "b 2\n"], *bad, cut, endless, good)
    assert [answer.partition("\r\n")[0] for answer in answers] == ["HTTP/1.1 404 Not Found"] * 3
    assert first == second == ""
    head, _, body = last.partition("\r\n\r\n")
    assert head.splitlines()[0] == "HTTP/1.1 200 OK"
    assert f"Content-Length: {len(body)}" in head
    assert "Content-Type: text/plain; version=0.0.4" in head
    assert body == "a 1\nb 2\n"


def test_a_mistake_of_ours_is_an_answer_and_a_line_in_the_log(caplog):
    def broken():
        raise ZeroDivisionError

    with caplog.at_level(logging.ERROR):
        (answer,) = served(broken, b"GET /metrics HTTP/1.1\r\n\r\n")
    assert answer.startswith("HTTP/1.1 500 ")
    assert "internal error" in caplog.text


def test_slow_figures_are_read_once_a_second(figures, monkeypatch):
    reads = []
    monkeypatch.setattr(metrics, "host_families", lambda: reads.append(1) or [])
    exporter = metrics.Exporter(lambda: figures)
    for now, expected in ((100.0, 1), (100.9, 1), (101.0, 2)):
        monkeypatch.setattr(metrics.time, "monotonic", lambda now=now: now)
        list(exporter.lines())
        assert len(reads) == expected
