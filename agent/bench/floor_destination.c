/*
 * The floor's destination: touchers raise faults, one thread turns each into a request and its answer into a page, one
 * thread places what is pushed. A page is claimed once, with one atomic exchange, by whoever will write it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "floor_inside.h"

static bool claim(struct floor *floor, uint64_t page) {
    return !floor->claimed || !atomic_exchange_explicit(&floor->claimed[page], 1, memory_order_acq_rel);
}

static void placed(struct floor *floor, uint64_t pages) {
    /* Without a push nobody waits for the last page: the touchers know when they are done. */
    if (floor->setup.push == FLOOR_NONE)
        return;
    if (atomic_fetch_add_explicit(&floor->placed, pages, memory_order_relaxed) + pages == floor->pages) {
        atomic_store(&floor->ended_at, floor_now());
        atomic_store(&floor->stop, true);
        sem_post(&floor->finished);
    }
}

static int place(struct floor *floor, enum floor_way way, uint64_t offset, const uint8_t *content, uint64_t bytes) {
    uint64_t address = (uint64_t)(uintptr_t)floor->guest + offset;
    while (bytes) {
        int result;
        int64_t done;
        if (way == FLOOR_COPY) {
            struct uffdio_copy copy = {.dst = address, .src = (uint64_t)(uintptr_t)content, .len = bytes};
            result = ioctl(floor->uffd, UFFDIO_COPY, &copy);
            done = copy.copy;
        } else {
            struct uffdio_continue range = {.range = {.start = address, .len = bytes}};
            result = ioctl(floor->uffd, UFFDIO_CONTINUE, &range);
            done = range.mapped;
        }
        if (!result)
            return 0;
        if (errno != EAGAIN)
            return floor_fail(floor, "placing");
        done = done > 0 ? done : 0;
        address += (uint64_t)done;
        content += done;
        bytes -= (uint64_t)done;
    }
    return 0;
}

/* ---- demand ------------------------------------------------------------------------------------------------- */

/* Read faults and ask for their pages; returns whether there were any, or -1. */
static int take_faults(struct floor *floor) {
    struct uffd_msg messages[FLOOR_TOUCHERS_MAX];
    struct header requests[FLOOR_TOUCHERS_MAX];
    ssize_t got = read(floor->uffd, messages, floor->setup.touchers * sizeof *messages);
    if (got < 0)
        return errno == EAGAIN ? 0 : floor_fail(floor, "read of a fault");
    uint64_t now = floor_now(), count = 0;
    for (size_t i = 0; i < (size_t)got / sizeof *messages; i++) {
        uint64_t offset = messages[i].arg.pagefault.address - (uint64_t)(uintptr_t)floor->guest;
        uint64_t page = offset / floor->setup.page_size;
        if (!claim(floor, page))
            continue;
        uint64_t last = (floor->asked_first + floor->asked_count++) % FLOOR_TOUCHERS_MAX;
        floor->asked[last] = (struct asked){.page = page, .read_at = now};
        requests[count++] = (struct header){.page = page, .bytes = floor->setup.page_size};
    }
    if (count && send(floor->urgent, requests, count * sizeof *requests, MSG_NOSIGNAL) < 0)
        return floor_fail(floor, "send of a request");
    return 1;
}

/* Receive towards the answer to the oldest request and place it once it is whole; answers come in their order. */
static int take_answer(struct floor *floor) {
    const struct asked *asked = &floor->asked[floor->asked_first];
    uint64_t size = floor->setup.page_size, offset = asked->page * size, done = floor->answer_bytes;
    bool direct = floor->setup.demand == FLOOR_CONTINUE;
    uint8_t *page = direct ? floor->alias + offset : floor->answer + HEADER_BYTES;
    uint64_t header_left = done < HEADER_BYTES ? HEADER_BYTES - done : 0;
    uint64_t page_done = done < HEADER_BYTES ? 0 : done - HEADER_BYTES;
    struct iovec parts[2] = {
        {.iov_base = floor->answer + done, .iov_len = header_left},
        {.iov_base = page + page_done, .iov_len = size - page_done},
    };
    struct msghdr message = {.msg_iov = header_left ? parts : parts + 1, .msg_iovlen = header_left ? 2 : 1};
    ssize_t got = recvmsg(floor->urgent, &message, MSG_DONTWAIT);
    if (got <= 0)
        return got < 0 && errno == EAGAIN ? 0 : floor_fail(floor, "receive of a page");
    floor->answer_bytes += (uint64_t)got;
    if (floor->answer_bytes < HEADER_BYTES + size)
        return 1;
    if (place(floor, floor->setup.demand, offset, page, size))
        return -1;
    hist_record(&floor->result->latency, floor_now() - asked->read_at);
    floor->result->bytes_urgent += HEADER_BYTES + size;
    floor->result->pages_demand++;
    floor->answer_bytes = 0;
    floor->asked_first = (floor->asked_first + 1) % FLOOR_TOUCHERS_MAX;
    floor->asked_count--;
    placed(floor, 1);
    return 1;
}

