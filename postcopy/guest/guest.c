/* The emulated guest: made with its vCPUs parked, let go, stopped between two steps, read, ended. See guest.h. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "vcpu.h"

/* A vCPU thread calls nothing deep; the default of 8 MiB would be 4 GiB of address space for 512 of them. */
#define STACK_BYTES (256u * 1024u)

const size_t GUEST_STALL_BYTES = sizeof(struct hist);

/* The mutex is held. */
static void command_give(struct guest *guest, enum command command) {
    atomic_store_explicit(&guest->command, command, memory_order_relaxed);
    must(pthread_cond_broadcast(&guest->commanded));
}

/* Brings those that KVM runs out of it; the others look at the command in each step. The mutex is held. */
static void kick(struct guest *guest) {
    for (uint32_t v = 0; v < guest->threads; v++) {
        if (guest->vcpu[v].kvm.window != NULL && !guest->vcpu[v].parked)
            (void)pthread_kill(guest->vcpu[v].thread, VCPU_KICK); /* one that has ended hears nothing any more */
    }
}

static int conditions_init(struct guest *guest) {
    pthread_condattr_t monotonic;
    int problem = pthread_condattr_init(&monotonic);
    if (problem != 0)
        return problem;
    must(pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC));
    must(pthread_mutex_init(&guest->mutex, NULL)); /* these three cannot fail on Linux */
    must(pthread_cond_init(&guest->commanded, &monotonic));
    must(pthread_cond_init(&guest->arrived, &monotonic));
    must(pthread_condattr_destroy(&monotonic));
    return 0;
}

/* What the vCPUs do and find, but for where they stand; nothing is changed where the setup is out of range. */
static int guest_shape(struct guest *guest, const struct guest_setup *setup) {
    if (setup->blank_pages >= guest->memory.pages || setup->hole_pages > setup->blank_pages)
        return EINVAL;
    uint64_t active = guest->memory.pages - setup->blank_pages;
    struct order order;
    if (!order_init(&order, setup->workload, setup->vcpus, setup->seed, active, setup->stride,
                    setup->random_start != 0))
        return EINVAL;
    guest->order = order;
    content_init(&guest->content, setup->seed, setup->nonce, setup->vcpus, setup->workload == WORKLOAD_INCREMENT);
    guest->period_ns = setup->steps_per_second == 0 ? 0 : 1000000000u / setup->steps_per_second;
    guest->steps_max = GUEST_UNLIMITED;
    guest->memory.active_pages = active;
    guest->memory.hole_pages = setup->hole_pages;
    return 0;
}

/* Everything but the threads. */
static int guest_init(struct guest *guest, const struct guest_setup *setup, const struct guest_segment *segments,
                      uint32_t segment_count) {
    uint64_t pages = 0;
    for (uint32_t i = 0; i < segment_count; i++) {
        if (segments[i].pages == 0 || segments[i].pages > GUEST_PAGES_MAX)
            return EINVAL;
        pages += segments[i].pages;
    }
    guest->memory.pages = pages;
    int problem = guest_shape(guest, setup);
    if (problem != 0)
        return problem;
    guest->segments = calloc(segment_count, sizeof *segments);
    if (guest->segments == NULL)
        return ENOMEM;
    memcpy(guest->segments, segments, segment_count * sizeof *segments);
    guest->memory.segments = guest->segments;
    guest->memory.segment_count = segment_count;
    problem = conditions_init(guest);
    if (problem != 0)
        free(guest->segments);
    return problem;
}

