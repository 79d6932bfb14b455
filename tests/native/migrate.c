/*
 * A whole migration in one process without Python, for the sanitizers: both pumps over TCP, vCPU threads that fault
 * while the push runs, duplicates sent on purpose, every byte checked.
 *
 * usage: migrate copy|continue|move|remove|view|cut-copy|cut-continue PAGES STEPS [tls]
 *
 * `remove` is copy with a balloon: a thread gives pages back, again and again, that the guest leaves blank.
 * `view` is continue with a backend: a thread reads a second mapping, which has a userfaultfd of its own.
 * `cut-…` cuts both connections in the middle of it, twice, and goes on with new ones and a new source's pump.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest.h"
#include "pump.h"
#include "wait.h"

#define PAGE 4096ull
#define DEADLINE_NS 60000000000ull
#define VCPUS 3u

static void require(bool truth, const char *what) {
    if (truth)
        return;
    fprintf(stderr, "migrate: %s (%s)\n", what, strerror(errno));
    exit(1);
}

/* Without a file (-1) it is private anonymous memory. */
static void *map(int fd, uint64_t size) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
    require(memory != MAP_FAILED, "mmap");
    return memory;
}

static int memory_file(uint64_t size) {
    int fd = memfd_create("guest", MFD_CLOEXEC);
    require(fd >= 0 && ftruncate(fd, (off_t)size) == 0, "memfd");
    return fd;
}

static void connection(int ends[2]) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    require(listener >= 0 && !bind(listener, (struct sockaddr *)&address, length) && !listen(listener, 1) &&
                !getsockname(listener, (struct sockaddr *)&address, &length),
            "listen");
    ends[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    require(ends[0] >= 0 && !connect(ends[0], (struct sockaddr *)&address, length), "connect");
    ends[1] = accept(listener, NULL, NULL);
    require(ends[1] >= 0, "accept");
    close(listener);
}

static int userfaultfd_for(void *memory, uint64_t size, bool minor, bool balloons) {
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    require(device >= 0, "/dev/userfaultfd");
    int uffd = ioctl(device, 0xAA00, O_NONBLOCK | O_CLOEXEC);
    require(uffd >= 0, "USERFAULTFD_IOC_NEW");
    close(device);
    /* MISSING_SHMEM, THREAD_ID, MINOR_SHMEM, EVENT_REMOVE */
    uint64_t api[3] = {0xAA, 1u << 5 | 1u << 8 | 1u << 10 | (balloons ? 1u << 3 : 0), 0};
    require(!ioctl(uffd, 0xC018AA3F, api), "UFFDIO_API");
    uint64_t range[4] = {(uint64_t)(uintptr_t)memory, size, minor ? 5 : 1, 0};
    require(!ioctl(uffd, 0xC020AA00, range), "UFFDIO_REGISTER");
    return uffd;
}

static struct guest *guest_on(void *memory, int fd, uint64_t pages) {
    struct guest_setup setup = {.workload = 2, .vcpus = VCPUS, .seed = 7, .nonce = 11, .blank_pages = pages / 8,
                                .hole_pages = pages / 16, .stride = 1};
    struct guest_segment segment = {.address = memory, .pages = pages, .fd = fd};
    struct guest *guest;
    require(!(errno = guest_create(&setup, &segment, 1, NULL, &guest)), "guest_create");
    return guest;
}

static void run(struct guest *guest, uint64_t steps) {
    require(!(errno = guest_limit(guest, steps)), "guest_limit");
    require(!(errno = guest_start(guest)), "guest_start");
}

static void await(struct guest *guest) {
    require(!(errno = guest_wait(guest, now_ns() + DEADLINE_NS)), "guest_wait");
    require(!(errno = guest_stop(guest, now_ns() + DEADLINE_NS)), "guest_stop");
}

static void hand_over(struct guest *from, struct guest *to) {
    for (uint32_t vcpu = 0; vcpu < VCPUS; vcpu++) {
        uint64_t pass, position;
        require(!(errno = guest_read(from, vcpu, &pass, &position)), "guest_read");
        require(!(errno = guest_seek(to, vcpu, pass, position)), "guest_seek");
    }
}

static void check(struct guest *guest, uint64_t pages) {
    struct check *expected;
    struct check_result result;
    require(!(errno = guest_check(guest, &expected)), "guest_check");
    require(!(errno = check_range(expected, 0, pages, NULL, &result)), "check_range");
    check_destroy(expected);
    printf("%llu pages checked, %llu mismatched\n", (unsigned long long)result.pages_checked,
           (unsigned long long)result.pages_mismatched);
    require(result.pages_checked == pages && !result.pages_mismatched, "the memory is not what the guest wrote");
}

/* What goes on beside the guest: a balloon, or a backend with a mapping and a userfaultfd of its own. */
struct beside {
    uint8_t *memory; /* the backend's mapping */
    uint8_t *begin, *end;
    int uffd;
    _Atomic bool ends;
    pthread_t thread;
};

