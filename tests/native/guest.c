/* The guest without Python, for the sanitizers: what may run at once does, and every path is taken. Exit status 0. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"
#include "holds.h"
#include "histogram.h"

#define PAGES 64u
#define VCPUS 3u

struct reader {
    struct guest *guest;
    _Atomic int over;
    uint64_t sum;
};

static uint64_t in_seconds(uint64_t seconds) {
    struct timespec now;
    HOLDS(clock_gettime(CLOCK_MONOTONIC, &now) == 0);
    return ((uint64_t)now.tv_sec + seconds) * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Takes every reading over and over, as a scrape of the metrics would. */
static void *reader_main(void *argument) {
    struct reader *reader = argument;
    while (!reader->over) {
        for (uint32_t v = 0; v < VCPUS; v++) {
            const struct hist *stall = guest_stall(reader->guest, v);
            reader->sum += guest_steps(reader->guest, v) + guest_accesses(reader->guest, v) +
                           guest_first_step_at(reader->guest, v) + guest_last_step_at(reader->guest, v) +
                           (uint64_t)guest_tid(reader->guest, v) + stall->count + stall->bucket[700];
        }
    }
    return NULL;
}

static void check_all(struct guest *guest, uint64_t mismatched) {
    struct check *check;
    struct check_result result;
    HOLDS(guest_check(guest, &check) == 0);
    HOLDS(check_range(check, 0, PAGES + 1, NULL, &result) == EINVAL);
    HOLDS(check_range(check, 0, PAGES, NULL, &result) == 0);
    HOLDS(result.pages_checked == PAGES && result.pages_mismatched == mismatched);
    check_destroy(check);
}

static void run_and_move(uint32_t workload, const struct guest_segment *segments) {
    struct guest_setup setup = {.workload = workload, .vcpus = VCPUS, .seed = 1, .nonce = 2,
                                .blank_pages = 9, .hole_pages = 5, .stride = 7};
    struct guest *guest, *next;
    HOLDS(guest_create(&setup, segments, 2, NULL, &guest) == 0);
    HOLDS(guest_fill(guest) == 0);
    struct reader reader = {.guest = guest};
    pthread_t thread;
    HOLDS(pthread_create(&thread, NULL, reader_main, &reader) == 0);
    for (int turn = 0; turn < 50; turn++) {
        uint64_t before = guest_steps(guest, 0);
        HOLDS(guest_start(guest) == 0);
        while (turn % 2 && guest_steps(guest, 0) == before)
            sched_yield();
        HOLDS(guest_stop(guest, in_seconds(20)) == 0);
    }
    reader.over = 1;
    HOLDS(pthread_join(thread, NULL) == 0);
    check_all(guest, 0);

    /* Made as another one, and as it was before where the setup makes no sense. */
    struct guest_setup other = {.vcpus = VCPUS, .seed = 9, .nonce = 9, .stride = 1};
    HOLDS(guest_create(&other, segments, 2, NULL, &next) == 0);
    HOLDS(guest_seek(next, 0, 3, 1) == 0);
    other = setup;
    other.vcpus = VCPUS + 1;
    HOLDS(guest_become(next, &other) == EINVAL);
    other.vcpus = VCPUS;
    other.hole_pages = other.blank_pages + 1;
    HOLDS(guest_become(next, &other) == EINVAL && guest_steps(next, 0) == 3 * PAGES + 1);
    HOLDS(guest_become(guest, &setup) == EBUSY);
    HOLDS(guest_become(next, &setup) == 0 && guest_steps(next, 0) == 0);
    uint64_t most = 0;
    for (uint32_t v = 0; v < VCPUS; v++) {
        uint64_t pass, position;
        HOLDS(guest_read(guest, v, &pass, &position) == 0);
        HOLDS(guest_seek(next, v, pass, position) == 0);
        most = guest_steps(next, v) > most ? guest_steps(next, v) : most;
    }
    HOLDS(guest_seek(next, VCPUS, 0, 0) == EINVAL && guest_seek(next, 0, 0, UINT64_MAX) == EINVAL);
    HOLDS(guest_destroy(guest, in_seconds(20)) == 0);
    HOLDS(guest_limit(next, most + 100) == 0 && guest_start(next) == 0 && guest_wait(next, in_seconds(20)) == 0);
    check_all(next, 0);
    ((char *)segments[0].address)[5] ^= 1;
    check_all(next, 1);
    /* A hole that has a page: zeros are right, anything else is not. */
    char *hole = (char *)segments[1].address + (PAGES / 2 - 6) * GUEST_PAGE_BYTES;
    hole[7] = 1;
    check_all(next, 2);
    hole[7] = 0;
    check_all(next, 1);
    HOLDS(guest_destroy(next, in_seconds(20)) == 0);
}

/* Right content in an order that is not increment's: only the property itself can tell. */
static void property_stands_alone(const struct guest_segment *segments) {
    struct memory memory = {.segments = segments, .segment_count = 2, .active_pages = PAGES, .pages = PAGES};
    struct content content;
    struct order order;
    struct cursor cursor;
    struct check *check;
    struct check_result result;
    content_init(&content, 1, 2, 1, true);
    HOLDS(order_init(&order, WORKLOAD_RANDOM, 1, 1, PAGES, 1, false) && order_seek(&order, 0, 0, 0, &cursor));
    memory_fill(&memory, &content);
    for (uint32_t step = 0; step < PAGES / 2; step++)
        content_visit(&content, &memory, order_next(&order, &cursor), 0);
    HOLDS(check_create(&memory, &content, &order, &check) == 0);
    HOLDS(check_vcpu(check, 0, cursor.pass, cursor.position) == 0);
    HOLDS(check_range(check, 0, PAGES, NULL, &result) == 0 && result.pages_mismatched > 0);
    check_destroy(check);
}

int main(void) {
    int fd = memfd_create("race", MFD_CLOEXEC);
    HOLDS(fd >= 0 && ftruncate(fd, PAGES / 2 * GUEST_PAGE_BYTES) == 0);
    struct guest_segment segments[2] = {{.pages = PAGES / 2, .fd = -1}, {.pages = PAGES / 2, .fd = fd}};
    for (int i = 0; i < 2; i++) {
        int flags = i ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
        segments[i].address = mmap(NULL, PAGES / 2 * GUEST_PAGE_BYTES, PROT_READ | PROT_WRITE, flags, segments[i].fd, 0);
        HOLDS(segments[i].address != MAP_FAILED);
    }
    for (uint32_t workload = 0; workload < WORKLOAD_COUNT; workload++)
        run_and_move(workload, segments);
    property_stands_alone(segments);
    int cpu[VCPUS] = {0, 4000, 0};
    struct guest *none;
    struct guest_setup setup = {.vcpus = VCPUS, .stride = 1};
    HOLDS(guest_create(&setup, segments, 2, cpu, &none) == EINVAL);
    setup = (struct guest_setup){.vcpus = VCPUS, .stride = 1, .blank_pages = 3, .hole_pages = 4};
    HOLDS(guest_create(&setup, segments, 2, NULL, &none) == EINVAL);
    puts("ok");
    return 0;
}
