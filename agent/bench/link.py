"""A link of a known rate: two network namespaces, a veth pair between them, a token bucket at each end.

Nothing enters; while the block lasts, the names and addresses of both ends are there. Names carry the process id, so
benches do not meet, and what a killed bench left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from postcopy.errors import HostError

RATE_BITS = 1_000_000_000
RATE_BYTES = RATE_BITS / 8
# A bucket has to hold the largest packet of the stack (64 KiB and its headers), or it cuts it up.
BURST_BYTES = 128 * 1024
# What the link's own queue holds: 8 ms at this rate. A deeper one would flatter whoever keeps it short.
QUEUE_BYTES = 1_000_000

_PREFIX = "pcbench"
_NAMESPACES = Path("/run/netns")
_NETWORK = "10.199.77"  # lives in the two namespaces only, so it collides with nobody's


@dataclass(frozen=True, slots=True)
class Link:
    """Names of the namespaces at both ends and the IPv4 address of the destination's."""

    source: str
    destination: str
    host: str

    @staticmethod
    def path(namespace: str) -> str:
        """Return the file that setns(2) takes for a namespace."""
        return str(_NAMESPACES / namespace)


@contextmanager
def link() -> Iterator[Link]:
    """Make the link and take it away again, whatever happens in between; HostError where it cannot be made."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise HostError(f"the link scenario needs the command {tool} (package iproute2)")
    remove_left_behind()
    name = f"{_PREFIX}{os.getpid()}"
    made = Link(f"{name}s", f"{name}d", f"{_NETWORK}.2")
    with ExitStack() as undo:
        for namespace in (made.source, made.destination):
            _run("ip", "netns", "add", namespace)
            undo.callback(_remove, namespace)
        # Made inside a namespace, the pair is never seen outside, and goes with it.
        _run("ip", "-n", made.source, "link", "add", "s0", "type", "veth", "peer", "name", "d0")
        _run("ip", "-n", made.source, "link", "set", "d0", "netns", made.destination)
        for namespace, device, address in ((made.source, "s0", f"{_NETWORK}.1"), (made.destination, "d0", made.host)):
            _run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", device)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
            _run("ip", "-n", namespace, "link", "set", device, "up")
            shape = ["rate", f"{RATE_BITS}bit", "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES)]
            _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *shape)
        yield made


def remove_left_behind() -> None:
    """Remove the namespaces of benches whose process is gone."""
    for path in _NAMESPACES.glob(f"{_PREFIX}*[sd]"):
        number = path.name.removeprefix(_PREFIX)[:-1]
        if number.isdigit() and not Path(f"/proc/{number}").exists():
            _remove(path.name)


def _remove(namespace: str) -> None:
    with contextlib.suppress(HostError):
        _run("ip", "netns", "delete", namespace)


def _run(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    if ended.returncode:
        raise HostError(f"{' '.join(command)}: {ended.stderr.strip() or ended.returncode}")
