"""The text of a scrape, in the format of Prometheus 0.0.4. Families of samples enter, text leaves.

Which samples there are hardly ever changes, their values do with every scrape: so what is written around the values is
kept, for each set of samples that was asked for, and a scrape only fills in numbers. That is a tenth of the time that
prometheus_client takes, whose import alone is a tenth of an agent's own memory; the tests hold this text against its.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

Kind = Literal["counter", "gauge", "histogram"]
Values = Mapping[Any, float]
"""By the values of their labels: tuples, as long as there are labels."""

# Before, while and after a guest is here, with and without huge pages: that many sets of samples there are.
SETS_KEPT = 8


@dataclass(frozen=True, slots=True)
class Family:
    """Samples of one name: `values` by the values of their `labels`, of a histogram by its bounds, and its `total`."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...]
    values: Values
    total: float = 0.0


# A family without its numbers.
_Shape = tuple[str, Kind, str, tuple[str, ...], tuple[tuple[str, ...], ...]]


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


@lru_cache(SETS_KEPT)
def _around(shapes: tuple[_Shape, ...]) -> str:
    """Write samples, with a place where each of the numbers goes."""
    return "".join(line for shape in shapes for line in _lines(*shape))


def _lines(
    name: str, kind: Kind, text: str, labels: tuple[str, ...], keys: tuple[tuple[str, ...], ...]
) -> Iterator[str]:
    full = f"{name}_total" if kind == "counter" else name
    yield f"# HELP {full} {_escaped(text)}\n# TYPE {full} {kind}\n"
    for key in keys:
        sides = sorted(zip(labels, key, strict=True))
        pairs = ",".join(f'{label}="{_escaped(value, quoted=True)}"' for label, value in sides)
        yield f"{full}{'_bucket' if kind == 'histogram' else ''}{f'{{{pairs}}}' if pairs else ''} %s\n"
    if kind == "histogram":
        yield f"{full}_count %s\n{full}_sum %s\n"


def _escaped(text: str, *, quoted: bool = False) -> str:
    """Escape what would end a line, or a label's value; and what would be taken for a number's place."""
    text = text.replace("\\", r"\\").replace("\n", r"\n").replace("%", "%%")
    return text.replace('"', r"\"") if quoted else text
