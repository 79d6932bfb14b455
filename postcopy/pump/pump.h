/*
 * The data plane: how pages move between two agents, on threads that never need Python.
 *
 * A pump is created with everything it will ever use, given its connections, started, watched through its status and
 * counters, stopped and destroyed. All functions are for one owning thread; the counters and the status may be read
 * at any time between create and destroy. Nothing is allocated after create, nothing is logged, no policy is made.
 *
 * Ownership: the pump owns the sockets given to half_attach and its own eventfds and closes them in *_destroy. The
 * userfaultfd, the regions' mappings and their file descriptors stay the caller's and must outlive the pump.
 *
 * Every queue, frame and count has an end, and the number is in postcopy/limits.py: the compiler is given them as macros.
 */
#ifndef POSTCOPY_PUMP_H
#define POSTCOPY_PUMP_H

#include <stdbool.h>
#include <stdint.h>

#include "frame.h"
#include "histogram.h"
#include "tls.h"

enum pump_role { ROLE_URGENT = 2, ROLE_PUSH = 3 };

/* How the content of a page becomes a present page. MOVE gives away pages of the staging buffer: see place.h. */
enum pump_placement { PLACE_COPY = 0, PLACE_CONTINUE = 1, PLACE_MOVE = 2 };

/* One byte of the destination's map for each page. The order of life is in page_map.h. */
enum page_state {
    PAGE_ABSENT = 0,
    PAGE_REQUESTED = 1,
    PAGE_PLACING = 2,
    PAGE_PLACED = 3,
    PAGE_ZERO = 4,
    PAGE_WATCHED = 5,
    PAGE_DROPPED = 6,
    PAGE_POISONED = 7,
};

/* What has become of a page at the source. */
enum page_sent {
    UNSENT = 0,
    SENT_PUSH = 1,   /* pushed, or at the destination from before */
    SENT_DEMAND = 2, /* asked for and answered, also if it had been pushed */
    SENT_HOLE = 3,   /* told with a hole around it, and not asked for */
};

/* What it means where the kernel tells that the guest gave pages back (madvise): see README.md, "Pages given back". */
enum pump_removal {
    REMOVAL_UNTOLD = 0,   /* it is not told: no such event is enabled */
    REMOVAL_KEEPS = 1,    /* pages that are still at the source are fetched all the same */
    REMOVAL_DISCARDS = 2, /* they are zeros from now on */
};

enum pump_state { PUMP_IDLE = 0, PUMP_RUNNING = 1, PUMP_COMPLETE = 2, PUMP_FAILED = 3 };

enum pump_failure {
    FAILURE_NONE = 0,
    /* A connection broke: `broken` has it. */
    FAILURE_CLOSED = 1,     /* the other agent closed the connection */
    FAILURE_SOCKET = 2,     /* number is the errno of a socket call */
    FAILURE_FRAME = 3,      /* number is an enum frame_refusal; region, offset, length are the frame's */
    FAILURE_SILENT = 8,     /* nothing came on it for a while, see half_watch */
    FAILURE_INCOMPLETE = 5, /* everything was pushed and yet pages are absent */
    /* The pump itself is at its end: `status` has it. */
    FAILURE_KERNEL = 4,     /* number is the errno of the ioctl in operation */
    FAILURE_EARLY = 6,      /* a page was asked for while the guest still ran */
    FAILURE_FILE = 7,       /* a region's file could not be read: number is the errno, 0: it ended before */
};

struct pump_region {
    uint64_t guest;      /* address of the mapping the guest uses; 0 at a source: none, its bytes are read from fd */
    uint64_t alias;      /* address of the unregistered second mapping, 0 if there is none */
    uint64_t size;       /* bytes, a multiple of page_size */
    uint64_t page_size;  /* bytes, a power of two */
    uint32_t demand;     /* enum pump_placement of a demand page */
    uint32_t push;       /* enum pump_placement of a pushed page */
    int32_t fd;          /* the file behind it, -1 if none: the source looks for holes there */
    uint64_t fd_offset;  /* where in the file the region begins; 0 at a source unless it reads the file */
    uint32_t zeropage;   /* whether UFFDIO_ZEROPAGE works on this memory (not on hugetlb) */
    uint32_t removal;    /* enum pump_removal; all of a pump's regions are told of, or none */
    uint32_t foreign;    /* 1: `guest` is an address of another process; all of a pump's regions are, or none */
    /*
     * Of a destination: address of its page map, a byte for each page, which then outlives the pump; 0: the pump's own.
     * What a pump that was killed left there is believed, so nothing may be filled in place (an alias): a page is there
     * or is not, whenever the end came.
     */
    uint64_t map;
};

