/*
 * Put before the C library: a kernel under which mappings change for as long as a test likes. Placing is answered with
 * EAGAIN `changes_left` times (-1: without end), by the ioctl `changes_of` or (0) by any. For all threads but the first
 * one the clock goes `clock_leap_s` ahead.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define COPY 0xC028AA03u
#define ZEROPAGE 0xC020AA04u
#define MOVE 0xC028AA05u
#define CONTINUE 0xC020AA07u

atomic_int changes_left;
atomic_uint changes_of;
atomic_int clock_leap_s;

int ioctl(int descriptor, unsigned long operation, ...) {
    va_list arguments;
    va_start(arguments, operation);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    uint32_t number = (uint32_t)operation, of = atomic_load(&changes_of);
    bool places = number == COPY || number == MOVE || number == ZEROPAGE || number == CONTINUE;
    if (places && (!of || of == number) && atomic_load(&changes_left)) {
        if (atomic_load(&changes_left) > 0)
            atomic_fetch_sub(&changes_left, 1);
        ((int64_t *)argument)[number == COPY || number == MOVE ? 4 : 3] = -EAGAIN;
        errno = EAGAIN;
        return -1;
    }
    return (int)syscall(SYS_ioctl, descriptor, operation, argument);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = (int)syscall(SYS_clock_gettime, clock, now);
    if (gettid() != getpid())
        now->tv_sec += atomic_load(&clock_leap_s);
    return result;
}
