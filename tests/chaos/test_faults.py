"""What networks do to one kind of connection, while a guest is on its way between two hosts: it comes through."""

import pytest

from .link import CONTROL, PUSH, URGENT
from .network import two_hosts
from .pair import Kind, Pair, pair
from .proxy import wait_for

ROLES = pytest.mark.parametrize("role", [CONTROL, URGENT, PUSH], ids=["control", "urgent", "push"])
NOTICE_SECONDS = 5  # before anything but silence tells: the kernel does after 6 s, and so does who is owed pages


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory):
    with pair(tmp_path_factory.mktemp("encrypted"), Kind("tls", tls=True, workload="random")) as both:
        yield both


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with pair(tmp_path_factory.mktemp("plain"), Kind("plain", workload="random")) as both:
        yield both


def halfway(both, **arguments):
    """Begin a migration, and return it when the guest runs at the other host and pages of it are at this one."""
    both.proxy.calm()
    migration = both.migrate(push=False, **arguments)
    both.coming.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] > 20)
    return migration


def paused(both):
    for agent in both.agents:
        agent.until(lambda now: now["state"] in {"postcopy-paused", "postcopy-recover"}, NOTICE_SECONDS)


def resumed(both):
    """See that the pages which the guest waits for come again, of themselves."""
    for agent in both.agents:
        agent.until(lambda now: now["state"] == "postcopy-active" and now["reconnects"] >= 1)


def comes_through(both, migration):
    both.proxy.calm()
    both.leaving.ask("set", push=True, rate=0)
    assert migration.result() == 0, migration.error
    both.settle(0)


@ROLES
def test_a_long_way(role, encrypted):
    encrypted.proxy.calm()
    encrypted.proxy.delay[role] = 0.02
    assert encrypted.migrate().result() == 0
    encrypted.settle(0)


@ROLES
def test_a_narrow_way(role, encrypted):
    encrypted.proxy.calm()
    encrypted.proxy.rate[role] = 8 << 20
    assert encrypted.migrate().result() == 0
    encrypted.settle(0)


@ROLES
@pytest.mark.parametrize("count", [1, 65, 700, 100_000])
def test_cut_after_so_many_bytes(count, role, encrypted):
    """Before the switchover the guest stays, behind it it comes through: which of them, the byte decides."""
    encrypted.proxy.calm()
    encrypted.proxy.budget[role] = count
    migration = encrypted.migrate()
    encrypted.settle(migration.result())


@ROLES
def test_what_is_sent_waits_unread(role, plain):
    migration = halfway(plain)
    plain.proxy.swallow(role)
    paused(plain)
    resumed(plain)
    comes_through(plain, migration)


@ROLES
def test_what_is_sent_is_lost(role, encrypted):
    migration = halfway(encrypted)
    encrypted.proxy.swallow(role, lose=True)
    paused(encrypted)
    resumed(encrypted)
    comes_through(encrypted, migration)


# --- a byte that is another one at the other end -------------------------------------------------------------------


@ROLES
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
def test_a_spoilt_byte_of_an_encrypted_connection_costs_the_connection(back, role, encrypted):
    migration = halfway(encrypted)
    proxy = encrypted.proxy
    spoilt = proxy.spoilt
    (proxy.spoil_back if back else proxy.spoil)[role] = 5
    if role is PUSH and not back:
        encrypted.leaving.ask("set", push=True)
    wait_for(lambda: proxy.spoilt > spoilt, "nothing came by")  # heartbeats and messages come by themselves
    encrypted.leaving.until(lambda now: now["reconnects"] >= 1)
    comes_through(encrypted, migration)


def test_no_spoilt_byte_reaches_an_encrypted_guest(encrypted):
    """Again and again, anywhere in the stream of pages."""
    proxy, spoilt = encrypted.proxy, encrypted.proxy.spoilt
    migration = halfway(encrypted, rate=16 << 20)
    encrypted.leaving.ask("set", push=True)
    for count in (70, 1_000, 4_096, 10_000, 33_333, 65_536, 100_000, 200_000, 300_000, 12):
        before = proxy.spoilt
        proxy.spoil[PUSH] = count
        wait_for(lambda before=before: proxy.spoilt > before or not migration.is_alive(), "nothing came by")
    comes_through(encrypted, migration)
    assert proxy.spoilt - spoilt >= 5
    assert encrypted.coming.status()["reconnects"] >= 5


@ROLES
def test_a_spoilt_byte_before_the_switchover_costs_the_attempt(role, encrypted):
    """Of the handshakes, and of all that is said before Run: the guest stays where it is."""
    proxy = encrypted.proxy
    for count in (70, 200, 1_500) if role is CONTROL else (70, 200):
        proxy.calm()
        spoilt = proxy.spoilt
        proxy.spoil[role] = count
        migration = encrypted.migrate()
        assert migration.result() == 4, (count, migration.error)
        assert proxy.spoilt == spoilt + 1
        encrypted.settle(4)


def test_a_spoilt_byte_of_a_plain_page_is_seen_by_nobody_but_the_check(tmp_path):
    """Frames carry no checksum: what TCP's own lets through in plain is the guest's: deploy/docs/security.md."""
    with Pair(tmp_path, Kind("resting", workload="random", steps=10)) as both:
        both.proxy.spoil[PUSH] = 5000  # in the middle of the first page that travels
        assert both.migrate().result() == 0
        both.coming.until(lambda now: now["ended"] is not None)
        assert both.coming.ask("check")["pages_mismatched"] == 1


# --- the link itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["plain", "encrypted"])
def test_a_link_that_is_down_for_long_after_the_switchover(which, request):
    both = request.getfixturevalue(which)
    migration = halfway(both)
    both.network.link("down")
    try:
        paused(both)
    finally:
        both.network.link("up")
    resumed(both)
    comes_through(both, migration)


def test_a_link_that_goes_down_before_the_switchover(tmp_path):
    """Nobody says goodbye: the source takes its guest back when it has waited for long enough, and may try again."""
    kind = Kind("plain", workload="random")
    with two_hosts() as network, Pair(tmp_path, kind, network, watches=True) as both:
        both.proxy.hold("state")
        migration = both.migrate()
        both.proxy.wait_held()
        network.link("down")
        try:
            both.proxy.release()
            assert migration.result() == 4
            assert "did not answer in time (loading)" in str(migration.error)
            both.leaving.runs_on()
        finally:
            network.link("up")
        both.settle(4)
        assert both.migrate().result() == 0
        both.settle(0)
