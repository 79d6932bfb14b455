"""What the owners of both halves of the pump, the source's and the destination's, have alike.

In: connections. Out: an event descriptor, a status.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self

from postcopy.pump._pump import ffi, lib
from postcopy.pump.status import PumpStatus, read_status
from postcopy.pump.tls import TlsSession, released

Role = Literal["urgent", "push"]
ROLES: dict[Role, int] = {"urgent": lib.ROLE_URGENT, "push": lib.ROLE_PUSH}


class Pump(ABC):
    """A pump in C, with a connection for each role. `_pump` is NULL once it is closed."""

    agent: ClassVar[str]
    other_agent: ClassVar[str]
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
