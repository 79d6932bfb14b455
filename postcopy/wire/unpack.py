"""Bytes of msgpack to values, within limits: the one place where bytes of somebody else become objects.

What enters: bytes and the limits that hold for them. What leaves: None, bool, int, float, str, bytes, lists and maps
with keys of text or bytes, each once; or a ProtocolError. What that costs in memory is bounded, whatever the bytes say.
"""

from __future__ import annotations

from typing import Any

import msgpack

from postcopy.errors import ProtocolError
from postcopy.limits import ARRAY_MAX, ELEMENTS_MAX, NESTED_MAX, TEXT_BYTES_MAX
from postcopy.wire.records import quote


def unpack(payload: bytes, subject: str, *, elements_max: int = ELEMENTS_MAX, array_max: int = ARRAY_MAX) -> object:
    """Return what the bytes hold; ProtocolError that begins with `subject`, for a log.

    `elements_max` bounds all maps and arrays together, each being one more; `array_max` any one of them, since the
    decoder makes room for as many as are announced, at each depth.
    """
    budget = _Budget(subject, elements_max)
    try:
        value: object = msgpack.unpackb(
            payload,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=budget.take_map,
            list_hook=budget.take_array,
            max_str_len=TEXT_BYTES_MAX,
            max_bin_len=len(payload),
            max_array_len=array_max,
            max_map_len=array_max,
            max_ext_len=0,
        )
    # What msgpack raises on bytes it does not like: its own errors and those of Python's text are
    # ValueErrors.
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise ProtocolError(f"{subject}: not msgpack as agreed ({quote(reason)})") from None
    _check_nesting(subject, value)
    return value


def _check_nesting(subject: str, value: Any) -> None:
    """Look from level to level: what called itself here would fail on the very values that it is to refuse."""
    level = [value]
    for _ in range(NESTED_MAX + 1):
        containers = [one for one in level if type(one) in {dict, list}]
        if not containers:
            return
        level = [part for one in containers for part in (one.values() if type(one) is dict else one)]
    raise ProtocolError(f"{subject}: more than {NESTED_MAX} maps and arrays inside each other")


class _Budget:
    """Counts the elements while they are unpacked, and refuses keys that come twice."""

    def __init__(self, subject: str, elements_max: int) -> None:
        self._subject = subject
        self._most = self._left = elements_max

    def _spend(self, count: int) -> None:
        self._left -= 1 + count
        if self._left < 0:
            raise ProtocolError(f"{self._subject}: more than {self._most} elements")

    def take_map(self, pairs: list[tuple[object, object]]) -> dict[object, object]:
        self._spend(len(pairs))
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ProtocolError(f"{self._subject}: a map holds a key twice")
        return values

    def take_array(self, parts: list[object]) -> list[object]:
        self._spend(len(parts))
        return parts
