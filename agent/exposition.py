"""The text of a scrape. Families and their numbers enter, text leaves, as prometheus_client writes it.

Which families there are, and which samples each has, hardly ever changes. So prometheus_client writes all of them once,
and from then on numbers are filled into what it wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


class Family(NamedTuple):
    """What there is of one name, but for its numbers: a sample for each of `keys`, which are values of the `labels`.

    `kind` is "counter", "gauge" or "histogram". The keys of a histogram are its bounds, the last one is +Inf, and it
    has two numbers more: how many were recorded, and their sum.
    """

    name: str
    kind: str
    text: str
    labels: tuple[str, ...] = ()
    keys: tuple[tuple[str, ...], ...] = ((),)


Told = tuple[Family, Sequence[float]]
"""A family and its numbers, in the order of its samples."""


class Exposition:
    """Writes families again and again; what is around the numbers is kept."""

    def __init__(self) -> None:
        self._families: tuple[Family, ...] = ()
        self._around = ""

    def text_of(self, told: Sequence[Told]) -> str:
        """Write some families, whose names differ."""
        families, numbers = zip(*told, strict=True)
        if families != self._families:
            self._families, self._around = families, "".join(map(_around, families))
        return self._around % tuple(chain.from_iterable(numbers))


class _Alone(Collector):
    """One family whose numbers are all 0."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        """Yield it."""
        name, kind, text, labels, keys = self._family
        if kind == "histogram":
            yield HistogramMetricFamily(name, text, buckets=[(le, 0) for (le,) in keys], sum_value=0)
            return
        family = FAMILIES[kind](name, text, labels=labels)
        for key in keys:
            family.add_metric(key, 0)
        yield family


def _around(family: Family) -> str:
    """Have samples written, with a place where each of the numbers goes."""
    registry = CollectorRegistry()
    registry.register(_Alone(family))
    return "".join(map(_with_place, generate_latest(registry).decode().splitlines(keepends=True)))


def _with_place(line: str) -> str:
    line = line.replace("%", "%%")
    return line if line.startswith("#") else f"{line.rpartition(' ')[0]} %s\n"
