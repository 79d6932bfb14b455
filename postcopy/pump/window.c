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

static void offer(struct window *window, uint64_t bytes) {
    /* The kernel tunes by itself as well, so a bound is set anew each time. No bound need be set only once. */
    int clamp = (int)bytes;
    if (bytes != WINDOW_BYTES_MAX || window->bytes != bytes)
        (void)!setsockopt(window->push, IPPROTO_TCP, TCP_WINDOW_CLAMP, &clamp, sizeof clamp);
    window->bytes = bytes;
}

void window_init(struct window *window, int push, int urgent) {
    *window = (struct window){.push = push, .urgent = urgent, .shared = !one_host(push), .bytes = WINDOW_BYTES_MAX};
    if (window->shared)
        offer(window, WINDOW_BYTES_START);
    int buffer = 0;
    socklen_t length = sizeof buffer;
    (void)!getsockopt(push, SOL_SOCKET, SO_RCVBUF, &buffer, &length);
    window->buffer = (uint64_t)buffer;
}

uint64_t window_enough(const struct window *window) {
    uint64_t offered = window->bytes / 2, held = window->buffer / 4;
    return offered < held ? offered : held;
}

uint64_t window_next(uint64_t bytes, uint64_t rate, uint64_t round_trip_us, uint64_t least_us, bool faults) {
    uint64_t queue_us = round_trip_us > least_us ? round_trip_us - least_us : 0;
    if (!faults) {
        bytes = 2 * bytes;
    } else if (queue_us < QUEUE_US) {
        bytes += bytes / 8;
    } else if (queue_us > QUEUE_US * 3 / 2) {
        uint64_t fills = rate * (least_us + QUEUE_US) / 1000000u;
        bytes = fills < bytes ? fills : bytes - bytes / 8;
    }
    return bytes < WINDOW_BYTES_MIN ? WINDOW_BYTES_MIN : bytes > WINDOW_BYTES_MAX ? WINDOW_BYTES_MAX : bytes;
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
    /* A connection that has measured nothing yet has no round trip, and so no queue. */
    struct tcp_info info = {0};
    socklen_t length = sizeof info;
    if (getsockopt(window->urgent, IPPROTO_TCP, TCP_INFO, &info, &length) || info.tcpi_min_rtt == UINT32_MAX)
        info.tcpi_rtt = info.tcpi_min_rtt = 0;
    bool about = window->fault_at && now_ns - window->fault_at < QUIET_NS;
    uint64_t bytes = window_next(window->bytes, rate, info.tcpi_rtt, info.tcpi_min_rtt, about);
    offer(window, bytes);
}
