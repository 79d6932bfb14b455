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
    uint64_t begun = now_ns();
    while (place_poison(&placer, address, length, page_size) > 0 && now_ns() - begun < OTHERS_NS_MAX) {
        address += placer.done;
        length -= placer.done;
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
