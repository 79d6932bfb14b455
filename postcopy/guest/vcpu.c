/* A vCPU's thread: parks, runs step by step, parks again. In: commands, through struct guest. Out: visits to memory. */
#define _GNU_SOURCE
#include "vcpu.h"

#include <errno.h>
#include <stdio.h>
#include <unistd.h>

#include "guest.h"

/* A paced vCPU that fell behind (a stall, a coarse timer) catches up at most this much in one go. */
#define CATCH_UP_NS 10000000u

uint64_t vcpu_pace(struct guest *guest, uint64_t now, uint64_t *due_ns) {
    if (now > *due_ns + CATCH_UP_NS)
        *due_ns = now - CATCH_UP_NS;
    if (now < *due_ns) {
        struct timespec due = timespec_of(*due_ns);
        must(pthread_mutex_lock(&guest->mutex));
        int problem = 0;
        while (command_now(guest) == COMMAND_RUN && problem == 0)
            problem = pthread_cond_timedwait(&guest->commanded, &guest->mutex, &due);
        must(problem == ETIMEDOUT ? 0 : problem);
        must(pthread_mutex_unlock(&guest->mutex));
        now = clock_ns();
    }
    *due_ns += guest->period_ns;
    return now;
}

/*
 * The step that was under way met a page that is lost. The cursor is as it was when vcpu_go() took it, and the steps say
 * how many it has made since.
 */
static void machine_check(struct guest *guest, struct vcpu *vcpu) {
    uint64_t steps = vcpu_steps(vcpu) + 1;
    must(!order_seek(&guest->order, vcpu->index, steps / guest->order.pass_steps, steps % guest->order.pass_steps,
                     &vcpu->cursor));
    atomic_fetch_add_explicit(&vcpu->lost, 1, memory_order_relaxed);
    atomic_store_explicit(&vcpu->steps, steps, memory_order_relaxed);
}

/* Steps until the command changes or the limit is reached. One reading of the clock a step: the end of a step is the
 * beginning of the next, so nothing that happens to this thread between two steps goes unmeasured. */
static __attribute__((noinline)) void vcpu_go(struct guest *guest, struct vcpu *vcpu) {
    struct cursor cursor = vcpu->cursor;
    uint64_t steps = atomic_load_explicit(&vcpu->steps, memory_order_relaxed);
    uint64_t began = clock_ns();
    while (command_now(guest) == COMMAND_RUN && steps < guest->steps_max) {
        if (guest->period_ns != 0) {
            began = vcpu_pace(guest, began, &vcpu->due_ns);
            if (command_now(guest) != COMMAND_RUN)
                break;
        }
        content_visit(&guest->content, &guest->memory, order_next(&guest->order, &cursor), vcpu->index);
        uint64_t ended = clock_ns();
        if (__builtin_expect(ended - began >= STALL_MIN_NS, 0))
            hist_record(&vcpu->stall, ended - began);
        if (__builtin_expect(atomic_load_explicit(&vcpu->first_step_at, memory_order_relaxed) == 0, 0))
            atomic_store_explicit(&vcpu->first_step_at, ended, memory_order_relaxed);
        atomic_store_explicit(&vcpu->last_step_at, ended, memory_order_relaxed);
        atomic_store_explicit(&vcpu->steps, ++steps, memory_order_relaxed);
        began = ended;
    }
    vcpu->cursor = cursor;
}

static void vcpu_run(struct guest *guest, struct vcpu *vcpu) {
    vcpu->due_ns = clock_ns();
    lost_escape(vcpu);
    if (sigsetjmp(vcpu->escape, 0) != 0)
        machine_check(guest, vcpu);
    vcpu_go(guest, vcpu);
    lost_escape(NULL);
}

/* Parks; false when the thread is to end. */
static bool vcpu_park(struct guest *guest, struct vcpu *vcpu) {
    must(pthread_mutex_lock(&guest->mutex));
    vcpu->parked = true;
    guest->parked_count++;
    must(pthread_cond_signal(&guest->arrived));
    while (command_now(guest) == COMMAND_PARK || (command_now(guest) == COMMAND_RUN && vcpu_rests(guest, vcpu)))
        must(pthread_cond_wait(&guest->commanded, &guest->mutex));
    bool runs = command_now(guest) == COMMAND_RUN;
    vcpu->parked = false;
    guest->parked_count--;
    if (!runs) {
        guest->ended_count++;
        must(pthread_cond_signal(&guest->arrived));
    }
    must(pthread_mutex_unlock(&guest->mutex));
    return runs;
}

void *vcpu_main(void *argument) {
    struct vcpu *vcpu = argument;
    char name[16];
    must(snprintf(name, sizeof name, "vcpu-%u", vcpu->index) < 0);
    must(pthread_setname_np(pthread_self(), name));
    atomic_store_explicit(&vcpu->tid, gettid(), memory_order_relaxed);
    while (vcpu_park(vcpu->guest, vcpu)) {
        if (vcpu->kvm.window != NULL)
            vcpu_run_kvm(vcpu->guest, vcpu);
        else
            vcpu_run(vcpu->guest, vcpu);
    }
    return NULL;
}
