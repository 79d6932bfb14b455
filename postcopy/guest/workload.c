/* Which page does a vCPU visit next? See workload.h. In: seed, vCPU, pass, position. Out: active page numbers. */
#include "workload.h"

void permutation_init(struct permutation *permutation, uint64_t size, uint64_t key) {
    uint32_t bits = size > 1 ? 64u - (uint32_t)__builtin_clzll(size - 1) : 0;
    permutation->size = size;
    permutation->mask = bits < 64 ? (1ull << bits) - 1 : UINT64_MAX;
    /* Half the bits: what the multiplication carried up comes down to the low ones. Never 0, which would be no
     * bijection. */
    permutation->shift = bits > 2 ? (bits + 1) / 2 : 1;
    for (uint32_t round = 0; round < PERMUTATION_ROUNDS; round++) {
        permutation->add[round] = stream(key, 2ull * round);
        permutation->multiply[round] = stream(key, 2ull * round + 1) | 1;
    }
}

static inline uint64_t permutation_at(const struct permutation *permutation, uint64_t index) {
    do {
        for (uint32_t round = 0; round < PERMUTATION_ROUNDS; round++) {
            index = (index + permutation->add[round]) * permutation->multiply[round] & permutation->mask;
            index ^= index >> permutation->shift;
        }
    } while (index >= permutation->size);
    return index;
}

static uint64_t common_divisor(uint64_t a, uint64_t b) {
    while (b != 0) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* Octaves of the zipf order: pages >> level is at least 1 on each. */
static inline uint32_t order_levels(uint64_t pages) {
    return 64u - (uint32_t)__builtin_clzll(pages);
}

bool order_init(struct order *order, enum workload workload, uint32_t vcpus, uint64_t seed, uint64_t pages,
                uint64_t stride, bool random_start) {
    if (workload >= WORKLOAD_COUNT || vcpus == 0 || pages == 0 || pages > GUEST_PAGES_MAX)
        return false;
    if (stride == 0 || (stride >= pages && stride != 1) || common_divisor(stride, pages) != 1)
        return false;
    *order = (struct order){
        .workload = workload,
        .vcpus = vcpus,
        .random_start = random_start,
        .seed = seed,
        .pages = pages,
        .stride = workload == WORKLOAD_STRIDE ? stride : 1,
        .pass_steps = workload == WORKLOAD_ZIPF ? pages * order_levels(pages) : pages,
    };
    permutation_init(&order->scramble, pages, stream(seed, STREAM_SCRAMBLE));
    return true;
}

/* The page at which each pass of a sequential or stride order begins. */
static uint64_t order_rotation(const struct order *order, uint32_t vcpu) {
    if (order->workload == WORKLOAD_INCREMENT)
        return 0; /* its property is about pages in order, from the first */
    if (order->random_start)
        return stream(stream(order->seed, STREAM_ROTATION), vcpu) % order->pages;
    return (uint64_t)vcpu * order->pages / order->vcpus;
}

bool order_seek(const struct order *order, uint32_t vcpu, uint64_t pass, uint64_t position, struct cursor *cursor) {
    if (position >= order->pass_steps || vcpu >= order->vcpus)
        return false;
    cursor->pass = pass;
    cursor->position = position;
    /* 128 bits are not needed: stride and position are below 2^30 in every order that uses this. */
    cursor->page = (order_rotation(order, vcpu) + position % order->pages * order->stride) % order->pages;
    cursor->key = stream(stream(order->seed, STREAM_ORDER), vcpu);
    permutation_init(&cursor->slots, order->pass_steps, stream(cursor->key, pass));
    return true;
}

/* Slot s of a zipf pass: level s / pages, rank (s % pages) >> level. Rank r has 1/2 to 2 times
 * pages / (r + 1) slots, in steps of octaves: a zipf distribution of exponent 1, whose counts in a pass are exact. */
static inline uint64_t zipf_page(const struct order *order, uint64_t slot) {
    uint64_t level = slot / order->pages;
    uint64_t rank = (slot - level * order->pages) >> level;
    return permutation_at(&order->scramble, rank);
}

uint64_t order_next(const struct order *order, struct cursor *cursor) {
    uint64_t page;
    if (order->workload == WORKLOAD_RANDOM) {
        page = permutation_at(&cursor->slots, cursor->position);
    } else if (order->workload == WORKLOAD_ZIPF) {
        page = zipf_page(order, permutation_at(&cursor->slots, cursor->position));
    } else {
        /* After a whole pass of a stride coprime to the pages, this is back where the pass began. */
        page = cursor->page;
        cursor->page = page + order->stride;
        if (cursor->page >= order->pages)
            cursor->page -= order->pages;
    }
    if (++cursor->position == order->pass_steps) {
        cursor->position = 0;
        cursor->pass++;
        if (order->workload == WORKLOAD_RANDOM || order->workload == WORKLOAD_ZIPF)
            permutation_init(&cursor->slots, order->pass_steps, stream(cursor->key, cursor->pass));
    }
    return page;
}

void order_weights(const struct order *order, uint32_t *weights) {
    for (uint64_t rank = 0; rank < order->pages; rank++) {
        if (order->workload != WORKLOAD_ZIPF) {
            weights[rank] = 1;
            continue;
        }
        uint64_t weight = 0;
        for (uint32_t level = 0; level < order_levels(order->pages); level++) {
            uint64_t first = rank << level;
            if (first >= order->pages)
                break;
            uint64_t rest = order->pages - first;
            weight += rest < 1ull << level ? rest : 1ull << level;
        }
        weights[permutation_at(&order->scramble, rank)] = (uint32_t)weight;
    }
}

bool order_visits(const struct order *order, uint32_t vcpu, uint64_t pass, uint64_t position, uint32_t *visits) {
    struct cursor cursor;
    if (position >= order->pass_steps || !order_seek(order, vcpu, pass, 0, &cursor))
        return false;
    while (cursor.position < position)
        visits[order_next(order, &cursor)]++;
    return true;
}
