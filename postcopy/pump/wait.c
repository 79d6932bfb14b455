/* See wait.h. */
#include "wait.h"

#include <errno.h>
#include <sched.h>
#include <time.h>

/* Giving the CPU away to nobody takes well below this; longer means that another thread had work for it. */
#define YIELD_ALONE_NS 4000u
/* How long the window stays closed after that: doubled each time, up to the second figure. */
#define CLOSED_MIN_NS 1000000u
#define CLOSED_MAX_NS 16000000u

uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static bool window_open(struct waiter *waiter) {
    if (!waiter->window_ns)
        return false;
    uint64_t before = now_ns();
    if (before < waiter->closed_until_ns)
        return false;
    if (!waiter->since_ns)
        waiter->since_ns = before;
    if (before - waiter->since_ns >= waiter->window_ns)
        return false;
    sched_yield();
    uint64_t after = now_ns();
    if (after - before < YIELD_ALONE_NS) {
        waiter->closed_ns = waiter->closed_ns > CLOSED_MIN_NS ? waiter->closed_ns - waiter->closed_ns / 1024 : 0;
        return true;
    }
    waiter->closed_ns = waiter->closed_ns ? 2 * waiter->closed_ns : CLOSED_MIN_NS;
    if (waiter->closed_ns > CLOSED_MAX_NS)
        waiter->closed_ns = CLOSED_MAX_NS;
    waiter->closed_until_ns = after + waiter->closed_ns;
    return true; /* time has passed: look once more before blocking */
}

int waiter_wait(struct waiter *waiter, struct pollfd *descriptors, nfds_t count) {
    if (window_open(waiter))
        return 0;
    waiter->since_ns = 0;
    while (poll(descriptors, count, -1) < 0)
        if (errno != EINTR)
            return -errno;
    return 0;
}