/*
 * Why a pump failed, or why one of its connections broke, in which case only that is PUMP_FAILED and the pump goes on
 * as well as it can. Written once, before `state` becomes PUMP_FAILED.
 */
struct pump_status {
    _Atomic uint32_t state;
    uint32_t failure;
    uint32_t role;
    int32_t number;
    uint32_t operation; /* the ioctl's number for FAILURE_KERNEL */
    uint32_t region;
    uint64_t offset;
    uint64_t length;
    uint32_t completed; /* it was complete before it failed: every page is here */
};

/* Counters of the destination. Each struct has one writing thread and its own cache lines. */
struct destination_demand {
    _Alignas(128) _Atomic uint64_t faults_missing;
    _Atomic uint64_t faults_minor;
    _Atomic uint64_t faults_wp;
    _Atomic uint64_t requests;
    _Atomic uint64_t pending; /* faults not yet resolved */
    _Atomic uint64_t bytes_sent;
    struct hist latency; /* fault read to page placed */
    /* Of faults whose page came as the answer to their own request: how many, and the sums of their parts in ns. */
    _Atomic uint64_t fetched;
    _Atomic uint64_t request_ns; /* fault read to request sent */
    _Atomic uint64_t answer_ns;  /* request sent to the page's last byte read */
    _Atomic uint64_t place_ns;   /* to the page placed */
};

struct destination_channel {
    _Alignas(128) _Atomic uint64_t bytes_received;
    _Atomic uint64_t frames;
    _Atomic uint64_t pages;     /* placed with content that came on this connection */
    _Atomic uint64_t zero;      /* known to be zero by this connection */
    _Atomic uint64_t duplicate; /* came again and were dropped */
    _Atomic uint64_t ended;     /* 1 once END was read */
    _Atomic uint64_t beats;     /* frames that only said that the source is there */
    _Atomic uint64_t bytes_placed;
    _Atomic uint64_t outcome_placed; /* ioctls by outcome */
    _Atomic uint64_t outcome_present;
    _Atomic uint64_t outcome_retry;
    _Atomic uint64_t outcome_gone;
    _Atomic uint64_t outcome_busy; /* pages that could not be moved and were copied */
};

struct destination_counters {
    struct destination_demand demand;
    struct destination_channel urgent, push;
    struct destination_channel views; /* pages mapped for other processes: the outcomes alone */
    _Alignas(128) _Atomic uint64_t resident; /* pages whose content needs nothing from the source any more */
    _Atomic uint64_t removed;                /* of these, given back by the guest before they were placed: zeros */
    _Atomic uint64_t views_ended;            /* views of which nothing is served any more */
    _Atomic uint64_t poisoned;               /* pages that will never come; not resident */
};

struct source_channel {
    _Alignas(128) _Atomic uint64_t bytes_sent;
    _Atomic uint64_t pages;
    _Atomic uint64_t zero;
    _Atomic uint64_t frames;
    _Atomic uint64_t requests; /* urgent only: requests read */
    _Atomic uint64_t ignored;  /* urgent only: requests for a page that is on its way already */
    _Atomic uint64_t again;    /* urgent only: pages sent once more because the push had them in flight */
    _Atomic uint64_t answered; /* urgent only: requests whose answer has left, */
    _Atomic uint64_t answer_ns; /* and the sum of the ns from their reading to the answer's last byte sent */
};

struct source_counters {
    struct source_channel urgent, push;
};

struct destination;
struct source;

/* What both have alike is called on their half. It lives and dies with its pump. */
struct half;
struct half *destination_half(struct destination *pump);
struct half *source_half(struct source *pump);
/* From now on each end of its connections is to say and to hear something within so many ns; before start. 0: never. */
void half_beat(struct half *half, uint64_t tick_ns);
/* Silence is a break from now on. Without it, silence is waited for: the other side may not have begun. */
void half_watch(struct half *half);
/*
 * Give it the connection of a role, once each, before start or after detach: a socket and the TLS session on it, whose
 * handshake is over, or NULL for a plain one. Both become the pump's, even on failure (-EINVAL: no such role, attached
 * already, started already).
 */
int half_attach(struct half *half, uint32_t role, int socket, struct tls *tls);
const struct pump_status *half_status(const struct half *half);
/* Why a connection broke, until the next detach. */
const struct pump_status *half_broken(const struct half *half);
/* Readable once the pump is complete or has failed, or a connection broke; reading it is the caller's. */
int half_event_fd(const struct half *half);
/* Nanoseconds of CPU used by its threads so far. */
uint64_t half_cpu_ns(const struct half *half);

/* Create with `count` regions (copied). Returns NULL with errno set. */
struct destination *destination_create(int uffd, const struct pump_region *regions, uint32_t count,
                                       uint64_t poll_max_ns);
