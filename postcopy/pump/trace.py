"""A trace of faults, each as 16 bytes in a ring that the pump writes: made before a migration, written out after it.

The format of its file: one line of JSON (`faults` that follow, `lost` ones that the ring had no room for, `regions`,
`began_ns` when the pump was made by this host's CLOCK_MONOTONIC), then the faults, the earliest settled first, little
endian: u32 microseconds since the pump was made, u32 latency in nanoseconds, u64 page | region << 34 | found << 40 |
thread << 42. `found` says how the fault found its page: 0 absent, so it was asked for; 1 on its way; 2 here already.
"""

from __future__ import annotations

import json
import mmap
import struct
import time
from pathlib import Path
from typing import Any

from postcopy.errors import HostError
from postcopy.pages.regions import Layout
from postcopy.pump._pump import ffi

SCHEMA_VERSION = 1
HEADER = struct.Struct("<QQQ5Q")  # struct trace
RECORD_BYTES = 16
# 16 MiB: half a minute at the highest rate of faults that was seen.
FAULTS = 1 << 20


class FaultTrace:
    """Room for the latest `faults` (a power of two) faults of a migration; one pump at a time writes to it."""

    def __init__(self, faults: int = FAULTS) -> None:
        if faults < 1 or faults & (faults - 1):
            raise ValueError(f"{faults} faults: a ring has a power of two")
        self.capacity = faults
        try:
            # Populated: the first fault of the guest must not wait for one of ours.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
            self._ring = mmap.mmap(-1, HEADER.size + faults * RECORD_BYTES, flags=flags)
        except OSError as error:
            raise HostError(f"no room for a trace of {faults} faults: {error.strerror}") from error
        self.begin()

    def begin(self) -> None:
        """Forget what was recorded, and count time from now on."""
        self._ring[: HEADER.size] = HEADER.pack(self.capacity, time.monotonic_ns(), 0, 0, 0, 0, 0, 0)

    @property
    def pointer(self) -> Any:
        """The ring in C."""
        return ffi.cast("struct trace *", ffi.from_buffer(self._ring))

    @property
    def recorded(self) -> int:
        """How many faults were recorded, with those that the ring has no room for."""
        return int(HEADER.unpack_from(self._ring)[2])

    def faults(self) -> bytes:
        """Return the recorded faults that are still there, the earliest first. Only once the pump is done with them."""
        recorded, size = self.recorded, self.capacity * RECORD_BYTES
        begin = HEADER.size
        if recorded <= self.capacity:
            return self._ring[begin : begin + recorded * RECORD_BYTES]
        oldest = begin + (recorded % self.capacity) * RECORD_BYTES
        return self._ring[oldest : begin + size] + self._ring[begin:oldest]

    def write(self, file: Path, layout: Layout) -> int:
        """Write the trace of a migration of this layout, and return how many faults are in it. Raises OSError."""
        faults = self.faults()
        count = len(faults) // RECORD_BYTES
        head = {
            "schema_version": SCHEMA_VERSION,
            "faults": count,
            "lost": self.recorded - count,
            "began_ns": HEADER.unpack_from(self._ring)[1],
            "regions": [
                {"type": region.type, "page_size": region.page_size, "size_bytes": region.size}
                for region in layout.regions
            ],
        }
        file.write_bytes(json.dumps(head).encode() + b"\n" + faults)
        return count
