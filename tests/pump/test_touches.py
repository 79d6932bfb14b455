"""A guest's memory is touched by more than its vCPUs: whoever does it, on whatever way, is served.

Each story begins with a page that is still at the source, and a touch that cannot go on without it: the kernel's own in
the middle of a system call, or that of another process. The test answers in the source's place.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from postcopy.pump.regions import Placement
from tests.child import run_in_child
from tests.lacking import lacking
from tests.pump.stage import DEADLINE, Stage, until

WAYS = [
    pytest.param("shmem", Placement.COPY, id="shmem-copy"),
    pytest.param("shmem", Placement.CONTINUE, id="shmem-continue"),
    pytest.param("anonymous", Placement.COPY, id="anonymous-copy"),
    pytest.param("anonymous", Placement.MOVE, id="anonymous-move"),
    pytest.param("hugetlb-2M", Placement.CONTINUE, id="hugetlb-continue"),
]
BYTES = 4096  # that are touched, however large the page
PAGE, FILL = 1, 0xA5
CONTENT = bytes([FILL]) * BYTES
NEWS = b"news" * (BYTES // 4)

libc = ctypes.CDLL(None, use_errno=True)


class IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def address_of(stage: Stage) -> int:
    return stage.mapping.address + PAGE * stage.page_size


def buffer_of(stage: Stage) -> memoryview:
    return stage.memory(PAGE)[:BYTES]


# --- touches by the kernel, in a system call of this process ----------------------------------------------------------
# Those that read return what they saw. Those that write NEWS return nothing; the page then holds it.


def write_2(stage: Stage, folder: Path) -> bytes:
    with (folder / "file").open("wb", buffering=0) as file:
        assert os.write(file.fileno(), buffer_of(stage)) == BYTES
    return (folder / "file").read_bytes()


def read_2(stage: Stage, folder: Path) -> None:
    (folder / "file").write_bytes(NEWS)
    with (folder / "file").open("rb", buffering=0) as file:
        assert os.readv(file.fileno(), [buffer_of(stage)]) == BYTES


def direct(folder: Path, flags: int) -> int:
    try:
        return os.open(folder / "file", flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as refused:
        if refused.errno == errno.EINVAL:
            raise NotImplementedError(f"no O_DIRECT in {folder}") from refused
        raise


def write_direct(stage: Stage, folder: Path) -> bytes:
    file = direct(folder, os.O_CREAT | os.O_WRONLY)
    assert os.write(file, buffer_of(stage)) == BYTES
    os.close(file)
    return (folder / "file").read_bytes()


def read_direct(stage: Stage, folder: Path) -> None:
    (folder / "file").write_bytes(NEWS)
    file = direct(folder, os.O_RDONLY)
    assert os.readv(file, [buffer_of(stage)]) == BYTES
    os.close(file)


def vmsplice(stage: Stage, _folder: Path) -> bytes:
    reader, writer = os.pipe()
    part = IoVec(address_of(stage), BYTES)
    assert checked(libc.vmsplice(writer, ctypes.byref(part), 1, 0), "vmsplice") == BYTES
    seen = os.read(reader, BYTES)
    os.close(reader)
    os.close(writer)
    return seen


SETUP, REGISTER, REGISTER_BUFFERS = 425, 427, 0  # io_uring's system calls, the same on every architecture


def io_uring_buffer(stage: Stage, _folder: Path) -> bytes:
    """Register the page as a fixed buffer, which pins it for as long as the ring lives: all its pages must be there."""
    parameters = ctypes.create_string_buffer(120)
    ring = libc.syscall(SETUP, 1, parameters)
    if ring < 0:
        raise NotImplementedError(f"io_uring: {os.strerror(ctypes.get_errno())}")
    part = IoVec(address_of(stage), BYTES)
    checked(libc.syscall(REGISTER, ring, REGISTER_BUFFERS, ctypes.byref(part), 1), "IORING_REGISTER_BUFFERS")
    seen = bytes(buffer_of(stage))
    os.close(ring)
    return seen


# --- touches by another process ---------------------------------------------------------------------------------------

_OTHER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
what, pid, address, tid, length = sys.argv[1], *map(int, sys.argv[2:])
class IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))
def check(result):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
local = ctypes.create_string_buffer(b"news" * (length // 4), length)
here, there = IoVec(ctypes.addressof(local), length), IoVec(address, length)
if what.startswith("process_vm_"):
    assert check(getattr(libc, what)(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)) == length
elif what == "mem_read":
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        local.raw = os.pread(memory.fileno(), length, address)
elif what == "mem_write":
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        assert os.pwrite(memory.fileno(), local.raw, address) == length
elif what == "ptrace":
    ATTACH, DETACH, PEEKDATA, WALL = 16, 17, 2, 0x40000000
    libc.ptrace.restype, libc.ptrace.argtypes = ctypes.c_long, [ctypes.c_long, ctypes.c_int] + [ctypes.c_void_p] * 2
    check(libc.ptrace(ATTACH, tid, None, None))
    os.waitpid(tid, WALL)
    words = b""
    while len(words) < length:
        ctypes.set_errno(0)
        word = libc.ptrace(PEEKDATA, tid, address + len(words), None)
        if ctypes.get_errno():
            libc.ptrace(DETACH, tid, None, None)
            check(-1)
        words += (word & (1 << 64) - 1).to_bytes(8, sys.byteorder)
    check(libc.ptrace(DETACH, tid, None, None))
    local.raw = words
sys.stdout.buffer.write(local.raw)
"""


