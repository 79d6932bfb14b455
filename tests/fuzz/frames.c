/*
 * libFuzzer's target for what comes off a data connection: both pumps on real memory, the fuzzer at the other end.
 *
 * An input is a first byte (which half, which connection, how pages are placed, whether a thread of the guest waits for
 * a page) and a recipe for the bytes: recipe.h. What the pump shows is held against a model of the same bytes. A pump that
 * comes to no end within its deadline is a crash as well.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "pump.h"
#include "recipe.h"
#include "wait.h"

#define DEADLINE_NS 8000000000ull

struct memory {
    uint8_t *guest, *alias;
    int fd; /* -1: anonymous */
    uint64_t size;
};

static struct memory memories[REGIONS];
static int uffd = -1;

static void require(bool truth, const char *what) {
    if (truth)
        return;
    fprintf(stderr, "frames: %s (%s)\n", what, strerror(errno));
    abort();
}

static void *map(struct memory *memory) {
    int flags = memory->fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    void *mapped = mmap(NULL, memory->size, PROT_READ | PROT_WRITE, flags, memory->fd, 0);
    require(mapped != MAP_FAILED, "mmap");
    return mapped;
}

static void set_up(void) {
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    uffd = device >= 0 ? ioctl(device, 0xAA00, O_NONBLOCK | O_CLOEXEC)
                       : (int)syscall(SYS_userfaultfd, O_NONBLOCK | O_CLOEXEC);
    require(uffd >= 0, "userfaultfd");
    uint64_t api[3] = {0xAA, 1u << 5 | 1u << 8 | 1u << 10, 0}; /* MISSING_SHMEM, THREAD_ID, MINOR_SHMEM */
    require(!ioctl(uffd, 0xC018AA3F, api), "UFFDIO_API");
    for (uint32_t i = 0; i < REGIONS; i++) {
        struct memory *memory = &memories[i];
        memory->size = pages[i] * page_sizes[i];
        memory->fd = i == 1 ? -1 : memfd_create("fuzz", MFD_CLOEXEC);
        require(i == 1 || (memory->fd >= 0 && !ftruncate(memory->fd, (off_t)memory->size)), "memfd");
        memory->guest = map(memory);
        memory->alias = memory->fd < 0 ? NULL : map(memory);
        uint64_t range[4] = {(uint64_t)(uintptr_t)memory->guest, memory->size, i == 1 ? 1 : 5, 0};
        require(!ioctl(uffd, 0xC020AA00, range), "UFFDIO_REGISTER");
    }
}

static void clear(void) {
    for (uint32_t i = 0; i < REGIONS; i++) {
        struct memory *memory = &memories[i];
        if (memory->fd >= 0)
            require(!fallocate(memory->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)memory->size), "clear");
        require(!madvise(memory->guest, memory->size, MADV_DONTNEED), "MADV_DONTNEED");
    }
}

/* --- sending, and waiting for the end ------------------------------------------------------------------------------- */

static bool failed(const struct pump_status *status) { return atomic_load(&status->state) == PUMP_FAILED; }

/* What came back: requests of a destination, answers of a source. */
static uint8_t answers[STREAM_MAX];
static uint64_t answered;

/* Read what has come back. A source that finds its answers unread reads no more requests. */
static bool collect(int socket) {
    ssize_t more = recv(socket, answers + answered, sizeof answers - answered, MSG_DONTWAIT);
    answered += more > 0 ? (uint64_t)more : 0;
    return more > 0;
}

static void send_stream(int socket, const struct pump_status *status) {
    uint64_t done = 0, deadline = now_ns() + DEADLINE_NS;
    answered = 0;
    for (uint32_t next = 0; done < stream.length && !failed(status);) {
        while (next < stream.pauses_used && stream.pauses[next] <= done)
            next++;
        uint64_t stop = next < stream.pauses_used ? stream.pauses[next] : stream.length;
        ssize_t sent = send(socket, stream.bytes + done, stop - done, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent > 0) {
            done += (uint64_t)sent;
            if (done == stop)
                sched_yield();
        } else {
            require(now_ns() < deadline, "the pump reads no more and says nothing");
            collect(socket);
            poll(&(struct pollfd){.fd = socket, .events = POLLOUT}, 1, 1);
        }
    }
}

/* A thread of the guest that waits for one page; what it sees must be what the model says. */
struct touch {
    pthread_t thread;
    const volatile uint8_t *byte;
    _Atomic bool over;
    uint8_t seen;
};

static void *touch_run(void *argument) {
    struct touch *touch = argument;
    touch->seen = *touch->byte;
    atomic_store(&touch->over, true);
    return NULL;
}

