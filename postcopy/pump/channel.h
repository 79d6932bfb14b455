/*
 * A data connection as the pump's threads use it: a socket and, where there is one, the TLS session on it. All that is
 * sent and received goes through here, and without TLS it costs one look at a pointer.
 */
#ifndef POSTCOPY_CHANNEL_H
#define POSTCOPY_CHANNEL_H

#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "tls.h"

struct channel {
    int socket;      /* -1 until it is attached */
    struct tls *tls; /* NULL: plain */
};

/* Send what fits: bytes, or -1 with errno. What EAGAIN was answered for comes again with the same bytes in front. */
static inline ssize_t channel_send(const struct channel *channel, struct iovec *parts, uint32_t count) {
    if (channel->tls)
        return tls_send(channel->tls, parts, count);
    if (count == 1) /* spares the kernel the copying of a vector */
        return send(channel->socket, parts->iov_base, parts->iov_len, MSG_DONTWAIT | MSG_NOSIGNAL);
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
    return sendmsg(channel->socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* Receive what is there: bytes, 0 at the end, or -1 with errno. */
static inline ssize_t channel_receive(const struct channel *channel, struct iovec *parts, uint32_t count) {
    if (channel->tls)
        return tls_receive(channel->tls, parts, count);
    if (count == 1)
        return recv(channel->socket, parts->iov_base, parts->iov_len, MSG_DONTWAIT);
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
    return recvmsg(channel->socket, &message, MSG_DONTWAIT);
}

/* About how many bytes can be received at once; 0 where the socket does not tell. */
static inline uint64_t channel_arrived(const struct channel *channel) {
    int arrived = 0;
    (void)!ioctl(channel->socket, FIONREAD, &arrived);
    return (uint64_t)arrived + (channel->tls ? tls_pending(channel->tls) : 0);
}

/*
 * Have poll() find it readable once `bytes` of content have come, not before: a wish, that only spares wake-ups. Of
 * them TLS may hold the beginning already, less than a record; what it adds to them makes it no less.
 */
static inline void channel_await(const struct channel *channel, uint64_t bytes) {
    uint64_t held = channel->tls ? 2 * TLS_RECORD_BYTES : 0;
    int enough = bytes > held ? (int)(bytes - held) : 1;
    (void)!setsockopt(channel->socket, SOL_SOCKET, SO_RCVLOWAT, &enough, sizeof enough);
}

#endif
