/*
 * What only the memory of another process brings along: it decides itself which events its userfaultfd tells of.
 */
#include <time.h>
#include <unistd.h>

#include "destination.h"

/* What stands against placing in a child of a fork may be its own events, which nobody else reads. */
static void read_child(struct destination *pump, int child) {
    struct uffd_message messages[MESSAGES_MAX];
    ssize_t got = uffd_read(child, messages, MESSAGES_MAX);
    for (ssize_t i = 0; i < got / (ssize_t)sizeof *messages; i++)
        if (messages[i].event == UFFD_EVENT_FORK)
            take_fork(pump, (int)(uint32_t)messages[i].flags);
}

void poison_elsewhere(struct destination *pump, int uffd, uint64_t address, uint64_t length, uint64_t page_size,
                      bool child) {
    struct destination_channel unused = {0};
    struct placer placer = {.uffd = uffd, .counters = &unused, .foreign = true};
    uint64_t most = page_size > FRAME_BYTES_MAX ? page_size : FRAME_BYTES_MAX, begun = now_ns();
    while (length && !placer.gone) {
        uint64_t piece = length < most ? length : most;
        int result = place_poison(&placer, address, piece, page_size);
        if (result < 0)
            return;
        uint64_t done = result ? placer.done : piece, now = now_ns();
        address += done;
        length -= done;
        /* Of a child's pages nobody hears again; a view's are lost all the same when they are touched. */
        begun = child && done ? now : begun;
        if (length && now - begun >= OTHERS_NS_MAX) {
            (void)place_wake(&placer, address, length);
            return;
        }
        if (!result)
            continue;
        if (child)
            read_child(pump, uffd);
        nanosleep(&(struct timespec){.tv_nsec = CHANGES_SLEEP_NS}, NULL);
    }
}

/*
 * The process forked. Its child's missing pages come to a userfaultfd of their own, which nobody here serves, and closed
 * it would give out zeros for them. So they are poisoned first: the child may use what is there, and whoever touches
 * more gets SIGBUS. The parent's fork goes on and its pages are served as before.
 */
void take_fork(struct destination *pump, int child) {
    for (uint32_t i = 0; i < pump->half.count; i++) {
        const struct pump_region *region = &pump->memory[i].region;
        /* A kernel that has no such thing (before 6.6) or a child that is gone already: nothing better is to be had. */
        poison_elsewhere(pump, child, region->guest, region->size, region->page_size, true);
    }
    close(child);
}