static int vcpu_create(struct guest *guest, uint32_t index, const int *cpu) {
    struct vcpu *vcpu = &guest->vcpu[index];
    vcpu->guest = guest;
    vcpu->index = index;
    if (!order_seek(&guest->order, index, 0, 0, &vcpu->cursor))
        return EINVAL;
    pthread_attr_t attributes;
    int problem = pthread_attr_init(&attributes);
    if (problem != 0)
        return problem;
    problem = pthread_attr_setstacksize(&attributes, STACK_BYTES);
    if (problem == 0 && cpu != NULL) {
        cpu_set_t cpus;
        CPU_ZERO(&cpus);
        if (*cpu >= 0 && *cpu < CPU_SETSIZE)
            CPU_SET((size_t)*cpu, &cpus);
        problem = pthread_attr_setaffinity_np(&attributes, sizeof cpus, &cpus);
    }
    if (problem == 0)
        problem = pthread_create(&vcpu->thread, &attributes, vcpu_main, vcpu);
    must(pthread_attr_destroy(&attributes));
    return problem;
}

static bool all_parked(const struct guest *guest) {
    return guest->parked_count == guest->threads;
}

/* The mutex is held. */
static int wait_until(struct guest *guest, const uint32_t *count, uint64_t deadline_ns) {
    struct timespec deadline = timespec_of(deadline_ns);
    int problem = 0;
    while (*count != guest->threads && problem == 0)
        problem = pthread_cond_timedwait(&guest->arrived, &guest->mutex, &deadline);
    if (problem != 0 && problem != ETIMEDOUT)
        abort();
    return *count == guest->threads ? 0 : ETIMEDOUT;
}

int guest_create(const struct guest_setup *setup, const struct guest_segment *segments, uint32_t segment_count,
                 const int *cpus, struct guest **out) {
    if (setup->vcpus == 0 || setup->vcpus > GUEST_VCPUS_MAX)
        return EINVAL;
    size_t bytes = sizeof(struct guest) + setup->vcpus * sizeof(struct vcpu);
    struct guest *guest = aligned_alloc(CACHE_LINE, bytes);
    if (guest == NULL)
        return ENOMEM;
    memset(guest, 0, bytes);
    int problem = guest_init(guest, setup, segments, segment_count);
    if (problem != 0) {
        free(guest);
        return problem;
    }
    /* A signal is for the program, never for a vCPU; threads inherit this mask. */
    sigset_t all, before;
    must(sigfillset(&all));
    must(pthread_sigmask(SIG_SETMASK, &all, &before));
    while (problem == 0 && guest->threads < setup->vcpus) {
        problem = vcpu_create(guest, guest->threads, cpus == NULL ? NULL : &cpus[guest->threads]);
        guest->threads += problem == 0;
    }
    must(pthread_sigmask(SIG_SETMASK, &before, NULL));
    if (problem != 0) {
        /* Parked threads end at once. */
        must(guest_destroy(guest, GUEST_UNLIMITED));
        return problem;
    }
    must(pthread_mutex_lock(&guest->mutex));
    must(wait_until(guest, &guest->parked_count, GUEST_UNLIMITED));
    must(pthread_mutex_unlock(&guest->mutex));
    *out = guest;
    return 0;
}

/* Takes the mutex if no vCPU runs or may begin to; the caller unlocks. */
static int lock_stopped(struct guest *guest) {
    must(pthread_mutex_lock(&guest->mutex));
    bool stopped = all_parked(guest);
    for (uint32_t v = 0; v < guest->threads && command_now(guest) == COMMAND_RUN; v++)
        stopped = stopped && vcpu_rests(guest, &guest->vcpu[v]);
    if (!stopped)
        must(pthread_mutex_unlock(&guest->mutex));
    return stopped ? 0 : EBUSY;
}

/* Puts a parked vCPU before a step. */
static int vcpu_seek(struct vcpu *vcpu, uint64_t pass, uint64_t position) {
    const struct order *order = &vcpu->guest->order;
    struct cursor cursor;
    uint64_t steps;
    if (!order_seek(order, vcpu->index, pass, position, &cursor) ||
        __builtin_mul_overflow(pass, order->pass_steps, &steps) || __builtin_add_overflow(steps, position, &steps))
        return EINVAL;
    vcpu->cursor = cursor;
    atomic_store_explicit(&vcpu->steps_seeked, steps, memory_order_relaxed);
    atomic_store_explicit(&vcpu->steps, steps, memory_order_relaxed);
    if (vcpu->kvm.window != NULL)
        atomic_store_explicit(&vcpu->kvm.window->steps, steps, memory_order_relaxed);
    return 0;
}

