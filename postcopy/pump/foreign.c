/*
 * What only the memory of another process brings along: it decides itself which events its userfaultfd tells of.
 */
#include <unistd.h>

#include "destination.h"

/*
 * The process forked. Its child's missing pages come to a userfaultfd of their own, which nobody here serves, and closed
 * it would give out zeros for them. So they are poisoned first: the child may use what is there, and whoever touches
 * more gets SIGBUS. The parent's fork goes on and its pages are served as before.
 */
void take_fork(struct destination *pump, int child) {
    struct destination_channel unused = {0};
    struct placer placer = {.uffd = child, .counters = &unused, .foreign = true};
    for (uint32_t i = 0; i < pump->half.count; i++) {
        const struct pump_region *region = &pump->memory[i].region;
        /* A kernel that has no such thing (before 6.6) or a child that is gone already: nothing better is to be had. */
        (void)place_poison(&placer, region->guest, region->size, region->page_size);
    }
    close(child);
}
