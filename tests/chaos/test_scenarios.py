"""The scenarios that QEMU and libvirt test postcopy with, as far as they apply here, each under its name.

README.md beside this file has the whole table: what is tested elsewhere, and what does not apply and why. The guest is
theirs, too: it increments a byte of each page in order for ever, so that its memory shows what was lost or came late.
"""

import time

import pytest

from tests.agent.agents import Command

from .pair import Kind, Pair
from .proxy import wait_for
from .trouble import wish


@pytest.fixture(scope="module", params=["plain", "tls"])
def both(request, tmp_path_factory):
    kind = Kind(request.param, tls=request.param == "tls", workload="increment")
    with Pair(tmp_path_factory.mktemp(request.param), kind) as pair:
        yield pair


def halfway(both, **arguments):
    """Begin a migration, and return it when the guest has left and pages of it have not."""
    both.proxy.calm()
    migration = both.migrate(**{"push": False, **arguments})
    both.coming.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] > 20)
    return migration


def paused(both):
    for agent in both.agents:
        agent.until(lambda now: now["state"] == "postcopy-paused")


def completes(both, migration):
    both.leaving.ask("set", push=True, rate=0)
    assert migration.result() == 0, migration.error
    both.settle(0)


def test_postcopy_plain(both):
    """/migration/postcopy/plain, /postcopy/preempt/plain (the urgent connection is what QEMU's preempt channel is)."""
    both.proxy.calm()
    migration = both.migrate()
    assert migration.result() == 0, migration.error
    both.settle(0)
    report = migration.report
    assert report["downtime_seconds"] > 0
    assert {"p50", "p99", "max", "mean", "count"} <= report["fault_latency_seconds"].keys()


def test_postcopy_recovery_plain(both):
    """/postcopy/recovery/plain, /postcopy/preempt/recovery/plain; libvirt's pause_by_domjobabort."""
    migration = halfway(both, push=True, rate=4096)
    both.leaving.ask("pause")
    paused(both)
    assert both.leaving.status()["owner"] == both.coming.status()["owner"] == "destination"
    both.leaving.ask("resume", to=both.coming.address)  # at another address than before
    wait_for(lambda: both.proxy.roles() == [], "connections through the proxy stay")
    completes(both, migration)


def test_recovery_double_failures_reconnect(both):
    """/recovery/double-failures/reconnect; libvirt's pause_and_recover_twice: the way back breaks as it is dialled."""
    migration = halfway(both)
    both.leaving.ask("pause")
    paused(both)
    both.proxy.refuses = True
    assert not wish(both.leaving, "resume")
    both.leaving.until(lambda now: now["state"] == "postcopy-paused")  # between two attempts
    both.proxy.refuses = False
    both.leaving.ask("resume")
    completes(both, migration)


def test_recovery_double_failures_handshake(both):
    """/recovery/double-failures/handshake: whoever is dialled says nothing; it is paused again, and comes through."""
    migration = halfway(both)
    both.proxy.deaf = True
    both.proxy.cut()
    paused(both)
    both.leaving.until(lambda now: now["paused"]["attempts"] > 0)
    both.leaving.ask("pause")
    for agent in both.agents:
        agent.until(lambda now: now["state"] == "postcopy-paused")
    both.proxy.admit()
    both.leaving.ask("resume")
    completes(both, migration)


def test_cancel_and_migrate_again(both):
    """/multifd+postcopy/tcp/plain/cancel: cancelled before the switchover the guest stays, and may leave later."""
    both.proxy.calm()
    both.proxy.deaf = True
    migration = both.migrate()
    both.leaving.until(lambda now: now["state"] == "setup")
    both.leaving.ask("cancel")
    assert migration.result() == 7
    both.proxy.admit()
    both.settle(7)
    both.proxy.calm()
    assert both.migrate().result() == 0
    both.settle(0)


def test_unattended_migration(both):
    """libvirt's unattended_migration: whoever asked for it is killed in the middle, and it goes on without him."""
    both.proxy.calm()
    how = () if both.kind.tls else ("--insecure",)
    arguments = ("--admin", both.leaving.admin, both.proxy.address, "--no-push", *how)
    with Command("migrate", *arguments) as asking:
        both.coming.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] > 20)
        asking.process.kill()
    both.leaving.ask("set", push=True)
    both.settle(0)


def test_postcopy_bandwidth_on_resume(both):
    """libvirt's limits of postcopy's bandwidth, also on resume: the push keeps to it, and faults go past it."""
    rate = 256 << 10
    migration = halfway(both, push=True, rate=rate)
    both.leaving.ask("pause")
    paused(both)
    before = both.leaving.ask("look")["pages"]
    began = time.monotonic()
    both.leaving.ask("resume")
    both.leaving.until(lambda now: now["state"] == "postcopy-active")
    both.leaving.until(lambda _: both.leaving.ask("look")["pages"]["demand"] >= before["demand"] + 50)
    pushed = both.leaving.ask("look")["pages"]["push"] - before["push"]
    # a quarter of a second may be sent ahead
    assert pushed * 4096 <= rate * (time.monotonic() - began + 0.25) + 65536
    completes(both, migration)
