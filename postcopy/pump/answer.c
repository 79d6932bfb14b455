/* The source's urgent thread: requests come in, pages go out on the same connection, in the order of the requests. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <unistd.h>

#include "source.h"

/*
 * A hole in the file is known without reading the mapping, which would allocate it. A file that is read is not asked:
 * reading it allocates nothing, and what lies behind the end of one that was cut short must not pass for zeros.
 */
static bool is_hole(const struct source_memory *memory, uint64_t offset) {
    const struct pump_region *region = &memory->region;
    if (region->fd < 0 || !is_mapped(memory))
        return false;
    off_t data = lseek(region->fd, (off_t)offset, SEEK_DATA);
    return data < 0 ? errno == ENXIO : (uint64_t)data >= offset + region->page_size;
}

/* Make the answer to a request. 0, or -1 with a failed status. */
static int answer(struct source *pump, const struct frame *request) {
    struct source_memory *memory = &pump->memory[request->region];
    struct source_channel *counters = &pump->counters.urgent;
    uint64_t page = request->offset / memory->region.page_size;
    uint8_t before = atomic_exchange(&memory->sent[page], SENT_DEMAND);
    uint64_t wanted = ((uint64_t)request->region << WANTED_PAGE_BITS | page) + 1;
    atomic_store_explicit(&pump->wanted, wanted, memory_order_relaxed);
    if (before == SENT_DEMAND || (before == SENT_PUSH && request->length > AGAIN_BYTES_MAX)) {
        hist_add(&counters->ignored, 1);
        return 0;
    }
    hist_add(&counters->again, before == SENT_PUSH);
    uint8_t *buffer = pump->answers_content ? pump->answers_content + pump->headers_used * pump->page_size_max : NULL;
    bool hole = is_hole(memory, request->offset);
    const uint8_t *content =
        hole ? NULL : content_at(pump, ROLE_URGENT, request->region, request->offset, request->length, buffer);
    if (!hole && !content)
        return -1;
    struct frame *header = &pump->headers[pump->headers_used++];
    *header = *request;
    pump->answers[pump->answers_end++] = (struct iovec){.iov_base = header, .iov_len = sizeof *header};
    hist_add(&counters->frames, 1);
    if (hole || is_zero(content, request->length)) {
        header->type = FRAME_ZERO;
        hist_add(&counters->zero, 1);
        return 0;
    }
    header->type = FRAME_PAGES;
    pump->answers[pump->answers_end++] = (struct iovec){.iov_base = (void *)(uintptr_t)content, .iov_len = request->length};
    hist_add(&counters->pages, 1);
    return 0;
}

/* Read requests and prepare their answers; only while no answer waits, so the destination sets the pace. */
static int read_requests(struct source *pump) {
    if (pump->answers_begin != pump->answers_end)
        return 0;
    pump->answers_begin = pump->answers_end = pump->headers_used = 0;
    struct iovec room = {.iov_base = pump->requests + pump->requests_end,
                         .iov_len = pump->answers_max * sizeof(struct frame) - pump->requests_end};
    ssize_t got = channel_receive(&pump->half.urgent, &room, 1);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (got <= 0)
        return half_fail_socket(&pump->half, ROLE_URGENT, got ? errno : 0);
    pump->asked_at = now_ns();
    pump->requests_end += (uint64_t)got;
    pump->urgent_received += (uint64_t)got;
    uint64_t begin = 0;
    for (; pump->requests_end - begin >= sizeof(struct frame); begin += sizeof(struct frame)) {
        struct frame request;
        memcpy(&request, pump->requests + begin, sizeof request);
        if (half_check_frame(&pump->half, &request, ROLE_URGENT, FRAMES_TO_SOURCE))
            return -1;
        if (request.type == FRAME_BEAT)
            continue;
        if (!atomic_load_explicit(&pump->guest_stopped, memory_order_acquire)) {
            struct pump_status failure = {.failure = FAILURE_EARLY, .role = ROLE_URGENT};
            return half_fail(&pump->half, &failure);
        }
        hist_add(&pump->counters.urgent.requests, 1);
        if (answer(pump, &request))
            return -1;
    }
    pump->requests_end -= begin;
    memmove(pump->requests, pump->requests + begin, pump->requests_end);
    return 1;
}

static int send_answers(struct source *pump) {
    uint32_t count = pump->answers_end - pump->answers_begin;
    if (!count)
        return 0;
    ssize_t sent = channel_send(&pump->half.urgent, &pump->answers[pump->answers_begin], count);
    if (sent < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : half_fail_socket(&pump->half, ROLE_URGENT, errno);
    hist_add(&pump->counters.urgent.bytes_sent, (uint64_t)sent);
    pump->answers_begin = parts_advance(pump->answers, pump->answers_begin, (uint64_t)sent);
    if (pump->answers_begin == pump->answers_end && pump->asked_at) {
        hist_add(&pump->counters.urgent.answered, pump->headers_used);
        hist_add(&pump->counters.urgent.answer_ns, pump->headers_used * (now_ns() - pump->asked_at));
    }
    return 1;
}

static int beat(struct source *pump) {
    uint64_t sent = atomic_load_explicit(&pump->counters.urgent.bytes_sent, memory_order_relaxed);
    enum beat_due due = beat_look(&pump->urgent_beat, sent, pump->urgent_received);
    if (due == BEAT_SILENT)
        return half_fail_silent(&pump->half, ROLE_URGENT);
    if (due != BEAT_SEND || pump->answers_begin != pump->answers_end)
        return 0;
    pump->headers[0] = (struct frame){.magic = FRAME_MAGIC, .type = FRAME_BEAT};
    pump->answers[0] = (struct iovec){.iov_base = &pump->headers[0], .iov_len = sizeof pump->headers[0]};
    pump->answers_begin = pump->asked_at = 0;
    pump->answers_end = pump->headers_used = 1;
    return 0;
}

void urgent_run(void *argument) {
    struct source *pump = argument;
    thread_prefer();
    beat_begin(&pump->urgent_beat, pump->half.tick_ns);
    while (!half_stopping(&pump->half)) {
        int requests = read_requests(pump);
        int answers = requests < 0 ? -1 : send_answers(pump);
        if (answers < 0 || (beat_ends(&pump->urgent_beat) && beat(pump)))
            break;
        if (requests || answers) {
            waiter_progress(&pump->waiter);
            continue;
        }
        bool unsent = pump->answers_begin != pump->answers_end;
        struct pollfd descriptors[2] = {
            {.fd = pump->half.stop_fd, .events = POLLIN},
            {.fd = pump->half.urgent.socket, .events = unsent ? POLLOUT : POLLIN},
        };
        int result = waiter_wait(&pump->waiter, descriptors, 2, beat_wait_ms(&pump->urgent_beat));
        if (result && half_fail_socket(&pump->half, ROLE_URGENT, -result))
            break;
    }
}
