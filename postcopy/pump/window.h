/*
 * How much of the push may be under way at once.
 *
 * A demand page shares the link with the push: what the push has under way is a queue in front of it, wherever on the
 * way that queue stands. The receiver bounds it by the window it offers on the push connection. It learns of the queue
 * from the urgent connection, whose packets wait in it: when their round trip has grown, the link is full and its rate
 * is what arrives now, so the window becomes what fills the link and a short queue. When the round trip is short, or
 * no faults are about, the window grows again. It begins small: a guest's first faults come with the push's first bytes,
 * and a window that begins wide has filled the queue before its length is known. Two ends on one host share no link and
 * are left alone.
 */
#ifndef POSTCOPY_WINDOW_H
#define POSTCOPY_WINDOW_H

#include <stdbool.h>
#include <stdint.h>

struct window {
    int push, urgent;        /* sockets; the urgent one tells of the round trip */
    int shared;              /* whether there is a link to share */
    uint64_t interval_at;    /* ns: when the present interval of measuring began */
    uint64_t interval_bytes; /* received before it */
    uint64_t faults;         /* seen at the last look */
    uint64_t fault_at;       /* ns: when they last moved */
    uint64_t bytes;          /* what is offered */
    uint64_t buffer;         /* what the kernel may hold of the push here, its own overhead included */
};

/*
 * The window after this one: `rate` in bytes a second is what arrived lately, the round trips are the present one and
 * the least ever seen, `faults` says whether any are about.
 */
uint64_t window_next(uint64_t bytes, uint64_t rate, uint64_t round_trip_us, uint64_t least_us, bool faults);

void window_init(struct window *window, int push, int urgent);
/* Bytes received so far, faults so far: called whenever something was received, acts every few milliseconds. */
void window_update(struct window *window, uint64_t received, uint64_t faults, uint64_t now_ns);

/* So much of the push is worth waking up for, where as much is wanted: never all that may be under way. */
uint64_t window_enough(const struct window *window);

#endif
