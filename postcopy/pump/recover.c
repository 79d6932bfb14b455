/*
 * The destination without its connections: what came in part is forgotten, the guest is served with what is here, and
 * with new connections everything that is still wanted is asked for again. Or nothing will ever come: then what is
 * missing is poisoned. All of it is done by the owner while no thread of the pump runs.
 */
#include <errno.h>
#include <sys/mman.h>

#include "destination.h"

/* Bytes that came into the alias and were never shown: left there, they would be taken for the page one day. */
static int forget_bytes(struct destination *pump, uint32_t region, uint64_t page) {
    const struct pump_region *r = &pump->memory[region].region;
    uint64_t offset = page * r->page_size;
    if (!r->alias)
        return 0;
    /* Through the alias, which nobody is told of. */
    if (madvise(alias_of(&pump->memory[region], offset), r->page_size, MADV_REMOVE))
        return fail_call(pump, ROLE_URGENT, UFFD_EVENT_REMOVE, errno, region, page);
    return 0;
}

/* Give up what is claimed: its bytes came in part, or could not be placed before the stop. And whatever is buffered. */
static int abandon(struct destination *pump, struct receiver *receiver) {
    uint32_t region = receiver->frame.region;
    for (; owns_pages(receiver); receiver->claimed++) {
        uint64_t page = receiver->claimed;
        if (forget_bytes(pump, region, page))
            return -1;
        if (!page_release(&pump->memory[region].map[page]) && finish_dropped(pump, receiver, region, page))
            return -1;
    }
    receiver->begin = receiver->end = STAGING_PAYLOAD;
    receiver->in_payload = false;
    receiver->taken = receiver->run_begin = receiver->run_end = 0;
    receiver->allowed = receiver->role == ROLE_PUSH ? FRAMES_PUSH : FRAMES_URGENT;
    return 0;
}

/* End the demand thread for a moment. */
static void halt(struct destination *pump) {
    atomic_store(&pump->half.stopping, true);
    signal_fd(pump->news_fd);
    half_halt(&pump->half);
}

static bool failed(const struct destination *pump) {
    uint32_t state = atomic_load(&pump->half.status.state);
    return state != PUMP_RUNNING && state != PUMP_COMPLETE;
}

int destination_detach(struct destination *pump) {
    if (!pump->half.running)
        return -EINVAL;
    halt(pump);
    half_detach(&pump->half);
    pump->alone = true;
    pump->requests_begin = pump->requests_end = 0;
    if (failed(pump) || abandon(pump, &pump->push) || abandon(pump, &pump->urgent))
        return -ECANCELED;
    return half_start(&pump->half, "pc-demand", demand_run, NULL, pump);
}

/* Every page that a fault waits for, once: REQUESTED pages are all among these. */
static void request_again(struct destination *pump) {
    for (uint32_t i = 0; i < pump->pending_count; i++) {
        const struct fault *pending = &pump->pending[i];
        bool asked = page_load(&pump->memory[pending->region].map[pending->page]) != PAGE_REQUESTED;
        for (uint32_t j = 0; j < i && !asked; j++)
            asked = pump->pending[j].page == pending->page && pump->pending[j].region == pending->region;
        if (!asked)
            request(pump, pending->region, pending->page);
    }
}

int destination_resume(struct destination *pump) {
    if (!pump->half.detached || pump->half.urgent.socket < 0 || pump->half.push.socket < 0)
        return -EINVAL;
    halt(pump);
    if (failed(pump))
        return -ECANCELED;
    pump->alone = false;
    atomic_store(&pump->push.placer.counters->ended, 0);
    request_again(pump);
    return half_start(&pump->half, "pc-demand", demand_run, push_run, pump);
}

static int poison_run(struct destination *pump, uint32_t region, uint64_t first, uint64_t stop) {
    const struct pump_region *r = &pump->memory[region].region;
    struct placer *placer = &pump->urgent.placer;
    while (first < stop) {
        int result = place_poison(placer, r->guest + first * r->page_size, (stop - first) * r->page_size, r->page_size);
        if (result < 0)
            return -placer->number;
        if (!result || placer->done)
            pump->urgent.changing_since = 0;
        if (!result)
            return 0;
        first += placer->done / r->page_size;
        if (await_change(pump, &pump->urgent, region, first))
            return -EAGAIN;
    }
    return 0;
}

static bool poisonable(uint8_t state) { return state == PAGE_ABSENT || state == PAGE_REQUESTED; }

/* Poison the run of missing pages that begins at `first`; where it ends stands in `stop`. */
static int poison_from(struct destination *pump, uint32_t region, uint64_t first, uint64_t *stop) {
    struct memory *memory = &pump->memory[region];
    uint64_t end = first;
    /* The map first: a page that is given back meanwhile is zeros, and stays what it is. */
    for (uint8_t state; end < memory->pages && poisonable(state = page_load(&memory->map[end]));)
        end += page_move(&memory->map[end], state, PAGE_POISONED);
    *stop = end;
    atomic_fetch_add(&pump->counters.poisoned, end - first);
    int result = poison_run(pump, region, first, end);
    views_poison(pump, region, first, end);
    return result;
}

int destination_poison(struct destination *pump) {
    if (!pump->half.detached)
        return -EINVAL;
    halt(pump);
    int result = failed(pump) ? -ECANCELED : 0;
    for (uint32_t i = 0; !result && i < pump->half.count; i++) {
        const struct memory *memory = &pump->memory[i];
        for (uint64_t page = 0, stop; !result && page < memory->pages; page = stop) {
            stop = page + 1;
            if (poisonable(page_load(&memory->map[page])))
                result = poison_from(pump, i, page, &stop);
        }
    }
    int restarted = half_start(&pump->half, "pc-demand", demand_run, NULL, pump);
    return result ? result : restarted;
}
