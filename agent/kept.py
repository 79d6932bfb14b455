"""An agent's side of the keeper: having one for a guest's memory, and taking the place of an agent that was killed.

Mappings enter and a Kept leaves, the Keeping of a source; or the address of a keeper enters, and what it holds leaves:
a Kept again, the record and the mappings.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from agent import keeper
from postcopy.errors import HostError, MigrationFailed, PostcopyError, UsageError
from postcopy.kernel import Mapping
from postcopy.kernel.handover import close_files, receive_with_files
from postcopy.limits import KEEPER_ANSWER_SECONDS, KEEPER_END_SECONDS, KEEPER_START_SECONDS, REGIONS_MAX
from postcopy.link.address import UnixAddress
from postcopy.link.keeping import Record
from postcopy.link.listen import bind
from postcopy.link.sockets import check_peer, peer_of
from postcopy.pages.regions import Region

log = logging.getLogger("postcopy.agent")

# Between two keepers that are started in the place of others, and before another try where none comes up.
AGAIN_SECONDS = 2.0


class NothingKeptError(PostcopyError):
    """No keeper answers at an address: mostly it had nothing left to go on with; or it is not there that it was."""

    exit_status = 8


class Kept:
    """A guest's memory that another process holds, too: the Keeping of a source.

    `files` are the record's and those of the memory, this object's own. A keeper that ends is followed by another one
    at the same address, with the same files, until release().
    """

    def __init__(self, address: UnixAddress, files: Sequence[int]) -> None:
        self.address = address
        self._files = list(files)
        self._connection: socket.socket | None = None  # to the keeper that there is
        self._process: subprocess.Popen[bytes] | None = None  # the same, where it is a child of this agent
        self._pid = 0  # its own, in any case
        self._changing = threading.Lock()
        self._writing = threading.Lock()  # never held for long, as the other one may be
        self._released = False

    # --- the record -----------------------------------------------------------------------------------------------

    def keep(self, record: bytes) -> None:
        """Have the record kept: it lies in memory that the keeper holds, whatever that one is doing."""
        try:
            with self._writing:
                if not self._released:
                    self._write(record)
        except OSError as error:
            log.error("source: nothing is kept (%s): the guest's memory ends with this agent", error.strerror)  # noqa: TRY400

    def _write(self, record: bytes) -> None:
        """Write it beside the former one, and then at once that it counts."""
        file = self._files[0]
        where, length = read_head(file)
        place = keeper.HEAD.size if not length or where >= keeper.HEAD.size + len(record) else where + length
        written = 0
        while written < len(record):
            written += os.pwrite(file, record[written:], place + written)
        os.pwrite(file, keeper.HEAD.pack(place, len(record)), 0)

    def forget(self) -> None:
        """Have the record dropped."""
        with self._writing:
            if not self._released:
                self._write_nothing()

    def _write_nothing(self) -> None:
        os.pwrite(self._files[0], keeper.HEAD.pack(0, 0), 0)

    def release(self) -> None:
        """Let the keeper end, and wait for that."""
        with self._changing:
            with self._writing:  # whatever else is to be written comes before it, or never
                if self._released:
                    return
                self._released = True
                self._write_nothing()
            self._leave()
            for file in self._files:
                os.close(file)

    def _leave(self) -> None:
        connection, process = self._connection, self._process
        if connection is None:
            return
        wake(self._pid)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # who watches it sees that, and closes it
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KEEPER_END_SECONDS)

    # --- the keeper -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a keeper, and see to it that there always is one. Raises UsageError, HostError."""
        with self._changing:
            self._start()
        self._watch()

    def adopt(self, connection: socket.socket) -> None:
        """Take the keeper at the other end for this one."""
        self._connection, self._pid = connection, peer_of(connection)[0]
        self._watch()

    def ensure(self) -> None:
        """See that there is a keeper; start one where there is none, MigrationFailed where that fails."""
        connection = self._connection
        if connection is None or ended(connection):
            try:
                self._replace(connection)
            except PostcopyError as error:
                raise MigrationFailed(f"the guest's memory is kept by nobody: {error}") from error
        elif wake(self._pid):
            log.warning("source: the keeper, process %d, was stopped: it goes on now", self._pid)

    @property
    def keeps(self) -> bool:
        """Whether there is something to go on with, and a keeper that has it: what outlives this agent."""
        connection = self._connection
        if connection is None or ended(connection):
            return False
        with self._writing:
            return not self._released and read_head(self._files[0])[1] > 0

    def stays(self) -> bool:
        """See to it that what there is to go on with outlives this agent; whether it does."""
        with contextlib.suppress(MigrationFailed):
            self.ensure()
        return self.keeps

    def _replace(self, former: socket.socket | None) -> None:
        """Start a keeper in the place of one that is gone, unless somebody was quicker."""
        with self._changing:
            if self._connection is former and not self._released:
                self._start()
                log.warning("source: the keeper of the guest's memory has ended: process %d follows it", self._pid)

    def _start(self) -> None:
        """Start one; UsageError or HostError where none comes up, and then nothing of it is left."""
        if self._process is not None:
            self._process.wait()  # it has ended
        try:
            self._connection, self._process = self._begin()
        except UsageError as error:
            raise UsageError(f"no keeper can be started: {error}") from error
        except OSError as error:  # descriptors, processes, or the place of the socket: it may be otherwise soon
            raise HostError(f"no keeper can be started: {error}") from error
        self._pid = self._process.pid

    def _begin(self) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        """Return a keeper that has come up, and the connection to it."""
        with contextlib.ExitStack() as undo:
            listening = undo.enter_context(bind(self.address))
            undo.callback(unlink, self.address)
            near, far = socket.socketpair()
            undo.callback(near.close)
            with far:
                files = [listening.fileno(), far.fileno(), *self._files]
                program = [sys.executable, "-I", "-S", keeper.__file__, self.address.path, *map(str, files)]
                # A session of its own: neither Ctrl-C nor the end of a terminal is meant for it.
                process = subprocess.Popen(program, pass_fds=files, stdin=subprocess.DEVNULL, start_new_session=True)
            undo.callback(process.wait)
            undo.callback(process.kill)
            near.settimeout(KEEPER_START_SECONDS)
            with contextlib.suppress(TimeoutError):
                if near.recv(1) == keeper.HERE:
                    near.settimeout(None)
                    undo.pop_all()
                    listening.close()  # it is the keeper's
                    return near, process
            raise HostError(f"the keeper at {self.address} did not come up")

    def _watch(self) -> None:
        # In its own thread: what keeps the event loop busy must not keep a keeper from being followed by another one.
        told = contextvars.copy_context()
        threading.Thread(target=told.run, args=(self._follow,), name="keeper", daemon=True).start()

    def _follow(self) -> None:
        """Wait for the keeper's end, again and again, and start another one."""
        replaced = -math.inf
        while (connection := self._connection) is not None:
            with contextlib.suppress(OSError):
                connection.recv(1)
            if not self._released:
                time.sleep(max(0.0, replaced + AGAIN_SECONDS - time.monotonic()))
            while not self._released and self._connection is connection:
                try:
                    self._replace(connection)
                except PostcopyError as error:
                    log.error("source: the guest's memory ends with this agent: %s; trying again", error)  # noqa: TRY400
                    time.sleep(AGAIN_SECONDS)
            replaced = time.monotonic()
            connection.close()
            if self._released:
                return


