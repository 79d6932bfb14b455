/* The source's push thread: orders come out of the ring, frames go out on the push connection. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <unistd.h>

#include "source.h"

/* The payload of a frame while faults are about: see frame_bytes(). */
#define FRAME_BYTES_FAULTS (256u << 10)
/* Pages of a hole that go with one header, at most: to note so many takes a moment, in which nothing is sent or heard. */
#define HOLE_PAGES (1ull << 26)

/*
 * Nothing but beats comes from the destination on this connection, and one day its end. One look takes what one read
 * brings, so that a destination that never ceases to send keeps this thread from nothing.
 */
static int hear(struct source *pump) {
    struct iovec room = {.iov_base = pump->heard + pump->heard_end, .iov_len = sizeof pump->heard - pump->heard_end};
    ssize_t got = channel_receive(&pump->half.push, &room, 1);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (got <= 0)
        return half_fail_socket(&pump->half, ROLE_PUSH, got ? errno : 0);
    pump->heard_end += (uint64_t)got;
    pump->push_received += (uint64_t)got;
    uint64_t used = 0;
    for (struct frame frame; pump->heard_end - used >= sizeof frame; used += sizeof frame) {
        memcpy(&frame, pump->heard + used, sizeof frame);
        if (half_check_frame(&pump->half, &frame, ROLE_PUSH, FRAMES_PUSH_TO_SOURCE))
            return -1;
    }
    pump->heard_end -= used;
    memmove(pump->heard, pump->heard + used, pump->heard_end);
    return 0;
}

/* The tick may be over. Returns an enum beat_due, or -1 with a broken connection. */
static int look(struct source *pump) {
    if (!beat_ends(&pump->push_beat))
        return BEAT_NOTHING;
    if (hear(pump))
        return -1;
    uint64_t sent = atomic_load_explicit(&pump->counters.push.bytes_sent, memory_order_relaxed);
    enum beat_due due = beat_look(&pump->push_beat, sent, pump->push_received);
    return due == BEAT_SILENT && half_fail_silent(&pump->half, ROLE_PUSH) ? -1 : (int)due;
}

/* `content` is of `length` bytes for PAGES, and not looked at for the others. */
static int send_frame(struct source *pump, uint8_t type, uint32_t region, uint64_t offset, uint64_t length,
                      const uint8_t *content) {
    struct source_channel *counters = &pump->counters.push;
    struct frame header = {.magic = FRAME_MAGIC, .type = type, .region = (uint16_t)region, .offset = offset,
                           .length = length};
    struct iovec parts[2] = {
        {.iov_base = &header, .iov_len = sizeof header},
        {.iov_base = (void *)(uintptr_t)content, .iov_len = type == FRAME_PAGES ? length : 0},
    };
    uint32_t begin = 0, count = type == FRAME_PAGES ? 2 : 1;
    struct pollfd descriptors[2] = {
        {.fd = pump->half.stop_fd, .events = POLLIN},
        {.fd = pump->half.push.socket, .events = POLLOUT},
    };
    hist_add(&counters->frames, 1);
    while (begin < count) {
        ssize_t sent = channel_send(&pump->half.push, &parts[begin], count - begin);
        if (sent >= 0) {
            hist_add(&counters->bytes_sent, (uint64_t)sent);
            begin = parts_advance(parts, begin, (uint64_t)sent);
        } else if (errno != EAGAIN && errno != EINTR) {
            return half_fail_socket(&pump->half, ROLE_PUSH, errno);
        } else if (poll(descriptors, 2, beat_wait_ms(&pump->push_beat)) < 0 && errno != EINTR) {
            return half_fail_socket(&pump->half, ROLE_PUSH, errno);
        }
        if (half_stopping(&pump->half) || look(pump) < 0)
            return -1;
    }
    return 0;
}

static bool claim(struct source_memory *memory, uint64_t page) {
    uint8_t unsent = UNSENT;
    return atomic_compare_exchange_strong(&memory->sent[page], &unsent, SENT_PUSH);
}

enum kind { KIND_NONE, KIND_PAGES, KIND_ZERO };

static int send_run(struct source *pump, enum kind kind, uint32_t region, uint64_t begin, uint64_t end,
                    const uint8_t *content) {
    if (kind == KIND_NONE || begin == end)
        return 0;
    uint64_t pages = (end - begin) / pump->memory[region].region.page_size;
    hist_add(kind == KIND_ZERO ? &pump->counters.push.zero : &pump->counters.push.pages, pages);
    return send_frame(pump, kind == KIND_ZERO ? FRAME_ZERO : FRAME_PAGES, region, begin, end - begin, content);
}

/*
 * The payload of the next frame. A long one costs the least: both ends are woken less often. But its pages are placed
 * when all of it has come, and until then a fault has them sent once more. So where pages are asked for it is short.
 */
static uint64_t frame_bytes(struct source *pump) {
    uint64_t requests = atomic_load_explicit(&pump->counters.urgent.requests, memory_order_relaxed);
    bool faults = requests != pump->requests_seen;
    pump->requests_seen = requests;
    return faults && pump->frame_bytes > FRAME_BYTES_FAULTS ? FRAME_BYTES_FAULTS : pump->frame_bytes;
}

