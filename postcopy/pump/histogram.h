/*
 * A log-linear histogram of nanoseconds: 32 linear buckets to an octave, so a value is known to about 3 %.
 *
 * One thread records, any thread reads. Every field is a relaxed atomic: a reader sees each counter whole, and the
 * counters agree with each other to within the records that happen while it reads. The owner of the memory is the
 * block that embeds the struct; nothing here allocates.
 */
#ifndef POSTCOPY_HISTOGRAM_H
#define POSTCOPY_HISTOGRAM_H

#include <stdatomic.h>
#include <stdint.h>

#define HIST_SUB_BITS 5
#define HIST_SUB (1u << HIST_SUB_BITS)
/* The last octave holds 2^39 to 2^40 ns (18 minutes); anything longer is counted there, and in max as it is. */
#define HIST_OCTAVE_MAX 39
#define HIST_BUCKETS ((HIST_OCTAVE_MAX - HIST_SUB_BITS + 2) * HIST_SUB)

struct hist {
    _Atomic uint64_t count;
    _Atomic uint64_t sum;
    _Atomic uint64_t max;
    _Atomic uint64_t bucket[HIST_BUCKETS];
};

_Static_assert(HIST_BUCKETS == 1152, "the Python side counts on 1152 buckets");
_Static_assert(sizeof(struct hist) == (3 + HIST_BUCKETS) * 8, "the Python side reads this as an array of u64");

/* Values below 2 * HIST_SUB have a bucket each; from there on bucket i of octave e begins at (32 + i) << (e - 5). */
static inline uint32_t hist_index(uint64_t ns) {
    if (ns < 2 * HIST_SUB)
        return (uint32_t)ns;
    uint32_t octave = 63u - (uint32_t)__builtin_clzll(ns);
    if (octave > HIST_OCTAVE_MAX)
        return HIST_BUCKETS - 1;
    return (octave - HIST_SUB_BITS) * HIST_SUB + (uint32_t)(ns >> (octave - HIST_SUB_BITS));
}

static inline void hist_add(_Atomic uint64_t *counter, uint64_t amount) {
    /* One writer: a load and a store do, a locked add is not needed. */
    uint64_t now = atomic_load_explicit(counter, memory_order_relaxed);
    atomic_store_explicit(counter, now + amount, memory_order_relaxed);
}

static inline void hist_record(struct hist *hist, uint64_t ns) {
    hist_add(&hist->bucket[hist_index(ns)], 1);
    hist_add(&hist->sum, ns);
    if (ns > atomic_load_explicit(&hist->max, memory_order_relaxed))
        atomic_store_explicit(&hist->max, ns, memory_order_relaxed);
    hist_add(&hist->count, 1);
}

#endif
