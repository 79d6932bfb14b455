/*
 * The way of a demand page at the destination: the kernel's message, the claim, the request, the answer's placing,
 * the latency's record. One thread does all of it, so that no page waits for a second thread to be woken.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "destination.h"

static int fail_number(struct destination *pump, uint32_t failure, int number, uint32_t operation) {
    struct pump_status status = {.failure = failure, .role = ROLE_URGENT, .number = number, .operation = operation};
    return half_fail(&pump->half, &status);
}

void faults_settle(struct destination *pump) {
    uint64_t now = 0;
    for (uint32_t i = 0; i < pump->pending_count;) {
        struct pending *pending = &pump->pending[i];
        uint8_t state = page_load(&pump->memory[pending->region].map[pending->page]);
        bool over = state == PAGE_POISONED || (state == PAGE_PLACED && (!pending->view || view_settle(pump, pending)));
        if (!over) {
            i++;
            continue;
        }
        now = now ? now : now_ns();
        if (state == PAGE_PLACED)
            hist_record(&pump->counters.demand.latency, now - pending->read_at);
        if (state == PAGE_PLACED && pump->trace)
            trace_record(pump->trace, trace_where(pending->page, pending->region, pending->found, pending->thread),
                         pending->read_at, now - pending->read_at);
        *pending = pump->pending[--pump->pending_count];
    }
    atomic_store_explicit(&pump->counters.demand.pending, pump->pending_count, memory_order_relaxed);
}

static void send_frame(struct destination *pump, struct frame frame) {
    if (pump->requests_begin == pump->requests_end)
        pump->requests_begin = pump->requests_end = 0;
    if (pump->requests_end + sizeof(struct frame) > sizeof pump->requests) { /* faults_room() saw that it fits then */
        uint64_t rest = pump->requests_end - pump->requests_begin;
        memmove(pump->requests, (uint8_t *)pump->requests + pump->requests_begin, rest);
        pump->requests_begin = 0;
        pump->requests_end = rest;
    }
    memcpy((uint8_t *)pump->requests + pump->requests_end, &frame, sizeof frame);
    pump->requests_end += sizeof frame;
}

void request(struct destination *pump, uint32_t region, uint64_t page) {
    uint64_t page_size = pump->memory[region].region.page_size;
    if (pump->alone)
        return; /* whatever is wanted is asked for when there is a connection */
    send_frame(pump, (struct frame){.magic = FRAME_MAGIC, .type = FRAME_REQUEST, .region = (uint16_t)region,
                                    .offset = page * page_size, .length = page_size});
    hist_add(&pump->counters.demand.requests, 1);
}

/*
 * A fault on a page that was placed: the page tables lost it (the kernel may do that to a file's page), or the guest
 * gave the page back and now reads zeros there. Either way nothing is fetched.
 */
static int resolve_placed(struct destination *pump, uint32_t region, uint64_t page, uint64_t flags) {
    struct memory *memory = &pump->memory[region];
    uint64_t size = memory->region.page_size;
    struct receiver *urgent = &pump->urgent;
    if (!(flags & UFFD_FAULT_MINOR))
        return zero_claimed(pump, urgent, region, page);
    uint64_t address = memory->region.guest + page * size;
    int result;
    while ((result = place_continue(&urgent->placer, address, size, size)) == PLACE_CHANGING)
        if (await_change(pump, urgent, region, page))
            return -1;
    urgent->changing = 0;
    /* Given back since the fault was raised: woken, its thread faults again, on a page that is missing now. */
    if (result == PLACE_HOLE)
        result = place_wake(&urgent->placer, address, size);
    return result ? fail_placing(pump, urgent, region, page) : 0;
}

/* It was told of before it was poisoned, or was given back since: it is lost all the same, and never zeros. */
static int poison_again(struct destination *pump, uint32_t region, uint64_t page) {
    const struct pump_region *r = &pump->memory[region].region;
    struct receiver *urgent = &pump->urgent;
    int result;
    while ((result = place_poison(&urgent->placer, r->guest + page * r->page_size, r->page_size, r->page_size)) > 0)
        if (await_change(pump, urgent, region, page))
            return -1;
    urgent->changing = 0;
    views_poison(pump, region, page, page + 1);
    return result ? fail_placing(pump, urgent, region, page) : 0;
}

