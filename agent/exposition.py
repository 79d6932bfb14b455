"""The text of a scrape. Families of samples enter, text leaves, as prometheus_client writes it.

Which samples there are hardly ever changes, their values do with every scrape. So prometheus_client writes each set of
samples that is asked for once, and a scrape fills numbers into what it wrote: a tenth of the time of writing all anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

Values = Mapping[Any, float]
"""By the values of their labels: tuples, as long as there are labels."""

FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
# Before, while and after a guest is here, with and without huge pages: that many sets of samples there are.
SETS_KEPT = 8


@dataclass(frozen=True, slots=True)
class Family:
    """Samples of one name: `values` by the values of their `labels`, of a histogram by its bounds, and its `total`.

    `kind` is "counter", "gauge" or "histogram".
    """

    name: str
    kind: str
    text: str
    labels: tuple[str, ...]
    values: Values
    total: float = 0.0


# A family without its numbers.
_Shape = tuple[str, str, str, tuple[str, ...], tuple[tuple[str, ...], ...]]


def text_of(families: Sequence[Family]) -> str:
    """Write all samples of some families."""
    shapes = tuple((one.name, one.kind, one.text, one.labels, tuple(one.values)) for one in families)
    return _around(shapes) % tuple(number for one in families for number in _numbers(one))


def _numbers(family: Family) -> Iterator[float]:
    """Yield the values in the order in which they are written."""
    yield from family.values.values()
    if family.kind == "histogram":
        yield list(family.values.values())[-1]  # of the last bound, which is +Inf: all there are
        yield family.total


class _Shapes(Collector):
    """Families whose numbers are all 0."""

    def __init__(self, shapes: Sequence[_Shape]) -> None:
        self._shapes = shapes

    def collect(self) -> Iterator[Metric]:
        """Yield them in their order."""
        for name, kind, text, labels, keys in self._shapes:
            if kind == "histogram":
                yield HistogramMetricFamily(name, text, buckets=[(le, 0) for (le,) in keys], sum_value=0)
                continue
            family = FAMILIES[kind](name, text, labels=labels)
            for key in keys:
                family.add_metric(key, 0)
            yield family


@lru_cache(SETS_KEPT)
def _around(shapes: tuple[_Shape, ...]) -> str:
    """Have samples written, with a place where each of the numbers goes."""
    registry = CollectorRegistry()
    registry.register(_Shapes(shapes))
    return "".join(map(_with_place, generate_latest(registry).decode().splitlines(keepends=True)))


def _with_place(line: str) -> str:
    line = line.replace("%", "%%")
    return line if line.startswith("#") else f"{line.rpartition(' ')[0]} %s\n"