/* Where a parked vCPU stands. The cursor of one that KVM runs is in its own registers; its steps say the same. */
static void vcpu_place(const struct order *order, const struct vcpu *vcpu, uint64_t *pass, uint64_t *position) {
    bool emulated = vcpu->kvm.window == NULL;
    *pass = emulated ? vcpu->cursor.pass : vcpu_steps(vcpu) / order->pass_steps;
    *position = emulated ? vcpu->cursor.position : vcpu_steps(vcpu) % order->pass_steps;
}

int guest_become(struct guest *guest, const struct guest_setup *setup) {
    if (setup->vcpus != guest->threads)
        return EINVAL;
    int problem = lock_stopped(guest);
    if (problem != 0)
        return problem;
    for (uint32_t v = 0; v < guest->threads && problem == 0; v++)
        problem = guest_accesses(guest, v) != 0 ? EBUSY : 0;
    if (problem == 0)
        problem = guest_shape(guest, setup);
    for (uint32_t v = 0; v < guest->threads && problem == 0; v++)
        problem = vcpu_seek(&guest->vcpu[v], 0, 0);
    must(pthread_mutex_unlock(&guest->mutex));
    return problem;
}

int guest_fill(struct guest *guest) {
    int problem = lock_stopped(guest);
    if (problem != 0)
        return problem;
    memory_fill(&guest->memory, &guest->content);
    must(pthread_mutex_unlock(&guest->mutex));
    return 0;
}

int guest_seek(struct guest *guest, uint32_t vcpu, uint64_t pass, uint64_t position) {
    if (vcpu >= guest->threads)
        return EINVAL;
    int problem = lock_stopped(guest);
    if (problem != 0)
        return problem;
    problem = vcpu_seek(&guest->vcpu[vcpu], pass, position);
    must(pthread_mutex_unlock(&guest->mutex));
    return problem;
}

int guest_read(struct guest *guest, uint32_t vcpu, uint64_t *pass, uint64_t *position) {
    if (vcpu >= guest->order.vcpus)
        return EINVAL;
    int problem = lock_stopped(guest);
    if (problem != 0)
        return problem;
    vcpu_place(&guest->order, &guest->vcpu[vcpu], pass, position);
    must(pthread_mutex_unlock(&guest->mutex));
    return 0;
}

int guest_limit(struct guest *guest, uint64_t steps_max) {
    int problem = lock_stopped(guest);
    if (problem != 0)
        return problem;
    guest->steps_max = steps_max;
    /* Who had parked at the old limit of a guest that was never stopped goes on now. */
    must(pthread_cond_broadcast(&guest->commanded));
    must(pthread_mutex_unlock(&guest->mutex));
    return 0;
}

int guest_start(struct guest *guest) {
    must(pthread_mutex_lock(&guest->mutex));
    bool ending = command_now(guest) == COMMAND_END;
    for (uint32_t v = 0; v < guest->threads && !ending; v++)
        atomic_store_explicit(&guest->vcpu[v].first_step_at, 0, memory_order_relaxed);
    if (!ending)
        command_give(guest, COMMAND_RUN);
    must(pthread_mutex_unlock(&guest->mutex));
    return ending ? EINVAL : 0;
}

int guest_stop(struct guest *guest, uint64_t deadline_ns) {
    must(pthread_mutex_lock(&guest->mutex));
    if (command_now(guest) == COMMAND_RUN)
        command_give(guest, COMMAND_PARK);
    kick(guest);
    int problem = wait_until(guest, &guest->parked_count, deadline_ns);
    must(pthread_mutex_unlock(&guest->mutex));
    return problem;
}

