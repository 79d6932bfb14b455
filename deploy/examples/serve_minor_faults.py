"""userfaultfd by itself: memory that is filled when it is touched.

Shared memory is there twice: a thread touches the mapping, whose faults are trapped, and this program puts content into
the file behind it, then has the kernel map what is there now (UFFDIO_CONTINUE). Nothing of a migration is involved.
"""

import threading
from os import pwrite

from postcopy.kernel import Feature, Mode, Outcome, PageFault, Userfaultfd, memory_type
from postcopy.pages import Region

PAGE, PAGES = 4096, 16


def touch(memory):
    """Read one byte of each page. Mapping.read gives the GIL up, so that Python can serve the faults meanwhile."""
    print(bytes(memory.read(page * PAGE, 1)[0] for page in range(PAGES)).decode())


def main():
    shmem = memory_type("shmem")
    memory = shmem.allocate(Region(0, "shmem", PAGE, PAGES * PAGE), alias=False)
    with memory, Userfaultfd.open(Feature.MINOR_SHMEM | Feature.MISSING_SHMEM) as uffd:
        uffd.register(memory.address, PAGES * PAGE, Mode.MINOR | Mode.MISSING)
        thread = threading.Thread(target=touch, args=[memory])
        thread.start()
        served = 0
        while served < PAGES and uffd.poll(timeout_seconds=10):
            for fault in uffd.read():
                assert isinstance(fault, PageFault)  # no other event was asked for
                offset = (fault.address - memory.address) // PAGE * PAGE
                pwrite(memory.fd, bytes([ord("a") + offset // PAGE]) * PAGE, offset)
                placed = uffd.continue_(memory.address + offset, PAGE)  # wakes the thread, too
                assert placed.outcome is Outcome.PLACED
                served += 1
        thread.join()
        print(f"{served} faults were served")


if __name__ == "__main__":
    main()
