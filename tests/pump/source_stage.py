"""A source's pump on real memory and real sockets, with the test in the destination's place."""

from __future__ import annotations

import mmap
import os
import socket
from types import SimpleNamespace
from typing import Any

from postcopy.pages.bitmap import Bitmap
from postcopy.pages.regions import Layout, Region
from postcopy.plan.push import PushExtent
from postcopy.pump._pump import ffi
from postcopy.pump.source import SourcePump
from postcopy.wire.frame import FrameType, Header, pack, unpack
from tests.pump.stage import connection

PAGE = 4096


class Source:
    """`pages` of a memfd: `data` ones hold a byte of their own, `zeroed` ones zeros, the others are holes."""

    def __init__(
        self,
        pages: int,
        data: set[int],
        zeroed: set[int] = frozenset(),
        page_size: int = PAGE,
        stopped: bool = True,
        read: bool = False,
        has: Bitmap | None = None,
        **options: Any,
    ) -> None:
        self.page_size = page_size
        self.fd = os.memfd_create("source", os.MFD_CLOEXEC)
        before = 3 * PAGE if read else 0  # where in the file the region begins
        os.ftruncate(self.fd, before + pages * page_size)
        for page in data | zeroed:
            os.pwrite(self.fd, self.content(page) if page in data else bytes(page_size), before + page * page_size)
        region = Region(0, "shmem", page_size, pages * page_size)
        self.map = None if read else mmap.mmap(self.fd, pages * page_size)
        address = 0 if self.map is None else int(ffi.cast("uintptr_t", ffi.from_buffer(self.map)))
        mapping = SimpleNamespace(region=region, address=address, alias=0, fd=self.fd, fd_offset=before)
        self.pump = SourcePump(Layout((region,)), [mapping], poll_max_ns=0, **options)
        self.urgent, urgent = connection()
        self.push, push = connection()
        self.pump.attach("urgent", urgent.detach())
        self.pump.attach("push", push.detach())
        if has is not None:
            self.pump.skip(0, 0, has)
        self.pump.start()
        if stopped:
            self.pump.guest_stopped()

    def content(self, page: int) -> bytes:
        return bytes([page % 255 + 1]) * self.page_size

    def ask(self, *pages: int) -> None:
        requests = [Header(FrameType.REQUEST, 0, page * self.page_size, self.page_size) for page in pages]
        self.urgent.sendall(b"".join(map(pack, requests)))

    def order(self, page: int, count: int, zero: bool = False) -> None:
        extent = PushExtent(0, page * self.page_size, count * self.page_size, zero)
        assert self.pump.push([extent]) == 1

    def close(self) -> None:
        self.pump.close()
        self.urgent.close()
        self.push.close()


def receive(end: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = end.recv(count - len(data))
        assert part, "the connection ended"
        data += part
    return bytes(data)


def frame_from(end: socket.socket) -> tuple[Header, bytes]:
    header = unpack(receive(end, 24))
    return header, receive(end, header.payload_bytes)
