/*
 * Inside of the destination's pump, shared by receive.c (bytes become pages), demand.c (faults become requests) and
 * destination.c (life and death). Everything is owned by struct destination and freed with it.
 */
#ifndef POSTCOPY_DESTINATION_H
#define POSTCOPY_DESTINATION_H

#include <stdbool.h>
#include <pthread.h>
#include <stdint.h>

#include "beat.h"
#include "half.h"
#include "page_map.h"
#include "place.h"
#include "pump.h"
#include "trace.h"
#include "wait.h"

/*
 * Where a payload begins in the staging buffer: on a page boundary, whatever the size of the kernel's pages, so that
 * its pages can be given away by MOVE. A header that is waited for lies right before it, and so its payload behind it.
 */
#define STAGING_PAYLOAD 65536u

struct memory {
    struct pump_region region;
    page_byte *map;
    uint64_t pages;
};

/* One incoming data connection, read by one thread. */
struct receiver {
    uint32_t role;
    uint32_t allowed;
    struct placer placer;
    uint8_t *staging; /* bytes [begin, end) were read and not yet used */
    uint64_t capacity, begin, end;
    bool in_payload;
    struct frame frame; /* whose payload is being read */
    /* Where the payload goes straight into the alias: bytes that have arrived, and the run being filled. */
    uint64_t taken, run_begin, run_end;
    /* Pages of the frame's region that this thread has claimed and not placed: if it ends now they are to be given up. */
    uint64_t claimed, claimed_stop;
    uint64_t changing_since; /* ns, when placing began to meet PLACE_CHANGING; 0: it does not */
    uint64_t changed_at;     /* ns, when something was last read that stood against it */
    struct beat beat;
    uint64_t beat_sent; /* bytes of beats; push only, where nothing else is sent */
    uint64_t arrived_at; /* ns, when the latest answer was whole; urgent only */
};

/* Another process's mapping of the guest's files, with a userfaultfd of its own: view.c. */
struct view {
    int uffd;
    _Atomic bool ended;               /* nothing of it is served any more */
    uint64_t bases[REGIONS_MAX]; /* where it maps each region, 0 if it does not */
};

struct fault {
    struct view *view; /* whose it is, NULL: the guest's own mapping */
    uint32_t region;
    uint32_t thread;
    uint32_t flags; /* the kernel's */
    uint32_t found; /* enum trace_found, once it is accounted for */
    uint64_t page;
    uint64_t read_at; /* ns */
    uint64_t sent_at; /* ns, when the request that it made had left; 0: it made none, or that has not */
};

/* Pages that came as answers and were just placed. */
struct landed {
    uint32_t region;
    uint64_t page, count;
};

struct destination {
    struct half half;
    struct memory memory[REGIONS_MAX];
    uint64_t pages_total;
    int uffd;
    uint8_t *zeros; /* a page of zeros for memory that knows no ZEROPAGE and has no alias */
    uint64_t zeros_size;

    struct receiver urgent, push;
    /* Owned by the demand thread. */
    struct fault pending[PENDING_MAX]; /* accounted for, until their pages are there */
    uint32_t pending_count;
    struct landed landed;
    struct frame requests[PENDING_MAX]; /* bytes [requests_begin, requests_end) are to be sent */
    uint64_t requests_begin, requests_end;
    /* A ring of faults that were read; each stays in it until it is served, which a stop may come between. */
    struct fault backlog[PENDING_MAX];
    uint32_t backlog_begin, backlog_count;
    bool alone; /* there is no urgent connection that works, or none at all: the memory was adopted */
    struct waiter waiter;

    struct trace *trace; /* NULL: nothing is recorded */

    bool told;    /* events tell of pages that the guest gives back */
    bool foreign; /* the memory of another process */
    /* Held by the push while it places, and from reading an event until the page map knows: see README.md. */
    pthread_mutex_t gate;

    struct view views[PUMP_VIEWS_MAX]; /* written by the owner before it counts them */
    _Atomic uint32_t view_count;

    _Atomic bool news; /* a page that a fault is accounted for was placed by the push, or given back */
    int news_fd;       /* the same for a demand thread that sleeps; also ends its wait at a stop */
    struct destination_counters counters;
};

enum step { STEP_IDLE = 0, STEP_PROGRESS = 1, STEP_ENDED = 2, STEP_FAILED = -1 };

