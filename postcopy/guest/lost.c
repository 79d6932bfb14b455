/*
 * Pages that are lost for good: a vCPU that touches one gets SIGBUS, and goes on elsewhere. In: SIGBUS. Out: a jump to where
 * its thread said, or what would have happened anyway.
 *
 * What a process does about SIGBUS is one for all of it, so there is one handler for all guests.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stddef.h>

#include "vcpu.h"

static _Thread_local struct vcpu *volatile escapes;
static struct sigaction before;
static pthread_once_t installed = PTHREAD_ONCE_INIT;

static bool is_lost(const struct guest *guest, const void *address) {
    const uint8_t *bits = atomic_load_explicit(&guest->lost, memory_order_acquire);
    uint64_t base = 0; /* flat page of the segment's first */
    for (uint32_t i = 0; bits != NULL && i < guest->memory.segment_count; base += guest->segments[i++].pages) {
        uint64_t offset = (uint64_t)((uintptr_t)address - (uintptr_t)guest->segments[i].address);
        uint64_t page = base + offset / GUEST_PAGE_BYTES;
        if (offset / GUEST_PAGE_BYTES < guest->segments[i].pages)
            return (bits[page / 8] >> (page % 8) & 1) != 0;
    }
    return false;
}

/* Not by si_code: for a page that was poisoned it is BUS_ADRERR or, where the kernel handles memory failures, MCEERR. */
static void touched(int number, siginfo_t *info, void *context) {
    struct vcpu *vcpu = escapes;
    if (vcpu != NULL && info->si_code > 0 && is_lost(vcpu->guest, info->si_addr))
        siglongjmp(vcpu->escape, 1);
    if (before.sa_flags & SA_SIGINFO)
        before.sa_sigaction(number, info, context);
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)
        before.sa_handler(number);
    else
        must(sigaction(SIGBUS, &before, NULL)); /* the access is made again, and ends as it would have ended */
}

static void install(void) {
    /* Not blocked in the handler, which is not always returned from. */
    struct sigaction ours = {.sa_sigaction = touched, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    must(sigemptyset(&ours.sa_mask));
    must(sigaction(SIGBUS, &ours, &before));
}

void lost_begin(void) {
    must(pthread_once(&installed, install));
}

void lost_escape(struct vcpu *vcpu) {
    escapes = vcpu;
    sigset_t bus;
    must(sigemptyset(&bus));
    must(sigaddset(&bus, SIGBUS));
    must(pthread_sigmask(vcpu == NULL ? SIG_BLOCK : SIG_UNBLOCK, &bus, NULL));
}
