"""The text of a scrape. Families of samples enter, text leaves, as prometheus_client writes it.

Which samples a family has hardly ever changes, and most of its values do not between two scrapes. So prometheus_client
writes a family once for the samples that it has; from then on numbers are filled into what it wrote, and a family
that has not changed is told again as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

Values = Mapping[Any, float]
"""By the values of their labels: tuples, as long as there are labels."""

FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


class Family(NamedTuple):
    """Samples of one name: `values` by the values of their `labels`, of a histogram by its bounds, and its `total`.

    `kind` is "counter", "gauge" or "histogram". Nothing changes in it once it is made.
    """

    name: str
    kind: str
    text: str
    labels: tuple[str, ...]
    values: Values
    total: float = 0.0


class Exposition:
    """Writes families again and again; what it wrote last of each name is kept."""

    def __init__(self) -> None:
        self._written: dict[str, _Written] = {}

    def text_of(self, families: Sequence[Family]) -> str:
        """Write all samples of some families, whose names differ."""
        return "".join(map(self._text_of, families))

    def _text_of(self, family: Family) -> str:
        last = self._written.get(family.name)
        if last is not None and last.family == family:
            return last.text
        keys = tuple(family.values)
        if last is not None and last.keys == keys and last.family[1:4] == family[1:4]:
            around = last.around
        else:
            around = _around(family)
        text = around % tuple(_numbers(family))
        self._written[family.name] = _Written(family, keys, around, text)
        return text


class _Written(NamedTuple):
    """A family, its text, and that `around` its numbers."""

    family: Family
    keys: tuple[tuple[str, ...], ...]
    around: str
    text: str


def _numbers(family: Family) -> Iterator[float]:
    """Yield the values in the order in which they are written."""
    yield from family.values.values()
    if family.kind == "histogram":
        yield list(family.values.values())[-1]  # of the last bound, which is +Inf: all there are
        yield family.total


class _Alone(Collector):
    """One family whose numbers are all 0."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        """Yield it."""
        name, kind, text, labels, values, _ = self._family
        if kind == "histogram":
            yield HistogramMetricFamily(name, text, buckets=[(le, 0) for (le,) in values], sum_value=0)
            return
        family = FAMILIES[kind](name, text, labels=labels)
        for key in values:
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
