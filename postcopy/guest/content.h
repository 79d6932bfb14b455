/*
 * What is in a page of the guest?
 *
 * The guest sees one flat space of 4 KiB guest pages over all its segments, one after the other, whatever the page
 * size of the host. Pages 0..active-1 hold a pattern of (seed, nonce, page, word) and the marks of the vCPUs' visits;
 * the rest is blank: first pages that are never written (holes), then pages that had zeros written to them.
 *
 * A visit of vCPU v to page p changes one word (increment: one byte) that belongs to (p, v) alone, so vCPUs meet on
 * a page and never race, and the content is a closed form of the visit counts.
 */
#ifndef POSTCOPY_GUEST_CONTENT_H
#define POSTCOPY_GUEST_CONTENT_H

#include <stdbool.h>
#include <stdint.h>

#include "workload.h"

#define GUEST_PAGE_BYTES 4096u
#define GUEST_PAGE_WORDS (GUEST_PAGE_BYTES / 8u)

_Static_assert(GUEST_VCPUS_MAX <= GUEST_PAGE_WORDS, "each vCPU owns a word of each page");
/* The lane of the increment workload is the lowest byte of its word, and the model in Python reads it so. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the lanes are laid out for little endian");

/* One mapping of the guest's memory, lent by the caller for as long as the guest lives. */
struct guest_segment {
    void *address;
    uint64_t pages; /* guest pages */
    int fd;         /* memory behind the mapping, -1 if there is none */
    uint64_t offset; /* of the mapping's first byte in it */
};

struct memory {
    const struct guest_segment *segments;
    uint32_t segment_count;
    uint64_t active_pages;
    uint64_t hole_pages; /* follow the active ones, never written */
    uint64_t pages;      /* all */
};

struct content {
    uint64_t key;
    uint32_t vcpus;
    bool bytes; /* increment: one byte changes, by 1 */
};

static inline void content_init(struct content *content, uint64_t seed, uint64_t nonce, uint32_t vcpus, bool bytes) {
    *content = (struct content){
        .key = stream(stream(seed, STREAM_CONTENT), nonce),
        .vcpus = vcpus,
        .bytes = bytes,
    };
}

/* Everything about a page follows from its base; word i of the pattern is stream(base, i). */
static inline uint64_t content_base(const struct content *content, uint64_t page) {
    return stream(content->key, page);
}

/* The word of (page, vcpu). */
static inline uint32_t content_lane(uint64_t base, uint32_t vcpu) {
    return (uint32_t)((base + vcpu) % GUEST_PAGE_WORDS);
}

/* What one visit adds to that word. Odd, so that 2^64 visits pass before a word is what it was. */
static inline uint64_t content_addend(uint64_t base, uint32_t vcpu) {
    return (((base << 21) | (base >> 43)) + vcpu * STREAM_STEP) | 1;
}

/* Increment: what the lane of `vcpu` holds in every page before the first visit. */
static inline uint8_t content_first_byte(const struct content *content, uint32_t vcpu) {
    return (uint8_t)stream(~content->key, vcpu);
}

static inline uint8_t *memory_at(const struct memory *memory, uint64_t page) {
    const struct guest_segment *segment = memory->segments;
    while (page >= segment->pages) {
        page -= segment->pages;
        segment++;
    }
    return (uint8_t *)segment->address + page * GUEST_PAGE_BYTES;
}

/* One visit: a read-modify-write in one instruction, so a page that is missing faults once, for writing. */
static inline void content_visit(const struct content *content, const struct memory *memory, uint64_t page,
                                 uint32_t vcpu) {
    uint64_t base = content_base(content, page);
    uint8_t *lane = memory_at(memory, page) + content_lane(base, vcpu) * 8u;
    if (content->bytes)
        *lane = (uint8_t)(*lane + 1);
    else
        *(uint64_t *)(void *)lane += content_addend(base, vcpu);
}

#endif
