/*
 * Inside the emulated guest: what guest.c and the vCPU threads share.
 *
 * guest.c owns both structs. A vCPU's thread is the only writer of its steps, times and histogram while it runs;
 * `mutex` guards what is said to be guarded, and whoever parks hands its cursor over through it.
 */
#ifndef POSTCOPY_GUEST_VCPU_H
#define POSTCOPY_GUEST_VCPU_H

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "content.h"
#include "histogram.h"
#include "kvm.h"

#define CACHE_LINE 64

/* Ends KVM_RUN; of all signals the one whose default does least. */
#define VCPU_KICK SIGURG

enum command { COMMAND_PARK, COMMAND_RUN, COMMAND_END };

struct kvm_run;

/* Of a vCPU that KVM runs; the thread's while it runs, the caller's while it is parked. */
struct vcpu_kvm {
    int fd;
    struct kvm_run *run; /* NULL: the vCPU is emulated */
    uint64_t run_bytes;
    struct kvm_window *window;
    bool called; /* its program has called and stands between two steps */
    bool single; /* it comes back after an instruction */
    _Atomic uint64_t trouble_at; /* where, if that is known */
    _Atomic uint32_t trouble;
};

struct vcpu {
    /* Set before the thread begins; `parked` belongs to guest.mutex. */
    struct guest *guest;
    uint32_t index;
    pthread_t thread;
    bool parked;
    struct cursor cursor; /* the thread's while it runs, the caller's while it is parked */
    _Atomic uint64_t steps_seeked; /* steps made before this guest was told of them */
    /* The thread's: where it goes on behind a page that is lost, and when its next step is due, if it is paced. */
    sigjmp_buf escape;
    uint64_t due_ns;
    /* Written by the thread in every step, read by anybody. */
    _Alignas(CACHE_LINE) _Atomic uint64_t steps;
    _Atomic uint64_t first_step_at;
    _Atomic uint64_t last_step_at;
    _Atomic uint64_t lost; /* steps that met a page that is lost */
    _Atomic int tid;
    struct vcpu_kvm kvm;
    _Alignas(CACHE_LINE) struct hist stall;
};

struct guest {
    struct order order;
    struct content content;
    struct memory memory;
    uint64_t period_ns; /* between two steps of a vCPU, 0: none */
    uint64_t steps_max; /* changed only while all are parked */
    struct guest_segment *segments;
    const uint8_t *_Atomic lost; /* a bit for each flat page, NULL: none is lost */
    uint32_t threads; /* those that were created: 0..order.vcpus */
    pthread_mutex_t mutex;
    pthread_cond_t commanded; /* command changed */
    pthread_cond_t arrived;   /* some vCPU parked or ended */
    uint32_t parked_count;
    uint32_t ended_count;
    /* On a line of its own that all vCPUs read in each step and that is written when the guest starts or stops. */
    _Alignas(CACHE_LINE) _Atomic uint32_t command;
    _Alignas(CACHE_LINE) struct vcpu vcpu[];
};

/* Only calls that cannot fail in a program without a bug go through this. */
static inline void must(int problem) {
    if (problem != 0)
        abort();
}

static inline uint64_t clock_ns(void) {
    struct timespec now;
    must(clock_gettime(CLOCK_MONOTONIC, &now));
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline struct timespec timespec_of(uint64_t ns) {
    return (struct timespec){.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
}

static inline enum command command_now(const struct guest *guest) {
    return atomic_load_explicit(&guest->command, memory_order_relaxed);
}

static inline uint64_t vcpu_steps(const struct vcpu *vcpu) {
    const _Atomic uint64_t *steps = vcpu->kvm.window != NULL ? &vcpu->kvm.window->steps : &vcpu->steps;
    return atomic_load_explicit(steps, memory_order_relaxed);
}

/* Parked, or of one's own. A vCPU that KVM runs may stand in the middle of a step; it rests only between two. */
static inline bool vcpu_at_limit(const struct guest *guest, const struct vcpu *vcpu) {
    return vcpu_steps(vcpu) >= guest->steps_max && (vcpu->kvm.window == NULL || vcpu->kvm.called);
}

/* It cannot go on, ever. */
static inline bool vcpu_in_trouble(const struct vcpu *vcpu) {
    return atomic_load_explicit(&vcpu->kvm.trouble, memory_order_relaxed) != 0;
}

/* It makes no step although the guest runs. */
static inline bool vcpu_rests(const struct guest *guest, const struct vcpu *vcpu) {
    return vcpu_at_limit(guest, vcpu) || vcpu_in_trouble(vcpu);
}

/* A vCPU's thread, from parked to ended; `argument` is its struct vcpu, of which guest and index are set. */
void *vcpu_main(void *argument);

/* Waits until the next step is due, or the guest is stopped; returns the time. The mutex is not held. */
uint64_t vcpu_pace(struct guest *guest, uint64_t now, uint64_t *due_ns);

/* In lost.c: installs the handler of SIGBUS, once in a process. */
void lost_begin(void);
/*
 * In lost.c: out of an access to a page that is lost this thread, which has all signals blocked, goes on at vcpu->escape
 * from now on. It sets that next, by sigsetjmp(vcpu->escape, 0) in a function that it does not leave. NULL: no more.
 */
void lost_escape(struct vcpu *vcpu);

/* In kvm.c: lets a vCPU that KVM runs go on until the command changes, its limit is reached or it cannot go on. */
void vcpu_run_kvm(struct guest *guest, struct vcpu *vcpu);
/* Undoes guest_adopt, once the thread has ended. */
void vcpu_kvm_abandon(struct vcpu *vcpu);

#endif
