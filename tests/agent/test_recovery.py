"""After Run connections come and go, and the migration comes through: real daemons, a proxy that cuts between them.

With the push at work, again and again at random: tests/chaos/test_rounds.py.
"""

import signal

import pytest

from tests.chaos.link import CONTROL, PUSH, URGENT
from tests.chaos.proxy import Proxy, upstream_of, wait_for

from .agents import Command, destination, given_up, run, source

# The guest touches its pages one by one, and nothing is pushed: pages are at the source for as long as the test likes.
SLOW = ("--steps-per-second", "500", "--workload", "random")
NOTICE_SECONDS = 5  # before anything but silence tells: the kernel does after 6 s, and so does who is owed pages


class Story:
    """A migration through a proxy that has switched over and has pages at both ends."""

    def __init__(self, there, here, proxy, migration):
        self.there, self.here, self.proxy, self.migration = there, here, proxy, migration

    def paused(self):
        for agent in (self.here, self.there):
            agent.until(lambda now: now["state"] in {"postcopy-paused", "postcopy-recover"}, NOTICE_SECONDS)

    def resumed(self, times=1):
        for agent in (self.here, self.there):
            agent.until(lambda now: now["state"] == "postcopy-active" and now["reconnects"] >= times)

    def moves_on(self):
        """See that the guest gets pages that it lacks."""
        placed = self.there.status()["pages"]["placed"]
        self.there.until(lambda now: now["pages"]["placed"] > placed + 20)

    def comes_through(self, reconnects=1):
        """Let the rest be pushed, and compare every byte."""
        if self.here.status()["state"] == "postcopy-active":
            assert run("set", "--admin", self.here.admin, "--push").status == 0
        done = self.migration.result(60)
        assert done.status == 0, done.err
        self.there.until(lambda now: now["state"] == "completed")
        report = self.here.status()["report"]
        assert report["details"]["reconnects"] >= reconnects
        pages = report["pages"]
        assert pages["demand"] + pages["push"] + pages["zero"] == pages["total"]
        self.checked()

    def checked(self):
        checked = run("check", "--admin", self.there.admin, "--json").json
        assert (checked["pages_mismatched"], checked["pages_checked"]) == (0, 8192)
        assert "Traceback" not in self.here.log + self.there.log


@pytest.fixture
def story(tmp_path):
    with (
        destination(tmp_path) as there,
        source(tmp_path, *SLOW, size="32MiB") as here,
        Proxy(upstream_of(there.address)) as proxy,
        Command("migrate", "--admin", here.admin, proxy.address, "--no-push") as migration,
    ):
        there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] > 50)
        yield Story(there, here, proxy, migration)


@pytest.mark.parametrize("role", [CONTROL, URGENT, PUSH, None])
def test_any_connection_that_ends(story, role):
    for times in (1, 2, 3):
        story.proxy.cut(*([role] if role is not None else []))
        story.resumed(times)
        story.moves_on()
    story.comes_through(3)


def test_a_link_that_says_nothing_any_more(story):
    story.proxy.deaf = True
    story.proxy.swallow()
    story.paused()
    assert story.here.status()["owner"] == story.there.status()["owner"] == "destination"
    story.proxy.deaf = False
    story.resumed()
    story.moves_on()
    story.comes_through()


def test_a_guest_that_faults_nowhere_is_no_reason_not_to_notice(tmp_path):
    with (
        destination(tmp_path) as there,
        source(tmp_path, "--steps", "3000", *SLOW, size="32MiB") as here,
        Proxy(upstream_of(there.address)) as proxy,
        Command("migrate", "--admin", here.admin, proxy.address, "--no-push") as migration,
    ):
        there.until(lambda now: now["state"] == "postcopy-active" and min(now["guest"]["steps"]) >= 3000)
        story = Story(there, here, proxy, migration)
        proxy.deaf = True
        proxy.swallow()
        story.paused()
        proxy.deaf = False
        story.resumed()
        story.comes_through()


