"""Userfaultfd: page faults of this or another process, handed to a program that resolves them.

In: addresses and lengths in bytes, always whole pages of the memory concerned. Out: messages, and outcomes of what
was placed. Useful on its own: nothing here knows of migrations. Sources: userfaultfd(2), ioctl_userfaultfd(2) and the
kernel's admin-guide/mm/userfaultfd; where both are silent, what Linux 6.18 does and the tests of this room hold.

Every call gives the GIL up. A Python thread that touches a missing page by other means (a memoryview, bytes of an
mmap) keeps the GIL while it waits, and then no Python thread can resolve its fault.
"""

from __future__ import annotations

import array
import os
import select
import socket
import time
from errno import EBADF, EINVAL, ENOSYS, EOPNOTSUPP, EPROTO
from types import TracebackType
from typing import Self

from postcopy.errors import KernelError
from postcopy.kernel import abi, calls
from postcopy.kernel.abi import NO_FEATURES, Feature, Ioctl, Mode
from postcopy.kernel.events import Message, parse
from postcopy.kernel.opening import Opened, OpenedBy, negotiate
from postcopy.kernel.outcome import Placed, settle

# One read of 64 messages is 2 KiB: what a few dozen vCPUs can have waiting, and small enough for the stack of caches.
BATCH_MESSAGES = 64
Content = bytes | bytearray | memoryview
_PASSED_BYTES = 8  # the enabled features travel beside the descriptor, little endian

_OPERATIONS = {
    abi.IOC_COPY: "UFFDIO_COPY",
    abi.IOC_MOVE: "UFFDIO_MOVE",
    abi.IOC_CONTINUE: "UFFDIO_CONTINUE",
    abi.IOC_ZEROPAGE: "UFFDIO_ZEROPAGE",
    abi.IOC_POISON: "UFFDIO_POISON",
}


def _words(**numbers: int) -> tuple[int, ...]:
    """Return the numbers, which the kernel takes as 64 bits without a sign; ValueError that names one that is not."""
    for name, number in numbers.items():
        if not 0 <= number < 1 << 64:
            raise ValueError(f"{name} {number:#x} is no number of 64 bits without a sign")
    return tuple(numbers.values())