/* receive.c: read what is there and place what is whole. Returns an enum step; a failure is recorded in the status. */
int receiver_step(struct destination *pump, struct receiver *receiver);
/* receive.c: so many bytes complete what is being received: a header, a staged payload, a run. Never 0. */
uint64_t receiver_wanted(const struct receiver *receiver);
/* receive.c: place one page of zeros that the caller has claimed. 0, or -1 as await_change() or with a failed status. */
int zero_claimed(struct destination *pump, struct receiver *receiver, uint32_t region, uint64_t page);

/*
 * receive.c: wait a moment for what stands against placing; for the demand thread that means to read it as well. 0: try
 * again. -1: the pump is to stop, or it has waited too long and failed.
 */
int await_change(struct destination *pump, struct receiver *receiver, uint32_t region, uint64_t page);

/* destination.c, demand.c: say on the push or the urgent connection that we are here. 0, or -1 once it is broken. */
int push_say(struct destination *pump);
int urgent_say(struct destination *pump);
/* destination.c: so much of the tick is over on a connection; look whether a beat is due. -1 once it is broken. */
int receiver_beat(struct destination *pump, struct receiver *receiver, uint64_t sent, bool *due);

/* removal.c: what a call other than placing was refused is the end of the pump. Always returns -1. */
int fail_call(struct destination *pump, uint32_t role, uint32_t operation, int number, uint32_t region, uint64_t page);
/* removal.c: the gate between the push's placing and the reading of events. Nothing where no events are told. */
void gate_enter(struct destination *pump);
void gate_leave(struct destination *pump);
/* removal.c: the kernel told that the guest gave [start, stop) back. The gate is held. 0, or -1 with a failed status. */
int take_removal(struct destination *pump, uint64_t start, uint64_t stop);
/* removal.c: the owner of a page that is DROPPED gives it up before it was placed. 0, or -1 with a failed status. */
int finish_dropped(struct destination *pump, struct receiver *receiver, uint32_t region, uint64_t page);

/*
 * foreign.c: have missing pages of another userfaultfd be lost there, as far as that is to be had. Who waits for one for
 * which there was no time is woken and faults again.
 */
void poison_elsewhere(struct destination *pump, int uffd, uint64_t address, uint64_t length, uint64_t page_size,
                      bool child);
/* foreign.c: the process whose memory is served forked; `child` is the child's userfaultfd, and closed here. */
void take_fork(struct destination *pump, int child);

/* demand.c: read what waits: events take effect, faults go to the backlog. How many messages, or -1: a failed status. */
int read_ahead(struct destination *pump);
/* demand.c, for the demand thread: faults whose page has become present are over, and how long they took is known. */
void faults_settle(struct destination *pump);
/* demand.c, for view.c: where an address lies in a view (NULL: in the guest's own mapping); false: nowhere. */
bool fault_locate(const struct destination *pump, const struct view *view, uint64_t address, uint32_t *region,
                  uint64_t *page);
/* demand.c, for view.c: how many messages may be read now; and one of them that is a fault goes to the backlog. */
size_t backlog_room(const struct destination *pump);
void fault_keep(struct destination *pump, struct fault fault);
/* demand.c: ask the source for a page. */
void request(struct destination *pump, uint32_t region, uint64_t page);
/* demand.c and destination.c: the threads of the urgent and of the push connection. */
void demand_run(void *pump);
void push_run(void *pump);

/* view.c: read the faults of all views into the backlog. Returns how many messages. */
int views_read(struct destination *pump);
/* view.c: a page that a view waits for is PLACED: map it there. False: not yet, try again after the next read. */
bool view_settle(struct destination *pump, const struct fault *fault);
/* view.c: wake whoever waits for these pages in any view. Any thread may call it. */
void views_wake(struct destination *pump, uint32_t region, uint64_t first, uint64_t stop);
/* view.c: have these pages, which are lost, be lost in every view as well. */
void views_poison(struct destination *pump, uint32_t region, uint64_t first, uint64_t stop);
/* view.c: put what is to be polled for the views into `descriptors`, room for PUMP_VIEWS_MAX; returns how many. */
nfds_t views_poll(const struct destination *pump, struct pollfd *descriptors);

/* destination.c: what the placer was refused is the end of the pump. Always returns -1. */
int fail_placing(struct destination *pump, const struct receiver *receiver, uint32_t region, uint64_t page);
/* destination.c: so many more pages are resident; tells the owner when it was the last. */
void resident_add(struct destination *pump, uint64_t pages);

/* What is being received has pages that are claimed. */
static inline bool owns_pages(const struct receiver *receiver) { return receiver->claimed != receiver->claimed_stop; }

static inline uint8_t *alias_of(const struct memory *memory, uint64_t offset) {
    return (uint8_t *)(uintptr_t)(memory->region.alias + offset);
}

#endif
