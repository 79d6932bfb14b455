"""WHO uses the memory? Guests: something that runs on the regions, can be stopped, saved, restored and checked.

In: mappings of memory, a workload or the state of a guest that ran elsewhere. Out: page faults, device state, the
guest's own measure of its stalls, and the verdict whether every byte is what it must be.
"""

from postcopy.guest.emulated import Guest
from postcopy.guest.state import WORKLOADS, GuestState, Position
from postcopy.guest.vcpus import GuestMemory, GuestStuckError, WorkloadGuest
from postcopy.guest.verdict import CheckResult

__all__ = [
    "WORKLOADS",
    "CheckResult",
    "Guest",
    "GuestMemory",
    "GuestState",
    "GuestStuckError",
    "Position",
    "WorkloadGuest",
]
