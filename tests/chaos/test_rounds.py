"""200 rounds of random trouble between real daemons on two hosts, and a ring: nothing lost, nothing left behind."""

import sys

import pytest

from .pair import memory_of, pair
from .rounds import HUGE_PAGES, KINDS, Rounds, ring

ROUNDS = 200
RING = 100
# What an agent may have more of its own after the ring. It remembers 16 migrations for sources that come back, which
# are there before it is measured. Its heap takes some hundreds of migrations to settle (see the README), up to 0.35 MiB
# in a hundred; the buffers of one pump, each of 2 MiB, would be more than this if they stayed behind.
GROWTH_BYTES = 1 << 20


@pytest.mark.timeout(300)
def test_rounds(tmp_path, huge_pages, capsys):
    huge_pages("hugetlb-2M", HUGE_PAGES)
    playing = Rounds(tmp_path)
    playing.play(range(ROUNDS))
    assert sum(playing.outcomes.values()) == ROUNDS
    killed = [outcome for outcome in playing.outcomes if "killed" in outcome]
    assert killed, "none of them killed an agent"
    with capsys.disabled():
        sys.stdout.write(", ".join(f"{count} {outcome}" for outcome, count in sorted(playing.outcomes.items())))


def test_a_guest_that_goes_to_and_fro(tmp_path):
    with pair(tmp_path, KINDS[0]) as both:
        ring(both, 16 * 2 + 2)
        before = [memory_of(agent) for agent in both.agents]
        steps = both.leaving.status()["guest"]["steps"]
        assert min(ring(both, RING)) > max(steps)
        grown = [memory_of(agent) - former for agent, former in zip(both.agents, before, strict=True)]
        assert max(grown) < GROWTH_BYTES, grown
