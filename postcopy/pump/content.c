/*
 * Where the source's bytes are: in the mapping of a stopped guest, or in a file that is read, a snapshot's.
 *
 * Such a file is not mapped, because it is somebody else's: cut short under a mapping it would end this process by
 * SIGBUS. A read of it ends in an error that ends one pump. The same end has a file that was written to meanwhile: half of
 * one snapshot and half of another (or of zeros, where it was emptied and grown again) is nobody's memory.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "source.h"

int content_create(struct source *pump) {
    uint64_t largest = 0;
    for (uint32_t i = 0; i < pump->half.count; i++) {
        struct source_memory *memory = &pump->memory[i];
        if (is_mapped(memory))
            continue;
        if (memory->region.fd < 0)
            return -EINVAL;
        struct stat now;
        if (fstat(memory->region.fd, &now))
            return -errno;
        memory->written_at = now.st_mtim;
        largest = memory->region.page_size > largest ? memory->region.page_size : largest;
    }
    pump->answers_max = ANSWERS_MAX;
    if (!largest)
        return 0;
    uint64_t fit = ANSWERS_BYTES_MAX / largest;
    pump->answers_max = fit > ANSWERS_MAX ? ANSWERS_MAX : fit ? (uint32_t)fit : 1;
    pump->page_size_max = largest;
    pump->push_content_bytes = FRAME_BYTES_MAX > largest ? FRAME_BYTES_MAX : largest;
    pump->answers_content = malloc(pump->answers_max * largest);
    pump->push_content = malloc(pump->push_content_bytes);
    return pump->answers_content && pump->push_content ? 0 : -ENOMEM;
}

void content_destroy(struct source *pump) {
    free(pump->answers_content);
    free(pump->push_content);
}

static int fail_file(struct source *pump, uint32_t role, uint32_t region, uint64_t offset, uint64_t length, int number) {
    struct pump_status failure = {.failure = FAILURE_FILE, .role = role, .number = number, .region = region,
                                  .offset = offset, .length = length};
    return half_fail(&pump->half, &failure);
}

int content_holds(struct source *pump, uint32_t role, uint32_t region, uint64_t offset, uint64_t length) {
    const struct source_memory *memory = &pump->memory[region];
    struct stat now;
    if (is_mapped(memory))
        return 0;
    if (fstat(memory->region.fd, &now))
        return fail_file(pump, role, region, offset, length, errno);
    bool same = now.st_mtim.tv_sec == memory->written_at.tv_sec && now.st_mtim.tv_nsec == memory->written_at.tv_nsec;
    return same ? 0 : fail_file(pump, role, region, offset, length, ESTALE);
}

const uint8_t *content_at(struct source *pump, uint32_t role, uint32_t region, uint64_t offset, uint64_t length,
                          uint8_t *buffer) {
    const struct pump_region *r = &pump->memory[region].region;
    if (is_mapped(&pump->memory[region]))
        return (const uint8_t *)(uintptr_t)(r->guest + offset);
    uint64_t done = 0;
    while (done < length) {
        ssize_t got = pread(r->fd, buffer + done, length - done, (off_t)(r->fd_offset + offset + done));
        if (got > 0) {
            done += (uint64_t)got;
        } else if (!got || errno != EINTR) {
            fail_file(pump, role, region, offset, length, got ? errno : 0);
            return NULL;
        }
    }
    /* Asked behind the reading: what was read before the file changed is right. */
    return content_holds(pump, role, region, offset, length) ? NULL : buffer;
}
