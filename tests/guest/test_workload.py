"""The C guest against the model: the same pages, the same bytes, for every workload, from any step to any other."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from math import gcd

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy.guest import WORKLOADS, CheckResult, Guest
from postcopy.guest.state import stride_near
from tests.guest.memory import Memory
from tests.guest.model import Model, permutation, stream

U64 = st.integers(0, (1 << 64) - 1)


@st.composite
def models(draw: st.DrawFn) -> Model:
    active = draw(st.integers(1, 40))
    workload = draw(st.sampled_from(sorted(WORKLOADS)))
    zeroed = draw(st.integers(0, 3))
    return Model(
        workload=workload,
        vcpus=draw(st.integers(1, 3)),
        seed=draw(U64),
        nonce=draw(U64),
        active=active,
        holes=max(0, zeroed - draw(st.integers(0, 1))),
        zeroed=zeroed,
        stride=stride_near(draw(st.integers(1, 50)), active) if workload == "stride" else 1,
        random_start=workload != "increment" and draw(st.booleans()),
    )


def test_stream_is_splitmix64() -> None:
    # The outputs of the reference implementation for this seed.
    assert [stream(1234567, i) for i in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(st.integers(1, 300), U64)
@settings(max_examples=50, deadline=None)
def test_permutation_visits_everything_once(size: int, key: int) -> None:
    assert sorted(permutation(size, key)) == list(range(size))


def test_zipf_weights_fall_with_the_rank() -> None:
    weights = sorted(Counter(Model("zipf", 1, 5, 6, 256).pass_pages(0, 3)).values(), reverse=True)
    # In octave steps: rank r is visited 1/2 to 2 times pages / (r + 1) times a pass; half the visits go to a tenth.
    assert all(128 / (rank + 1) <= weight <= 512 / (rank + 1) for rank, weight in enumerate(weights))
    assert sum(weights[:26]) > sum(weights) / 2


@given(models(), st.data())
@settings(max_examples=150, deadline=None)
def test_c_continues_as_the_model_does(model: Model, data: st.DataObject) -> None:
    """From any step of any pass, each vCPU at its own, to a limit that some of them have already passed."""
    before = data.draw(
        st.lists(st.integers(0, 3 * model.pass_steps), min_size=model.vcpus, max_size=model.vcpus), "before"
    )
    if data.draw(st.booleans(), "late"):
        late = data.draw(st.integers(0, (1 << 61) // model.pass_steps), "passes") * model.pass_steps
        before = [late + steps for steps in before]
    limit = max(before) + data.draw(st.integers(-model.pass_steps, 2 * model.pass_steps), "more")
    total = model.active + model.holes + model.zeroed
    first = data.draw(st.integers(1, total), "pages of the first region")
    with Memory(first) as one, Memory(max(1, total - first)) as two:
        memories = [one] if first == total else [one, two]
        start = model.memory(before)
        one.write(start[: first * 4096])
        if first < total:
            two.write(start[first * 4096 :])
        with Guest.restore(memories, model.state(before, steps_max=max(0, limit))) as guest:
            assert guest.check().pages_mismatched == 0
            guest.start()
            guest.wait()
            guest.stop()
            after = [max(steps, limit) for steps in before]
            assert guest.steps() == after
            assert guest.accesses == sum(after) - sum(before)
            assert guest.save() == model.state(after, steps_max=max(0, limit))
            assert guest.check().pages_mismatched == 0
        assert b"".join(memory.read() for memory in memories) == model.memory(after)


@pytest.mark.parametrize("workload", sorted(WORKLOADS))
@pytest.mark.parametrize("kind", ["shmem", "anonymous"])
def test_fill_writes_the_pattern_and_leaves_the_holes(workload: str, kind: str) -> None:
    with Memory(68, kind=kind) as memory:
        with Guest([memory], workload=workload, vcpus=3, seed=1, nonce=2, blank=0.25, stride=10) as guest:
            guest.fill()
            if kind == "shmem":
                assert memory.allocated() == 68 - 8
            assert guest.check() == CheckResult(68, 0, None)
            if kind == "shmem":
                assert memory.allocated() == 68 - 8, "checking a hole must not fill it"
            stride = guest.save()["stride"]
        assert memory.read() == Model(workload, 3, 1, 2, 51, holes=8, zeroed=9, stride=stride).memory([0, 0, 0])


def test_runs_and_is_checked_on_huge_pages_with_holes(huge_pages: Callable[[str, int], None]) -> None:
    huge_pages("hugetlb-2M", 8)
    with Memory(8 * 512, kind="hugetlb-2M") as memory, Guest([memory], blank=0.5, seed=1, steps_max=5000) as guest:
        guest.fill()
        guest.start()
        guest.wait()
        assert guest.check() == CheckResult(8 * 512, 0, None)
        assert memory.allocated() == 6 * 512, "checking a hole must not fill it"
        memory.flip(6 * 512 * 4096 - 1, 3)
        assert guest.check() == CheckResult(8 * 512, 1, 6 * 512 - 1)


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_stride_visits_every_page(wanted: int, pages: int) -> None:
    stride = stride_near(wanted, pages)
    assert gcd(stride, pages) == 1
    assert 1 <= stride < max(2, pages)


def test_nonce_is_drawn_anew() -> None:
    with Memory(8) as memory, Guest([memory]) as one, Guest([memory]) as two:
        assert one.save()["nonce"] != two.save()["nonce"]


@pytest.mark.parametrize("workload", ["stride", "random", "zipf"])
def test_the_next_page_is_hard_to_guess(workload: str) -> None:
    pages = Model(workload, 1, 9, 9, 1000, stride=67).pass_pages(0, 1)
    neighbours = sum(later - earlier == 1 for earlier, later in itertools.pairwise(pages))
    assert neighbours < len(pages) / 100
