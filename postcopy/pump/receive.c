/*
 * Bytes off a connection become pages: header, claim, content, placing. One thread for each connection runs this;
 * the claims in the page map are all that the two share.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>

#include "destination.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

static uint64_t buffered(const struct receiver *receiver) { return receiver->end - receiver->begin; }

static uint32_t placement(const struct destination *pump, const struct receiver *receiver) {
    const struct pump_region *region = &pump->memory[receiver->frame.region].region;
    return receiver->role == ROLE_PUSH ? region->push : region->demand;
}

/*
 * Bring what is buffered to where it belongs: see STAGING_PAYLOAD. Done before more is read, which is in time for every
 * payload: one that came behind other frames with a single read is not whole.
 */
_Static_assert(READ_AHEAD <= 4096, "behind another frame's header no whole page fits into one read");
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
    if (watched && receiver == &pump->urgent) {
        pump->landed = (struct landed){.region = receiver->frame.region, .page = page, .count = count};
        faults_settle(pump);
        pump->landed.count = 0;
    } else if (watched) {
        atomic_store(&pump->news, true);
        signal_fd(pump->news_fd);
    }
    resident_add(pump, count);
}

int await_change(struct destination *pump, struct receiver *receiver, uint32_t region, uint64_t page) {
    bool urgent = receiver == &pump->urgent;
    uint64_t now = now_ns();
    receiver->changing_since = receiver->changing_since ? receiver->changing_since : now;
    if (half_stopping(&pump->half))
        return -1;
    if (now - receiver->changing_since > CHANGES_NS_MAX) {
        receiver->placer.operation = UFFD_EVENT_REMOVE;
        receiver->placer.number = EAGAIN;
        return fail_placing(pump, receiver, region, page);
    }
    int read = urgent ? read_ahead(pump) : 0;
    if (read < 0)
        return -1;
    receiver->changed_at = read ? now : receiver->changed_at;
    if (beat_ends(&receiver->beat)) {
        beat_pass(&receiver->beat);
        (void)(urgent ? urgent_say(pump) : push_say(pump)); /* a break is seen by whoever talks next */
    }
    /* Who was waiting for that may well begin anew soon: what there is between the two must not be slept away. */
    if (now - receiver->changed_at < CHANGES_SPIN_NS)
        sched_yield();
    else
        nanosleep(&(struct timespec){.tv_nsec = CHANGES_SLEEP_NS}, NULL);
    return 0;
}

static int place_zeros(struct destination *pump, struct receiver *receiver, struct memory *memory, uint64_t offset) {
    uint64_t size = memory->region.page_size, address = memory->region.guest + offset;
    if (memory->region.zeropage)
        return place_zero(&receiver->placer, address, size, size);
    if (!memory->region.alias)
        return place_copy(&receiver->placer, address, pump->zeros, size, size);
    /* The kernel gives the file a page of zeros; then it is a minor fault's page. To touch it through the alias would
     * do the same, but for a file that can have no more pages, where it would end this process. */
    if (fallocate(memory->region.fd, 0, (off_t)(memory->region.fd_offset + offset), (off_t)size)) {
        if (errno == EINTR)
            return PLACE_CHANGING;
        receiver->placer.operation = FILE_ALLOCATE;
        receiver->placer.number = errno;
        return -1;
    }
    return place_continue(&receiver->placer, address, size, size);
}

int zero_claimed(struct destination *pump, struct receiver *receiver, uint32_t region, uint64_t page) {
    struct memory *memory = &pump->memory[region];
    int result;
    /* A page that the guest gives back between the look and the CONTINUE leaves a hole: look again. */
    while ((result = place_zeros(pump, receiver, memory, page * memory->region.page_size)) > 0)
        if (await_change(pump, receiver, region, page))
            return -1;
    receiver->changing_since = 0;
    return result ? fail_placing(pump, receiver, region, page) : 0;
}

/* The first `count` claimed pages are there. */
static void settle_claimed(struct destination *pump, struct receiver *receiver, uint64_t count) {
    account(pump, receiver, &pump->memory[receiver->frame.region], receiver->claimed, count);
    receiver->claimed += count;
    receiver->changing_since = 0;
}

/* An answer is whole. */
static void note_arrival(struct receiver *receiver) {
    if (receiver->role == ROLE_URGENT)
        receiver->arrived_at = now_ns();
}

