"""The device state of an emulated guest: all that decides what its vCPUs do next, and what its memory must hold.

In: what the user asks for, or a map that came off the network and is believed in nothing. Out: a `GuestState` that is
known to be sound, or one error that names the field. The state travels as a map of plain values that msgpack carries.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, NamedTuple

from postcopy.errors import ProtocolError, UsageError
from postcopy.guest._guest import lib
from postcopy.limits import GUEST_PAGES_MAX, GUEST_VCPUS_MAX, STEPS_MAX, STEPS_PER_SECOND_MAX

GUEST_PAGE_BYTES = lib.GUEST_PAGE_BYTES
# Names as the user types them, numbers as C knows them.
WORKLOADS = {
    "sequential": lib.WORKLOAD_SEQUENTIAL,
    "stride": lib.WORKLOAD_STRIDE,
    "random": lib.WORKLOAD_RANDOM,
    "zipf": lib.WORKLOAD_ZIPF,
    "increment": lib.WORKLOAD_INCREMENT,
}
KIND = "emulated"
# In version 1 half of the blank pages were holes, always.
VERSION = 2
VERSION_MIN = 1
STRIDE_PAGES = 67  # further than any read-ahead of 64 pages reaches
_U64_MAX = (1 << 64) - 1


class Position(NamedTuple):
    """Where a vCPU stands: before step `position` of pass `passes`, having made `steps` steps in all."""

    passes: int
    position: int
    steps: int


@dataclass(frozen=True, slots=True)
class GuestState:
    """Everything a guest continues from; sizes are in guest pages of 4096 bytes, whatever the host's page size.

    `blank_pages` of `guest_pages` lie at the end and are not visited: the first `hole_pages` of them are never
    written, the others are zeroed. `steps_max` (None: no limit) and `steps_per_second` (0: as fast as it can) are per
    vCPU.
    """

    workload: str
    seed: int
    nonce: int
    guest_pages: int
    blank_pages: int
    hole_pages: int
    stride: int
    random_start: bool
    steps_max: int | None
    steps_per_second: int
    vcpus: tuple[Position, ...]

    @property
    def active_pages(self) -> int:
        """Pages that the vCPUs visit; they come first."""
        return self.guest_pages - self.blank_pages

    @property
    def pass_steps(self) -> int:
        """Steps in one pass of one vCPU."""
        return self.active_pages * (self.active_pages.bit_length() if self.workload == "zipf" else 1)

    def checked_for_user(self) -> GuestState:
        """Return self; UsageError where what the user asked for makes no sense."""
        if problem := self._problem():
            raise UsageError(f"guest: {problem}")
        return self

    def at(self, vcpus: tuple[Position, ...], steps_max: int | None) -> GuestState:
        """Return the same guest with its vCPUs elsewhere."""
        return replace(self, vcpus=vcpus, steps_max=steps_max)

    def to_fields(self) -> dict[str, Any]:
        """Return the fields as they travel: str, int, bool, None and lists only."""
        return {name: getattr(self, name) for name in _FIELD_TYPES} | {"vcpus": [list(vcpu) for vcpu in self.vcpus]}

    def to_map(self) -> dict[str, Any]:
        """Return the whole state of an emulated guest, as it travels."""
        return {"kind": KIND, "version": VERSION, **self.to_fields()}

    @classmethod
    def from_map(cls, state: object) -> GuestState:
        """Believe nothing: ProtocolError names what is wrong with a state from the other agent."""
        version, fields = opened(state, KIND, (VERSION_MIN, VERSION))
        return cls.from_fields(fields, version)

    @classmethod
    def from_fields(cls, fields: object, version: int = VERSION) -> GuestState:
        """Believe nothing of the fields either."""
        if not isinstance(fields, dict):
            raise ProtocolError(f"guest state: {shown(fields)} instead of fields")
        fields = dict(fields)
        wanted = {name: types for name, types in _FIELD_TYPES.items() if version >= _SINCE.get(name, VERSION_MIN)}
        if fields.keys() != wanted.keys():
            odd = sorted(map(shown, fields.keys() ^ wanted.keys()))[:3]
            raise ProtocolError(f"guest state: missing or unknown fields: {', '.join(odd)}")
        for name, types in wanted.items():
            if type(fields[name]) not in types:
                raise ProtocolError(f"guest state: {name} is {shown(fields[name])}")
        fields.setdefault("hole_pages", fields["blank_pages"] // 2)
        fields["vcpus"] = tuple(_position(vcpu) for vcpu in fields["vcpus"][: GUEST_VCPUS_MAX + 1])
        parsed = cls(**fields)
        if problem := parsed._problem():
            raise ProtocolError(f"guest state: {problem}")
        return parsed

    def _problem(self) -> str | None:
        """Say what is out of range, in the order of the fields."""
        active = self.active_pages
        bounds = {
            "seed": (0, self.seed, _U64_MAX),
            "nonce": (0, self.nonce, _U64_MAX),
            "guest_pages": (1, self.guest_pages, GUEST_PAGES_MAX),
            "blank_pages": (0, self.blank_pages, self.guest_pages - 1),
            "hole_pages": (0, self.hole_pages, self.blank_pages),
            "stride": (1, self.stride, max(1, active - 1)),
            "steps_max": (0, self.steps_max or 0, STEPS_MAX),
            "steps_per_second": (0, self.steps_per_second, STEPS_PER_SECOND_MAX),
            "vcpus": (1, len(self.vcpus), GUEST_VCPUS_MAX),
        }
        if self.workload not in WORKLOADS:
            return f"unknown workload {shown(self.workload)}; known are {', '.join(WORKLOADS)}"
        for name, (low, value, high) in bounds.items():
            if not low <= value <= high:
                return f"{name} {shown(value)} is not in {low} to {high}"
        if gcd(self.stride, active) != 1:
            return f"stride {self.stride} and the {active} active pages have a common divisor"
        if self.random_start and self.workload == "increment":
            return "increment begins at the first page, not at a random one"
        return self._position_problem()

    def _position_problem(self) -> str | None:
        for number, vcpu in enumerate(self.vcpus):
            if not (0 <= vcpu.position < self.pass_steps and 0 <= vcpu.steps <= STEPS_MAX):
                return f"vCPU {number} stands outside its pass"
            if vcpu.passes * self.pass_steps + vcpu.position != vcpu.steps:
                return f"vCPU {number}: its steps are not its passes and position"
        return None


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "workload": (str,),
    "seed": (int,),
    "nonce": (int,),
    "guest_pages": (int,),
    "blank_pages": (int,),
    "hole_pages": (int,),
    "stride": (int,),
    "random_start": (bool,),
    "steps_max": (int, type(None)),
    "steps_per_second": (int,),
    "vcpus": (list,),
}
# Fields that were not there from version 1 on.
_SINCE = {"hole_pages": 2}


def _position(vcpu: object) -> Position:
    if not isinstance(vcpu, list) or len(vcpu) != 3 or any(type(number) is not int for number in vcpu):
        raise ProtocolError(f"guest state: a vCPU is {shown(vcpu)}, not [passes, position, steps]")
    return Position(*vcpu)


def opened(state: object, kind: str, versions: tuple[int, int]) -> tuple[int, dict[str, Any]]:
    """Return the version and the fields of a state that must be of this kind and in one of these versions."""
    if not isinstance(state, dict):
        raise ProtocolError("guest state: not a map")
    if state.get("kind") != kind:
        raise ProtocolError(f"guest state: kind {shown(state.get('kind'))} is not {kind!r}")
    version = state.get("version")
    if type(version) is not int or not versions[0] <= version <= versions[1]:
        raise ProtocolError(f"guest state: version {shown(version)} is not {versions[0]} to {versions[1]}")
    return version, {name: value for name, value in state.items() if name not in {"kind", "version"}}


def shown(value: object) -> str:
    """Show what the other agent sent, cut to fit a line; a huge int is not even converted."""
    if isinstance(value, int) and value.bit_length() > 80:
        return "a huge number"
    if isinstance(value, str | bytes):
        return repr(value[:40])
    return repr(value) if isinstance(value, int | float) or value is None else f"a {type(value).__name__}"


def stride_near(wanted: int, active_pages: int) -> int:
    """Return the first stride from `wanted` pages on that visits every page once in a pass (coprime to them)."""
    if wanted < 1:
        raise UsageError(f"guest: stride {wanted} is not above zero")
    stride = wanted % active_pages or 1
    while gcd(stride, active_pages) != 1:
        stride += 1  # active_pages - 1 is coprime at the latest
    return stride


def wanted_state(
    pages: int,
    *,
    workload: str = "random",
    vcpus: int = 2,
    seed: int = 0,
    nonce: int | None = None,
    blank: float = 0.125,
    holes: bool = False,
    stride: int = STRIDE_PAGES,
    random_start: bool = False,
    steps_max: int | None = None,
    steps_per_second: int = 0,
    reserved: int = 0,
) -> GuestState:
    """Return the state of a guest that has not begun, as a user wants it; UsageError where that makes no sense.

    `nonce` (None: drawn from the system) is part of the pattern in memory and exists nowhere else. Of the `pages` of
    memory `reserved` come first, and are not the content's.
    """
    if not 0 <= blank < 1:
        raise UsageError(f"guest: the blank fraction {blank} is not in 0 to 1")
    if not 1 <= vcpus <= GUEST_VCPUS_MAX:
        raise UsageError(f"guest: {vcpus} vCPUs are not in 1 to {GUEST_VCPUS_MAX}")
    blank_pages = int(pages * blank)
    active_pages = pages - reserved - blank_pages
    if active_pages < 1:
        raise UsageError(f"guest: {pages} pages of memory are too few: {reserved} are its own, {blank_pages} blank")
    state = GuestState(
        workload=workload,
        seed=seed,
        nonce=int.from_bytes(os.urandom(8), "little") if nonce is None else nonce,
        guest_pages=pages - reserved,
        blank_pages=blank_pages,
        hole_pages=blank_pages if holes else blank_pages // 2,
        stride=stride_near(stride, active_pages) if workload == "stride" else 1,
        random_start=random_start,
        steps_max=steps_max,
        steps_per_second=steps_per_second,
        vcpus=(Position(0, 0, 0),) * vcpus,
    )
    return state.checked_for_user()
