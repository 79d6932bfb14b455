"""What outlives an agent that is killed, of each process it serves: descriptors, and a file of what it knows.

A process that was handed over enters, and whoever keeps descriptors; in an agent that takes a killed one's place they
come back. The file is a memfd: a record, and behind it the page maps, which the pump itself writes. So there is no
moment at which something is known that the file does not say.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import msgpack

from postcopy.errors import HostError, ProtocolError, UsageError
from postcopy.guest.outside.message import USERFAULTFD, Given, Message, mappings_of
from postcopy.guest.outside.poison import poison_what_is_there
from postcopy.kernel import Userfaultfd, calls
from postcopy.limits import MIGRATION_ID_BYTES, TOKEN_BYTES
from postcopy.pages.ledger import PageState
from postcopy.wire.records import quote
from postcopy.wire.unpack import unpack

log = logging.getLogger("postcopy.destination")

VERSION = 1
# Of 64 mappings and a migration's names the record takes some KiB; it is written by one call, and so is whole.
RECORD_BYTES = 64 << 10
_LENGTH = struct.Struct("<I")
_FIELDS = ("base_host_virt_addr", "size", "offset", "page_size")
_ALIGNED = 4096
# What was given back while it was on its way is zeros to the next pump.
_HERE = (PageState.PLACED, PageState.ZERO, PageState.DROPPED)


class Store(Protocol):
    """Whoever keeps descriptors."""

    def keep(self, name: str, descriptors: Sequence[int]) -> None:
        """Keep copies of them under a name, all of them or none."""

    def forget(self, name: str) -> None:
        """Close those copies."""


@dataclass(frozen=True, slots=True)
class Migration:
    """A migration whose Run had come. The token is a secret: it goes to no log and no disk.

    `memory` is what a source that is dialled calls what it serves, b"" where the source dials. `held`: somebody has
    paused it, and nobody has had it go on since.
    """

    version: int
    migration_id: bytes
    token: bytes = field(repr=False)
    types: tuple[str, ...]  # of the regions, as the source calls them
    memory: bytes = b""
    held: bool = False


class Descriptors(NamedTuple):
    """What is kept of a process, under one name."""

    uffd: int
    peer: int
    file: int

    @classmethod
    def sort(cls, came: Sequence[int]) -> Self:
        """Tell which is which: they come back in any order. UsageError where one lacks."""
        kinds = {"anon_inode:[userfaultfd]": "uffd", "socket": "peer", "/memfd": "file"}
        found: dict[str, int] = {}
        for descriptor in came:
            what = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            found[kinds.get(what, kinds.get(what.partition(":")[0], what))] = descriptor
        if len(came) != len(cls._fields) or found.keys() != set(cls._fields):
            raise UsageError(f"what was kept of a process is not whole: {', '.join(sorted(found))}")
        return cls(**found)


class Kept:
    """One process's part: its userfaultfd, its connection and the file, under a name of its own; close() it."""

    def __init__(self, store: Store, name: str, message: Message, descriptors: Descriptors) -> None:
        self.message = message
        self.migration: Migration | None = None
        self._store = store
        self._name = name
        self._uffd, self._peer, self._file = descriptors
        self._open = True
        pages = [one.size // one.page_size for one in message.mappings]
        # Each map begins on a boundary that the pump looks at eight pages at a time from.
        self._starts = list(accumulate((count + -count % 8 for count in pages), initial=0))
        self._pages = pages
        self._length = self._starts.pop() + _ALIGNED - 1 & -_ALIGNED
        self._address = 0

    @classmethod
    def begin(cls, store: Store, message: Message, uffd: int, connection: socket.socket) -> Self:
        """Have a process that was just handed over kept."""
        with ExitStack() as undo:
            undo.callback(os.close, ours := os.dup(uffd))
            undo.callback(os.close, peer := os.dup(connection.fileno()))
            undo.callback(os.close, file := os.memfd_create("postcopy"))
            descriptors = Descriptors(ours, peer, file)
            kept = cls(store, f"process-{secrets.token_hex(8)}", message, descriptors)
            os.ftruncate(kept._file, RECORD_BYTES + kept._length)
            kept._write(None)
            store.keep(kept._name, descriptors)
            undo.pop_all()
            return kept

    @classmethod
    def take_up(cls, store: Store, name: str, came: Sequence[int]) -> Self:
        """Read what a former agent left; UsageError where it is not whole."""
        try:
            descriptors = Descriptors.sort(came)
            mappings, migration = read_record(descriptors.file)
            kept = cls(store, name, Message(mappings, (USERFAULTFD,)), descriptors)
            kept.migration = migration
        except OSError as error:
            raise UsageError(f"what was kept of a process cannot be read: {error}") from error
        if os.fstat(kept._file).st_size != RECORD_BYTES + kept._length:
            raise UsageError("what was kept of a process is not all there")
        return kept

    def note(self, migration: Migration) -> None:
        """Take note that Run has come, or that somebody pauses or resumes, before anything is done about it."""
        self._write(migration)
        self.migration = migration

    def _write(self, migration: Migration | None) -> None:
        record = pack_record(self.message.mappings, migration)
        if len(record) > RECORD_BYTES:  # behind it lies what the pump says of the pages
            raise HostError(f"what has to be kept of a process takes {len(record)} bytes, more than {RECORD_BYTES}")
        os.pwrite(self._file, record, 0)

    @property
    def maps(self) -> list[int]:
        """The addresses of the page maps, for a pump."""
        if not self._address:
            self._address = calls.map_shared(self._file, self._length, RECORD_BYTES)
        return [self._address + start for start in self._starts]

    def states(self) -> list[bytes]:
        """Return what is known of each page, for each region."""
        return [
            os.pread(self._file, count, RECORD_BYTES + start)
            for start, count in zip(self._starts, self._pages, strict=True)
        ]

    @property
    def here(self) -> int:
        """How many pages are here."""
        return sum(states.count(state) for states in self.states() for state in _HERE)

    @property
    def whole(self) -> bool:
        """Whether every page is here."""
        return self.here == sum(self._pages)

    def poison(self) -> None:
        """See that who touches a page that is not there gets SIGBUS; HostError where the kernel cannot do that."""
        with Userfaultfd.from_fd(self.uffd()) as uffd:
            _poison_all(uffd, self.message.mappings)

    def forget(self) -> None:
        """Keep nothing of it any more."""
        self._store.forget(self._name)
        self.close()

    def close(self) -> None:
        """Give back what is this process's; what is kept stays."""
        if self._address:
            calls.unmap(self._address, self._length)
            self._address = 0
        if self._open:
            self._open = False
            for descriptor in (self._uffd, self._peer, self._file):
                os.close(descriptor)

    def connection(self) -> socket.socket:
        """Return the connection of the process, which is the caller's."""
        return socket.socket(fileno=os.dup(self._peer))

    def uffd(self) -> int:
        """Return its userfaultfd, which is the caller's."""
        return os.dup(self._uffd)


def pack_record(mappings: Sequence[Given], one: Migration | None) -> bytes:
    """Return what is known of a process, as it stands at the beginning of its file."""
    said = {
        "version": VERSION,
        "mappings": [(one.address, one.size, one.offset, one.page_size) for one in mappings],
        "migration": one and (one.version, one.migration_id, one.token, one.types, one.memory),
        # apart from it: an older agent, which knows nothing of this, can go on with the rest
        "held": one is not None and one.held,
    }
    record = msgpack.packb(said)
    return _LENGTH.pack(len(record)) + bytes(record)


def read_record(file: int) -> tuple[tuple[Given, ...], Migration | None]:
    """Return what a file begins with; UsageError where that is nothing that pack_record() wrote."""
    said = _unpack(file)
    if said.get("version") != VERSION:
        raise UsageError(f"what was kept of a process is of version {quote(said.get('version'))}, not {VERSION}")
    mappings = _mappings(said)
    held = said.get("held", False)  # not of an older agent
    match said.get("migration"):
        case None:
            return mappings, None
        case [int(version), bytes(migration_id), bytes(token), [*types], *memory] if (
            (len(migration_id), len(token), len(types)) == (MIGRATION_ID_BYTES, TOKEN_BYTES, len(mappings))
            and not isinstance(version, bool)
            and all(isinstance(one, str) for one in types)
            and all(isinstance(one, bytes) for one in memory)
            and len(memory) <= 1  # not of an older agent
            and isinstance(held, bool)
        ):
            return mappings, Migration(version, migration_id, token, tuple(types), b"".join(memory), held)
    raise UsageError("what was kept of a process says nothing known of its migration")


def _unpack(file: int) -> dict[Any, Any]:
    """Return what the record says, which is there as a whole or not at all, and no longer than it may be."""
    head = os.pread(file, RECORD_BYTES, 0)
    length = int.from_bytes(head[: _LENGTH.size], "little")
    try:
        said = unpack(head[_LENGTH.size : _LENGTH.size + length], "what was kept of a process")
    except ProtocolError as error:
        raise UsageError(str(error)) from None
    if not isinstance(said, dict):
        raise UsageError("what was kept of a process is no record")
    return said


def _mappings(said: dict[Any, Any]) -> tuple[Given, ...]:
    listed = said.get("mappings")
    if not isinstance(listed, list) or not all(isinstance(one, list) and len(one) == len(_FIELDS) for one in listed):
        raise UsageError("what was kept of a process names no mappings")
    try:
        return mappings_of([dict(zip(_FIELDS, one, strict=True)) for one in listed])
    except ProtocolError as error:
        raise UsageError(f"what was kept of a process: {error}") from None


def _poison_all(uffd: Userfaultfd, mappings: Sequence[Given]) -> None:
    refused = poison_what_is_there(uffd, [(one.address, one.size, one.page_size) for one in mappings])
    for error in refused.values():
        raise HostError(f"this kernel cannot poison pages that never come (Linux 6.6 can): {error}")


def _poison(came: Sequence[int]) -> bool:
    """Poison what is missing of a process that is not served any more, as far as is said where; False: nobody says."""
    try:
        descriptors = Descriptors.sort(came)
        with Userfaultfd.from_fd(os.dup(descriptors.uffd)) as uffd:
            _poison_all(uffd, _mappings(_unpack(descriptors.file)))
    except Exception:  # whatever there is in it
        return False
    return True


def _traps(came: Sequence[int]) -> bool:
    return any("[userfaultfd]" in str(Path(f"/proc/self/fd/{one}").readlink()) for one in came)


def sort(store: Store, left: Mapping[str, Sequence[int]]) -> tuple[list[Kept], dict[str, Sequence[int]]]:
    """Return the processes that a former agent left behind, and the descriptors that are none of them."""
    found: list[Kept] = []
    rest: dict[str, Sequence[int]] = {}
    for name, descriptors in left.items():
        try:
            found.append(Kept.take_up(store, name, descriptors))
        except UsageError as error:
            log.error("destination: a process is not served any more: %s", error)  # noqa: TRY400
            if _poison(descriptors) or not _traps(descriptors):
                store.forget(name)
            else:  # to let go of it would give the process zeros
                log.error("destination: a process waits for ever for its pages: nobody knows where they are")  # noqa: TRY400
            rest[name] = descriptors
    return found, rest