/* Bring a faulting page on its way. */
static int serve(struct destination *pump, const struct view *view, uint32_t region, uint64_t page, uint64_t flags) {
    page_byte *state = &pump->memory[region].map[page];
    for (;;) {
        switch (page_load(state)) {
        case PAGE_ABSENT:
            if (!page_move(state, PAGE_ABSENT, PAGE_REQUESTED))
                break;
            request(pump, region, page);
            return 0;
        case PAGE_PLACING:
            if (!page_move(state, PAGE_PLACING, PAGE_WATCHED))
                break;
            return 0;
        case PAGE_ZERO:
            if (!page_move(state, PAGE_ZERO, PAGE_PLACING))
                break;
            if (zero_claimed(pump, &pump->urgent, region, page))
                return -1;
            pages_placed(state, 1);
            return 0;
        case PAGE_PLACED:
            /* A view's fault is settled with the others: whatever the kernel called it, the page may be there by now. */
            return view ? 0 : resolve_placed(pump, region, page, flags);
        case PAGE_POISONED:
            return poison_again(pump, region, page);
        default: /* REQUESTED, WATCHED: it is on its way, and whoever places it wakes every waiter */
            return 0;
        }
    }
}

bool fault_locate(const struct destination *pump, const struct view *view, uint64_t address, uint32_t *region,
                  uint64_t *page) {
    for (uint32_t i = 0; i < pump->half.count; i++) {
        const struct pump_region *r = &pump->memory[i].region;
        uint64_t base = view ? view->bases[i] : r->guest;
        if (base && address >= base && address - base < r->size) {
            *region = i;
            *page = (address - base) / r->page_size;
            return true;
        }
    }
    return false;
}

static uint32_t found(uint8_t state) {
    return state == PAGE_ABSENT ? FOUND_ABSENT : state == PAGE_PLACED || state == PAGE_ZERO ? FOUND_HERE : FOUND_COMING;
}

/* The kernel tells again of a thread that was interrupted while it waited: that is the same fault. */
static bool told_already(const struct destination *pump, const struct view *view, uint32_t region, uint64_t page,
                         uint32_t thread) {
    for (uint32_t i = 0; i < pump->pending_count; i++) {
        const struct pending *pending = &pump->pending[i];
        if (pending->thread == thread && pending->page == page && pending->region == region && pending->view == view)
            return true;
    }
    return false;
}

int fault_take(struct destination *pump, struct view *view, const struct uffd_message *message, uint32_t region,
               uint64_t page, uint64_t read_at) {
    if (!told_already(pump, view, region, page, message->thread)) {
        hist_add(message->flags & UFFD_FAULT_WP      ? &pump->counters.demand.faults_wp
                 : message->flags & UFFD_FAULT_MINOR ? &pump->counters.demand.faults_minor
                                                     : &pump->counters.demand.faults_missing,
                 1);
        /* Accounted before it is served: whoever places the page from now on finds that it is waited for. */
        pump->pending[pump->pending_count++] =
            (struct pending){.view = view, .region = region, .thread = message->thread,
                             .found = found(page_load(&pump->memory[region].map[page])), .page = page,
                             .read_at = read_at};
    }
    return serve(pump, view, region, page, message->flags);
}

static int take_own(struct destination *pump, const struct uffd_message *message, uint64_t read_at) {
    uint32_t region;
    uint64_t page;
    /* Another process may have had more trapped than it told of: writes, or memory elsewhere. */
    bool served = !pump->foreign || !(message->flags & UFFD_FAULT_WP);
    if (!served || !fault_locate(pump, NULL, message->address, &region, &page))
        return fail_number(pump, FAILURE_KERNEL, EPROTO, message->event);
    return fault_take(pump, NULL, message, region, page, read_at);
}

