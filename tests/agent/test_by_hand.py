"""The daemons as people start them: by hand, watched with `status` and Prometheus, ended with SIGTERM."""

import asyncio
import re
import signal
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent import destination_daemon
from postcopy.link.returning import Known
from tests.chaos.proxy import Proxy, upstream_of

from .agents import AGENT, AS_NOBODY, ENVIRONMENT, ROOT, Command, destination, run, scrape, source


def metrics_url(daemon):
    return daemon.until_log(r"metrics: (http://\S+)")[1]


def test_a_migration_by_hand(tmp_path):
    with (
        destination(tmp_path, "--listen", "tcp:127.0.0.1:0", "--metrics", "127.0.0.1:0") as there,
        source(tmp_path, "--workload", "zipf", "--metrics", "127.0.0.1:0") as here,
    ):
        assert re.fullmatch(r"tcp:127\.0\.0\.1:[1-9]\d*", there.address)
        assert there.status()["state"] == "none"
        assert there.status()["owner"] is None  # no guest is here, so nobody owns it
        assert here.status()["owner"] == "source"
        here.runs_on()
        verdict = run("check", "--admin", here.admin, "--json").json
        assert (verdict["pages_checked"], verdict["pages_mismatched"]) == (16384, 0)
        here.runs_on()
        done = run("migrate", "--admin", here.admin, there.address, "--json")
        assert done.status == 0, done.err
        assert done.json["pages"]["total"] == 16384
        after = there.until(lambda now: now["state"] == "completed")
        before = here.status()
        assert (before["state"], before["owner"], before["guest"]) == ("completed", "destination", None)
        assert (after["state"], after["owner"]) == ("completed", "destination")
        assert after["pages"] == {"total": 16384, "placed": 16384}
        assert after["report"]["pages"] == done.json["pages"]
        there.runs_on()
        verdict = run("check", "--admin", there.admin)
        assert verdict.status == 0
        assert "every byte of 16384 pages (4 KiB each) is right" in verdict.out
        check_parts(done.json)
        check_metrics(scrape(metrics_url(here)), scrape(metrics_url(there)), done.json)
        again = run("migrate", "--admin", here.admin, there.address)
        assert (again.status, again.one_line()) == (2, "postcopy: the guest is not here any more")
        here.signal(signal.SIGTERM)
        assert here.wait() == 0
        assert "the guest is at the destination" in here.log
        there.runs_on()
        there.signal(signal.SIGTERM)
        assert there.wait() == 0
        assert "this agent owns the guest, which ends with it" in there.log


def check_parts(report):
    """Each part of a fault's time was measured, but for the wire's, which is the rest; together they are no more than
    all faults took.
    """
    parts = report["details"]["fault_parts_seconds"]
    assert list(parts) == ["faults", "request", "source", "wire", "place"]
    assert parts["wire"] >= 0
    assert min(value for part, value in parts.items() if part != "wire") > 0
    faults, latency = parts.pop("faults"), report["fault_latency_seconds"]
    assert 0 < faults <= report["pages"]["demand"]
    assert faults * sum(parts.values()) <= latency["count"] * latency["mean"] * 1.001


