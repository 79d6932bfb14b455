"""A source's agent that is killed after the switchover, and another one that takes its place: no page is lost by it."""

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from postcopy.limits import RECONNECT_SECONDS
from tests.certificates import directory
from tests.chaos.proxy import Proxy, upstream_of

from .agents import Command, Daemon, destination, run, source
from .keepers import end_keepers_of, gone, pid_of, stop

SLOW = ("--steps-per-second", "500", "--workload", "random")


def returned(folder, keeper, *arguments):
    (folder / "again").mkdir(exist_ok=True)
    return Daemon(folder / "again", "source", "--resume", keeper, *arguments)


def comes_through(again, there):
    """See a source that took the place of another to its end, and every byte at the destination right."""
    again.ask("set", push=True)
    assert again.wait(40) == 0, again.log
    there.until(lambda now: now["state"] == "completed")
    assert there.ask("check")["pages_mismatched"] == 0


@pytest.fixture
def keeper(tmp_path):
    yield f"unix:{tmp_path}/keeper.sock"
    end_keepers_of(tmp_path)


@pytest.mark.parametrize(("memory", "encrypted"), [("shmem", False), ("shmem", True), ("hugetlb-2M", False)])
def test_a_killed_source_is_followed_by_another(memory, encrypted, keeper, tmp_path, huge_pages):
    if memory == "hugetlb-2M":
        huge_pages(memory, 64)
    tls = ("--tls-dir", directory(tmp_path / "tls")) if encrypted else ()
    with (
        destination(tmp_path, *tls) as there,
        source(tmp_path, "--memory", memory, "--keeper", keeper, *tls, *SLOW, size="32MiB") as here,
        Command("migrate", "--admin", here.admin, there.address, "--no-push") as migration,
    ):
        there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] >= 5)
        here.signal(signal.SIGKILL)
        left = migration.result()
        assert (left.status, f"postcopy source --resume {keeper} goes on" in left.one_line()) == (5, True)
        there.until(lambda now: now["state"] == "postcopy-paused")
        if encrypted:  # whoever takes over needs what it takes to be believed, and leaves the rest as it was
            refused = run("source", "--resume", keeper)
            assert (refused.status, "is encrypted: --tls-dir" in refused.one_line()) == (2, True)
        for times in (1, 2):
            with returned(tmp_path, keeper, *tls) as again:
                there.until(lambda now, times=times: now["state"] == "postcopy-active" and now["reconnects"] == times)
                placed = there.status()["pages"]["placed"]
                if times == 1:  # and killed once more
                    if memory == "shmem":
                        there.until(lambda now, placed=placed: now["pages"]["placed"] > placed)
                    early = run("source", "--resume", keeper, *tls)
                    assert (early.status, f"process {again.status()['pid']}" in early.one_line()) == (2, True)
                    again.signal(signal.SIGKILL)
                    again.wait()
                    continue
                assert run("set", "--admin", again.admin, "--push").status == 0
                assert again.wait(40) == 0, again.log
        there.until(lambda now: now["state"] == "completed")
        assert run("check", "--admin", there.admin, "--json").json["pages_mismatched"] == 0
        report = there.status()["report"]
        assert sum(report["pages"][path] for path in ("demand", "push", "zero")) == report["pages"]["total"]
        gone(keeper)


def test_a_source_that_ends_leaves_the_rest_with_the_keeper(keeper, tmp_path):
    with (
        destination(tmp_path) as there,
        source(tmp_path, "--keeper", keeper, *SLOW, size="32MiB") as here,
        Command("migrate", "--admin", here.admin, there.address, "--no-push") as _,
    ):
        there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] >= 50)
        there.signal(signal.SIGSTOP)  # so that the push comes to nothing
        here.signal(signal.SIGTERM)
        here.until_log("pages of the running guest are still here")
        here.signal(signal.SIGTERM)
        assert here.wait() == 5
        assert f"postcopy source --resume {keeper} goes on" in here.log
        there.signal(signal.SIGCONT)
        with returned(tmp_path, keeper) as again:
            there.until(lambda now: now["reconnects"] >= 1)
            run("set", "--admin", again.admin, "--push")
            assert again.wait(40) == 0, again.log
        there.until(lambda now: now["state"] == "completed")
        assert run("check", "--admin", there.admin, "--json").json["pages_mismatched"] == 0
        gone(keeper)


def test_without_a_migration_it_ends_with_its_agent(keeper, tmp_path):
    with source(tmp_path, "--keeper", keeper, size="8MiB") as here:
        assert Path(keeper.removeprefix("unix:")).stat().st_mode & 0o777 == 0o600
        early = run("source", "--resume", keeper)
        assert early.status == 2
        assert f"its agent lives, process {here.status()['pid']}, and goes on itself" in early.one_line()
        here.runs_on()
        here.signal(signal.SIGKILL)
        here.wait()
        gone(keeper)
    nobody = run("source", "--resume", keeper)
    assert nobody.status == 8
    assert f"no migration can be taken up at {keeper}: no keeper is there" in nobody.one_line()


