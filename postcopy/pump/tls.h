/*
 * TLS 1.3 on a data connection, with a key that both ends know already (RFC 8446, 4.2.11): no certificate, no ticket,
 * no early data, TLS_AES_128_GCM_SHA256.
 *
 * OpenSSL is loaded when it is first needed, through the table of functions in tls_library.h: neither its headers nor
 * the library are needed to build, and where it is missing tls_load() says so. A session is made on a socket that its
 * owner keeps, is shaken hands with without ever blocking, then belongs to a pump and is used by one thread at a time.
 */
#ifndef POSTCOPY_TLS_H
#define POSTCOPY_TLS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#define TLS_KEY_BYTES 32u
#define TLS_RECORD_BYTES 16384u

struct tls_library;
struct tls;

enum tls_end { TLS_DIALS = 0, TLS_LISTENS = 1 };
enum tls_step { TLS_DONE = 0, TLS_WANTS_READ = 1, TLS_WANTS_WRITE = 2, TLS_FAILED = -1 };

/*
 * Load OpenSSL: a library that lasts until tls_unload(), NULL with the reason in `reason` (`size` bytes with the final
 * zero). All sessions must be gone before it is unloaded.
 */
struct tls_library *tls_load(char *reason, size_t size);
void tls_unload(struct tls_library *library);

/*
 * Make a session for one end of a connected, non-blocking socket, which stays the caller's and must outlive it. The
 * identity names the key of TLS_KEY_BYTES to the other end; both are copied. NULL where memory runs out.
 */
struct tls *tls_create(const struct tls_library *library, int socket, uint32_t end, const char *identity,
                       const uint8_t *key);
/* Change the key after so many records instead of TLS_RECORDS_MAX: for tests, which cannot send as many. */
void tls_change_key_after(struct tls *tls, uint64_t records);
/* Forget the key and free the session. NULL is allowed. */
void tls_destroy(struct tls *tls);

/* Go on with the handshake as far as the socket allows: an enum tls_step. FAILED is final, tls_reason() says why. */
int tls_handshake(struct tls *tls);
/* Why the handshake failed: OpenSSL's words. Lasts as long as the library. */
const char *tls_reason(const struct tls *tls);

/*
 * As sendmsg(2) and recvmsg(2) on a non-blocking socket: bytes, or -1 with errno; 0 is the end. EAGAIN is answered only
 * when the socket itself has nothing or no room, so poll(2) may be waited in. What EAGAIN was answered for has to be
 * sent again with the same bytes in front. EBADMSG: what came is not what was sent.
 */
ssize_t tls_send(struct tls *tls, const struct iovec *parts, uint32_t count);
ssize_t tls_receive(struct tls *tls, const struct iovec *parts, uint32_t count);
/* Bytes that have come off the socket and can be received. */
uint64_t tls_pending(const struct tls *tls);

#endif
