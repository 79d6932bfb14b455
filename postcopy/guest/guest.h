/*
 * The emulated guest: vCPU threads that write to memory, with a clock of their own.
 *
 * Ownership: guest_create copies the setup and the table of segments; the memory and the descriptors behind the
 * segments stay the caller's and must outlive the guest. guest_create starts the threads, parked; they run between
 * guest_start and guest_stop (or until their limit) and never touch anything of the caller's but that memory.
 * guest_destroy joins them. A thread that waits in a page fault cannot be stopped by anybody: the calls that wait for
 * threads take a deadline, after which nothing is freed and the call may be repeated.
 *
 * Calls are made by one thread at a time, but for the readings (guest_steps … guest_stall), which anybody may take at
 * any moment. Functions return 0 or an errno. Times are nanoseconds of CLOCK_MONOTONIC.
 */
#ifndef POSTCOPY_GUEST_GUEST_H
#define POSTCOPY_GUEST_GUEST_H

#include <stddef.h>
#include <stdint.h>

#include "check.h"
#include "content.h"
#include "kvm.h"

/* An access that took this long is a stall and is recorded. Shorter ones are the memory's own business: a cache and
 * TLB miss is 0.1 to 0.3 us, while the fastest fault that anybody serves from user space takes about 3 us. */
#define STALL_MIN_NS 1000u

#define GUEST_UNLIMITED UINT64_MAX

struct guest;

struct guest_setup {
    uint32_t workload; /* enum workload */
    uint32_t vcpus;    /* 1..GUEST_VCPUS_MAX */
    uint64_t seed;
    uint64_t nonce;
    uint64_t blank_pages;      /* at the end, not visited */
    uint64_t hole_pages;       /* the first of the blank ones: never written */
    uint64_t stride;           /* see struct order */
    uint32_t random_start;     /* sequential, stride: begin at a page of the seed's choice */
    uint64_t steps_per_second; /* of each vCPU, 0: as fast as it can */
};

/* `cpus`, if not NULL, has one CPU number per vCPU and pins its thread. EINVAL: setup out of range or CPU not ours. */
int guest_create(const struct guest_setup *setup, const struct guest_segment *segments, uint32_t segment_count,
                 const int *cpus, struct guest **out);
/* Frees all and returns 0, or ETIMEDOUT with every thread told to end and nothing freed. */
int guest_destroy(struct guest *guest, uint64_t deadline_ns);

/* EBUSY while running, from here to guest_read. */
/* Be a guest of another setup, which has not begun, with as many vCPUs on the same memory: the threads are there
 * already. EBUSY once a step was made here; EINVAL, and nothing changed: setup out of range. */
int guest_become(struct guest *guest, const struct guest_setup *setup);
int guest_fill(struct guest *guest);
/* Continue at this step; guest_read says where the vCPU stands. */
int guest_seek(struct guest *guest, uint32_t vcpu, uint64_t pass, uint64_t position);
int guest_read(struct guest *guest, uint32_t vcpu, uint64_t *pass, uint64_t *position);
/* Each vCPU parks by itself when it has done that many steps in all; GUEST_UNLIMITED to lift it. */
int guest_limit(struct guest *guest, uint64_t steps_max);

int guest_start(struct guest *guest);
/* 0: every vCPU is parked between two steps. ETIMEDOUT: some are not yet, but will park instead of a next step. */
int guest_stop(struct guest *guest, uint64_t deadline_ns);
/* Waits until all have parked by themselves at their limit: 0 or ETIMEDOUT. */
int guest_wait(struct guest *guest, uint64_t deadline_ns);
int guest_parked(struct guest *guest, uint32_t vcpu);

uint64_t guest_steps(const struct guest *guest, uint32_t vcpu);
uint64_t guest_accesses(const struct guest *guest, uint32_t vcpu); /* steps done here, not before guest_seek */
uint64_t guest_first_step_at(const struct guest *guest, uint32_t vcpu); /* end of the first step since start, or 0 */
uint64_t guest_last_step_at(const struct guest *guest, uint32_t vcpu);  /* end of the latest step here, or 0 */
int guest_tid(const struct guest *guest, uint32_t vcpu);
/*
 * Flat pages whose bit is set (as for check_range) may be poisoned from now on: their content never came, and the kernel
 * answers SIGBUS in its place. To an emulated vCPU that is a machine check: the step counts, nothing of it is written,
 * and the vCPU goes on with its next one. The bits stay the caller's and must outlive the guest. The process gets a handler
 * of SIGBUS for that, which passes on what is no vCPU's access to such a page.
 */
void guest_lose(struct guest *guest, const uint8_t *bits);
/* Steps that met such a page. */
uint64_t guest_lost(const struct guest *guest, uint32_t vcpu);
/* A struct hist of GUEST_STALL_BYTES, valid until guest_destroy. */
const void *guest_stall(const struct guest *guest, uint32_t vcpu);
extern const size_t GUEST_STALL_BYTES;

/* memcpy and memcmp, for memory of the guest: whoever calls them may wait for a page. */
void guest_copy(void *to, const void *from, size_t bytes);
int guest_differs(const void *one, const void *other, size_t bytes);

/* Works out how often each page was visited, ready for check_range (check.h); EBUSY while running. The guest must stay
 * stopped, and must not be destroyed, until check_destroy. */
int guest_check(struct guest *guest, struct check **out);

#endif
