/*
 * Which page does a vCPU visit next?
 *
 * A workload is a sequence of passes. A pass visits a fixed multiset of the guest's active pages, in an order that is
 * a function of the seed, the vCPU and the number of the pass. So the visits a page has had are
 * passes * weight(page) + its visits in the pass under way: hours of running are checked without being replayed.
 *
 * Everything here is a pure function of its arguments; no struct owns memory, each may be copied.
 */
#ifndef POSTCOPY_GUEST_WORKLOAD_H
#define POSTCOPY_GUEST_WORKLOAD_H

#include <stdbool.h>
#include <stdint.h>

/* The generator's constants are those of splitmix64: the odd integer nearest 2^64 / golden ratio, and Stafford's
 * thirteenth finaliser. */
#define STREAM_STEP 0x9e3779b97f4a7c15ull
#define STREAM_FACTOR1 0xbf58476d1ce4e5b9ull
#define STREAM_FACTOR2 0x94d049bb133111ebull

/* What a seed is used for; each use draws from a stream of its own. */
enum stream_use { STREAM_CONTENT = 0, STREAM_ORDER = 1, STREAM_SCRAMBLE = 2, STREAM_ROTATION = 3 };

enum workload {
    WORKLOAD_SEQUENTIAL = 0,
    WORKLOAD_STRIDE = 1,
    WORKLOAD_RANDOM = 2,
    WORKLOAD_ZIPF = 3,
    WORKLOAD_INCREMENT = 4,
    WORKLOAD_COUNT = 5,
};

static inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * STREAM_FACTOR1;
    x = (x ^ (x >> 27)) * STREAM_FACTOR2;
    return x ^ (x >> 31);
}

/* Number `index` of the stream that `key` starts: random access to splitmix64. One to one in `index`. */
static inline uint64_t stream(uint64_t key, uint64_t index) {
    return mix(key + STREAM_STEP * (index + 1));
}

#define PERMUTATION_ROUNDS 3

/* A keyed bijection of 0..size-1: rounds of add, odd multiplication and xorshift, each a bijection of `bits` bits,
 * and walking the cycle until it comes back below `size` (under two rounds of rounds on average). */
struct permutation {
    uint64_t size;
    uint64_t mask;
    uint32_t shift;
    uint64_t add[PERMUTATION_ROUNDS];
    uint64_t multiply[PERMUTATION_ROUNDS];
};

void permutation_init(struct permutation *permutation, uint64_t size, uint64_t key);

/* What is the same for all vCPUs. */
struct order {
    enum workload workload;
    uint32_t vcpus;
    bool random_start;
    uint64_t seed;
    uint64_t pages;      /* active pages, 1..GUEST_PAGES_MAX */
    uint64_t stride;     /* coprime to pages, below pages (or 1) */
    uint64_t pass_steps; /* steps in one pass: pages, for zipf pages * levels */
    struct permutation scramble; /* zipf: rank to page, the same for all vCPUs: one hot set */
};

/* Where one vCPU is. `pass` and `position` say it all; the rest follows from them and saves work in each step. */
struct cursor {
    uint64_t pass;
    uint64_t position; /* 0..pass_steps-1: the step that comes next */
    uint64_t page;     /* sequential, stride, increment: the page that comes next */
    uint64_t key;      /* of this vCPU's passes */
    struct permutation slots; /* random, zipf: the order of this pass */
};

/* False if the arguments are out of range (see the fields of struct order). */
bool order_init(struct order *order, enum workload workload, uint32_t vcpus, uint64_t seed, uint64_t pages,
                uint64_t stride, bool random_start);

/* Put the cursor of `vcpu` before step `position` of pass `pass`. False if position is not inside a pass. */
bool order_seek(const struct order *order, uint32_t vcpu, uint64_t pass, uint64_t position, struct cursor *cursor);

/* The page of the step that comes next; the cursor moves on. */
uint64_t order_next(const struct order *order, struct cursor *cursor);

/* Visits to `page` in a whole pass, for zipf only through order_weights: weights[page] for every active page. */
void order_weights(const struct order *order, uint32_t *weights);

/* Visits to each active page in the steps 0..position-1 of pass `pass`, added up in visits[page]. */
bool order_visits(const struct order *order, uint32_t vcpu, uint64_t pass, uint64_t position, uint32_t *visits);

#endif
