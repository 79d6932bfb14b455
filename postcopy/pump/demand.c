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

static bool same_fault(const struct fault *one, const struct fault *other) {
    return one->thread == other->thread && one->page == other->page && one->region == other->region &&
           one->view == other->view;
}

/*
 * Whoever waited for a page that was given back was woken. He may never touch it again, and if he does that is another
 * fault; but for the one that a stop came between, which is still to be served.
 */
static bool given_back(const struct destination *pump, const struct fault *pending) {
    return !pump->backlog_count || !same_fault(&pump->backlog[pump->backlog_begin], pending);
}

/* A fault's page is placed: where that was the answer to its request, each part of the way is known. */
static void record_parts(struct destination *pump, const struct fault *fault, uint64_t now) {
    struct destination_demand *demand = &pump->counters.demand;
    const struct landed *landed = &pump->landed;
    if (!fault->sent_at || fault->region != landed->region || fault->page - landed->page >= landed->count)
        return;
    hist_add(&demand->fetched, 1);
    hist_add(&demand->request_ns, fault->sent_at - fault->read_at);
    hist_add(&demand->answer_ns, pump->urgent.arrived_at - fault->sent_at);
    hist_add(&demand->place_ns, now - pump->urgent.arrived_at);
}

void faults_settle(struct destination *pump) {
    uint64_t now = 0;
    for (uint32_t i = 0; i < pump->pending_count;) {
        struct fault *pending = &pump->pending[i];
        uint8_t state = page_load(&pump->memory[pending->region].map[pending->page]);
        bool over = state == PAGE_POISONED || (state == PAGE_ZERO && given_back(pump, pending)) ||
                    (state == PAGE_PLACED && (!pending->view || view_settle(pump, pending)));
        if (!over) {
            i++;
            continue;
        }
        now = now ? now : now_ns();
        if (state != PAGE_POISONED)
            hist_record(&pump->counters.demand.latency, now - pending->read_at);
        record_parts(pump, pending, now);
        if (state != PAGE_POISONED && pump->trace)
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
    urgent->changing_since = 0;
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
    urgent->changing_since = 0;
    views_poison(pump, region, page, page + 1);
    return result ? fail_placing(pump, urgent, region, page) : 0;
}

/* Bring a faulting page on its way. 0, or -1 with a failed status, or where a stop came between: it is as it was then. */
static int serve(struct destination *pump, const struct fault *fault) {
    uint32_t region = fault->region;
    uint64_t page = fault->page;
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
            /* In a map that outlives the pump it stays ZERO: after a kill it must not be taken for a page that lacks. */
            if (!pump->memory[region].region.map && !page_move(state, PAGE_ZERO, PAGE_PLACING))
                break;
            if (zero_claimed(pump, &pump->urgent, region, page)) {
                atomic_store_explicit(state, PAGE_ZERO, memory_order_release);
                return -1;
            }
            pages_placed(state, 1);
            return 0;
        case PAGE_PLACED:
            /* A view's fault is settled with the others: whatever the kernel called it, the page may be there by now. */
            return fault->view ? 0 : resolve_placed(pump, region, page, fault->flags);
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
static bool told_already(const struct destination *pump, const struct fault *fault) {
    for (uint32_t i = 0; i < pump->pending_count; i++)
        if (same_fault(&pump->pending[i], fault))
            return true;
    return false;
}

/* Account for a fault and serve it. 0, or -1 as serve(). */
static int fault_take(struct destination *pump, struct fault *fault) {
    if (!told_already(pump, fault)) {
        hist_add(fault->flags & UFFD_FAULT_WP      ? &pump->counters.demand.faults_wp
                 : fault->flags & UFFD_FAULT_MINOR ? &pump->counters.demand.faults_minor
                                                   : &pump->counters.demand.faults_missing,
                 1);
        /* Accounted before it is served: whoever places the page from now on finds that it is waited for. */
        fault->found = found(page_load(&pump->memory[fault->region].map[fault->page]));
        pump->pending[pump->pending_count++] = *fault;
    }
    return serve(pump, fault);
}

/*
 * Whether a fault can be taken. A request may outlive its fault: the push may have brought the page while the source did
 * not read. So both the faults that are accounted and the requests not yet sent are bounded.
 */
static bool faults_room(const struct destination *pump) {
    uint64_t unsent = pump->requests_end - pump->requests_begin;
    return pump->pending_count < PENDING_MAX && unsent + sizeof(struct frame) <= sizeof pump->requests;
}

size_t backlog_room(const struct destination *pump) {
    size_t room = PENDING_MAX - pump->backlog_count;
    return room < MESSAGES_MAX ? room : MESSAGES_MAX;
}

void fault_keep(struct destination *pump, struct fault fault) {
    pump->backlog[(pump->backlog_begin + pump->backlog_count++) % PENDING_MAX] = fault;
}

/* Another process may have had more trapped than it told of: writes, or memory elsewhere. */
static int keep_own(struct destination *pump, const struct uffd_message *message, uint64_t read_at) {
    struct fault fault = {.thread = message->thread, .flags = (uint32_t)message->flags, .read_at = read_at};
    bool served = !pump->foreign || !(message->flags & UFFD_FAULT_WP);
    if (!served || !fault_locate(pump, NULL, message->address, &fault.region, &fault.page))
        return fail_number(pump, FAILURE_KERNEL, EPROTO, message->event);
    fault_keep(pump, fault);
    return 0;
}

static bool agreed(const struct destination *pump, uint8_t event) {
    return event == UFFD_EVENT_PAGEFAULT || (event == UFFD_EVENT_REMOVE && pump->told) ||
           ((event == UFFD_EVENT_UNMAP || event == UFFD_EVENT_FORK) && pump->foreign);
}

/*
 * What the guest gives back takes effect at once, before the push may place again: as soon as its event is read the
 * kernel goes on. Also what is behind one that is refused: the child of a fork must not be forgotten.
 */
int read_ahead(struct destination *pump) {
    struct uffd_message messages[MESSAGES_MAX];
    if (!backlog_room(pump))
        return 0;
    gate_enter(pump);
    ssize_t got = uffd_read(pump->uffd, messages, backlog_room(pump));
    int number = errno, failed = 0;
    uint64_t read_at = now_ns();
    for (ssize_t i = 0; i < got / (ssize_t)sizeof *messages; i++) {
        const struct uffd_message *message = &messages[i];
        if (message->event == UFFD_EVENT_FORK)
            take_fork(pump, (int)(uint32_t)message->flags);
        if (!agreed(pump, message->event))
            failed = fail_number(pump, FAILURE_KERNEL, EPROTO, message->event);
        else if (message->event == UFFD_EVENT_REMOVE || message->event == UFFD_EVENT_UNMAP)
            failed |= take_removal(pump, message->flags, message->address);
        else if (message->event == UFFD_EVENT_PAGEFAULT)
            failed |= keep_own(pump, message, read_at);
    }
    gate_leave(pump);
    if (got < 0)
        return number == EAGAIN || number == EINTR ? 0 : fail_number(pump, FAILURE_KERNEL, number, 0);
    return failed ? -1 : (int)(got / (ssize_t)sizeof *messages);
}

/* Read faults and bring their pages on the way, those first that were read while something was being placed. */
static int take_faults(struct destination *pump) {
    bool room = faults_room(pump);
    if (!room && !pump->told)
        return STEP_IDLE;
    int progress = pump->backlog_count ? STEP_PROGRESS : STEP_IDLE;
    /* Whoever gives pages back waits until that is read, and not for those that wait for pages. */
    if (!room || !pump->backlog_count) {
        int own = read_ahead(pump);
        if (own < 0)
            return STEP_FAILED;
        int others = room ? views_read(pump) : 0;
        progress = own + others ? STEP_PROGRESS : STEP_IDLE;
    }
    /* Serving one may add to them. */
    for (; pump->backlog_count && faults_room(pump); pump->backlog_count--) {
        if (fault_take(pump, &pump->backlog[pump->backlog_begin]))
            return STEP_FAILED;
        pump->backlog_begin = (pump->backlog_begin + 1) % PENDING_MAX;
    }
    return progress;
}

/* All requests have left. */
static void note_sent(struct destination *pump) {
    uint64_t now = 0;
    for (uint32_t i = 0; i < pump->pending_count; i++) {
        struct fault *pending = &pump->pending[i];
        if (pending->sent_at || pending->found != FOUND_ABSENT)
            continue;
        now = now ? now : now_ns();
        pending->sent_at = now;
    }
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
    if (pump->requests_begin == pump->requests_end)
        note_sent(pump);
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
    else if (!pump->told || !backlog_room(pump))
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

int urgent_say(struct destination *pump) {
    if (pump->alone)
        return 0;
    if (pump->requests_begin == pump->requests_end)
        send_frame(pump, (struct frame){.magic = FRAME_MAGIC, .type = FRAME_BEAT});
    return send_requests(pump) < 0 ? -1 : 0;
}

static int beat(struct destination *pump) {
    bool due;
    uint64_t sent = atomic_load_explicit(&pump->counters.demand.bytes_sent, memory_order_relaxed);
    if (receiver_beat(pump, &pump->urgent, sent, &due))
        return -1;
    return due ? urgent_say(pump) : 0;
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
    pump->urgent.changing_since = 0;
    atomic_store(&pump->news, true); /* of what a thread before this one left unsettled */
    while (!half_stopping(&pump->half)) {
        int faults = take_faults(pump);
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
