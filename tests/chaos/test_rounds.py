"""200 rounds of random trouble between real daemons on two hosts, and a ring: nothing lost, nothing left behind."""

import pytest

from .pair import memory_of, pair
from .rounds import HUGE_PAGES, KINDS, Rounds, kind_of, ring

ROUNDS = 200
RING = 40
# What an agent may have more of its own after the ring. It remembers 16 migrations for sources that come back, which
# are there before it is measured. Half a MiB is what it grows by in fact (see the README); the buffers of one pump,
# each of 2 MiB, would be more than this if they stayed behind.
GROWTH_BYTES = 2 << 20


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rounds(kind, tmp_path, huge_pages):
    if kind.memory == "hugetlb-2M":
        huge_pages(kind.memory, HUGE_PAGES)
    with Rounds(tmp_path) as playing:
        for seed in range(ROUNDS):
            if kind_of(seed) is kind:
                playing.play(seed)


def test_a_guest_that_goes_to_and_fro(tmp_path):
    with pair(tmp_path, KINDS[0]) as both:
        ring(both, 16 * 2 + 2)
        before = [memory_of(agent) for agent in both.agents]
        steps = both.leaving.status()["guest"]["steps"]
        assert min(ring(both, RING)) > max(steps)
        grown = [memory_of(agent) - former for agent, former in zip(both.agents, before, strict=True)]
        assert max(grown) < GROWTH_BYTES, grown
