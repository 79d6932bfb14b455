"""Hand-overs that are not as documented: each is refused in one line, leaves nothing behind and disturbs nobody else."""

# ruff: noqa: E501, SIM117 - a table of cases; daemons are there before a process and after it

from __future__ import annotations

import array
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from tests.outside.vmm import MIB, PAGE, Vmm, destination, foreign_descriptors, snapshot, source

HUGE = 2 * MIB
ONE = {"base_host_virt_addr": 0x700000000000, "size": PAGE, "offset": 0, "page_size": PAGE}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A source, a destination, and one well-behaved process that must not notice anything of all this."""
    folder = tmp_path_factory.mktemp("refused")
    file = snapshot(folder)
    with source(folder, file) as here, destination(folder, "--from", here.address, "--no-push") as there:
        with Vmm(f"{folder}/uffd.sock", file=file) as vmm:
            there.until(lambda now: now["processes"])
            before = foreign_descriptors(there)
            yield folder, file, there
            assert vmm.call("wrong") == []
            there.until(lambda _now: foreign_descriptors(there) == before)


def refused(there):
    return re.findall("refused memory that was handed over: (.*)", there.log)


def refusals(there):
    return len(refused(there))


def refusal(there, count):
    """Wait for the line that follows so many lines of refusal, and return it."""
    deadline = time.monotonic() + 20
    while len(lines := refused(there)) <= count:
        assert time.monotonic() < deadline, there.log
        time.sleep(0.01)  # between two looks, not to force an order
    return lines[count]


CASES = {
    "no descriptor": ({"descriptors": []}, "0 descriptors came, wanted 1: userfaultfd"),
    "two descriptors": ({"descriptors": ["uffd", "uffd"]}, "2 descriptors came, wanted 1: userfaultfd"),
    "more than there is room for": ({"descriptors": ["uffd"] * 60}, "more than 16 descriptors came"),
    "no userfaultfd": ({"descriptors": ["file"]}, "the descriptor is no userfaultfd"),
    "registered for nothing": ({"register": 0}, r"mapping 0: its userfaultfd traps nothing at 0x[0-9a-f]+"),
    "asked for nothing": ({"register": 0, "api": False}, r"its userfaultfd was never asked for its features \(UFFDIO_API\)"),
    "a gap in the middle": ({"gap": (5 * MIB, PAGE)}, "mapping 0: its userfaultfd traps nothing"),
    "an address next to it": ({"entries": {0: {"base_host_virt_addr": -(1 << 40)}}}, "mapping 0: its userfaultfd traps nothing"),
    "of too much": ({"entries": {0: {"size": 1 << 62}}}, "more than 1 TiB of memory"),
    "longer than it is": ({"entries": {0: {"size": 64 << 30}}}, "mapping 0: its userfaultfd traps nothing"),
    "an address that no process has": (
        {"message": [ONE | {"base_host_virt_addr": (1 << 63) - (1 << 40)}]},
        "mapping 0: its userfaultfd traps nothing",
    ),
    "unaligned address": ({"entries": {0: {"base_host_virt_addr": 512}}}, "are no whole pages of 4096 bytes"),
    "unaligned size": ({"entries": {0: {"size": 1}}}, "are no whole pages of 4096 bytes"),
    "unaligned offset": ({"entries": {0: {"offset": 2048}}}, "are no whole pages of 4096 bytes"),
    "of no size": ({"entries": {0: {"size": -8 * MIB}}}, "are no whole pages"),
    "negative": ({"entries": {0: {"offset": -PAGE}}}, "mapping 0: wanted offset to be a whole number below 2[*][*]63"),
    "beyond all addresses": ({"entries": {0: {"offset": (1 << 63) - PAGE}}}, "it ends beyond all addresses"),
    "small pages told as huge": ({"page_size_told": HUGE, "mappings": ((16 * MIB, 0),), "align": True}, "has no pages of 2097152 bytes"),
    "no page size at all": ({"page_size_told": 12345}, "no memory has pages of 12345 bytes"),
    "overlap": (
        {"mappings": ((4 * MIB, 0), (4 * MIB, 4 * MIB)), "overlap": True}, "mappings 0 and 1 overlap"
    ),
    "the same twice": ({"message": [ONE, ONE]}, "mappings 0 and 1 overlap"),
    "page sizes that contradict": ({"message": [ONE | {"page_size_kib": 8}]}, "page_size 4096 and page_size_kib 8 contradict"),
    "a field too few": ({"message": [{key: ONE[key] for key in ("size", "offset", "page_size")}]}, "wanted base_host_virt_addr"),
    "a number in quotes": ({"message": [ONE | {"size": "4096"}]}, "mapping 0: wanted size to be a whole number"),
    "true for a number": ({"message": [ONE | {"offset": True}]}, "mapping 0: wanted offset"),
    "no mapping": ({"message": []}, "wanted 1 to 64 mappings"),
    "too many": ({"message": [ONE] * 65}, "wanted 1 to 64 mappings"),
    "a list of lists": ({"message": [[1]]}, "mapping 0: wanted an object"),
    "an object without names": ({"message": {"mappings": [ONE]}}, 'wanted "descriptors" to name them'),
    "an object with more": ({"message": {"mappings": [ONE], "x": 1}}, "unknown field 'x'"),
    "two of one name": ({"message": {"mappings": [ONE], "descriptors": ["userfaultfd"] * 2}}, "wanted one userfaultfd"),
    "a file that cannot be sealed": ({"shared": "unsealed"}, "its file does not let itself be sealed against a change of size"),
    "another file": ({"shared": True, "descriptors": ["uffd", "other"]}, "has not mapped that part of the file"),
    "parts of its file in another order": (
        {"shared": True, "mappings": ((4 * MIB, 0), (4 * MIB, 4 * MIB)), "entries": {0: {"offset": 4 * MIB}, 1: {"offset": -4 * MIB}}},
        r"mapping 0: process \d+ has not mapped that part of the file that was offered at 0x",
    ),
    "a file and MISSING alone": ({"shared": True, "mappings": ((MIB, 0),), "entries": {0: {"offset": 1 << 30}}}, "beyond the memory's file"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused(served, name):
    folder, _, there = served
    config, text = dict(CASES[name][0]), CASES[name][1]
    mappings = config.pop("mappings", ((8 * MIB, 0),))
    if "message" in config:
        config["message"] = json.dumps(config["message"])
    before = refusals(there)
    with Vmm(f"{folder}/uffd.sock", mappings, **config) as vmm:
        line = refusal(there, before)
        assert line.startswith(f"process {vmm.pid}: "), line
        assert re.search(text, line), line
        assert len(line) < 250
        deadline = time.monotonic() + 10
        while vmm.call("waits"):
            assert time.monotonic() < deadline, "the connection was left open"


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no hand-over of memory begins with b'GET / HTTP/1.1"),
        (b"\0\1\2", "no hand-over of memory begins with"),
        (b"", "it closed the connection before it said anything"),
        (b'[{"base_host_virt_addr": 4096,', "it closed the connection after 30 bytes of its message"),
        (b"[" * 70000, "a hand-over of more than 65536 bytes|nested too deep"),
        (b"[" + b" " * 70000, "a hand-over of more than 65536 bytes"),
    ],
)
def test_garbage(served, said, text):
    folder, _, there = served
    before = refusals(there)
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.connect(f"{folder}/uffd.sock")
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        assert re.search(text, refusal(there, before))
        connection.recv(1)


def test_silence_is_not_waited_for_long(served):
    folder, _, there = served
    before = refusals(there)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"{folder}/uffd.sock")
        connection.sendmsg([b"["], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
        assert "no whole message within 5 s" in refusal(there, before)


def test_a_message_may_come_in_pieces(served):
    """Firecracker sends it at once; a stream may cut it all the same."""
    folder, _, there = served
    before = refusals(there)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"{folder}/uffd.sock")
        message = json.dumps([ONE]).encode()
        for number in range(len(message)):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))] if not number else []
            connection.sendmsg([message[number : number + 1]], rights)
        assert "the descriptor is no userfaultfd" in refusal(there, before)


_AS_NOBODY = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.send(b"[]")
connection.recv(1)
"""


