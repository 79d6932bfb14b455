/*
 * The frames of a data connection: 24 bytes, little endian, specified in postcopy/wire/README.md.
 *
 * frame_check() is the one gate between bytes off the network and everything behind it: what passes it names a page
 * aligned range inside a known region and respects the limits. postcopy/wire/frame.py holds the same checks in the
 * same order and is compared with this one on random headers.
 */
#ifndef POSTCOPY_FRAME_H
#define POSTCOPY_FRAME_H

#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "frames are read in place: this needs a little endian machine"
#endif

#define FRAME_MAGIC 0x5043u

enum frame_type { FRAME_INVALID = 0, FRAME_REQUEST = 1, FRAME_PAGES = 2, FRAME_ZERO = 3, FRAME_END = 4, FRAME_BEAT = 5 };

enum frame_refusal {
    REFUSAL_OK = 0,
    REFUSAL_MAGIC = 1,
    REFUSAL_TYPE = 2,
    REFUSAL_REGION = 3,
    REFUSAL_ALIGNMENT = 4,
    REFUSAL_RANGE = 5,
    REFUSAL_LIMIT = 6,
    REFUSAL_RESERVED = 7,
};

struct frame {
    uint16_t magic;
    uint8_t type;
    uint8_t flags;
    uint16_t region;
    uint16_t reserved;
    uint64_t offset; /* bytes into the region */
    uint64_t length; /* bytes; payload follows a PAGES frame only */
};

_Static_assert(sizeof(struct frame) == 24, "the wire's header is 24 bytes");
_Static_assert(offsetof(struct frame, region) == 4 && offsetof(struct frame, offset) == 8 &&
                   offsetof(struct frame, length) == 16,
               "the wire's layout is fixed");

/* Which frames a connection may carry to whoever reads it: a bit for each type. */
#define FRAMES_TO_SOURCE (1u << FRAME_REQUEST | 1u << FRAME_BEAT)
#define FRAMES_PUSH_TO_SOURCE (1u << FRAME_BEAT)
#define FRAMES_URGENT (1u << FRAME_PAGES | 1u << FRAME_ZERO | 1u << FRAME_BEAT)
#define FRAMES_PUSH (1u << FRAME_PAGES | 1u << FRAME_ZERO | 1u << FRAME_END | 1u << FRAME_BEAT)

/* What frame_check needs of a region. */
struct frame_bounds {
    uint64_t size;
    uint64_t page_size; /* a power of two */
};

/*
 * Judge a header against `count` regions and the set of `allowed` types. Returns an enum frame_refusal.
 * The order of the checks is part of the protocol, so that both implementations name the same reason.
 */
static inline int frame_check(const struct frame *frame, uint32_t allowed, const struct frame_bounds *bounds,
                              uint32_t count) {
    if (frame->magic != FRAME_MAGIC)
        return REFUSAL_MAGIC;
    if (frame->type == FRAME_INVALID || frame->type > FRAME_BEAT || !(allowed & (1u << frame->type)))
        return REFUSAL_TYPE;
    if (frame->flags || frame->reserved)
        return REFUSAL_RESERVED;
    if (frame->type == FRAME_END || frame->type == FRAME_BEAT)
        return frame->region || frame->offset || frame->length ? REFUSAL_RESERVED : REFUSAL_OK;
    if (frame->region >= count)
        return REFUSAL_REGION;
    uint64_t page_size = bounds[frame->region].page_size;
    if (!frame->length || ((frame->offset | frame->length) & (page_size - 1)))
        return REFUSAL_ALIGNMENT;
    if (frame->type == FRAME_REQUEST && frame->length != page_size)
        return REFUSAL_LIMIT;
    if (frame->type == FRAME_PAGES && frame->length > FRAME_BYTES_MAX && frame->length != page_size)
        return REFUSAL_LIMIT;
    uint64_t size = bounds[frame->region].size;
    if (frame->offset >= size || frame->length > size - frame->offset)
        return REFUSAL_RANGE;
    return REFUSAL_OK;
}

#endif
