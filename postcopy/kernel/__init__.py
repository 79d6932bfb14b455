"""WHERE do bytes come from and land? The userfaultfd binding, the memory types, what this host can do.

In: regions, addresses, bytes. Out: mappings, page-fault messages, outcomes.
"""

from postcopy.kernel.abi import Feature, Ioctl, Mode
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.memory_type import MemoryType, Way
from postcopy.kernel.opening import OpenedBy
from postcopy.kernel.outcome import Outcome, Placed
from postcopy.kernel.pagemap import Pagemap
from postcopy.kernel.probe import Need, probe_host, require
from postcopy.kernel.types import MEMORY_TYPES, memory_type, memory_type_at, memory_types_in
from postcopy.kernel.userfaultfd import Userfaultfd

__all__ = [
    "MEMORY_TYPES",
    "Feature",
    "Ioctl",
    "Mapping",
    "MemoryType",
    "Mode",
    "Need",
    "OpenedBy",
    "Outcome",
    "Pagemap",
    "Placed",
    "Userfaultfd",
    "Way",
    "memory_type",
    "memory_type_at",
    "memory_types_in",
    "probe_host",
    "require",
]
