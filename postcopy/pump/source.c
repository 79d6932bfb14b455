/* Life and death of the source's pump, its ring of orders, and how it tells its owner. */
#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "source.h"

int source_fail(struct source *pump, const struct pump_status *failure) {
    uint32_t running = PUMP_RUNNING;
    if (atomic_compare_exchange_strong(&pump->status.state, &running, PUMP_IDLE)) {
        pump->status.failure = failure->failure;
        pump->status.role = failure->role;
        pump->status.number = failure->number;
        pump->status.region = failure->region;
        pump->status.offset = failure->offset;
        pump->status.length = failure->length;
        atomic_store(&pump->status.state, PUMP_FAILED);
        signal_fd(pump->event_fd);
    }
    return -1;
}

int source_fail_socket(struct source *pump, uint32_t role, int number) {
    struct pump_status failure = {.failure = number ? FAILURE_SOCKET : FAILURE_CLOSED, .role = role, .number = number};
    return source_fail(pump, &failure);
}

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
    for (uint32_t i = 0; i < pump->count; i++) {
        const struct pump_region *region = &regions[i];
        if (!region->page_size || region->page_size & (region->page_size - 1) || !region->size ||
            region->size % region->page_size)
            return -EINVAL;
        pump->memory[i].region = *region;
        pump->bounds[i] = (struct frame_bounds){.size = region->size, .page_size = region->page_size};
        pump->memory[i].sent = calloc(region->size / region->page_size, 1);
        if (!pump->memory[i].sent)
            return -ENOMEM;
    }
    return 0;
}

struct source *source_create(const struct pump_region *regions, uint32_t count, uint64_t poll_max_ns,
                             uint64_t frame_bytes) {
    if (!count || count > PUMP_REGIONS_MAX || !frame_bytes || frame_bytes > FRAME_BYTES_MAX) {
        errno = EINVAL;
        return NULL;
    }
    struct source *pump = aligned_alloc(128, (sizeof *pump + 127) / 128 * 128);
    if (!pump)
        return NULL;
    memset(pump, 0, sizeof *pump);
    pump->count = count;
    pump->frame_bytes = frame_bytes;
    pump->waiter.window_ns = poll_max_ns;
    pump->waiter.busy = &pump->counters.push.bytes_sent;
    pump->urgent_socket = pump->push_socket = -1;
    pump->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pump->work_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pump->low_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pump->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int result = pump->stop_fd < 0 || pump->work_fd < 0 || pump->low_fd < 0 || pump->event_fd < 0
                     ? -errno
                     : memory_create(pump, regions);
    if (result) {
        source_destroy(pump);
        errno = -result;
        return NULL;
    }
    return pump;
}

int source_attach(struct source *pump, uint32_t role, int socket) {
    int *place = role == ROLE_URGENT ? &pump->urgent_socket : role == ROLE_PUSH ? &pump->push_socket : NULL;
    if (!place || *place >= 0 || pump->urgent_thread.started) {
        close(socket);
        return -EINVAL;
    }
    *place = socket;
    return 0;
}

int source_start(struct source *pump) {
    if (pump->urgent_thread.started || pump->urgent_socket < 0 || pump->push_socket < 0)
        return -EINVAL;
    atomic_store(&pump->status.state, PUMP_RUNNING);
    int result = thread_start(&pump->urgent_thread, "pc-urgent", urgent_run, pump);
    if (!result)
        result = thread_start(&pump->push_thread, "pc-push", orders_run, pump);
    if (result)
        source_stop(pump);
    return result;
}

void source_stop(struct source *pump) {
    atomic_store(&pump->stopping, true);
    signal_fd(pump->stop_fd);
    thread_join(&pump->urgent_thread);
    thread_join(&pump->push_thread);
}

void source_destroy(struct source *pump) {
    if (!pump)
        return;
    source_stop(pump);
    close_fd(pump->urgent_socket);
    close_fd(pump->push_socket);
    close_fd(pump->stop_fd);
    close_fd(pump->work_fd);
    close_fd(pump->low_fd);
    close_fd(pump->event_fd);
    for (uint32_t i = 0; i < pump->count; i++)
        free((void *)(uintptr_t)pump->memory[i].sent);
    free(pump);
}

void source_guest_stopped(struct source *pump) { atomic_store(&pump->guest_stopped, true); }

int source_push(struct source *pump, const struct push_extent *extents, uint32_t count) {
    if (!atomic_load(&pump->guest_stopped))
        return -EBUSY;
    for (uint32_t i = 0; i < count; i++) {
        struct frame frame = {.magic = FRAME_MAGIC, .type = FRAME_ZERO, .region = (uint16_t)extents[i].region,
                              .offset = extents[i].offset, .length = extents[i].length};
        if (extents[i].region > UINT16_MAX || frame_check(&frame, FRAMES_PUSH, pump->bounds, pump->count))
            return -EINVAL;
    }
    uint32_t tail = atomic_load_explicit(&pump->tail, memory_order_relaxed);
    uint32_t room = PUMP_RING_EXTENTS - (tail - atomic_load_explicit(&pump->head, memory_order_acquire));
    count = count < room ? count : room;
    for (uint32_t i = 0; i < count; i++)
        pump->ring[(tail + i) % PUMP_RING_EXTENTS] = extents[i];
    /* Before the orders are seen: a push thread that is done with them at once must find that it has to tell. */
    atomic_store(&pump->low_told, false);
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
const struct pump_status *source_status(const struct source *pump) { return &pump->status; }
const struct source_counters *source_counters(const struct source *pump) { return &pump->counters; }
int source_low_fd(const struct source *pump) { return pump->low_fd; }
int source_event_fd(const struct source *pump) { return pump->event_fd; }
uint64_t source_cpu_ns(const struct source *pump) {
    return thread_cpu_ns(&pump->urgent_thread) + thread_cpu_ns(&pump->push_thread);
}
