"""Regions and the layout of a guest's memory.

What enters: what the user or the other agent says of a region (type, page size, size). What leaves: values
that are known to be sound, and the arithmetic between offsets in bytes and page numbers, each conversion by
name.
"""

from __future__ import annotations

from dataclasses import dataclass

from postcopy.errors import ProtocolError, UsageError
from postcopy.limits import REGION_SIZE_MAX


@dataclass(frozen=True, slots=True)
class Region:
    """One contiguous piece of guest memory: `index`, memory `type`, `page_size` and `size` in bytes.

    Raises UsageError where the numbers make no sense.
    """

    index: int
    type: str
    page_size: int
    size: int

    def __post_init__(self) -> None:
        if self.index < 0:
            raise UsageError(f"region {self.index}: the index is negative")
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise UsageError(f"region {self.index}: page size {self.page_size} is not a power of two")
        if self.size < 1:
            raise UsageError(f"region {self.index}: size {self.size} is not above zero")
        if self.size >= REGION_SIZE_MAX:
            raise UsageError(f"region {self.index}: size {self.size} is beyond 2**63")
        if self.size % self.page_size:
            raise UsageError(
                f"region {self.index}: size {self.size} is not a multiple of the page size {self.page_size}"
            )

    @property
    def pages(self) -> int:
        """Number of pages."""
        return self.size // self.page_size

    def page_of(self, offset: int) -> int:
        """Return the number of the page that holds the byte at `offset`."""
        if not 0 <= offset < self.size:
            raise ValueError(f"offset {offset:#x} is outside region {self.index} of {self.size:#x} bytes")
        return offset // self.page_size

    def offset_of(self, page: int) -> int:
        """Return the offset in bytes at which page number `page` begins."""
        if not 0 <= page < self.pages:
            raise ValueError(f"page {page} is outside region {self.index} of {self.pages} pages")
        return page * self.page_size

    def contains(self, offset: int, length: int) -> bool:
        """Say whether `length` bytes from `offset` are all inside the region; no bytes at all are not."""
        return length > 0 and offset >= 0 and offset + length <= self.size

    def aligned(self, offset: int, length: int) -> bool:
        """Say whether `offset` and `length` are whole pages and at least one."""
        return length > 0 and (offset | length) % self.page_size == 0


@dataclass(frozen=True, slots=True)
class Layout:
    """All regions of one guest, in the order of their indexes 0, 1, 2 …; at least one."""

    regions: tuple[Region, ...]

    def __post_init__(self) -> None:
        if not self.regions:
            raise UsageError("a layout needs at least one region")
        for position, region in enumerate(self.regions):
            if region.index != position:
                raise UsageError(f"region {region.index} stands at position {position} of its layout")

    @property
    def size(self) -> int:
        """Bytes of all regions together."""
        return sum(region.size for region in self.regions)

    @property
    def pages(self) -> int:
        """Pages of all regions together, whatever their sizes."""
        return sum(region.pages for region in self.regions)

    def region(self, index: int) -> Region:
        """Return the region with this index; ProtocolError if the guest has none such."""
        if not 0 <= index < len(self.regions):
            raise ProtocolError(f"unknown region {index}: the layout has {len(self.regions)}")
        return self.regions[index]
