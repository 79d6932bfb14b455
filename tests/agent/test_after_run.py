"""Agents that end or stand still after Run: clear words, the right status, no hang. Connections: test_recovery.py."""

import os
import signal

import pytest

from postcopy.wire.control import AllPlaced, Cancel, Loaded, Progress, Refuse, Resume, Run, Running, State
from postcopy.wire.preamble import Role

from .agents import LOSS_SECONDS, Command, destination, given_up, run, source
from .fakes import Channel, FakeDestination

SLOW = ("--steps-per-second", "500")  # the guest touches its pages one by one: some are at the source for long


@pytest.fixture
def halfway(tmp_path):
    """A migration that has switched over and has pages at both ends: source, destination, the migrate command."""
    with (
        destination(tmp_path) as there,
        source(tmp_path, *SLOW) as here,
        Command("migrate", "--admin", here.admin, there.address, "--no-push") as migration,
    ):
        there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] > 100)
        here.until(lambda now: now["state"] == "postcopy-active")  # it has heard of it, too
        yield here, there, migration


def lost(daemon):
    assert daemon.wait(LOSS_SECONDS) == 6
    assert "lost after the switchover" in daemon.log or "the guest is lost" in daemon.log
    assert "Traceback" not in daemon.log


def told(migration, text):
    done = migration.result(LOSS_SECONDS)
    assert done.status == 6, done.err
    assert text in done.one_line()


def test_a_source_that_stands_still(halfway):
    here, there, migration = halfway
    here.signal(signal.SIGSTOP)
    with Command("status", "--admin", here.admin) as status:
        there.until(lambda now: now["state"] == "postcopy-paused")
        there.until_log("nothing was heard from the source")
        silence = migration.result(2 * LOSS_SECONDS)
        assert silence.status == 6
        assert "the source's agent at unix:" in silence.one_line()
        assert "does not answer any more" in silence.one_line()
        asked = status.result(2 * LOSS_SECONDS)
        assert asked.status == 1
        assert "does not answer: nothing was heard for 10 s" in asked.one_line()
    here.signal(signal.SIGCONT)
    there.until(lambda now: now["state"] == "postcopy-active")


def test_sigterm_to_a_destination_that_is_not_whole(halfway):
    here, there, migration = halfway
    there.signal(signal.SIGTERM)
    lost(there)
    told(migration, "lost after the switchover")
    lost(here)


def test_sigterm_to_a_source_that_still_has_pages(halfway):
    here, there, migration = halfway
    there.signal(signal.SIGSTOP)  # so that the push comes to nothing
    here.signal(signal.SIGTERM)
    here.until_log("pages of the running guest are still here")
    here.signal(signal.SIGTERM)
    assert here.wait() == 6
    assert "the guest is lost" in here.log
    told(migration, "the source's agent ends")
    there.signal(signal.SIGCONT)
    # it was told, unless it had been silent for so long that nobody spoke to it any more
    if there.until(lambda now: now["state"] in {"lost", "postcopy-paused"})["state"] == "postcopy-paused":
        there.ask("cancel", lost=True)
    given_up(there, 16384)


@pytest.mark.parametrize("limit", [(), ("--max-postcopy-bandwidth", "1B/s")])
def test_sigterm_to_a_source_sends_what_is_left_and_waits_for_the_last_page(limit, tmp_path):
    with (
        destination(tmp_path) as there,
        source(tmp_path, *SLOW) as here,
        Command("migrate", "--admin", here.admin, there.address, *(limit or ["--no-push"])) as migration,
    ):
        there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] > 100)
        here.signal(signal.SIGTERM)
        sent_and_ended(here, there, migration)


def sent_and_ended(here, there, migration):
    here.until_log("pages of the running guest are still here: pushing them without any limit")
    done = migration.result(40)
    assert done.status == 0, done.err
    assert here.wait() == 0
    assert run("check", "--admin", there.admin).status == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_run_does_not_cancel(number, halfway):
    here, there, migration = halfway
    migration.process.send_signal(number)
    done = migration.result()
    assert done.status == 128 + number
    assert done.one_line().endswith("the guest runs at the destination, and the migration goes on without this command")
    assert here.status()["state"] == there.status()["state"] == "postcopy-active"
    assert run("set", "--admin", here.admin, "--push").status == 0
    there.until(lambda now: now["state"] == "completed")


@pytest.fixture
def run_sent(tmp_path):
    """A source that has sent Run to a fake destination."""
    with (
        source(tmp_path, size="8MiB") as here,
        FakeDestination() as fake,
        Command("migrate", "--admin", here.admin, fake.address) as migration,
    ):
        fake.upto_attached()
        fake.control.expect(State)
        assert here.status()["state"] == "device"
        fake.control.send(Loaded())
        fake.control.expect(Run)
        yield here, fake, migration


@pytest.mark.parametrize("end", ["control", "urgent", "push"])
def test_any_connection_that_ends_is_a_pause_in_which_the_source_asks(run_sent, end):
    here, fake, migration = run_sent
    connection = fake.control if end == "control" else fake.data[Role[end.upper()]]
    connection.close()
    preamble, connection = fake.accept()
    assert preamble.role is Role.CONTROL
    returned = Channel(connection)
    resume = returned.expect(Resume)
    assert (resume.migration_id, resume.token) == (b"i" * 16, b"t" * 32)
    assert here.status()["state"] == "postcopy-recover"
    assert here.status()["guest"] is None
    returned.send(Refuse("lost", "it was given up here"))
    told(migration, "it stays stopped here")
    lost(here)
    connection.close()


def test_a_guest_that_never_ran_there_runs_here_again(run_sent):
    """Run was lost on the way, and the destination threw away what had come: it says so, and nobody else runs it."""
    here, fake, migration = run_sent
    fake.control.close()
    _, connection = fake.accept()
    returned = Channel(connection)
    returned.expect(Resume)
    returned.send(Refuse("unrun", "RUN never came here"))
    done = migration.result()
    assert done.status == 4
    assert "RUN never came here" in done.one_line()
    here.runs_on()
    assert here.status()["owner"] == "source"
    connection.close()


def test_the_source_never_takes_the_guest_back(run_sent):
    here, fake, migration = run_sent
    fake.control.send(Cancel("changed my mind"))
    fake.control.send(Running(1.0))
    fake.control.send(Progress(1, 2048, 1))
    here.until(lambda now: now["pages"]["placed"] == 1)
    status = here.status()
    assert (status["state"], status["owner"], status["guest"]) == ("postcopy-active", "destination", None)
    fake.control.send(AllPlaced({"pages": "none of your business"}))
    done = migration.result()
    assert done.status == 1
    assert "the report is incomplete" in done.one_line()
    here.until(lambda now: now["state"] == "completed")
    os.kill(here.process.pid, signal.SIGTERM)
    assert here.wait() == 0