/*
 * Every page's content is in the regions' files already (memory that was handed over), and nothing will be fetched: call
 * it before start and in place of attach. Faults are served all the same, by mapping what is there. 0 or -EINVAL.
 */
int destination_adopt(struct destination *pump);
/*
 * There are no connections yet: until attach and resume faults are served with what is here. Call it before start and in
 * place of attach. 0 or -EINVAL.
 */
int destination_part(struct destination *pump);
/* Start its two threads, one where it has adopted its memory or has no connections. Returns 0 or -errno. */
int destination_start(struct destination *pump);
/* Ask the threads to end and wait for them. Idempotent; threads that wait in a fault stay the guest's problem. */
void destination_stop(struct destination *pump);
/* Stop and free everything. NULL is allowed. */
void destination_destroy(struct destination *pump);
/*
 * Take the connections away, whether or not they broke. Of pages that came in part nothing is left when this returns,
 * and the guest is served with what is here. 0, -ECANCELED where the pump has failed, -EINVAL before start.
 */
int destination_detach(struct destination *pump);
/* Go on with new connections: every page that a fault waits for is asked for again. 0 or -errno. */
int destination_resume(struct destination *pump);
/*
 * The source will never come back: whoever touches a page that is not here gets SIGBUS from now on, and whoever waits
 * for one at once. Only while detached. 0 or -errno (-EINVAL where the kernel cannot: all go on waiting).
 */
int destination_poison(struct destination *pump);
const struct destination_counters *destination_counters(const struct destination *pump);
/*
 * Record every fault from now on in `trace` (trace.h), which is the caller's and outlives the pump. Before the start; 0, or
 * -EINVAL after it or where the capacity is no power of two.
 */
struct trace;
int destination_trace(struct destination *pump, struct trace *trace);
/* The page map of a region, `size / page_size` bytes of enum page_state; lives as long as the pump. */
const uint8_t *destination_map(const struct destination *pump, uint32_t region);
/*
 * The guest gives these pages back: those that were not placed yet are zeros from now on, and no copy of them is placed
 * any more when this returns. It waits for one that is being placed just now. What the memory itself holds of them the
 * caller takes away afterwards. Any thread may call it between start and destroy. 0, -EINVAL, or -ECANCELED where the
 * pump ended before a page that was being placed had come.
 */
int destination_discard(struct destination *pump, uint32_t region, uint64_t offset, uint64_t length);
/*
 * Serve another process's mapping of the regions' files, too: `uffd` (non-blocking, without events) traps it, `bases`
 * has one address for each region, 0 where it is not mapped. The descriptor stays the caller's and must outlive the
 * pump. One thread at a time may call it, any time between create and destroy. 0, -EINVAL (a region without a file, an
 * address within a page), -ENOSPC.
 */
int destination_view(struct destination *pump, int uffd, const uint64_t *bases, uint32_t count);

/* One order for the push thread. */
struct push_extent {
    uint64_t offset;
    uint64_t length;
    uint32_t region;
    uint32_t zero; /* 1: the extent is known to hold zeros (a hole); its memory is not read */
};

struct source *source_create(const struct pump_region *regions, uint32_t count, uint64_t poll_max_ns,
                             uint64_t frame_bytes);
/*
 * Of `count` pages from page `first` on, those whose bit is set (bit i % 8 of byte i / 8) are at the destination: they
 * are not pushed. Before start. 0, or -EINVAL where the region has no such pages.
 */
int source_skip(struct source *pump, uint32_t region, uint64_t first, uint64_t count, const uint8_t *bits);
int source_start(struct source *pump);
void source_stop(struct source *pump);
void source_destroy(struct source *pump);
const struct source_counters *source_counters(const struct source *pump);
/* The guest stands still for good: from here on its memory may be read. A request before that ends the pump. */
void source_guest_stopped(struct source *pump);
/*
 * Queue extents for the push, in order. Returns how many fitted into the ring, -EINVAL for one that is no page run,
 * -EBUSY before source_guest_stopped.
 */
int source_push(struct source *pump, const struct push_extent *extents, uint32_t count);
/* Nothing more will be queued: END is sent after the last extent. */
void source_push_end(struct source *pump);
/* Extents queued and not yet begun. */
uint32_t source_queued(const struct source *pump);
/* Where the latest page is that was asked for since the last call; false where none was. */
bool source_wanted(struct source *pump, uint32_t *region, uint64_t *offset);
/* What has left of a region, `size / page_size` bytes of enum page_sent; lives as long as the pump. */
const uint8_t *source_map(const struct source *pump, uint32_t region);
/* Readable when the ring has run low since the last source_push. Reading it is the caller's. */
int source_low_fd(const struct source *pump);

#endif
