"""Extents, compared with sets of single bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.pages import Extent, coalesce, split

EXTENTS = st.builds(Extent, st.integers(0, 2), st.integers(0, 40), st.integers(0, 12))


def bytes_of(extents: list[Extent]) -> list[tuple[int, int]]:
    return [(extent.region, at) for extent in extents for at in range(extent.offset, extent.stop)]


@given(st.lists(EXTENTS, max_size=12))
def test_coalesce_keeps_every_byte_once_in_as_few_extents_as_there_are_runs(extents: list[Extent]) -> None:
    joined = coalesce(extents)
    wanted = sorted(set(bytes_of(extents)))
    assert bytes_of(joined) == wanted
    runs = sum((region, at - 1) not in set(wanted) for region, at in wanted)
    assert len(joined) == runs


@given(EXTENTS, st.integers(1, 15))
def test_split_keeps_every_byte_in_order(extent: Extent, length_max: int) -> None:
    pieces = list(split(extent, length_max))
    assert bytes_of(pieces) == bytes_of([extent])
    assert all(piece.length == length_max for piece in pieces[:-1])
    assert all(0 < piece.length <= length_max for piece in pieces)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="negative"):
        coalesce([Extent(0, 0, -1)])
    with pytest.raises(ValueError, match="negative"):
        coalesce([Extent(0, -1, 1)])
    with pytest.raises(ValueError, match="pieces of 0 bytes"):
        list(split(Extent(0, 0, 1), 0))
