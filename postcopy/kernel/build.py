"""Builds postcopy.kernel._kernel: the system calls that take addresses, which Python's own library lacks.

cffi in API mode, out of line. Every function gives the GIL up while it runs, so a thread that waits in a page
fault inside one of them does not keep the Python thread from running that is to serve the fault.
"""

from cffi import FFI

DECLARATIONS = """
int system_userfaultfd(int flags);
long system_ioctl(int descriptor, unsigned long request, void *argument);
void *mmap(void *address, size_t length, int protection, int flags, int descriptor, int64_t offset);
void *mremap(void *address, size_t length, size_t length_new, int flags, ...);
int munmap(void *address, size_t length);
int madvise(void *address, size_t length, int advice);
int fallocate(int descriptor, int mode, int64_t offset, int64_t length);
void *memcpy(void *destination, const void *source, size_t length);
#define MAP_FIXED ...
#define MAP_NORESERVE ...
#define MREMAP_FIXED ...
#define MREMAP_MAYMOVE ...
#define MREMAP_DONTUNMAP ...
#define MADV_NOHUGEPAGE ...
#define MADV_HUGEPAGE ...
#define MADV_DONTDUMP ...
#define MADV_DONTNEED ...
#define MADV_REMOVE ...
#define FALLOC_FL_KEEP_SIZE ...
#define FALLOC_FL_PUNCH_HOLE ...
"""

SOURCE = """
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

_Static_assert(sizeof(void *) == 8, "addresses are 64 bits wide in the userfaultfd ABI");
_Static_assert(sizeof(off_t) == 8, "offsets are 64 bits wide");

/* glibc has no wrapper for it. Returns a descriptor, or -1 with errno. */
static int system_userfaultfd(int flags) {
    return (int)syscall(SYS_userfaultfd, flags);
}

/* Returns the call's result, or -errno: one value, so that nothing can come between the call and its errno. */
static long system_ioctl(int descriptor, unsigned long request, void *argument) {
    long result = ioctl(descriptor, request, argument);
    return result < 0 ? -(long)errno : result;
}
"""

ffibuilder = FFI()
ffibuilder.cdef(DECLARATIONS)
ffibuilder.set_source(
    "postcopy.kernel._kernel",
    SOURCE,
    define_macros=[("_GNU_SOURCE", "1"), ("_FILE_OFFSET_BITS", "64")],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
