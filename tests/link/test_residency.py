"""What a source says of where its memory is, in every state of a migration; its pump's own account: tests/pump."""

from types import SimpleNamespace

import pytest

from postcopy.link.address import parse_address
from postcopy.link.endpoint import Endpoint
from postcopy.link.source_interpreter import SourceInterpreter
from postcopy.session.source import SourceMachine
from postcopy.session.source_steps import STATES
from postcopy.session.states import OWNERS, Owner, State
from postcopy.wire.control import Hello
from tests.session.samples import HANDED_OVER, OFFER

HALF, NOTHING, ALL, UNKNOWN = [0.5, 0.5], [0.0, 0.0], [1.0, 1.0], []
SWITCHED = {
    State.POSTCOPY_ACTIVE: (HALF, ALL),
    State.POSTCOPY_PAUSED: (UNKNOWN, ALL),
    State.POSTCOPY_RECOVER: (HALF, ALL),
    State.COMPLETED: (ALL, ALL),
    State.LOST: (UNKNOWN, UNKNOWN),
}


@pytest.mark.parametrize("step", STATES, ids=str)
def test_nothing_has_left_before_the_switchover_and_all_of_what_was_handed_over_after_it(step):
    sent, handed_over = SWITCHED.get(STATES[step], (NOTHING, NOTHING))
    assert (STATES[step] in SWITCHED) == (OWNERS[STATES[step]] is not Owner.SOURCE)
    for offer, expected in ((OFFER, sent), (HANDED_OVER, handed_over)):
        machine = SourceMachine(Hello((2, 3), "test"), offer)
        machine.step = step
        endpoint = Endpoint(parse_address("tcp:192.0.2.1:7"))
        interpreter = SourceInterpreter(machine, endpoint, offer.layout(), [], None, poll_max_ns=0, rate=None)
        without = UNKNOWN if expected is HALF else expected  # between two pumps
        assert interpreter.residency(2) == without
        interpreter._pump = SimpleNamespace(residency=lambda cells: [0.5] * cells)
        assert interpreter.residency(2) == expected
