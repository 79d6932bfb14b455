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
/* Who has more work than one slice is met again by the next looks: within that much it is contention. */
#define AGAIN_NS 10000000u
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

bool waiter_open(struct waiter *waiter, uint64_t now) {
    if (!waiter->window_ns)
        return false;
    uint64_t busy = atomic_load_explicit(waiter->busy, memory_order_relaxed);
    if (busy != waiter->busy_seen) {
        waiter->busy_seen = busy;
        if (waiter->closed_until_ns < now + BUSY_CLOSED_NS)
            waiter->closed_until_ns = now + BUSY_CLOSED_NS;
    }
    if (now < waiter->closed_until_ns)
        return false;
    if (!waiter->since_ns)
        waiter->since_ns = now;
    return now - waiter->since_ns < waiter->window_ns;
}

void waiter_learn(struct waiter *waiter, uint64_t now, uint64_t took) {
    if (took < CONTENDED_NS) {
        if (waiter->closed_ns && now - waiter->closed_until_ns > SOON * waiter->closed_ns)
            waiter->closed_ns = 0;
        return;
    }
    bool again = now < waiter->again_until_ns;
    waiter->again_until_ns = now + took + AGAIN_NS;
    if (!again)
        return;
    waiter->closed_ns = waiter->closed_ns ? 4 * waiter->closed_ns : CLOSED_MIN_NS;
    if (waiter->closed_ns > CLOSED_MAX_NS)
        waiter->closed_ns = CLOSED_MAX_NS;
    waiter->closed_until_ns = now + took + waiter->closed_ns;
    waiter->again_until_ns = waiter->closed_until_ns + AGAIN_NS;
}

int waiter_wait(struct waiter *waiter, struct pollfd *descriptors, nfds_t count, int milliseconds) {
    uint64_t now = now_ns();
    if (waiter_open(waiter, now)) {
        sched_yield();
        waiter_learn(waiter, now, now_ns() - now);
        return 0;
    }
    waiter->since_ns = 0;
    if (poll(descriptors, count, milliseconds) < 0 && errno != EINTR)
        return -errno;
    return 0;
}