def other_process(what: str) -> Callable[[Stage, Path], bytes]:
    def touch(stage: Stage, _folder: Path) -> bytes:
        # ptrace stops the thread it peeks through: not one that the test needs.
        reader, writer = os.pipe()
        idle = threading.Thread(target=os.read, args=(reader, 1), daemon=True)
        idle.start()
        numbers = (os.getpid(), address_of(stage), idle.native_id, BYTES)
        command = [sys.executable, "-c", _OTHER, what, *map(str, numbers)]
        done = subprocess.run(command, capture_output=True, check=False, timeout=DEADLINE)
        os.write(writer, b"x")
        idle.join()
        os.close(reader)
        os.close(writer)
        if b"PermissionError" in done.stderr:
            raise NotImplementedError(f"{what} of another process is not permitted")
        if b"[Errno 5]" in done.stderr:
            raise OSError(errno.EIO, what)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    return touch


READS: dict[str, Callable[[Stage, Path], bytes]] = {
    "write(2)": write_2,
    "write(2) with O_DIRECT": write_direct,
    "vmsplice": vmsplice,
    "a buffer of io_uring": io_uring_buffer,
    "process_vm_readv": other_process("process_vm_readv"),
    "read of /proc/PID/mem": other_process("mem_read"),
    "ptrace": other_process("ptrace"),
}
WRITES: dict[str, Callable[[Stage, Path], object]] = {
    "read(2)": read_2,
    "read(2) with O_DIRECT": read_direct,
    "process_vm_writev": other_process("process_vm_writev"),
    "write of /proc/PID/mem": other_process("mem_write"),
}


# On these ways Linux (6.18 as well) does not wait for a page, so userfaultfd is not told: the call fails with EIO,
# which is at least no zeros. Once the page is there they work.
UNTOLD = {"read of /proc/PID/mem", "write of /proc/PID/mem", "ptrace"}


class Touch(threading.Thread):
    """One touch in a thread; `seen` is what it returned."""

    def __init__(self, function: Callable[[Stage, Path], object], stage: Stage, folder: str) -> None:
        super().__init__(daemon=True)
        self._work = lambda: function(stage, Path(folder))
        self.seen: object = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.seen = self._work()
        except BaseException as error:
            self.error = error

    @property
    def over(self) -> bool:
        return not self.is_alive()

    def done(self) -> object:
        self.join(DEADLINE)
        assert self.over, "the touch is still waiting"
        if self.error is not None:
            raise self.error
        return self.seen


