"""Two hosts, as far as one machine can have them: two network namespaces joined by a veth pair."""

import json
import re
import subprocess

import pytest

from tests.lacking import lacking

from .agents import Command, destination, run, source


def ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def hosts(request):
    """Namespaces with 10.77.0.1 and 10.77.0.2: how a command is run inside each, and a way to cut the link."""
    names = [f"pc{request.node.nodeid.__hash__() % 10000:04}{side}" for side in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("-n", names[0], "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", names[1])
            for number, name in enumerate(names, 1):
                ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "veth0")
                ip("-n", name, "link", "set", "veth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except OSError as refused:
            lacking(f"network namespaces: {refused}")
        inside = [("ip", "netns", "exec", name) for name in names]
        yield inside[0], inside[1], lambda way: ip("-n", names[0], "link", "set", "veth0", way)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


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
        assert re.search(r"listening on tcp:10\.77\.0\.2:\d+, with TLS", there.log)
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
            agent.until(lambda now: now["state"] == "postcopy-paused", 3.5)
        link("up")
        for agent in (here, there):
            agent.until(lambda now: now["state"] == "postcopy-active")
        assert run("set", "--admin", here.admin, "--push").status == 0
        done = migration.result(60)
        assert done.status == 0, done.err
        assert run("check", "--admin", there.admin, "--json").json["pages_mismatched"] == 0
