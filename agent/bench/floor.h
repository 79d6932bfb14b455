/*
 * The floor: the work of a migration's page traffic by the barest loops that keep the bytes right.
 *
 * floor_run() makes both ends: a forked child is the source, the calling process the destination, TCP connections join
 * them. The memory is filled, served to the touchers' faults and pushed as the setup says, and at the end every byte is
 * compared. What the product does beyond that (states, recovery, counters, holes, policy) is left out on purpose: the
 * distance between the two is what the product costs.
 *
 * Ownership: the caller owns setup and result. A process runs one floor and then ends: after a failure threads may be
 * left waiting in a page fault, and nothing is freed.
 */
#ifndef POSTCOPY_BENCH_FLOOR_H
#define POSTCOPY_BENCH_FLOOR_H

#include <stdint.h>

#include "histogram.h"

/* Each touches a word of its own in a page, so they never race. */
#define FLOOR_TOUCHERS_MAX 64u

enum floor_way {
    FLOOR_NONE = 0,     /* push: there is none */
    FLOOR_COPY = 1,     /* receive into a small hot buffer, UFFDIO_COPY */
    FLOOR_CONTINUE = 2, /* receive into the alias, UFFDIO_CONTINUE */
    FLOOR_WRITE = 3,    /* push: receive into a small hot buffer, pwrite to the file, UFFDIO_CONTINUE */
};

struct floor_setup {
    uint64_t size, page_size;                 /* bytes; 4096 is shmem, 2 MiB is hugetlb */
    uint32_t touchers;                        /* threads that touch, 0 to FLOOR_TOUCHERS_MAX */
    uint32_t demand, push;                    /* enum floor_way */
    uint64_t touches;                         /* pages that each of them touches at most, each page once */
    uint64_t period_ns;                       /* from one touch of theirs to the next, 0: as fast as they can */
    uint64_t poll_ns;                         /* how long a thread looks again and again before it blocks */
    uint64_t frame_bytes;                     /* payload of a pushed frame, a multiple of page_size that divides size */
    uint64_t send_bytes, receive_bytes;       /* socket buffers of the push connection, 0: the kernel's choice */
    uint64_t pacing;                          /* SO_MAX_PACING_RATE of the push, bytes a second, 0: none */
    uint64_t source_cpus, destination_cpus;   /* bit masks, 0: any */
    uint64_t seed;
    uint32_t anonymous;                       /* 1: private memory without a file, placed by COPY alone */
    const char *source_netns, *destination_netns; /* paths of network namespaces, NULL: this one */
    const char *host; /* IPv4 address of the destination */
};

struct floor_result {
    char failure[128]; /* empty where all went well */
    uint64_t wall_ns;  /* go to the last page placed, without a push: to the last touch */
    uint64_t source_cpu_ns, destination_cpu_ns; /* of the threads that carry pages, without the touchers */
    uint64_t pages_demand, pages_push;
    uint64_t bytes_urgent, bytes_push; /* off the network */
    uint64_t pages_resident, pages_touched, pages_checked, pages_mismatched;
    struct hist latency;                   /* fault read to page placed, of the pages that were asked for */
    struct hist stall[FLOOR_TOUCHERS_MAX]; /* touches of a microsecond or longer, as the guest's own clock has them */
};

/* Returns 0, or -1 with `failure` set: the process must then end without joining anything. */
int floor_run(const struct floor_setup *setup, struct floor_result *result);

#endif
