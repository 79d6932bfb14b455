"""Ten thousand stories, some of memory that is fetched, each of which has to end well, and each again by its number."""

from collections import Counter

import pytest

from . import fetch_story
from .play import play

SEEDS = 8000
FETCHED_SEEDS = 2000
BLOCK = 1000
FETCHED_ENDS = {"completed", "resumed", "refused", "lost"}
ENDS = {"completed", "resumed", "at the source", "source died", "destination died", "lost"}


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_whatever_goes_wrong(first, record_property):
    ends = Counter(play(seed)[1] for seed in range(first, first + BLOCK))
    record_property("ends", dict(ends))
    assert ends.keys() == ENDS  # every kind of end is reached, so every kind of trouble was met
    assert ends["resumed"] > BLOCK / 5


@pytest.mark.parametrize("first", range(0, FETCHED_SEEDS, BLOCK))
def test_whatever_goes_wrong_with_memory_that_is_fetched(first, record_property):
    ends = Counter(end for seed in range(first, first + BLOCK) for end in fetch_story.play(seed)[1])
    record_property("ends", dict(ends))
    assert ends.keys() == FETCHED_ENDS
    assert ends["resumed"] > BLOCK / 5


@pytest.mark.parametrize("play", [play, fetch_story.play], ids=["a guest", "fetched"])
def test_a_seed_is_the_same_story_every_time(play):
    stories = {}
    for seed in range(30):
        once, again = (play(seed, whole=True)[0].world for _ in range(2))
        assert once.digest() == again.digest()
        assert once.steps == again.steps
        stories[once.digest()] = seed
    assert len(stories) == 30
