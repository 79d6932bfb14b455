/* See window.h. */
#include "window.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

#define INTERVAL_NS 4000000u
/* The queue that a demand page may find before it, beyond what fills the link. */
#define QUEUE_US 200u
/* So long after the last fault the push has the link to itself. */
#define QUIET_NS 100000000u
/* Below the first the link runs dry between two wake-ups, above the second nothing is gained. */
#define BYTES_MIN (24u << 10)
#define BYTES_MAX (4u << 20)

/* Both ends on one host: the addresses are the same, or of loopback. */
static int one_host(int socket) {
    struct sockaddr_storage near = {0}, far = {0};
    socklen_t near_length = sizeof near, far_length = sizeof far;
    if (getsockname(socket, (struct sockaddr *)&near, &near_length) ||
        getpeername(socket, (struct sockaddr *)&far, &far_length))
        return 1;
    if (near.ss_family == AF_INET)
        return ((struct sockaddr_in *)&near)->sin_addr.s_addr == ((struct sockaddr_in *)&far)->sin_addr.s_addr;
    if (near.ss_family == AF_INET6)
        return !memcmp(&((struct sockaddr_in6 *)&near)->sin6_addr, &((struct sockaddr_in6 *)&far)->sin6_addr,
                       sizeof(struct in6_addr));
    return 1;
}

void window_init(struct window *window, int push, int urgent) {
    *window = (struct window){.push = push, .urgent = urgent, .shared = !one_host(push), .bytes = BYTES_MAX};
}

static uint64_t next_bytes(const struct window *window, uint64_t rate, uint64_t now_ns) {
    struct tcp_info info = {0};
    socklen_t length = sizeof info;
    uint64_t larger = window->bytes + window->bytes / 8;
    if (!window->fault_at || now_ns - window->fault_at > QUIET_NS)
        return 2 * window->bytes;
    /* A connection that has measured nothing yet has no least round trip. */
    if (getsockopt(window->urgent, IPPROTO_TCP, TCP_INFO, &info, &length) || info.tcpi_min_rtt == UINT32_MAX)
        return larger;
    uint64_t queue_us = info.tcpi_rtt > info.tcpi_min_rtt ? info.tcpi_rtt - info.tcpi_min_rtt : 0;
    if (queue_us < QUEUE_US)
        return larger;
    if (queue_us < QUEUE_US * 3 / 2)
        return window->bytes;
    uint64_t fills = rate * (info.tcpi_min_rtt + QUEUE_US) / 1000000u;
    return fills < window->bytes ? fills : window->bytes - window->bytes / 8;
}

void window_update(struct window *window, uint64_t received, uint64_t faults, uint64_t now_ns) {
    uint64_t elapsed = now_ns - window->interval_at;
    if (!window->shared || elapsed < INTERVAL_NS)
        return;
    uint64_t rate = (uint64_t)((double)(received - window->interval_bytes) * 1e9 / (double)elapsed);
    window->interval_at = now_ns;
    window->interval_bytes = received;
    if (faults != window->faults)
        window->fault_at = now_ns;
    window->faults = faults;
    uint64_t bytes = next_bytes(window, rate, now_ns);
    bytes = bytes < BYTES_MIN ? BYTES_MIN : bytes > BYTES_MAX ? BYTES_MAX : bytes;
    /* The kernel tunes by itself as well, so a bound is set anew each time. No bound need be set only once. */
    int clamp = (int)bytes;
    if (bytes != BYTES_MAX || window->bytes != bytes)
        (void)!setsockopt(window->push, IPPROTO_TCP, TCP_WINDOW_CLAMP, &clamp, sizeof clamp);
    window->bytes = bytes;
}
