"""A guest that is mostly holes may be larger than either host: its holes are neither read, sent nor allocated."""

import contextlib
from pathlib import Path

import pytest

from postcopy.wire.control import LayoutOffer, Ready, Refuse, RegionOffer

from .agents import Command, destination, run, source
from .fakes import OFFER, FakeDestination, FakeSource

MIB = 1 << 20
SIZE = 256 << 30
DATA = 16 * MIB
HUGE = 1 << 50  # more than any host of these tests has


def files_of(daemon):
    """Return the guest's memory as the kernel counts it: (size, allocated) of each file in bytes."""
    found = []
    for entry in Path(f"/proc/{daemon.status()['pid']}/fd").iterdir():
        # The connection that answered `status` may close while the folder is read.
        with contextlib.suppress(FileNotFoundError):
            if "memfd:" in str(entry.readlink()):
                found.append(entry.stat())
    return [(one.st_size, one.st_blocks * 512) for one in found]


@pytest.mark.parametrize("mode", ["auto", "minor", "missing"])
def test_a_quarter_of_a_tebibyte_of_holes_moves_and_stays_holes(tmp_path, mode):
    sparse = ("--holes", "--blank", 1 - DATA / SIZE, "--steps-per-second", 2000)
    with source(tmp_path, *sparse, size="256GiB") as here, destination(tmp_path, "--mode", mode) as there:
        assert files_of(here) == [(SIZE, DATA)]
        done = run("migrate", "--admin", here.admin, there.address, "--json")
        assert done.status == 0, done.err
        assert done.json["pages"]["total"] == SIZE // 4096
        assert done.json["pages"]["zero"] == (SIZE - DATA) // 4096
        assert done.json["bytes"]["wire"] < 2 * DATA
        there.runs_on()
        found = run("check", "--admin", there.admin, "--json").json
        assert (found["pages_checked"], found["pages_mismatched"]) == (SIZE // 4096, 0)
        assert files_of(there) == [(SIZE, DATA)]
        there.until_log("16 MiB of data come, and the guest must not fill its memory")


def test_the_source_says_how_much_data_there_is(tmp_path):
    memory = ("--memory", "shmem:8MiB", "--memory", "anonymous:8MiB", "--memory", "shmem:65520MiB")
    blank = ("--holes", "--blank", 1 - 16 * MIB / (64 << 30), "--steps-per-second", 2000)
    with source(tmp_path, *memory, *blank) as here, FakeDestination() as fake:
        with Command("migrate", "--admin", here.admin, fake.address) as migration:
            fake.upto_offer()
            fake.control.send(Refuse("memory", "no"))
            assert migration.result().status == 4
        assert fake.offered.data == (8 * MIB, 8 * MIB, 0)


@pytest.mark.parametrize(
    ("kind", "data", "answer"),
    [
        ("shmem", (2 * MIB,), Ready),
        ("tmpfs", (2 * MIB,), Ready),
        ("shmem", (), Refuse),
        ("shmem", (HUGE,), Refuse),
        ("anonymous", (2 * MIB,), Refuse),  # private memory is promised when it is mapped
    ],
)
def test_room_is_needed_for_the_data_of_thin_memory_and_for_all_of_any_other(tmp_path, kind, data, answer):
    size = 64 << 40 if answer is Refuse else SIZE
    offer = LayoutOffer((RegionOffer(kind, 4096, size),), OFFER.guest, data)
    with destination(tmp_path) as there, FakeSource(there.address) as fake:
        fake.greet()
        fake.control.send(offer)
        answered = fake.control.expect(answer)
        if answer is Refuse:
            assert answered.code == "memory"


def test_data_of_all_regions_of_a_type_is_added_up(tmp_path):
    each = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024 // 5 * 4 // 4096 * 4096
    regions = (RegionOffer("shmem", 4096, 2 * each),) * 2
    with destination(tmp_path) as there, FakeSource(there.address) as fake:
        fake.greet()
        fake.control.send(LayoutOffer(regions, OFFER.guest, (each, each)))
        assert fake.control.expect(Refuse).code == "memory"


def test_a_source_needs_room_for_what_it_will_write():
    memory = ("--memory", "shmem:2TiB", "--memory", "shmem:2TiB", "--holes")
    done = run("source", *memory, "--blank", 0.75, deadline=20)
    assert done.status == 3
    assert "1 TiB (1099511627776 bytes) of shmem asked for" in done.one_line()
    done = run("source", *memory, "--blank", 0.25, deadline=20)
    assert "2 TiB" in done.one_line()
    done = run("source", "--memory", "shmem:4GiB", "--memory", "shmem:2TiB", "--blank", 0.5, "--holes", deadline=20)
    assert f"{(1 << 40) - (2 << 30)} bytes" in done.one_line()
