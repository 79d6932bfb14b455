/*
 * The source's pump: one thread answers requests on the urgent connection, one pushes what it is ordered to push.
 *
 * The guest is stopped and its memory does not change any more, so pages are sent right out of it. A page is claimed
 * in the `sent` map before it is sent, so that the push does not repeat what was asked for.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "pump.h"
#include "thread.h"
#include "wait.h"

/* Requests answered with one system call. */
#define ANSWERS_MAX 64u
/*
 * A request for a page that the push has sent already: up to this size it is sent once more, ahead of whatever the
 * push connection still holds; the destination drops the copy that comes second. A larger page is not worth twice
 * its time on the wire.
 */
#define AGAIN_BYTES_MAX 65536u

enum sent { UNSENT = 0, SENT_PUSH = 1, SENT_DEMAND = 2 };

struct source_memory {
    struct pump_region region;
    _Atomic uint8_t *sent; /* one enum sent for each page */
};

struct source {
    struct source_memory memory[PUMP_REGIONS_MAX];
    struct frame_bounds bounds[PUMP_REGIONS_MAX];
    uint32_t count;
    uint64_t frame_bytes; /* payload of a pushed frame at most, unless a page is larger */

    int urgent_socket, push_socket;
    /* Owned by the urgent thread: requests read, answers not yet sent. */
    uint8_t requests[ANSWERS_MAX * sizeof(struct frame)];
    uint64_t requests_end;
    struct frame headers[ANSWERS_MAX];
    struct iovec answers[2 * ANSWERS_MAX];
    uint32_t answers_begin, answers_end, headers_used;
    struct waiter waiter;

    /* Orders for the push: the owner writes at `tail`, the push thread reads at `head`. */
    struct push_extent ring[PUMP_RING_EXTENTS];
    _Atomic uint32_t head, tail;
    _Atomic bool ended;
    _Atomic bool low_told;

    int stop_fd;  /* never read: once readable it ends both threads' waits for good */
    int work_fd;  /* orders came */
    int low_fd;   /* the ring runs low, for the owner */
    int event_fd; /* failed, for the owner */
    _Atomic bool stopping;
    struct thread urgent_thread, push_thread;
    struct pump_status status;
    struct source_counters counters;
};

