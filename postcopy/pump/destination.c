/* Life and death of the destination's pump, its push thread, and how it tells its owner. */
#include "destination.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "window.h"

int fail_placing(struct destination *pump, const struct receiver *receiver, uint32_t region, uint64_t page) {
    return fail_call(pump, receiver->role, receiver->placer.operation, receiver->placer.number, region, page);
}

void resident_add(struct destination *pump, uint64_t pages) {
    uint64_t before = atomic_fetch_add(&pump->counters.resident, pages);
    uint32_t running = PUMP_RUNNING;
    if (before + pages == pump->pages_total &&
        atomic_compare_exchange_strong(&pump->half.status.state, &running, PUMP_COMPLETE))
        signal_fd(pump->half.event_fd);
}

/*
 * After END a page is resident, being placed, or was asked for and is still on its way on the other connection. One
 * that is absent was never sent and never will be: better a clear end than a guest that waits for ever.
 */
static void check_complete(struct destination *pump) {
    for (uint32_t i = 0; i < pump->half.count; i++) {
        const struct memory *memory = &pump->memory[i];
        uint64_t page = pages_absent(memory->map, 0, memory->pages);
        if (page == memory->pages)
            continue;
        struct pump_status failure = {.failure = FAILURE_INCOMPLETE, .role = ROLE_PUSH, .region = i,
                                      .offset = page * memory->region.page_size,
                                      .length = memory->region.page_size};
        half_fail(&pump->half, &failure);
        return;
    }
}

int receiver_beat(struct destination *pump, struct receiver *receiver, uint64_t sent, bool *due) {
    uint64_t received = atomic_load_explicit(&receiver->placer.counters->bytes_received, memory_order_relaxed);
    enum beat_due look = beat_look(&receiver->beat, sent, received);
    *due = look == BEAT_SEND;
    return look == BEAT_SILENT ? half_fail_silent(&pump->half, receiver->role) : 0;
}

/* Nothing else is sent on the push connection from here. What did not fit stays for the next tick. */
int push_say(struct destination *pump) {
    struct receiver *push = &pump->push;
    struct frame beat = {.magic = FRAME_MAGIC, .type = FRAME_BEAT};
    uint64_t begun = push->beat_sent % sizeof beat;
    struct iovec rest = {.iov_base = (uint8_t *)&beat + begun, .iov_len = sizeof beat - begun};
    ssize_t sent = channel_send(&pump->half.push, &rest, 1);
    if (sent < 0 && errno != EAGAIN && errno != EINTR)
        return half_fail_socket(&pump->half, ROLE_PUSH, errno);
    push->beat_sent += sent > 0 ? (uint64_t)sent : 0;
    return 0;
}

/*
 * Sleep until what is being received has come, or enough of it to be worth waking up for: on a fast link every packet
 * would wake this thread. Never for more than a part of what the source may have under way.
 */
static int await_push(struct destination *pump, const struct window *window, int timeout_ms) {
    struct pollfd descriptors[2] = {
        {.fd = pump->half.stop_fd, .events = POLLIN},
        {.fd = pump->half.push.socket, .events = POLLIN},
    };
    uint64_t wanted = receiver_wanted(&pump->push), most = window_enough(window);
    channel_await(&pump->half.push, wanted < most ? wanted : most);
    return poll(descriptors, 2, timeout_ms) < 0 && errno != EINTR ? -1 : 0;
}

static int push_beat(struct destination *pump) {
    bool due;
    return receiver_beat(pump, &pump->push, pump->push.beat_sent, &due) ? -1 : push_say(pump);
}

void push_run(void *argument) {
    struct destination *pump = argument;
    struct beat *beat = &pump->push.beat;
    beat_begin(beat, pump->half.tick_ns);
    pump->push.changing_since = 0;
    pump->push.beat_sent = 0;
    struct window window;
    window_init(&window, pump->half.push.socket, pump->half.urgent.socket);
    while (!half_stopping(&pump->half)) {
        int step = receiver_step(pump, &pump->push);
        window_update(&window, atomic_load_explicit(&pump->counters.push.bytes_received, memory_order_relaxed),
                      atomic_load_explicit(&pump->counters.demand.requests, memory_order_relaxed), now_ns());
        if (step == STEP_ENDED)
            check_complete(pump);
        if (step == STEP_FAILED || (step == STEP_ENDED && !beat->tick_ns))
            break;
        if (beat_ends(beat) && push_beat(pump))
            break;
        if (step != STEP_IDLE)
            continue;
        if (await_push(pump, &window, beat_wait_ms(beat))) {
            struct pump_status failure = {.failure = FAILURE_KERNEL, .role = ROLE_PUSH, .number = errno};
            half_fail(&pump->half, &failure);
            break;
        }
    }
}

