"""What encryption costs: the same migrations plain and with TLS, in turns, so that one can be read beside the other.

Nothing enters; scenarios leave. There is no floor for TLS and no target: the plain row is what to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from agent.bench.product import ProductSetup

MIB = 1 << 20

WHAT = {
    "demand": ProductSetup(size=64 * MIB, push=False),
    "mixed": ProductSetup(size=256 * MIB),
    "stream": ProductSetup(size=1024 * MIB, steps_per_second=100),
}


def pairs() -> Iterator[tuple[str, str, ProductSetup]]:
    """Yield what is measured, the scenario's name, its setup: each plain and encrypted, one behind the other."""
    for what, plain in WHAT.items():
        yield what, f"tls/{what}/plain", plain
        yield what, f"tls/{what}/encrypted", replace(plain, tls=True)
