/*
 * Heartbeats: each end of a data connection says now and then that it is there, and hears whether the other one is.
 *
 * A link that is taken down says nothing, and a connection without traffic would not notice. So the time is cut into
 * ticks: where nothing was sent since the last one, a BEAT is due; where nothing came for QUIET_TICKS in a row, the
 * connection is silent. Ticks are counted by whoever looks, so a process that was itself stopped for a while hears
 * before it judges. One thread has each struct.
 */
#ifndef POSTCOPY_BEAT_H
#define POSTCOPY_BEAT_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

struct beat {
    uint64_t tick_ns; /* 0: no beats on this connection */
    uint64_t due_at;  /* when the next tick ends */
    uint64_t sent, received; /* bytes in all, at the last tick */
    uint32_t quiet;   /* ticks in a row in which nothing came */
};

/* What is to be done at the end of a tick. */
enum beat_due { BEAT_NOTHING = 0, BEAT_SEND = 1, BEAT_SILENT = 2 };

/* To some milliseconds, which is enough here and costs next to nothing on the way of a page. */
static inline uint64_t beat_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The connection is a new one. */
static inline void beat_begin(struct beat *beat, uint64_t tick_ns) {
    *beat = (struct beat){.tick_ns = tick_ns, .due_at = beat_now() + tick_ns};
}

static inline bool beat_ends(const struct beat *beat) { return beat->tick_ns && beat_now() >= beat->due_at; }

/* A tick has ended: so many bytes were sent and received in all. Called after what had come was read. */
static inline enum beat_due beat_look(struct beat *beat, uint64_t sent, uint64_t received) {
    bool still = sent == beat->sent;
    beat->quiet = received == beat->received ? beat->quiet + 1 : 0;
    beat->sent = sent;
    beat->received = received;
    beat->due_at = beat_now() + beat->tick_ns;
    return beat->quiet >= QUIET_TICKS ? BEAT_SILENT : still ? BEAT_SEND : BEAT_NOTHING;
}

/* A tick has ended in which nothing could be read: it says nothing of the other side. Time to say that we are here. */
static inline void beat_pass(struct beat *beat) { beat->due_at = beat_now() + beat->tick_ns; }

/* How long poll(2) may wait: until the tick ends, -1 where there are none. */
static inline int beat_wait_ms(const struct beat *beat) {
    if (!beat->tick_ns)
        return -1;
    uint64_t now = beat_now();
    return now >= beat->due_at ? 0 : (int)((beat->due_at - now) / 1000000u) + 1;
}

#endif
