"""Memory handed from one process to another: nothing of it is copied, and at no moment is any of it lost."""

import signal
import socket
import time

import pytest

from .agents import LOSS_SECONDS, Command, destination, run, scrape, source
from .relay import Cut, Relay, open_files

BEFORE_RUN = ["hello", "welcome", "layout_offer", "files", "ready", "state", "loaded"]


def whole(report, mode="auto"):
    """See that all of the memory was handed over and none of it moved."""
    pages = report["pages"]
    assert (report["outcome"], report["mode"]) == ("completed", mode)
    assert pages["handed_over"] == pages["total"] > 0
    assert {pages[path] for path in ("demand", "push", "zero", "duplicate")} == {0}
    assert report["bytes"] == {"wire": 0, "placed": 0}
    assert 0 < report["downtime_seconds"] < report["total_seconds"]
    assert report["resident_seconds"] == 0.0
    assert report["details"]["downtime_is_exact"]


@pytest.mark.parametrize("mode", ["auto", "minor"])
@pytest.mark.parametrize(
    "memory", [("shmem",), ("hugetlb-2M",), ("shmem:8MiB", "hugetlb-2M:8MiB", "shmem:4MiB")], ids=["4K", "2M", "both"]
)
def test_every_byte_is_there_and_none_was_copied(memory, mode, huge_pages):
    if any("hugetlb" in one for one in memory):
        huge_pages("hugetlb-2M", 16)
    words = [word for one in memory for word in ("--memory", one)]
    done = run("demo", "--handover", "--mode", mode, "--size", "32MiB", *words, "--json")
    assert done.status == 0, done.err
    report = done.json
    whole(report, mode)
    size = sum(region["size_bytes"] for region in report["memory"])
    assert report["integrity"] == {"page_size": 4096, "pages_checked": size // 4096, "pages_mismatched": 0}
    assert bool(report["fault_latency_seconds"]["count"]) == (mode == "minor")


def test_what_people_see():
    done = run("demo", "--handover", "--size", "16MiB")
    assert done.status == 0, done.err
    assert "it migrates to unix:/" in done.err
    assert "4096: all handed over with their files, none was sent" in done.out
    assert "0 B on the wire, 0 B placed" in done.out


@pytest.mark.parametrize("memory", ["anonymous", "tmpfs:/dev/shm"])
def test_memory_that_cannot_be_handed_over_is_refused_before_the_stop(memory, tmp_path):
    with (
        destination(tmp_path, "--listen", f"unix:{tmp_path}/memory.sock") as there,
        source(tmp_path, "--memory", memory, "--metrics", "127.0.0.1:0", size="8MiB") as here,
    ):
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            failed = run("migrate", "--admin", here.admin, f"tcp:127.0.0.1:{nobody.getsockname()[1]}")
        assert failed.status == 4
        done = run("migrate", "--admin", here.admin, there.address, "--json")
        assert done.status == 2
        line = done.one_line()
        assert f"region 0 ({memory.partition(':')[0]}) cannot be handed over: " in line
        assert line.endswith("send its pages to a destination that listens on tcp:127.0.0.1:PORT instead")
        assert (done.json["outcome"], done.json["exit_status"]) == ("refused", 2)
        assert here.status()["state"] == "failed"  # as the one before it left it
        here.runs_on()
        told = scrape(here.until_log(r"metrics: (http://\S+)")[1])
        assert sum(count for name, count in told.items() if name.startswith("postcopy_migrations_total")) == 1


def test_a_mode_that_copies_is_refused_before_the_stop(tmp_path):
    with (
        destination(tmp_path, "--listen", f"unix:{tmp_path}/memory.sock", "--mode", "missing") as there,
        source(tmp_path, size="8MiB") as here,
    ):
        done = run("migrate", "--admin", here.admin, there.address)
        assert done.status == 4
        assert "mode missing cannot be had: auto or minor can" in done.one_line()
        here.runs_on()
        assert "device" not in here.log


def test_trapped_memory_stays_trapped_and_is_told_of(tmp_path):
    with (
        destination(
            tmp_path, "--listen", f"unix:{tmp_path}/m.sock", "--mode", "minor", "--metrics", "127.0.0.1:0"
        ) as there,
        source(tmp_path, size="16MiB") as here,
    ):
        assert run("migrate", "--admin", here.admin, there.address).status == 0
        assert len(here.ask("look")["stall_per_vcpu"]) == 2  # as the destination told in the end
        here.signal(signal.SIGKILL)
        here.wait()
        # The guest touches every page of its own, each of them once for the trap.
        active = 16 * 256 * 7 // 8
        there.until(lambda now: now["fault_latency_seconds"]["count"] >= active)
        assert run("check", "--admin", there.admin).status == 0
        figures = scrape(there.until_log(r"http://\S+/metrics")[0].rstrip('"},'))
        assert figures['postcopy_pages_total{direction="received",path="handed_over"}'] == 4096
        assert figures["postcopy_remaining_bytes"] == 0
        assert figures['postcopy_faults_total{kind="minor",result="requested"}'] == 0
        assert figures['postcopy_faults_total{kind="minor",result="joined"}'] >= active
        there.runs_on()
        there.signal(signal.SIGTERM)
        assert there.wait() == 0


# --- the network in our hand ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    """A source and a destination that survive every test of this module, and go through with it in the end."""
    folder = tmp_path_factory.mktemp("handover")
    with (
        destination(folder, "--listen", f"unix:{folder}/memory.sock") as there,
        source(folder, size="16MiB") as here,
    ):
        yield here, there
        done = run("migrate", "--admin", here.admin, there.address, "--json")
        assert done.status == 0, done.err
        whole(done.json)
        assert run("check", "--admin", there.admin).status == 0


@pytest.mark.parametrize("at", BEFORE_RUN)
def test_whatever_is_cut_before_run_the_source_goes_on(at, agents, tmp_path):
    here, there = agents

    def on(name):
        if name == at:
            raise Cut

    before = [open_files(one.process.pid) for one in agents]
    with Relay(tmp_path, there.address, on) as relay, Command("migrate", "--admin", here.admin, relay.address) as one:
        done = one.result()
        assert done.status == 4, done.err
        assert at in relay.seen
        assert "run" not in relay.seen
    assert here.status()["owner"] == "source"
    here.runs_on()
    there.until(lambda now: now["state"] in {"none", "failed"} and now["owner"] is None)
    for agent, count in zip(agents, before, strict=True):
        settled(agent.process.pid, count)
    assert run("check", "--admin", here.admin).status == 0


def settled(pid, count):
    """Wait until a process has no more descriptors than it had."""
    end = time.monotonic() + 10
    while open_files(pid) > count:
        assert time.monotonic() < end, (open_files(pid), count)
        time.sleep(0.01)  # between two looks, not to force an order


@pytest.mark.parametrize("at", ["ready", "loaded"])
def test_a_new_process_that_is_killed_before_run(at, tmp_path):
    with (
        destination(tmp_path, "--listen", f"unix:{tmp_path}/memory.sock") as there,
        source(tmp_path, size="16MiB") as here,
    ):

        def on(name):
            if name == at:
                there.signal(signal.SIGKILL)
                there.wait()
                raise Cut

        with Relay(tmp_path, there.address, on) as relay:
            assert run("migrate", "--admin", here.admin, relay.address).status == 4
        here.runs_on()
        assert run("check", "--admin", here.admin).status == 0


@pytest.mark.parametrize("mode", ["auto", "minor"])
@pytest.mark.parametrize("memory", ["shmem", "hugetlb-2M"])
def test_the_old_process_is_killed_the_moment_it_has_sent_run(memory, mode, tmp_path, huge_pages):
    if memory != "shmem":
        huge_pages(memory, 16)
    with (
        destination(tmp_path, "--listen", f"unix:{tmp_path}/memory.sock", "--mode", mode) as there,
        source(tmp_path, "--memory", memory, size="32MiB") as here,
    ):

        def on(name):
            if name == "run":  # it has left the old process and has not reached the new one
                here.signal(signal.SIGKILL)
                here.wait()

        with (
            Relay(tmp_path, there.address, on) as relay,
            Command("migrate", "--admin", here.admin, relay.address) as migration,
        ):
            there.until(lambda now: now["state"] == "completed" and now["ended"])
            assert migration.result(LOSS_SECONDS).status == 6  # the command cannot know
        assert there.status()["owner"] == "destination"
        there.runs_on()
        found = run("check", "--admin", there.admin, "--json").json
        assert (found["pages_checked"], found["pages_mismatched"]) == (32 << 8, 0)
        whole_there = there.status()["report"]
        assert whole_there["pages"]["handed_over"] == whole_there["pages"]["total"]


def test_a_run_that_is_lost_leaves_nobody_running(tmp_path):
    """The source has sent Run and cannot know: it does not go on, and what never got Run does not begin."""
    with (
        destination(tmp_path, "--listen", f"unix:{tmp_path}/memory.sock") as there,
        source(tmp_path, size="8MiB") as here,
    ):

        def on(name):
            if name == "run":
                raise Cut

        with Relay(tmp_path, there.address, on) as relay:
            done = run("migrate", "--admin", here.admin, relay.address)
        assert done.status == 6
        assert "the destination may be running the guest, so it stays stopped here" in done.one_line()
        assert here.wait() == 6
        there.until(lambda now: now["state"] == "failed" and now["guest"] is None)
