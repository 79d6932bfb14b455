"""Whose turn it is to get a process, where more sources have made an offer than processes wait.

Offers enter in the order in which they come, and which of them came to nothing; the one that is next leaves. Up to Run
anybody may be a stranger who holds the process for as long as he can. So whoever comes from where an offer came to
nothing gives way to all who come from elsewhere, and among such the one whose last is longest ago is the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import count

from postcopy.limits import ORIGINS_MAX
from postcopy.link.control import ControlChannel


class Turns:
    """The sources that wait for a process, and from where offers came to nothing: ORIGINS_MAX networks at the most."""

    def __init__(self) -> None:
        self._asking: list[ControlChannel] = []
        self._failures = count(1)
        self._failed: dict[str, int] = {}  # the number of each origin's last failure, the oldest first

    @contextlib.contextmanager
    def asked(self, channel: ControlChannel) -> Iterator[None]:
        """Let a source wait for its turn for as long as the block takes."""
        self._asking.append(channel)
        try:
            yield
        finally:
            self._asking.remove(channel)

    def came_to_nothing(self, origin: str) -> None:
        """Remember from where an offer came that never led to Run."""
        self._failed.pop(origin, None)
        self._failed[origin] = next(self._failures)
        if len(self._failed) > ORIGINS_MAX:
            del self._failed[next(iter(self._failed))]

    def is_next(self, channel: ControlChannel) -> bool:
        """Whether no other source that waits goes before this one."""
        return min(self._asking, key=lambda one: self._failed.get(one.origin, 0)) is channel