def test_a_second_and_a_third_failure_on_the_way_back(story):
    story.proxy.refuses = True
    story.proxy.cut()
    story.paused()
    seen = story.proxy.accepted
    wait_for(lambda: story.proxy.accepted > seen + 2, "the source does not try again")
    # now somebody answers and says nothing: an attempt that has to be given up
    story.proxy.refuses, story.proxy.deaf = False, True
    seen = story.proxy.accepted
    wait_for(lambda: story.proxy.accepted > seen, "the source does not try again")
    story.proxy.cut()
    # and now the connections of the attempt break one after the other
    story.proxy.deaf = False
    for role, budget in ((CONTROL, 300), (URGENT, 65), (PUSH, 1)):
        story.proxy.budget[role] = budget
    story.resumed()
    story.moves_on()
    story.comes_through()


def test_a_frame_that_is_nonsense_is_a_pause_and_no_loss(story):
    story.proxy.spoil[URGENT] = 0
    story.resumed()
    story.there.until_log(r"refused \(magic\)")
    story.moves_on()
    story.comes_through()


def test_a_message_that_is_nonsense_is_a_pause_and_no_loss(story):
    story.proxy.spoil[CONTROL] = 4
    story.resumed()
    story.comes_through()


def test_the_last_words_are_lost(story):
    """All is placed, and the message that says so never arrives: the source asks and is told."""
    story.proxy.budget[CONTROL] = 10**9
    assert run("set", "--admin", story.here.admin, "--push").status == 0
    story.proxy.deaf = True
    with story.proxy.lock:
        for link in story.proxy.links:
            link.silent = link.role is CONTROL
    story.there.until(lambda now: now["state"] == "completed")
    story.proxy.cut()
    story.proxy.deaf = False
    done = story.migration.result(60)
    assert done.status == 0, done.err
    story.checked()


def test_by_hand(story):
    here, there = story.here, story.there
    refused = run("resume", "--admin", here.admin)
    assert (refused.status, refused.one_line()) == (
        2,
        "postcopy: the migration cannot be resumed: it is not paused",
    )
    refused = run("cancel", "--lost", "--admin", here.admin)
    assert (refused.status, "not paused" in refused.one_line()) == (2, True)
    assert run("pause", "--admin", here.admin, "--json").json["state"] == "postcopy-paused"
    told = story.migration.result()
    assert told.status == 5
    assert "paused by hand: postcopy resume" in told.one_line()
    story.paused()
    status = here.status()
    assert (status["paused"]["held"], status["owner"]) == (True, "destination")
    refused = run("cancel", "--admin", here.admin)
    assert (refused.status, "the guest runs at the destination" in refused.one_line()) == (2, True)
    # at another address of the same destination
    done = run("resume", "--admin", here.admin, "--to", there.address)
    assert done.status == 0, done.err
    assert "postcopy-active" in done.out
    story.resumed()
    wait_for(lambda: story.proxy.roles() == [], "connections through the proxy stay")
    # and held at the other end, which the source cannot overrule
    assert run("pause", "--admin", there.admin).status == 0
    there.until(lambda now: now["paused"] is not None and now["paused"]["held"])
    here.until(lambda now: now["paused"] is not None)
    failed = run("resume", "--admin", here.admin)
    assert failed.status == 5
    assert "held at the destination" in failed.one_line()
    assert run("resume", "--admin", there.admin).status == 0
    here.until(lambda now: now["state"] == "postcopy-active" and now["reconnects"] == 2)
    assert run("set", "--admin", here.admin, "--push").status == 0
    there.until(lambda now: now["state"] == "completed")
    story.checked()


def test_a_wrong_address_costs_an_attempt_and_no_more(story):
    here = story.here
    assert run("pause", "--admin", here.admin).status == 0
    failed = run("resume", "--admin", here.admin, "--to", "tcp:127.0.0.1:1")
    assert failed.status == 5
    assert "cannot connect to tcp:127.0.0.1:1" in failed.one_line()
    story.resumed()  # where it was
    assert run("set", "--admin", here.admin, "--push").status == 0
    story.there.until(lambda now: now["state"] == "completed")
    story.checked()