void *demand_thread(void *argument) {
    struct floor *floor = argument;
    struct looking looking = {.window_ns = floor->setup.poll_ns};
    struct pollfd descriptors[2] = {
        {.fd = floor->uffd, .events = POLLIN},
        {.fd = floor->urgent, .events = POLLIN},
    };
    /* Pages that were asked for are waited for also after the stop: their touchers wait in the fault. */
    while (!atomic_load_explicit(&floor->stop, memory_order_relaxed) || floor->asked_count) {
        int faults = floor->asked_count < floor->setup.touchers ? take_faults(floor) : 0;
        int answers = floor->asked_count && faults >= 0 ? take_answer(floor) : 0;
        if (faults < 0 || answers < 0)
            break;
        if (faults || answers)
            looking.since_ns = 0;
        else if (!look_again(&looking))
            poll(descriptors, 2, -1);
    }
    atomic_fetch_add(&floor->cpu_ns, clock_now(CLOCK_THREAD_CPUTIME_ID));
    return NULL;
}

/* ---- push --------------------------------------------------------------------------------------------------- */

static int receive(struct floor *floor, void *buffer, uint64_t bytes) {
    ssize_t got = recv(floor->push, buffer, bytes, MSG_WAITALL);
    return got == (ssize_t)bytes ? 0 : floor_fail(floor, "receive of the push");
}

/* Out of the buffer, in runs of pages that could be claimed. */
static int place_staged(struct floor *floor, uint64_t offset, const uint8_t *content) {
    uint64_t size = floor->setup.page_size, bytes = floor->setup.frame_bytes;
    bool copies = floor->setup.push == FLOOR_COPY;
    for (uint64_t begin = 0, end = 0; begin < bytes; begin = end = end + size) {
        while (end < bytes && claim(floor, (offset + end) / size))
            end += size;
        if (begin == end)
            continue;
        if (!copies && pwrite(floor->memory, content + begin, end - begin, (off_t)(offset + begin)) < 0)
            return floor_fail(floor, "pwrite");
        if (place(floor, copies ? FLOOR_COPY : FLOOR_CONTINUE, offset + begin, content + begin, end - begin))
            return -1;
        floor->result->pages_push += (end - begin) / size;
        placed(floor, (end - begin) / size);
    }
    return 0;
}

/* Off the network into the alias, in runs of pages that could be claimed; the others go to the buffer, unused. */
static int receive_direct(struct floor *floor, uint64_t offset, uint8_t *dropped) {
    uint64_t size = floor->setup.page_size, stop = offset + floor->setup.frame_bytes;
    while (offset < stop) {
        uint64_t end = offset;
        while (end < stop && claim(floor, end / size))
            end += size;
        if (end > offset) {
            if (receive(floor, floor->alias + offset, end - offset) ||
                place(floor, FLOOR_CONTINUE, offset, NULL, end - offset))
                return -1;
            floor->result->pages_push += (end - offset) / size;
            placed(floor, (end - offset) / size);
        }
        if (end < stop && receive(floor, dropped, size))
            return -1;
        offset = end + size;
    }
    return 0;
}

void *push_thread(void *argument) {
    struct floor *floor = argument;
    const struct floor_setup *setup = &floor->setup;
    bool direct = setup->push == FLOOR_CONTINUE;
    for (uint64_t offset = 0; offset < setup->size; offset += setup->frame_bytes) {
        if (receive(floor, floor->frame, HEADER_BYTES + (direct ? 0 : setup->frame_bytes)))
            break;
        floor->result->bytes_push += HEADER_BYTES + setup->frame_bytes;
        if (direct ? receive_direct(floor, offset, floor->frame) : place_staged(floor, offset, floor->frame + HEADER_BYTES))
            break;
    }
    atomic_fetch_add(&floor->cpu_ns, clock_now(CLOCK_THREAD_CPUTIME_ID));
    return NULL;
}

/* ---- touchers ----------------------------------------------------------------------------------------------- */

static uint64_t wait_until(uint64_t due) {
    struct timespec at = {.tv_sec = (time_t)(due / NS), .tv_nsec = (long)(due % NS)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL) == EINTR)
        ;
    return floor_now();
}

void *toucher_thread(void *argument) {
    struct toucher *toucher = argument;
    struct floor *floor = toucher->floor;
    struct hist *stall = &floor->result->stall[toucher->index];
    uint64_t limit = floor->setup.touches < floor->pages ? floor->setup.touches : floor->pages, i = 0;
    while (sem_wait(&floor->start))
        ;
    uint64_t began = floor_now(), due = began;
    for (; i < limit && !atomic_load_explicit(&floor->stop, memory_order_relaxed); i++) {
        if (floor->setup.period_ns)
            began = wait_until(due += floor->setup.period_ns);
        uint64_t *page = (uint64_t *)(void *)(floor->guest + toucher->order[i] * floor->setup.page_size);
        ++*(volatile uint64_t *)&page[toucher->index];
        uint64_t ended = floor_now();
        if (ended - began >= STALL_MIN_NS)
            hist_record(stall, ended - began);
        began = ended;
    }
    toucher->touched = i;
    return NULL;
}
