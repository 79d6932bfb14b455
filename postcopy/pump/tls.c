/* See tls.h. */
#include "tls.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tls_library.h"

/* What is taken off the socket with one read: several records of a push. */
#define READ_BYTES (8u * (TLS_RECORD_BYTES + 256u))

static const unsigned char CIPHER_ID[2] = {0x13, 0x01};
#define CIPHER_NAME "TLS_AES_128_GCM_SHA256"

struct tls {
    const struct tls_library *library;
    SSL_CTX *context;
    SSL *session;
    const char *reason;
    int broken; /* the errno of its failure, 0 while there was none */
    uint64_t records, records_max; /* sent with the present key, and to be sent with it at most */
    char identity[TLS_IDENTITY_BYTES_MAX + 1];
    uint8_t key[TLS_KEY_BYTES];
    uint8_t record[TLS_RECORD_BYTES]; /* parts that are shorter than a record are put together here */
};

struct tls_library *tls_load(char *reason, size_t size) {
    struct tls_library *library = calloc(1, sizeof *library);
    if (!library) {
        snprintf(reason, size, "%s", strerror(errno));
        return NULL;
    }
    library->handle = dlopen(TLS_SONAME, RTLD_NOW | RTLD_LOCAL);
    if (!library->handle) {
        snprintf(reason, size, "%s", dlerror());
        free(library);
        return NULL;
    }
    const char *missing = NULL;
    void *found;
/* POSIX has dlsym() return functions as pointers to data; copying the bytes keeps C content. */
#define TLS_FIND(result, name, arguments)                                                                             \
    found = dlsym(library->handle, #name);                                                                            \
    memcpy(&library->name, &found, sizeof found);                                                                     \
    missing = found ? missing : #name;
    TLS_FUNCTIONS(TLS_FIND)
#undef TLS_FIND
    if (missing) {
        snprintf(reason, size, "%s has no %s", TLS_SONAME, missing);
        tls_unload(library);
        return NULL;
    }
    return library;
}

void tls_unload(struct tls_library *library) {
    if (!library)
        return;
    dlclose(library->handle);
    free(library);
}

/* The key as OpenSSL wants it; the caller's. NULL where memory runs out. */
static SSL_SESSION *key_session(const struct tls *tls) {
    const struct tls_library *library = tls->library;
    const SSL_CIPHER *cipher = library->SSL_CIPHER_find(tls->session, CIPHER_ID);
    SSL_SESSION *session = cipher ? library->SSL_SESSION_new() : NULL;
    if (!session)
        return NULL;
    if (library->SSL_SESSION_set1_master_key(session, tls->key, sizeof tls->key) &&
        library->SSL_SESSION_set_cipher(session, cipher) &&
        library->SSL_SESSION_set_protocol_version(session, OPENSSL_TLS1_3))
        return session;
    library->SSL_SESSION_free(session);
    return NULL;
}

/*
 * Whose handshake this thread is just at. OpenSSL calls back with its own session alone, and what it has to find ours
 * by is a function of the table that only ours leads to. Set for the length of one call.
 */
static _Thread_local struct tls *shaking;

/* The end that dials offers its key under its name. OpenSSL frees the session. */
static int use_key(SSL *session, const void *digest, const unsigned char **identity, size_t *length,
                   SSL_SESSION **key) {
    (void)session, (void)digest; /* there is one cipher suite, so only its hash can be asked for */
    *key = key_session(shaking);
    *identity = (const unsigned char *)shaking->identity;
    *length = strlen(shaking->identity);
    return *key != NULL;
}

/* The end that listens knows one name. Any other has no key, and without a certificate that ends the handshake. */
static int find_key(SSL *session, const unsigned char *identity, size_t length, SSL_SESSION **key) {
    (void)session;
    bool known = length == strlen(shaking->identity) && !memcmp(identity, shaking->identity, length);
    *key = known ? key_session(shaking) : NULL;
    return !known || *key;
}

static SSL_CTX *context_create(const struct tls_library *library, bool listens) {
    SSL_CTX *context = library->SSL_CTX_new(library->TLS_method());
    if (!context)
        return NULL;
    library->SSL_CTX_set_options(context, OPENSSL_OP_NO_TICKET | OPENSSL_OP_IGNORE_UNEXPECTED_EOF);
    if (!listens) /* no certificate is trusted, and so none can stand in for the key */
        library->SSL_CTX_set_verify(context, OPENSSL_VERIFY_PEER, NULL);
    library->SSL_CTX_set_psk_use_session_callback(context, use_key);
    library->SSL_CTX_set_psk_find_session_callback(context, find_key);
    library->SSL_CTX_set_default_read_buffer_len(context, READ_BYTES);
    library->SSL_CTX_ctrl(context, OPENSSL_CTRL_SET_READ_AHEAD, 1, NULL);
    library->SSL_CTX_ctrl(context, OPENSSL_CTRL_MODE,
                          OPENSSL_MODE_ENABLE_PARTIAL_WRITE | OPENSSL_MODE_ACCEPT_MOVING_WRITE_BUFFER, NULL);
    if (library->SSL_CTX_ctrl(context, OPENSSL_CTRL_SET_MIN_PROTO_VERSION, OPENSSL_TLS1_3, NULL) &&
        library->SSL_CTX_set_ciphersuites(context, CIPHER_NAME) && library->SSL_CTX_set_num_tickets(context, 0))
        return context;
    library->SSL_CTX_free(context);
    return NULL;
}

struct tls *tls_create(const struct tls_library *library, int socket, uint32_t end, const char *identity,
                       const uint8_t *key) {
    if (strlen(identity) > TLS_IDENTITY_BYTES_MAX) {
        errno = EINVAL;
        return NULL;
    }
    struct tls *tls = calloc(1, sizeof *tls);
    if (!tls)
        return NULL;
    tls->library = library;
    tls->reason = "";
    tls->records_max = TLS_RECORDS_MAX;
    memcpy(tls->identity, identity, strlen(identity) + 1);
    memcpy(tls->key, key, sizeof tls->key);
    library->ERR_clear_error();
    tls->context = context_create(library, end == TLS_LISTENS);
    tls->session = tls->context ? library->SSL_new(tls->context) : NULL;
    if (!tls->session || !library->SSL_set_fd(tls->session, socket)) {
        tls_destroy(tls);
        errno = ENOMEM;
        return NULL;
    }
    if (end == TLS_LISTENS)
        library->SSL_set_accept_state(tls->session);
    else
        library->SSL_set_connect_state(tls->session);
    return tls;
}

void tls_change_key_after(struct tls *tls, uint64_t records) { tls->records_max = records; }

void tls_destroy(struct tls *tls) {
    if (!tls)
        return;
    tls->library->SSL_free(tls->session);
    tls->library->SSL_CTX_free(tls->context);
    explicit_bzero(tls, sizeof *tls);
    free(tls);
}

static int handshake_failed(struct tls *tls, const char *reason) {
    unsigned long first = tls->library->ERR_get_error();
    const char *said = first ? tls->library->ERR_reason_error_string(first) : NULL;
    tls->library->ERR_clear_error();
    tls->reason = said ? said : reason;
    return TLS_FAILED;
}

int tls_handshake(struct tls *tls) {
    const struct tls_library *library = tls->library;
    library->ERR_clear_error();
    errno = 0;
    shaking = tls;
    int result = library->SSL_do_handshake(tls->session), number = errno;
    shaking = NULL;
    if (result == 1) {
        if (library->SSL_session_reused(tls->session) != 1)
            return handshake_failed(tls, "the handshake ended without the key");
        explicit_bzero(tls->key, sizeof tls->key);
        return TLS_DONE;
    }
    switch (library->SSL_get_error(tls->session, result)) {
    case OPENSSL_ERROR_WANT_READ:
        return TLS_WANTS_READ;
    case OPENSSL_ERROR_WANT_WRITE:
        return TLS_WANTS_WRITE;
    default:
        return handshake_failed(tls, number ? strerror(number) : "the connection was closed in the middle of it");
    }
}

const char *tls_reason(const struct tls *tls) { return tls->reason; }

/* A session that failed once has failed for good, also where the call that found out had moved some bytes before. */
static ssize_t broken(const struct tls *tls) {
    errno = tls->broken;
    return -1;
}

/* What a call that moved nothing means, as of sendmsg and recvmsg: 0 for the end, else -1 with errno. */
static ssize_t nothing(struct tls *tls, int result, int number) {
    switch (tls->library->SSL_get_error(tls->session, result)) {
    case OPENSSL_ERROR_WANT_READ:
    case OPENSSL_ERROR_WANT_WRITE:
        errno = EAGAIN;
        return -1;
    case OPENSSL_ERROR_ZERO_RETURN:
        return 0;
    case OPENSSL_ERROR_SYSCALL:
        errno = number ? number : ECONNRESET;
        break;
    default:
        errno = EBADMSG;
    }
    tls->broken = errno;
    tls->library->ERR_clear_error();
    return broken(tls);
}

/* Put the parts from `skip` bytes on together, up to one record. Returns how many bytes that is. */
static uint64_t gather(struct tls *tls, const struct iovec *parts, uint32_t count, uint64_t skip) {
    uint64_t gathered = 0;
    for (uint32_t i = 0; i < count && gathered < TLS_RECORD_BYTES; i++) {
        uint64_t length = parts[i].iov_len;
        if (skip >= length) {
            skip -= length;
            continue;
        }
        length -= skip;
        if (length > TLS_RECORD_BYTES - gathered)
            length = TLS_RECORD_BYTES - gathered;
        memcpy(tls->record + gathered, (uint8_t *)parts[i].iov_base + skip, length);
        gathered += length;
        skip = 0;
    }
    return gathered;
}

/* Send one record: out of the part itself where it fills one, else put together. As SSL_write. */
static int send_record(struct tls *tls, const struct iovec *parts, uint32_t count, uint64_t skip) {
    const struct tls_library *library = tls->library;
    if (tls->records >= tls->records_max) {
        if (!library->SSL_key_update(tls->session, OPENSSL_KEY_UPDATE_NOT_REQUESTED))
            return -1;
        tls->records = 0;
    }
    uint64_t passed = 0;
    for (uint32_t i = 0; i < count; passed += parts[i++].iov_len) {
        if (skip < passed || skip - passed >= parts[i].iov_len)
            continue;
        if (parts[i].iov_len - (skip - passed) < TLS_RECORD_BYTES)
            break;
        return library->SSL_write(tls->session, (uint8_t *)parts[i].iov_base + (skip - passed), TLS_RECORD_BYTES);
    }
    return library->SSL_write(tls->session, tls->record, (int)gather(tls, parts, count, skip));
}

ssize_t tls_send(struct tls *tls, const struct iovec *parts, uint32_t count) {
    if (tls->broken)
        return broken(tls);
    uint64_t total = 0, sent = 0;
    for (uint32_t i = 0; i < count; i++)
        total += parts[i].iov_len;
    tls->library->ERR_clear_error(); /* what another session left behind would be taken for this one's */
    while (sent < total) {
        errno = 0;
        int result = send_record(tls, parts, count, sent);
        if (result <= 0) {
            ssize_t moved = nothing(tls, result, errno);
            if (sent)
                break;
            errno = moved ? errno : EPIPE; /* the other end has closed: nothing more can be sent */
            return -1;
        }
        tls->records++;
        sent += (uint64_t)result;
    }
    return (ssize_t)sent;
}

ssize_t tls_receive(struct tls *tls, const struct iovec *parts, uint32_t count) {
    if (tls->broken)
        return broken(tls);
    uint64_t got = 0;
    tls->library->ERR_clear_error();
    for (uint32_t i = 0; i < count; i++) {
        for (uint64_t filled = 0; filled < parts[i].iov_len;) {
            uint64_t rest = parts[i].iov_len - filled;
            errno = 0;
            int result = tls->library->SSL_read(tls->session, (uint8_t *)parts[i].iov_base + filled,
                                                rest < INT32_MAX ? (int)rest : INT32_MAX);
            if (result <= 0) {
                ssize_t moved = nothing(tls, result, errno);
                return got ? (ssize_t)got : moved;
            }
            filled += (uint64_t)result;
            got += (uint64_t)result;
        }
    }
    return (ssize_t)got;
}

uint64_t tls_pending(const struct tls *tls) { return (uint64_t)tls->library->SSL_pending(tls->session); }
