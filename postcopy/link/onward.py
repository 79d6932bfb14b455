"""The way on: a guest that came to a destination, and is whole there, leaves it for another one.

The interpreter of the migration that brought it enters; a Source leaves, which takes all along that its coming made.
"""

from __future__ import annotations

from postcopy.errors import UsageError
from postcopy.link.destination_interpreter import DestinationInterpreter
from postcopy.link.report import Report
from postcopy.link.source import Source
from postcopy.link.source_interpreter import SourceInterpreter
from postcopy.session.states import Owner, State


class Onward(Source):
    """The way out for a guest that came here; see Source. `arrival` goes on owning it until it has left."""

    def __init__(self, arrival: DestinationInterpreter, *, poll_max_ns: int, give_up_after: float | None) -> None:
        memory, guest = arrival.memory, arrival.guest
        if memory is None or guest is None:
            raise UsageError("there is no guest here")
        if arrival.finish is None:
            raise UsageError("the guest cannot go on: pages of it are not here yet")
        if arrival.finish.state is not State.COMPLETED:
            raise UsageError("the guest cannot go on: pages of it are lost")
        super().__init__(memory.mappings, guest, poll_max_ns=poll_max_ns, give_up_after=give_up_after)
        self._arrival = arrival

    @property
    def left(self) -> bool:
        """Whether the right to run the guest has gone elsewhere, or is lost."""
        return self.owner is not Owner.SOURCE

    async def _drive(self, current: SourceInterpreter) -> Report:
        try:
            return await super()._drive(current)
        finally:
            if self.state is State.COMPLETED:
                await self._arrival.end_guest()  # the guest and its memory are gone; what trapped it is not
