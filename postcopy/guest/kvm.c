/* Running a vCPU by KVM. In: commands, through struct guest. Out: steps that the vCPU makes, seen through its window. */
#define _GNU_SOURCE
#include "kvm.h"

#include <errno.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "guest.h"
#include "vcpu.h"

/* The program was assembled with these (code.py). */
_Static_assert(offsetof(struct kvm_window, call_at) == 0x08, "rsi + 0x08");
_Static_assert(offsetof(struct kvm_window, stall_min_ticks) == 0x10, "rsi + 0x10");
_Static_assert(offsetof(struct kvm_window, tick_ns) == 0x18, "rsi + 0x18");
_Static_assert(offsetof(struct kvm_window, running_since) == 0x20, "rsi + 0x20");
_Static_assert(offsetof(struct kvm_window, stall) == 0x40, "rsi + 0x40");
_Static_assert(offsetof(struct kvm_block, key) == 0x08, "rbx + 0x08");
_Static_assert(offsetof(struct kvm_block, first) == 0x10, "rbx + 0x10");
_Static_assert(offsetof(struct kvm_block, pages) == 0x18, "rbx + 0x18");
_Static_assert(offsetof(struct kvm_block, stride) == 0x20, "rbx + 0x20");
_Static_assert(offsetof(struct kvm_block, addend) == 0x30, "rbx + 0x30");
_Static_assert(offsetof(struct kvm_block, vcpu) == 0x38, "rbx + 0x38");
_Static_assert(offsetof(struct kvm_block, stream_step) == 0x40, "rbx + 0x40");
_Static_assert(offsetof(struct kvm_block, stream_factor1) == 0x48, "rbx + 0x48");
_Static_assert(offsetof(struct kvm_block, stream_factor2) == 0x50, "rbx + 0x50");
_Static_assert(offsetof(struct kvm_block, order_key) == 0x58, "rbx + 0x58");
_Static_assert(offsetof(struct kvm_block, mask) == 0x60, "rbx + 0x60");
_Static_assert(offsetof(struct kvm_block, shift) == 0x68, "rbx + 0x68");
_Static_assert(offsetof(struct kvm_block, rounds) == 0x70, "rbx + 0x70");
_Static_assert(offsetof(struct kvm_block, flags) == 0xa0, "rbx + 0xa0");
_Static_assert(sizeof(struct kvm_block) <= GUEST_PAGE_BYTES, "a page each");

int guest_block(const struct guest *guest, uint32_t vcpu, uint64_t steps, uint64_t first, struct kvm_block *out) {
    const struct order *order = &guest->order;
    struct cursor cursor;
    if (!order_seek(order, vcpu, steps / order->pass_steps, steps % order->pass_steps, &cursor))
        return EINVAL;
    bool random = order->workload == WORKLOAD_RANDOM;
    *out = (struct kvm_block){
        .steps = steps,
        .key = guest->content.key,
        .first = first,
        .pages = order->pages,
        .stride = order->stride,
        .addend = vcpu * STREAM_STEP,
        .vcpu = vcpu,
        .stream_step = STREAM_STEP,
        .stream_factor1 = STREAM_FACTOR1,
        .stream_factor2 = STREAM_FACTOR2,
        .order_key = cursor.key,
        .mask = cursor.slots.mask,
        .shift = cursor.slots.shift,
        .flags = (random ? KVM_BLOCK_RANDOM : 0u) | (guest->content.bytes ? KVM_BLOCK_BYTES : 0u),
    };
    for (uint32_t round = 0; random && round < PERMUTATION_ROUNDS; round++)
        out->rounds[round] = (struct kvm_round){cursor.slots.add[round], cursor.slots.multiply[round]};
    return 0;
}

uint64_t guest_first_page(const struct guest *guest, uint32_t vcpu) {
    struct cursor cursor;
    return order_seek(&guest->order, vcpu, 0, 0, &cursor) ? cursor.page : 0;
}

