"""Descriptors that outlive this agent, with whoever starts it again: systemd's descriptor store (sd_notify(3)).

What is to be kept enters, under a name each; what a former agent left there leaves, once, at the start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

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

    def keep(self, name: str, descriptors: Sequence[int]) -> None:
        """Have descriptors kept under a name, all or none, also once they end, until forget()."""
        try:
            notify.send(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}\n", descriptors)
        except OSError as error:
            log.warning("destination: a process is not kept, it ends with this agent: %s", error.strerror)

    def forget(self, name: str) -> None:
        """Have them closed."""
        notify.tell(f"FDSTOREREMOVE=1\nFDNAME={name}\n")


def left_behind() -> dict[str, list[int]]:
    """Return what came with the start of this process, by name; a second time nothing is left."""
    said = {name: os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES")}
    if said["PID"] != str(os.getpid()) or not said["FDS"].isdigit():
        return {}
    names = said["FDNAMES"].split(":")
    found: dict[str, list[int]] = {}
    for number in range(int(said["FDS"])):
        os.set_inheritable(FIRST + number, False)
        found.setdefault(names[number] if number < len(names) else "unknown", []).append(FIRST + number)
    return found


def close(named: Mapping[str, Sequence[int]]) -> None:
    """Close what nobody here has a use for."""
    for name, descriptors in named.items():
        log.warning("destination: closed what came with the start as %r, and is nothing of this agent's", name)
        for one in descriptors:
            os.close(one)
