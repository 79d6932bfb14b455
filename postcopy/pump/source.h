/*
 * Inside of the source's pump, shared by answer.c (requests become pages), order.c (orders become a push) and source.c
 * (life and death). Everything is owned by struct source and freed with it.
 *
 * The guest is stopped and its memory does not change any more, so pages are sent right out of it; a snapshot's file
 * is read into buffers instead: see content.c. A page is claimed in the `sent` map before it is sent, so that the push
 * does not repeat what was asked for.
 */
#ifndef POSTCOPY_SOURCE_H
#define POSTCOPY_SOURCE_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

#include "beat.h"
#include "half.h"
#include "page_map.h"
#include "pump.h"
#include "wait.h"

/* Of a page in `wanted`: pages of 4 KiB in all that can be addressed are below 2^52 bytes. */
#define WANTED_PAGE_BITS 48

struct source_memory {
    struct pump_region region;
    struct timespec written_at; /* of a region that is read: when its file was last written to, as the pump was made */
    page_byte *sent; /* one enum page_sent for each page */
};

struct source {
    struct half half;
    struct source_memory memory[REGIONS_MAX];
    uint64_t frame_bytes; /* payload of a pushed frame at most, unless a page is larger */

    /* Owned by the urgent thread: requests read, answers not yet sent. */
    uint8_t requests[ANSWERS_MAX * sizeof(struct frame)];
    uint64_t requests_end;
    struct frame headers[ANSWERS_MAX];
    struct iovec answers[2 * ANSWERS_MAX];
    uint32_t answers_begin, answers_end, headers_used;
    uint64_t asked_at;        /* ns, when the requests were read that are being answered; 0: it is a beat */
    uint32_t answers_max;     /* how many answers are made at a time */
    uint64_t page_size_max;   /* of the regions that are read */
    uint8_t *answers_content; /* answers_max pages of that size, NULL where no region is read */
    uint64_t urgent_received; /* bytes */
    struct beat urgent_beat;
    struct waiter waiter;
    /* What the latest request was for, told to the owner once: the region above 48 bits of the page, and 1 more. */
    _Atomic uint64_t wanted;

    /* Owned by the push thread: what was read last, and what came of a beat. */
    uint8_t *push_content;
    uint64_t push_content_bytes;
    uint8_t heard[16 * sizeof(struct frame)];
    uint64_t heard_end, push_received;
    struct beat push_beat;

    /* Orders for the push: the owner writes at `tail`, the push thread reads at `head`. */
    struct push_extent ring[PUMP_RING_EXTENTS];
    _Atomic uint32_t head, tail;
    uint64_t requests_seen; /* by the push thread, when it began its latest frame */
    _Atomic bool ended;
    _Atomic bool low_told;
    _Atomic bool guest_stopped; /* before that, nothing of its memory is read */

    int work_fd; /* orders came */
    int low_fd;  /* the ring runs low, for the owner */
    struct source_counters counters;
};

/* content.c: make the buffers that regions without a mapping need. 0, -ENOMEM, or -EINVAL where there is no file. */
int content_create(struct source *pump);
void content_destroy(struct source *pump);
/*
 * content.c: whether what was found out of a region's bytes still holds: 0, or -1 with a failed status where its file was
 * written to since the pump was made. A mapping always holds: its guest is stopped.
 */
int content_holds(struct source *pump, uint32_t role, uint32_t region, uint64_t offset, uint64_t length);
/*
 * content.c: the bytes at `offset` of a region: those of its mapping, or read into `buffer`. NULL with a failed status
 * where the file cannot be read, has become shorter or was written to.
 */
const uint8_t *content_at(struct source *pump, uint32_t role, uint32_t region, uint64_t offset, uint64_t length,
                          uint8_t *buffer);

/* answer.c and order.c: the two threads. */
void urgent_run(void *pump);
void orders_run(void *pump);

/* source.c: drop what was sent from the front of a vector; returns the index of its first part not sent whole. */
uint32_t parts_advance(struct iovec *parts, uint32_t begin, uint64_t sent);

/* Zero all over? Almost every page that is not says so in its first bytes. */
static inline bool is_zero(const uint8_t *memory, uint64_t length) {
    uint64_t first[2];
    memcpy(first, memory, sizeof first);
    return !(first[0] | first[1]) && !memcmp(memory, memory + sizeof first, length - sizeof first);
}

static inline bool is_mapped(const struct source_memory *memory) { return memory->region.guest != 0; }

#endif
