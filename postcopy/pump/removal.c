/*
 * Pages that the guest gives back while they are still on their way: what was not placed yet becomes zeros, and no late
 * copy is placed over that. The reasoning is in README.md, "Pages given back".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <time.h>

#include "destination.h"

void gate_enter(struct destination *pump) {
    if (pump->told)
        pthread_mutex_lock(&pump->gate);
}

void gate_leave(struct destination *pump) {
    if (pump->told)
        pthread_mutex_unlock(&pump->gate);
}

int fail_call(struct destination *pump, uint32_t role, uint32_t operation, int number, uint32_t region,
              uint64_t page) {
    uint64_t size = pump->memory[region].region.page_size;
    struct pump_status failure = {.failure = FAILURE_KERNEL, .role = role, .number = number,
                                  .operation = operation, .region = region, .offset = page * size, .length = size};
    return half_fail(&pump->half, &failure);
}

/* So many pages became zeros: whoever waits for one of them faults again, and that fault places the zeros. */
static int count_removed(struct destination *pump, uint32_t region, uint64_t first, uint64_t stop, uint64_t removed,
                         bool awaited) {
    const struct pump_region *r = &pump->memory[region].region;
    struct placer placer = {.uffd = pump->uffd};
    int result = 0;
    if (awaited && place_wake(&placer, r->guest + first * r->page_size, (stop - first) * r->page_size))
        result = fail_call(pump, ROLE_URGENT, placer.operation, placer.number, region, first);
    if (awaited) {
        views_wake(pump, region, first, stop);
        atomic_store(&pump->news, true);
        signal_fd(pump->news_fd);
    }
    if (removed) {
        atomic_fetch_add_explicit(&pump->counters.removed, removed, memory_order_relaxed);
        resident_add(pump, removed);
    }
    return result;
}

static int discard_pages(struct destination *pump, uint32_t region, uint64_t first, uint64_t stop) {
    page_byte *map = pump->memory[region].map;
    uint64_t removed = 0;
    bool awaited = false;
    for (uint64_t page = first; page < stop;) {
        uint64_t known = pages_zero(map, page, stop) - page;
        removed += known;
        page += known;
        if (page == stop)
            break;
        uint8_t before = page_discard(&map[page++]);
        awaited |= before == PAGE_REQUESTED;
        removed += before == PAGE_REQUESTED || before == PAGE_ABSENT;
    }
    return count_removed(pump, region, first, stop, removed, awaited);
}

int take_removal(struct destination *pump, uint64_t start, uint64_t stop) {
    for (uint32_t i = 0; i < pump->half.count; i++) {
        const struct pump_region *r = &pump->memory[i].region;
        uint64_t begin = start > r->guest ? start : r->guest;
        uint64_t end = stop < r->guest + r->size ? stop : r->guest + r->size;
        if (begin >= end || r->removal != REMOVAL_DISCARDS)
            continue;
        /* Of a huge page that went in part only, the rest is wanted: it is fetched whole. */
        uint64_t first = (begin - r->guest + r->page_size - 1) / r->page_size, stop = (end - r->guest) / r->page_size;
        if (first < stop && discard_pages(pump, i, first, stop))
            return -1;
    }
    return 0;
}

int finish_dropped(struct destination *pump, struct receiver *receiver, uint32_t region, uint64_t page) {
    struct memory *memory = &pump->memory[region];
    uint64_t size = memory->region.page_size;
    /* What came into the alias meanwhile is nobody's: the page reads as zeros. */
    if (memory->region.alias && memory->region.fd >= 0 &&
        fallocate(memory->region.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  (off_t)(memory->region.fd_offset + page * size), (off_t)size))
        return fail_call(pump, receiver->role, UFFD_EVENT_REMOVE, errno, region, page);
    atomic_store_explicit(&memory->map[page], PAGE_ZERO, memory_order_release);
    hist_add(&receiver->placer.counters->duplicate, 1); /* its copy came and was not wanted */
    return count_removed(pump, region, page, page + 1, 1, true);
}

static bool any_dropped(const struct memory *memory, uint64_t first, uint64_t stop) {
    return pages_kept(&memory->map[first], stop - first) != stop - first;
}

int destination_discard(struct destination *pump, uint32_t region, uint64_t offset, uint64_t length) {
    if (region >= pump->half.count)
        return -EINVAL;
    const struct memory *memory = &pump->memory[region];
    uint64_t size = memory->region.page_size;
    if ((offset | length) & (size - 1) || offset > memory->region.size || length > memory->region.size - offset)
        return -EINVAL;
    uint64_t first = offset / size, stop = first + length / size;
    if (discard_pages(pump, region, first, stop))
        return -ECANCELED;
    while (any_dropped(memory, first, stop)) {
        uint32_t state = atomic_load(&pump->half.status.state);
        if (half_ended(&pump->half) || (state != PUMP_RUNNING && state != PUMP_COMPLETE))
            return -ECANCELED;
        nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
    }
    return 0;
}