def test_a_path_at_which_no_keeper_is_says_nothing_of_what_is_kept(keeper, tmp_path):
    """It may be a mistake of whoever typed it: a keeper whose socket was moved still has all of it."""
    path, moved = Path(keeper.removeprefix("unix:")), tmp_path / "moved.sock"
    with source(tmp_path, "--keeper", keeper, size="8MiB") as here:
        path.rename(moved)
        there = run("source", "--resume", keeper)
        assert there.status == 8
        assert "or its keeper is at another path" in there.one_line()
        assert "`postcopy status` at the destination tells" in there.one_line()
        found = run("source", "--resume", f"unix:{moved}")
        assert (found.status, f"its agent lives, process {here.status()['pid']}" in found.one_line()) == (2, True)
        moved.rename(path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    refused = run("source", "--resume", f"unix:{tmp_path}/typo/kept.sock")
    assert refused.status == 2
    assert f"there is no folder {tmp_path}/typo" in refused.one_line()


def test_memory_without_a_file_cannot_be_kept(keeper):
    refused = run("source", "--memory", "anonymous", "--size", "8MiB", "--keeper", keeper)
    assert refused.status == 2
    assert "has no file that could outlive this agent" in refused.one_line()


@pytest.mark.parametrize("option", ["--keeper", "--resume"])
def test_a_snapshot_has_no_keeper(option, keeper, tmp_path):
    refused = run("source", "--memory", f"file:{tmp_path}/memory", option, keeper, deadline=20)
    assert refused.status == 2
    assert f"{option}: it is for guests that leave this agent" in refused.one_line()


def test_a_migration_that_comes_through_needs_its_keeper_no_more(keeper, tmp_path):
    with destination(tmp_path) as there, source(tmp_path, "--keeper", keeper, size="8MiB") as here:
        assert run("migrate", "--admin", here.admin, there.address).status == 0
        gone(keeper)


def test_a_stranger_gets_nothing(keeper, tmp_path):
    """Another user than the agent's own and root is let in nowhere, whatever the socket's mode says by then."""
    with source(tmp_path, "--keeper", keeper, size="8MiB"):
        path = keeper.removeprefix("unix:")
        Path(path).chmod(0o666)
        tmp_path.chmod(0o755)
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            status = 1
            try:
                with socket.socket(socket.AF_UNIX) as stranger:
                    stranger.connect(path)
                    status = 0 if stranger.recv(1) == b"" else 2
            except OSError:
                status = 0
            os._exit(status)
        _, ended = asyncio.run(asyncio.to_thread(os.waitpid, child, 0))
        assert os.waitstatus_to_exitcode(ended) == 0


# --- a guest that goes on, and what is said to a migration after it has begun -----------------------------------------


def test_an_agent_that_sent_its_guest_on_is_followed_by_another(keeper, tmp_path):
    """A keeper wherever a source runs: here in an agent that the guest had come to."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with (
        source(tmp_path, *SLOW, size="8MiB") as home,
        destination(tmp_path / "one", "--keeper", keeper) as one,
        destination(tmp_path / "two") as two,
    ):
        assert run("migrate", "--admin", home.admin, one.address).status == 0
        one.until(lambda now: now["role"] == "destination" and now["state"] == "completed" and now["ended"])
        with Command("migrate", "--admin", one.admin, two.address, "--no-push"):
            two.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] >= 5)
            one.signal(signal.SIGKILL)
            one.wait()
        with returned(tmp_path, keeper) as again:
            two.until(lambda now: now["state"] == "postcopy-active" and now["reconnects"] == 1)
            again.ask("set", push=True)
            assert again.wait(40) == 0, again.log
        two.until(lambda now: now["role"] == "destination" and now["state"] == "completed")
        assert two.ask("check")["pages_mismatched"] == 0
        gone(keeper)


def test_what_is_said_to_a_migration_is_remembered_for_it(keeper, tmp_path):
    """Another address, and a push: whoever takes a killed agent's place goes on so, and not as it began."""
    with (
        destination(tmp_path) as there,
        source(tmp_path, "--keeper", keeper, *SLOW, size="8MiB") as here,
        Proxy(upstream_of(there.address)) as way,
    ):
        with Command("migrate", "--admin", here.admin, way.address, "--no-push"):
            there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] >= 5)
            way.refuses = True
            way.cut()
            here.until(lambda now: now["paused"] is not None)
            assert run("resume", "--admin", here.admin, "--to", there.address).status == 0
            there.signal(signal.SIGSTOP)  # so that nothing comes of the push here
            here.ask("set", push=True)
            here.signal(signal.SIGKILL)
            here.wait()
        there.signal(signal.SIGCONT)
        with returned(tmp_path, keeper) as again:
            assert again.wait(40) == 0, again.log
        there.until(lambda now: now["state"] == "completed")
        assert there.ask("check")["pages_mismatched"] == 0