def story(name: str, type_name: str, placement: Placement, folder: str) -> str | None:
    """Touch a page that is absent, see that it is asked for, answer; return why it could not be tried, if so."""
    writes = name in WRITES
    with Stage(type_name, 2, placement) as stage:
        touch = Touch((WRITES if writes else READS)[name], stage, folder)
        try:
            until(lambda: touch.over or stage.pump.snapshot().requests == 1, "the fault")
            if touch.over and name in UNTOLD:
                with pytest.raises(OSError, match=f"{errno.EIO}"):
                    touch.done()
                demand = stage.touch(PAGE)
                touch = None
            elif touch.over:
                touch.done()
                raise AssertionError(f"{name} went on without the page")
            stage.request(PAGE)
            stage.urgent.sendall(stage.pages(PAGE, FILL))
            if touch is None:
                assert demand.done() == CONTENT
                touch = Touch((WRITES if writes else READS)[name], stage, folder)
            seen = touch.done()
        except NotImplementedError as lacks:
            return str(lacks)
        if not writes:
            assert seen == CONTENT
        assert bytes(buffer_of(stage)) == (NEWS if writes else CONTENT)
        assert bytes(stage.memory(PAGE)[BYTES:]) == bytes([FILL]) * (stage.page_size - BYTES)
        # A late copy does not undo what was written.
        stage.push.sendall(stage.pages(PAGE, 0x11))
        until(lambda: stage.pump.snapshot().pages_duplicate == 1, "the late copy")
        assert bytes(buffer_of(stage)) == (NEWS if writes else CONTENT)
        assert stage.pump.snapshot().pages_demand == 1
    return None


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return a folder of a file system that reads from and writes to memory directly, where there is one."""
    if "hugetlb" in request.node.name:
        request.getfixturevalue("huge_pages")("hugetlb-2M", 8)
    return str(tmp_path)


@pytest.mark.parametrize(("type_name", "placement"), WAYS)
@pytest.mark.parametrize("name", [*READS, *WRITES])
def test_it_is_served(name: str, type_name: str, placement: Placement, folder: str) -> None:
    why_not = run_in_child(story, name, type_name, placement, folder)
    if why_not is not None:
        lacking(why_not)


def many_pages() -> None:
    """One system call over pages of every state: absent, zero, being placed, placed."""
    with Stage("shmem", 5, Placement.CONTINUE) as stage:
        stage.push.sendall(stage.pages(0, 0x10) + stage.frame(3, 1))
        frame = stage.pages(2, 0x12)
        stage.push.sendall(frame[:-1])
        until(lambda: bytes(stage.pump.page_map(0)[:3]) == bytes([3, 4, 2]), "three states")
        reader, writer = os.pipe()
        os.set_blocking(writer, True)
        whole = memoryview((ctypes.c_char * (5 * 4096)).from_address(stage.mapping.address)).cast("B")
        writing = threading.Thread(target=os.write, args=(writer, whole), daemon=True)
        writing.start()
        until(lambda: stage.state(2) == 5, "the fault on the page that is being placed")
        stage.push.sendall(frame[-1:])
        for page in (3, 4):
            stage.request(page)
            stage.urgent.sendall(stage.pages(page, 0x10 + page))
        writing.join(DEADLINE)
        assert not writing.is_alive()
        fills = struct.pack("5B", 0x10, 0, 0x12, 0x13, 0x14)
        assert os.read(reader, 5 * 4096) == b"".join(bytes([fill]) * 4096 for fill in fills)
        os.close(reader)
        os.close(writer)


def test_one_call_over_pages_of_every_state() -> None:
    run_in_child(many_pages)


def memory_file() -> None:
    """A read of /proc/PID/mem ends before the first page that is not here, or fails there; nobody is told."""
    with Stage("shmem", 2, Placement.CONTINUE) as stage:
        stage.push.sendall(stage.pages(0, FILL))
        until(lambda: stage.state(0) == 3, "a placed page")
        assert stage.touch(0).done() == CONTENT
        memory = os.open("/proc/self/mem", os.O_RDONLY)
        assert os.pread(memory, 2 * BYTES, stage.mapping.address) == CONTENT
        with pytest.raises(OSError, match=f"{errno.EIO}"):
            os.pread(memory, BYTES, stage.mapping.address + BYTES)
        os.close(memory)
        stage.no_request()
        assert stage.pump.snapshot().requests == 0


def test_the_memory_file_of_a_process_ends_where_a_page_is_not_here() -> None:
    run_in_child(memory_file)
