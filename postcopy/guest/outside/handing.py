"""One hand-over: what comes over the Unix socket of an outside VMM, and whether it is what it should be.

A connection of anybody enters; a userfaultfd with mappings that the kernel serves through it leaves. Whatever is
refused is closed again, every descriptor that came with it included.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import socket
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack, suppress
from errno import EFAULT, EINVAL
from pathlib import Path
from typing import Self

from postcopy.errors import HostError, KernelError, ProtocolError
from postcopy.guest.outside.keeping import Kept, Store
from postcopy.guest.outside.message import MEMORY, USERFAULTFD, Given, Message, complete, parse
from postcopy.guest.outside.poison import Poisoner, poison_what_is_there
from postcopy.guest.outside.process import Process
from postcopy.kernel import Mode, Outcome, Userfaultfd, calls
from postcopy.kernel.abi import Ioctl
from postcopy.kernel.handover import close_files, receive_with_files, why_not_memory
from postcopy.limits import DESCRIPTORS_ROOM, HAND_OVER_SECONDS, MAPPING_TRIES_MAX
from postcopy.link.sockets import ready

log = logging.getLogger("postcopy.destination")


# An address space may outlive the process that handed it over: how often is looked whether it has ended.
GONE_LOOK_SECONDS = 1.0

_READ_BYTES = 16 << 10
_SMALL_PAGE = 4096
# An address that any process can have.
_ANYWHERE = 1 << 32


class HandedOver:
    """A process's memory as it was handed over; `memory_fd` is its file, -1 where none came. close() it."""

    def __init__(self, process: Process, message: Message, uffd: Userfaultfd, memory_fd: int) -> None:
        self.process = process
        self.message = message
        self.uffd = uffd
        self.memory_fd = memory_fd
        self.kept: Kept | None = None

    @classmethod
    def take_up(cls, kept: Kept) -> Self:
        """Go on with a process that a killed agent served; PostcopyError where it cannot be watched any more.

        Faults that the other had read and not answered are told by the kernel once and not again, so whoever waits is
        woken: who still misses his page faults anew. What the process gave back meanwhile waits to be read.
        """
        with kept.connection() as connection:
            process = Process(connection)
        handed = cls(process, kept.message, Userfaultfd.from_fd(kept.uffd()), -1)
        handed.kept = kept
        for one in kept.message.mappings:
            with suppress(KernelError):  # unmapped meanwhile, or all of it gone
                handed.uffd.wake(one.address, one.size)
        return handed

    def keep(self, store: Store, connection: socket.socket) -> None:
        """Have it outlive this agent."""
        self.kept = Kept.begin(store, self.message, self.uffd.fd, connection)

    def states(self) -> list[bytes]:
        """Return what is known of each page without a pump: of each region a byte a page."""
        if self.kept is not None:
            return self.kept.states()
        return [bytes(one.size // one.page_size) for one in self.message.mappings]

    @property
    def lives(self) -> bool:
        """Whether anybody can still touch the memory: the process, or who shares the address space it has told of."""
        return self.process.lives or not self.gone()

    def gone(self) -> bool:
        """Say whether the address space has ended, or is none of ours any more: it may outlive its process."""
        return self.uffd.fd < 0 or all(
            probe(self.uffd, one.address, one.page_size) == "gone" for one in self.message.mappings
        )

    async def gone_for_good(self) -> None:
        """Return when the memory's process has ended, and whoever else may share its address space."""
        await self.process.ended.wait()
        while not self.gone():
            await asyncio.sleep(GONE_LOOK_SECONDS)

    def poison(self, maps: Sequence[bytes]) -> int:
        """Poison all that is missing by `maps` (see states()), release the rest; return how many pages. HostError."""
        regions = [(one.address, one.page_size) for one in self.message.mappings]
        poisoned = Poisoner(self.uffd, regions, maps).run()
        self.release()
        return poisoned

    def abandon(self) -> None:
        """Poison all of it, of which no page has come."""
        try:
            poisoned = self.poison(self.states())
        except HostError as refused:
            log.error("destination: %s waits for its pages for ever: %s", self.process, refused)  # noqa: TRY400
        else:
            log.error("destination: %s loses %d pages: it came as this agent ended", self.process, poisoned)

    def release(self) -> None:
        """Leave the memory to the kernel: what is missing and not poisoned reads as zeros from now on."""
        for one in self.message.mappings:
            with suppress(KernelError):  # unmapped meanwhile, or all of it gone
                self.uffd.unregister(one.address, one.size)

    def close(self) -> None:
        """Give everything back, at once: the faults of this memory are nobody's then."""
        if self.kept is not None:
            self.kept.forget()
            self.kept = None
        self.uffd.close()
        self.process.close()
        if self.memory_fd >= 0:
            os.close(self.memory_fd)
            self.memory_fd = -1


async def take(connection: socket.socket, *, in_place: bool = True) -> HandedOver:
    """Hear one process out; PostcopyError says why it is not served. The connection stays the caller's.

    `in_place`: pages may be filled where they are, through the memory's file, if one comes along.
    """
    process = Process(connection)
    with ExitStack() as undo:
        undo.callback(process.close)
        descriptors: list[int] = []
        undo.callback(close_files, descriptors)
        try:
            async with asyncio.timeout(HAND_OVER_SECONDS):
                data = await _receive(connection, descriptors)
        except TimeoutError:
            raise ProtocolError(f"{process}: no whole message within {HAND_OVER_SECONDS:g} s") from None
        except ProtocolError as error:
            raise ProtocolError(f"{process}: {error}") from None
        try:
            handed = await _opened(asyncio.to_thread(_open, process, parse(data), descriptors, in_place=in_place))
        except (ProtocolError, KernelError, OSError) as error:
            raise ProtocolError(f"{process}: {error}") from error
        undo.pop_all()
        close_files(descriptors)
        return handed


async def _opened(opening: Coroutine[None, None, HandedOver]) -> HandedOver:
    """Wait for a thread that looks at what came. Called back, it cannot be: then the process is left to itself."""
    looking = asyncio.ensure_future(opening)
    try:
        return await asyncio.shield(looking)
    except asyncio.CancelledError:
        await asyncio.wait({looking})
        if looking.exception() is None:
            handed = looking.result()
            await asyncio.shield(asyncio.to_thread(handed.abandon))
            handed.uffd.close()
            if handed.memory_fd >= 0:
                os.close(handed.memory_fd)
        raise


async def _receive(connection: socket.socket, descriptors: list[int]) -> bytes:
    """Read until a message is whole. Descriptors are kept in the list, whatever happens."""
    connection.setblocking(False)
    data = b""
    while not data or not complete(data):
        await ready(connection)
        try:
            piece = _read(connection, descriptors)
        except BlockingIOError:
            continue
        except OSError as error:
            raise ProtocolError(f"the connection broke: {error.strerror}") from error
        if not piece:
            said = f"after {len(data)} bytes of its message" if data else "before it said anything"
            raise ProtocolError(f"it closed the connection {said}")
        data += piece
    return data


def _read(connection: socket.socket, descriptors: list[int]) -> bytes:
    piece, came, more = receive_with_files(connection, _READ_BYTES, DESCRIPTORS_ROOM)
    descriptors += came
    if more:
        raise ProtocolError(f"more than {DESCRIPTORS_ROOM} descriptors came")
    return piece


def _open(process: Process, message: Message, descriptors: list[int], *, in_place: bool) -> HandedOver:
    """Check the descriptors; those that are taken leave the list."""
    if len(descriptors) != len(message.descriptors):
        wanted = " and ".join(message.descriptors)
        raise ProtocolError(f"{len(descriptors)} descriptors came, wanted {len(message.descriptors)}: {wanted}")
    named = dict(zip(message.descriptors, descriptors, strict=True))
    if "[userfaultfd]" not in str(Path(f"/proc/self/fd/{named[USERFAULTFD]}").readlink()):
        raise ProtocolError("the descriptor is no userfaultfd")
    os.set_blocking(named[USERFAULTFD], False)
    uffd = Userfaultfd.from_fd(named[USERFAULTFD])
    memory_fd = named.get(MEMORY, -1)
    if not _exists(uffd, _ANYWHERE, _SMALL_PAGE):
        raise ProtocolError("its userfaultfd was never asked for its features (UFFDIO_API), so it traps nothing")
    try:
        for number, mapping in enumerate(message.mappings):
            _check_trapped(uffd, number, mapping)
        if memory_fd >= 0:
            _check_file(memory_fd, message)
            if not in_place:
                log.info("destination: %s: its pages are copied, for a page filled in place is not kept", process)
            if in_place and _maps_it(process, memory_fd, message):
                _trap_minor(uffd, message)
            else:
                memory_fd = -1
    except BaseException:
        _poison(process, uffd, message)
        raise
    descriptors[:] = [one for one in descriptors if one not in {uffd.fd, memory_fd}]
    return HandedOver(process, message, uffd, memory_fd)


def _poison(process: Process, uffd: Userfaultfd, message: Message) -> None:
    """See that a process that is refused gets no zeros where its pages should be, as far as it has told where."""
    regions = [(one.address, one.size, one.page_size) for one in message.mappings]
    for (address, _, page_size), refused in poison_what_is_there(uffd, regions).items():
        if probe(uffd, address, page_size) == "trapped":  # and so it is memory, and the kernel could do it
            log.error(
                "destination: %s is refused, and its pages cannot be poisoned (Linux 6.6 can): it reads zeros in their "
                "place, or waits for them for ever where it holds its userfaultfd itself: %s",
                process,
                refused,
            )
            return


def probe(uffd: Userfaultfd, address: int, length: int) -> str:
    """Ask the kernel what it would place there, without placing it: "trapped", "gone", or "wrong" for the page size.

    It is asked to copy bytes that cannot be read, and tells what comes before it finds that out.
    """
    try:
        with (
            mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0) as unreadable,
            memoryview(unreadable) as view,
            calls.pinned(view) as nothing,
        ):
            outcome = uffd.copy(address, nothing, length).outcome
    except KernelError as refused:
        if refused.number == EINVAL and not _exists(uffd, address, length):
            return "gone"
        return {EFAULT: "trapped", EINVAL: "wrong"}.get(refused.number, str(refused))
    return "gone" if outcome is Outcome.GONE else "trapped"


def _exists(uffd: Userfaultfd, address: int, length: int) -> bool:
    """Return whether its process can have such addresses, mapped or not: waking nobody there asks for no more."""
    try:
        uffd.wake(address, length)
    except KernelError as refused:
        if refused.number != EINVAL:
            raise
        return False
    return True


def _check_trapped(uffd: Userfaultfd, number: int, mapping: Given) -> None:
    """See that all of a mapping is trapped and has pages of its size.

    The kernel says "trapped" of a range that lies in one piece of an address space, and "gone" of one that lies in
    several or has a gap: such a one is halved until each part is the one or the other.
    """
    left = [(mapping.address, mapping.size)]
    for _ in range(MAPPING_TRIES_MAX):
        if not left:
            return
        start, size = left.pop()
        found = probe(uffd, start, size)
        if found == "gone" and size > mapping.page_size:
            half = size // mapping.page_size // 2 * mapping.page_size
            left += [(start + half, size - half), (start, half)]
            continue
        if found == "trapped" and mapping.page_size > _SMALL_PAGE and probe(uffd, start, _SMALL_PAGE) == "trapped":
            found = "wrong"
        if found == "gone":
            raise ProtocolError(f"mapping {number}: its userfaultfd traps nothing at {start:#x}")
        if found == "wrong":
            raise ProtocolError(f"mapping {number}: the memory at {start:#x} has no pages of {mapping.page_size} bytes")
        if found != "trapped":
            raise ProtocolError(f"mapping {number}: {found}")
    raise ProtocolError(f"mapping {number}: its memory lies in too many pieces")


def _check_file(memory_fd: int, message: Message) -> None:
    """See that the file can be filled and never be cut short, and has all that the mappings are said to be."""
    why = why_not_memory(memory_fd)
    if why is not None:
        raise ProtocolError(f"the memory cannot be filled through the file that was offered: {why}")
    found, page_size = os.fstat(memory_fd), os.fstatvfs(memory_fd).f_bsize
    for number, one in enumerate(message.mappings):
        if one.offset + one.size > found.st_size:
            raise ProtocolError(f"mapping {number} is beyond the memory's file, which has {found.st_size} bytes")
        if page_size != one.page_size:
            raise ProtocolError(f"mapping {number}: the memory's file has no pages of {one.page_size} bytes")


def _maps_it(process: Process, memory_fd: int, message: Message) -> bool:
    """See that the file is what the process has mapped, as it told; False where it is not to be seen.

    Filled through another file, or at another place of it, pages would be of the wrong bytes. Nothing but the list of
    its mappings tells: whatever could be tried through the userfaultfd would show the process bytes that are not its.
    """
    found = os.fstat(memory_fd)
    try:
        mapped = process.mapped((found.st_dev, found.st_ino))
    except HostError as hidden:
        log.warning("destination: %s: %s; so its pages are copied, and its file is not used", process, hidden)
        return False
    for number, one in enumerate(message.mappings):
        if not _covers(mapped, one):
            raise ProtocolError(
                f"mapping {number}: {process} has not mapped that part of the file that was offered at {one.address:#x}"
            )
    return True


def _covers(mapped: Sequence[tuple[int, int, int]], given: Given) -> bool:
    """Say whether parts of a file, each (start, stop, offset) and ascending, are all of a mapping as it was told."""
    at = given.address
    for start, stop, offset in mapped:
        if start <= at < stop and at - start + offset == at - given.address + given.offset:
            at = stop
    return at >= given.address + given.size


def _trap_minor(uffd: Userfaultfd, message: Message) -> None:
    """Have pages trapped that the file has, too: one that is being filled would be visible half full."""
    for number, one in enumerate(message.mappings):
        granted = uffd.register(one.address, one.size, Mode.MISSING | Mode.MINOR)
        if not granted & Ioctl.CONTINUE:
            raise ProtocolError(
                f"mapping {number}: the kernel does not grant CONTINUE: is it a shared mapping of the file?"
            )
