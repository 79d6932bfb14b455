"""An agent's side of the keeper: starting one for a guest's memory, and taking the place of an agent that was killed.

Mappings enter and a Keeping for the source leaves; or the address of a keeper enters, and its record and files leave.
"""

from __future__ import annotations

import logging
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from agent import keeper
from postcopy.errors import HostError, UsageError
from postcopy.kernel import Mapping
from postcopy.kernel.handover import receive_with_files
from postcopy.limits import KEEPER_ANSWER_SECONDS, KEEPER_START_SECONDS, REGIONS_MAX
from postcopy.link.address import UnixAddress
from postcopy.link.keeping import Record
from postcopy.link.listen import remove_stale
from postcopy.pages.regions import Region

log = logging.getLogger("postcopy.agent")


class Kept:
    """A connection to a keeper: the Keeping of a source."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection: socket.socket | None = connection
        connection.settimeout(KEEPER_ANSWER_SECONDS)

    def keep(self, record: bytes) -> None:
        """Have the record kept. A keeper that is gone is said, and does not stop a migration."""
        try:
            if self._connection is not None:
                keeper.send(self._connection, b"K", record)
                keeper.hear(self._connection)
        except OSError as error:
            log.warning("source: the keeper does not answer (%s): the guest's memory ends with this agent", error)

    def forget(self) -> None:
        """Have the record dropped."""
        self._say(b"F")

    def release(self) -> None:
        """Let the keeper end."""
        self._say(b"R")
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _say(self, letter: bytes) -> None:
        try:
            if self._connection is not None:
                keeper.send(self._connection, letter)
        except OSError as error:
            log.warning("source: the keeper does not answer: %s", error)


def start_keeper(address: UnixAddress, mappings: Sequence[Mapping]) -> Kept:
    """Start a keeper for this memory; UsageError where the memory has no file, HostError where none comes up."""
    for mapping in mappings:
        if mapping.fd < 0:
            kind = mapping.region.type
            raise UsageError(f"region {mapping.region.index} ({kind}) has no file that could outlive this agent")
    remove_stale(address.path)
    if Path(address.path).exists():
        raise UsageError(f"cannot keep memory at {address}: a keeper is there, or another file")
    near, far = socket.socketpair()
    files = [far.fileno(), *(mapping.fd for mapping in mappings)]
    subprocess.Popen(
        [sys.executable, "-I", keeper.__file__, address.path, *map(str, files)],
        pass_fds=files,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # neither Ctrl-C nor the end of a terminal is meant for it
    )
    far.close()
    end = time.monotonic() + KEEPER_START_SECONDS
    while not Path(address.path).exists():
        if time.monotonic() > end:
            near.close()
            raise HostError(f"the keeper at {address} did not come up within {KEEPER_START_SECONDS:g} s")
        time.sleep(0.01)
    return Kept(near)


def take_place(address: UnixAddress) -> tuple[Kept, Record, list[Mapping]]:
    """Take what a killed agent left with its keeper; UsageError where there is none, or nothing to go on with."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(KEEPER_ANSWER_SECONDS)
    try:
        connection.connect(address.path)
        head, files, _ = receive_with_files(connection, struct.calcsize("<cI"), REGIONS_MAX)
        if not head:
            raise ConnectionResetError("it has nothing to go on with, or its agent lives")
        _, length = struct.unpack("<cI", head)
        record = Record.unpack(keeper.receive(connection, length))
    except OSError as error:
        connection.close()
        raise UsageError(f"no migration can be taken up at {address}: {error.strerror or error}") from error
    mappings = []
    for index, ((kind, page_size, size), file) in enumerate(zip(record.regions, files, strict=True)):
        mappings.append(Mapping(Region(index, kind, page_size, size), file, alias=False))
    return Kept(connection), record, mappings
