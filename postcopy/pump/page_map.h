/*
 * The destination's page map: the claim that lets each page be written exactly once.
 *
 *   ABSENT ──fault──> REQUESTED ──claim──> WATCHED ──placed──> PLACED
 *   ABSENT ──claim──> PLACING  ──placed──> PLACED      PLACING ──fault──> WATCHED
 *   ABSENT ──zero───> ZERO     ──fault───> PLACING
 *
 *   ABSENT, REQUESTED ──given back──> ZERO
 *   PLACING ──came in part──> ABSENT       WATCHED ──came in part──> REQUESTED
 *   ABSENT, REQUESTED ──lost──> POISONED
 *
 *   PLACING, WATCHED ──given back──> DROPPED ──its owner──> ZERO, or PLACED if its content had been placed already
 *
 * Whoever moves a page to PLACING or WATCHED owns its memory until PLACED: nobody else writes a byte of it. WATCHED
 * says in addition that a fault is accounted for this page, so its placer tells the demand thread. DROPPED asks the
 * owner not to place it: the guest gave the page back meanwhile. A page that lost its claim (PLACING, WATCHED, DROPPED,
 * PLACED, ZERO, POISONED) must not be written by the loser: the guest may own it already.
 */
#ifndef POSTCOPY_PAGE_MAP_H
#define POSTCOPY_PAGE_MAP_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "pump.h"

typedef _Atomic uint8_t page_byte;

_Static_assert(sizeof(page_byte) == 1, "one byte a page");

static inline uint8_t page_load(const page_byte *page) {
    return atomic_load_explicit(page, memory_order_acquire);
}

static inline bool page_move(page_byte *page, uint8_t from, uint8_t to) {
    return atomic_compare_exchange_strong_explicit(page, &from, to, memory_order_acq_rel, memory_order_acquire);
}

/* Take the right to write a page's content. False: its content is there or somebody else is writing it. */
static inline bool page_claim(page_byte *page) {
    for (;;) {
        switch (page_load(page)) {
        case PAGE_ABSENT:
            if (page_move(page, PAGE_ABSENT, PAGE_PLACING))
                return true;
            break;
        case PAGE_REQUESTED:
            if (page_move(page, PAGE_REQUESTED, PAGE_WATCHED))
                return true;
            break;
        default:
            return false;
        }
    }
}

/* The owner gives a page up, having taken away what it wrote of it. False: it is DROPPED, which the owner finishes. */
static inline bool page_release(page_byte *page) {
    for (;;) {
        uint8_t before = page_load(page);
        if (before == PAGE_DROPPED)
            return false;
        if (page_move(page, before, before == PAGE_WATCHED ? PAGE_REQUESTED : PAGE_ABSENT))
            return true;
    }
}

/* The owner is done with `count` pages; true if a fault waits for the news of any of them. */
static inline bool pages_placed(page_byte *pages, uint64_t count) {
    bool watched = false;
    for (uint64_t i = 0; i < count; i++) {
        uint8_t before = atomic_exchange_explicit(&pages[i], PAGE_PLACED, memory_order_acq_rel);
        watched |= before == PAGE_WATCHED || before == PAGE_DROPPED;
    }
    return watched;
}

/* The owner of `count` pages asks how many of them, from the first on, are still to be placed. */
static inline uint64_t pages_kept(const page_byte *pages, uint64_t count) {
    uint64_t kept = 0;
    while (kept < count && page_load(&pages[kept]) != PAGE_DROPPED)
        kept++;
    return kept;
}

/*
 * The guest gives a page back. Returns what it was: ABSENT or REQUESTED, and now it is ZERO; PLACING or WATCHED, and
 * now it is DROPPED; all others stay, their content is settled.
 */
static inline uint8_t page_discard(page_byte *page) {
    for (;;) {
        uint8_t before = page_load(page);
        bool owned = before == PAGE_PLACING || before == PAGE_WATCHED;
        if (!owned && before != PAGE_ABSENT && before != PAGE_REQUESTED)
            return before;
        if (page_move(page, before, owned ? PAGE_DROPPED : PAGE_ZERO))
            return before;
    }
}

/*
 * Mark pages that nobody has touched (0) with a state from `first` on, and stop at the first that is not 0 or at `stop`.
 * Returns where it stopped. Eight at a time where all eight are 0: a hole may span millions of pages.
 */
static inline uint64_t pages_mark(page_byte *pages, uint64_t first, uint64_t stop, uint8_t to) {
    const uint64_t untouched8 = 0, to8 = 0x0101010101010101ull * to;
    while (first < stop) {
        if (!((uintptr_t)&pages[first] & 7) && stop - first >= 8) {
            _Atomic uint64_t *eight = (_Atomic uint64_t *)(void *)&pages[first];
            uint64_t expected = untouched8;
            if (atomic_compare_exchange_strong_explicit(eight, &expected, to8, memory_order_acq_rel,
                                                        memory_order_acquire)) {
                first += 8;
                continue;
            }
        }
        if (!page_move(&pages[first], 0, to))
            break;
        first++;
    }
    return first;
}

/* Mark pages that are ABSENT as ZERO from `first` on, up to the first that is not. Returns where it stopped. */
static inline uint64_t pages_zero(page_byte *pages, uint64_t first, uint64_t stop) {
    _Static_assert(!PAGE_ABSENT, "a page nobody has touched");
    return pages_mark(pages, first, stop, PAGE_ZERO);
}

/* The first page that is ABSENT from `first` on, `stop` if there is none. Eight at a time where all eight are not. */
static inline uint64_t pages_absent(const page_byte *pages, uint64_t first, uint64_t stop) {
    const uint64_t lowest = 0x0101010101010101ull, highest = lowest << 7;
    while (first < stop) {
        if (!((uintptr_t)&pages[first] & 7) && stop - first >= 8) {
            uint64_t eight = atomic_load_explicit((const _Atomic uint64_t *)(const void *)&pages[first],
                                                  memory_order_acquire);
            /* A byte of zeros borrows its highest bit, and no other one has a bit there that was clear before. */
            if (!((eight - lowest) & ~eight & highest)) {
                first += 8;
                continue;
            }
        }
        if (page_load(&pages[first]) == PAGE_ABSENT)
            break;
        first++;
    }
    return first;
}

#endif
