/*
 * A vCPU that KVM runs, in place of one that is emulated.
 *
 * Ownership: the descriptor of the vCPU and its window stay the caller's and must outlive the guest; the mapping of
 * struct kvm_run is made here and goes with the guest. What the vCPU runs (postcopy/guest/kvm/code.py) keeps its
 * numbers in a block of the migrated memory and shows what the host may want to know at any time in its window, which
 * is the host's own memory: a reading never touches a page that may be missing.
 */
#ifndef POSTCOPY_GUEST_KVM_H
#define POSTCOPY_GUEST_KVM_H

#include <stdint.h>

#include "histogram.h"
#include "workload.h"

/* The port to which the program writes when it has made as many steps as it may. */
#define KVM_CALL_PORT 0xe9u

/* What host and program say to each other; one each vCPU. It does not migrate: nothing in it is needed to go on. */
struct kvm_window {
    _Atomic uint64_t steps;         /* program: steps made */
    _Atomic uint64_t call_at;       /* host: steps at which the program calls, between two of them */
    uint64_t stall_min_ticks;       /* host: an access of so many ticks of the time stamp counter is a stall */
    uint64_t tick_ns;               /* host: nanoseconds of a tick, 32 bits behind the point */
    _Atomic uint64_t running_since; /* host: the time stamp at which the vCPU was let go on */
    uint64_t unused[3];
    struct hist stall; /* program */
};

/* The block: what the program computes with, one page of the migrated memory each vCPU. */
struct kvm_block {
    uint64_t steps;          /* program, in each step; all else but `rounds` never changes */
    uint64_t key;            /* of the content */
    uint64_t first;          /* where page 0 of the content lies */
    uint64_t pages;          /* that are visited */
    uint64_t stride;         /* in pages */
    uint64_t unused;         /* 0 */
    uint64_t addend;         /* vcpu * STREAM_STEP */
    uint64_t vcpu;           /* its number */
    uint64_t stream_step;    /* the generator's constants */
    uint64_t stream_factor1;
    uint64_t stream_factor2;
    uint64_t order_key;      /* of this vCPU's passes */
    uint64_t mask;           /* of a permutation of so many pages */
    uint64_t shift;
    struct kvm_round {
        uint64_t add, multiply;
    } rounds[PERMUTATION_ROUNDS]; /* program, at the end of a pass in random order */
    uint64_t flags;               /* KVM_BLOCK_ */
};

#define KVM_BLOCK_RANDOM 1u /* the order is another one in each pass */
#define KVM_BLOCK_BYTES 2u  /* increment */

struct guest;
struct vcpu;

/* The block of a vCPU that stands between two steps, `steps` made; `first` is where the content's page 0 lies. EINVAL:
 * no such vCPU. */
int guest_block(const struct guest *guest, uint32_t vcpu, uint64_t steps, uint64_t first, struct kvm_block *out);
/* The page that an order other than random begins with. */
uint64_t guest_first_page(const struct guest *guest, uint32_t vcpu);

/* From now on this vCPU is run by KVM. While parked only, and before guest_seek. `run_bytes` is what
 * KVM_GET_VCPU_MMAP_SIZE says. ENOSYS where KVM vCPUs are of another architecture than the program. */
int guest_adopt(struct guest *guest, uint32_t vcpu, int fd, uint64_t run_bytes, struct kvm_window *window);
/* Why a vCPU cannot go on: KVM's exit reason, or an errno of KVM_RUN above KVM_TROUBLE_ERRNO; 0: it can. */
#define KVM_TROUBLE_ERRNO 0x10000u
/* Above it: the vCPU touched a page that is lost, and the kernel sent SIGBUS for the address in guest_trouble_at(). */
#define KVM_TROUBLE_LOST 0x20000u
uint32_t guest_trouble(const struct guest *guest, uint32_t vcpu);
/* Of KVM_EXIT_MMIO the guest's physical address, of KVM_TROUBLE_LOST that of this process. */
uint64_t guest_trouble_at(const struct guest *guest, uint32_t vcpu);

#endif