static void *give_back(void *argument) {
    struct beside *balloon = argument;
    for (uint8_t *page = balloon->begin; !atomic_load(&balloon->ends);) {
        require(!madvise(page, PAGE, MADV_REMOVE), "madvise");
        page = page + PAGE == balloon->end ? balloon->begin : page + PAGE;
    }
    return NULL;
}

/* All pages, from the last one on, as often as there is time. */
static void *look_on(void *argument) {
    struct beside *backend = argument;
    for (volatile uint8_t *page = backend->end; !atomic_load(&backend->ends);) {
        page = page == backend->begin ? backend->end - PAGE : page - PAGE;
        (void)*page;
    }
    return NULL;
}

static void beside_start(struct beside *beside, const char *way, struct destination *pump, void *to, int fd,
                         uint64_t pages) {
    uint64_t size = pages * PAGE;
    *beside = (struct beside){.begin = (uint8_t *)to + size - pages / 8 * PAGE, .end = (uint8_t *)to + size, .uffd = -1};
    if (!strcmp(way, "view")) {
        beside->memory = beside->begin = map(fd, size);
        beside->end = beside->begin + size;
        beside->uffd = userfaultfd_for(beside->memory, size, true, false);
        uint64_t base = (uint64_t)(uintptr_t)beside->memory;
        require(!destination_view(pump, beside->uffd, &base, 1), "destination_view");
        require(!pthread_create(&beside->thread, NULL, look_on, beside), "pthread_create");
    } else if (!strcmp(way, "remove")) {
        require(!pthread_create(&beside->thread, NULL, give_back, beside), "pthread_create");
    } else {
        atomic_store(&beside->ends, true);
    }
}

static void beside_stop(struct beside *beside) {
    if (!atomic_exchange(&beside->ends, true))
        require(!pthread_join(beside->thread, NULL), "pthread_join");
}

/* Both ends of a connection's TLS session, shaken hands with in turns. */
static void encrypt(const struct tls_library *library, const int ends[2], struct tls *sessions[2]) {
    static const uint8_t key[TLS_KEY_BYTES] = "a secret of 32 bytes, or nearly";
    for (int i = 0; i < 2; i++) {
        require(!fcntl(ends[i], F_SETFL, O_NONBLOCK), "O_NONBLOCK");
        sessions[i] = tls_create(library, ends[i], i ? TLS_LISTENS : TLS_DIALS, "name", key);
        require(sessions[i], "tls_create");
    }
    int steps[2] = {TLS_WANTS_READ, TLS_WANTS_READ};
    while (steps[0] || steps[1])
        for (int i = 0; i < 2; i++)
            if (steps[i]) {
                steps[i] = tls_handshake(sessions[i]);
                require(steps[i] != TLS_FAILED, tls_reason(sessions[i]));
            }
}

/* Connect the two, with TLS where its library is there. */
static void attach(struct source *source, struct destination *destination, const struct tls_library *library,
                   int near[2]) {
    for (uint32_t role = ROLE_URGENT; role <= ROLE_PUSH; role++) {
        int ends[2];
        struct tls *sessions[2] = {NULL, NULL};
        connection(ends);
        near[role - ROLE_URGENT] = ends[0];
        if (library)
            encrypt(library, ends, sessions);
        require(!half_attach(source_half(source), role, ends[0], sessions[0]), "source_attach");
        require(!half_attach(destination_half(destination), role, ends[1], sessions[1]), "destination_attach");
    }
}

static struct source *source_of(const struct pump_region *region) {
    struct source *source = source_create(region, 1, 50000, 64 * PAGE);
    require(source, "source_create");
    half_beat(source_half(source), 5000000);
    return source;
}

/* Cut both connections once so many pages are there, and go on with what the destination says that it has. */
static struct source *cut(struct source *source, struct destination *destination, const struct pump_region *region,
                          const struct tls_library *library, int near[2], uint64_t resident) {
    uint64_t pages = region->size / PAGE;
    while (destination_counters(destination)->resident < resident)
        sched_yield();
    require(!shutdown(near[0], SHUT_RDWR) && !shutdown(near[1], SHUT_RDWR), "shutdown");
    require(!destination_detach(destination), "destination_detach");
    uint64_t count;
    bool complete = half_status(destination_half(destination))->state == PUMP_COMPLETE;
    if (!complete) /* the break was told; the end will be */
        (void)!read(half_event_fd(destination_half(destination)), &count, sizeof count);
    source_destroy(source);
    uint8_t *bits = calloc(1, pages / 8);
    require(bits, "calloc");
    const uint8_t *map = destination_map(destination, 0);
    for (uint64_t page = 0; page < pages; page++) {
        uint8_t state = __atomic_load_n(&map[page], __ATOMIC_ACQUIRE);
        require(state != PAGE_PLACING && state != PAGE_WATCHED, "a page is claimed by nobody");
        bits[page / 8] |= (uint8_t)((state == PAGE_PLACED || state == PAGE_ZERO) << (page % 8));
    }
    source = source_of(region);
    require(!source_skip(source, 0, 0, pages, bits), "source_skip");
    free(bits);
    attach(source, destination, library, near);
    source_guest_stopped(source);
    require(!source_start(source) && !destination_resume(destination), "resume");
    return source;
}