int guest_wait(struct guest *guest, uint64_t deadline_ns) {
    must(pthread_mutex_lock(&guest->mutex));
    int problem = 0;
    struct timespec deadline = timespec_of(deadline_ns);
    for (uint32_t v = 0; v < guest->threads && problem == 0; v++) {
        while (problem == 0 && !(guest->vcpu[v].parked && vcpu_rests(guest, &guest->vcpu[v])))
            problem = pthread_cond_timedwait(&guest->arrived, &guest->mutex, &deadline);
    }
    must(problem == ETIMEDOUT ? 0 : problem);
    must(pthread_mutex_unlock(&guest->mutex));
    return problem;
}

int guest_check(struct guest *guest, struct check **out) {
    int problem = lock_stopped(guest);
    if (problem != 0)
        return problem;
    struct check *check;
    problem = check_create(&guest->memory, &guest->content, &guest->order, &check);
    for (uint32_t v = 0; v < guest->order.vcpus && problem == 0; v++) {
        uint64_t pass, position;
        vcpu_place(&guest->order, &guest->vcpu[v], &pass, &position);
        problem = check_vcpu(check, v, pass, position);
        if (problem != 0)
            check_destroy(check);
    }
    must(pthread_mutex_unlock(&guest->mutex));
    if (problem == 0)
        *out = check;
    return problem;
}

int guest_destroy(struct guest *guest, uint64_t deadline_ns) {
    must(pthread_mutex_lock(&guest->mutex));
    command_give(guest, COMMAND_END);
    kick(guest);
    int problem = wait_until(guest, &guest->ended_count, deadline_ns);
    must(pthread_mutex_unlock(&guest->mutex));
    if (problem != 0)
        return problem;
    for (uint32_t v = 0; v < guest->threads; v++)
        must(pthread_join(guest->vcpu[v].thread, NULL));
    for (uint32_t v = 0; v < guest->threads; v++)
        vcpu_kvm_abandon(&guest->vcpu[v]);
    must(pthread_cond_destroy(&guest->arrived));
    must(pthread_cond_destroy(&guest->commanded));
    must(pthread_mutex_destroy(&guest->mutex));
    free(guest->segments);
    free(guest);
    return 0;
}

int guest_parked(struct guest *guest, uint32_t vcpu) {
    must(pthread_mutex_lock(&guest->mutex));
    bool parked = vcpu < guest->threads && guest->vcpu[vcpu].parked;
    must(pthread_mutex_unlock(&guest->mutex));
    return parked;
}

uint64_t guest_steps(const struct guest *guest, uint32_t vcpu) {
    return vcpu_steps(&guest->vcpu[vcpu]);
}

uint64_t guest_accesses(const struct guest *guest, uint32_t vcpu) {
    return guest_steps(guest, vcpu) - atomic_load_explicit(&guest->vcpu[vcpu].steps_seeked, memory_order_relaxed);
}

uint64_t guest_first_step_at(const struct guest *guest, uint32_t vcpu) {
    return atomic_load_explicit(&guest->vcpu[vcpu].first_step_at, memory_order_relaxed);
}

uint64_t guest_last_step_at(const struct guest *guest, uint32_t vcpu) {
    return atomic_load_explicit(&guest->vcpu[vcpu].last_step_at, memory_order_relaxed);
}

void guest_lose(struct guest *guest, const uint8_t *bits) {
    lost_begin();
    atomic_store_explicit(&guest->lost, bits, memory_order_release);
}

uint64_t guest_lost(const struct guest *guest, uint32_t vcpu) {
    return atomic_load_explicit(&guest->vcpu[vcpu].lost, memory_order_relaxed);
}

int guest_tid(const struct guest *guest, uint32_t vcpu) {
    return atomic_load_explicit(&guest->vcpu[vcpu].tid, memory_order_relaxed);
}

const void *guest_stall(const struct guest *guest, uint32_t vcpu) {
    const struct vcpu *one = &guest->vcpu[vcpu];
    return one->kvm.window != NULL ? &one->kvm.window->stall : &one->stall;
}

void guest_copy(void *to, const void *from, size_t bytes) {
    memcpy(to, from, bytes);
}

int guest_differs(const void *one, const void *other, size_t bytes) {
    return memcmp(one, other, bytes) != 0;
}