uint32_t guest_trouble(const struct guest *guest, uint32_t vcpu) {
    return atomic_load_explicit(&guest->vcpu[vcpu].kvm.trouble, memory_order_relaxed);
}

uint64_t guest_trouble_at(const struct guest *guest, uint32_t vcpu) {
    return atomic_load_explicit(&guest->vcpu[vcpu].kvm.trouble_at, memory_order_relaxed);
}

#ifdef __x86_64__

#define MSR_TIME_STAMP 0x10u

int guest_adopt(struct guest *guest, uint32_t vcpu, int fd, uint64_t run_bytes, struct kvm_window *window) {
    if (vcpu >= guest->threads || run_bytes < sizeof(struct kvm_run) || guest->vcpu[vcpu].kvm.window != NULL)
        return EINVAL;
    /*
     * Blocked in the thread, the kick ends KVM_RUN alone, whenever it comes, and no handler is ever called. SIGBUS is
     * what KVM says of a page that is lost; unheard, it would try that page for ever.
     */
    struct {
        struct kvm_signal_mask head;
        uint64_t signals; /* as the kernel has them, not the C library */
    } __attribute__((packed)) mask = {.head.len = 8, .signals = ~(1ull << (VCPU_KICK - 1) | 1ull << (SIGBUS - 1))};
    if (ioctl(fd, KVM_SET_SIGNAL_MASK, &mask) != 0)
        return errno;
    void *run = mmap(NULL, run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (run == MAP_FAILED)
        return errno;
    must(pthread_mutex_lock(&guest->mutex));
    guest->vcpu[vcpu].kvm = (struct vcpu_kvm){.fd = fd, .run = run, .run_bytes = run_bytes, .window = window};
    must(pthread_mutex_unlock(&guest->mutex));
    return 0;
}

void vcpu_kvm_abandon(struct vcpu *vcpu) {
    if (vcpu->kvm.run != NULL)
        must(munmap(vcpu->kvm.run, vcpu->kvm.run_bytes));
    vcpu->kvm.run = NULL;
}

static void trouble_set(struct vcpu *vcpu, uint32_t trouble) {
    atomic_store_explicit(&vcpu->kvm.trouble, trouble, memory_order_relaxed);
}

/* Tells the program that what was before now is no stall. */
static void time_begin(struct vcpu *vcpu) {
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } msrs = {.head.nmsrs = 1, .entry.index = MSR_TIME_STAMP};
    if (ioctl(vcpu->kvm.fd, KVM_GET_MSRS, &msrs) == 1)
        atomic_store_explicit(&vcpu->kvm.window->running_since, msrs.entry.data, memory_order_relaxed);
    else
        trouble_set(vcpu, KVM_TROUBLE_ERRNO | (uint32_t)errno);
}

/* KVM_RUN comes back after every single instruction, or does not. */
static void single_steps(struct vcpu *vcpu, bool on) {
    struct kvm_guest_debug debug = {.control = on ? KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP : 0};
    vcpu->kvm.single = on;
    if (ioctl(vcpu->kvm.fd, KVM_SET_GUEST_DEBUG, &debug) != 0)
        trouble_set(vcpu, KVM_TROUBLE_ERRNO | (uint32_t)errno);
}

/* The first instruction since the start was made. */
static void first_made(struct vcpu *vcpu) {
    if (!vcpu->kvm.single)
        return;
    atomic_store_explicit(&vcpu->first_step_at, clock_ns(), memory_order_relaxed);
    single_steps(vcpu, false);
}

/* KVM completes an instruction that came out as an exit when it is entered again: so it is, and comes back at once. */
static void call_complete(struct vcpu *vcpu) {
    vcpu->kvm.run->immediate_exit = 1;
    if (ioctl(vcpu->kvm.fd, KVM_RUN, 0) != 0 && errno != EINTR)
        trouble_set(vcpu, KVM_TROUBLE_ERRNO | (uint32_t)errno);
    vcpu->kvm.run->immediate_exit = 0;
    vcpu->kvm.called = true;
}

