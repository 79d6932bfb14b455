"""A pump that is closed says so: its owners never hand C a pointer to nothing."""

import os

import pytest

from tests.child import run_in_child


def closed(side):
    from postcopy.kernel import Feature, Userfaultfd, memory_type
    from postcopy.pages.regions import Layout, Region
    from postcopy.pump.destination import DestinationPump
    from postcopy.pump.regions import Placement
    from postcopy.pump.source import SourcePump

    region = Region(0, "shmem", 4096, 8 * 4096)
    mapping = memory_type("shmem").allocate(region, alias=False)
    if side == "source":
        pump = SourcePump(Layout((region,)), [mapping], poll_max_ns=0)
    else:
        uffd = Userfaultfd.open(Feature.THREAD_ID)
        pump = DestinationPump(
            Layout((region,)),
            [mapping],
            uffd.fileno(),
            demand=[Placement.COPY],
            push=[Placement.COPY],
            zeropage=[True],
            poll_max_ns=0,
        )
    pump.close()
    pump.close()
    pump.stop()
    return pump


def use_closed(side):
    pump = closed(side)
    reader, writer = os.pipe()
    with pytest.raises(RuntimeError, match=f"the {side}'s pump is closed"):
        pump.attach("urgent", writer)
    assert os.read(reader, 1) == b""  # the descriptor was the pump's, and is closed
    uses = [pump.start, pump.status, pump.snapshot, lambda: pump.event_fd]
    if side == "source":
        uses += [pump.guest_stopped, pump.push_end, lambda: pump.push([]), lambda: pump.low_fd]
    else:
        uses += [lambda: pump.page_map(0)]
    for use in uses:
        with pytest.raises(RuntimeError, match="is closed"):
            use()
    return len(uses)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_closed_pump(side):
    assert run_in_child(use_closed, side) >= 5
