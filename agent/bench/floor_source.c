/* The floor's source: requests are answered out of memory as they come, the push sends memory from end to end. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "floor_inside.h"

static void *push_all(void *argument) {
    struct floor *floor = argument;
    const struct floor_setup *setup = &floor->setup;
    char byte;
    if (read(floor->go, &byte, 1) != 1)
        return NULL;
    uint64_t began = clock_now(CLOCK_THREAD_CPUTIME_ID);
    for (uint64_t offset = 0; offset < setup->size; offset += setup->frame_bytes) {
        struct header header = {.page = offset / setup->page_size, .bytes = setup->frame_bytes};
        struct iovec parts[2] = {
            {.iov_base = &header, .iov_len = sizeof header},
            {.iov_base = floor->guest + offset, .iov_len = setup->frame_bytes},
        };
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
        /* A blocking socket takes all of it or fails. */
        if (sendmsg(floor->push, &message, MSG_NOSIGNAL) < 0)
            break;
    }
    atomic_fetch_add(&floor->shared->source_cpu_ns, clock_now(CLOCK_THREAD_CPUTIME_ID) - began);
    return NULL;
}

/* Receive at least one whole request; returns the bytes held now, 0 at the end. */
static uint64_t read_requests(struct floor *floor, struct looking *looking, uint8_t *requests, uint64_t held) {
    uint64_t room = REQUESTS_MAX * HEADER_BYTES;
    do {
        ssize_t got = recv(floor->urgent, requests + held, room - held, floor->setup.poll_ns ? MSG_DONTWAIT : 0);
        if (got < 0 && errno == EAGAIN) {
            struct pollfd descriptor = {.fd = floor->urgent, .events = POLLIN};
            if (!look_again(looking))
                poll(&descriptor, 1, -1);
            continue;
        }
        if (got <= 0)
            return 0;
        held += (uint64_t)got;
        looking->since_ns = 0;
    } while (held < HEADER_BYTES);
    return held;
}

static void answer_all(struct floor *floor) {
    uint8_t requests[REQUESTS_MAX * HEADER_BYTES];
    struct iovec parts[2 * REQUESTS_MAX];
    struct looking looking = {.window_ns = floor->setup.poll_ns};
    uint64_t held = 0, page_size = floor->setup.page_size;
    while ((held = read_requests(floor, &looking, requests, held))) {
        uint64_t count = held / HEADER_BYTES;
        for (uint64_t i = 0; i < count; i++) {
            /* The request goes back as the answer's header. */
            struct header header;
            memcpy(&header, requests + i * HEADER_BYTES, sizeof header);
            parts[2 * i] = (struct iovec){.iov_base = requests + i * HEADER_BYTES, .iov_len = HEADER_BYTES};
            parts[2 * i + 1] = (struct iovec){.iov_base = floor->guest + header.page * page_size, .iov_len = page_size};
        }
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2 * count};
        if (sendmsg(floor->urgent, &message, MSG_NOSIGNAL) < 0)
            break;
        held -= count * HEADER_BYTES;
        memmove(requests, requests + count * HEADER_BYTES, held);
    }
}

int source_run(struct floor *floor) {
    pthread_t pushing;
    bool pushes = floor->setup.push != FLOOR_NONE;
    memory_fill(floor);
    if (send(floor->urgent, "r", 1, MSG_NOSIGNAL) != 1) {
        floor_fail(floor, "source: send");
        return 1;
    }
    if (pushes && pthread_create(&pushing, NULL, push_all, floor)) {
        floor_fail(floor, "source: pthread_create");
        return 1;
    }
    uint64_t began = clock_now(CLOCK_THREAD_CPUTIME_ID);
    answer_all(floor);
    atomic_fetch_add(&floor->shared->source_cpu_ns, clock_now(CLOCK_THREAD_CPUTIME_ID) - began);
    if (pushes)
        pthread_join(pushing, NULL);
    return 0;
}
