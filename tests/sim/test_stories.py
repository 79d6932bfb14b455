"""Ten thousand stories, each of which has to end well, and each again by its number."""

from collections import Counter

import pytest

from .play import play

SEEDS = 10_000
BLOCK = 1000
ENDS = {"completed", "resumed", "at the source", "source died", "destination died", "lost"}


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_whatever_goes_wrong(first, record_property):
    ends = Counter(play(seed)[1] for seed in range(first, first + BLOCK))
    record_property("ends", dict(ends))
    assert ends.keys() == ENDS  # every kind of end is reached, so every kind of trouble was met
    assert ends["resumed"] > BLOCK / 5


def test_a_seed_is_the_same_story_every_time():
    stories = {}
    for seed in range(60):
        once, again = (play(seed, whole=True)[0].world for _ in range(2))
        assert once.digest() == again.digest()
        assert once.steps == again.steps
        stories[once.digest()] = seed
    assert len(stories) == 60
