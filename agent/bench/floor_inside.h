/*
 * Inside the floor: what its files share. One struct floor is one end; the fork gives the source a copy of its own, and
 * only struct floor_shared is seen by both.
 */
#ifndef POSTCOPY_BENCH_FLOOR_INSIDE_H
#define POSTCOPY_BENCH_FLOOR_INSIDE_H

#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <semaphore.h>
#include <time.h>

#include "floor.h"

#define BLOCK_BYTES 4096u /* the pattern is one of 4 KiB blocks, whatever the page size */
#define HEADER_BYTES 24u  /* as long as the product's frame header and request */
#define REQUESTS_MAX 64u
#define STALL_MIN_NS 1000u /* as the emulated guest's: shorter accesses are the memory's own business */
#define NS 1000000000ull

struct header {
    uint64_t kind, page, bytes;
};
_Static_assert(sizeof(struct header) == HEADER_BYTES, "the same bytes on the wire as the product's");

/* Seen by both processes. */
struct floor_shared {
    _Atomic uint64_t source_cpu_ns;
    _Atomic bool failed;
    char failure[128]; /* written once, by whoever set `failed` */
};

struct toucher {
    struct floor *floor;
    uint32_t index;
    uint32_t *order;
    uint64_t touched;
};

struct asked {
    uint64_t page, read_at;
};

struct floor {
    struct floor_setup setup;
    struct floor_result *result;
    struct floor_shared *shared;
    uint64_t pages;
    int memory;             /* memfd */
    uint8_t *guest, *alias; /* the touchers' mapping, and one that is never registered */
    int uffd;
    int urgent, push; /* sockets */
    int go;           /* the source waits for a byte of it before it pushes */
    /* Destination. */
    _Atomic uint8_t *claimed; /* NULL where nobody can meet: one toucher and no push */
    _Atomic uint64_t placed;
    _Atomic bool stop;
    _Atomic uint64_t ended_at;
    _Atomic uint64_t cpu_ns;
    sem_t finished;
    sem_t start;
    struct asked asked[FLOOR_TOUCHERS_MAX];
    uint64_t asked_first, asked_count;
    uint8_t *answer; /* a header, then a page: what has come of the answer to the oldest request */
    uint64_t answer_bytes;
    uint8_t *frame; /* a header, then the payload of a pushed frame */
    struct toucher toucher[FLOOR_TOUCHERS_MAX];
};

static inline uint64_t clock_now(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * NS + (uint64_t)now.tv_nsec;
}
static inline uint64_t floor_now(void) { return clock_now(CLOCK_MONOTONIC); }

/* Looking again and again; each look gives the CPU to whoever else could use it. */
struct looking {
    uint64_t window_ns, since_ns;
};
static inline bool look_again(struct looking *looking) {
    if (!looking->window_ns)
        return false;
    uint64_t now = floor_now();
    if (!looking->since_ns)
        looking->since_ns = now;
    if (now - looking->since_ns >= looking->window_ns) {
        looking->since_ns = 0;
        return false;
    }
    sched_yield();
    return true;
}

/* Record why this end failed, in a word and with errno; the first reason stays. Returns -1. */
int floor_fail(struct floor *floor, const char *what);

/* floor_memory.c. All return 0, or -1 with the failure recorded. */
int memory_create(struct floor *floor, bool alias);
int memory_register(struct floor *floor);
void memory_fill(struct floor *floor);
int memory_check(struct floor *floor);
int memory_orders(struct floor *floor);

/* floor_source.c: the whole life of the child after its connections stand. Returns the process's exit status. */
int source_run(struct floor *floor);

/* floor_destination.c: threads; each takes a struct floor, a toucher a struct toucher. */
void *demand_thread(void *argument);
void *push_thread(void *argument);
void *toucher_thread(void *argument);

#endif
