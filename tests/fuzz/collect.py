"""`python -m tests.fuzz.collect SECONDS [TARGET…]`: let Hypothesis look for inputs that do what none did before.

What it keeps is in the folder `said`, one file an input, named by its content. An input is kept if it takes a step from
one line of ours to another that no smaller one takes; what no longer adds anything goes.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from .inputs import INPUTS
from .targets import TARGETS

HERE = Path(__file__).parent
OURS = (str(HERE.parents[1] / "postcopy"), str(HERE.parents[1] / "agent"))
Steps = frozenset[tuple[str, int, int]]


def steps_of(name: str, data: bytes) -> Steps:
    """Return the steps from line to line, within our own code, that an input takes."""
    found = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(OURS):
            return None
        before = 0

        def line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal before
            if event in {"line", "exception"}:
                found.add((file, before, frame.f_lineno))
                before = frame.f_lineno
            return line

        return line

    sys.settrace(trace)
    try:
        TARGETS[name](data)
    finally:
        sys.settrace(None)
    return frozenset(found)


def batch(name: str, number: int) -> list[bytes]:
    """Return some hundred inputs, other ones for each number."""
    found: list[bytes] = []

    def take(data: bytes) -> None:
        found.append(data)

    how = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    seed(number)(settings(max_examples=400, phases=[Phase.generate], **how)(given(INPUTS[name])(take)))()
    return found


def generated(name: str, until: float) -> Iterator[bytes]:
    """Yield inputs until it is so late."""
    for number in count():
        for data in batch(name, number):
            if time.monotonic() > until:
                return
            yield data


def collect(name: str, seconds: float) -> str:
    """Look for so long; write what is worth keeping."""
    folder = HERE / "said" / name
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[bytes, Steps] = {}
    seen: set[tuple[str, int, int]] = set()
    taken = 0
    old = [file.read_bytes() for file in folder.iterdir()]
    for data in [*old, *generated(name, time.monotonic() + seconds)]:
        taken += 1
        steps = steps_of(name, data)
        if not steps <= seen:
            seen |= steps
            known[data] = steps
    for file in folder.iterdir():
        file.unlink()
    left, kept = set(seen), 0
    for data in sorted(known, key=lambda one: (len(one), one)):
        if known[data] & left:
            left -= known[data]
            kept += 1
            (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)
    return f"{name}: {taken} inputs, {len(seen)} steps, {kept} kept"


if __name__ == "__main__":
    for one in sys.argv[2:] or sorted(TARGETS):
        sys.stdout.write(collect(one, float(sys.argv[1])) + "\n")
        sys.stdout.flush()