@pytest.mark.parametrize("side", ["here", "there"])
def test_an_agent_that_stands_still_for_a_while(story, side):
    agent = getattr(story, side)
    other = story.there if side == "here" else story.here
    agent.signal(signal.SIGSTOP)
    other.until(lambda now: now["state"] == "postcopy-paused", NOTICE_SECONDS)
    agent.signal(signal.SIGCONT)
    story.resumed()
    story.moves_on()
    story.comes_through()


def lost(agent, text="the guest is lost"):
    assert agent.wait() == 6
    assert text in agent.log
    assert "Traceback" not in agent.log


@pytest.mark.parametrize("side", ["here", "there"])
def test_given_up_by_hand(story, side):
    story.proxy.refuses = True
    story.proxy.cut()
    story.paused()
    agent = getattr(story, side)
    placed = story.there.status()["pages"]["placed"]
    done = run("cancel", "--lost", "--admin", agent.admin, "--json")
    assert done.status == 0, done.err
    if side == "there":
        assert 0 < done.json["lost_pages"] <= 8192 - placed
        assert given_up(story.there, 8192) == done.json["lost_pages"]
        # nobody is there any more: somebody has to decide here, too
        story.here.until(lambda now: now["state"] == "postcopy-paused")  # between two attempts
        assert run("cancel", "--lost", "--admin", story.here.admin).status == 0
    told = story.migration.result()
    assert told.status == 6
    assert "lost after the switchover" in told.one_line()
    lost(story.here)


def test_whoever_comes_back_to_a_guest_that_was_given_up_is_told(tmp_path):
    with (
        destination(tmp_path, "--give-up-after", "1") as there,
        source(tmp_path, *SLOW, size="32MiB") as here,
        Proxy(upstream_of(there.address)) as proxy,
        Command("migrate", "--admin", here.admin, proxy.address, "--no-push") as migration,
    ):
        there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] > 50)
        assert run("pause", "--admin", here.admin).status == 0
        there.until_log("it was not resumed in time")
        resumed = run("resume", "--admin", here.admin)
        assert (resumed.status, "the migration is lost" in resumed.one_line()) == (6, True)
        told = migration.result()
        assert told.status in {5, 6}  # it was paused by hand
        lost(here)
        given_up(there, 8192)


def test_given_up_after_a_time(tmp_path):
    with (
        destination(tmp_path) as there,
        source(tmp_path, "--give-up-after", "1.5", *SLOW, size="32MiB") as here,
        Proxy(upstream_of(there.address)) as proxy,
        Command("migrate", "--admin", here.admin, proxy.address, "--no-push") as migration,
    ):
        there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] > 50)
        proxy.refuses = True
        proxy.cut()
        told = migration.result()
        assert told.status == 6
        assert "it could not be resumed in time" in told.one_line()
        lost(here)
        there.until(lambda now: now["state"] == "postcopy-paused")


def test_an_agent_that_ends_says_so(story):
    story.there.signal(signal.SIGTERM)
    lost(story.there)
    told = story.migration.result()
    assert told.status == 6
    assert "the destination's agent ends" in told.one_line()
    lost(story.here)


@pytest.mark.parametrize("side", ["here", "there"])
def test_an_agent_that_is_killed_leaves_the_other_one_waiting_until_somebody_decides(story, side):
    killed = getattr(story, side)
    other = story.there if side == "here" else story.here
    killed.signal(signal.SIGKILL)
    other.until(lambda now: now["state"] == "postcopy-paused", NOTICE_SECONDS)
    assert run("cancel", "--lost", "--admin", other.admin).status == 0
    if side == "here":
        given_up(other, 8192)
    else:
        lost(other)
    assert story.migration.result().status == 6
