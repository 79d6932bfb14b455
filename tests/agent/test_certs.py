"""`postcopy certs`: what it makes is what OpenSSL's own program accepts, kept from others, and never written over."""

import datetime
import stat
import subprocess

import pytest

from agent.security.certificates import parse_host
from postcopy.errors import UsageError

from .agents import run

FILES = {"ca-cert.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem"}


def openssl(*arguments):
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=30)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def made(tmp_path):
    """A folder with the certificates of two hosts, and what the command said."""
    return tmp_path / "tls", run("certs", tmp_path / "tls", "a.example", "b.example,10.0.0.2,::1", "--days", "30")


def test_each_host_gets_a_folder_of_its_own(made):
    folder, done = made
    assert done.status == 0, done.err
    for host in ("a.example", "b.example"):
        assert {file.name for file in (folder / host).iterdir()} == FILES
        assert f"{folder / host}/ -> --tls-dir on that host" in done.out
    for file in folder.rglob("*"):
        wanted = 0o700 if file.is_dir() else 0o600 if "key" in file.name else 0o644
        assert stat.S_IMODE(file.stat().st_mode) == wanted, file


@pytest.mark.parametrize("purpose", ["server", "client"])
def test_openssl_accepts_them_for_their_purpose_and_for_no_other(made, purpose):
    folder, _ = made
    mine, other = folder / "b.example" / f"{purpose}-cert.pem", {"server": "client", "client": "server"}[purpose]
    strict = ("verify", "-x509_strict", "-CAfile", folder / "a.example" / "ca-cert.pem")
    for name in (("-verify_hostname", "b.example"), ("-verify_ip", "10.0.0.2"), ("-verify_ip", "::1")):
        status, said = openssl(*strict, "-purpose", f"ssl{purpose}", *name, mine)
        assert status == 0, said
    assert openssl(*strict, "-verify_hostname", "a.example", mine)[0] != 0
    assert openssl(*strict, "-purpose", f"ssl{other}", mine)[0] != 0
    status, _ = openssl("x509", "-checkend", 29 * 86400, "-noout", "-in", mine)
    assert status == 0
    status, _ = openssl("x509", "-checkend", 31 * 86400, "-noout", "-in", mine)
    assert status == 1


def test_a_further_host_is_signed_by_the_same_authority(made):
    folder, _ = made
    done = run("certs", folder, "c.example", "--json")
    assert done.status == 0, done.err
    assert done.json["hosts"] == [{"names": ["c.example"], "folder": str(folder / "c.example")}]
    assert datetime.datetime.fromisoformat(done.json["valid_until"]).tzinfo is not None
    assert openssl("verify", "-CAfile", folder / "a.example/ca-cert.pem", folder / "c.example/client-cert.pem")[0] == 0


def test_nothing_is_written_over(made):
    folder, _ = made
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    done = run("certs", folder, "c.example", "b.example")
    assert done.status == 2
    assert f"{folder}/b.example: there already" in done.one_line()
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_without_its_key_signs_nothing(made):
    folder, _ = made
    (folder / "ca-key.pem").unlink()
    done = run("certs", folder, "c.example")
    assert done.status == 1
    assert done.one_line() == f"postcopy: {folder}/ca-key.pem: No such file or directory"
    (folder / "ca-key.pem").write_bytes((folder / "a.example/client-key.pem").read_bytes())
    done = run("certs", folder, "c.example")
    assert (done.status, done.one_line()) == (2, f"postcopy: {folder}: ca-key.pem is not the key of ca-cert.pem")


@pytest.mark.parametrize("text", ["", "a..example,", "../x", "/etc", "a b", "-x", "x" * 65, "10.0.0.2,"])
def test_what_is_no_host(text):
    with pytest.raises(UsageError, match="neither a name nor an address"):
        parse_host(text)
