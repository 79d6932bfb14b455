/*
 * The asker: asks agents for their metrics again and again, as a Prometheus on a host of its own does.
 *
 * Here it runs on the guest's host, and whatever it takes is taken from the guest. So a question costs one wake-up and
 * some system calls: the answer to the one before is thrown away unread but for its status, and none is waited for.
 *
 * Ownership: the caller owns the struct, its array and all descriptors, and leaves them alone while asker_run() runs.
 */
#ifndef POSTCOPY_BENCH_ASKER_H
#define POSTCOPY_BENCH_ASKER_H

#include <stdint.h>

/* Each connection is a bit of `unanswered`. */
#define ASKER_CONNECTIONS_MAX 64u

struct asker {
    const int *connections; /* TCP, 1 to ASKER_CONNECTIONS_MAX of them, or -1 where there is none; they take turns */
    uint32_t count, turn;
    int ending;         /* asker_run() returns once this is readable */
    uint64_t period_ns; /* from one question on a connection to the next one on it, at least `count` */
    uint64_t window_ns; /* it asks in every other such window of CLOCK_MONOTONIC, 0: always; see asker_asks() */
    uint64_t next_ns;   /* when the next question is due, 0: a turn from now */
    uint64_t unanswered;
    uint64_t answers;  /* of status 200 */
    uint64_t first_ns; /* when the first question was asked, 0: none was */
};

/* Whether an asker with such windows asks at this moment: in the windows with an odd number. */
int asker_asks(uint64_t window_ns, uint64_t now_ns);

/*
 * Asks until `ending` is readable or the turn of a connection comes that has ended. Returns -errno where it cannot ask,
 * `count` at the end, else the index of that connection: with another one in its place, or -1 until its next turn, and
 * its bit of `unanswered` cleared, call again.
 */
int asker_run(struct asker *asker);

#endif
