"""WHERE do bytes come from and land? The userfaultfd binding, the memory types, what this host can do.

In: regions, addresses, bytes. Out: mappings, page-fault messages, outcomes.
"""

from postcopy.kernel.abi import Category, Feature, Ioctl, Mode, ScanFlag
from postcopy.kernel.events import Fork, Message, PageFault, Remap, Remove, Unmap
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.memory_type import MemoryType, Way
from postcopy.kernel.opening import OpenedBy
from postcopy.kernel.outcome import Outcome, Placed
from postcopy.kernel.pagemap import Filter, Pagemap, PageRange
from postcopy.kernel.probe import Need, probe_host, require
from postcopy.kernel.types import MEMORY_TYPES, memory_type, memory_type_at, memory_types_in
from postcopy.kernel.userfaultfd import Userfaultfd

__all__ = [
    "MEMORY_TYPES",
    "Category",
    "Feature",
    "Filter",
    "Fork",
    "Ioctl",
    "Mapping",
    "MemoryType",
    "Message",
    "Mode",
    "Need",
    "OpenedBy",
    "Outcome",
    "PageFault",
    "PageRange",
    "Pagemap",
    "Placed",
    "Remap",
    "Remove",
    "ScanFlag",
    "Unmap",
    "Userfaultfd",
    "Way",
    "memory_type",
    "memory_type_at",
    "memory_types_in",
    "probe_host",
    "require",
]
