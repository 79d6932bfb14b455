"""Encryption as users have it: real daemons with certificates, who is refused, and what a running migration feels."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from agent.top.rates import Watch
from postcopy.wire.control import Hello, Refuse
from postcopy.wire.preamble import Role, unpack
from tests.certificates import EXPIRED, directory
from tests.chaos.proxy import Proxy, upstream_of

from .agents import Command, destination, run, source
from .fakes import FakeDestination, FakeSource
from .outsiders import CONTROL, Crowd, joins, s_client


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    return directory(tmp_path_factory.mktemp("tls") / "right")


@pytest.fixture(scope="module")
def here(tmp_path_factory, right):
    """A source with certificates, whose guest survives every test of this module."""
    with source(tmp_path_factory.mktemp("source"), "--tls-dir", right, size="16MiB") as daemon:
        yield daemon
        assert run("check", "--admin", daemon.admin).status == 0


@pytest.fixture(scope="module")
def there(tmp_path_factory, right):
    """A destination with certificates that is as good as new after every test of this module."""
    folder = tmp_path_factory.mktemp("destination")
    with destination(folder, "--tls-dir", right, "--allow", "localhost") as daemon:
        yield daemon
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


def refused(here, done, *words):
    assert done.status == 4, done.err
    for one in words:
        assert one in done.one_line()
    assert here.status()["owner"] == "source"
    here.runs_on()


# --- who is who -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"signed_by": "wrong", "trusts": "right"}, "another CA signed it"),
        ({"trusts": "wrong"}, "its certificate is not accepted"),
        ({"validity": EXPIRED}, "which has expired"),
        ({"names": ["a.example"]}, "takes no guest from a.example: its --allow names others"),
    ],
    ids=["signed by another CA", "believes another CA", "expired", "another name"],
)
def test_a_source_that_is_not_wanted(here, there, tmp_path, made, words):
    wrong = directory(tmp_path / "wrong", **made)
    refused(here, run("migrate", "--admin", here.admin, there.address, "--tls-dir", wrong), words)
    assert there.status()["state"] == "none"


def test_a_destination_that_is_not_who_it_says(here, tmp_path):
    other = directory(tmp_path / "other", ["b.example"])
    with destination(tmp_path, "--tls-dir", other) as there:
        words = "certificate is not valid for '127.0.0.1'"
        refused(here, run("migrate", "--admin", here.admin, there.address), words)


def test_plain_and_encrypted_do_not_mix(here, there, right, tmp_path):
    done = run("migrate", "--admin", here.admin, there.address, "--insecure")
    refused(here, done, "this destination takes TLS only: the source needs --tls-dir")
    with destination(tmp_path) as plain:
        done = run("migrate", "--admin", here.admin, plain.address)
        refused(here, done, "it takes plain connections only: start it with --tls-dir")
        plain.until_log("it wants TLS, and this agent takes plain connections only")
        asked = run("doctor", "--peer", plain.address, "--tls-dir", right)
        assert asked.status == 4
        assert "it takes plain connections only" in asked.one_line()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["destination", "--listen", "tcp:0.0.0.0:1"], "`postcopy certs tls HOST...` makes certificates"),
        (["destination", "--tls-dir", "x", "--insecure"], "all is encrypted, or nothing is"),
        (["destination", "--allow", "a.example"], "it goes with --tls-dir"),
        (["destination", "--tls-dir", "/nowhere"], "/nowhere/ca-cert.pem: No such file or directory; `postcopy certs`"),
        (["destination", "--tls-dir", "x", "--listen", "unix:/x"], "a Unix socket has no TLS"),
        (["source", "--tls-dir", "/nowhere"], "/nowhere/ca-cert.pem: No such file or directory"),
        (["doctor", "--peer", "tcp:192.0.2.1:1"], "makes certificates and --tls-dir tls/HOST encrypts"),
        (["demo", "--tls", "--handover"], "memory is handed over through a Unix socket, which has no TLS"),
    ],
)
def test_what_makes_no_sense(arguments, words):
    done = run(*arguments)
    assert done.status == 2
    assert words in done.err.replace("\\", "")


def test_a_demo():
    done = run("demo", "--tls", "--size", "32MiB", "--json")
    assert done.status == 0, done.err
    assert done.json["environment"]["tls"] is True
    assert done.json["integrity"]["pages_mismatched"] == 0


# --- an outside client ----------------------------------------------------------------------------------------------


def test_openssls_own_client(there, right, tmp_path):
    mine = ("-cert", right / "client-cert.pem", "-key", right / "client-key.pem")
    believes = ("-CAfile", right / "ca-cert.pem", "-verify_return_error")
    _, said = s_client(there.address, *mine, *believes, "-verify_ip", "127.0.0.1")
    assert "Verification: OK" in said
    assert "TLSv1.3" in said
    assert "New Session Ticket" not in said
    status, said = s_client(there.address, *mine, "-tls1_2")
    assert (status, "alert protocol version" in said) == (1, True), said
    _, said = s_client(there.address, *believes)
    there.until_log("it showed no certificate")
    wrong = directory(tmp_path / "wrong", signed_by="wrong", trusts="right")
    _, said = s_client(there.address, "-cert", wrong / "client-cert.pem", "-key", wrong / "client-key.pem")
    there.until_log("its certificate is not accepted: unable to get local issuer certificate")


# --- connections that prove nothing, while a migration runs ---------------------------------------------------------


def held(pid):
    """Bytes of memory that a process has to itself, its descriptors, its threads."""
    anonymous = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    counts = [len(list(Path(f"/proc/{pid}/{what}").iterdir())) for what in ("fd", "task")]
    return int(anonymous[1]) << 10, *counts


def earlier_migration(address, right):
    """Go through a migration as far as its data connections; return its id and its key."""
    with FakeSource(address, tls=right) as fake:
        fake.greet((3, 3)).offer()
        welcome = fake.welcome
        assert joins(address, Role.URGENT, welcome.migration_id, welcome.token)
        assert not joins(address, Role.PUSH, welcome.migration_id, b"x" * 32)
        assert not joins(address, Role.PUSH, welcome.migration_id, welcome.token, "postcopy urgent " + "0" * 32)
        assert not joins(address, Role.URGENT, welcome.migration_id, welcome.token)  # attached already
        assert not joins(address, Role.PUSH, b"x" * 16, welcome.token)
    return welcome.migration_id, welcome.token


# Nearly every step is a fault, for longer than the test takes.
ROVING = ("--workload", "random", "--steps-per-second", "500")


class Listening(Proxy):
    """Sits between the two and knows the migration's id, which its data connections say in plain."""

    def ids(self):
        return {unpack(link.preamble).migration_id for link in self.links if link.role in {Role.URGENT, Role.PUSH}}


