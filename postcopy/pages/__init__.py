"""WHAT is a page? Regions and their arithmetic, extents, bitmaps, the ledger of a region, sizes as typed.

Pure: nothing here touches a kernel, a clock or a network. Everything is in bytes from the start of a region
(`offset`, `length`) or in page numbers from 0 (`page`).
"""

from postcopy.pages.bitmap import Bitmap
from postcopy.pages.extents import Extent, coalesce, split
from postcopy.pages.ledger import Action, Ledger, PageState
from postcopy.pages.regions import Layout, Region
from postcopy.pages.units import format_rate, format_seconds, format_size, parse_rate, parse_size

__all__ = [
    "Action",
    "Bitmap",
    "Extent",
    "Layout",
    "Ledger",
    "PageState",
    "Region",
    "coalesce",
    "format_rate",
    "format_seconds",
    "format_size",
    "parse_rate",
    "parse_size",
    "split",
]
