"""The bitmap, compared with a set of numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from postcopy.errors import ProtocolError
from postcopy.pages import Bitmap


class BitmapMachine(RuleBasedStateMachine):
    """The same calls on a bitmap and on a set."""

    @initialize(length=st.integers(0, 70))
    def begin(self, length: int) -> None:
        self.bitmap = Bitmap(length)
        self.model: set[int] = set()

    @precondition(lambda self: len(self.bitmap))
    @rule(data=st.data(), what=st.sampled_from(["set", "clear", "test", "test_and_set"]))
    def touch(self, data: st.DataObject, what: str) -> None:
        bit = data.draw(st.integers(0, len(self.bitmap) - 1))
        was_set = bit in self.model
        result = getattr(self.bitmap, what)(bit)
        if what in {"test", "test_and_set"}:
            assert result is was_set
        if what in {"set", "test_and_set"}:
            self.model.add(bit)
        if what == "clear":
            self.model.discard(bit)

    @rule()
    def invert(self) -> None:
        self.bitmap = self.bitmap.invert()
        self.model = set(range(len(self.bitmap))) - self.model

    @rule(data=st.data())
    def unite(self, data: st.DataObject) -> None:
        other = Bitmap(len(self.bitmap))
        bits = data.draw(st.sets(st.integers(0, max(0, len(other) - 1)))) if len(other) else set()
        for bit in bits:
            other.set(bit)
        self.bitmap = self.bitmap.union(other)
        self.model |= bits

    @invariant()
    def agree(self) -> None:
        length = len(self.bitmap)
        assert self.bitmap.count() == len(self.model)
        for value in (True, False):
            bits = [bit for bit in range(length) if (bit in self.model) == value]
            runs = list(self.bitmap.runs(value))
            assert [bit for start, stop in runs for bit in range(start, stop)] == bits
            assert len(runs) == sum(bit - 1 not in bits for bit in bits), "runs are as long as they can be"
        assert Bitmap.from_bytes(self.bitmap.to_bytes(), length) == self.bitmap


TestBitmap = BitmapMachine.TestCase


@given(st.binary(max_size=12), st.integers(0, 80))
def test_bytes_that_no_bitmap_gave_are_refused(data: bytes, length: int) -> None:
    number = int.from_bytes(data, "little")
    if len(data) == (length + 7) // 8 and number < 1 << length:
        assert Bitmap.from_bytes(data, length).to_bytes() == data
    else:
        with pytest.raises(ProtocolError, match="bitmap"):
            Bitmap.from_bytes(data, length)


def test_bit_i_is_bit_i_mod_8_of_byte_i_div_8() -> None:
    bitmap = Bitmap(20)
    bitmap.set(0)
    bitmap.set(10)
    assert bitmap.to_bytes() == b"\x01\x04\x00"


@pytest.mark.parametrize("bit", [-1, 8, 100])
def test_bits_outside(bit: int) -> None:
    bitmap = Bitmap(8)
    for call in (bitmap.set, bitmap.clear, bitmap.test, bitmap.test_and_set):
        with pytest.raises(IndexError):
            call(bit)
    assert bitmap.count() == 0


def test_a_new_bitmap_for_every_union_and_inversion() -> None:
    bitmap, other = Bitmap(3), Bitmap(3)
    other.set(1)
    bitmap.union(other)
    bitmap.invert()
    assert bitmap.count() == 0
    with pytest.raises(ValueError, match="3 and 4 bits"):
        bitmap.union(Bitmap(4))


def test_runs_of_a_large_bitmap_take_no_step_for_each_bit() -> None:
    # 2**30 bits one by one would take minutes and run into the time limit of the tests.
    bitmap = Bitmap(1 << 30)
    bitmap.set(1 << 29)
    assert list(bitmap.runs()) == [(1 << 29, (1 << 29) + 1)]
    assert list(bitmap.runs(value=False)) == [(0, 1 << 29), ((1 << 29) + 1, 1 << 30)]


@given(st.binary(max_size=70).map(lambda raw: bytes(byte % 7 for byte in raw)))
def test_pages_in_some_states(states: bytes) -> None:
    bitmap = Bitmap.of_states(memoryview(states), 3, 4)
    assert len(bitmap) == len(states)
    assert [bitmap.test(page) for page in range(len(states))] == [state in {3, 4} for state in states]
    assert Bitmap.from_bytes(bitmap.to_bytes(), len(states)) == bitmap
