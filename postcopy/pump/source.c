/* Life and death of the source's pump, and its ring of orders. */
#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "source.h"

uint32_t parts_advance(struct iovec *parts, uint32_t begin, uint64_t sent) {
    while (sent) {
        struct iovec *part = &parts[begin];
        if (sent < part->iov_len) {
            part->iov_base = (uint8_t *)part->iov_base + sent;
            part->iov_len -= sent;
            break;
        }
        sent -= part->iov_len;
        begin++;
    }
    return begin;
}

static int memory_create(struct source *pump, const struct pump_region *regions) {
    for (uint32_t i = 0; i < pump->half.count; i++) {
        pump->memory[i].region = regions[i];
        pump->memory[i].sent = calloc(regions[i].size / regions[i].page_size, 1);
        if (!pump->memory[i].sent)
            return -ENOMEM;
    }
    return 0;
}

struct source *source_create(const struct pump_region *regions, uint32_t count, uint64_t poll_max_ns,
                             uint64_t frame_bytes) {
    if (!frame_bytes || frame_bytes > FRAME_BYTES_MAX) {
        errno = EINVAL;
        return NULL;
    }
    struct source *pump = half_create(sizeof *pump, regions, count);
    if (!pump)
        return NULL;
    pump->frame_bytes = frame_bytes;
    pump->waiter.window_ns = poll_max_ns;
    pump->waiter.busy = &pump->counters.push.bytes_sent;
    pump->work_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pump->low_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int result = pump->work_fd < 0 || pump->low_fd < 0 ? -errno : memory_create(pump, regions);
    if (!result)
        result = content_create(pump);
    if (result) {
        source_destroy(pump);
        errno = -result;
        return NULL;
    }
    return pump;
}

int source_skip(struct source *pump, uint32_t region, uint64_t first, uint64_t count, const uint8_t *bits) {
    if (region >= pump->half.count || pump->half.running)
        return -EINVAL;
    uint64_t pages = pump->half.bounds[region].size / pump->half.bounds[region].page_size;
    if (first > pages || count > pages - first)
        return -EINVAL;
    for (uint64_t i = 0; i < count; i++)
        if (bits[i / 8] >> (i % 8) & 1)
            atomic_store_explicit(&pump->memory[region].sent[first + i], SENT_PUSH, memory_order_relaxed);
    return 0;
}

int source_start(struct source *pump) {
    int result = half_start(&pump->half, "pc-urgent", urgent_run, orders_run, pump);
    if (result)
        source_stop(pump);
    return result;
}

void source_stop(struct source *pump) { half_stop(&pump->half); }

void source_destroy(struct source *pump) {
    if (!pump)
        return;
    source_stop(pump);
    close_fd(pump->work_fd);
    close_fd(pump->low_fd);
    content_destroy(pump);
    for (uint32_t i = 0; i < pump->half.count; i++)
        free((void *)(uintptr_t)pump->memory[i].sent);
    half_destroy(&pump->half);
}

void source_guest_stopped(struct source *pump) { atomic_store(&pump->guest_stopped, true); }

int source_push(struct source *pump, const struct push_extent *extents, uint32_t count) {
    if (!atomic_load(&pump->guest_stopped))
        return -EBUSY;
    for (uint32_t i = 0; i < count; i++) {
        struct frame frame = {.magic = FRAME_MAGIC, .type = FRAME_ZERO, .region = (uint16_t)extents[i].region,
                              .offset = extents[i].offset, .length = extents[i].length};
        if (extents[i].region > UINT16_MAX || frame_check(&frame, FRAMES_PUSH, pump->half.bounds, pump->half.count))
            return -EINVAL;
    }
    /* Before its place in the ring is looked at, and so before the orders are seen: a push thread that is done with some
     * after that look must find that it has to tell. */
    atomic_store(&pump->low_told, false);
    uint32_t tail = atomic_load_explicit(&pump->tail, memory_order_relaxed);
    uint32_t room = PUMP_RING_EXTENTS - (tail - atomic_load(&pump->head));
    count = count < room ? count : room;
    for (uint32_t i = 0; i < count; i++)
        pump->ring[(tail + i) % PUMP_RING_EXTENTS] = extents[i];
    atomic_store_explicit(&pump->tail, tail + count, memory_order_release);
    signal_fd(pump->work_fd);
    return (int)count;
}

void source_push_end(struct source *pump) {
    atomic_store_explicit(&pump->ended, true, memory_order_release);
    signal_fd(pump->work_fd);
}

uint32_t source_queued(const struct source *pump) {
    return atomic_load(&pump->tail) - atomic_load(&pump->head);
}
const struct source_counters *source_counters(const struct source *pump) { return &pump->counters; }
bool source_wanted(struct source *pump, uint32_t *region, uint64_t *offset) {
    uint64_t wanted = atomic_exchange_explicit(&pump->wanted, 0, memory_order_relaxed);
    if (!wanted)
        return false;
    *region = (uint32_t)((wanted - 1) >> WANTED_PAGE_BITS);
    *offset = ((wanted - 1) & (((uint64_t)1 << WANTED_PAGE_BITS) - 1)) * pump->half.bounds[*region].page_size;
    return true;
}

const uint8_t *source_map(const struct source *pump, uint32_t region) {
    return region < pump->half.count ? (const uint8_t *)pump->memory[region].sent : NULL;
}
int source_low_fd(const struct source *pump) { return pump->low_fd; }
struct half *source_half(struct source *pump) { return &pump->half; }
