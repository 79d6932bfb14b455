"""The program, asked of others: a disassembler, the C that the emulated guest runs, and a model in plain Python."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from postcopy.guest._guest import lib
from postcopy.guest.kvm.code import CALL_PORT, LABELS, LISTING, PROGRAM
from postcopy.guest.kvm.guest import KvmGuest
from postcopy.pump.histogram import BUCKETS
from tests.guest.memory import PAGE, Memory
from tests.guest.model import Model
from tests.lacking import lacking


def disassembled(folder):
    """Return every instruction as a disassembler sees it: [(offset, bytes, text)], addresses written as labels."""
    objdump = shutil.which("objdump") or lacking("objdump is of the package that compilers need, binutils")
    (folder / "program").write_bytes(PROGRAM)
    said = subprocess.run(
        [objdump, "-D", "-b", "binary", "-m", "i386:x86-64", "-M", "intel", str(folder / "program")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    names = {offset: label for label, offset in LABELS.items()}
    found = []
    for offset, code, said_of_it in re.findall(r"^ *([0-9a-f]+):\t((?:[0-9a-f]{2} )+) *\t(.*)$", said, re.MULTILINE):
        plain, _, target = said_of_it.partition("#")
        if target:  # relative to rip
            plain = re.sub(r"\[rip\+.*\]", f"[{names[int(target, 16)]}]", plain)
        text = re.sub(r"^(j\w+) +0x([0-9a-f]+)", lambda jump: f"{jump[1]} {names[int(jump[2], 16)]}", plain)
        found.append((int(offset, 16), bytes.fromhex(code), " ".join(text.split())))
    return found


def test_the_listing_is_what_a_disassembler_reads_out_of_the_bytes(tmp_path):
    listed, offset = [], 0
    for line in LISTING.strip().splitlines():
        if not line.endswith(":"):
            code, text, comment = (part.strip() for part in line.split("|"))
            assert comment, f"{text}: what for?"
            listed.append((offset, bytes.fromhex(code), text))
            offset += len(listed[-1][1])
    assert offset == len(PROGRAM) < PAGE
    assert disassembled(tmp_path) == listed


def test_numbers_in_the_program_are_those_of_c():
    assert CALL_PORT == lib.KVM_CALL_PORT
    for text, number in {
        "out 0xe9,al": CALL_PORT,
        "cmp rax,0x3e8": lib.STALL_MIN_NS,
        "mov edx,0x47f": BUCKETS - 1,
    }.items():
        assert f"| {text} " in LISTING
        assert int(re.search(r"0x([0-9a-f]+)", text)[1], 16) == number


@pytest.mark.parametrize("workload", ["sequential", "stride", "random", "increment"])
@pytest.mark.parametrize("steps", [0, 1, 39, 40, 41, 200])
def test_memory_is_what_the_model_says(workload, steps):
    """Computed without the C that fills and checks: 40 pages of content, into the sixth pass of three vCPUs."""
    with Memory(64) as memory:
        with KvmGuest(
            [memory], workload=workload, vcpus=3, seed=9, nonce=8, blank=0.25, stride=7, steps_max=steps
        ) as guest:
            guest.fill()
            guest.start()
            guest.wait()
            assert guest.steps() == [steps] * 3
            assert guest.check().pages_mismatched == 0
        own = 64 - 40 - 16
        model = Model(workload, 3, 9, 8, 40, 8, 8, stride=7 if workload == "stride" else 1)
        assert memory.read()[own * PAGE :] == model.memory([steps] * 3)


def test_the_program_is_described_where_it_lies():
    text = (Path(__file__).parents[3] / "postcopy/guest/README.md").read_text()
    assert f"{len(PROGRAM)} bytes" in text