def read_head(file: int) -> tuple[int, int]:
    """Return where the record lies in its file, and its length."""
    head = os.pread(file, keeper.HEAD.size, 0)
    where, length = keeper.HEAD.unpack(head) if len(head) == keeper.HEAD.size else (0, 0)
    return where, length


def unlink(address: UnixAddress) -> None:
    """Take a socket's name away, where that can be."""
    with contextlib.suppress(OSError):
        Path(address.path).unlink()


def ended(connection: socket.socket) -> bool:
    """Whether the other end of a connection that carries nothing is closed."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def wake(pid: int) -> bool:
    """Have a process go on, whether it was stopped or is just about to be; whether it was."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
        os.kill(pid, signal.SIGCONT)
    except (OSError, IndexError):
        return False
    return state == "T"


def start_keeper(address: UnixAddress, mappings: Sequence[Mapping]) -> Kept:
    """Start a keeper for this memory; UsageError where the memory has no file, HostError where none comes up."""
    for mapping in mappings:
        if mapping.fd < 0:
            kind = mapping.region.type
            raise UsageError(f"region {mapping.region.index} ({kind}) has no file that could outlive this agent")
    files: list[int] = []
    try:
        files.append(os.memfd_create("postcopy-record"))
        files += (os.dup(mapping.fd) for mapping in mappings)
    except OSError as error:
        close_files(files)
        raise HostError(f"no keeper can be started: {error}") from error
    kept = Kept(address, files)
    try:
        kept.start()
    except BaseException:
        kept.release()
        raise
    return kept


