/* The floor's life: memory, connections, fork, go, the end of the clock, the check. See floor.h. */
#define _GNU_SOURCE
#include "floor.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "floor_inside.h"

#define LOOK_MS 20
#define CONNECT_MS 5000

int floor_fail(struct floor *floor, const char *what) {
    int number = errno;
    if (!atomic_exchange(&floor->shared->failed, true))
        snprintf(floor->shared->failure, sizeof floor->shared->failure, "%s: %s", what, strerror(number));
    sem_post(&floor->finished);
    return -1;
}

/* Go where this end lives: its network namespace and its CPUs; threads made later inherit both. */
static int settle(struct floor *floor, const char *netns, uint64_t cpus) {
    int descriptor = netns ? open(netns, O_RDONLY | O_CLOEXEC) : -1;
    if (netns && (descriptor < 0 || setns(descriptor, CLONE_NEWNET)))
        return floor_fail(floor, netns);
    if (netns)
        close(descriptor);
    cpu_set_t set;
    CPU_ZERO(&set);
    for (uint32_t cpu = 0; cpu < 64; cpu++)
        if (cpus >> cpu & 1)
            CPU_SET(cpu, &set);
    if (cpus && sched_setaffinity(0, sizeof set, &set))
        return floor_fail(floor, "sched_setaffinity");
    return 0;
}

static int tune(struct floor *floor, int socket, bool push) {
    const struct floor_setup *setup = &floor->setup;
    int one = 1, send_bytes = (int)setup->send_bytes, receive_bytes = (int)setup->receive_bytes;
    if (setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one))
        return floor_fail(floor, "TCP_NODELAY");
    if (push && send_bytes && setsockopt(socket, SOL_SOCKET, SO_SNDBUF, &send_bytes, sizeof send_bytes))
        return floor_fail(floor, "SO_SNDBUF");
    if (push && receive_bytes && setsockopt(socket, SOL_SOCKET, SO_RCVBUF, &receive_bytes, sizeof receive_bytes))
        return floor_fail(floor, "SO_RCVBUF");
    if (push && setup->pacing &&
        setsockopt(socket, SOL_SOCKET, SO_MAX_PACING_RATE, &setup->pacing, sizeof setup->pacing))
        return floor_fail(floor, "SO_MAX_PACING_RATE");
    return 0;
}

/* Returns a listening socket and its address. */
static int listen_at(struct floor *floor, struct sockaddr_in *address) {
    socklen_t length = sizeof *address;
    int listening = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    *address = (struct sockaddr_in){.sin_family = AF_INET};
    if (inet_pton(AF_INET, floor->setup.host, &address->sin_addr) != 1 || listening < 0 ||
        tune(floor, listening, true) || bind(listening, (struct sockaddr *)address, sizeof *address) ||
        listen(listening, 2) || getsockname(listening, (struct sockaddr *)address, &length))
        return floor_fail(floor, "listen");
    return listening;
}

static int dial(struct floor *floor, const struct sockaddr_in *address, bool push) {
    int connection = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connection < 0 || tune(floor, connection, push) ||
        connect(connection, (const struct sockaddr *)address, sizeof *address))
        return floor_fail(floor, "connect");
    return connection;
}

static int source_main(struct floor *floor, const struct sockaddr_in *address) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setsid(); /* as the product's daemons: the scheduler treats each session as a group */
    if (settle(floor, floor->setup.source_netns, floor->setup.source_cpus) || memory_create(floor, false))
        return 1;
    floor->urgent = dial(floor, address, false);
    floor->push = floor->urgent < 0 ? -1 : dial(floor, address, true);
    return floor->push < 0 ? 1 : source_run(floor);
}

/* Accept both connections in the order in which they are dialled, and wait until the source is ready. */
static int accept_both(struct floor *floor, int listening) {
    char byte;
    struct pollfd waiting = {.fd = listening, .events = POLLIN};
    int *places[2] = {&floor->urgent, &floor->push};
    for (int i = 0; i < 2; i++) {
        for (int looks = 0; poll(&waiting, 1, LOOK_MS) != 1; looks++) {
            errno = ETIMEDOUT;
            if (looks * LOOK_MS > CONNECT_MS || atomic_load(&floor->shared->failed))
                return floor_fail(floor, "the source did not connect");
        }
        *places[i] = accept4(listening, NULL, NULL, SOCK_CLOEXEC);
        if (*places[i] < 0)
            return floor_fail(floor, "accept");
    }
    int one = 1;
    if (setsockopt(floor->urgent, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one))
        return floor_fail(floor, "TCP_NODELAY");
    return recv(floor->urgent, &byte, 1, MSG_WAITALL) == 1 ? 0 : floor_fail(floor, "the source ended early");
}

