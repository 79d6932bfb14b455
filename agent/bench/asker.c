/* See asker.h. */
#define _GNU_SOURCE
#include "asker.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define SECOND_NS 1000000000u
#define ANSWER_BYTES (1u << 20)

static const char QUESTION[] = "GET /metrics HTTP/1.1\r\nHost: agent\r\n\r\n";
static const char ANSWERED[] = "HTTP/1.1 200";

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

int asker_asks(uint64_t window_ns, uint64_t now) {
    return !window_ns || now / window_ns % 2;
}

/* Returns 0 when the next question is due, 1 at the end, or -errno. */
static int await_turn(struct asker *asker) {
    struct pollfd ending = {.fd = asker->ending, .events = POLLIN};
    for (;;) {
        uint64_t now = now_ns(), left = asker->next_ns > now ? asker->next_ns - now : 0;
        struct timespec timeout = {.tv_sec = (time_t)(left / SECOND_NS), .tv_nsec = (long)(left % SECOND_NS)};
        int ready = ppoll(&ending, 1, &timeout, NULL);
        if (ready < 0 && errno != EINTR)
            return -errno;
        if (ready >= 0)
            return ready;
    }
}

/* Throws away what was answered; false where nothing more will come. */
static bool hear(struct asker *asker, uint32_t index) {
    char status[sizeof ANSWERED - 1];
    int connection = asker->connections[index];
    ssize_t got = recv(connection, status, sizeof status, MSG_DONTWAIT);
    if (got > 0) {
        asker->unanswered &= ~(UINT64_C(1) << index);
        asker->answers += (size_t)got == sizeof status && !memcmp(status, ANSWERED, sizeof status);
        while ((got = recv(connection, NULL, ANSWER_BYTES, MSG_DONTWAIT | MSG_TRUNC)) > 0)
            ;
    }
    return got < 0 && (errno == EAGAIN || errno == EINTR);
}

/* One question at a time, or a second one of them would be the end of the connection. */
static bool ask(struct asker *asker, uint32_t index) {
    uint64_t bit = UINT64_C(1) << index;
    if (asker->unanswered & bit)
        return true;
    asker->unanswered |= bit;
    if (!asker->first_ns)
        asker->first_ns = now_ns();
    return send(asker->connections[index], QUESTION, sizeof QUESTION - 1, MSG_DONTWAIT | MSG_NOSIGNAL) > 0;
}

int asker_run(struct asker *asker) {
    if (!asker->count || asker->count > ASKER_CONNECTIONS_MAX)
        return -EINVAL;
    uint64_t step = asker->period_ns / asker->count; /* never all of them at one moment */
    if (!asker->next_ns)
        asker->next_ns = now_ns() + step;
    for (;;) {
        uint64_t now = now_ns();
        if (asker->next_ns + step < now)
            asker->next_ns = now; /* held up: what was missed is not made up for, in a window that is another's */
        if (!asker_asks(asker->window_ns, asker->next_ns))
            asker->next_ns += asker->window_ns - asker->next_ns % asker->window_ns;
        int ended = await_turn(asker);
        if (ended)
            return ended < 0 ? ended : (int)asker->count;
        uint32_t index = asker->turn;
        asker->turn = (index + 1) % asker->count;
        asker->next_ns += step;
        if (!hear(asker, index) || !ask(asker, index))
            return (int)index;
    }
}
