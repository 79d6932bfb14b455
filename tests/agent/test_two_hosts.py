"""Migrations between two hosts: two network namespaces joined by a veth pair."""

import json

import pytest

from tests.chaos.network import two_hosts

from .agents import Command, destination, run, source


@pytest.fixture
def hosts():
    """How a command is run on each of 10.77.0.1 and 10.77.0.2, and a way to cut the link."""
    with two_hosts() as network:
        yield *network.inside, network.link


def test_a_migration_between_hosts(hosts, tmp_path):
    one, two, _ = hosts
    with (
        destination(tmp_path, "--listen", "tcp:10.77.0.2:0", "--insecure", inside=two) as there,
        source(tmp_path, inside=one, size="32MiB") as here,
    ):
        assert there.address.startswith("tcp:10.77.0.2:")
        done = run("migrate", "--admin", here.admin, there.address, "--insecure", "--json")
        assert done.status == 0, done.err
        assert json.loads(done.out)["pages"]["total"] == 8192
        there.runs_on()
        assert run("check", "--admin", there.admin, "--json").json["pages_mismatched"] == 0


def test_an_encrypted_migration_between_hosts(hosts, tmp_path):
    """As in the README: certificates by `postcopy certs`, nothing said of security but --tls-dir and --allow."""
    one, two, _ = hosts
    made = run("certs", tmp_path / "tls", "a.example", "b.example,10.77.0.2")
    assert made.status == 0, made.err
    a, b = tmp_path / "tls/a.example", tmp_path / "tls/b.example"
    listen = ("--listen", "tcp:10.77.0.2:0", "--tls-dir", b, "--allow", "a.example")
    with (
        destination(tmp_path, *listen, inside=two) as there,
        source(tmp_path, "--tls-dir", a, inside=one, size="32MiB") as here,
    ):
        there.until_log(r"listening on tcp:10\.77\.0\.2:\d+, with TLS")
        asked = run("doctor", "--peer", there.address, "--tls-dir", a, "--json", inside=one)
        assert (asked.status, asked.json["peer"]["works"]) == (0, True), asked.err
        done = run("migrate", "--admin", here.admin, there.address, "--json")
        assert done.status == 0, done.err
        assert done.json["environment"]["tls"] is True
        there.runs_on()
        assert run("check", "--admin", there.admin, "--json").json["pages_mismatched"] == 0


def test_no_route(hosts, tmp_path):
    one, _, _ = hosts
    with source(tmp_path, inside=one, size="8MiB") as here:
        done = run("migrate", "--admin", here.admin, "tcp:192.0.2.1:7000", "--insecure")
        assert done.status == 4
        assert done.one_line() == "postcopy: cannot connect to tcp:192.0.2.1:7000: Network is unreachable"
        here.runs_on()


def test_a_cable_that_is_pulled_and_put_back(hosts, tmp_path):
    """Nobody says goodbye: each side finds out by itself that it hears nothing, and by itself they find each other."""
    one, two, link = hosts
    with (
        destination(tmp_path, "--listen", "tcp:10.77.0.2:0", "--insecure", inside=two) as there,
        source(tmp_path, "--steps-per-second", "500", inside=one, size="32MiB") as here,
        Command("migrate", "--admin", here.admin, there.address, "--insecure", "--no-push") as migration,
    ):
        there.until(lambda now: now["state"] == "postcopy-active" and now["pages"]["placed"] > 10)
        link("down")
        for agent in (here, there):
            agent.until(lambda now: now["state"] == "postcopy-paused", 5)  # the kernel tells after 6 s
        link("up")
        for agent in (here, there):
            agent.until(lambda now: now["state"] == "postcopy-active")
        assert run("set", "--admin", here.admin, "--push").status == 0
        done = migration.result(60)
        assert done.status == 0, done.err
        assert run("check", "--admin", there.admin, "--json").json["pages_mismatched"] == 0
