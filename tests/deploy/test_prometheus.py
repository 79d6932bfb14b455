"""What operators get, held by the real thing: promtool judges metrics and rules, a Prometheus scrapes a migration, and
every expression of the dashboard and of the rules is asked there."""

from __future__ import annotations

import math
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.agent.agents import Command, Daemon, destination, run, scrape, source
from tests.deploy.dashboard import expressions, with_values
from tests.deploy.prometheus import Prometheus
from tests.programs import say

DEPLOY = Path(__file__).parents[2] / "deploy"
NAMED = re.compile(r"\b(?:postcopy|process)_[a-z_]+(?![a-z_]*:)")


class Scraped(NamedTuple):
    """A migration that is over, and the Prometheus that saw it."""

    prometheus: Prometheus
    here: Daemon
    there: Daemon
    urls: tuple[str, str]
    report: dict[str, Any]


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    """Migrate while a Prometheus looks on: some of it without a push, the rest by one."""
    folder = tmp_path_factory.mktemp("scraped")
    with (
        destination(folder, "--metrics", "127.0.0.1:0") as there,
        source(folder, "--metrics", "127.0.0.1:0", "--steps-per-second", "2000") as here,
    ):
        urls = tuple(daemon.until_log(r"metrics: (http://\S+)")[1] for daemon in (here, there))
        targets = [url.removeprefix("http://").removesuffix("/metrics") for url in urls]
        with Prometheus(folder, targets) as prometheus:
            prometheus.until(lambda: len(prometheus.query("postcopy_build_info offset 1s")) == 2, "scraping")
            with Command("migrate", "--admin", here.admin, there.address, "--no-push", "--json") as migration:
                active = 'postcopy_migration_state{state="postcopy-active"} == 1'
                prometheus.until(lambda: len(prometheus.query(active)) == 2, "active")
                moving = "postcopy_fault_latency_seconds_count > 1000"
                prometheus.until(lambda: prometheus.query(moving), "moving")
                size = 64 << 20  # the source hears of pages twice a second
                both = f"0 < postcopy_remaining_bytes < {size}"
                prometheus.until(lambda: len(prometheus.query(both)) == 2, "moving")
                run("set", "--admin", here.admin, "--push")
                done = migration.result(30)
                assert done.status == 0, done.err
            over = 'postcopy_migration_state{state="completed"} == 1'
            prometheus.until(lambda: len(prometheus.query(over)) == 2, "completed")
            yield Scraped(prometheus, here, there, (urls[0], urls[1]), done.json)