/*
 * Whether a whole batch of faults can be taken. A request may outlive its fault: the push may have brought the page
 * while the source did not read. So both the faults that are accounted and the requests not yet sent are bounded.
 */
bool faults_room(const struct destination *pump) {
    uint64_t unsent = pump->requests_end - pump->requests_begin;
    return pump->pending_count + MESSAGES_MAX <= PENDING_MAX &&
           unsent + MESSAGES_MAX * sizeof(struct frame) <= sizeof pump->requests;
}

static bool agreed(const struct destination *pump, uint8_t event) {
    return event == UFFD_EVENT_PAGEFAULT || (event == UFFD_EVENT_REMOVE && pump->told) ||
           ((event == UFFD_EVENT_UNMAP || event == UFFD_EVENT_FORK) && pump->foreign);
}

/*
 * Read up to `room` messages. What the guest gives back takes effect at once, before the push may place again: as soon
 * as its event is read the kernel goes on. Also what is behind one that is refused: the child of a fork must
 * not be forgotten. Faults are left to the caller. Returns how many messages, or -1.
 */
static int read_messages(struct destination *pump, struct uffd_message *messages, size_t room) {
    gate_enter(pump);
    ssize_t got = uffd_read(pump->uffd, messages, room);
    int number = errno, failed = 0;
    for (ssize_t i = 0; i < got / (ssize_t)sizeof *messages; i++) {
        const struct uffd_message *message = &messages[i];
        if (message->event == UFFD_EVENT_FORK)
            take_fork(pump, (int)(uint32_t)message->flags);
        if (!agreed(pump, message->event))
            failed = fail_number(pump, FAILURE_KERNEL, EPROTO, message->event);
        else if (message->event == UFFD_EVENT_REMOVE || message->event == UFFD_EVENT_UNMAP)
            failed |= take_removal(pump, message->flags, message->address);
    }
    gate_leave(pump);
    if (got < 0)
        return number == EAGAIN || number == EINTR ? 0 : fail_number(pump, FAILURE_KERNEL, number, 0);
    return failed ? -1 : (int)(got / (ssize_t)sizeof *messages);
}

int read_ahead(struct destination *pump) {
    struct uffd_message messages[MESSAGES_MAX];
    size_t room = PENDING_MAX - pump->backlog_count;
    if (!room)
        return 0;
    int count = read_messages(pump, messages, room < MESSAGES_MAX ? room : MESSAGES_MAX);
    uint64_t read_at = now_ns();
    for (int i = 0; i < count; i++) {
        if (messages[i].event != UFFD_EVENT_PAGEFAULT)
            continue;
        pump->backlog_at[pump->backlog_count] = read_at;
        pump->backlog[pump->backlog_count++] = messages[i];
    }
    return count < 0 ? -1 : 0;
}

/* Faults that were read while something was being placed come first. Serving one may add to them. */
static int take_backlog(struct destination *pump) {
    struct uffd_message message = pump->backlog[0];
    uint64_t read_at = pump->backlog_at[0];
    pump->backlog_count--;
    memmove(pump->backlog, pump->backlog + 1, pump->backlog_count * sizeof *pump->backlog);
    memmove(pump->backlog_at, pump->backlog_at + 1, pump->backlog_count * sizeof *pump->backlog_at);
    return take_own(pump, &message, read_at) ? STEP_FAILED : STEP_PROGRESS;
}

static int read_faults(struct destination *pump) {
    struct uffd_message messages[MESSAGES_MAX];
    if (!faults_room(pump))
        return STEP_IDLE;
    if (pump->backlog_count)
        return take_backlog(pump);
    int count = read_messages(pump, messages, MESSAGES_MAX);
    uint64_t read_at = now_ns();
    for (int i = 0; i < count; i++)
        if (messages[i].event == UFFD_EVENT_PAGEFAULT && take_own(pump, &messages[i], read_at))
            return STEP_FAILED;
    return count < 0 ? STEP_FAILED : count ? STEP_PROGRESS : STEP_IDLE;
}

