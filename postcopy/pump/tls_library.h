/*
 * The part of OpenSSL 3 that is used, as a table of functions that dlsym() fills. The types are OpenSSL's own, opaque
 * here; what its headers have as macros stands here as numbers. Its ABI keeps all of it for every 3.x.
 */
#ifndef POSTCOPY_TLS_LIBRARY_H
#define POSTCOPY_TLS_LIBRARY_H

#include <stddef.h>
#include <stdint.h>

#define TLS_SONAME "libssl.so.3"

#define OPENSSL_TLS1_3 0x0304
#define OPENSSL_VERIFY_PEER 1
#define OPENSSL_CTRL_MODE 33
#define OPENSSL_CTRL_SET_READ_AHEAD 41
#define OPENSSL_CTRL_SET_MIN_PROTO_VERSION 123
#define OPENSSL_MODE_ENABLE_PARTIAL_WRITE 1
#define OPENSSL_MODE_ACCEPT_MOVING_WRITE_BUFFER 2
#define OPENSSL_OP_IGNORE_UNEXPECTED_EOF (1ull << 7)
#define OPENSSL_OP_NO_TICKET (1ull << 14)
#define OPENSSL_ERROR_WANT_READ 2
#define OPENSSL_ERROR_WANT_WRITE 3
#define OPENSSL_ERROR_SYSCALL 5
#define OPENSSL_ERROR_ZERO_RETURN 6
#define OPENSSL_KEY_UPDATE_NOT_REQUESTED 0

typedef struct ssl_st SSL;
typedef struct ssl_ctx_st SSL_CTX;
typedef struct ssl_session_st SSL_SESSION;
typedef struct ssl_cipher_st SSL_CIPHER;
typedef int openssl_psk_use(SSL *, const void *digest, const unsigned char **identity, size_t *length, SSL_SESSION **);
typedef int openssl_psk_find(SSL *, const unsigned char *identity, size_t length, SSL_SESSION **);

/* X(result, name, arguments) */
#define TLS_FUNCTIONS(X)                                                                                              \
    X(const void *, TLS_method, (void))                                                                               \
    X(SSL_CTX *, SSL_CTX_new, (const void *))                                                                         \
    X(void, SSL_CTX_free, (SSL_CTX *))                                                                                \
    X(long, SSL_CTX_ctrl, (SSL_CTX *, int, long, void *))                                                             \
    X(uint64_t, SSL_CTX_set_options, (SSL_CTX *, uint64_t))                                                           \
    X(int, SSL_CTX_set_ciphersuites, (SSL_CTX *, const char *))                                                       \
    X(int, SSL_CTX_set_num_tickets, (SSL_CTX *, size_t))                                                              \
    X(void, SSL_CTX_set_default_read_buffer_len, (SSL_CTX *, size_t))                                                 \
    X(void, SSL_CTX_set_verify, (SSL_CTX *, int, void *))                                                             \
    X(void, SSL_CTX_set_psk_use_session_callback, (SSL_CTX *, openssl_psk_use *))                                     \
    X(void, SSL_CTX_set_psk_find_session_callback, (SSL_CTX *, openssl_psk_find *))                                   \
    X(SSL *, SSL_new, (SSL_CTX *))                                                                                    \
    X(void, SSL_free, (SSL *))                                                                                        \
    X(int, SSL_set_fd, (SSL *, int))                                                                                  \
    X(void, SSL_set_accept_state, (SSL *))                                                                            \
    X(void, SSL_set_connect_state, (SSL *))                                                                           \
    X(int, SSL_do_handshake, (SSL *))                                                                                 \
    X(int, SSL_session_reused, (const SSL *))                                                                         \
    X(int, SSL_get_error, (const SSL *, int))                                                                         \
    X(int, SSL_read, (SSL *, void *, int))                                                                            \
    X(int, SSL_write, (SSL *, const void *, int))                                                                     \
    X(int, SSL_pending, (const SSL *))                                                                                \
    X(int, SSL_key_update, (SSL *, int))                                                                              \
    X(const SSL_CIPHER *, SSL_CIPHER_find, (SSL *, const unsigned char *))                                            \
    X(SSL_SESSION *, SSL_SESSION_new, (void))                                                                         \
    X(void, SSL_SESSION_free, (SSL_SESSION *))                                                                        \
    X(int, SSL_SESSION_set1_master_key, (SSL_SESSION *, const unsigned char *, size_t))                               \
    X(int, SSL_SESSION_set_cipher, (SSL_SESSION *, const SSL_CIPHER *))                                               \
    X(int, SSL_SESSION_set_protocol_version, (SSL_SESSION *, int))                                                    \
    X(unsigned long, ERR_get_error, (void))                                                                           \
    X(void, ERR_clear_error, (void))                                                                                  \
    X(const char *, ERR_reason_error_string, (unsigned long))

struct tls_library {
    void *handle;
#define TLS_FIELD(result, name, arguments) result(*name) arguments;
    TLS_FUNCTIONS(TLS_FIELD)
#undef TLS_FIELD
};

#endif