static void push_everything(struct source *source, uint64_t size) {
    /* Backwards, so that the push meets the vCPUs, in extents of some pages each. */
    uint64_t piece = 37 * PAGE;
    for (uint64_t end = size; end;) {
        uint64_t offset = end > piece ? end - piece : 0;
        struct push_extent extent = {.offset = offset, .length = end - offset};
        int accepted = source_push(source, &extent, 1);
        require(accepted >= 0, "source_push");
        if (accepted)
            end = offset;
        else
            sched_yield();
    }
    source_push_end(source);
}

static void await_end(struct destination *destination) {
    struct pollfd event = {.fd = half_event_fd(destination_half(destination)), .events = POLLIN};
    require(poll(&event, 1, 60000) == 1, "no end of the migration");
    require(half_status(destination_half(destination))->state == PUMP_COMPLETE, "the migration failed");
}

static void sum_up(struct destination *destination, uint64_t pages) {
    const struct destination_counters *counters = destination_counters(destination);
    uint64_t placed = counters->urgent.pages + counters->push.pages + counters->urgent.zero + counters->push.zero +
                      counters->removed;
    printf("demand %llu, push %llu, duplicate %llu\n", (unsigned long long)counters->urgent.pages,
           (unsigned long long)counters->push.pages,
           (unsigned long long)(counters->urgent.duplicate + counters->push.duplicate));
    require(placed == pages && counters->resident == pages, "the pages do not add up");
}

int main(int argc, char **argv) {
    bool encrypts = argc == 5 && !strcmp(argv[4], "tls");
    require(argc == 4 || encrypts, "usage: migrate copy|continue|move|remove|view|cut-copy|cut-continue PAGES STEPS [tls]");
    char reason[256] = "";
    struct tls_library *library = encrypts ? tls_load(reason, sizeof reason) : NULL;
    require(!encrypts || library, reason);
    bool cuts = !strncmp(argv[1], "cut-", 4);
    bool viewed = !strcmp(argv[1], "view"), minor = viewed || !strcmp(argv[1] + (cuts ? 4 : 0), "continue");
    bool balloons = !strcmp(argv[1], "remove"), move = !strcmp(argv[1], "move");
    uint64_t pages = strtoull(argv[2], NULL, 10), steps = strtoull(argv[3], NULL, 10), size = pages * PAGE;
    int from_fd = memory_file(size), to_fd = move ? -1 : memory_file(size);
    void *from = map(from_fd, size), *to = map(to_fd, size), *alias = move ? NULL : map(to_fd, size);
    int uffd = userfaultfd_for(to, size, minor, balloons);

    struct guest *before = guest_on(from, from_fd, pages);
    require(!(errno = guest_fill(before)), "guest_fill");
    run(before, steps);
    await(before);

    uint32_t way = minor ? PLACE_CONTINUE : move ? PLACE_MOVE : PLACE_COPY;
    struct pump_region region = {.guest = (uint64_t)(uintptr_t)from, .size = size, .page_size = PAGE, .fd = from_fd};
    const struct pump_region sends = region;
    struct source *source = source_of(&sends);
    region = (struct pump_region){.guest = (uint64_t)(uintptr_t)to, .alias = (uint64_t)(uintptr_t)alias, .size = size,
                                  .page_size = PAGE, .demand = way, .push = way, .fd = viewed ? to_fd : -1, .zeropage = 1,
                                  .removal = balloons ? REMOVAL_DISCARDS : REMOVAL_UNTOLD};
    struct destination *destination = destination_create(uffd, &region, 1, 50000);
    require(destination, "destination_create");
    half_beat(destination_half(destination), 5000000);
    int near[2];
    attach(source, destination, library, near);
    struct guest *after = guest_on(to, -1, pages);
    hand_over(before, after);
    require(!source_start(source) && !destination_start(destination), "start");
    source_guest_stopped(source);
    run(after, 2 * steps);
    struct beside beside;
    beside_start(&beside, argv[1], destination, to, to_fd, pages);
    push_everything(source, size);
    for (uint64_t part = 1; cuts && part < 3; part++) {
        source = cut(source, destination, &sends, library, near, pages * part / 3);
        push_everything(source, size);
    }
    await_end(destination);
    await(after);
    beside_stop(&beside);
    sum_up(destination, pages);
    /* Read through the registered mapping: what is known to be zero is placed by the pump when it is touched. */
    check(after, pages);
    require(!viewed || !memcmp(beside.memory, to, size), "the backend sees something else");
    require(!guest_destroy(before, now_ns() + DEADLINE_NS) && !guest_destroy(after, now_ns() + DEADLINE_NS), "destroy");
    destination_destroy(destination);
    source_destroy(source);
    tls_unload(library);
    close(uffd);
    if (viewed)
        require(!close(beside.uffd) && !munmap(beside.memory, size), "close");
    munmap(from, size);
    munmap(to, size);
    close(from_fd);
    if (!move) {
        munmap(alias, size);
        close(to_fd);
    }
    return 0;
}