static int send_requests(struct destination *pump) {
    uint64_t rest = pump->requests_end - pump->requests_begin;
    if (!rest)
        return STEP_IDLE;
    struct iovec part = {.iov_base = (uint8_t *)pump->requests + pump->requests_begin, .iov_len = rest};
    ssize_t sent = channel_send(&pump->half.urgent, &part, 1);
    if (sent < 0)
        return errno == EAGAIN || errno == EINTR ? STEP_IDLE : fail_number(pump, FAILURE_SOCKET, errno, 0);
    pump->requests_begin += (uint64_t)sent;
    hist_add(&pump->counters.demand.bytes_sent, (uint64_t)sent);
    return STEP_PROGRESS;
}

static int wait_for_work(struct destination *pump) {
    struct pollfd descriptors[3 + PUMP_VIEWS_MAX] = {
        {.fd = pump->news_fd, .events = POLLIN},
        {.fd = pump->alone ? -1 : pump->half.urgent.socket, .events = POLLIN},
        {.fd = pump->uffd, .events = POLLIN},
    };
    if (pump->requests_begin != pump->requests_end)
        descriptors[1].events |= POLLOUT;
    nfds_t used = 3;
    if (faults_room(pump))
        used += views_poll(pump, descriptors + used);
    else
        descriptors[2].fd = -1;
    int result = waiter_wait(&pump->waiter, descriptors, used, pump->alone ? -1 : beat_wait_ms(&pump->urgent.beat));
    if (result)
        return fail_number(pump, FAILURE_KERNEL, -result, 0);
    for (nfds_t i = 2; i < used; i++)
        if (descriptors[i].revents & POLLERR)
            uffd_unblock(descriptors[i].fd);
    uint64_t count;
    if (descriptors[0].revents & POLLIN && read(pump->news_fd, &count, sizeof count) < 0 && errno != EAGAIN)
        return fail_number(pump, FAILURE_KERNEL, errno, 0);
    return 0;
}

static int beat(struct destination *pump) {
    bool due;
    uint64_t sent = atomic_load_explicit(&pump->counters.demand.bytes_sent, memory_order_relaxed);
    if (receiver_beat(pump, &pump->urgent, sent, &due))
        return -1;
    if (due && pump->requests_begin == pump->requests_end)
        send_frame(pump, (struct frame){.magic = FRAME_MAGIC, .type = FRAME_BEAT});
    return 0;
}

/* Requests out, answers in. Returns an enum step. */
static int talk(struct destination *pump) {
    if (pump->alone)
        return STEP_IDLE;
    int requests = send_requests(pump);
    int answers = requests < 0 ? requests : receiver_step(pump, &pump->urgent);
    if (answers >= 0 && beat_ends(&pump->urgent.beat) && beat(pump))
        return STEP_FAILED;
    return answers < 0 ? STEP_FAILED : requests || answers ? STEP_PROGRESS : STEP_IDLE;
}

void demand_run(void *argument) {
    struct destination *pump = argument;
    thread_prefer();
    beat_begin(&pump->urgent.beat, pump->half.tick_ns);
    while (!half_stopping(&pump->half)) {
        int own = read_faults(pump);
        int faults = own < 0 ? own : own | views_read(pump);
        if (faults < 0)
            break;
        int talked = talk(pump);
        if (talked < 0) {
            /* Without the source the guest is served with what is here; only the pump's own failure ends that. */
            uint32_t state = atomic_load(&pump->half.status.state);
            if (state != PUMP_COMPLETE && state != PUMP_RUNNING)
                break;
            pump->alone = true;
            pump->requests_begin = pump->requests_end = 0;
            continue;
        }
        if (atomic_exchange(&pump->news, false) || faults || talked)
            faults_settle(pump);
        if (faults || talked)
            waiter_progress(&pump->waiter);
        else if (wait_for_work(pump))
            break;
    }
    faults_settle(pump);
}