static int take_zero(struct destination *pump, struct receiver *receiver) {
    const struct frame *frame = &receiver->frame;
    struct memory *memory = &pump->memory[frame->region];
    uint64_t page = frame->offset / memory->region.page_size;
    uint64_t stop = page + frame->length / memory->region.page_size;
    note_arrival(receiver);
    while (page < stop) {
        /* An absent page only becomes known: it is placed when it is touched, so a hole costs nothing. */
        uint64_t known = pages_zero(memory->map, page, stop) - page;
        if (known) {
            hist_add(&receiver->placer.counters->zero, known);
            resident_add(pump, known);
            page += known;
        } else if (page_claim(&memory->map[page])) {
            receiver->claimed = page++;
            receiver->claimed_stop = page;
            if (zero_claimed(pump, receiver, frame->region, receiver->claimed))
                return STEP_FAILED;
            hist_add(&receiver->placer.counters->zero, 1);
            settle_claimed(pump, receiver, 1);
        } else {
            hist_add(&receiver->placer.counters->duplicate, 1);
            page++;
        }
    }
    return STEP_PROGRESS;
}

/*
 * A page that only its claimant may fill was there already: whose bytes these are nobody knows. Another process may well
 * have filled some of its pages before it handed them over; these stay as they are.
 */
static int fail_found(struct destination *pump, struct receiver *receiver, uint32_t region, uint64_t page) {
    receiver->placer.operation = UFFD_IOC_COPY;
    receiver->placer.number = EEXIST;
    return fail_placing(pump, receiver, region, page);
}

/* Place up to `count` pages; how many are present then stands in placer->done, in bytes. As place.h says. */
static int place_some(struct destination *pump, struct receiver *receiver, uint64_t page, uint64_t count,
                      uint8_t *content) {
    const struct pump_region *region = &pump->memory[receiver->frame.region].region;
    uint64_t size = region->page_size, address = region->guest + page * size;
    /* With events the reader of the next one waits meanwhile. */
    if (pump->told && count * size > GATE_BYTES_MAX)
        count = size < GATE_BYTES_MAX ? GATE_BYTES_MAX / size : 1;
    uint64_t length = count * size;
    receiver->placer.found = false;
    int result = placement(pump, receiver) == PLACE_CONTINUE
                     ? place_continue(&receiver->placer, address, length, size)
                     : placement(pump, receiver) == PLACE_MOVE
                           ? place_move(&receiver->placer, address, content, length, size)
                           : place_copy(&receiver->placer, address, content, length, size);
    if (!result)
        receiver->placer.done = length; /* also where the address space is ending */
    return result;
}

/* Place the claimed pages, `content` being theirs, but those that the guest gave back meanwhile. */
static int place_claimed(struct destination *pump, struct receiver *receiver, uint8_t *content) {
    uint32_t region = receiver->frame.region;
    struct memory *memory = &pump->memory[region];
    bool staged = placement(pump, receiver) != PLACE_CONTINUE, gated = receiver == &pump->push;
    while (owns_pages(receiver)) {
        uint64_t page = receiver->claimed, done = 0;
        if (gated)
            gate_enter(pump);
        uint64_t kept = pages_kept(&memory->map[page], receiver->claimed_stop - page);
        int result = kept ? place_some(pump, receiver, page, kept, content) : 0;
        if (gated)
            gate_leave(pump);
        if (kept)
            done = receiver->placer.done / memory->region.page_size;
        if (result < 0)
            return fail_placing(pump, receiver, region, page + done);
        if (kept && staged && receiver->placer.found && !pump->foreign)
            return fail_found(pump, receiver, region, page);
        hist_add(&receiver->placer.counters->pages, done);
        if (done)
            settle_claimed(pump, receiver, done);
        if (result == PLACE_CHANGING && await_change(pump, receiver, region, page + done))
            return -1;
        if (result == PLACE_HOLE) {
            if (zero_claimed(pump, receiver, region, page + done++))
                return -1;
            hist_add(&receiver->placer.counters->pages, 1);
            settle_claimed(pump, receiver, 1);
        } else if (!kept) {
            if (finish_dropped(pump, receiver, region, page))
                return -1;
            receiver->claimed += done = 1;
        }
        content += done * memory->region.page_size;
    }
    return 0;
}

/* Place a whole payload out of the staging buffer, by COPY or MOVE, run by run of pages that could be claimed. */
static int take_staged(struct destination *pump, struct receiver *receiver) {
    const struct frame *frame = &receiver->frame;
    struct memory *memory = &pump->memory[frame->region];
    uint64_t size = memory->region.page_size, page = frame->offset / size;
    uint8_t *content = receiver->staging + receiver->begin;
    uint64_t count = frame->length / size;
    bool move = placement(pump, receiver) == PLACE_MOVE;
    note_arrival(receiver);
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
        receiver->claimed = page + i;
        receiver->claimed_stop = page + i + run;
        if (place_claimed(pump, receiver, content + i * size))
            return STEP_FAILED;
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
    uint64_t limit = buffered(receiver) + channel_arrived(half_channel(&pump->half, receiver->role)), bytes = 0;
    limit = limit < RUN_BYTES_MAX ? limit : RUN_BYTES_MAX;
    while (receiver->taken + bytes < frame->length && (!bytes || bytes + size <= limit) &&
           page_claim(&memory->map[page])) {
        bytes += size;
        page++;
    }
    receiver->claimed = page - bytes / size;
    receiver->claimed_stop = page;
    receiver->run_begin = receiver->taken;
    receiver->run_end = receiver->taken + (bytes ? bytes : size);
}

