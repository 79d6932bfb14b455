"""What is said where a wish for all migrations comes to nothing."""

import asyncio
from types import SimpleNamespace

import pytest

from agent import pausing
from postcopy.errors import HostError, UsageError
from postcopy.guest.outside.session import OutsideInterpreter
from postcopy.link.address import parse_address
from postcopy.link.endpoint import Endpoint
from postcopy.link.source_interpreter import SourceInterpreter
from postcopy.session.states import State
from tests.session.samples import OFFER


@pytest.mark.parametrize(("wish", "said"), [(pausing.paused, "not paused"), (pausing.lost, "not given up")])
def test_a_wish_that_takes_too_long_is_one_line(wish, said, monkeypatch):
    monkeypatch.setattr(pausing, "DONE_SECONDS", 0.05)
    with pytest.raises(HostError, match=said):
        asyncio.run(wish(SimpleNamespace(state=State.POSTCOPY_ACTIVE, pause_state=None)))


@pytest.mark.parametrize("fetches", [True, False])
def test_who_took_over_an_encrypted_migration_dials_elsewhere_encrypted_before_it_has_dialled_at_all(fetches):
    there, elsewhere = parse_address("tcp:192.0.2.1:7"), "tcp:192.0.2.2:7"

    def taken_up(tls):
        if fetches:
            handed = SimpleNamespace(memory_fd=-1, process="process 1")
            return OutsideInterpreter(SimpleNamespace(), handed, endpoint=Endpoint(there), poll_max_ns=0, tls=tls)
        known = (SimpleNamespace(), Endpoint(there), OFFER.layout(), [], None)
        return SourceInterpreter(*known, poll_max_ns=0, rate=None, tls=tls)

    assert pausing.another_address(taken_up(object()), {"to": elsewhere}) == parse_address(elsewhere)
    with pytest.raises(UsageError, match="tls-dir"):
        pausing.another_address(taken_up(None), {"to": elsewhere})