class Userfaultfd:
    """One userfaultfd. Close it with close() or `with`; closing lets every waiting thread go on to zero pages.

    `fd` is the descriptor, `opened_by` the way it was opened, `features` what is enabled on it (none where another
    process did the handshake and did not say), `ioctls` what the handshake granted.
    """

    def __init__(self, opened: Opened) -> None:
        self.fd = opened.descriptor
        self.opened_by = opened.by
        self.features = opened.features
        self.ioctls = opened.ioctls
        self._waits = False

    @classmethod
    def open(
        cls,
        required: Feature = NO_FEATURES,
        optional: Feature = NO_FEATURES,
        *,
        allow_user_mode_only: bool = False,
        blocking: bool = False,
    ) -> Self:
        """Open one for this process, with all `required` features and what can be had of the `optional` ones.

        Tries /dev/userfaultfd, then userfaultfd(2), then, only where allowed, user-mode-only, which serves no fault
        that the kernel raises itself (system calls, KVM). `blocking` makes read() wait, and the kernel
        refuses to poll it. Raises HostError (exit status 3): no permission, or a required feature is lacking.
        """
        made = cls(negotiate(required, optional, allow_user_mode_only=allow_user_mode_only, blocking=blocking))
        made._waits = blocking
        return made

    @classmethod
    def from_fd(cls, descriptor: int, features: Feature = NO_FEATURES) -> Self:
        """Own a descriptor that came from elsewhere, its handshake done: a fork event, another process.

        `features` are those enabled on it, which the kernel does not tell. The address space is that of the process
        that opened it, and so are all addresses, except the sources of copy() and move(): those are the caller's.
        """
        return cls(Opened(descriptor, OpenedBy.HANDED_OVER, features, Ioctl(0)))

    # Ranges

    def register(self, address: int, length: int, modes: Mode) -> Ioctl:
        """Have faults of these kinds on the range told here; return the ioctls granted for it.

        The answer is per range (4.3) and necessary, not sufficient: MOVE is listed for shmem and refused there. Raises
        KernelError: EINVAL (memory that cannot be trapped so: MINOR on anonymous memory; not aligned; not mapped),
        EBUSY (another userfaultfd has it), EPERM (a file that may not be written), ENOMEM.
        """
        argument = bytearray(abi.REGISTER_ARGUMENT.pack(*_words(address=address, length=length), modes, 0))
        self._check("UFFDIO_REGISTER", calls.ioctl(self.fd, abi.IOC_REGISTER, argument), address, length)
        return Ioctl(abi.REGISTER_ARGUMENT.unpack(argument)[3])

    def unregister(self, address: int, length: int) -> None:
        """Stop trapping the range; whoever waits on it is woken. KernelError EINVAL: not aligned or not mapped."""
        argument = bytearray(abi.RANGE.pack(*_words(address=address, length=length)))
        self._check("UFFDIO_UNREGISTER", calls.ioctl(self.fd, abi.IOC_UNREGISTER, argument), address, length)

    def wake(self, address: int, length: int) -> None:
        """Wake whoever waits on the range: after DONTWAKE, and after PRESENT. Who finds no page faults again."""
        argument = bytearray(abi.RANGE.pack(*_words(address=address, length=length)))
        self._check("UFFDIO_WAKE", calls.ioctl(self.fd, abi.IOC_WAKE, argument), address, length)

    def _check(self, operation: str, result: int, address: int, length: int) -> None:
        if result < 0:
            raise KernelError(operation, -result, f"{length} bytes at {address:#x}")

    # Placing

    def copy(
        self,
        address: int,
        source: int | Content,
        length: int | None = None,
        *,
        wake: bool = True,
        protect: bool = False,
    ) -> Placed:
        """Place bytes copied from `source`: an address in the caller's memory, or an object that holds the bytes.

        UFFDIO_COPY, 4.3; shmem, hugetlb 4.11. `length` may only be left out for an object: then it is all of it.
        `protect` leaves the pages write-protected (5.7). PRESENT: the first page is there, or is in the file of a
        shared mapping. Raises KernelError: EFAULT (source), EINVAL (alignment), ENOSPC,
        ENOMEM: also where a source of huge pages' bytes is not resident, since each page then needs a spare one.
        """
        mode = (0 if wake else abi.DONTWAKE) | (abi.PLACE_PROTECTED if protect else 0)
        if isinstance(source, int):
            if length is None:
                raise ValueError("a length is needed where the source is an address")
            return self._place(abi.IOC_COPY, address, source, length, mode)
        size = memoryview(source).nbytes
        if length is not None and not 0 <= length <= size:
            raise ValueError(f"{length} bytes of a source of {size}")
        with calls.pinned(source) as start:
            return self._place(abi.IOC_COPY, address, start, size if length is None else length, mode)

    def move(self, address: int, source: int, length: int, *, wake: bool = True, allow_holes: bool = False) -> Placed:
        """Place the very pages of the caller's private anonymous memory at `source` (UFFDIO_MOVE, 6.8).

        They are gone from there. BUSY: the page is pinned, shared with a fork, or merged; copy it instead. Raises
        KernelError: EINVAL (shared or huge memory; another process's userfaultfd; alignment), ENOENT is a hole at
        the source unless `allow_holes`, and comes out as GONE since the kernel does not tell which side it was.
        """
        mode = (0 if wake else abi.DONTWAKE) | (abi.MOVE_ALLOW_HOLES if allow_holes else 0)
        return self._place(abi.IOC_MOVE, address, source, length, mode)

    def continue_(self, address: int, length: int, *, wake: bool = True, protect: bool = False) -> Placed:
        """Map pages that the file has already (UFFDIO_CONTINUE, hugetlb 5.13, shmem 5.14; `protect` 6.4).

        PRESENT: the first page is mapped. Raises KernelError: EFAULT (the file has no page there), EINVAL (memory
        without MINOR mode, alignment), ENOMEM.
        """
        mode = (0 if wake else abi.DONTWAKE) | (abi.PLACE_PROTECTED if protect else 0)
        return self._place_range(abi.IOC_CONTINUE, address, length, mode)

    def zeropage(self, address: int, length: int, *, wake: bool = True) -> Placed:
        """Place pages of zeros (UFFDIO_ZEROPAGE, 4.3; shmem 4.14).

        Raises KernelError EINVAL on hugetlb, which has none: copy zeros, or continue_() a fresh page.
        """
        mode = 0 if wake else abi.DONTWAKE
        return self._place_range(abi.IOC_ZEROPAGE, address, length, mode)

    def poison(self, address: int, length: int, *, wake: bool = True) -> Placed:
        """Mark pages as lost: whoever touches one gets SIGBUS, KVM a memory error (UFFDIO_POISON, 6.6).

        PRESENT: the first page is there, or marked already. A later copy() or continue_() takes the mark
        away; zeropage() does on shmem, and finds anonymous memory PRESENT.
        """
        mode = 0 if wake else abi.DONTWAKE
        return self._place_range(abi.IOC_POISON, address, length, mode)

    def writeprotect(self, address: int, length: int, *, protect: bool, wake: bool = True) -> Placed:
        """Protect pages against writes, or take that away and wake the writers (5.7; shmem, hugetlb 5.19).

        Anonymous pages that are not there yet are only protected under Feature.WP_UNPOPULATED. RETRY has no bytes:
        do all of it again. Raises KernelError EINVAL (alignment; `protect` together with no `wake`).
        """
        mode = (abi.PROTECT if protect else 0) | (0 if wake else abi.PROTECT_DONTWAKE)
        argument = bytearray(abi.PROTECT_ARGUMENT.pack(*_words(address=address, length=length), mode))
        return settle("UFFDIO_WRITEPROTECT", calls.ioctl(self.fd, abi.IOC_WRITEPROTECT, argument), address, length, 0)

    def _place(self, request: int, address: int, source: int, length: int, mode: int) -> Placed:
        # The result field starts at 0: where the kernel fails early it stays as it was.
        argument = bytearray(abi.PLACE_ARGUMENT.pack(*_words(address=address, source=source, length=length), mode, 0))
        result = calls.ioctl(self.fd, request, argument)
        done = abi.PLACE_ARGUMENT.unpack(argument)[4]
        return settle(_OPERATIONS[request], result, address, length, done, movable=request == abi.IOC_MOVE)

    def _place_range(self, request: int, address: int, length: int, mode: int) -> Placed:
        argument = bytearray(abi.RANGE_ARGUMENT.pack(*_words(address=address, length=length), mode, 0))
        result = calls.ioctl(self.fd, request, argument)
        return settle(_OPERATIONS[request], result, address, length, abi.RANGE_ARGUMENT.unpack(argument)[3])

    # Messages

    def read(self, messages_max: int = BATCH_MESSAGES) -> list[Message]:
        """Return the messages that wait, at most `messages_max`, oldest first; none of them where none waits.

        Opened with `blocking` it waits for the first, and else it does not, even where another holder of the same
        userfaultfd took its O_NONBLOCK away (from 6.10 on). A page fault may be read before a Remove that happened
        earlier.
        """
        try:
            content = self._read(messages_max * abi.MESSAGE_BYTES)
        except BlockingIOError:
            return []
        except OSError as refused:
            raise KernelError("read of a userfaultfd", refused.errno or EPROTO) from refused
        return parse(content)

    def _read(self, size: int) -> bytes:
        if self._waits:
            return os.read(self.fd, size)
        content = bytearray(size)
        try:
            return bytes(content[: os.preadv(self.fd, [content], -1, os.RWF_NOWAIT)])
        except OSError as refused:
            if refused.errno not in {EOPNOTSUPP, ENOSYS}:
                raise
        return os.read(self.fd, size)

    def poll(self, timeout_seconds: float | None = None) -> bool:
        """Wait until a message can be read; say whether one can. None waits for ever.

        Where another holder of the same userfaultfd took its O_NONBLOCK away it is set again. Raises KernelError: EBADF
        (it is closed), EINVAL (it was opened with `blocking`, and the kernel polls no such one: read() waits).
        """
        if self.fd < 0:
            raise KernelError("poll of a userfaultfd", EBADF)
        if self._waits:
            raise KernelError("poll of a userfaultfd", EINVAL, "it was opened to block: read() waits")
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            poller = select.poll()
            poller.register(self.fd, select.POLLIN)
            left = None if deadline is None else max(deadline - time.monotonic(), 0) * 1000
            found = dict(poller.poll(left)).get(self.fd, 0)
            if found & select.POLLNVAL:
                raise KernelError("poll of a userfaultfd", EBADF)
            if not found & select.POLLERR:
                return bool(found & select.POLLIN)
            os.set_blocking(self.fd, False)

    def fileno(self) -> int:
        """Return the descriptor, for select, asyncio and the like."""
        return self.fd

    # Passing it on, and its end

    def send(self, connection: socket.socket) -> None:
        """Hand a second descriptor of the same userfaultfd, and its features, over a Unix socket."""
        socket.send_fds(connection, [self.features.to_bytes(_PASSED_BYTES, "little")], [self.fd])

    @classmethod
    def receive(cls, connection: socket.socket) -> Self:
        """Take what send() handed over. Raises KernelError EPROTO where it was something else, and keeps nothing."""
        # Not socket.recv_fds: it cannot close on exec what it receives before another thread may have forked.
        space = socket.CMSG_SPACE(array.array("i").itemsize)
        content, ancillary, _, _ = connection.recvmsg(_PASSED_BYTES, space, socket.MSG_CMSG_CLOEXEC)
        descriptors = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
        if len(content) != _PASSED_BYTES or len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            detail = f"{len(content)} bytes, {len(descriptors)} descriptors"
            raise KernelError("receive of a userfaultfd", EPROTO, detail)
        return cls.from_fd(descriptors[0], Feature(int.from_bytes(content, "little")))

    def close(self) -> None:
        """Close the descriptor; the last one to be closed ends the trapping, and waiting threads see zeros."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1  # also where closing fails: the number may be another file's by then
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
