"""A destination's pump on real memory and real sockets, with the test in the source's place.

The order of a race is forced by what the test sends and when: a page is being placed for as long as the test holds
back the rest of its frame. Whoever touches memory does it in a thread that releases the GIL while it waits (a read or
write of a pipe), and the whole runs in a child process (tests/child.py).
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from postcopy.kernel import Feature, Mode, Userfaultfd, Way, memory_type_at
from postcopy.kernel.abi import NO_FEATURES
from postcopy.pages.regions import Layout, Region
from postcopy.pump._pump import ffi
from postcopy.pump.destination import DestinationPump
from postcopy.pump.regions import Placement, Removal
from postcopy.wire.frame import FrameType, Header, pack, unpack

DEADLINE = 10.0


def until(condition: Callable[[], bool], what: str = "the condition", *, seconds: float = DEADLINE) -> None:
    """Return once the condition holds; AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        time.sleep(0.0005)


def connection() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.settimeout(DEADLINE)
    return near, far


class Toucher:
    """A thread that reads a page into a pipe, or writes one from a pipe: a guest's access, made by the kernel."""

    def __init__(self, page: memoryview, content: bytes | None = None) -> None:
        self._page, self._content = page, content
        self.read = b""
        self.refused: OSError | None = None
        self._thread = threading.Thread(target=self._touch, daemon=True)
        self._thread.start()

    def _touch(self) -> None:
        reader, writer = os.pipe()
        count = min(len(self._page), 4096)
        try:
            if self._content is None:
                os.write(writer, self._page[:count])
                self.read = os.read(reader, count)
            else:
                os.write(writer, self._content)
                os.readv(reader, [self._page[: len(self._content)]])
        except OSError as refused:
            self.refused = refused
        os.close(reader)
        os.close(writer)

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def done(self) -> bytes:
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), "the access is still waiting"
        assert self.refused is None, self.refused
        return self.read

    def failed(self) -> int:
        """Return the errno with which the access was refused."""
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), "the access is still waiting"
        assert self.refused is not None, "the access went through"
        return self.refused.errno or 0


class Stage:
    """`pages` of one region, registered, a running pump, and the source's ends of both connections."""

    def __init__(
        self,
        type_name: str = "shmem",
        pages: int = 8,
        placement: Placement = Placement.COPY,
        connect: Callable[[], tuple[socket.socket, socket.socket]] = connection,
        removal: Removal = Removal.UNTOLD,
        foreign: bool = False,
        features: Feature = NO_FEATURES,
        beat_ns: int = 0,
        place: Path | None = None,
        zeropage: bool = True,
    ) -> None:
        self.type = memory_type_at(type_name, place)
        self.page_size = self.type.page_size
        self.region = Region(0, type_name, self.page_size, pages * self.page_size)
        self.layout = Layout((self.region,))
        self.mapping = self.type.allocate(self.region, alias=True)
        modes = Mode.MISSING | Mode.MINOR if placement is Placement.CONTINUE else Mode.MISSING
        features |= self.type.features_for(modes) | Feature.THREAD_ID
        self.uffd = Userfaultfd.open(features if removal is Removal.UNTOLD else features | Feature.EVENT_REMOVE)
        self.uffd.register(self.mapping.address, self.region.size, modes)
        self.pump = DestinationPump(
            self.layout,
            [self.mapping],
            self.uffd.fileno(),
            demand=[placement],
            push=[placement],
            zeropage=[zeropage and self.type.zero_way(alias=False) is Way.ZEROPAGE],
            poll_max_ns=0,
            beat_ns=beat_ns,
            removal=[removal],
            foreign=foreign,
        )
        self._connect = connect
        self._attach()
        self.before_start()
        self.pump.start()

    def _attach(self) -> None:
        self.urgent, urgent = self._connect()
        self.push, push = self._connect()
        self.pump.attach("urgent", urgent.detach())
        self.pump.attach("push", push.detach())

    def resume(self) -> None:
        """Give a pump that was detached new connections."""
        self.urgent.close()
        self.push.close()
        self._attach()
        self.pump.resume()

    def before_start(self) -> None:
        """What a stage of another kind does with its pump first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pump.close()
        self.urgent.close()
        self.push.close()
        self.uffd.close()
        self.mapping.close()

    def memory(self, page: int) -> memoryview:
        address = self.mapping.address + page * self.page_size
        return memoryview(ffi.buffer(ffi.cast("char *", address), self.page_size)).cast("B")

    def touch(self, page: int, content: bytes | None = None) -> Toucher:
        return Toucher(self.memory(page), content)

    def content(self, fill: int) -> bytes:
        return bytes([fill]) * self.page_size

    def frame(self, kind: FrameType, page: int, count: int = 1) -> bytes:
        return pack(Header(kind, 0, page * self.page_size, count * self.page_size))

    def pages(self, page: int, *fills: int) -> bytes:
        return self.frame(FrameType.PAGES, page, len(fills)) + b"".join(map(self.content, fills))

    def requested(self, count: int) -> set[int]:
        """Read `count` requests off the urgent connection and return their pages."""
        data = b""
        while len(data) < count * 24:
            data += self.urgent.recv(count * 24 - len(data))
        headers = [unpack(data[at : at + 24]) for at in range(0, len(data), 24)]
        assert {header.type for header in headers} <= {FrameType.REQUEST}
        return {header.offset // self.page_size for header in headers}

    def request(self, page: int) -> None:
        """Read one request off the urgent connection and see that it is for `page`."""
        header = b""
        while len(header) < 24:
            header += self.urgent.recv(24 - len(header))
        assert header == self.frame(FrameType.REQUEST, page)

    def no_request(self) -> None:
        assert not select.select([self.urgent], [], [], 0)[0], "a request was sent"

    def state(self, page: int) -> int:
        return self.pump.page_map(0)[page]

    def finished(self) -> None:
        assert select.select([self.pump.event_fd], [], [], DEADLINE)[0], "no event from the pump"
