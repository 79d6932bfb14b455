/* The floor's memory: a memfd with the touchers' mapping, an alias, a pattern to fill it with and to compare it to. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "floor_inside.h"

/* memfd_create(2); glibc leaves it to linux/memfd.h, which does not go together with sys/mman.h everywhere. */
#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21u << 26)
#endif

#define WORDS (BLOCK_BYTES / 8u)

static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static void *map(struct floor *floor) {
    int flags = floor->setup.anonymous ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    return mmap(NULL, floor->setup.size, PROT_READ | PROT_WRITE, flags, floor->memory, 0);
}

int memory_create(struct floor *floor, bool alias) {
    bool huge = floor->setup.page_size > BLOCK_BYTES;
    unsigned flags = MFD_CLOEXEC | (huge ? MFD_HUGETLB | MFD_HUGE_2MB : 0);
    floor->memory = floor->setup.anonymous ? -1 : memfd_create("floor", flags);
    if (!floor->setup.anonymous && (floor->memory < 0 || ftruncate(floor->memory, (off_t)floor->setup.size)))
        return floor_fail(floor, "memfd");
    floor->guest = map(floor);
    if (floor->guest == MAP_FAILED)
        return floor_fail(floor, "mmap");
    if (alias) {
        floor->alias = map(floor);
        if (floor->alias == MAP_FAILED)
            return floor_fail(floor, "mmap of the alias");
    }
    return 0;
}

int memory_register(struct floor *floor) {
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    floor->uffd = device >= 0 ? ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK)
                              : (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (device >= 0)
        close(device);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS |
                                                          UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MINOR_HUGETLBFS};
    if (floor->uffd < 0 || ioctl(floor->uffd, UFFDIO_API, &api))
        return floor_fail(floor, "userfaultfd");
    struct uffdio_register range = {
        .range = {.start = (uint64_t)(uintptr_t)floor->guest, .len = floor->setup.size},
        .mode = UFFDIO_REGISTER_MODE_MISSING | (floor->alias ? UFFDIO_REGISTER_MODE_MINOR : 0),
    };
    if (ioctl(floor->uffd, UFFDIO_REGISTER, &range))
        return floor_fail(floor, "UFFDIO_REGISTER");
    return 0;
}

static void block_fill(uint64_t *words, uint64_t seed, uint64_t block) {
    uint64_t base = mix(seed + 0x9e3779b97f4a7c15ull * (block + 1));
    for (uint64_t i = 0; i < WORDS; i++)
        words[i] = base + i * 0xd1342543de82ef95ull;
}

void memory_fill(struct floor *floor) {
    for (uint64_t block = 0; block < floor->setup.size / BLOCK_BYTES; block++)
        block_fill((uint64_t *)(void *)(floor->guest + block * BLOCK_BYTES), floor->setup.seed, block);
}

/* A page with its touches: each toucher added 1 to its own word of the page's first block. */
static bool page_matches(const struct floor *floor, uint64_t page, uint64_t touchers) {
    uint64_t expected[WORDS], blocks = floor->setup.page_size / BLOCK_BYTES;
    const uint8_t *content = floor->guest + page * floor->setup.page_size;
    for (uint64_t i = 0; i < blocks; i++) {
        block_fill(expected, floor->setup.seed, page * blocks + i);
        for (uint32_t t = 0; !i && t < floor->setup.touchers; t++)
            expected[t] += touchers >> t & 1;
        if (memcmp(content + i * BLOCK_BYTES, expected, BLOCK_BYTES))
            return false;
    }
    return true;
}

/* Of a file the kernel says what is there, of private memory its page tables do. */
static int resident(const struct floor *floor, uint64_t *count) {
    struct stat status;
    if (!floor->setup.anonymous) {
        if (fstat(floor->memory, &status))
            return -1;
        *count = (uint64_t)status.st_blocks * 512u / floor->setup.page_size;
        return 0;
    }
    unsigned char *there = malloc(floor->pages);
    int result = there ? mincore(floor->guest, floor->setup.size, there) : -1;
    *count = 0;
    for (uint64_t page = 0; !result && page < floor->pages; page++)
        *count += there[page] & 1;
    free(there);
    return result;
}

int memory_check(struct floor *floor) {
    struct floor_result *result = floor->result;
    uint64_t *touchers = calloc(floor->pages, sizeof *touchers);
    if (!touchers || resident(floor, &result->pages_resident))
        return floor_fail(floor, "check");
    for (uint32_t t = 0; t < floor->setup.touchers; t++)
        for (uint64_t i = 0; i < floor->toucher[t].touched; i++)
            touchers[floor->toucher[t].order[i]] |= 1ull << t;
    for (uint64_t page = 0; page < floor->pages; page++) {
        result->pages_touched += touchers[page] != 0;
        /* Without a push the others are not here, and looking at them would wait for ever. */
        if (floor->setup.push == FLOOR_NONE && !touchers[page])
            continue;
        result->pages_checked++;
        result->pages_mismatched += !page_matches(floor, page, touchers[page]);
    }
    free(touchers);
    return 0;
}

/* Each toucher's own order of all pages. */
int memory_orders(struct floor *floor) {
    for (uint32_t t = 0; t < floor->setup.touchers; t++) {
        struct toucher *toucher = &floor->toucher[t];
        *toucher = (struct toucher){.floor = floor, .index = t, .order = malloc(floor->pages * sizeof(uint32_t))};
        if (!toucher->order)
            return floor_fail(floor, "malloc");
        for (uint64_t i = 0; i < floor->pages; i++) {
            uint64_t other = mix(floor->setup.seed + ((uint64_t)t << 40) + i) % (i + 1);
            toucher->order[i] = toucher->order[other];
            toucher->order[other] = (uint32_t)i;
        }
    }
    return 0;
}