def wrong_in_every_way(there, before, current, right, tmp_path):
    """Everybody that should not come in, once."""
    for role in (Role.URGENT, Role.PUSH):
        assert not joins(there.address, role, *before), "a key of an earlier migration at this very daemon"
        assert not joins(there.address, role, current, before[1]), "the running migration, with another one's key"
        assert not joins(there.address, role, current, os.urandom(32)), "the running migration, with a wrong key"
        assert not joins(there.address, role, os.urandom(16), os.urandom(32)), "a migration that there never was"
    with FakeSource(there.address) as plain:
        plain.control.send(Hello((2, 3), "plain"))
        assert plain.control.expect(Refuse).code == "host"
    for arguments in ([], ["-tls1_2"]):
        s_client(there.address, *arguments)
    old = directory(tmp_path / "old", validity=EXPIRED)
    s_client(there.address, "-cert", old / "client-cert.pem", "-key", old / "client-key.pem")
    with FakeSource(there.address, tls=right) as late:
        late.control.send(Hello((3, 3), "late"))
        assert late.control.expect(Refuse).code == "busy"


def served(agent, watch, faults=500):
    """Have so many more faults served; return the figures of those since the look before."""
    watch.take(agent.ask("look"))
    before = agent.status()["pages"]["placed"]
    agent.until(lambda now: now["pages"]["placed"] > before + faults)
    return watch.take(agent.ask("look"))["fault_latency_seconds"]["latest"]


def test_strangers_cost_nothing_and_a_running_migration_does_not_notice(right, tmp_path, capsys, many_descriptors):
    with (
        destination(tmp_path, "--tls-dir", right) as busy,
        source(tmp_path, "--tls-dir", right, *ROVING, size="256MiB") as here,
        Listening(upstream_of(busy.address)) as between,
    ):
        before = earlier_migration(busy.address, right)
        busy.until(lambda now: now["owner"] is None)
        watch = Watch()
        with Command("migrate", "--admin", here.admin, between.address, "--no-push", "--json") as migration:
            busy.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] > 500)
            (current,) = between.ids()
            alone = served(busy, watch)
            at_rest = held(busy.process.pid)
            with Crowd(busy.address, 1000), Crowd(busy.address, 100, CONTROL[:20]) as slow:
                for _ in range(10):
                    slow.trickle(b"\0")
                    time.sleep(0.02)  # the pace of a slow-loris, not an order
                with Crowd(busy.address, 100, CONTROL + b"\x16\x03\x01\x02\x00\x01"):  # half handshakes
                    watch.take(busy.ask("look"))
                    wrong_in_every_way(busy, before, current, right, tmp_path)
                    beside = served(busy, watch)
                    memory, descriptors, threads = (
                        now - then for now, then in zip(held(busy.process.pid), at_rest, strict=True)
                    )
            assert (descriptors < 80, threads) == (True, 0)
            assert memory < 24 << 20, "what strangers cost"
            assert busy.status()["reconnects"] == here.status()["reconnects"] == 0
            assert run("set", "--admin", here.admin, "--push").status == 0
            done = migration.result(40)
        assert done.status == 0, done.err
        assert min(alone["count"], beside["count"]) >= 100
        with capsys.disabled():
            for what, latency in (("alone", alone), ("beside 1200 strangers", beside)):
                sys.stdout.write(f"{what}: p50 {latency['p50'] * 1e6:.0f}, p99 {latency['p99'] * 1e6:.0f} µs; ")
        assert run("check", "--admin", busy.admin, "--json").json["pages_mismatched"] == 0
        busy.until_log(r"closed \d+ more connections within 5 s")
        assert busy.log.count("closed ") < 400, "what strangers can write into a log"
        busy.until(lambda now: held(busy.process.pid)[1] <= at_rest[1])  # nothing of them is left


# --- secrets --------------------------------------------------------------------------------------------------------


def spelled(secret):
    """A secret as it might be seen: as it is, as Python or hexadecimal would show it."""
    return [secret.decode("latin-1"), repr(secret)[2:-1], secret.hex(), secret.hex(" "), secret.hex(":")]


def test_no_log_holds_a_key(right, tmp_path):
    token = b"a token that nobody else may see"
    with (
        destination(tmp_path, "--tls-dir", right, before=["--debug"]) as there,
        source(tmp_path, before=["--debug"], size="8MiB") as here,
    ):
        _, key = earlier_migration(there.address, right)
        there.until_log("cancelled|failed")
        with FakeDestination() as fake, Command("migrate", "--admin", here.admin, fake.address) as migration:
            fake.upto_offer(token=token)
            fake.control.close()
            assert migration.result().status == 4
        for log, secret in ((there.log, key), (here.log, token)):
            assert len(log) > 100
            for one in spelled(secret):
                assert one not in log
