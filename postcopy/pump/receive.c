/*
 * Bytes off a connection become pages: header, claim, content, placing. One thread for each connection runs this;
 * the claims in the page map are all that the two share.
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "destination.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

/* A claimed run is placed once it is this long, so that a page early in a frame does not wait for the whole of it. */
#define RUN_BYTES_MAX (256u << 10)

static uint64_t buffered(const struct receiver *receiver) { return receiver->end - receiver->begin; }

static uint32_t placement(const struct destination *pump, const struct receiver *receiver) {
    const struct pump_region *region = &pump->memory[receiver->frame.region].region;
    return receiver->role == ROLE_PUSH ? region->push : region->demand;
}

/* Bring what is buffered to where it belongs: see STAGING_PAYLOAD. */
static void arrange(struct receiver *receiver) {
    uint64_t home = STAGING_PAYLOAD - (receiver->in_payload ? 0 : sizeof(struct frame));
    if (receiver->begin == home)
        return;
    memmove(receiver->staging + home, receiver->staging + receiver->begin, buffered(receiver));
    receiver->end = home + buffered(receiver);
    receiver->begin = home;
}

/* The owner of claimed pages has placed them: account, and tell the demand thread if a fault waits for the news. */
static void account(struct destination *pump, struct receiver *receiver, struct memory *memory, uint64_t page,
                    uint64_t count) {
    bool watched = pages_placed(&memory->map[page], count);
    if (watched && receiver == &pump->push) {
        atomic_store(&pump->news, true);
        signal_fd(pump->news_fd);
    }
    resident_add(pump, count);
}

int zero_claimed(struct destination *pump, struct receiver *receiver, uint32_t region, uint64_t page) {
    struct memory *memory = &pump->memory[region];
    uint64_t size = memory->region.page_size, offset = page * size, address = memory->region.guest + offset;
    int result;
    if (memory->region.zeropage) {
        result = place_zero(&receiver->placer, address, size, size);
    } else if (memory->region.alias) {
        /* A first look at the alias makes the kernel allocate the page, zeroed; then it is a minor fault's page. */
        (void)*(volatile uint8_t *)alias_of(memory, offset);
        result = place_continue(&receiver->placer, address, size, size);
    } else {
        result = place_copy(&receiver->placer, address, pump->zeros, size, size);
    }
    return result ? fail_placing(pump, receiver, region, page) : 0;
}

static int take_zero(struct destination *pump, struct receiver *receiver) {
    const struct frame *frame = &receiver->frame;
    struct memory *memory = &pump->memory[frame->region];
    uint64_t page = frame->offset / memory->region.page_size;
    uint64_t stop = page + frame->length / memory->region.page_size;
    while (page < stop) {
        /* An absent page only becomes known: it is placed when it is touched, so a hole costs nothing. */
        uint64_t known = pages_zero(memory->map, page, stop) - page;
        if (known) {
            hist_add(&receiver->placer.counters->zero, known);
            resident_add(pump, known);
            page += known;
        } else if (page_claim(&memory->map[page])) {
            if (zero_claimed(pump, receiver, frame->region, page))
                return STEP_FAILED;
            hist_add(&receiver->placer.counters->zero, 1);
            account(pump, receiver, memory, page++, 1);
        } else {
            hist_add(&receiver->placer.counters->duplicate, 1);
            page++;
        }
    }
    return STEP_PROGRESS;
}

/* A page that only its claimant may fill was there already: whose bytes these are nobody knows. */
static int fail_found(struct destination *pump, struct receiver *receiver, uint32_t region, uint64_t page) {
    receiver->placer.operation = UFFD_IOC_COPY;
    receiver->placer.number = EEXIST;
    return fail_placing(pump, receiver, region, page);
}

