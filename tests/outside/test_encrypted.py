"""Snapshots that are fetched encrypted: TLS on every connection, whoever dials, and never plain by mistake."""

# ruff: noqa: SIM117 - daemons are there before a process and after it

from __future__ import annotations

import signal

import pytest

from tests.agent.agents import run
from tests.outside.vmm import Vmm, destination, snapshot, source


@pytest.fixture
def tls(tmp_path):
    assert run("certs", tmp_path / "tls", "localhost,127.0.0.1", "other").status == 0
    return tmp_path / "tls"


def test_a_snapshot_is_fetched_encrypted(tmp_path, tls):
    file = snapshot(tmp_path)
    ours = ("--tls-dir", tls / "localhost")
    with source(tmp_path, file, *ours) as here, destination(tmp_path, "--from", here.address, *ours) as there:
        with Vmm(f"{tmp_path}/uffd.sock", file=file) as vmm:
            assert vmm.call("wrong") == []
            report = there.until(lambda now: now["processes"][0]["report"])["processes"][0]["report"]
            assert report["environment"]["tls"] is True
            assert report["pages"]["total"] == 2048


def test_who_speaks_plain_gets_nothing_and_its_process_no_zeros(tmp_path, tls):
    file = snapshot(tmp_path)
    with source(tmp_path, file, "--tls-dir", tls / "localhost") as here:
        with destination(tmp_path, "--from", here.address) as there, Vmm(f"{tmp_path}/uffd.sock", file=file) as vmm:
            there.until_log(
                rf"process {vmm.pid}: .*this source takes TLS only: the destination needs --tls-dir; 2048 pages"
            )
            vmm.ask("read", 0)
            assert vmm.ends_with() == -signal.SIGBUS


def test_only_those_named_may_fetch(tmp_path, tls):
    file = snapshot(tmp_path)
    with source(tmp_path, file, "--tls-dir", tls / "localhost", "--allow", "localhost") as here:
        with destination(tmp_path, "--from", here.address, "--tls-dir", tls / "other") as there:
            with Vmm(f"{tmp_path}/uffd.sock", file=file) as vmm:
                there.until_log(
                    rf"process {vmm.pid}: .*this source gives nothing to other: its --allow names others; 2048"
                )
