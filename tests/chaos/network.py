"""Two hosts, as far as one machine can have them: two network namespaces joined by a veth pair."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess

from tests.lacking import lacking

_COUNT = itertools.count()


def ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Network:
    """Namespaces `names` with `addresses`; `inside` is how a command is run in each."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self, names):
        self.names = names
        self.inside = [("ip", "netns", "exec", name) for name in names]

    def link(self, way):
        """Set the link between them up or down."""
        ip("-n", self.names[0], "link", "set", "veth0", way)


@contextlib.contextmanager
def two_hosts():
    """Make a network, and take it away at the end."""
    number = next(_COUNT)
    names = [f"pc{os.getpid()}{side}{number}" for side in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("-n", names[0], "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", names[1])
            for name, address in zip(names, Network.addresses, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
                ip("-n", name, "link", "set", "veth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except OSError as refused:
            lacking(f"network namespaces: {refused}")
        yield Network(names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