def check_metrics(here, there, report):
    assert here['postcopy_migration_state{state="completed"}'] == 1
    assert there['postcopy_migration_state{state="completed"}'] == 1
    assert here['postcopy_migrations_total{mode="auto",outcome="completed",role="source"}'] == 1
    assert there['postcopy_migrations_total{mode="auto",outcome="completed",role="destination"}'] == 1
    for path in ("demand", "push", "zero", "duplicate"):
        assert there[f'postcopy_pages_total{{direction="received",path="{path}"}}'] == report["pages"][path]
    assert there["postcopy_remaining_bytes"] == here["postcopy_remaining_bytes"] == 0
    assert there["postcopy_fault_latency_seconds_count"] == report["fault_latency_seconds"]["count"]
    assert here["postcopy_migration_downtime_seconds"] == report["downtime_seconds"]
    assert there["postcopy_migration_downtime_seconds"] == pytest.approx(report["downtime_seconds"])
    received = [
        there[f'postcopy_transferred_bytes_total{{channel="{c}",direction="received"}}'] for c in ("urgent", "push")
    ]
    assert sum(received) == report["bytes"]["wire"]
    pages = 'postcopy_pages_total{{direction="sent",path="{}"}}'
    sent = {path: here[pages.format(path)] for path in ("demand", "push", "zero", "duplicate")}
    assert sent.pop("duplicate") == sum(sent.values()) - report["pages"]["total"]
    faults = [there[name] for name in there if name.startswith("postcopy_faults_total")]
    assert len(faults) == 6  # each kind, requested or joined
    assert sum(faults) == there["postcopy_fault_latency_seconds_count"]
    moved = "postcopy_transferred_bytes_total"
    for channel in ("control", "urgent"):
        asked = f'{moved}{{channel="{channel}",direction="received"}}'
        assert 0 < here[asked] <= there[asked.replace("received", "sent")]
    told = f'{moved}{{channel="control",direction="sent"}}'
    assert here[told] == there[told.replace("sent", "received")] > 0


def test_metrics_are_live_while_pages_are_still_missing(tmp_path):
    with (
        destination(tmp_path, "--metrics", "127.0.0.1:0") as there,
        source(tmp_path, "--metrics", "127.0.0.1:0", "--steps-per-second", "1000") as here,
    ):
        url = metrics_url(there)
        assert scrape(url)['postcopy_migration_state{state="none"}'] == 1
        with Command("migrate", "--admin", here.admin, there.address, "--no-push", "--json") as migration:
            there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] > 0)
            now = scrape(url)
            assert now['postcopy_migration_state{state="postcopy-active"}'] == 1
            assert now["postcopy_fault_latency_seconds_count"] > 0
            assert (
                now['postcopy_fault_latency_seconds_bucket{le="+Inf"}'] == now["postcopy_fault_latency_seconds_count"]
            )
            bounds = re.findall(r'fault_latency_seconds_bucket\{le="([^"]+)"\}', "\n".join(now))
            assert [float(bound) for bound in bounds[:-1]] == [2**i / 1e6 for i in range(24)]
            assert now["postcopy_stall_seconds_count"] > 0
            assert now["postcopy_remaining_bytes"] > 0
            assert now['postcopy_faults_total{kind="missing",result="requested"}'] > 0
            assert scrape(metrics_url(here))['postcopy_migration_state{state="postcopy-active"}'] == 1
            refused = run("check", "--admin", there.admin)
            assert refused.status == 2
            assert "pages are still at the source" in refused.one_line()
            refused = run("cancel", "--admin", here.admin)
            assert "the guest runs at the destination" in refused.one_line()
            assert run("set", "--admin", here.admin, "--push", "--max-postcopy-bandwidth", "500MiB/s").status == 0
            done = migration.result(30)
            assert done.status == 0, done.err
            assert done.json["pages"]["push"] > 0
        verdict = run("check", "--admin", there.admin, "--json")
        assert verdict.status == 0
        assert verdict.json["pages_mismatched"] == 0


def test_both_agents_count_a_connection_that_was_made_anew(tmp_path):
    with (
        destination(tmp_path, "--metrics", "127.0.0.1:0") as there,
        source(tmp_path, "--steps-per-second", "500", "--metrics", "127.0.0.1:0", size="16MiB") as here,
        Command("migrate", "--admin", here.admin, there.address, "--no-push"),
    ):
        there.until(lambda now: now["state"] == "postcopy-active")
        assert [scrape(metrics_url(agent))["postcopy_reconnects_total"] for agent in (here, there)] == [0, 0]
        for command in ("pause", "resume"):
            assert run(command, "--admin", here.admin).status == 0
        for agent in (here, there):
            agent.until(lambda now: now["reconnects"] == 1)
        assert [scrape(metrics_url(agent))["postcopy_reconnects_total"] for agent in (here, there)] == [1, 1]


