/*
 * A trace of faults: a ring of 16 bytes each, written by the demand thread when a fault is settled, the oldest first
 * to go. The memory is the caller's, made and filled in before the pump starts and kept until it is destroyed; any
 * thread may read `recorded`, the faults themselves once the pump has stopped.
 */
#ifndef POSTCOPY_TRACE_H
#define POSTCOPY_TRACE_H

#include <stdatomic.h>
#include <stdint.h>

/* How a fault found its page, by its state at that moment. */
enum trace_found { FOUND_ABSENT = 0, FOUND_COMING = 1, FOUND_HERE = 2 };

#define TRACE_PAGE_BITS 34u
#define TRACE_REGION_BITS 6u
#define TRACE_FOUND_BITS 2u
/* The rest is the thread's id: PID_MAX_LIMIT is 2^22. */
#define TRACE_THREAD_BITS 22u

struct trace_fault {
    uint32_t at_us;      /* when it was read, since `since_ns`; wraps after 71 minutes */
    uint32_t latency_ns; /* at most 4.29 s */
    uint64_t where;      /* page | region << 34 | found << 40 | thread << 42 */
};

struct trace {
    uint64_t capacity; /* a power of two */
    uint64_t since_ns;
    _Atomic uint64_t recorded; /* of which the last `capacity` are there */
    uint64_t spare[5];
    struct trace_fault faults[];
};

_Static_assert(sizeof(struct trace_fault) == 16, "the file's format");
_Static_assert(sizeof(struct trace) == 64, "the Python side leaves so much room");
_Static_assert(TRACE_PAGE_BITS + TRACE_REGION_BITS + TRACE_FOUND_BITS + TRACE_THREAD_BITS == 64, "one word");

static inline uint64_t trace_where(uint64_t page, uint32_t region, uint32_t found, uint32_t thread) {
    return (page & ((1ull << TRACE_PAGE_BITS) - 1)) | (uint64_t)region << TRACE_PAGE_BITS |
           (uint64_t)found << (TRACE_PAGE_BITS + TRACE_REGION_BITS) |
           (uint64_t)thread << (TRACE_PAGE_BITS + TRACE_REGION_BITS + TRACE_FOUND_BITS);
}

static inline void trace_record(struct trace *trace, uint64_t where, uint64_t read_at, uint64_t latency_ns) {
    uint64_t number = atomic_load_explicit(&trace->recorded, memory_order_relaxed);
    trace->faults[number & (trace->capacity - 1)] = (struct trace_fault){
        .at_us = (uint32_t)((read_at - trace->since_ns) / 1000),
        .latency_ns = latency_ns < UINT32_MAX ? (uint32_t)latency_ns : UINT32_MAX,
        .where = where,
    };
    atomic_store_explicit(&trace->recorded, number + 1, memory_order_release);
}

#endif
