/*
 * What the two halves of the pump, the source's and the destination's, have alike: regions to judge frames by, a
 * connection and a thread for each role, a stop, and one status that tells the owner of the end. What the owner calls
 * of it is in pump.h.
 *
 * A struct half is the first member of its struct source or struct destination and lives and dies with it.
 */
#ifndef POSTCOPY_HALF_H
#define POSTCOPY_HALF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "channel.h"
#include "pump.h"
#include "thread.h"

struct half {
    struct frame_bounds bounds[REGIONS_MAX];
    uint32_t count;
    struct channel urgent, push;
    int stop_fd;      /* readable while the threads are to end: it ends every wait */
    int event_fd;     /* complete, failed or broken, for the owner */
    _Atomic bool stopping;
    _Atomic bool ended;    /* stopped, and not only for a moment */
    _Atomic bool watching; /* a connection that is silent is broken */
    bool running;          /* it has threads */
    bool detached;         /* it was started, and its connections were taken away */
    uint64_t tick_ns;      /* of its heartbeats, 0: none */
    struct thread urgent_thread, push_thread;
    struct pump_status status;
    struct pump_status broken; /* why a connection broke */
};

/*
 * Allocate `size` bytes of zeros that begin with a struct half for `count` regions, on a boundary that keeps the
 * counters of two threads apart. NULL with errno set, EINVAL where a region is no whole pages.
 */
void *half_create(size_t size, const struct pump_region *regions, uint32_t count);
/*
 * Start both threads with `pump` for an argument, the urgent one under `name`. Without `push` there is one thread, and
 * no connections are wanted. 0 or -errno.
 */
int half_start(struct half *half, const char *name, void (*urgent)(void *), void (*push)(void *), void *pump);
/* Ask the threads to end and wait for them. Idempotent. */
void half_stop(struct half *half);
/* The same for a moment: half_start() starts them again. */
void half_halt(struct half *half);
/* Close the connections of a half without threads; it may be given new ones. */
void half_detach(struct half *half);
/* Close what it owns and free the memory that half_create() returned. The threads have ended. */
void half_destroy(struct half *half);

/*
 * Record the first failure, or the first break, and tell the owner; later ones are kept out, but the
 * kernel's also ends a pump that is complete. Always returns -1.
 */
int half_fail(struct half *half, const struct pump_status *failure);
/* The same for a connection that ended (number 0) or broke (its errno). */
int half_fail_socket(struct half *half, uint32_t role, int number);
/* Nothing came on a connection for too long: the same once silence counts, else 0. */
int half_fail_silent(struct half *half, uint32_t role);
/* Judge a header that came on a connection: 0, or -1 where it is refused, which breaks it. */
int half_check_frame(struct half *half, const struct frame *frame, uint32_t role, uint32_t allowed);

static inline const struct channel *half_channel(const struct half *half, uint32_t role) {
    return role == ROLE_PUSH ? &half->push : &half->urgent;
}
static inline bool half_stopping(const struct half *half) {
    return atomic_load_explicit(&half->stopping, memory_order_acquire);
}
static inline bool half_ended(const struct half *half) {
    return atomic_load_explicit(&half->ended, memory_order_acquire);
}

#endif
