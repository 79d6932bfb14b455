/*
 * Waiting: poll a while, then block.
 *
 * Waking an idle CPU costs tens of microseconds, several times what serving a page costs; a thread that looks again
 * and again instead is there at once. But looking takes the CPU from whoever has work, and against a busy push it is
 * ten times worse than blocking. So the window is a setting (0 always blocks), each look offers the CPU to any other
 * runnable thread, and the window is closed for a while as soon as there is work for the CPUs: when the push beside
 * us has moved bytes, or when looks take so long that another thread must have run meanwhile. One such look alone is
 * forgiven: somebody had a little to do, as the event loop has with every scrape, and has gone.
 */
#ifndef POSTCOPY_WAIT_H
#define POSTCOPY_WAIT_H

#include <poll.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct waiter {
    uint64_t window_ns;            /* how long to look before blocking */
    const _Atomic uint64_t *busy;  /* moves while the push beside us has work */
    uint64_t busy_seen;
    uint64_t since_ns;             /* when the looking began, 0 if there was progress since */
    uint64_t closed_until_ns;
    uint64_t closed_ns;            /* how long contention closed it the last time */
    uint64_t again_until_ns;       /* until then one more look that takes long closes it */
};

uint64_t now_ns(void);
/* Whether there may be a look now. */
bool waiter_open(struct waiter *waiter, uint64_t now);
/* Learn from a look that began then and took so long. */
void waiter_learn(struct waiter *waiter, uint64_t now, uint64_t took);
/* There was something to do: the next wait begins with a whole window. */
static inline void waiter_progress(struct waiter *waiter) { waiter->since_ns = 0; }
/*
 * Nothing to do. Returns at once while the window is open, else blocks until one of the descriptors is ready or the time
 * is over (-1: for ever).
 */
int waiter_wait(struct waiter *waiter, struct pollfd *descriptors, nfds_t count, int milliseconds);

#endif
