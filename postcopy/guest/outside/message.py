"""What an outside VMM says when it hands its memory over: bytes enter, mappings that make sense leave.

The message is Firecracker's ("Handling page faults on snapshot resume" in its documentation): a JSON array of mappings,
with one descriptor beside it, the userfaultfd. Ours besides is an object, {"mappings": [...], "descriptors": [names]},
for a VMM that offers its memory's file, too: the names say which descriptor is which.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from postcopy.errors import ProtocolError
from postcopy.limits import HAND_OVER_BYTES_MAX, HAND_OVER_SIZE_MAX, PAGE_SIZE_MAX, PAGE_SIZE_MIN, REGIONS_MAX
from postcopy.pages.units import format_size
from postcopy.wire.messages import Piece
from postcopy.wire.records import quote

USERFAULTFD = "userfaultfd"
MEMORY = "memory"

_NUMBER_MAX = (1 << 63) - 1
_FIELDS = ("base_host_virt_addr", "size", "offset")


@dataclass(frozen=True, slots=True)
class Given:
    """One mapping: `size` bytes at `address` of the VMM, whose content is that of the snapshot from `offset` on."""

    address: int
    size: int
    offset: int
    page_size: int

    @property
    def piece(self) -> Piece:
        """What a source is asked for."""
        return Piece(self.offset, self.size, self.page_size)


@dataclass(frozen=True, slots=True)
class Message:
    """The mappings, and what each descriptor is, in their order."""

    mappings: tuple[Given, ...]
    descriptors: tuple[str, ...]

    def describe(self) -> str:
        """Say in words how much memory it is."""
        size = format_size(sum(one.size for one in self.mappings))
        return f"{size} in {len(self.mappings)} mapping{'s' if len(self.mappings) != 1 else ''}"


def complete(data: bytes) -> bool:
    """Say whether no more bytes are needed to judge it; ProtocolError where it can become no message."""
    if data.lstrip()[:1] not in {b"", b"[", b"{"}:
        raise ProtocolError(f"no hand-over of memory begins with {data[:16]!r}")
    if len(data) > HAND_OVER_BYTES_MAX:
        raise ProtocolError(f"a hand-over of more than {HAND_OVER_BYTES_MAX} bytes")
    if not data.rstrip().endswith((b"]", b"}")):
        return False  # without a look at all that came before
    try:
        _json(data)
    except ValueError:
        return False
    return True


def _json(data: bytes) -> Any:
    """Return what the bytes say; ValueError where they are no JSON yet, ProtocolError where they never will be."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ProtocolError("the message is nested too deep") from None


def parse(data: bytes) -> Message:
    """Return what the message says; ProtocolError names the mapping and what is wrong with it."""
    said: Any
    try:
        said = _json(data)
    except ValueError:
        raise ProtocolError(f"the message ended in the middle, after {len(data)} bytes") from None
    descriptors: Any = [USERFAULTFD]
    if isinstance(said, dict):
        unknown = sorted(said.keys() - {"mappings", "descriptors"})
        if unknown:
            raise ProtocolError(f"unknown field {unknown[0][:40]!r} in the message")
        descriptors, said = said.get("descriptors"), said.get("mappings")
    return Message(mappings_of(said), _names(descriptors))


def mappings_of(said: Any) -> tuple[Given, ...]:
    """Return the mappings that a list says; ProtocolError names the one that makes no sense."""
    if not isinstance(said, list) or not 0 < len(said) <= REGIONS_MAX:
        raise ProtocolError(f"wanted 1 to {REGIONS_MAX} mappings")
    mappings = tuple(_mapping(number, one) for number, one in enumerate(said))
    _check_apart(mappings)
    if sum(one.size for one in mappings) > HAND_OVER_SIZE_MAX:
        raise ProtocolError(f"more than {format_size(HAND_OVER_SIZE_MAX)} of memory")
    return mappings


def _names(said: Any) -> tuple[str, ...]:
    known = {USERFAULTFD, MEMORY}
    if not isinstance(said, list) or not all(isinstance(one, str) and one in known for one in said):
        raise ProtocolError(f'wanted "descriptors" to name them: {USERFAULTFD}, {MEMORY}')
    if said.count(USERFAULTFD) != 1 or len(set(said)) != len(said):
        raise ProtocolError(f"wanted one {USERFAULTFD} among the descriptors, and each name once")
    return tuple(said)


def _mapping(number: int, said: Any) -> Given:
    if not isinstance(said, dict):
        raise ProtocolError(f"mapping {number}: wanted an object")
    address, size, offset = (_whole(number, name, said.get(name)) for name in _FIELDS)
    given = Given(address, size, offset, _page_size(number, said))
    if (given.address | given.size | given.offset) & (given.page_size - 1) or not given.size:
        raise ProtocolError(
            f"mapping {number}: address {given.address:#x}, size {given.size:#x}, offset {given.offset:#x} are no "
            f"whole pages of {given.page_size} bytes"
        )
    if given.address > _NUMBER_MAX - given.size or given.offset > _NUMBER_MAX - given.size:
        raise ProtocolError(f"mapping {number}: it ends beyond all addresses")
    return given


def _page_size(number: int, said: dict[str, Any]) -> int:
    """Return the size of its pages, in bytes, by whichever name it came.

    `page_size_kib` was Firecracker's first name of the field, and what it put there were bytes all the same (it still
    sends both, with one value); whoever took the name at its word put KiB. No page has fewer bytes than 4096 and none
    that Firecracker has known as many KiB, so the number tells. Before there were huge pages there was neither.
    """
    named = [said[name] for name in ("page_size", "page_size_kib") if name in said]
    if not named:
        return PAGE_SIZE_MIN
    page_size = _whole(number, "page_size", named[0])
    if "page_size" not in said and page_size < PAGE_SIZE_MIN:
        page_size <<= 10
    if not PAGE_SIZE_MIN <= page_size <= PAGE_SIZE_MAX or page_size & (page_size - 1):
        raise ProtocolError(f"mapping {number}: no memory has pages of {page_size} bytes")
    if any(other not in (page_size, page_size >> 10) for other in named):
        raise ProtocolError(
            f"mapping {number}: page_size {named[0]} and page_size_kib {quote(named[1])} contradict each other"
        )
    return page_size


def _whole(number: int, name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _NUMBER_MAX:
        raise ProtocolError(f"mapping {number}: wanted {name} to be a whole number below 2**63")
    return value


def _check_apart(mappings: Sequence[Given]) -> None:
    order = sorted(range(len(mappings)), key=lambda number: mappings[number].address)
    for first, second in pairwise(order):
        if mappings[first].address + mappings[first].size > mappings[second].address:
            raise ProtocolError(f"mappings {first} and {second} overlap")