def test_an_idle_destination_and_an_unmoved_guest_end_cleanly(tmp_path):
    with destination(tmp_path) as there, source(tmp_path, size="8MiB") as here:
        socket_file = Path(here.admin.removeprefix("unix:"))
        assert stat.S_IMODE(socket_file.stat().st_mode) == 0o600
        there.signal(signal.SIGTERM)
        assert there.wait() == 0
        assert "no guest is here" in there.log
        here.signal(signal.SIGINT)
        assert here.wait() == 0
        assert "this agent owns the guest, which ends with it" in here.log
        assert not socket_file.exists()


def test_once_ends_with_the_migration(tmp_path):
    with destination(tmp_path, "--once") as there, source(tmp_path, size="8MiB") as here:
        assert run("migrate", "--admin", here.admin, there.address).status == 0
        assert there.wait() == 0


def test_once_stays_for_a_source_that_has_not_heard_of_the_end(tmp_path):
    with (
        destination(tmp_path, "--once") as there,
        source(tmp_path, size="8MiB") as here,
        Proxy(upstream_of(there.address), watches=True) as proxy,
    ):
        proxy.hold("all_placed")
        with Command("migrate", "--admin", here.admin, proxy.address, "--json") as moving:
            proxy.wait_held()
            proxy.refuses = True
            proxy.cut()
            proxy.release()
            there.until_log("the source has not heard that every page is here: this agent ends once it has")
            here.until(lambda now: now["state"] == "postcopy-paused")
            proxy.admit()
            assert moving.result(30).json["outcome"] == "completed"
        assert there.wait() == 0


def test_once_does_not_stay_for_ever_for_a_source_whose_goodbye_was_lost(monkeypatch, caplog):
    monkeypatch.setattr(destination_daemon, "UNHEARD_SECONDS", 0.01)
    known = Known()
    known.add(SimpleNamespace(finish="completed", machine=SimpleNamespace(migration_id=b"", unheard=True)))
    daemon = SimpleNamespace(options=SimpleNamespace(give_up_after=None), destination=SimpleNamespace(known=known))
    asyncio.run(asyncio.wait_for(destination_daemon.DestinationDaemon._until_heard(daemon), 10))
    assert [line.message for line in caplog.records][1:] == [
        "destination: no source asked for 0.01 s: one that is there yet keeps its memory until it is told to end"
    ]


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path):
    with source(tmp_path, size="8MiB") as first:
        taken = run("source", "--size", "8MiB", "--admin", first.admin)
        assert taken.status == 2
        assert "cannot listen on unix:" in taken.err.strip().splitlines()[-1]
        first.signal(signal.SIGKILL)
        first.wait()
    with source(tmp_path, size="8MiB") as second:
        second.runs_on()


def test_another_user_may_not_administrate(tmp_path):
    tmp_path.chmod(0o755)
    with destination(tmp_path) as there:
        path = there.admin.removeprefix("unix:")
        for parent in Path(path).parents:
            if parent.stat().st_uid == 0 and Path("/tmp") in parent.parents:
                parent.chmod(0o755)
        asked = run("status", "--admin", there.admin, program=AS_NOBODY)
        assert asked.status == 2
        assert "Permission denied" in asked.one_line()
        Path(path).chmod(0o666)  # even then the kernel tells who asks
        asked = run("status", "--admin", there.admin, program=AS_NOBODY)
        assert asked.status == 2
        assert "of user 65534 is neither of this agent's user nor root" in asked.one_line()
        there.until_log(r"of user 65534 is neither of this agent's user nor root")


def test_the_command_line_loads_little():
    code = (
        "import sys; from agent.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(sorted(sys.modules))"
    )
    done = subprocess.run([AGENT[0], "-c", code], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=True)
    for heavy in ("uvloop", "rich", "prometheus_client", "postcopy.pump", "postcopy.kernel", "postcopy.guest"):
        assert f"'{heavy}'" not in done.stdout