/*
 * Pages of the staging buffer that are to be moved must be small and nobody else's: no huge pages, not shared with a
 * child, not merged with others of their content. Each is only asked for: place_move() copies what cannot be moved.
 */
static void keep_movable(const struct receiver *receiver) {
    madvise(receiver->staging, receiver->capacity, MADV_NOHUGEPAGE);
    madvise(receiver->staging, receiver->capacity, MADV_DONTFORK);
    madvise(receiver->staging, receiver->capacity, MADV_UNMERGEABLE);
}

static int receiver_create(struct destination *pump, struct receiver *receiver, uint32_t role) {
    uint64_t payload = FRAME_BYTES_MAX;
    bool moves = false;
    for (uint32_t i = 0; i < pump->half.count; i++) {
        const struct pump_region *region = &pump->memory[i].region;
        uint32_t placement = role == ROLE_PUSH ? region->push : region->demand;
        if (placement != PLACE_CONTINUE && region->page_size > payload)
            payload = region->page_size;
        moves |= placement == PLACE_MOVE;
    }
    receiver->role = role;
    receiver->allowed = role == ROLE_PUSH ? FRAMES_PUSH : FRAMES_URGENT;
    receiver->placer.uffd = pump->uffd;
    receiver->placer.foreign = pump->foreign;
    receiver->placer.counters = role == ROLE_PUSH ? &pump->counters.push : &pump->counters.urgent;
    receiver->capacity = STAGING_PAYLOAD + payload + 2 * sizeof(struct frame) + READ_AHEAD;
    void *staging = mmap(NULL, receiver->capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (staging == MAP_FAILED)
        return -errno;
    receiver->staging = staging;
    receiver->begin = receiver->end = STAGING_PAYLOAD;
    if (moves)
        keep_movable(receiver);
    return 0;
}

static void receiver_destroy(struct receiver *receiver) {
    if (receiver->staging)
        munmap(receiver->staging, receiver->capacity);
}

/*
 * Go on with the page map that a pump left behind, however it ended: pages that were on their way are absent, one that
 * was given back on the way is zeros. Whether a page that was being placed is there the kernel says when it comes again.
 */
static int map_take_up(struct destination *pump, struct memory *memory) {
    memory->map = (page_byte *)(uintptr_t)memory->region.map;
    if (memory->region.alias)
        return -EINVAL;
    for (uint64_t page = 0; page < memory->pages; page++) {
        uint8_t state = page_load(&memory->map[page]);
        if (state > PAGE_POISONED)
            return -EINVAL;
        if (state == PAGE_REQUESTED || state == PAGE_PLACING || state == PAGE_WATCHED)
            atomic_store_explicit(&memory->map[page], PAGE_ABSENT, memory_order_relaxed);
        if (state == PAGE_DROPPED)
            atomic_store_explicit(&memory->map[page], PAGE_ZERO, memory_order_relaxed);
        pump->counters.resident += state == PAGE_PLACED || state == PAGE_ZERO || state == PAGE_DROPPED;
    }
    return 0;
}

static int map_create(struct destination *pump, struct memory *memory) {
    if (memory->region.map)
        return map_take_up(pump, memory);
    /* Untouched, a large map costs address space only. */
    memory->map = calloc(memory->pages, sizeof *memory->map);
    return memory->map ? 0 : -ENOMEM;
}

static int memory_create(struct destination *pump, const struct pump_region *regions) {
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    for (uint32_t i = 0; i < pump->half.count; i++) {
        const struct pump_region *region = &regions[i];
        struct memory *memory = &pump->memory[i];
        if (!region->alias && (region->demand == PLACE_CONTINUE || region->push == PLACE_CONTINUE))
            return -EINVAL;
        /* Only small pages of memory without a file can be moved. */
        bool moves = region->demand == PLACE_MOVE || region->push == PLACE_MOVE;
        if (moves && (region->fd >= 0 || region->page_size != page))
            return -EINVAL;
        if (region->removal > REMOVAL_DISCARDS || (region->removal != REMOVAL_UNTOLD) != pump->told)
            return -EINVAL;
        /* Pages are moved within one process only, and all that a foreign one tells has to be taken note of. */
        if (!region->foreign != !pump->foreign || (region->foreign && (moves || !pump->told)))
            return -EINVAL;
        memory->region = *region;
        memory->pages = region->size / region->page_size;
        int result = map_create(pump, memory);
        if (result)
            return result;
        pump->pages_total += memory->pages;
        if (!region->zeropage && !region->alias && region->page_size > pump->zeros_size)
            pump->zeros_size = region->page_size;
    }
    if (pump->zeros_size && !(pump->zeros = calloc(1, pump->zeros_size)))
        return -ENOMEM;
    return 0;
}

struct destination *destination_create(int uffd, const struct pump_region *regions, uint32_t count,
                                       uint64_t poll_max_ns) {
    struct destination *pump = half_create(sizeof *pump, regions, count);
    if (!pump)
        return NULL;
    pump->uffd = uffd;
    pump->told = regions[0].removal != REMOVAL_UNTOLD;
    pump->foreign = regions[0].foreign;
    pthread_mutex_init(&pump->gate, NULL); /* cannot fail with default attributes */
    pump->waiter.window_ns = poll_max_ns;
    pump->waiter.busy = &pump->counters.push.bytes_received;
    pump->news_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int result = pump->news_fd < 0 ? -errno : memory_create(pump, regions);
    if (!result)
        result = receiver_create(pump, &pump->urgent, ROLE_URGENT);
    if (!result)
        result = receiver_create(pump, &pump->push, ROLE_PUSH);
    if (result) {
        destination_destroy(pump);
        errno = -result;
        return NULL;
    }
    return pump;
}

int destination_adopt(struct destination *pump) {
    if (pump->half.urgent_thread.started || pump->half.urgent.socket >= 0 || pump->half.push.socket >= 0)
        return -EINVAL;
    for (uint32_t i = 0; i < pump->half.count; i++)
        memset((void *)(uintptr_t)pump->memory[i].map, PAGE_PLACED, pump->memory[i].pages);
    /* It stays RUNNING: a pump that goes on serving faults can still fail, and its owner is to hear of it. */
    atomic_store(&pump->counters.resident, pump->pages_total);
    pump->alone = true;
    return 0;
}

int destination_part(struct destination *pump) {
    if (pump->half.running || pump->half.urgent.socket >= 0 || pump->half.push.socket >= 0)
        return -EINVAL;
    pump->alone = pump->half.detached = true;
    return 0;
}

int destination_trace(struct destination *pump, struct trace *trace) {
    if (pump->half.urgent_thread.started || !trace->capacity || trace->capacity & (trace->capacity - 1))
        return -EINVAL;
    pump->trace = trace;
    return 0;
}

int destination_start(struct destination *pump) {
    int result = half_start(&pump->half, "pc-demand", demand_run, pump->alone ? NULL : push_run, pump);
    if (result)
        destination_stop(pump);
    return result;
}

void destination_stop(struct destination *pump) {
    atomic_store(&pump->half.stopping, true);
    signal_fd(pump->news_fd); /* the demand thread waits for this one */
    half_stop(&pump->half);
}

void destination_destroy(struct destination *pump) {
    if (!pump)
        return;
    destination_stop(pump);
    close_fd(pump->news_fd);
    receiver_destroy(&pump->urgent);
    receiver_destroy(&pump->push);
    free(pump->zeros);
    pthread_mutex_destroy(&pump->gate);
    for (uint32_t i = 0; i < pump->half.count; i++)
        if (!pump->memory[i].region.map)
            free((void *)(uintptr_t)pump->memory[i].map);
    half_destroy(&pump->half);
}

const struct destination_counters *destination_counters(const struct destination *pump) { return &pump->counters; }
const uint8_t *destination_map(const struct destination *pump, uint32_t region) {
    return region < pump->half.count ? (const uint8_t *)pump->memory[region].map : NULL;
}
struct half *destination_half(struct destination *pump) { return &pump->half; }