def test_another_user_is_refused_even_where_the_mode_lets_it_in(served):
    if os.geteuid():
        pytest.skip("only root can become another user")
    folder, _, there = served
    before = refusals(there)
    link = folder / "uffd.sock"
    link.chmod(0o666)
    parents = [folder, *folder.parents]
    modes = {one: one.stat().st_mode for one in parents if not one.stat().st_mode & 1}
    try:
        for one in modes:
            one.chmod(0o755)
        subprocess.run([sys.executable, "-c", _AS_NOBODY, str(link)], timeout=30, check=False, capture_output=True)
    finally:
        for one, mode in modes.items():
            one.chmod(mode)
        link.chmod(0o600)
    assert "of user 65534 is neither of this agent's user nor root" in refusal(there, before)


def test_a_mapping_beyond_the_file_ends_its_process_and_no_other(served):
    """Only the source can know; by then the process is sure to be served by nobody, and waits for nothing."""
    folder, file, there = served
    with Vmm(f"{folder}/uffd.sock", ((MIB, 0), (MIB, 7 * MIB + PAGE)), file=file) as vmm:
        found = there.until_log(rf"process {vmm.pid}: the source refused: (.*); (\d+) pages are poisoned")
        assert found[1].startswith("mapping 1 (1048576 bytes from 7344128 on): this is beyond the snapshot")
        assert found[2] == "512"
        vmm.ask("read", 0)
        assert vmm.ends_with() == -7  # SIGBUS