static int end_run(struct destination *pump, struct receiver *receiver) {
    const struct frame *frame = &receiver->frame;
    struct memory *memory = &pump->memory[frame->region];
    note_arrival(receiver);
    if (!owns_pages(receiver))
        hist_add(&receiver->placer.counters->duplicate, 1);
    else if (place_claimed(pump, receiver, alias_of(memory, frame->offset + receiver->run_begin)))
        return STEP_FAILED;
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
    if (bytes && owns_pages(receiver))
        memcpy(alias_of(memory, receiver->frame.offset + receiver->taken), receiver->staging + receiver->begin, bytes);
    receiver->begin += bytes;
    receiver->taken += bytes;
    return receiver->taken == receiver->run_end;
}

/* Take one step with the bytes at hand. IDLE: more are needed. */
static int use(struct destination *pump, struct receiver *receiver) {
    struct frame *frame = &receiver->frame;
    if (!receiver->in_payload) {
        if (buffered(receiver) < sizeof *frame)
            return STEP_IDLE;
        memcpy(frame, receiver->staging + receiver->begin, sizeof *frame);
        receiver->begin += sizeof *frame;
        if (half_check_frame(&pump->half, frame, receiver->role, receiver->allowed))
            return STEP_FAILED;
        hist_add(&receiver->placer.counters->frames, 1);
        if (frame->type == FRAME_BEAT) {
            hist_add(&receiver->placer.counters->beats, 1);
            return STEP_PROGRESS;
        }
        if (frame->type == FRAME_END) {
            atomic_store(&receiver->placer.counters->ended, 1);
            receiver->allowed = 1u << FRAME_BEAT;
            return STEP_ENDED;
        }
        if (frame->type == FRAME_ZERO)
            return take_zero(pump, receiver);
        receiver->in_payload = true;
        receiver->taken = 0;
        if (placement(pump, receiver) == PLACE_CONTINUE)
            begin_run(pump, receiver);
        else
            receiver->run_end = 0;
    }
    if (!receiver->run_end)
        return buffered(receiver) < frame->length ? STEP_IDLE : take_staged(pump, receiver);
    return drain_staging(pump, receiver) ? end_run(pump, receiver) : STEP_IDLE;
}

uint64_t receiver_wanted(const struct receiver *receiver) {
    if (!receiver->in_payload)
        return sizeof(struct frame) - buffered(receiver);
    return receiver->run_end ? receiver->run_end - receiver->taken : receiver->frame.length - buffered(receiver);
}

/* Read towards what is being waited for. Bytes for the alias go there directly, dropped ones into the staging. */
static ssize_t read_some(struct destination *pump, struct receiver *receiver) {
    const struct channel *channel = half_channel(&pump->half, receiver->role);
    arrange(receiver);
    uint8_t *free_space = receiver->staging + receiver->end;
    uint64_t free_bytes = receiver->capacity - receiver->end;
    bool to_alias = receiver->in_payload && receiver->run_end && owns_pages(receiver);
    if (to_alias) {
        /* The staging buffer is empty here; behind the last run the next header is welcome too. */
        uint64_t rest = receiver->run_end - receiver->taken;
        struct memory *memory = &pump->memory[receiver->frame.region];
        struct iovec parts[2] = {
            {.iov_base = alias_of(memory, receiver->frame.offset + receiver->taken), .iov_len = rest},
            {.iov_base = free_space, .iov_len = sizeof(struct frame)},
        };
        ssize_t got = channel_receive(channel, parts, receiver->run_end == receiver->frame.length ? 2 : 1);
        if (got > 0) {
            uint64_t direct = (uint64_t)got < rest ? (uint64_t)got : rest;
            receiver->taken += direct;
            receiver->end += (uint64_t)got - direct;
        }
        return got;
    }
    uint64_t wanted = (receiver->in_payload ? receiver_wanted(receiver) : READ_AHEAD) + sizeof(struct frame);
    struct iovec room = {.iov_base = free_space, .iov_len = wanted < free_bytes ? wanted : free_bytes};
    ssize_t got = channel_receive(channel, &room, 1);
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
    return half_fail(&pump->half, &failure);
}
