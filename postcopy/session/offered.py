"""The destination of memory that waits for any source that dials: whoever makes an offer has so long until Run.

Anybody who is let in may make a fitting offer, and then say nothing, or each word at the last moment. So there is one
limit for the whole way to Run, and an end to it also where Run may be on its way: who is not heard within that is left.
Had Run crossed it, its source comes back, hears that it never came here, and takes the guest back.
"""

from __future__ import annotations

from typing import ClassVar

from postcopy.limits import HEARD_OUT_SECONDS, OFFERED_SECONDS
from postcopy.session import destination_actions as actions
from postcopy.session.commands import Command
from postcopy.session.destination import DestinationMachine
from postcopy.session.destination_steps import Step
from postcopy.session.events import Event

_OFFERED = frozenset({Step.PREPARING, Step.WAITING, Step.ATTACHED, Step.LOADING, Step.LOADED})


class OfferedMachine(DestinationMachine):
    """One migration of a process that waited for its source."""

    table: ClassVar = {}
    offered_seconds, heard_out_seconds = OFFERED_SECONDS, HEARD_OUT_SECONDS
    run_by = 0.0  # when the source is asked to cancel, or refused
    asked = False  # and that was said when Run might have been on its way

    def key(self, event: Event) -> str:
        """Tell the end of the patience with a source that was asked to cancel."""
        name = super().key(event)
        return "HeardOut" if name == "Elapsed" and self.asked and self.step is Step.LOADED else name

    def _deadline(self, now: float, entered: bool) -> float | None:
        deadline = super()._deadline(now, entered)
        if entered and self.step is Step.PREPARING:
            self.run_by = now + self.offered_seconds
        if self.step not in _OFFERED:
            return deadline
        if self.asked and self.step is Step.LOADED:
            return now + self.heard_out_seconds if deadline is None else deadline
        return self.run_by if deadline is None else min(deadline, self.run_by)


def _ask_to_cancel(machine: OfferedMachine, event: Event) -> list[Command]:
    machine.asked = True
    return actions.ask_to_cancel(machine, event)


OfferedMachine.table = {
    **DestinationMachine.table,
    (Step.LOADED, "Elapsed"): (Step.LOADED, _ask_to_cancel),
    (Step.LOADED, "HeardOut"): (Step.FAILED, actions.fail),
}
