"""Two destinations between which a guest goes to and fro, each on a host of its own, with a proxy before either.

A kind of guest and a folder enter; daemons that live for as long as the guest does leave. What is true of them between
two migrations is looked at here: one owner, every byte right, no more descriptors than before.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from agent.admin import admin_address, ask
from postcopy.errors import PostcopyError
from postcopy.link.tls import Credentials
from tests.agent.agents import Daemon
from tests.certificates import directory

from .network import two_hosts
from .proxy import Proxy, upstream_of

SETTLE_SECONDS = 30
# A guest that did not get away keeps its keeper for the next time: record, connection, and the memory's file again.
KEEPER_FILES = 3


@dataclass(frozen=True)
class Kind:
    """What goes to and fro: its memory, how it is placed, whether it is encrypted, and what runs on it.

    `steps` are all that each vCPU ever makes, None: no end of them. `mortal`: its agents may be killed, and its memory
    is with a keeper while it is on its way.
    """

    name: str
    memory: str = "shmem"
    mode: str = "auto"
    size: str = "4MiB"
    tls: bool = False
    guest: str = "emulated"
    workload: str = "zipf"
    steps: int | None = None
    mortal: bool = False


class Migration(threading.Thread):
    """A `migrate` command as a thread: `status` is the exit status it would have, `report` what it brought."""

    def __init__(self, agent, to, **arguments):
        super().__init__(daemon=True)
        self._agent, self._arguments = agent, {"to": to, **arguments}
        self.status, self.report, self.error = None, None, None
        self.start()

    def run(self):
        try:
            self.report = asyncio.run(ask(admin_address(self._agent.admin), "migrate", self._arguments))
            self.status = 0
        except PostcopyError as error:
            self.error, self.status = error, error.exit_status

    def result(self, seconds=60):
        self.join(seconds)
        assert self.status is not None, f"no end after {seconds} s: {self._agent.status()}\n{self._agent.log}"
        return self.status


class Pair:
    """The guest is at `agents[here]`; `proxies[i]` is where agent i dials the other one. Numbers are of hosts.

    Without a network both are on this one. Proxies that watch know the messages, where nothing is encrypted.
    """

    def __init__(self, folder, kind, network=None, *, watches=False):
        self._folders = (Path(folder) / str(number) for number in itertools.count())
        self.kind, self.network, self._watches = kind, network, watches
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        self.folder = next(self._folders)
        self.folder.mkdir()
        self.agents, self.proxies = [], []
        self.here = 0
        self._files = {}
        try:
            self._start()
            self._bear()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_):
        self._stack.close()

    def renew(self):
        """Begin with other agents and another guest: one of these was killed."""
        self._stack.close()
        self.__enter__()

    def _start(self):
        network = self.network
        addresses = network.addresses if network is not None else ("127.0.0.1",) * 2
        for number, name in enumerate("ab"):
            folder = self.folder / name
            folder.mkdir()
            how = ("--insecure",)
            if self.kind.tls:
                how = ("--tls-dir", directory(self.folder / f"{name}-tls", (name, "127.0.0.1", *addresses)))
            if self.kind.mortal:
                how += ("--keeper", self.keeper(number))
            arguments = ("--listen", f"tcp:{addresses[number]}:0", "--mode", self.kind.mode, *how)
            self._stack.callback(end_keeper, self.keeper(number))
            there = Daemon(folder, "destination", *arguments, inside=self._inside(number))
            self.agents.append(self._stack.enter_context(there))
        for number in range(2):
            namespace = network.names[number] if network is not None else None
            upstream = upstream_of(self.agents[1 - number].address)
            opens = None
            if self._watches and self.kind.tls:  # as the one who is dialled says who he is
                opens = Credentials(self.folder / f"{'ab'[1 - number]}-tls")
            proxy = Proxy(upstream, namespace=namespace, watches=self._watches, opens=opens)
            self.proxies.append(self._stack.enter_context(proxy))

    def keeper(self, number):
        """Return where the memory of the guest that leaves agent `number` is kept."""
        return f"unix:{self.folder}/{'ab'[number]}/keeper.sock"

    def another_source(self):
        """Start an agent in the place of the one that was to send the guest away; it may have no reason to stay."""
        folder = self.folder / "again"
        folder.mkdir()
        how = ("--tls-dir", self.folder / f"{'ab'[self.here]}-tls") if self.kind.tls else ()
        return Daemon(folder, "source", "--resume", self.keeper(self.here), *how, inside=self._inside(self.here))

    def _inside(self, number):
        return self.network.inside[number] if self.network is not None else ()

    def _bear(self):
        """Make a guest, and have it come to the first agent."""
        kind, how = self.kind, {"insecure": True}
        if kind.tls:
            how = {"tls_dir": str(self.folder / "b-tls")}
        arguments = ("--memory", kind.memory, "--size", kind.size, "--guest", kind.guest, "--workload", kind.workload)
        paced = ("--steps-per-second", "2000") if kind.guest == "emulated" else ()
        paced += ("--steps", kind.steps) if kind.steps is not None else ()
        with Daemon(self.folder, "source", *arguments, *paced, inside=self._inside(1)) as home:
            migration = Migration(home, self.agents[0].address, **how)
            assert migration.result() == 0, migration.error
            self.agents[0].until(whole)
            home.signal(signal.SIGTERM)
            assert home.wait() == 0, home.log

    # --- a migration to the other host ----------------------------------------------------------------------------

    @property
    def leaving(self):
        return self.agents[self.here]

    @property
    def coming(self):
        return self.agents[1 - self.here]

    @property
    def proxy(self):
        return self.proxies[self.here]

    def migrate(self, **arguments):
        """Begin to move the guest to the other host, through the proxy on its way."""
        how = {} if self.kind.tls else {"insecure": True}
        return Migration(self.leaving, self.proxy.address, **how, **arguments)

    def never_both(self):
        """See that the guest does not run at both: asked of where it goes to first, for the right goes that way."""
        there = self.coming.status()
        here = self.leaving.status()
        both = there["guest"] is not None and here["guest"] is not None
        assert not both, (here, there)
        return here, there

    def settle(self, status):
        """After a migration that ended so: see that one agent has the guest, that it runs, and that it is right."""
        assert status in {0, 4, 7}, status
        if status == 0:
            self.coming.until(whole, SETTLE_SECONDS)
            self.here = 1 - self.here
        else:
            self.coming.until(empty, SETTLE_SECONDS)
        here, there = self.leaving.status(), self.coming.status()
        assert (here["guest"] is not None, there["guest"]) == (True, None), (here, there)
        found = self.leaving.ask("check")
        assert found["pages_mismatched"] == 0, found
        if self.kind.steps is None:
            self._runs_on(here["guest"]["steps"])
        for agent in self.agents:
            assert "Traceback" not in agent.log, agent.log
            self._no_more_files(agent)

    def _runs_on(self, steps):
        """See that every vCPU makes more steps than these."""
        self.leaving.until(lambda now: all(b > a for a, b in zip(steps, now["guest"]["steps"], strict=True)))

    def _no_more_files(self, agent):
        """See that it has as many descriptors as after the first rounds; what is being closed has a moment."""
        known = self._files.setdefault((agent, agent is self.leaving), [])
        end = time.monotonic() + SETTLE_SECONDS
        while True:
            now = files_of(agent)
            if len(known) < 2:  # what is opened once and kept
                time.sleep(0.2)
                known.append(files_of(agent))
                return
            if now <= max(known) + (KEEPER_FILES if self.kind.mortal else 0):
                return
            assert time.monotonic() < end, f"{now} descriptors, {max(known)} before: {names_of(agent)}"
            time.sleep(0.01)


def end_keeper(address):
    """End the keeper there, if there is one: without its agent it would stay for whoever comes to resume."""
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
        connection.connect(address.removeprefix("unix:"))
        pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        os.kill(pid, signal.SIGKILL)


def empty(now):
    """Whether no guest is there, nor on its way: none came, or one that had come has gone on."""
    left = now["role"] == "source" and now["state"] == "completed"
    return left or (now["owner"] is None and now["state"] in {"none", "failed", "cancelled"})


def whole(now):
    """Whether a guest came, and all of it."""
    return now["role"] == "destination" and now["state"] == "completed" and now["ended"] is not None


def files_of(agent):
    return len(names_of(agent))


def names_of(agent):
    """Return what each descriptor of an agent is."""
    found = []
    for file in Path(f"/proc/{agent.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(file.readlink()))
    return sorted(found)


def memory_of(agent):
    """Return the bytes of an agent's own memory: neither files nor what it shares."""
    text = Path(f"/proc/{agent.process.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in text.splitlines())
    return int(fields["RssAnon"].split()[0]) << 10


@contextlib.contextmanager
def pair(folder, kind):
    """Two hosts, and a guest that lives on them."""
    with two_hosts() as network, Pair(folder, kind, network) as both:
        yield both
