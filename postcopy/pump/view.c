/*
 * Other processes that map the guest's files themselves, each with a userfaultfd of its own: its faults become claims
 * and requests like the guest's, and once a page is in the file it is mapped there as well. See README.md, "Views".
 */
#include <errno.h>
#include <unistd.h>

#include "destination.h"

int destination_view(struct destination *pump, int uffd, const uint64_t *bases, uint32_t count) {
    uint32_t used = atomic_load(&pump->view_count);
    bool sound = count == pump->half.count;
    for (uint32_t i = 0; sound && i < count; i++) {
        const struct pump_region *region = &pump->memory[i].region;
        sound = !bases[i] || (region->fd >= 0 && !(bases[i] & (region->page_size - 1)));
    }
    if (!sound)
        return -EINVAL;
    if (used == PUMP_VIEWS_MAX)
        return -ENOSPC;
    struct view *view = &pump->views[used];
    view->uffd = uffd;
    for (uint32_t i = 0; i < count; i++)
        view->bases[i] = bases[i];
    atomic_store_explicit(&pump->view_count, used + 1, memory_order_release);
    signal_fd(pump->news_fd);
    return 0;
}

/* Nothing that comes from there is served any more: it is not what it was said to be, or it has gone. */
static void view_end(struct destination *pump, struct view *view) {
    if (!atomic_exchange(&view->ended, true))
        atomic_fetch_add_explicit(&pump->counters.views_ended, 1, memory_order_relaxed);
}

static int map_there(struct destination *pump, struct placer *placer, const struct pending *pending) {
    const struct pump_region *region = &pump->memory[pending->region].region;
    uint64_t offset = pending->page * region->page_size;
    return place_continue(placer, pending->view->bases[pending->region] + offset, region->page_size,
                          region->page_size);
}

bool view_settle(struct destination *pump, const struct pending *pending) {
    struct view *view = pending->view;
    struct placer placer = {.uffd = view->uffd, .counters = &pump->counters.views, .told = true, .foreign = true};
    if (atomic_load(&view->ended))
        return true;
    int result = map_there(pump, &placer, pending);
    if (result == PLACE_HOLE) {
        /* The guest gave the page back: it is zeros for everybody. */
        if (zero_claimed(pump, &pump->urgent, pending->region, pending->page))
            return true;
        result = map_there(pump, &placer, pending);
    }
    if (result == PLACE_CHANGING) {
        /* Its page tables are changing. Look again, and do not sleep before that: nothing else may come. */
        atomic_store(&pump->news, true);
        signal_fd(pump->news_fd);
        return false;
    }
    if (result == PLACE_HOLE || placer.gone)
        view_end(pump, view); /* it maps some other file; or its address space has ended */
    else if (result < 0)
        views_wake(pump, pending->region, pending->page, pending->page + 1); /* mapped no more, or no room just now */
    return true;
}

void views_wake(struct destination *pump, uint32_t region, uint64_t first, uint64_t stop) {
    uint32_t count = atomic_load_explicit(&pump->view_count, memory_order_acquire);
    uint64_t size = pump->memory[region].region.page_size;
    for (uint32_t i = 0; i < count; i++) {
        const struct view *view = &pump->views[i];
        struct placer placer = {.uffd = view->uffd};
        if (view->bases[region] && !atomic_load(&view->ended))
            place_wake(&placer, view->bases[region] + first * size, (stop - first) * size);
    }
}

void views_poison(struct destination *pump, uint32_t region, uint64_t first, uint64_t stop) {
    uint32_t count = atomic_load_explicit(&pump->view_count, memory_order_acquire);
    uint64_t size = pump->memory[region].region.page_size;
    for (uint32_t i = 0; i < count; i++) {
        const struct view *view = &pump->views[i];
        struct placer placer = {.uffd = view->uffd, .counters = &pump->counters.views, .foreign = true};
        if (view->bases[region] && !atomic_load(&view->ended))
            (void)place_poison(&placer, view->bases[region] + first * size, (stop - first) * size, size);
    }
}

static int read_view(struct destination *pump, struct view *view) {
    struct uffd_message messages[MESSAGES_MAX];
    ssize_t got = uffd_read(view->uffd, messages, MESSAGES_MAX);
    uint64_t read_at = now_ns();
    if (got < 0 && errno != EAGAIN && errno != EINTR)
        view_end(pump, view);
    for (ssize_t i = 0; i < got / (ssize_t)sizeof *messages; i++) {
        uint32_t region;
        uint64_t page;
        if (messages[i].event == UFFD_EVENT_FORK)
            close((int)messages[i].flags);
        /* Neither events nor other memory was agreed on, and nobody here can tell what it would mean to this one. */
        if (messages[i].event != UFFD_EVENT_PAGEFAULT || !fault_locate(pump, view, messages[i].address, &region, &page))
            view_end(pump, view);
        else if (fault_take(pump, view, &messages[i], region, page, read_at))
            return STEP_FAILED;
    }
    return got > 0 ? STEP_PROGRESS : STEP_IDLE;
}

int views_read(struct destination *pump) {
    uint32_t count = atomic_load_explicit(&pump->view_count, memory_order_acquire);
    int progress = STEP_IDLE;
    for (uint32_t i = 0; i < count; i++) {
        struct view *view = &pump->views[i];
        if (atomic_load(&view->ended) || !faults_room(pump))
            continue;
        int step = read_view(pump, view);
        if (step == STEP_FAILED)
            return step;
        progress |= step;
    }
    return progress;
}

nfds_t views_poll(const struct destination *pump, struct pollfd *descriptors) {
    uint32_t count = atomic_load_explicit(&pump->view_count, memory_order_acquire);
    nfds_t used = 0;
    for (uint32_t i = 0; i < count; i++)
        if (!atomic_load(&pump->views[i].ended))
            descriptors[used++] = (struct pollfd){.fd = pump->views[i].uffd, .events = POLLIN};
    return used;
}
