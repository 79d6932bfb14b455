"""Memory that KVM makes for guests (guest_memfd): used where the kernel lets userfaultfd trap it, refused elsewhere.

Up to Linux 6.18 it can be made, mapped and touched, and every mode of REGISTER answers EINVAL. Nothing here looks at
the version: a page of it is made and tried.
"""

from __future__ import annotations

import mmap
import os
import struct
from errno import EINVAL

from postcopy.errors import HostError, KernelError
from postcopy.kernel import calls
from postcopy.kernel.abi import Feature, Ioctl, Mode
from postcopy.kernel.kvm import DEVICE, IOC_CREATE_GUEST_MEMFD, IOC_CREATE_VM
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.memory_type import MemoryType, Way
from postcopy.kernel.shmem import require_room
from postcopy.pages.regions import Region

CREATE_ARGUMENT = struct.Struct("=8Q")  # struct kvm_create_guest_memfd: size, flags, six reserved
MAPPABLE = 1 << 0 | 1 << 1  # GUEST_MEMFD_FLAG_MMAP, GUEST_MEMFD_FLAG_INIT_SHARED
# MINOR alone would read holes as zeros, without a fault.
NEEDED = Mode.MISSING | Mode.MINOR


class GuestMemfd(MemoryType):
    """guest_memfd that is shared with the host and mapped there; no kernel seen so far traps its faults."""

    name = "guest_memfd"
    page_size = mmap.PAGESIZE
    alias = True
    modes = NEEDED
    features: dict[Mode, Feature] = {}  # noqa: RUF012 - none is known yet: what can be registered is tried
    ways = {Way.COPY: Ioctl.COPY, Way.CONTINUE: Ioctl.CONTINUE}  # noqa: RUF012 - never changed

    def create_file(self, label: str, size: int) -> int:  # noqa: ARG002 - it has no name
        """Return memory of a virtual machine that exists for its sake only."""
        try:
            device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as refused:
            raise KernelError(f"open {DEVICE}", refused.errno or EINVAL) from refused
        try:
            machine = calls.ioctl_value(device, IOC_CREATE_VM, 0)
        finally:
            os.close(device)
        if machine < 0:
            raise KernelError("KVM_CREATE_VM", -machine)
        try:
            fd = calls.ioctl(machine, IOC_CREATE_GUEST_MEMFD, bytearray(CREATE_ARGUMENT.pack(size, MAPPABLE, *[0] * 6)))
        finally:
            os.close(machine)
        if fd < 0:
            raise KernelError("KVM_CREATE_GUEST_MEMFD", -fd, "that user space can map")
        return fd

    def check_room(self, size: int) -> None:
        """Compare with what is available, once it is clear that such memory can be trapped at all."""
        refusal = self._refusal()
        if refusal is not None:
            raise HostError(refusal)
        require_room(self.name, size)

    def zero_way(self, *, alias: bool) -> Way:
        """CONTINUE of a fresh page where there is an alias, else COPY of zeros."""
        return Way.CONTINUE if alias else Way.COPY

    def _refusal(self) -> str | None:
        """Say why this host cannot migrate such memory, None where it can."""
        try:
            fd = self.create_file("", self.page_size)
            with Mapping(Region(0, self.name, self.page_size, self.page_size), fd, alias=False) as mapping:
                grant = self._try(mapping, NEEDED)
        except (KernelError, HostError) as refused:
            return f"{self.name}: {refused}"
        if grant.ioctls is not None:
            return None
        return (
            f"{self.name}: kernel {os.uname().release} cannot trap its faults: REGISTER answers {_words(grant.number)}"
        )


def _words(number: int) -> str:
    return str(KernelError("REGISTER", number)).removeprefix("REGISTER: ")
