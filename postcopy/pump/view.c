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

static int map_there(struct destination *pump, struct placer *placer, const struct fault *fault) {
    const struct pump_region *region = &pump->memory[fault->region].region;
    uint64_t offset = fault->page * region->page_size;
    return place_continue(placer, fault->view->bases[fault->region] + offset, region->page_size, region->page_size);
}

bool view_settle(struct destination *pump, const struct fault *fault) {
    struct view *view = fault->view;
    struct placer placer = {.uffd = view->uffd, .counters = &pump->counters.views, .foreign = true};
    if (atomic_load(&view->ended))
        return true;
    int result = map_there(pump, &placer, fault);
    if (result == PLACE_HOLE) {
        /* The guest gave the page back: it is zeros for everybody. */
        if (zero_claimed(pump, &pump->urgent, fault->region, fault->page))
            return false;
        result = map_there(pump, &placer, fault);
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
        views_wake(pump, fault->region, fault->page, fault->page + 1); /* mapped no more, or no room just now */
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
        if (view->bases[region] && !atomic_load(&view->ended))
            poison_elsewhere(pump, view->uffd, view->bases[region] + first * size, (stop - first) * size, size, false);
    }
}

static int read_view(struct destination *pump, struct view *view) {
    struct uffd_message messages[MESSAGES_MAX];
    ssize_t got = uffd_read(view->uffd, messages, backlog_room(pump));
    struct fault fault = {.view = view, .read_at = now_ns()};
    if (got < 0 && errno != EAGAIN && errno != EINTR)
        view_end(pump, view);
    int count = got > 0 ? (int)(got / (ssize_t)sizeof *messages) : 0;
    for (int i = 0; i < count; i++) {
        const struct uffd_message *message = &messages[i];
        if (message->event == UFFD_EVENT_FORK)
            close((int)message->flags);
        fault.thread = message->thread;
        fault.flags = (uint32_t)message->flags;
        /* Neither events nor other memory was agreed on, and nobody here can tell what it would mean to this one. */
        if (message->event != UFFD_EVENT_PAGEFAULT ||
            !fault_locate(pump, view, message->address, &fault.region, &fault.page))
            view_end(pump, view);
        else
            fault_keep(pump, fault);
    }
    return count;
}

int views_read(struct destination *pump) {
    uint32_t views = atomic_load_explicit(&pump->view_count, memory_order_acquire);
    int count = 0;
    for (uint32_t i = 0; i < views; i++)
        if (!atomic_load(&pump->views[i].ended) && backlog_room(pump))
            count += read_view(pump, &pump->views[i]);
    return count;
}

nfds_t views_poll(const struct destination *pump, struct pollfd *descriptors) {
    uint32_t count = atomic_load_explicit(&pump->view_count, memory_order_acquire);
    nfds_t used = 0;
    for (uint32_t i = 0; i < count; i++)
        if (!atomic_load(&pump->views[i].ended))
            descriptors[used++] = (struct pollfd){.fd = pump->views[i].uffd, .events = POLLIN};
    return used;
}
