"""What the owners of both halves of the pump, the source's and the destination's, have alike.

In: connections. Out: an event descriptor, a status, a map of memory.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self

from postcopy.limits import PIECE_PAGES_MAX
from postcopy.pages.regions import Layout
from postcopy.pump._pump import ffi, lib
from postcopy.pump.status import PumpStatus, read_status
from postcopy.pump.tls import TlsSession, released

Role = Literal["urgent", "push"]
ROLES: dict[Role, int] = {"urgent": lib.ROLE_URGENT, "push": lib.ROLE_PUSH}


class Pump(ABC):
    """A pump in C, with a connection for each role. `_pump` is NULL once it is closed.

    `resident` are the states in its page maps of a page that counts for the destination's.
    """

    agent: ClassVar[str]
    other_agent: ClassVar[str]
    resident: ClassVar[tuple[int, ...]]
    _layout: Layout
    _pump: Any

    @property
    def _handle(self) -> Any:
        """The pump in C; RuntimeError once it is closed: C would follow the pointer wherever it leads."""
        if self._pump == ffi.NULL:
            raise RuntimeError(f"the {self.agent}'s pump is closed")
        return self._pump

    @property
    @abstractmethod
    def _half(self) -> Any:
        """What it has of a pump of either kind; RuntimeError once it is closed."""

    def attach(self, role: Role, socket_fd: int, tls: TlsSession | None = None) -> None:
        """Hand over the connected socket of a role, with the TLS session on it where there is one.

        Both belong to the pump from here on, whatever happens.
        """
        if self._pump == ffi.NULL:
            if tls is not None:
                tls.close()
            os.close(socket_fd)
        result = lib.half_attach(self._half, ROLES[role], socket_fd, released(tls))
        if result:
            raise ValueError(f"{role}: {os.strerror(-result)}")

    def watch(self) -> None:
        """Take silence on a connection for its end, from now on."""
        lib.half_watch(self._half)

    @property
    def event_fd(self) -> int:
        """Readable (an eventfd) once all is done, a connection broke or the pump failed: see `status()`."""
        return int(lib.half_event_fd(self._half))

    def status(self) -> PumpStatus:
        """Return the state and, where it failed, why."""
        return read_status(lib.half_status(self._half), lib.half_broken(self._half), self.other_agent)

    @abstractmethod
    def _map(self, region: int) -> Any:
        """Return the page map of a region in C; RuntimeError once it is closed."""

    def page_map(self, region: int) -> memoryview:
        """Return the read-only page states of a region, one byte a page; valid until close()."""
        pages = self._layout.region(region).pages
        return memoryview(ffi.buffer(self._map(region), pages)).toreadonly()

    def residency(self, cells: int) -> list[float]:
        """Return which part of each of `cells` equal pieces of memory is resident, 0 to 1, all regions in a row.

        As far as this side knows: to the source, that is what has left it. Of a piece of very many pages some are
        looked at, evenly spread.
        """
        total = self._layout.size
        return [self._resident_part(total * cell // cells, total * (cell + 1) // cells) for cell in range(cells)]

    def _resident_part(self, begin: int, end: int) -> float:
        seen = resident = 0
        start = 0
        for index, region in enumerate(self._layout.regions):
            first = max(begin - start, 0) // region.page_size
            last = -(-min(end - start, region.size) // region.page_size)
            start += region.size
            if first < last:
                step = -(-(last - first) // PIECE_PAGES_MAX)
                states = bytes(self.page_map(index)[first:last:step])
                seen += len(states)
                resident += sum(states.count(state) for state in self.resident)
        return resident / seen if seen else 0.0

    @property
    def _cpu_seconds(self) -> float:
        return int(lib.half_cpu_ns(self._half)) / 1e9

    @abstractmethod
    def close(self) -> None:
        """Stop, close the connections, free the memory. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
