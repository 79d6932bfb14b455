/*
 * Put before the C library: a kernel under which mappings change for as long as a test likes. Placing is answered with
 * EAGAIN `changes_left` times (-1: without end), by the ioctl `changes_of` or (0) by any; with `changes_take_s` every
 * second time, and so much time passes by it. While `changes_held` is set it does not return at all. For all threads but
 * the first one the clock goes `clock_leap_s` ahead.
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
#define POISON 0xC020AA08u

atomic_int changes_left;
atomic_uint changes_of;
atomic_int changes_held, changes_waiting;
atomic_int clock_leap_s, changes_take_s, changes_tried;

int ioctl(int descriptor, unsigned long operation, ...) {
    va_list arguments;
    va_start(arguments, operation);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    uint32_t number = (uint32_t)operation, of = atomic_load(&changes_of);
    bool places = number == COPY || number == MOVE || number == ZEROPAGE || number == CONTINUE || number == POISON;
    atomic_fetch_add(&changes_waiting, places);
    while (places && atomic_load(&changes_held))
        nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    atomic_fetch_sub(&changes_waiting, places);
    bool refused = places && (!of || of == number) && atomic_load(&changes_left);
    if (refused && atomic_load(&changes_left) > 0)
        atomic_fetch_sub(&changes_left, 1);
    if (places && atomic_load(&changes_take_s) && !(atomic_fetch_add(&changes_tried, 1) & 1)) {
        atomic_fetch_add(&clock_leap_s, atomic_load(&changes_take_s));
        refused = true;
    }
    if (refused) {
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