/* Send content in frames: each a run of claimed pages that are all zero or all not. */
static int push_content(struct source *pump, uint32_t region, uint64_t start, uint64_t length, const uint8_t *content) {
    struct source_memory *memory = &pump->memory[region];
    uint64_t size = memory->region.page_size, begin = start, end = start + length, most = 0;
    enum kind kind = KIND_NONE;
    for (uint64_t offset = start; offset < end; offset += size) {
        enum kind next = KIND_NONE;
        if (claim(memory, offset / size))
            next = is_zero(content + (offset - start), size) ? KIND_ZERO : KIND_PAGES;
        bool full = kind == KIND_PAGES && offset + size - begin > most;
        if (next != kind || full) {
            if (send_run(pump, kind, region, begin, offset, content + (begin - start)))
                return -1;
            kind = next;
            begin = offset;
            most = frame_bytes(pump);
        }
    }
    return send_run(pump, kind, region, begin, end, content + (begin - start));
}

/*
 * A hole is sent whole, whatever of it was asked for: that takes one header. Its pages are noted behind it and nothing but
 * noted, so each is still answered when it is asked for: the destination may be long in getting through the push.
 */
static int push_hole(struct source *pump, const struct push_extent *extent) {
    struct source_memory *memory = &pump->memory[extent->region];
    uint64_t size = memory->region.page_size, end = (extent->offset + extent->length) / size;
    for (uint64_t begin = extent->offset / size, stop; begin < end; begin = stop) {
        stop = end - begin < HOLE_PAGES ? end : begin + HOLE_PAGES;
        if (send_run(pump, KIND_ZERO, extent->region, begin * size, stop * size, NULL))
            return -1;
        for (uint64_t page = begin; page < stop; page++)
            page = pages_mark(memory->sent, page, stop, SENT_HOLE);
    }
    return 0;
}

/* An extent goes out of its mapping as a whole, and out of a file piece by piece. */
static int push_extent(struct source *pump, const struct push_extent *extent) {
    const struct source_memory *memory = &pump->memory[extent->region];
    uint64_t end = extent->offset + extent->length, piece = extent->length;
    /* That it is zero was found out before: of a file it is true as long as nobody wrote to it. */
    if (extent->zero && content_holds(pump, ROLE_PUSH, extent->region, extent->offset, extent->length))
        return -1;
    if (extent->zero)
        return push_hole(pump, extent);
    if (!is_mapped(memory))
        piece = pump->push_content_bytes / memory->region.page_size * memory->region.page_size;
    for (uint64_t offset = extent->offset; offset < end; offset += piece) {
        uint64_t length = piece < end - offset ? piece : end - offset;
        const uint8_t *content = content_at(pump, ROLE_PUSH, extent->region, offset, length, pump->push_content);
        if (!content || push_content(pump, extent->region, offset, length, content))
            return -1;
    }
    return 0;
}

static void tell_low(struct source *pump, uint32_t queued) {
    if (queued < PUMP_RING_EXTENTS / 4 && !atomic_exchange(&pump->low_told, true))
        signal_fd(pump->low_fd);
}

static int wait_for_orders(struct source *pump) {
    struct pollfd descriptors[3] = {
        {.fd = pump->half.stop_fd, .events = POLLIN},
        {.fd = pump->work_fd, .events = POLLIN},
        {.fd = pump->half.push.socket, .events = POLLIN},
    };
    if (poll(descriptors, 3, beat_wait_ms(&pump->push_beat)) < 0 && errno != EINTR)
        return half_fail_socket(&pump->half, ROLE_PUSH, errno);
    if (descriptors[2].revents && hear(pump))
        return -1;
    uint64_t count;
    if (descriptors[1].revents & POLLIN && read(pump->work_fd, &count, sizeof count) < 0 && errno != EAGAIN)
        return half_fail_socket(&pump->half, ROLE_PUSH, errno);
    return 0;
}

void orders_run(void *argument) {
    struct source *pump = argument;
    bool told_end = false;
    beat_begin(&pump->push_beat, pump->half.tick_ns);
    while (!half_stopping(&pump->half)) {
        int due = look(pump);
        if (due < 0 || (due == BEAT_SEND && send_frame(pump, FRAME_BEAT, 0, 0, 0, NULL)))
            break;
        uint32_t head = atomic_load_explicit(&pump->head, memory_order_relaxed);
        bool ended = atomic_load_explicit(&pump->ended, memory_order_acquire);
        uint32_t queued = atomic_load_explicit(&pump->tail, memory_order_acquire) - head;
        if (queued) {
            struct push_extent extent = pump->ring[head % PUMP_RING_EXTENTS];
            atomic_store_explicit(&pump->head, head + 1, memory_order_release);
            tell_low(pump, queued - 1);
            if (push_extent(pump, &extent))
                break;
        } else if (ended && !told_end) {
            told_end = true;
            if (send_frame(pump, FRAME_END, 0, 0, 0, NULL) || !pump->push_beat.tick_ns)
                break;
        } else if (wait_for_orders(pump)) {
            break;
        }
    }
}
