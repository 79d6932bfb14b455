"""What is said where a wish for all migrations comes to nothing."""

import asyncio
from types import SimpleNamespace

import pytest

from agent import pausing
from postcopy.errors import HostError
from postcopy.session.states import State


@pytest.mark.parametrize(("wish", "said"), [(pausing.paused, "not paused"), (pausing.lost, "not given up")])
def test_a_wish_that_takes_too_long_is_one_line(wish, said, monkeypatch):
    monkeypatch.setattr(pausing, "DONE_SECONDS", 0.05)
    with pytest.raises(HostError, match=said):
        asyncio.run(wish(SimpleNamespace(state=State.POSTCOPY_ACTIVE, pause_state=None)))
