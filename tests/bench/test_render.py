"""The table: what people see of results, wide enough to be read, with every missed target named."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from agent.bench import render
from agent.bench.compare import compare
from agent.bench.results import left_out, results
from tests.bench.documents import LOUD, measured, scenario, whole


def shown(renderable):
    out = StringIO()
    Console(file=out, width=200, no_color=True).print(renderable)
    return out.getvalue()


def test_a_row_has_the_medians_and_how_many_times_the_floors_they_are():
    text = shown(render.table(results([measured()])))
    (row,) = [line for line in text.splitlines() if "demand/shmem/auto" in line]
    assert "15 µs (1.36x)" in row
    assert "954 MiB/s (1.00x)" in row
    assert "MISSED reached" in row


def test_targets_reached_and_missed_are_named_with_their_numbers():
    text = shown(render.whole(results([measured()])))
    assert "demand/shmem/auto: MISSED: fault p50 ≤ 1.3 x the floor (15 µs of 14.3 µs)" in text
    assert "demand/shmem/auto: reached: fault p99 ≤ 2 x the floor (45 µs of 66 µs)" in text
    assert "the floor is: copy, polls" in text
    assert "targets: 1 reached, 1 MISSED, 0 not judged" in text


def test_what_was_not_run_what_was_wrong_and_what_was_disturbed_is_said():
    bad = measured(load=LOUD)
    bad.problems.append("run 1: 2 of 500 pages differ")
    text = shown(render.whole([*results([bad]), left_out(scenario("size/8GiB"), "3 GiB of memory are available")]))
    assert "WRONG: run 1: 2 of 500 pages differ" in text
    assert "3, 3 disturbed" in text
    assert "others used this machine meanwhile, do not trust: demand/shmem/auto" in text
    assert "size/8GiB: not run: 3 GiB of memory are available" in text
    assert "2 not judged" in text


def test_a_table_of_markdown_has_one_row_for_what_has_targets():
    head, rule, row = render.markdown(results([measured()])).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == 6
    assert row.replace(render.TIMES, "x") == (
        "| `demand/shmem/auto` | fault p50 15 µs, fault p99 45 µs | fault p50 1.36 x, fault p99 1.36 x "
        "| fault p50 ≤ 1.3 x the floor, fault p99 ≤ 2 x the floor | **missed**, reached |"
    )
    assert "`demand/shmem/auto` (disturbed)" in render.markdown(results([measured(load=LOUD)]))
    assert "**not judged**" in render.markdown([left_out(scenario(), "no time")])


def test_a_comparison_names_the_worse_and_the_other_machine():
    text = shown(render.comparison(compare(whole(), whole(product=(30e-6,))), ["kernel: a then, b now"]))
    assert "not the same machine: kernel: a then, b now" in text
    (row,) = [line for line in text.splitlines() if "fault p50" in line]
    for words in ("15 µs", "30 µs", "+100%", "1.36 → 2.73", "worse"):
        assert words in row