static int fail(struct source *pump, const struct pump_status *failure) {
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

static int fail_socket(struct source *pump, uint32_t role, int number) {
    struct pump_status failure = {.failure = number ? FAILURE_SOCKET : FAILURE_CLOSED, .role = role, .number = number};
    return fail(pump, &failure);
}

/* Zero all over? Almost every page that is not says so in its first bytes. */
static bool is_zero(const uint8_t *memory, uint64_t length) {
    uint64_t first[2];
    memcpy(first, memory, sizeof first);
    return !(first[0] | first[1]) && !memcmp(memory, memory + sizeof first, length - sizeof first);
}

/* A hole in the file is known without reading it, which would allocate it. */
static bool is_hole(const struct pump_region *region, uint64_t offset) {
    if (region->fd < 0)
        return false;
    off_t data = lseek(region->fd, (off_t)offset, SEEK_DATA);
    return data < 0 ? errno == ENXIO : (uint64_t)data >= offset + region->page_size;
}

static uint8_t *bytes_at(const struct source_memory *memory, uint64_t offset) {
    return (uint8_t *)(uintptr_t)(memory->region.guest + offset);
}

/* ---- the urgent thread ------------------------------------------------------------------------------------- */

static void answer(struct source *pump, const struct frame *request) {
    struct source_memory *memory = &pump->memory[request->region];
    struct source_channel *counters = &pump->counters.urgent;
    uint64_t page = request->offset / memory->region.page_size;
    uint8_t before = atomic_exchange(&memory->sent[page], SENT_DEMAND);
    if (before == SENT_DEMAND || (before == SENT_PUSH && request->length > AGAIN_BYTES_MAX)) {
        hist_add(&counters->ignored, 1);
        return;
    }
    hist_add(&counters->again, before == SENT_PUSH);
    struct frame *header = &pump->headers[pump->headers_used++];
    *header = *request;
    pump->answers[pump->answers_end++] = (struct iovec){.iov_base = header, .iov_len = sizeof *header};
    hist_add(&counters->frames, 1);
    uint8_t *content = bytes_at(memory, request->offset);
    if (is_hole(&memory->region, request->offset) || is_zero(content, request->length)) {
        header->type = FRAME_ZERO;
        hist_add(&counters->zero, 1);
        return;
    }
    header->type = FRAME_PAGES;
    pump->answers[pump->answers_end++] = (struct iovec){.iov_base = content, .iov_len = request->length};
    hist_add(&counters->pages, 1);
}

/* Read requests and prepare their answers; only while no answer waits, so the destination sets the pace. */
static int read_requests(struct source *pump) {
    if (pump->answers_begin != pump->answers_end)
        return 0;
    pump->answers_begin = pump->answers_end = pump->headers_used = 0;
    ssize_t got = recv(pump->urgent_socket, pump->requests + pump->requests_end,
                       sizeof pump->requests - pump->requests_end, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (got <= 0)
        return fail_socket(pump, ROLE_URGENT, got ? errno : 0);
    pump->requests_end += (uint64_t)got;
    uint64_t begin = 0;
    for (; pump->requests_end - begin >= sizeof(struct frame); begin += sizeof(struct frame)) {
        struct frame request;
        memcpy(&request, pump->requests + begin, sizeof request);
        int refusal = frame_check(&request, FRAMES_TO_SOURCE, pump->bounds, pump->count);
        if (refusal) {
            struct pump_status failure = {.failure = FAILURE_FRAME, .role = ROLE_URGENT, .number = refusal,
                                          .region = request.region, .offset = request.offset,
                                          .length = request.length};
            return fail(pump, &failure);
        }
        hist_add(&pump->counters.urgent.requests, 1);
        answer(pump, &request);
    }
    pump->requests_end -= begin;
    memmove(pump->requests, pump->requests + begin, pump->requests_end);
    return 1;
}

/* Drop what was sent from the front of a vector; returns the index of its first part not sent whole. */
static uint32_t advance(struct iovec *parts, uint32_t begin, uint64_t sent) {
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

static int send_answers(struct source *pump) {
    uint32_t count = pump->answers_end - pump->answers_begin;
    if (!count)
        return 0;
    struct msghdr message = {.msg_iov = &pump->answers[pump->answers_begin], .msg_iovlen = count};
    ssize_t sent = sendmsg(pump->urgent_socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : fail_socket(pump, ROLE_URGENT, errno);
    hist_add(&pump->counters.urgent.bytes_sent, (uint64_t)sent);
    pump->answers_begin = advance(pump->answers, pump->answers_begin, (uint64_t)sent);
    return 1;
}

static void urgent_run(void *argument) {
    struct source *pump = argument;
    thread_prefer();
    while (!atomic_load_explicit(&pump->stopping, memory_order_acquire)) {
        int requests = read_requests(pump);
        int answers = requests < 0 ? -1 : send_answers(pump);
        if (answers < 0)
            break;
        if (requests || answers) {
            waiter_progress(&pump->waiter);
            continue;
        }
        bool unsent = pump->answers_begin != pump->answers_end;
        struct pollfd descriptors[2] = {
            {.fd = pump->stop_fd, .events = POLLIN},
            {.fd = pump->urgent_socket, .events = unsent ? POLLOUT : POLLIN},
        };
        int result = waiter_wait(&pump->waiter, descriptors, 2);
        if (result && fail_socket(pump, ROLE_URGENT, -result))
            break;
    }
}

/* ---- the push thread --------------------------------------------------------------------------------------- */

static int send_frame(struct source *pump, uint8_t type, uint32_t region, uint64_t offset, uint64_t length) {
    struct source_channel *counters = &pump->counters.push;
    struct frame header = {.magic = FRAME_MAGIC, .type = type, .region = (uint16_t)region, .offset = offset,
                           .length = length};
    struct iovec parts[2] = {
        {.iov_base = &header, .iov_len = sizeof header},
        {.iov_base = type == FRAME_PAGES ? bytes_at(&pump->memory[region], offset) : NULL,
         .iov_len = type == FRAME_PAGES ? length : 0},
    };
    uint32_t begin = 0, count = type == FRAME_PAGES ? 2 : 1;
    struct pollfd descriptors[2] = {
        {.fd = pump->stop_fd, .events = POLLIN},
        {.fd = pump->push_socket, .events = POLLOUT},
    };
    hist_add(&counters->frames, 1);
    while (begin < count) {
        struct msghdr message = {.msg_iov = &parts[begin], .msg_iovlen = count - begin};
        ssize_t sent = sendmsg(pump->push_socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent >= 0) {
            hist_add(&counters->bytes_sent, (uint64_t)sent);
            begin = advance(parts, begin, (uint64_t)sent);
        } else if (errno != EAGAIN && errno != EINTR) {
            return fail_socket(pump, ROLE_PUSH, errno);
        } else if (poll(descriptors, 2, -1) < 0 && errno != EINTR) {
            return fail_socket(pump, ROLE_PUSH, errno);
        }
        if (atomic_load_explicit(&pump->stopping, memory_order_acquire))
            return -1;
    }
    return 0;
}

static bool claim(struct source_memory *memory, uint64_t page) {
    uint8_t unsent = UNSENT;
    return atomic_compare_exchange_strong(&memory->sent[page], &unsent, SENT_PUSH);
}

enum kind { KIND_NONE, KIND_PAGES, KIND_ZERO };

static int send_run(struct source *pump, enum kind kind, uint32_t region, uint64_t begin, uint64_t end) {
    if (kind == KIND_NONE || begin == end)
        return 0;
    uint64_t pages = (end - begin) / pump->memory[region].region.page_size;
    hist_add(kind == KIND_ZERO ? &pump->counters.push.zero : &pump->counters.push.pages, pages);
    return send_frame(pump, kind == KIND_ZERO ? FRAME_ZERO : FRAME_PAGES, region, begin, end - begin);
}

/* Send an extent in frames: each a run of claimed pages that are all zero or all not. */
static int push_extent(struct source *pump, const struct push_extent *extent) {
    struct source_memory *memory = &pump->memory[extent->region];
    uint64_t size = memory->region.page_size, end = extent->offset + extent->length;
    if (extent->zero)
        return send_run(pump, KIND_ZERO, extent->region, extent->offset, end);
    enum kind kind = KIND_NONE;
    uint64_t begin = extent->offset;
    for (uint64_t offset = extent->offset; offset < end; offset += size) {
        enum kind next = KIND_NONE;
        if (claim(memory, offset / size))
            next = is_zero(bytes_at(memory, offset), size) ? KIND_ZERO : KIND_PAGES;
        bool full = kind == KIND_PAGES && offset + size - begin > pump->frame_bytes;
        if (next != kind || full) {
            if (send_run(pump, kind, extent->region, begin, offset))
                return -1;
            kind = next;
            begin = offset;
        }
    }
    return send_run(pump, kind, extent->region, begin, end);
}

static void tell_low(struct source *pump, uint32_t queued) {
    if (queued < PUMP_RING_EXTENTS / 4 && !atomic_exchange(&pump->low_told, true))
        signal_fd(pump->low_fd);
}

static int wait_for_orders(struct source *pump) {
    struct pollfd descriptors[3] = {
        {.fd = pump->stop_fd, .events = POLLIN},
        {.fd = pump->work_fd, .events = POLLIN},
        {.fd = pump->push_socket, .events = POLLRDHUP}, /* nothing but its end comes there */
    };
    if (poll(descriptors, 3, -1) < 0 && errno != EINTR)
        return fail_socket(pump, ROLE_PUSH, errno);
    if (descriptors[2].revents & (POLLERR | POLLHUP | POLLRDHUP))
        return fail_socket(pump, ROLE_PUSH, 0);
    uint64_t count;
    if (descriptors[1].revents & POLLIN && read(pump->work_fd, &count, sizeof count) < 0 && errno != EAGAIN)
        return fail_socket(pump, ROLE_PUSH, errno);
    return 0;
}

static void push_run(void *argument) {
    struct source *pump = argument;
    while (!atomic_load_explicit(&pump->stopping, memory_order_acquire)) {
        uint32_t head = atomic_load_explicit(&pump->head, memory_order_relaxed);
        bool ended = atomic_load_explicit(&pump->ended, memory_order_acquire);
        uint32_t queued = atomic_load_explicit(&pump->tail, memory_order_acquire) - head;
        if (queued) {
            struct push_extent extent = pump->ring[head % PUMP_RING_EXTENTS];
            atomic_store_explicit(&pump->head, head + 1, memory_order_release);
            tell_low(pump, queued - 1);
            if (push_extent(pump, &extent))
                break;
        } else if (ended) {
            send_frame(pump, FRAME_END, 0, 0, 0);
            break;
        } else if (wait_for_orders(pump)) {
            break;
        }
    }
}

/* ---- the owner's side -------------------------------------------------------------------------------------- */

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
        result = thread_start(&pump->push_thread, "pc-push", push_run, pump);
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

int source_push(struct source *pump, const struct push_extent *extents, uint32_t count) {
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
    atomic_store_explicit(&pump->tail, tail + count, memory_order_release);
    atomic_store(&pump->low_told, false);
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
