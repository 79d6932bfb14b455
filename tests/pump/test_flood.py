"""A destination that sends without end: the source's push thread does its work and stops all the same."""

from __future__ import annotations

import contextlib
import threading

from postcopy.wire.frame import FrameType, Header, pack
from tests.child import run_in_child
from tests.pump.source_stage import PAGE, Source


def flooded() -> bytes:
    source = Source(4, {1})
    beats = pack(Header(FrameType.BEAT, 0, 0, 0)) * 4096
    ended = threading.Event()

    def flood() -> None:
        with contextlib.suppress(OSError):
            while not ended.is_set():
                source.push.sendall(beats)

    threading.Thread(target=flood, daemon=True).start()
    source.order(1, 1)
    wanted = pack(Header(FrameType.PAGES, 0, PAGE, PAGE)) + source.content(1)
    got = b""
    while len(got) < len(wanted):
        got += source.push.recv(len(wanted) - len(got))
    assert got == wanted
    source.pump.stop()
    ended.set()
    source.close()
    return got[-1:]


def test_a_destination_that_never_ceases_to_send_does_not_keep_the_push_from_its_work() -> None:
    assert run_in_child(flooded) == b"\x02"
