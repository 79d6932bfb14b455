"""A stand-in for Firecracker: it restores "a snapshot" by the protocol that its documentation describes, and no more.

Written after "Handling page faults on snapshot resume" alone, with the kernel's ABI by hand and nothing of the project:
what the project's code gets wrong of the protocol this one does not get wrong in the same way. Run as a program: one
argument, the configuration in JSON; then a command a line on stdin, an answer a line on stdout.

Configuration: socket, file, mappings [[size, offset]], page_size (4096 or 2 MiB); and what is done otherwise than
Firecracker does it: names (which fields tell the page size), page_size_told, entries (added to what is told of a
mapping), overlap and align (of what is told), message (instead of all that), descriptors (instead of the userfaultfd),
shared (a memfd behind the memory, offered, too), register, features and api (False: it is not asked for its features),
gap (offset and length of what is trapped no more) and split (of what lies in a piece of its own), hidden (nobody may
look at its mappings), child (which hands the memory over instead of its parent, and ends).
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import mmap
import os
import socket
import struct
import sys
from pathlib import Path

USERFAULTFD_IOC_NEW = 0xAA00
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_UNREGISTER = 0x8010AA01
PR_SET_DUMPABLE, MADV_DONTFORK = 4, 10
FEATURE_EVENT_REMOVE = 1 << 3
FEATURES_OF_SHARED = 1 << 4 | 1 << 5 | 1 << 9 | 1 << 10
MODE_MISSING, MODE_MINOR = 1, 4
MAP_HUGETLB, MFD_HUGETLB, MFD_ALLOW_SEALING = 0x40000, 4, 2
SMALL, HUGE = 4096, 2 << 20


def create_uffd(features, api):
    with Path("/dev/userfaultfd").open("rb+", buffering=0) as device:
        uffd = fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    if api:
        fcntl.ioctl(uffd, UFFDIO_API, struct.pack("=QQQ", 0xAA, features, 0))
    return uffd


class Vmm:
    def __init__(self, config):
        self.page_size = config.get("page_size", SMALL)
        self.file = Path(config["file"]).read_bytes() if config.get("file") else b""
        self.memory_fd = -1
        shared = config.get("shared", False)
        features = FEATURE_EVENT_REMOVE | (FEATURES_OF_SHARED if shared else 0)
        self.uffd = create_uffd(features | config.get("features", 0), config.get("api", True))
        if shared:
            flags = MFD_HUGETLB if self.page_size == HUGE else 0
            self.memory_fd = os.memfd_create("guest", flags | (0 if shared == "unsealed" else MFD_ALLOW_SEALING))
            os.ftruncate(self.memory_fd, max(size + offset for size, offset in config["mappings"]))
            self.other_fd = os.memfd_create("guest", flags | MFD_ALLOW_SEALING)
            os.ftruncate(self.other_fd, os.fstat(self.memory_fd).st_size)
        self.regions = [self.region(size, offset) for size, offset in config["mappings"]]
        modes = config.get("register", MODE_MISSING | (MODE_MINOR if shared else 0))
        for memory, address, _ in self.regions:
            if modes:
                fcntl.ioctl(self.uffd, UFFDIO_REGISTER, struct.pack("=QQQQ", address, len(memory), modes, 0))
        if "gap" in config:
            fcntl.ioctl(self.uffd, UFFDIO_UNREGISTER, struct.pack("=QQ", *self.part(config["gap"])))
        libc = ctypes.CDLL(None)
        if "split" in config:
            address, length = self.part(config["split"])
            libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), MADV_DONTFORK)
        if config.get("hidden"):
            libc.prctl(PR_SET_DUMPABLE, 0)
        self.socket = by_a_child(self.hand_over, config) if config.get("child") else self.hand_over(config)

    def part(self, said):
        offset, length = said
        _, address, place = self.at(offset)
        return address + place, length

    def region(self, size, offset):
        huge = MAP_HUGETLB if self.page_size == HUGE and self.memory_fd < 0 else 0
        if self.memory_fd >= 0:
            memory = mmap.mmap(self.memory_fd, size, mmap.MAP_SHARED, offset=offset)
        else:
            memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | huge)
        return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory)), offset

    def message(self, config):
        names = config.get("names", ["page_size", "page_size_kib"])
        told = config.get("page_size_told", self.page_size)
        entries = [
            {"base_host_virt_addr": address, "size": len(memory), "offset": offset, **dict.fromkeys(names, told)}
            for memory, address, offset in self.regions
        ]
        if config.get("overlap"):
            entries[1]["base_host_virt_addr"] = entries[0]["base_host_virt_addr"] + SMALL
        if config.get("align"):  # the first huge page that lies in it
            entries[0]["base_host_virt_addr"] += -entries[0]["base_host_virt_addr"] % HUGE
            entries[0]["size"] = HUGE
        for number, change in config.get("entries", {}).items():
            entry = entries[int(number)]
            entry.update({key: entry.get(key, 0) + value for key, value in change.items()})
        if self.memory_fd >= 0:
            return json.dumps({"mappings": entries, "descriptors": ["userfaultfd", "memory"]})
        return json.dumps(entries)

    def hand_over(self, config):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(config["socket"])
        named = {"uffd": self.uffd, "file": 0, "memory": self.memory_fd, "other": getattr(self, "other_fd", -1)}
        default = ["uffd", "memory"] if self.memory_fd >= 0 else ["uffd"]
        descriptors = array.array("i", [named[name] for name in config.get("descriptors", default)])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)] if descriptors else []
        message = config["message"] if "message" in config else self.message(config)
        connection.sendmsg([message.encode()], rights)
        return connection

    # --- commands ---------------------------------------------------------------------------------------------

    def at(self, offset):
        for memory, address, start in self.regions:
            if start <= offset < start + len(memory):
                return memory, address, offset - start
        raise ValueError(offset)

    def read(self, offset):
        memory, _, place = self.at(offset)
        return memory[place]

    def write(self, offset, value):
        memory, _, place = self.at(offset)
        memory[place] = value
        return value

    def remove(self, offset, length):
        """Do what the balloon device does: madvise with MADV_DONTNEED; of shared memory MADV_REMOVE."""
        memory, _, place = self.at(offset)
        memory.madvise(mmap.MADV_REMOVE if self.memory_fd >= 0 else mmap.MADV_DONTNEED, place, length)
        return length

    def unmap(self, offset, length):
        _, address, place = self.at(offset)
        libc = ctypes.CDLL(None, use_errno=True)
        return libc.munmap(ctypes.c_void_p(address + place), ctypes.c_size_t(length))

    def wrong(self, *zeros):
        """Compare every byte with the file, of `zeros` (offsets of pages) with zeros; return the pages that differ."""
        found = []
        for memory, _, start in self.regions:
            for place in range(0, len(memory), SMALL):
                offset = start + place
                wanted = bytes(SMALL) if offset in zeros else self.file[offset : offset + SMALL]
                if memory[place : place + SMALL] != wanted:
                    found.append(offset)
        return found[:10]

    def filled(self):
        """Count the pages that are not zeros all over."""
        return sum(
            memory[place : place + SMALL] != bytes(SMALL)
            for memory, _, _ in self.regions
            for place in range(0, len(memory), SMALL)
        )

    def close_uffd(self):
        os.close(self.uffd)
        return 0

    def hang_up(self):
        self.socket.close()
        return 0

    def waits(self):
        """Say whether the other end still holds the connection."""
        self.socket.setblocking(False)
        try:
            return self.socket.recv(1) != b""
        except BlockingIOError:
            return True


def by_a_child(hand_over, config):
    child = os.fork()
    if not child:
        hand_over(config)
        os._exit(0)
    os.waitpid(child, 0)


def answer(value):
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main():
    vmm = Vmm(json.loads(sys.argv[1]))
    answer([os.getpid(), *(address for _, address, _ in vmm.regions)])
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        answer(getattr(vmm, name)(*arguments))


if __name__ == "__main__":
    main()
