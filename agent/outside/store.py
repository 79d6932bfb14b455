"""Descriptors that outlive this agent, with whoever starts it again: systemd's descriptor store (sd_notify(3)).

What is to be kept enters, under a name each; what a former agent left there leaves, once, at the start.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping

from agent import notify
from postcopy.errors import UsageError

log = logging.getLogger("postcopy.agent")

# Where the descriptors begin that systemd passes (sd_listen_fds(3)).
FIRST = 3


class Store:
    """The descriptor store of the unit that this agent is; UsageError where it is nobody's unit."""

    def __init__(self) -> None:
        if not os.environ.get("NOTIFY_SOCKET"):
            raise UsageError(
                "--keep: nobody is here to keep descriptors: run the agent as a unit of systemd, with "
                "FileDescriptorStoreMax="
            )

    def keep(self, named: Mapping[str, int]) -> None:
        """Have descriptors kept under these names, also once they end: this agent says when they are not needed."""
        for name, descriptor in named.items():
            try:
                notify.send(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}\n", [descriptor])
            except OSError as error:
                log.warning("destination: %s is not kept, and ends with this agent: %s", name, error.strerror)

    def forget(self, names: Mapping[str, int]) -> None:
        """Have them closed."""
        for name in names:
            notify.tell(f"FDSTOREREMOVE=1\nFDNAME={name}\n")


def left_behind() -> dict[str, int]:
    """Return what came with the start of this process, by name; a second time nothing is left."""
    said = {name: os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES")}
    if said["PID"] != str(os.getpid()) or not said["FDS"].isdigit():
        return {}
    found = dict(zip(said["FDNAMES"].split(":"), range(FIRST, FIRST + int(said["FDS"])), strict=False))
    for descriptor in found.values():
        os.set_inheritable(descriptor, False)
    return found


def close(named: Mapping[str, int]) -> None:
    """Close what nobody here has a use for."""
    for name, descriptor in named.items():
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        log.warning("destination: closed %s (a file of type %#o), which is nothing of this agent's", name, kind)
        os.close(descriptor)