/* A kick stays pending, and KVM_RUN would come back at once for ever: the stop that it was for may have been given up. */
static void signals_take(struct vcpu *vcpu) {
    sigset_t heard;
    must(sigemptyset(&heard));
    must(sigaddset(&heard, VCPU_KICK));
    must(sigaddset(&heard, SIGBUS));
    siginfo_t signal;
    for (int number; (number = sigtimedwait(&heard, &signal, &(struct timespec){0})) > 0;) {
        if (number != SIGBUS)
            continue;
        atomic_store_explicit(&vcpu->kvm.trouble_at, (uint64_t)(uintptr_t)signal.si_addr, memory_order_relaxed);
        trouble_set(vcpu, KVM_TROUBLE_LOST);
    }
}

static bool is_call(const struct kvm_run *run) {
    return run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_OUT && run->io.port == KVM_CALL_PORT;
}

/* Once into the guest and out again. */
static void kvm_run_once(struct vcpu *vcpu) {
    struct kvm_run *run = vcpu->kvm.run;
    vcpu->kvm.called = false;
    int problem = ioctl(vcpu->kvm.fd, KVM_RUN, 0) == 0 ? 0 : errno;
    uint64_t now = clock_ns();
    if (!vcpu->kvm.single)
        atomic_store_explicit(&vcpu->last_step_at, now, memory_order_relaxed);
    if (problem == EINTR) {
        signals_take(vcpu);
    } else if (problem == EAGAIN) {
        return;
    } else if (problem != 0) {
        trouble_set(vcpu, KVM_TROUBLE_ERRNO | (uint32_t)problem);
    } else if (run->exit_reason == KVM_EXIT_DEBUG) {
        first_made(vcpu);
        atomic_store_explicit(&vcpu->last_step_at, now, memory_order_relaxed);
    } else if (is_call(run)) {
        call_complete(vcpu);
        first_made(vcpu);
    } else if (run->exit_reason != KVM_EXIT_INTR) {
        if (run->exit_reason == KVM_EXIT_MMIO)
            atomic_store_explicit(&vcpu->kvm.trouble_at, run->mmio.phys_addr, memory_order_relaxed);
        trouble_set(vcpu, run->exit_reason);
    }
}

/* When the program is to call: at the guest's limit, or, where steps are paced, after the next one. */
static uint64_t next_call(const struct guest *guest, const struct vcpu *vcpu) {
    if (guest->period_ns == 0)
        return guest->steps_max;
    uint64_t next = vcpu_steps(vcpu) + vcpu->kvm.called;
    return next < guest->steps_max ? next : guest->steps_max;
}

void vcpu_run_kvm(struct guest *guest, struct vcpu *vcpu) {
    uint64_t now = clock_ns(), due = now;
    single_steps(vcpu, true);
    time_begin(vcpu);
    while (command_now(guest) == COMMAND_RUN && !vcpu_rests(guest, vcpu)) {
        if (guest->period_ns != 0 && vcpu->kvm.called) {
            now = vcpu_pace(guest, now, &due);
            if (command_now(guest) != COMMAND_RUN)
                break;
            time_begin(vcpu);
        }
        atomic_store_explicit(&vcpu->kvm.window->call_at, next_call(guest, vcpu), memory_order_relaxed);
        kvm_run_once(vcpu);
        now = clock_ns();
    }
    if (vcpu->kvm.single)
        single_steps(vcpu, false);
}

#else

int guest_adopt(struct guest *guest, uint32_t vcpu, int fd, uint64_t run_bytes, struct kvm_window *window) {
    (void)guest, (void)vcpu, (void)fd, (void)run_bytes, (void)window;
    return ENOSYS;
}

void vcpu_kvm_abandon(struct vcpu *vcpu) {
    (void)vcpu;
}

void vcpu_run_kvm(struct guest *guest, struct vcpu *vcpu) {
    (void)guest, (void)vcpu;
}

#endif
