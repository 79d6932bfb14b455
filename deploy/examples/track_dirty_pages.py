"""Dirty pages without a fault: write protection that the kernel takes away by itself (Linux 6.7).

The log that a precopy needs: each look returns the pages that were written since the one before, and protects them
again in the same step, so that no write is lost between the two.
"""

from postcopy.kernel import Feature, Mode, Pagemap, Userfaultfd, memory_type
from postcopy.pages import Region

PAGE, PAGES = 4096, 64


def main():
    memory = memory_type("shmem").allocate(Region(0, "shmem", PAGE, PAGES * PAGE), alias=False)
    features = Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLB_SHMEM
    with memory, Userfaultfd.open(features) as uffd, Pagemap() as pagemap:
        start, stop = memory.address, memory.address + PAGES * PAGE
        memory.write(0, bytes(PAGES * PAGE))
        uffd.register(start, stop - start, Mode.WP)
        uffd.writeprotect(start, stop - start, protect=True)
        for written in ([3, 4, 5], [5, 60], []):
            for page in written:
                memory.write(page * PAGE, b"new")
            dirty = pagemap.written_and_protect(start, stop)
            pages = [page for run in dirty for page in range((run.start - start) // PAGE, (run.stop - start) // PAGE)]
            print(f"written: {pages}")
            assert pages == written


if __name__ == "__main__":
    main()