/* Place a whole payload out of the staging buffer, by COPY or MOVE, run by run of pages that could be claimed. */
static int take_staged(struct destination *pump, struct receiver *receiver) {
    const struct frame *frame = &receiver->frame;
    struct memory *memory = &pump->memory[frame->region];
    uint64_t size = memory->region.page_size, page = frame->offset / size;
    uint8_t *content = receiver->staging + receiver->begin;
    uint64_t count = frame->length / size;
    bool move = placement(pump, receiver) == PLACE_MOVE;
    for (uint64_t i = 0; i < count;) {
        uint64_t run = 0;
        while (i + run < count && (run + 1) * size <= RUN_BYTES_MAX && page_claim(&memory->map[page + i + run]))
            run++;
        if (!run && size > RUN_BYTES_MAX && page_claim(&memory->map[page + i]))
            run = 1;
        if (!run) {
            hist_add(&receiver->placer.counters->duplicate, 1);
            i++;
            continue;
        }
        uint64_t address = memory->region.guest + (page + i) * size;
        receiver->placer.found = false;
        if (move ? place_move(&receiver->placer, address, content + i * size, run * size, size)
                 : place_copy(&receiver->placer, address, content + i * size, run * size, size))
            return fail_placing(pump, receiver, frame->region, page + i);
        if (receiver->placer.found)
            return fail_found(pump, receiver, frame->region, page + i);
        hist_add(&receiver->placer.counters->pages, run);
        account(pump, receiver, memory, page + i, run);
        i += run;
    }
    /* What was given away comes back as one, not page by page in the next recv. A kernel that cannot is no matter. */
    if (move)
        madvise(content, frame->length, MADV_POPULATE_WRITE);
    receiver->begin += frame->length;
    receiver->in_payload = false;
    return STEP_PROGRESS;
}

/* Decide what the bytes from `taken` on are for: a run of claimed pages, or one page that is to be dropped. */
static void begin_run(struct destination *pump, struct receiver *receiver) {
    const struct frame *frame = &receiver->frame;
    struct memory *memory = &pump->memory[frame->region];
    uint64_t size = memory->region.page_size, page = (frame->offset + receiver->taken) / size;
    /*
     * A claimed page cannot be asked for by a fault any more, so only as many are claimed as have arrived, and the one
     * that comes next. Where the socket does not tell, that one alone.
     */
    int arrived = 0;
    (void)!ioctl(receiver->socket, FIONREAD, &arrived);
    uint64_t limit = buffered(receiver) + (uint64_t)arrived, bytes = 0;
    limit = limit < RUN_BYTES_MAX ? limit : RUN_BYTES_MAX;
    while (receiver->taken + bytes < frame->length && (!bytes || bytes + size <= limit) &&
           page_claim(&memory->map[page])) {
        bytes += size;
        page++;
    }
    receiver->run_claimed = bytes != 0;
    receiver->run_begin = receiver->taken;
    receiver->run_end = receiver->taken + (bytes ? bytes : size);
}

static int end_run(struct destination *pump, struct receiver *receiver) {
    const struct frame *frame = &receiver->frame;
    struct memory *memory = &pump->memory[frame->region];
    uint64_t size = memory->region.page_size, bytes = receiver->run_end - receiver->run_begin;
    uint64_t offset = frame->offset + receiver->run_begin;
    if (!receiver->run_claimed) {
        hist_add(&receiver->placer.counters->duplicate, 1);
    } else {
        if (place_continue(&receiver->placer, memory->region.guest + offset, bytes, size))
            return fail_placing(pump, receiver, frame->region, offset / size);
        hist_add(&receiver->placer.counters->pages, bytes / size);
        account(pump, receiver, memory, offset / size, bytes / size);
    }
    if (receiver->taken == frame->length)
        receiver->in_payload = false;
    else
        begin_run(pump, receiver);
    return STEP_PROGRESS;
}

/* Use what the staging buffer holds of a payload that belongs into the alias; true if a run is complete. */
static bool drain_staging(struct destination *pump, struct receiver *receiver) {
    struct memory *memory = &pump->memory[receiver->frame.region];
    uint64_t bytes = receiver->run_end - receiver->taken;
    if (bytes > buffered(receiver))
        bytes = buffered(receiver);
    if (bytes && receiver->run_claimed)
        memcpy(alias_of(memory, receiver->frame.offset + receiver->taken), receiver->staging + receiver->begin, bytes);
    receiver->begin += bytes;
    receiver->taken += bytes;
    return receiver->taken == receiver->run_end;
}