def exposition(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def exported(scraped: Scraped) -> set[str]:
    """Return the names of all that both daemons export."""
    samples = {sample for url in scraped.urls for sample in scrape(url)}
    return {sample.partition("{")[0] for sample in samples}


# --- what is exported ------------------------------------------------------------------------------------------------


def test_promtool_finds_nothing_wrong(scraped: Scraped) -> None:
    for url in scraped.urls:
        done = say("promtool", "check", "metrics", input=exposition(url))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


def test_promtool_would_find_something() -> None:
    assert say(
        "promtool", "check", "metrics", input="# TYPE postcopy_x_milliseconds gauge\npostcopy_x_milliseconds 1\n"
    ).returncode


def test_no_series_appears_with_a_migration(tmp_path: Path, scraped: Scraped) -> None:
    """A counter that begins with its first value has never risen, to Prometheus."""
    with (
        destination(tmp_path, "--metrics", "127.0.0.1:0") as there,
        source(tmp_path, "--metrics", "127.0.0.1:0", size="8MiB") as here,
    ):
        for idle, url in zip((here, there), scraped.urls, strict=True):
            before = set(scrape(idle.until_log(r"metrics: (http://\S+)")[1]))
            assert set(scrape(url)) - before == set()


def test_the_names_are_ours_and_their_labels_bounded(scraped: Scraped) -> None:
    for url in scraped.urls:
        samples = scrape(url)
        assert {name.partition("_")[0] for name in samples} == {"postcopy", "process"}
        assert len(samples) < 200
        assert not any(word in name for name in samples for word in ("migration_id", "pid"))


# --- a Prometheus that looks on --------------------------------------------------------------------------------------


def test_figures_agree_with_the_report(scraped: Scraped) -> None:
    prometheus, report = scraped.prometheus, scraped.report
    latency = report["fault_latency_seconds"]
    assert prometheus.value("postcopy_fault_latency_seconds_count > 0") == latency["count"]
    mean = prometheus.value("postcopy_fault_latency_seconds_sum / (postcopy_fault_latency_seconds_count > 0)")
    assert mean == pytest.approx(latency["mean"])
    for key, fraction in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        asked = prometheus.value(f"histogram_quantile({fraction}, postcopy_fault_latency_seconds_bucket)")
        # Its buckets are octaves and ours 32nd parts of one: the same octave, or the neighbour at its very edge.
        assert abs(math.log2(asked / latency[key])) <= 1, (key, asked, latency[key])
    for path in ("demand", "push", "zero", "duplicate"):
        pages = prometheus.value(f'max(postcopy_pages_total{{direction="received",path="{path}"}})')
        assert pages == report["pages"][path]
    assert prometheus.value("max(postcopy_migration_downtime_seconds)") == pytest.approx(report["downtime_seconds"])
    assert prometheus.value("max(postcopy_remaining_bytes)") == 0


def test_a_migration_is_seen_in_rates(scraped: Scraped) -> None:
    """Between a scrape before and one after there is a rise, however short the migration was."""
    prometheus, report = scraped.prometheus, scraped.report
    risen = prometheus.value('sum(increase(postcopy_migrations_total{outcome="completed"}[5m]))')
    assert 2 <= round(risen) <= 4  # Prometheus extrapolates to the ends of the range
    faults = prometheus.value(
        "sum(max_over_time(postcopy_faults_total[5m]) - min_over_time(postcopy_faults_total[5m]))"
    )
    assert faults == report["fault_latency_seconds"]["count"]


def test_the_guest_has_one_owner(scraped: Scraped) -> None:
    found = scraped.prometheus.until(
        lambda: len(both := scraped.prometheus.query("postcopy_guest_owned")) == 2 and both, "both"
    )
    owned = {labels["instance"]: value for labels, value in found}
    here, there = (url.removeprefix("http://").removesuffix("/metrics") for url in scraped.urls)
    assert owned == {here: 0, there: 1}


# --- rules and the dashboard -----------------------------------------------------------------------------------------


def test_configuration_and_rules_are_valid() -> None:
    done = say("promtool", "check", "config", DEPLOY / "prometheus/prometheus.yml")
    assert done.returncode == 0, done.stderr
    done = say("promtool", "check", "rules", "--lint-fatal", *sorted(DEPLOY.glob("prometheus/rules/*.yml")))
    assert done.returncode == 0, done.stderr


def test_rules_do_what_their_tests_say() -> None:
    tests = sorted(DEPLOY.glob("prometheus/tests/*.yml"))
    done = say("promtool", "test", "rules", *tests)
    assert done.returncode == 0, done.stdout + done.stderr
    tested = "".join(file.read_text() for file in tests)
    alerts = {
        name for file in DEPLOY.glob("prometheus/rules/*.yml") for name in re.findall(r"alert: (\w+)", file.read_text())
    }
    assert [name for name in sorted(alerts) if f"alertname: {name}" not in tested] == []


def test_rules_are_evaluated_and_none_is_wrong(scraped: Scraped) -> None:
    def all_ran() -> Any:
        groups = scraped.prometheus.ask("rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        return all(rule["health"] == "ok" for rule in rules) and rules

    rules = scraped.prometheus.until(all_ran, "evaluated")
    assert len(rules) == 14
    recorded = [rule["name"] for rule in rules if rule["type"] == "recording"]
    for name in recorded:
        assert scraped.prometheus.until(lambda name=name: scraped.prometheus.query(name), f"recording {name}")
    # This migration is no reason to call anybody.
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []


def test_every_name_in_the_dashboard_and_the_rules_is_exported(scraped: Scraped) -> None:
    names = exported(scraped)
    written = " ".join(expression for _, expression in expressions())
    for file in DEPLOY.glob("prometheus/rules/*.yml"):
        written += re.sub(r"record: \S+|(?:summary|description):.*|instance\w*:\w+:\w+", "", file.read_text())
    assert set(NAMED.findall(written)) - names == set()
    assert len(set(NAMED.findall(written))) > 15


@pytest.mark.parametrize(("title", "expression"), expressions(), ids=lambda text: text[:40])
def test_every_expression_is_answered(
    title: str, expression: str, scraped: Scraped, huge_pages: Callable[[str, int], None]
) -> None:
    if title == "Huge pages left":  # which a host without a pool has none of
        huge_pages("hugetlb-2M", 1)
    elif title == "Switchover":  # which was at a moment that is over
        return
    scraped.prometheus.until(lambda: scraped.prometheus.query(with_values(expression)), title)


def test_nothing_is_drawn_of_what_is_not_a_number(scraped: Scraped) -> None:
    """Without faults there is no percentile of them, which Grafana would show as the latest one."""
    zero = "sum(rate(postcopy_fault_latency_seconds_count[1s])) == 0"
    scraped.prometheus.until(lambda: scraped.prometheus.query(zero), "quiet")
    for title, expression in expressions():
        asked = with_values(expression.replace("$__rate_interval", "1s"))
        assert not any(math.isnan(value) for _, value in scraped.prometheus.query(asked)), title


def test_a_migration_that_both_sides_count_is_one(scraped: Scraped) -> None:
    (expression,) = [asked for title, asked in expressions() if title == "Migrations in this range"]
    both = 'postcopy_migrations_total{outcome="completed"} == 1'  # a source counts once it needs nothing more
    scraped.prometheus.until(lambda: len(scraped.prometheus.query(both)) == 2, "counted by both")
    found = scraped.prometheus.query(with_values(expression))
    assert [(labels["outcome"], value) for labels, value in found] == [("completed", 1)]


def test_a_switchover_is_marked_once_for_each_agent(scraped: Scraped) -> None:
    """However narrow the bars are: no scrape comes in every one of them, and none of them marks it twice."""
    (expression,) = [asked for title, asked in expressions() if title == "Switchover"]
    end = time.time()
    for step in (0.05, 0.3, 1):
        asked = with_values(expression, f"{round(step * 1000)}ms")
        first = end - 400
        found = scraped.prometheus.ask("query_range", query=asked, start=f"{first}", end=f"{end}", step=f"{step}")
        assert len(found["result"]) == 2, (step, found)
        assert [[value for _, value in one["values"]] for one in found["result"]] == [["1"], ["1"]], (step, found)


# --- further migrations: the last test, for what is asked above is about the first one alone -------------------------


def test_counters_go_on_from_one_migration_to_the_next(tmp_path: Path, scraped: Scraped) -> None:
    prometheus, there, reports = scraped.prometheus, scraped.there, [scraped.report]
    with destination(tmp_path) as other:
        for one, next_one in ((there, other), (other, there)):
            done = run("migrate", "--admin", one.admin, next_one.address, "--json")
            assert done.status == 0, done.err
            reports.append(done.json)
            next_one.until(lambda now: now["ended"] is not None and now["state"] == "completed")
        twice = 'postcopy_migrations_total{role="destination",outcome="completed"} == 2'
        prometheus.until(lambda: prometheus.query(twice), "seen")
    first, onward, second = reports
    for path in ("demand", "push", "zero", "duplicate"):
        pages = f'postcopy_pages_total{{direction="received",path="{path}"}}'
        moved = first["pages"][path] + second["pages"][path]
        assert prometheus.value(f"{pages} and on (instance) {twice}") == moved, path
        if moved > 1000:  # it extrapolates to the ends of the range
            risen = prometheus.value(f"increase({pages}[1h]) and on (instance) {twice}")
            assert risen == pytest.approx(moved, rel=0.05)
    sent = f'sum(postcopy_pages_total{{direction="sent",path=~"demand|push|zero"}} and on (instance) {twice})'
    again = f'sum(postcopy_pages_total{{direction="sent",path="duplicate"}} and on (instance) {twice})'
    assert prometheus.value(f"{sent} - {again}") == onward["pages"]["total"]
    faults = "postcopy_fault_latency_seconds_count and on (instance) " + twice
    assert prometheus.value(faults) == sum(one["fault_latency_seconds"]["count"] for one in (first, second))
    counters = sorted(one for one in exported(scraped) if re.match(r"postcopy_\w+_(total|bucket|count|sum)$", one))
    assert len(counters) > 12
    assert [one for one in counters if prometheus.value(f"max(resets({one}[1h]))")] == []
