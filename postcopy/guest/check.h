/*
 * Filling the guest's memory, and finding out later whether every byte of it is what it must be.
 *
 * A struct check is made by check_create and freed by check_destroy; it borrows the memory, content and order it was
 * made with, which must outlive it and not change. check_range only reads it: several threads may check ranges of one.
 */
#ifndef POSTCOPY_GUEST_CHECK_H
#define POSTCOPY_GUEST_CHECK_H

#include <stdint.h>

#include "content.h"

struct check;

struct check_result {
    uint64_t pages_checked;
    uint64_t pages_mismatched;
    uint64_t first_mismatch; /* flat page, UINT64_MAX if there is none */
};

/* Writes the pattern to the active pages and zeros behind the holes, if there is anything; the holes are left alone. */
void memory_fill(const struct memory *memory, const struct content *content);

/* For a guest none of whose vCPUs has made a step. ENOMEM: it takes 4 bytes per active page and vCPU. */
int check_create(const struct memory *memory, const struct content *content, const struct order *order,
                 struct check **out);
/* Tells that `vcpu` stands before step `position` of pass `pass`. EINVAL if that is no place in the order. */
int check_vcpu(struct check *check, uint32_t vcpu, uint64_t pass, uint64_t position);
void check_destroy(struct check *check);

/* Compares every byte of the flat pages first..stop-1, or of those whose bit is set in `filter` (bit page % 8 of byte
 * page / 8, over the whole flat space). For increment also its own property, over the pages of this range: the lane's
 * bytes are equal but for one step of -1. Returns 0 or the errno of asking a hole's descriptor. */
int check_range(const struct check *check, uint64_t first, uint64_t stop, const uint8_t *filter,
                struct check_result *result);

#endif
