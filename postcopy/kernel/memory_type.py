"""What a memory type declares: how its pages can be trapped and placed, and how to get some of it.

In: a region. Out: a Mapping, or the reason why not. A new type is one file with one subclass, and one line in
`types.py`. Nothing here looks at the version of the kernel: what a type can do is tried.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping as ReadOnly
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from postcopy.errors import HostError, KernelError, UsageError
from postcopy.kernel.abi import NO_IOCTLS, Feature, Ioctl, Mode
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.trying import TAKES_A_PAGE, perform
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.pages.regions import Region
from postcopy.pages.units import format_size


class Way(StrEnum):
    """A way to place a page."""

    COPY = "copy"
    CONTINUE = "continue"
    ZEROPAGE = "zeropage"
    MOVE = "move"


@dataclass(frozen=True, slots=True)
class ModeGrant:
    """What REGISTER answered for `modes`: the ioctls, or None and the errno.

    Where they were performed as well, `refused` says which of them the kernel refused all the same, by the name of its
    errno, and `untried` which could not be.
    """

    modes: Mode
    ioctls: Ioctl | None
    number: int = 0
    refused: ReadOnly[Ioctl, str] = field(default_factory=dict)
    untried: Ioctl = NO_IOCTLS


@dataclass(frozen=True, slots=True)
class TypeGrants:
    """What was tried with one memory type: an answer for each combination of modes, or why nothing could be tried.

    `reason` is also there where the kernel grants all and this host still has none of the memory.
    """

    name: str
    page_size: int
    modes: tuple[ModeGrant, ...]
    reason: str | None

    def granted(self, modes: Mode) -> Ioctl | None:
        """Return the ioctls granted for exactly these modes, None where they are refused or were not tried."""
        return next((grant.ioctls for grant in self.modes if grant.modes == modes), None)


PROBED_MODES = (
    Mode.MISSING,
    Mode.MINOR,
    Mode.WP,
    Mode.MISSING | Mode.MINOR,
    Mode.MISSING | Mode.MINOR | Mode.WP,
)

_COMMON = Ioctl.WAKE


class MemoryType(ABC):
    """One kind of memory with one page size.

    `modes` are those that can be registered, `features` what must be enabled for them, `ways` maps each way of placing
    to the ioctls it needs. `alias` says whether a second mapping is possible. `thin`: a mapping sets no memory
    aside, so it may be larger than what the host has as long as it is not filled. `file_name` is the name of the file
    that create_file() makes, None where it has none.
    """

    name: str
    page_size: int
    alias: bool
    thin: bool = False
    modes: Mode
    features: ReadOnly[Mode, Feature]
    ways: ReadOnly[Way, Ioctl]
    file_name: Path | None = None

    @abstractmethod
    def create_file(self, label: str, size: int) -> int:
        """Return the descriptor of a new file of `size` bytes of this memory, all of it a hole; KernelError if not.

        -1: this memory has no file.
        """

    @abstractmethod
    def check_room(self, size: int) -> None:
        """Raise HostError, with the command that mends it, where the host has not got `size` bytes of it now."""

    @abstractmethod
    def zero_way(self, *, alias: bool) -> Way:
        """Say how a page of zeros is placed; CONTINUE means: after Mapping.fill_holes()."""

    def check_region(self, region: Region) -> None:
        """Raise UsageError where the region is of another type or page size."""
        if region.type != self.name or region.page_size != self.page_size:
            raise UsageError(
                f"region {region.index} is {region.type} with pages of {region.page_size} bytes, "
                f"not {self.name} with {self.page_size}"
            )

    def room_for(self, size: int, data: int) -> int:
        """Return how many bytes of the host's memory a region of `size` bytes takes that will hold `data` bytes."""
        return min(size, data) if self.thin else size

    def allocate(self, region: Region, alias: bool = True, data: int | None = None) -> Mapping:
        """Return the region's memory, all zeros and not yet there, with a second mapping if `alias`.

        `data` is how many bytes of it will be written; None: all. Raises UsageError (the region is of another type),
        HostError (no room, no such memory on this host).
        """
        self.check_region(region)
        self.check_room(self.room_for(region.size, region.size if data is None else data))
        try:
            fd = self.create_file(f"postcopy-{region.index}", region.size)
        except KernelError as refused:
            raise HostError(f"region {region.index} ({region.type}, {region.size} bytes): {refused}") from refused
        mapping = Mapping(region, fd, alias=alias and self.alias, file_name=self.file_name)
        try:
            self.prepare(mapping)
        except BaseException:
            mapping.close()
            raise
        return mapping

    def prepare(self, mapping: Mapping) -> None:  # noqa: B027 - most types need nothing
        """Do what must be done to a fresh mapping before it is used."""

    def modes_for(self, *, alias: bool) -> Mode:
        """Return the modes a destination registers: with an alias always both, or holes are zeros without a fault."""
        return self.modes & (Mode.MISSING | Mode.MINOR if alias else Mode.MISSING)

    def features_for(self, modes: Mode) -> Feature:
        """Return the features that must be enabled before `modes` can be registered on it."""
        needed = Feature(0)
        for mode in modes:
            needed |= self.features.get(mode, Feature(0))
        return needed

    def ioctls_for(self, *ways: Way) -> Ioctl:
        """Return the ioctls that must be granted to place pages in these ways, and to wake."""
        needed = _COMMON
        for way in ways:
            if way not in self.ways:
                raise UsageError(f"{self.name}: a page cannot be placed by {way}")
            needed |= self.ways[way]
        return needed

    @property
    def spare(self) -> bool:
        """Whether there is a page of it to try things on, and trying takes no time to speak of."""
        return True

    def probe(self, combinations: tuple[Mode, ...] = PROBED_MODES, *, performing: bool = False) -> TypeGrants:
        """Try each combination of modes on one page and say what was granted; never raises.

        `performing`: each ioctl that is granted is performed once as well.
        """
        region = Region(0, self.name, self.page_size, self.page_size)
        try:
            fd = self.create_file("postcopy-probe", self.page_size)
            # Without a reservation: what REGISTER answers does not depend on a page being free.
            mapping = Mapping(region, fd, alias=False, reserve=False)
        except (KernelError, HostError) as refused:
            return TypeGrants(self.name, self.page_size, (), f"{self.name}: {refused}")
        with mapping:
            try:
                grants = tuple(self._try(mapping, modes, performing=performing) for modes in combinations)
            except (KernelError, HostError) as refused:
                return TypeGrants(self.name, self.page_size, (), str(refused))
        try:
            self.check_room(self.page_size)
        except HostError as short:
            return TypeGrants(self.name, self.page_size, grants, str(short))
        return TypeGrants(self.name, self.page_size, grants, None)

    def _try(self, mapping: Mapping, modes: Mode, *, performing: bool = False) -> ModeGrant:
        """Register the page with a descriptor that is thrown away, and say what came of it. HostError: none is had."""
        address = mapping.address
        with Userfaultfd.open(optional=self.features_for(modes), allow_user_mode_only=True) as uffd:
            try:
                granted = uffd.register(address, self.page_size, modes)
            except KernelError as refused:
                return ModeGrant(modes, None, refused.number)
            untried = NO_IOCTLS if self.spare else granted & TAKES_A_PAGE
            refusals = perform(uffd, mapping, granted & ~untried) if performing else {}
            uffd.unregister(address, self.page_size)
            return ModeGrant(modes, granted, refused=refusals, untried=untried if performing else granted)


def describe_size(size: int) -> str:
    """Return a size for an error's text: the round form and the bytes."""
    return f"{format_size(size)} ({size} bytes)"