@pytest.mark.parametrize("right", [True, False])
def test_where_a_destination_is_said_to_be_outlives_the_agent_that_was_told_as_does_where_it_was(
    right, keeper, tmp_path
):
    with (
        destination(tmp_path) as there,
        source(tmp_path, "--keeper", keeper, *SLOW, size="8MiB") as here,
        Proxy(upstream_of(there.address)) as way,
    ):
        with Command("migrate", "--admin", here.admin, way.address, "--no-push"):
            there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] >= 5)
            assert run("pause", "--admin", there.admin).status == 0  # so that nobody answers, wherever
            here.until(lambda now: now["state"] == "postcopy-paused")
            told = there.address if right else "tcp:127.0.0.1:1"
            assert run("resume", "--admin", here.admin, "--to", told).status == 5
            here.signal(signal.SIGKILL)
            here.wait()
        way.refuses = right  # the one or the other leads there
        assert run("resume", "--admin", there.admin).status == 0
        with returned(tmp_path, keeper) as again:
            there.until(lambda now: now["state"] == "postcopy-active" and now["reconnects"] == 1)
            assert bool(way.roles()) != right
            comes_through(again, there)


def test_a_pause_by_hand_outlives_the_agent_that_was_asked_for_it(keeper, tmp_path):
    with (
        destination(tmp_path) as there,
        source(tmp_path, "--keeper", keeper, *SLOW, size="8MiB") as here,
    ):
        with Command("migrate", "--admin", here.admin, there.address, "--no-push"):
            there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] >= 5)
            assert run("pause", "--admin", here.admin).status == 0
            here.signal(signal.SIGKILL)
            here.wait()
        with returned(tmp_path, keeper) as again:
            again.until_log("somebody paused this migration: it waits for postcopy resume")
            long = 2 * sum(RECONNECT_SECONDS[:3])
            now = again.until(lambda now: now["state"] != "postcopy-paused" or now["paused"]["seconds"] > long)
            assert (now["state"], now["reconnects"]) == ("postcopy-paused", 0)
            assert (now["paused"]["held"], now["paused"]["attempts"]) == (True, 0)
            assert run("resume", "--admin", again.admin).status == 0
            again.signal(signal.SIGKILL)  # and that is kept as well
            again.wait()
        with returned(tmp_path, keeper) as again:
            there.until(lambda now: now["state"] == "postcopy-active" and now["reconnects"] == 2)
            comes_through(again, there)


# --- a keeper that is in trouble itself -------------------------------------------------------------------------------


def test_a_keeper_that_is_gone_is_followed_by_another(keeper, tmp_path):
    with (
        destination(tmp_path) as there,
        source(tmp_path, "--keeper", keeper, *SLOW, size="8MiB") as here,
        Command("migrate", "--admin", here.admin, there.address, "--no-push"),
    ):
        there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] >= 5)
        os.kill(pid_of(keeper), signal.SIGKILL)
        found = here.until_log(r"the keeper of the guest's memory has ended: process (\d+) follows it")
        stop(int(found[1]))  # it keeps all the same
        here.signal(signal.SIGKILL)
        here.wait()
        with returned(tmp_path, keeper) as again:
            again.until_log("was stopped: it goes on now")
            comes_through(again, there)
        gone(keeper)


def test_without_a_keeper_nobody_leaves(tmp_path):
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    place.mkdir()
    keeper = f"unix:{place}/keeper.sock"
    with destination(tmp_path) as there, source(tmp_path, "--keeper", keeper, size="8MiB") as here:
        place.rename(elsewhere)
        os.kill(pid_of(keeper), signal.SIGKILL)
        here.until_log("the guest's memory ends with this agent: no keeper can be started")
        refused = run("migrate", "--admin", here.admin, there.address)
        assert refused.status == 4
        assert "the guest's memory is kept by nobody: no keeper can be started" in refused.one_line()
        assert (here.status()["state"], there.status()["state"]) == ("none", "none")
        here.runs_on()
        elsewhere.rename(place)
        assert run("migrate", "--admin", here.admin, there.address).status == 0
        gone(keeper)
        assert "Traceback" not in here.log


def test_without_a_keeper_what_is_still_here_ends_with_the_agent(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    keeper = f"unix:{place}/keeper.sock"
    with (
        destination(tmp_path) as there,
        source(tmp_path, "--keeper", keeper, *SLOW, size="32MiB") as here,
        Command("migrate", "--admin", here.admin, there.address, "--no-push"),
    ):
        there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] >= 5)
        there.signal(signal.SIGSTOP)  # so that the push comes to nothing
        place.rename(tmp_path / "elsewhere")
        os.kill(pid_of(keeper), signal.SIGKILL)
        here.until_log("the guest's memory ends with this agent: no keeper can be started")
        here.signal(signal.SIGTERM)
        here.until_log("pages of the running guest are still here")
        here.signal(signal.SIGTERM)
        assert here.wait() == 6
        there.signal(signal.SIGCONT)
        there.until(lambda now: now["state"] == "lost")  # and does not wait for it