/* Without a pump the page would never come. */
static void release(struct touch *touch, uint64_t address) {
    uint64_t range[4] = {address, 4096, 0, 0};
    while (!atomic_load(&touch->over)) {
        /* ZEROPAGE; CONTINUE where bytes have come into the alias; WAKE. */
        if (ioctl(uffd, 0xC020AA04, range) && ioctl(uffd, 0xC020AA07, range))
            ioctl(uffd, 0x8010AA02, range);
        sched_yield();
    }
    pthread_join(touch->thread, NULL);
}

/* Once every page is here the pump needs nothing more from the source, and does not mind what it sends. */
static bool whole(const struct model *model) {
    for (uint32_t i = 0; i < REGIONS; i++)
        for (uint64_t page = 0; page < pages[i]; page++)
            if (model->wanted[i][page] == WANT_ABSENT)
                return false;
    return true;
}

static void check_pages(struct destination *pump, const struct model *model) {
    for (uint32_t i = 0; i < REGIONS; i++)
        for (uint64_t page = 0; page < pages[i]; page++) {
            uint8_t state = destination_map(pump, i)[page];
            enum wanted wanted = model->wanted[i][page];
            bool settled = state == PAGE_PLACED || state == PAGE_ZERO;
            require(settled || wanted == WANT_ABSENT || model->maybe[i][page] || model->refusal, "a page that came is not there");
            require(!settled || wanted != WANT_ABSENT, "a page is there that never came");
            if (state != PAGE_PLACED)
                continue;
            const uint8_t *content = memories[i].guest + page * page_sizes[i];
            bool zero = !content[0] && !memcmp(content, content + 1, page_sizes[i] - 1);
            require(wanted == WANT_CONTENT ? !memcmp(content, model->content[i][page], page_sizes[i]) : zero,
                    "a page holds other bytes than came");
        }
}

static bool settled(struct destination *pump, const struct model *model, bool push) {
    const struct destination_counters *counters = destination_counters(pump);
    const struct destination_channel *channel = push ? &counters->push : &counters->urgent;
    if (model->refusal)
        return failed(half_broken(destination_half(pump))) || whole(model);
    if (model->ended && push)
        return atomic_load(&channel->ended);
    return channel->frames == model->frames && channel->bytes_received == stream.length &&
           channel->pages + channel->zero + channel->duplicate >= model->settled;
}

static void fuzz_destination(uint8_t choice) {
    bool push = choice & 1, in_place = choice & 2, touches = choice & 4;
    struct pump_region regions[REGIONS];
    struct frame_bounds bounds[REGIONS];
    static struct model model;
    for (uint32_t i = 0; i < REGIONS; i++) {
        uint32_t way = !in_place ? PLACE_COPY : i == 1 ? PLACE_MOVE : PLACE_CONTINUE;
        bounds[i] = (struct frame_bounds){.size = memories[i].size, .page_size = page_sizes[i]};
        regions[i] = (struct pump_region){.guest = (uint64_t)(uintptr_t)memories[i].guest, .size = memories[i].size,
                                          .alias = (uint64_t)(uintptr_t)memories[i].alias, .page_size = page_sizes[i],
                                          .demand = way, .push = way, .fd = memories[i].fd, .zeropage = 1};
    }
    read_model(&model, push ? FRAMES_PUSH : FRAMES_URGENT, bounds);
    struct destination *pump = destination_create(uffd, regions, REGIONS, 0);
    require(pump, "destination_create");
    int urgent[2], pushed[2];
    require(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, urgent) &&
                !socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pushed), "socketpair");
    require(!half_attach(destination_half(pump), ROLE_URGENT, urgent[1], NULL) && !half_attach(destination_half(pump), ROLE_PUSH, pushed[1], NULL), "attach");
    require(!destination_start(pump), "start");
    /* Page 3 of region 0, or of region 1; with the guest's thread there the page is asked for before anything comes. */
    uint32_t touched = choice >> 3 & 1;
    struct touch touch = {.byte = memories[touched].guest + 3 * 4096};
    if (touches) {
        require(!pthread_create(&touch.thread, NULL, touch_run, &touch), "pthread_create");
        while (!atomic_load(&destination_counters(pump)->demand.requests))
            sched_yield();
    }
    int sending = push ? pushed[0] : urgent[0];
    send_stream(sending, half_broken(destination_half(pump)));
    uint64_t deadline = now_ns() + DEADLINE_NS;
    while (!settled(pump, &model, push)) {
        require(now_ns() < deadline, "the pump comes to no end");
        collect(urgent[0]);
        sched_yield();
    }
    bool came = touches && model.wanted[touched][3] != WANT_ABSENT && !model.maybe[touched][3];
    while (came && !atomic_load(&touch.over)) {
        require(now_ns() < deadline, "the page came, and nobody woke the thread that waits for it");
        sched_yield();
    }
    if (came) {
        uint8_t wanted = model.wanted[touched][3] == WANT_ZERO ? 0 : model.content[touched][3][0];
        require(touch.seen == wanted, "the guest's thread saw another byte");
    }
    uint32_t state = atomic_load(&half_broken(destination_half(pump))->state), failure = half_broken(destination_half(pump))->failure;
    require(!model.refusal || whole(&model) || (state == PUMP_FAILED && failure == FAILURE_FRAME),
            "a frame that is refused breaks the connection");
    destination_stop(pump);
    check_pages(pump, &model);
    if (touches)
        release(&touch, (uint64_t)(uintptr_t)touch.byte);
    destination_destroy(pump);
    close(urgent[0]);
    close(pushed[0]);
    clear();
}

