"""Clients as processes, snapshots as files, and the daemons between them: what the tests of this folder are made of."""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
from pathlib import Path

from tests.agent.agents import Daemon

CLIENT = Path(__file__).with_name("client.py")
DEADLINE = 30
PAGE = 4096
MIB = 1 << 20


class Vmm:
    """One client process. Calls are its commands; each has a deadline, for it may hang in a fault."""

    def __init__(self, socket, mappings=((8 * MIB, 0),), **config):
        config |= {"socket": str(socket).removeprefix("unix:"), "mappings": mappings}
        config = {key: str(value) if isinstance(value, Path) else value for key, value in config.items()}
        self.process = subprocess.Popen(
            [sys.executable, str(CLIENT), json.dumps(config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid, *self.addresses = self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def ask(self, name, *arguments):
        self.process.stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, deadline=DEADLINE):
        assert select.select([self.process.stdout], [], [], deadline)[0], "the client waits"
        line = self.process.stdout.readline()
        assert line, f"the client ended: {self.process.wait(5)}"
        return json.loads(line)

    def call(self, name, *arguments):
        self.ask(name, *arguments)
        return self.answer()

    def ends_with(self):
        """Wait for its end; return how it ended, below 0 a signal."""
        return self.process.wait(DEADLINE)


def snapshot(folder, size=8 * MIB, hole=(2 * MIB, 3 * MIB), zeros=(3 * MIB, 4 * MIB)):
    """Write a memory file: random bytes, no two pages alike, but for a hole and for zeros that are written."""
    path = folder / "memory.snap"
    chance = random.Random(size)
    content = b"".join(chance.randbytes(MIB) for _ in range(size // MIB))
    with path.open("wb") as file:
        file.truncate(size)
        for start, stop in ((0, hole[0]), (hole[1], size)):
            os.pwrite(file.fileno(), content[start:stop], start)
        os.pwrite(file.fileno(), bytes(zeros[1] - zeros[0]), zeros[0])
    return path


def source(folder, path, *arguments, **options):
    return Daemon(folder, "source", "--memory", f"file:{path}", *arguments, **options)


def destination(folder, *arguments, **options):
    return Daemon(folder, "destination", "--handover", f"unix:{folder}/uffd.sock", *arguments, **options)


def let_go(daemon):
    """Wait until a daemon holds nothing of anybody any more: it is closed a little later than it is told of."""
    daemon.until(lambda _now: foreign_descriptors(daemon) == 0)


def foreign_descriptors(daemon):
    """Count the descriptors of a daemon that came from outside, or are kept for whoever came."""
    folder = Path(f"/proc/{daemon.process.pid}/fd")
    links = []
    for entry in folder.iterdir():
        try:
            links.append(str(entry.readlink()))
        except OSError:
            continue
    return sum("userfaultfd" in link or "memfd:guest" in link or "pidfd" in link for link in links)
