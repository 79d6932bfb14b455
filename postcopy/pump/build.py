"""Builds postcopy.pump._pump, the data plane's C, with cffi (API mode, out of line)."""

from pathlib import Path
from runpy import run_path

from cffi import FFI

HERE = Path("postcopy/pump")
SOURCES = [
    "answer.c",
    "content.c",
    "demand.c",
    "destination.c",
    "foreign.c",
    "half.c",
    "order.c",
    "place.c",
    "receive.c",
    "recover.c",
    "removal.c",
    "source.c",
    "thread.c",
    "tls.c",
    "view.c",
    "wait.c",
    "window.c",
]
HEADERS = [
    "beat.h",
    "channel.h",
    "destination.h",
    "frame.h",
    "half.h",
    "histogram.h",
    "page_map.h",
    "place.h",
    "pump.h",
    "source.h",
    "thread.h",
    "tls.h",
    "tls_library.h",
    "trace.h",
    "wait.h",
    "window.h",
]

# What is awkward to call from Python, and static inline functions of the headers, so that tests can compare them with
# their Python models.
GLUE = """
#include "destination.h"
#include "window.h"
#include <string.h>
static int frame_check_bytes(const void *header, uint32_t allowed, const struct frame_bounds *bounds, uint32_t count) {
    struct frame frame;
    memcpy(&frame, header, sizeof frame);
    return frame_check(&frame, allowed, bounds, count);
}
static bool page_map_claim(uint8_t *pages, uint64_t page) { return page_claim((page_byte *)pages + page); }
static uint64_t page_map_zero(uint8_t *pages, uint64_t first, uint64_t stop) {
    return pages_zero((page_byte *)pages, first, stop);
}
static uint64_t page_map_absent(const uint8_t *pages, uint64_t first, uint64_t stop) {
    return pages_absent((const page_byte *)pages, first, stop);
}
static bool page_map_placed(uint8_t *pages, uint64_t first, uint64_t count) {
    return pages_placed((page_byte *)pages + first, count);
}
static bool page_map_release(uint8_t *pages, uint64_t page) { return page_release((page_byte *)pages + page); }
static uint8_t page_map_discard(uint8_t *pages, uint64_t page) { return page_discard((page_byte *)pages + page); }
static uint64_t page_map_kept(uint8_t *pages, uint64_t first, uint64_t count) {
    return pages_kept((page_byte *)pages + first, count);
}
static uint64_t staging_payload(const struct destination *pump, uint32_t role) {
    return (uint64_t)(uintptr_t)(role == ROLE_PUSH ? pump->push : pump->urgent).staging + STAGING_PAYLOAD;
}
static ssize_t tls_put(struct tls *tls, const void *data, size_t size) {
    struct iovec part = {.iov_base = (void *)(uintptr_t)data, .iov_len = size};
    return tls_send(tls, &part, 1);
}
static ssize_t tls_take(struct tls *tls, void *room, size_t size) {
    struct iovec part = {.iov_base = room, .iov_len = size};
    return tls_receive(tls, &part, 1);
}
static uint64_t trace_where_of(uint64_t page, uint32_t region, uint32_t found, uint32_t thread) {
    return trace_where(page, region, found, thread);
}
static uint32_t hist_index_of(uint64_t ns) { return hist_index(ns); }
static void waiter_begin(struct waiter *waiter, uint64_t window_ns, const void *busy) {
    *waiter = (struct waiter){.window_ns = window_ns, .busy = busy};
}
/* How many of a snapshot's values are in the buckets before each of the ends, which ascend. */
static void hist_below(const int64_t *buckets, const uint32_t *ends, uint32_t count, int64_t *below) {
    int64_t sum = 0;
    for (uint32_t i = 0, bucket = 0; i < count; i++) {
        for (; bucket < ends[i]; bucket++)
            sum += buckets[bucket];
        below[i] = sum;
    }
}
static void hist_add_up(int64_t *buckets, const int64_t *others) {
    for (uint32_t i = 0; i < HIST_BUCKETS; i++)
        buckets[i] += others[i];
}
"""

# By its path, for nothing of the package need be importable where it is built.
limits = run_path(str(Path(__file__).parents[1] / "limits.py"))

ffibuilder = FFI()
ffibuilder.cdef((Path(__file__).parent / "pump.cdef").read_text(encoding="utf-8"))
ffibuilder.set_source(
    "postcopy.pump._pump",
    GLUE,
    sources=[str(HERE / name) for name in SOURCES],
    include_dirs=[str(HERE)],
    define_macros=limits["macros"](limits["PUMP_IN_C"]),
    depends=[*(str(HERE / name) for name in [*HEADERS, "pump.cdef"]), "postcopy/limits.py"],
    # The page map is read eight bytes at a time as well as one by one.
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
