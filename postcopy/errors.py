"""The errors every room raises: what happened, to what, what to do, and who owns the guest now.

Each carries `exit_status`, which the command line returns as it is (see the README's table), and `owner`, the side
that may run the guest after it: "source", "destination", "lost", or None where no guest is involved yet.
"""

from __future__ import annotations

import errno as errno_names
import os
from typing import Literal

Owner = Literal["source", "destination", "lost"]


class PostcopyError(Exception):
    """Base of all errors of the toolkit; its text is one line written for a person."""

    exit_status = 1
    owner: Owner | None = None


class UsageError(PostcopyError):
    """What the user asked for makes no sense: a size that is no multiple of the page size, an unknown type."""

    exit_status = 2


class HostError(PostcopyError):
    """This host lacks something: permission for userfaultfd, a feature, huge pages."""

    exit_status = 3


class KernelError(PostcopyError):
    """A system call failed in a way that is no documented outcome of it.

    `operation` names the call (`UFFDIO_COPY`), `number` is the errno.
    """

    def __init__(self, operation: str, number: int, detail: str = "") -> None:
        name = errno_names.errorcode.get(number, str(number))
        super().__init__(f"{operation}: {os.strerror(number)} ({name}){': ' + detail if detail else ''}")
        self.operation = operation
        self.number = number


class ProtocolError(PostcopyError):
    """The other agent broke the protocol; that connection is closed, nothing else is touched."""

    exit_status = 4


class LinkError(PostcopyError):
    """A connection could not be made or was lost before the switchover: the source still runs the guest."""

    exit_status = 4
    owner: Owner | None = "source"


class MigrationFailed(PostcopyError):  # noqa: N818 - an outcome, named as QEMU names the state
    """The migration failed before the switchover: the source runs the guest as if nothing had been."""

    exit_status = 4
    owner: Owner | None = "source"


class MigrationLost(PostcopyError):  # noqa: N818 - an outcome, never retried silently
    """The migration broke after the switchover: pages that were still at the source are gone."""

    exit_status = 6
    owner: Owner | None = "lost"


class MigrationPaused(PostcopyError):  # noqa: N818 - a state, named as QEMU names it
    """The connections ended after the switchover: the guest runs at the destination, and the migration can go on."""

    exit_status = 5
    owner: Owner | None = "destination"


class MigrationCancelled(PostcopyError):  # noqa: N818 - an outcome
    """The migration was cancelled or timed out before the switchover: the source runs the guest."""

    exit_status = 7
    owner: Owner | None = "source"
