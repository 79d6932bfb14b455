/* See wait.h. */
#include "wait.h"

#include <errno.h>
#include <sched.h>
#include <time.h>

/*
 * Giving the CPU away to nobody takes below one microsecond, to a vCPU that runs on to its next fault a few, and a
 * virtual machine's own host now and then takes a hundred. This long means that another thread used up its slice.
 */
#define CONTENDED_NS 500000u
/* How long that closes the window: four times as long each time it happens again soon, up to the second figure. */
#define CLOSED_MIN_NS 1000000u
#define CLOSED_MAX_NS 1000000000u
#define SOON 8u
/* How long the push closes it each time it is seen to move. */
#define BUSY_CLOSED_NS 2000000u

uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static bool window_open(struct waiter *waiter) {
    if (!waiter->window_ns)
        return false;
    uint64_t before = now_ns(), busy = atomic_load_explicit(waiter->busy, memory_order_relaxed);
    if (busy != waiter->busy_seen) {
        waiter->busy_seen = busy;
        if (waiter->closed_until_ns < before + BUSY_CLOSED_NS)
            waiter->closed_until_ns = before + BUSY_CLOSED_NS;
    }
    if (before < waiter->closed_until_ns)
        return false;
    if (!waiter->since_ns)
        waiter->since_ns = before;
    if (before - waiter->since_ns >= waiter->window_ns)
        return false;
    sched_yield();
    uint64_t took = now_ns() - before;
    if (took >= CONTENDED_NS) {
        waiter->closed_ns = waiter->closed_ns ? 4 * waiter->closed_ns : CLOSED_MIN_NS;
        if (waiter->closed_ns > CLOSED_MAX_NS)
            waiter->closed_ns = CLOSED_MAX_NS;
        waiter->closed_until_ns = before + took + waiter->closed_ns;
    } else if (waiter->closed_ns && before - waiter->closed_until_ns > SOON * waiter->closed_ns) {
        waiter->closed_ns = 0;
    }
    return true;
}

int waiter_wait(struct waiter *waiter, struct pollfd *descriptors, nfds_t count, int milliseconds) {
    if (window_open(waiter))
        return 0;
    waiter->since_ns = 0;
    if (poll(descriptors, count, milliseconds) < 0 && errno != EINTR)
        return -errno;
    return 0;
}
