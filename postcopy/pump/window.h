/*
 * How much of the push may be under way at once.
 *
 * A demand page shares the link with the push: what the push has under way is a queue in front of it, wherever on the
 * way that queue stands. The receiver bounds it by the window it offers on the push connection. It learns of the queue
 * from the urgent connection, whose packets wait in it: when their round trip has grown, the link is full and its rate
 * is what arrives now, so the window becomes what fills the link and a short queue. When the round trip is short, or
 * no faults are about, the window grows again. Two ends on one host share no link and are left alone.
 */
#ifndef POSTCOPY_WINDOW_H
#define POSTCOPY_WINDOW_H

#include <stdint.h>

struct window {
    int push, urgent;        /* sockets; the urgent one tells of the round trip */
    int shared;              /* whether there is a link to share */
    uint64_t interval_at;    /* ns: when the present interval of measuring began */
    uint64_t interval_bytes; /* received before it */
    uint64_t faults;         /* seen at the last look */
    uint64_t fault_at;       /* ns: when they last moved */
    uint64_t bytes;          /* what is offered */
};

void window_init(struct window *window, int push, int urgent);
/* Bytes received so far, faults so far: called whenever something was received, acts every few milliseconds. */
void window_update(struct window *window, uint64_t received, uint64_t faults, uint64_t now_ns);

#endif