/* --- the source's side: requests ------------------------------------------------------------------------------------ */

static void fuzz_source(void) {
    struct pump_region regions[REGIONS];
    struct frame_bounds bounds[REGIONS];
    struct memory plain[REGIONS];
    static struct model model;
    for (uint32_t i = 0; i < REGIONS; i++) {
        plain[i] = (struct memory){.fd = -1, .size = memories[i].size};
        plain[i].guest = map(&plain[i]);
        for (uint64_t page = 0; page < pages[i]; page += 2)
            memset(plain[i].guest + page * page_sizes[i], (int)(1 + page), page_sizes[i]);
        bounds[i] = (struct frame_bounds){.size = plain[i].size, .page_size = page_sizes[i]};
        regions[i] = (struct pump_region){.guest = (uint64_t)(uintptr_t)plain[i].guest, .size = plain[i].size,
                                          .page_size = page_sizes[i], .fd = -1};
    }
    read_model(&model, FRAMES_TO_SOURCE, bounds);
    struct source *pump = source_create(regions, REGIONS, 0, 65536);
    int urgent[2], pushed[2];
    require(pump && !socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, urgent) &&
                !socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pushed), "source");
    require(!half_attach(source_half(pump), ROLE_URGENT, urgent[1], NULL) && !half_attach(source_half(pump), ROLE_PUSH, pushed[1], NULL), "attach");
    source_guest_stopped(pump);
    require(!source_start(pump), "start");
    send_stream(urgent[0], half_broken(source_half(pump)));
    const struct source_channel *counters = &source_counters(pump)->urgent;
    uint64_t deadline = now_ns() + DEADLINE_NS;
    for (bool whole = false; !whole;) {
        whole = model.refusal ? failed(half_broken(source_half(pump))) : counters->requests == model.frames;
        bool more = collect(urgent[0]);
        uint64_t done = counters->pages + counters->zero + counters->ignored;
        whole = whole && !more && (model.refusal || (answered == counters->bytes_sent && done == counters->requests));
        require(now_ns() < deadline, "the source comes to no end");
        sched_yield();
    }
    source_stop(pump);
    /* Every answer is to a request, once, with the page's bytes. */
    bool seen[REGIONS][8] = {0};
    for (uint64_t at = 0; at + sizeof(struct frame) <= answered;) {
        struct frame frame;
        memcpy(&frame, answers + at, sizeof frame);
        at += sizeof frame;
        require(!frame_check(&frame, FRAMES_URGENT, bounds, REGIONS), "an answer that no destination would take");
        if (frame.type != FRAME_PAGES && frame.type != FRAME_ZERO)
            continue; /* it says nothing of a page */
        uint64_t page = frame.offset / page_sizes[frame.region];
        require(frame.length == page_sizes[frame.region] && !seen[frame.region][page], "an answer for each page once");
        require(model.wanted[frame.region][page] != WANT_ABSENT, "an answer that was not asked for");
        seen[frame.region][page] = true;
        require(page % 2 == (frame.type == FRAME_ZERO), "zeros where there is content, or the other way round");
        if (frame.type == FRAME_PAGES) {
            uint64_t there = answered - at < frame.length ? answered - at : frame.length;
            require(!memcmp(answers + at, plain[frame.region].guest + frame.offset, there), "other bytes than the page's");
            at += frame.length;
        }
    }
    source_destroy(pump);
    close(urgent[0]);
    close(pushed[0]);
    for (uint32_t i = 0; i < REGIONS; i++)
        munmap(plain[i].guest, plain[i].size);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!size)
        return 0;
    if (uffd < 0)
        set_up();
    expand(data + 1, size - 1);
    if (data[0] & 16)
        fuzz_source();
    else
        fuzz_destination(data[0]);
    return 0;
}
