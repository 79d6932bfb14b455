"""A guest that came to a destination goes on from there: to another host, or back. Real daemons."""

import json
import signal

import pytest

from .agents import Command, destination, run, scrape, source
from .relay import open_files

SLOW = ("--steps-per-second", "500", "--workload", "random")


@pytest.fixture
def three(tmp_path):
    """A source with a guest, and two destinations that it may go to."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with (
        source(tmp_path, *SLOW, size="8MiB") as home,
        destination(tmp_path / "one", "--metrics", "127.0.0.1:0") as one,
        destination(tmp_path / "two") as two,
    ):
        yield home, one, two


def arrived(agent):
    agent.until(lambda now: now["role"] == "destination" and now["state"] == "completed" and now["ended"] is not None)


def moved(here, there, *how):
    done = run("migrate", "--admin", here.admin, there.address, "--json", *how)
    assert done.status == 0, done.err
    arrived(there)
    return done.json


def counters_gone_back(before, now):
    """Which samples are less than they were, or not there any more, and not gauges."""
    counters = [one for one in before if one.partition("{")[0].endswith(("_total", "_bucket", "_count", "_sum"))]
    assert len(counters) > 100
    return [(one, before[one], now.get(one)) for one in counters if now.get(one, -1) < before[one]]


def ended_of(samples):
    return {name: count for name, count in samples.items() if "migrations_total" in name and count}


def right(agent):
    found = run("check", "--admin", agent.admin, "--json").json
    assert (found["pages_mismatched"], found["pages_checked"]) == (0, 2048)
    agent.runs_on()


def test_a_guest_goes_on_and_comes_back(three):
    home, one, two = three
    moved(home, one)
    report = moved(one, two)
    assert report["pages"]["total"] == 2048
    right(two)
    now = one.status()
    assert (now["role"], now["state"], now["owner"], now["guest"]) == ("source", "completed", "destination", None)
    refused = run("check", "--admin", one.admin)
    assert (refused.status, refused.one_line()) == (2, "postcopy: there is no guest here to check")
    refused = run("migrate", "--admin", one.admin, two.address)
    assert (refused.status, "the guest is not here any more" in refused.one_line()) == (2, True)
    moved(two, one)
    right(one)
    assert [agent.status()["guest"] is not None for agent in (home, one, two)] == [False, True, False]
    # the place that it left is as good as one that nobody was at
    moved(one, two)
    right(two)
    assert "Traceback" not in home.log + one.log + two.log


def test_what_is_told_of_it_on_the_way(three):
    home, one, two = three
    came = moved(home, one)
    url = one.until_log(r"metrics: (\S+)")[1]
    counted = scrape(url)
    before = one.status()
    assert (before["role"], before["owner"]) == ("destination", "destination")
    refused = run("migrate", "--admin", one.admin, "tcp:192.0.2.1:7000")
    assert refused.status == 2
    after = one.status()
    assert after | {"guest": None} == before | {"guest": None}  # nothing was tried
    with Command("migrate", "--admin", one.admin, two.address, "--no-push") as onward:
        two.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] > 20)
        early = run("migrate", "--admin", two.admin, one.address)
        assert (early.status, "pages of it are not here yet" in early.one_line()) == (2, True)
        now = one.status()
        assert (now["role"], now["state"], now["in_use"]) == ("source", "postcopy-active", "a migration")
        assert (now["owner"], now["guest"]) == ("destination", None)
        looked = json.loads(run("top", "--admin", one.admin, "--count", "1", "--json").out)
        assert (looked["role"], looked["state"], looked["owns_guest"]) == ("source", "postcopy-active", False)
        assert 0 < sum(looked["residency"]) < len(looked["residency"])
        one.until(lambda _now: one.ask("look")["fault_latency"]["buckets"])  # as the next host has told
        samples = scrape(url)
        assert counters_gone_back(counted, samples) == []
        assert samples['postcopy_migration_state{state="postcopy-active"}'] == 1
        assert samples['postcopy_pages_total{direction="sent",path="demand"}'] >= 20
        late = run("migrate", "--admin", home.admin, one.address)
        assert (late.status, "the guest is not here any more" in late.one_line()) == (2, True)
        assert run("pause", "--admin", one.admin).status == 0
        assert onward.result().status == 5
    assert run("resume", "--admin", one.admin).status == 0
    assert run("set", "--admin", one.admin, "--push").status == 0
    arrived(two)
    right(two)
    one.until(lambda _now: sum(ended_of(scrape(url)).values()) == 2)
    now = scrape(url)
    assert ended_of(now) == {
        'postcopy_migrations_total{mode="auto",outcome="completed",role="destination"}': 1,
        'postcopy_migrations_total{mode="auto",outcome="completed",role="source"}': 1,
    }
    assert counters_gone_back(samples, now) == []
    for path in ("demand", "push", "zero"):
        assert now[f'postcopy_pages_total{{direction="received",path="{path}"}}'] == came["pages"][path]
    moved(two, one)
    moved(one, two)
    assert counters_gone_back(now, scrape(url)) == []


def test_a_migration_that_fails_leaves_it_where_it_is(three):
    home, one, two = three
    moved(home, one)
    two.signal(signal.SIGKILL)
    two.wait()
    failed = run("migrate", "--admin", one.admin, two.address)
    assert (failed.status, "Connection refused" in failed.one_line()) == (4, True)
    now = one.status()
    assert (now["role"], now["state"], now["owner"]) == ("source", "failed", "source")
    right(one)
    one.signal(signal.SIGTERM)
    assert one.wait() == 0
    assert "this agent owns the guest, which ends with it" in one.log


def test_an_agent_whose_guest_is_leaving_sends_the_rest_before_it_ends(three):
    home, one, two = three
    moved(home, one)
    with Command("migrate", "--admin", one.admin, two.address, "--no-push") as onward:
        two.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] > 20)
        one.signal(signal.SIGTERM)
        assert onward.result(40).status == 0
    assert one.wait() == 0
    assert "pushing them without any limit" in one.log
    arrived(two)
    right(two)


def test_an_agent_whose_guest_is_given_up_on_its_way_ends_with_6(three):
    home, one, two = three
    moved(home, one)
    with Command("migrate", "--admin", one.admin, two.address, "--no-push") as onward:
        two.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] > 20)
        two.signal(signal.SIGKILL)
        one.until(lambda now: now["state"] == "postcopy-paused")
        assert run("cancel", "--lost", "--admin", one.admin).status == 0
        assert onward.result().status == 6
    assert one.wait() == 6
    assert "the guest is lost" in one.log


def test_the_question_whether_it_would_work_changes_nothing(three):
    """Asked of a destination whose guest has left, which answers by claiming its one place for a moment."""
    home, one, two = three
    moved(home, one)
    moved(one, two)
    before = one.status()
    assert run("doctor", "--peer", one.address, "--json").json["peer"]["works"]
    assert one.status() == before


@pytest.mark.parametrize("first", ["tcp:127.0.0.1:0", "unix:{}/memory.sock"])
def test_handed_over_to_the_next_process(first, tmp_path):
    """On one host the memory itself goes on, however it came."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with (
        source(tmp_path, *SLOW, size="8MiB") as home,
        destination(tmp_path / "one", "--listen", first.format(tmp_path / "one")) as one,
        destination(tmp_path / "two", "--listen", f"unix:{tmp_path}/two/memory.sock") as two,
    ):
        moved(home, one)
        assert moved(one, two)["pages"]["handed_over"] == 2048
        right(two)
        empty = open_files(one.process.pid)
        with destination(tmp_path) as last:
            moved(two, last)
            right(last)
            two.until(lambda _now: open_files(two.process.pid) <= empty + 1)