def take_place(address: UnixAddress) -> tuple[Kept, Record, list[Mapping]]:
    """Take what a killed agent left with its keeper.

    NothingKeptError where no keeper is there; UsageError where its folder is not either, its agent lives, or what it
    has makes no sense; PostcopyError where it does not answer: it may be in want of memory, and may be asked again.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    files: list[int] = []
    try:
        connection.settimeout(KEEPER_ANSWER_SECONDS)
        files = ask_for_all(connection, address)
        connection.settimeout(None)
        record = read_record(files[0])
        mappings = mapped(record, files[1:])
    except (OSError, PostcopyError) as error:
        connection.close()
        close_files(files)
        raise refusal(error, address) from error
    kept = Kept(address, files)
    kept.adopt(connection)
    return kept, record, mappings


def ask_for_all(connection: socket.socket, address: UnixAddress) -> list[int]:
    """Return the files that the keeper there has, the caller's from now on.

    ConnectionResetError where it ended by itself while it was asked.
    """
    connection.connect(address.path)
    if wake(check_peer(connection)):
        log.warning("source: the keeper at %s was stopped: it goes on now", address)
    said, files, _ = receive_with_files(connection, keeper.LIVES.size, 1 + REGIONS_MAX)
    if files:
        return files
    if len(said) == keeper.LIVES.size:
        _, pid = keeper.LIVES.unpack(said)
        raise UsageError(f"its agent lives, process {pid}, and goes on itself; once that one has ended another can")
    raise UsageError("it closed the connection and said nothing: its agent lives, or this user is a stranger to it")


def refusal(error: OSError | PostcopyError, address: UnixAddress) -> PostcopyError:
    """Say why nothing is taken up there, and what to do."""
    text = f"no migration can be taken up at {address}"
    match error:
        case TimeoutError() | BlockingIOError():  # or it has not let in those who asked before
            return PostcopyError(f"{text} yet: its keeper does not answer")
        case ConnectionRefusedError() if Path(address.path).exists():  # where it ends by itself the name goes first
            return UsageError(f"{text}: its keeper was killed, and what it had went with it unless its agent lives")
        case FileNotFoundError() if not (folder := Path(address.path).parent).exists():
            return UsageError(f"{text}: there is no folder {folder}")
        case FileNotFoundError() | ConnectionRefusedError() | ConnectionResetError():
            return NothingKeptError(
                f"{text}: no keeper is there. Either its guest had not left when its agent ended, or all of it has "
                "arrived, or its keeper is at another path, or what was kept is gone with a restart of this host: "
                "`postcopy status` at the destination tells whether pages are missing there"
            )
        case _:
            return UsageError(f"{text}: {getattr(error, 'strerror', error)}")


def mapped(record: Record, files: Sequence[int]) -> list[Mapping]:
    """Map the memory that a record tells of; UsageError where the files are not so."""
    regions = [Region(index, *region) for index, region in enumerate(record.regions)]
    sizes = [os.fstat(file).st_size for file in files]
    if len(sizes) != len(regions) or any(size < one.size for size, one in zip(sizes, regions, strict=True)):
        raise UsageError("the files that are kept are not the memory that the record tells of")
    return [Mapping(region, os.dup(file), alias=False) for region, file in zip(regions, files, strict=True)]


def read_record(file: int) -> Record:
    """Return the record that a file holds; UsageError where it holds none."""
    where, length = read_head(file)
    if not 0 < length <= os.fstat(file).st_size:
        raise UsageError("what was kept cannot be read: it has no place in its file")
    return Record.unpack(os.pread(file, length, where))
