/* See half.h. */
#include "half.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* The counters of each thread begin on a boundary of this. */
#define ALIGNMENT 128u

static bool whole_pages(const struct pump_region *region) {
    uint64_t size = region->page_size;
    return size && !(size & (size - 1)) && region->size && !(region->size % size);
}

static void close_channel(struct channel *channel) {
    tls_destroy(channel->tls);
    close_fd(channel->socket);
    *channel = (struct channel){.socket = -1};
}

void *half_create(size_t size, const struct pump_region *regions, uint32_t count) {
    bool sound = count && count <= REGIONS_MAX;
    for (uint32_t i = 0; sound && i < count; i++)
        sound = whole_pages(&regions[i]);
    if (!sound) {
        errno = EINVAL;
        return NULL;
    }
    size = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    struct half *half = aligned_alloc(ALIGNMENT, size);
    if (!half)
        return NULL;
    memset(half, 0, size);
    half->count = count;
    for (uint32_t i = 0; i < count; i++)
        half->bounds[i] = (struct frame_bounds){.size = regions[i].size, .page_size = regions[i].page_size};
    half->urgent.socket = half->push.socket = -1;
    half->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    half->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (half->stop_fd < 0 || half->event_fd < 0) {
        int number = errno;
        half_destroy(half);
        errno = number;
        return NULL;
    }
    return half;
}

void half_beat(struct half *half, uint64_t tick_ns) { half->tick_ns = tick_ns; }

void half_watch(struct half *half) { atomic_store(&half->watching, true); }

int half_attach(struct half *half, uint32_t role, int socket, struct tls *tls) {
    struct channel *place = role == ROLE_URGENT ? &half->urgent : role == ROLE_PUSH ? &half->push : NULL;
    if (!place || place->socket >= 0 || (half->running && !half->detached)) {
        tls_destroy(tls);
        close(socket);
        return -EINVAL;
    }
    *place = (struct channel){.socket = socket, .tls = tls};
    return 0;
}

int half_start(struct half *half, const char *name, void (*urgent)(void *), void (*push)(void *), void *pump) {
    if (half->running || (push && (half->urgent.socket < 0 || half->push.socket < 0)))
        return -EINVAL;
    uint32_t idle = PUMP_IDLE;
    atomic_compare_exchange_strong(&half->status.state, &idle, PUMP_RUNNING);
    atomic_store(&half->broken.state, PUMP_RUNNING);
    half->detached = half->detached && !push;
    half->running = true;
    int result = thread_start(&half->urgent_thread, name, urgent, pump);
    return result || !push ? result : thread_start(&half->push_thread, "pc-push", push, pump);
}

static void join(struct half *half) {
    atomic_store(&half->stopping, true);
    signal_fd(half->stop_fd);
    thread_join(&half->urgent_thread);
    thread_join(&half->push_thread);
    half->running = false;
}

void half_stop(struct half *half) {
    atomic_store(&half->ended, true);
    join(half);
}

void half_halt(struct half *half) {
    join(half);
    uint64_t count;
    (void)!read(half->stop_fd, &count, sizeof count);
    atomic_store(&half->stopping, half_ended(half));
}

void half_detach(struct half *half) {
    close_channel(&half->urgent);
    close_channel(&half->push);
    half->detached = true;
    atomic_store(&half->broken.state, PUMP_IDLE);
}

void half_destroy(struct half *half) {
    close_channel(&half->urgent);
    close_channel(&half->push);
    close_fd(half->stop_fd);
    close_fd(half->event_fd);
    free(half);
}

/* What new connections mend. */
static bool is_break(uint32_t failure) {
    return failure != FAILURE_KERNEL && failure != FAILURE_EARLY && failure != FAILURE_FILE;
}

/* A pump that is complete serves zeros, views and events all the same, and is no use once the kernel refused. */
static bool may_fail(struct pump_status *status, uint32_t failure) {
    uint32_t running = PUMP_RUNNING, complete = PUMP_COMPLETE;
    if (atomic_compare_exchange_strong(&status->state, &running, PUMP_IDLE))
        return true;
    if (failure != FAILURE_KERNEL || !atomic_compare_exchange_strong(&status->state, &complete, PUMP_IDLE))
        return false;
    status->completed = true;
    return true;
}

int half_fail(struct half *half, const struct pump_status *failure) {
    struct pump_status *status = is_break(failure->failure) ? &half->broken : &half->status;
    /* The first to fail moves the state to IDLE, writes the reason, and only then shows FAILED. */
    if (may_fail(status, failure->failure)) {
        status->failure = failure->failure;
        status->role = failure->role;
        status->number = failure->number;
        status->operation = failure->operation;
        status->region = failure->region;
        status->offset = failure->offset;
        status->length = failure->length;
        atomic_store(&status->state, PUMP_FAILED);
        signal_fd(half->event_fd);
    }
    return -1;
}

int half_check_frame(struct half *half, const struct frame *frame, uint32_t role, uint32_t allowed) {
    int refusal = frame_check(frame, allowed, half->bounds, half->count);
    if (!refusal)
        return 0;
    struct pump_status failure = {.failure = FAILURE_FRAME, .role = role, .number = refusal, .region = frame->region,
                                  .offset = frame->offset, .length = frame->length};
    return half_fail(half, &failure);
}

int half_fail_socket(struct half *half, uint32_t role, int number) {
    struct pump_status failure = {.failure = number ? FAILURE_SOCKET : FAILURE_CLOSED, .role = role, .number = number};
    return half_fail(half, &failure);
}

int half_fail_silent(struct half *half, uint32_t role) {
    if (!atomic_load_explicit(&half->watching, memory_order_relaxed))
        return 0;
    struct pump_status failure = {.failure = FAILURE_SILENT, .role = role};
    return half_fail(half, &failure);
}

const struct pump_status *half_status(const struct half *half) { return &half->status; }
const struct pump_status *half_broken(const struct half *half) { return &half->broken; }
int half_event_fd(const struct half *half) { return half->event_fd; }
uint64_t half_cpu_ns(const struct half *half) {
    return thread_cpu_ns(&half->urgent_thread) + thread_cpu_ns(&half->push_thread);
}
