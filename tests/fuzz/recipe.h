/*
 * From an input of the fuzzer to the bytes of a connection, and from those bytes to what has to come of them.
 *
 * An input is a recipe of records: frames that are sound, frames with one field spoiled, bytes as they are, payloads cut
 * short, pauses. The model reads the bytes as a pump has to and knows nothing of how they were made.
 */
#ifndef POSTCOPY_FUZZ_RECIPE_H
#define POSTCOPY_FUZZ_RECIPE_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "pump.h"

#define REGIONS 3u
#define STREAM_MAX (3u << 20)
#define PAUSES_MAX 8u

static const uint64_t page_sizes[REGIONS] = {4096, 4096, 512 << 10}, pages[REGIONS] = {8, 8, 2};

/* What the bytes are, and where the sender pauses. */
struct stream {
    uint8_t bytes[STREAM_MAX];
    uint64_t length, pauses[PAUSES_MAX];
    uint32_t pauses_used;
};
static struct stream stream;

/* What has to be in a page. */
enum wanted { WANT_ABSENT, WANT_ZERO, WANT_CONTENT };
struct model {
    enum wanted wanted[REGIONS][8];
    const uint8_t *content[REGIONS][8];
    bool maybe[REGIONS][8]; /* its bytes came, the rest of its frame did not: placed or not, both are right */
    uint64_t frames, settled;
    int refusal;
    bool ended;
};

/* --- from the input to bytes ---------------------------------------------------------------------------------------- */

static void put(const void *bytes, uint64_t length) {
    if (length > STREAM_MAX - stream.length)
        return;
    memcpy(stream.bytes + stream.length, bytes, length);
    stream.length += length;
}

static void put_fill(uint8_t first, uint64_t length) {
    if (length > STREAM_MAX - stream.length)
        return;
    memset(stream.bytes + stream.length, first, length);
    if (length)
        stream.bytes[stream.length + length - 1] = (uint8_t)(first + 1); /* so that no page is like its neighbour */
    stream.length += length;
}

/* A record is six bytes; what it leaves over of them is the next record's. */
static void expand(const uint8_t *data, size_t size) {
    stream.length = stream.pauses_used = 0;
    while (size >= 6) {
        uint8_t kind = data[0] & 7, fill = data[5];
        uint32_t region = data[1] % 8 < 6 ? data[1] % 2 : data[1] % 8 - 4; /* 2, and 3 that there is not, now and then */
        uint32_t known = region < REGIONS ? region : 0;
        uint64_t count = 1 + data[3] % 3;
        struct frame frame = {.magic = FRAME_MAGIC, .region = (uint16_t)region, .offset = data[2] % 9 * page_sizes[known],
                              .length = count * page_sizes[known]};
        const uint8_t *rest = data + 6;
        size_t left = size - 6, used = 0;
        frame.type = kind == 2 ? FRAME_ZERO : kind == 3 ? FRAME_END : kind == 4 ? FRAME_REQUEST : FRAME_PAGES;
        if (kind == 3)
            frame = (struct frame){.magic = FRAME_MAGIC, .type = FRAME_END};
        if (kind == 4)
            frame.length = page_sizes[known];
        if (kind == 0) {
            used = data[4] < left ? data[4] : left;
            put(rest, used);
        } else if (kind == 7 && stream.pauses_used < PAUSES_MAX) {
            stream.pauses[stream.pauses_used++] = stream.length;
        } else if (kind == 6 && left >= 8) {
            /* Any field of the header, any value. */
            memcpy((uint8_t *)&frame + data[4] % (sizeof frame - 7), rest, used = 8);
            put(&frame, sizeof frame);
            put_fill(fill, frame.length < (1u << 20) ? frame.length : 4096);
        } else if (kind != 7) {
            put(&frame, sizeof frame);
            if (frame.type == FRAME_PAGES)
                put_fill(fill, kind == 5 ? frame.length * data[4] / 256 : frame.length);
        }
        data = rest + used;
        size = left - used;
    }
}

/* --- what has to come of them --------------------------------------------------------------------------------------- */

static void read_model(struct model *model, uint32_t allowed, const struct frame_bounds *bounds) {
    memset(model, 0, sizeof *model);
    const uint8_t *bytes = stream.bytes;
    uint64_t left = stream.length;
    while (left >= sizeof(struct frame)) {
        struct frame frame;
        memcpy(&frame, bytes, sizeof frame);
        model->refusal = frame_check(&frame, allowed, bounds, REGIONS);
        if (model->refusal)
            return;
        model->frames++;
        bytes += sizeof frame;
        left -= sizeof frame;
        if (frame.type == FRAME_END) {
            model->ended = true;
            return;
        }
        if (frame.type != FRAME_PAGES && frame.type != FRAME_ZERO && frame.type != FRAME_REQUEST)
            continue; /* it says nothing of a page */
        uint64_t size = page_sizes[frame.region], page = frame.offset / size, count = frame.length / size;
        uint64_t payload = frame.type == FRAME_PAGES ? frame.length : 0;
        for (uint64_t i = 0; i < count; i++) {
            bool there = frame.type != FRAME_PAGES || left >= (i + 1) * size;
            bool first = model->wanted[frame.region][page + i] == WANT_ABSENT;
            if (first && there) {
                model->wanted[frame.region][page + i] = frame.type == FRAME_ZERO ? WANT_ZERO : WANT_CONTENT;
                model->content[frame.region][page + i] = bytes + i * size;
                model->maybe[frame.region][page + i] = left < payload;
            }
            model->settled += left >= payload;
        }
        if (left < payload)
            return;
        bytes += payload;
        left -= payload;
    }
}

#endif
