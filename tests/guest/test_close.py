"""Closing a guest while others look at it or use it: they are refused or waited for, never left with freed memory."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from postcopy.guest import Guest, GuestStuckError, emulated, vcpus
from postcopy.guest._guest import lib
from tests.guest.memory import Memory
from tests.guest.test_state import until

SECONDS = 10.0


class Calls:
    """The calls into C, one of them watched."""

    def __init__(self, **watched: Any) -> None:
        self.__dict__.update(watched)

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)


def test_readings_are_refused_before_anything_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    def destroy(handle: Any, deadline_ns: int) -> int:
        for reading in (guest.steps, lambda: guest.accesses, lambda: guest.first_step_at):
            with pytest.raises(RuntimeError, match="the guest is closed"):
                reading()
            refused.append(reading)
        assert guest.stall.count == 0  # which alone is told on, as it was
        return int(lib.guest_destroy(handle, deadline_ns))

    with Memory(16) as memory, Guest([memory]) as guest:
        monkeypatch.setattr(vcpus, "lib", Calls(guest_destroy=destroy))
        guest.close()
        assert len(refused) == 3
        guest.close()
        assert len(refused) == 3


def test_closing_waits_for_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    checking, go_on = threading.Event(), threading.Event()
    order = []
    really = emulated.check_memory

    def check(*arguments: Any) -> Any:
        checking.set()
        assert go_on.wait(SECONDS)
        result = really(*arguments)
        order.append("checked")
        return result

    def destroy(handle: Any, deadline_ns: int) -> int:
        order.append("destroyed")
        return int(lib.guest_destroy(handle, deadline_ns))

    monkeypatch.setattr(emulated, "check_memory", check)
    monkeypatch.setattr(vcpus, "lib", Calls(guest_destroy=destroy))
    with Memory(16) as memory:
        guest = Guest([memory])
        guest.fill()
        threads = [threading.Thread(target=guest.check)]
        threads[0].start()
        assert checking.wait(SECONDS)
        with pytest.raises(GuestStuckError, match="another thread was not done"):
            guest.close(deadline=0.01)
        assert guest.steps() == [0, 0]  # still there
        threads.append(threading.Thread(target=guest.close))
        threads[1].start()
        go_on.set()
        until(lambda: order == ["checked", "destroyed"])
        for thread in threads:
            thread.join(SECONDS)
        with pytest.raises(RuntimeError, match="the guest is closed"):
            guest.check()
