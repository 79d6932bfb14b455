"""Guest memory that goes from one process of this host to another as files, without a byte of it being copied.

In: files of memory and the regions that they are said to be. Out: the same files in the other process; whether each is
what it is said to be, and can be trusted to stay as large as it is: whoever cuts a mapped file short takes its pages
away from under the guest (SIGBUS), so it is sealed against that before its size is believed.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import threading
from collections.abc import Sequence
from errno import EINVAL

from postcopy.errors import ProtocolError, UsageError
from postcopy.pages.regions import Region
from postcopy.pages.units import format_size

F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; not in Python's fcntl before 3.13
FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class FilesError(ProtocolError):
    """Something else than the files came that should have."""

    code = "protocol"


def send_files(connection: socket.socket, word: bytes, files: Sequence[int]) -> None:
    """Send a word over a Unix socket, and the files with it; they stay open here. OSError where it cannot be sent."""
    socket.send_fds(connection, [word], files)


def receive_files(connection: socket.socket, word: bytes, count: int) -> list[int]:
    """Take the `count` files that send_files() sent with a word; they are the caller's.

    Raises FilesError where something else came, and keeps nothing of it; BlockingIOError where nothing has come yet.
    """
    content, files, _ = receive_with_files(connection, len(word), count + 1)  # so too many are told from just enough
    if content == word and len(files) == count:
        return files
    close_files(files)
    if not content:
        raise FilesError("the memory connection ended before the files came")
    if content != word:
        raise FilesError(f"the memory connection carries the byte {content.hex()}, not {word.hex()} and files")
    came = f"{len(files)}" if len(files) <= count else f"more than {count}"
    raise FilesError(f"{came} files came for {count} regions")


def receive_with_files(connection: socket.socket, length: int, room: int) -> tuple[bytes, list[int], bool]:
    """Return bytes of a Unix socket, the files that came with them (not inherited), and whether more than `room` did.

    The files are the caller's, whatever he makes of the bytes. OSError as from recv().
    """
    files = array.array("i")
    space = socket.CMSG_SPACE(room * files.itemsize)
    content, ancillary, flags, _ = connection.recvmsg(length, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(payload[: len(payload) - len(payload) % files.itemsize])
    return content, files.tolist(), bool(flags & socket.MSG_CTRUNC)


def close_files(files: Sequence[int]) -> None:
    """Close files that anybody may have sent, without waiting for what stands behind them.

    To close a file of a filesystem that is a process (FUSE) or another host may take as long as that one likes.
    """
    if files:
        threading.Thread(target=_close, args=(list(files),), name="close files", daemon=True).start()


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


def seal_files(regions: Sequence[Region], files: Sequence[int]) -> None:
    """See that each file is the whole memory of its region, for good; UsageError says which is not, and why.

    What must not be asked of a file that is none of memory (it could take for ever) is asked last.
    """
    known: dict[tuple[int, int], int] = {}
    for region, file in zip(regions, files, strict=True):
        why = why_not_memory(file) or _unlike(region, file)
        if why is not None:
            raise UsageError(f"region {region.index} ({region.type}) cannot be handed over: {why}")
        found = os.fstat(file)
        other = known.setdefault((found.st_dev, found.st_ino), region.index)
        if other != region.index:
            raise UsageError(f"region {region.index} ({region.type}) is the same file as region {other}")


def why_not_memory(file: int) -> str | None:
    """Seal a file against a change of its size, for good; say why it cannot be guest memory, None where it can."""
    return _closed_to_us(file) or _not_sealed(file)


def _closed_to_us(file: int) -> str | None:
    """Say why a file cannot be mapped as guest memory is; None where it can."""
    if file < 0:
        return "it is private memory without a file, which no other process can map"
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE != os.O_RDWR:
        return "its file is not open for reading and writing"
    return None


def _not_sealed(file: int) -> str | None:
    """Seal a file against a change of its size; say why it is not sealed so, or not of memory."""
    try:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
    except OSError as refused:
        if refused.errno != EINVAL:
            raise
        return "its file is none of shmem or hugetlbfs"  # these two alone know seals
    if seals & (fcntl.F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
        return "its file is sealed against writing"
    if seals & FIXED_SIZE != FIXED_SIZE:
        try:
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, FIXED_SIZE)
        except OSError:
            return "its file does not let itself be sealed against a change of size (files of a mount never do)"
    return None


def _unlike(region: Region, file: int) -> str | None:
    """Say how a sealed file differs from the region that it is said to be."""
    page_size = os.fstatvfs(file).f_bsize
    if page_size != region.page_size:
        return f"its file has pages of {format_size(page_size)}, not {format_size(region.page_size)}"
    size = os.fstat(file).st_size
    return None if size == region.size else f"its file has {size} bytes, not {region.size}"