static int refuse(struct destination *pump, const struct receiver *receiver, int refusal) {
    const struct frame *frame = &receiver->frame;
    struct pump_status failure = {.failure = FAILURE_FRAME, .role = receiver->role, .number = refusal,
                                  .region = frame->region, .offset = frame->offset, .length = frame->length};
    return fail(pump, &failure);
}

/* Take one step with the bytes at hand. IDLE: more are needed. */
static int use(struct destination *pump, struct receiver *receiver) {
    struct frame *frame = &receiver->frame;
    if (!receiver->in_payload) {
        if (buffered(receiver) < sizeof *frame)
            return STEP_IDLE;
        memcpy(frame, receiver->staging + receiver->begin, sizeof *frame);
        receiver->begin += sizeof *frame;
        int refusal = frame_check(frame, receiver->allowed, pump->bounds, pump->count);
        if (refusal)
            return refuse(pump, receiver, refusal);
        hist_add(&receiver->placer.counters->frames, 1);
        if (frame->type == FRAME_END) {
            atomic_store(&receiver->placer.counters->ended, 1);
            return STEP_ENDED;
        }
        if (frame->type == FRAME_ZERO)
            return take_zero(pump, receiver);
        receiver->in_payload = true;
        receiver->taken = 0;
        if (placement(pump, receiver) == PLACE_CONTINUE) {
            begin_run(pump, receiver);
        } else {
            receiver->run_end = 0;
            arrange(receiver);
        }
    }
    if (!receiver->run_end)
        return buffered(receiver) < frame->length ? STEP_IDLE : take_staged(pump, receiver);
    return drain_staging(pump, receiver) ? end_run(pump, receiver) : STEP_IDLE;
}

/* Read towards what is being waited for. Bytes for the alias go there directly, dropped ones into the staging. */
static ssize_t read_some(struct destination *pump, struct receiver *receiver) {
    arrange(receiver);
    uint8_t *free_space = receiver->staging + receiver->end;
    uint64_t free_bytes = receiver->capacity - receiver->end;
    bool to_alias = receiver->in_payload && receiver->run_end && receiver->run_claimed;
    if (to_alias) {
        /* The staging buffer is empty here; behind the last run the next header is welcome too. */
        uint64_t rest = receiver->run_end - receiver->taken;
        struct memory *memory = &pump->memory[receiver->frame.region];
        struct iovec parts[2] = {
            {.iov_base = alias_of(memory, receiver->frame.offset + receiver->taken), .iov_len = rest},
            {.iov_base = free_space, .iov_len = sizeof(struct frame)},
        };
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = receiver->run_end == receiver->frame.length ? 2 : 1};
        ssize_t got = recvmsg(receiver->socket, &message, MSG_DONTWAIT);
        if (got > 0) {
            uint64_t direct = (uint64_t)got < rest ? (uint64_t)got : rest;
            receiver->taken += direct;
            receiver->end += (uint64_t)got - direct;
        }
        return got;
    }
    uint64_t wanted = READ_AHEAD;
    if (receiver->in_payload)
        wanted = receiver->run_end ? receiver->run_end - receiver->taken : receiver->frame.length - buffered(receiver);
    wanted += sizeof(struct frame);
    ssize_t got = recv(receiver->socket, free_space, wanted < free_bytes ? wanted : free_bytes, MSG_DONTWAIT);
    if (got > 0)
        receiver->end += (uint64_t)got;
    return got;
}

int receiver_step(struct destination *pump, struct receiver *receiver) {
    int progress = STEP_IDLE, step;
    while ((step = use(pump, receiver)) == STEP_PROGRESS)
        progress = STEP_PROGRESS;
    if (step != STEP_IDLE)
        return step;
    ssize_t got = read_some(pump, receiver);
    if (got > 0) {
        hist_add(&receiver->placer.counters->bytes_received, (uint64_t)got);
        return STEP_PROGRESS;
    }
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return progress;
    struct pump_status failure = {.failure = got ? FAILURE_SOCKET : FAILURE_CLOSED, .role = receiver->role,
                                  .number = got ? errno : 0};
    return fail(pump, &failure);
}