static int buffers_create(struct floor *floor) {
    const struct floor_setup *setup = &floor->setup;
    bool meets = setup->touchers > 1 || setup->push != FLOOR_NONE;
    /* A block before each payload, so that it begins on a page behind its header. */
    uint64_t bytes = 2 * BLOCK_BYTES + setup->page_size + setup->frame_bytes;
    uint8_t *buffers = aligned_alloc(BLOCK_BYTES, bytes);
    if (meets)
        floor->claimed = calloc(floor->pages, 1);
    if (!buffers || (meets && !floor->claimed))
        return floor_fail(floor, "malloc");
    memset(buffers, 1, bytes); /* hot from the start, as after the first of many frames */
    floor->answer = buffers + BLOCK_BYTES - HEADER_BYTES;
    floor->frame = buffers + BLOCK_BYTES + setup->page_size + BLOCK_BYTES - HEADER_BYTES;
    return memory_orders(floor);
}

/* From go to the end of the clock. */
static int measure(struct floor *floor, int go) {
    const struct floor_setup *setup = &floor->setup;
    pthread_t demand, push, touchers[FLOOR_TOUCHERS_MAX];
    bool pushes = setup->push != FLOOR_NONE;
    if (pthread_create(&demand, NULL, demand_thread, floor) ||
        (pushes && pthread_create(&push, NULL, push_thread, floor)))
        return floor_fail(floor, "pthread_create");
    for (uint32_t t = 0; t < setup->touchers; t++)
        if (pthread_create(&touchers[t], NULL, toucher_thread, &floor->toucher[t]))
            return floor_fail(floor, "pthread_create");
    uint64_t began = floor_now();
    if (write(go, "g", 1) != 1)
        return floor_fail(floor, "go");
    for (uint32_t t = 0; t < setup->touchers; t++)
        sem_post(&floor->start);
    if (pushes)
        while (sem_wait(&floor->finished))
            ;
    for (uint32_t t = 0; t < setup->touchers && !atomic_load(&floor->shared->failed); t++) {
        /* A toucher whose page never comes is woken by nobody: look for a failure now and then. */
        struct timespec soon;
        do {
            clock_gettime(CLOCK_REALTIME, &soon);
            soon.tv_sec++;
        } while (pthread_timedjoin_np(touchers[t], NULL, &soon) && !atomic_load(&floor->shared->failed));
    }
    if (atomic_load(&floor->shared->failed))
        return -1;
    uint64_t ended = pushes ? atomic_load(&floor->ended_at) : floor_now();
    floor->result->wall_ns = ended - began;
    atomic_store(&floor->stop, true);
    if (pushes)
        pthread_join(push, NULL);
    shutdown(floor->urgent, SHUT_RDWR);
    pthread_join(demand, NULL);
    return 0;
}

static int destination_main(struct floor *floor, int listening, int go) {
    bool alias = floor->setup.demand == FLOOR_CONTINUE || floor->setup.push >= FLOOR_CONTINUE;
    if (memory_create(floor, alias) || memory_register(floor) || buffers_create(floor) ||
        accept_both(floor, listening) || measure(floor, go))
        return -1;
    close(floor->urgent);
    close(floor->push);
    floor->result->destination_cpu_ns = atomic_load(&floor->cpu_ns);
    return memory_check(floor);
}

int floor_run(const struct floor_setup *setup, struct floor_result *result) {
    struct floor *floor = calloc(1, sizeof *floor);
    struct floor_shared *shared =
        mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct sockaddr_in address;
    int go[2];
    if (!floor || shared == MAP_FAILED || pipe2(go, O_CLOEXEC)) {
        snprintf(result->failure, sizeof result->failure, "no memory");
        return -1;
    }
    *floor = (struct floor){.setup = *setup, .result = result, .shared = shared, .go = go[0],
                            .pages = setup->size / setup->page_size};
    sem_init(&floor->finished, 0, 0);
    sem_init(&floor->start, 0, 0);
    int failed = settle(floor, setup->destination_netns, setup->destination_cpus), listening = -1;
    if (!failed)
        failed = (listening = listen_at(floor, &address)) < 0;
    pid_t child = failed ? -1 : fork();
    if (child == 0)
        _exit(source_main(floor, &address));
    if (!failed && child < 0)
        failed = floor_fail(floor, "fork");
    if (!failed)
        failed = destination_main(floor, listening, go[1]);
    if (failed && child > 0)
        kill(child, SIGKILL);
    int status = 0;
    if (child > 0)
        waitpid(child, &status, 0);
    if (!failed && status)
        failed = floor_fail(floor, "the source failed");
    result->source_cpu_ns = atomic_load(&shared->source_cpu_ns);
    if (failed)
        snprintf(result->failure, sizeof result->failure, "%s", shared->failure);
    return failed ? -1 : 0;
}
