"""`python -m tests.fuzz.collect SECONDS [TARGET…]`: let Hypothesis look for inputs that do what none did before.

Each target has so many seconds of CPU. Half of the inputs are drawn, half are kept ones that were spoiled or crossed.
What is kept is in the folder `said`, one file an input, named by its content, and written while the search runs. An
input is kept if it takes a step from one line of ours to another, so many times, that no smaller one takes; what no
longer adds anything goes. One that comes to a bad end is written into the current folder as `crash-TARGET-…`; the
search goes on, and ends with status 1.
"""

from __future__ import annotations

import hashlib
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from .inputs import INPUTS, Bytes, spoiled
from .targets import TARGETS

HERE = Path(__file__).parent
SAID = HERE / "said"
OURS = (str(HERE.parents[1] / "postcopy"), str(HERE.parents[1] / "agent"))
BATCH = 400
CPU_SECONDS_MAX = 20.0
# A step that is taken more often than this is as good as one that is taken for ever.
TIMES_MAX = 64
Step = tuple[str, int, int, int]
Steps = frozenset[Step]


class TooLongError(BaseException):
    """An input takes too much CPU. No target takes it for an error of its own: TimeoutError is an OSError."""


def _too_long(number: int, frame: FrameType | None) -> NoReturn:
    raise TooLongError(f"still at it after {CPU_SECONDS_MAX:g} s of CPU")


# What `pytest.raises` says where nothing is raised is no Exception.
BAD_ENDS = (Exception, TooLongError, pytest.fail.Exception)


def steps_of(name: str, data: bytes) -> Steps:
    """Return the steps from line to line, within our own code, that an input takes, with how often to a power of two.

    Raises what the target raises, and TooLongError if it takes too much CPU.
    """
    taken: Counter[tuple[str, int, int]] = Counter()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(OURS):
            return None
        before = 0

        def line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal before
            if event in {"line", "exception"}:
                taken[file, before, frame.f_lineno] += 1
                before = frame.f_lineno
            return line

        return line

    signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS_MAX)
    sys.settrace(trace)
    try:
        TARGETS[name](data)
    finally:
        sys.settrace(None)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return frozenset((*step, min(times, TIMES_MAX).bit_length()) for step, times in taken.items())


@st.composite
def like(draw: st.DrawFn, kept: list[bytes]) -> bytes:
    """Return a kept input that was spoiled, or the beginning of one with the end of another."""
    one = draw(st.sampled_from(kept))
    if draw(st.booleans()):
        return spoiled(draw, one)
    other = draw(st.sampled_from(kept))
    return one[: draw(st.integers(0, len(one)))] + other[draw(st.integers(0, len(other))) :]


def batch(inputs: Bytes, number: int) -> list[bytes]:
    """Return some hundred inputs, other ones for each number."""
    found: list[bytes] = []

    def take(data: bytes) -> None:
        found.append(data)

    how = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    seed(number)(settings(max_examples=BATCH, phases=[Phase.generate], **how)(given(inputs)(take)))()
    return found


class Collection:
    """What is kept of a target's inputs, and what came to a bad end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = SAID / name
        self.tried = 0
        self.crashes: dict[str, bytes] = {}
        self._steps: dict[bytes, Steps] = {}
        self._smallest: dict[Step, bytes] = {}

    def take(self, data: bytes) -> None:
        """Run an input."""
        self.tried += 1
        try:
            steps = steps_of(self.name, data)
        except BAD_ENDS as error:
            self._crashed(error, data)
            return
        better = [step for step in steps if step not in self._smallest or _size(data) < _size(self._smallest[step])]
        if better:
            self._steps[data] = steps
            self._smallest.update(dict.fromkeys(better, data))

    def kept(self) -> list[bytes]:
        """Return the smallest inputs that take all steps together."""
        left, found = set(self._smallest), []
        for data in sorted(set(self._smallest.values()), key=_size):
            if self._steps[data] & left:
                left -= self._steps[data]
                found.append(data)
        self._steps = {data: self._steps[data] for data in {*found, *self._smallest.values()}}
        return found

    def write(self, kept: Iterable[bytes]) -> None:
        """Let the folder hold these."""
        files = {hashlib.sha1(data).hexdigest(): data for data in kept}
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in files.keys() - {file.name for file in self.folder.iterdir()}:
            (self.folder / name).write_bytes(files[name])
        for file in self.folder.iterdir():
            if file.name not in files:
                file.unlink()

    def told(self, seconds: float) -> str:
        kept = self.kept()
        size = sum(map(len, kept))
        tried = f"{self.name}: {seconds:.0f} s of CPU, {self.tried} inputs, {len(self._smallest)} steps"
        return f"{tried}, {len(kept)} kept ({size} bytes), {len(self.crashes)} crashes"

    def _crashed(self, error: BaseException, data: bytes) -> None:
        """Keep the smallest input that fails in this way, at this place."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        how = f"{type(error).__name__} at {where.filename}:{where.lineno}"
        if how in self.crashes and _size(self.crashes[how]) <= _size(data):
            return
        file = Path(f"crash-{self.name}-{hashlib.sha1(how.encode()).hexdigest()[:12]}")
        file.write_bytes(data)
        if how not in self.crashes:
            sys.stdout.write(f"{file}: {''.join(traceback.format_exception(error))}")
        self.crashes[how] = data


def _size(data: bytes) -> tuple[int, bytes]:
    return len(data), data


def numbers() -> Iterator[int]:
    """Yield other numbers than any earlier run."""
    return count(random.SystemRandom().getrandbits(64) << 32)


def collect(name: str, seconds: float) -> Collection:
    """Look for so long; write what is worth keeping."""
    found = Collection(name)
    began = time.process_time()
    for file in sorted(found.folder.glob("*")):
        found.take(file.read_bytes())
    kept = found.kept()
    for turn, number in enumerate(numbers()):
        for data in batch(like(kept) if kept and turn % 2 else INPUTS[name], number):
            found.take(data)
            if time.process_time() > began + seconds:  # not before: to draw a batch may take longer
                break
        kept = found.kept()
        found.write(kept)
        if time.process_time() > began + seconds:
            break
    sys.stdout.write(found.told(time.process_time() - began) + "\n")
    sys.stdout.flush()
    return found


if __name__ == "__main__":
    runs = [collect(one, float(sys.argv[1])) for one in sys.argv[2:] or sorted(TARGETS)]
    sys.exit(any(run.crashes for run in runs))
