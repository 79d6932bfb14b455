"""The ledger: every transition by its table, and what must hold whatever happens in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.pages import Action, Ledger, PageState

ABSENT, REQUESTED, PLACING, PLACED, ZERO, WATCHED, DROPPED, POISONED = PageState

# (state, call) -> (state after, what the call returns); what is not here is a ValueError.
TABLE = {
    (ABSENT, "fault"): (REQUESTED, Action.REQUEST),
    (REQUESTED, "fault"): (REQUESTED, Action.WAIT),
    (PLACING, "fault"): (WATCHED, Action.WAIT),
    (WATCHED, "fault"): (WATCHED, Action.WAIT),
    (PLACED, "fault"): (PLACED, Action.WAKE),
    (ZERO, "fault"): (PLACING, Action.PLACE_ZERO),
    (ABSENT, "claim"): (PLACING, True),
    (REQUESTED, "claim"): (WATCHED, True),
    (PLACING, "claim"): (PLACING, False),
    (WATCHED, "claim"): (WATCHED, False),
    (PLACED, "claim"): (PLACED, False),
    (ZERO, "claim"): (ZERO, False),
    (ABSENT, "zero"): (ZERO, True),
    (REQUESTED, "zero"): (WATCHED, True),
    (PLACING, "zero"): (PLACING, False),
    (WATCHED, "zero"): (WATCHED, False),
    (PLACED, "zero"): (PLACED, False),
    (ZERO, "zero"): (ZERO, False),
    (PLACING, "place"): (PLACED, False),
    (WATCHED, "place"): (PLACED, True),
    (DROPPED, "place"): (PLACED, True),
    (DROPPED, "fault"): (DROPPED, Action.WAIT),
    (DROPPED, "claim"): (DROPPED, False),
    (DROPPED, "zero"): (DROPPED, False),
    (DROPPED, "discard"): (DROPPED, False),
    (DROPPED, "drop"): (ZERO, None),
    (ABSENT, "discard"): (ZERO, True),
    (REQUESTED, "discard"): (ZERO, True),
    (PLACING, "discard"): (DROPPED, False),
    (WATCHED, "discard"): (DROPPED, False),
    (PLACED, "discard"): (PLACED, False),
    (ZERO, "discard"): (ZERO, False),
    (ABSENT, "poison"): (POISONED, True),
    (REQUESTED, "poison"): (POISONED, True),
    **{(state, "poison"): (state, False) for state in (PLACING, PLACED, ZERO, WATCHED, DROPPED, POISONED)},
    **{(POISONED, call): (POISONED, False) for call in ("claim", "zero", "discard")},
    (POISONED, "fault"): (POISONED, Action.POISON),
    (PLACING, "release"): (ABSENT, True),
    (WATCHED, "release"): (REQUESTED, True),
    (DROPPED, "release"): (DROPPED, False),
}
WAYS = {
    ABSENT: [],
    REQUESTED: ["fault"],
    PLACING: ["claim"],
    WATCHED: ["claim", "fault"],
    PLACED: ["claim", "place"],
    ZERO: ["zero"],
    DROPPED: ["claim", "discard"],
    POISONED: ["poison"],
}
CALLS = ["fault", "claim", "zero", "place", "discard", "drop", "release", "poison"]


OWNED = {PLACING, WATCHED, DROPPED}


@pytest.mark.parametrize("state", PageState)
@pytest.mark.parametrize("call", CALLS)
def test_every_transition(state: PageState, call: str) -> None:
    ledger = Ledger(3)
    for step in WAYS[state]:
        getattr(ledger, step)(1)
    assert ledger[1] is state
    if (state, call) in TABLE:
        after, result = TABLE[state, call]
        assert getattr(ledger, call)(1) is result
        assert ledger[1] is after
    else:
        mistake = rf"page 1 is ((plac|releas)ed without a claim|dropped and nobody asked for it): it is {state.name}"
        with pytest.raises(ValueError, match=mistake):
            getattr(ledger, call)(1)
        assert ledger[1] is state
    assert (ledger[0], ledger[2]) == (ABSENT, ABSENT), "the neighbours are untouched"


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(CALLS)), max_size=40))
def test_a_page_is_written_once_and_asked_for_once(calls: list[tuple[int, str]]) -> None:
    ledger = Ledger(3)
    claims = [0] * 3
    requests = [0] * 3
    for page, call in calls:
        before = ledger[page]
        if (call in {"place", "release"} and before not in OWNED) or (call == "drop" and before is not DROPPED):
            continue
        result = getattr(ledger, call)(page)
        requests[page] += result is Action.REQUEST
        claims[page] += before not in OWNED and ledger[page] in OWNED
        claims[page] -= call == "drop"  # what is zeros by that may be placed, as zeros
        claims[page] -= call == "release" and result  # what came in part may come again
        requests[page] -= call == "release" and ledger[page] is ABSENT and requests[page]
        assert not (before is PLACED and ledger[page] is not PLACED), "placed for ever"
        if call != "release":
            assert not (before is not ABSENT and ledger[page] is ABSENT), "nothing is forgotten"
    assert max(claims) <= 1
    assert max(requests) <= 1
    settled = [ledger[page] in {PLACED, ZERO} for page in range(3)]
    assert ledger.complete == all(settled)
    assert ledger.to_bytes() == bytes(ledger[page] for page in range(3))
    for state in PageState:
        assert ledger.count(state) == ledger.bitmap(state).count() == sum(ledger[page] is state for page in range(3))


def test_nobody_waits_for_ever() -> None:
    """A fault that was told to wait, or whose page is claimed for it, is followed by news when the page is placed."""
    for first in ("claim", "fault"):
        ledger = Ledger(1)
        getattr(ledger, first)(0)
        ledger.fault(0)
        if first == "fault":
            assert ledger.claim(0)
        assert ledger.place(0) is True


def test_pages_outside() -> None:
    ledger = Ledger(2)
    for page in (-1, 2):
        for call in CALLS:
            with pytest.raises(IndexError):
                getattr(ledger, call)(page)
    with pytest.raises(ValueError, match="0 pages"):
        Ledger(0)
