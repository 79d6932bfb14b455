/* vCPUs of KVM without Python, for the sanitizers: started, stopped, paced and ended over and over. Exit status 0. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"
#include "holds.h"

#define VCPUS 2u
#define PAGES 16u
/* Of the machine's own memory: the program at 0, then a window each. */
#define WINDOW_AT(vcpu) (0x2000u + (vcpu)*0x4000u)
#define MACHINE_BYTES 0x10000u

/* Real mode, its window at bx: counts a step, and calls when it has made as many as it may. */
static const uint8_t program[] = {
    0x66, 0xff, 0x07,       /* inc dword [bx] */
    0x66, 0x8b, 0x07,       /* mov eax, [bx] */
    0x66, 0x3b, 0x47, 0x08, /* cmp eax, [bx+8] */
    0x72, 0xf4,             /* jb the beginning */
    0xe6, 0xe9,             /* out 0xe9, al */
    0xeb, 0xf0,             /* jmp the beginning */
};

static uint64_t in_seconds(uint64_t seconds) {
    struct timespec now;
    HOLDS(clock_gettime(CLOCK_MONOTONIC, &now) == 0);
    return ((uint64_t)now.tv_sec + seconds) * 1000000000u + (uint64_t)now.tv_nsec;
}

static int make_vcpu(int machine, uint32_t number) {
    int vcpu = ioctl(machine, KVM_CREATE_VCPU, number);
    HOLDS(vcpu >= 0);
    struct kvm_sregs sregs;
    HOLDS(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
    sregs.cs.base = sregs.cs.selector = 0;
    HOLDS(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0);
    struct kvm_regs regs = {.rip = 0, .rflags = 2, .rbx = WINDOW_AT(number)};
    HOLDS(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
    return vcpu;
}

/* Runs until both vCPUs rest at `limit`, stopped by force on the way as often as they make it necessary. */
static void run_to(struct guest *guest, uint64_t limit) {
    HOLDS(guest_limit(guest, limit) == 0);
    for (int turn = 0; turn < 20; turn++) {
        HOLDS(guest_start(guest) == 0);
        HOLDS(guest_stop(guest, in_seconds(20)) == 0);
    }
    HOLDS(guest_start(guest) == 0);
    HOLDS(guest_wait(guest, in_seconds(20)) == 0);
    HOLDS(guest_stop(guest, in_seconds(20)) == 0);
    for (uint32_t v = 0; v < VCPUS; v++) {
        HOLDS(guest_steps(guest, v) >= limit && guest_trouble(guest, v) == 0);
        HOLDS(guest_last_step_at(guest, v) != 0 && guest_tid(guest, v) != 0);
    }
}

static void run_guest(int device, int machine, uint8_t *memory, const int *vcpus, uint64_t steps_per_second) {
    int run_bytes = ioctl(device, KVM_GET_VCPU_MMAP_SIZE, 0);
    static uint8_t content[PAGES * GUEST_PAGE_BYTES];
    struct guest_segment segment = {content, PAGES, -1, 0};
    struct guest_setup setup = {
        .workload = WORKLOAD_SEQUENTIAL, .vcpus = VCPUS, .stride = 1, .steps_per_second = steps_per_second};
    struct guest *guest;
    HOLDS(guest_create(&setup, &segment, 1, NULL, &guest) == 0);
    for (uint32_t v = 0; v < VCPUS; v++) {
        struct kvm_window *window = (void *)(memory + WINDOW_AT(v));
        HOLDS(guest_adopt(guest, v, vcpus[v], 16, window) == EINVAL);
        HOLDS(guest_adopt(guest, v, vcpus[v], (uint64_t)run_bytes, window) == 0);
        HOLDS(guest_adopt(guest, v, vcpus[v], (uint64_t)run_bytes, window) == EINVAL);
        HOLDS(guest_seek(guest, v, 0, 0) == 0 && guest_steps(guest, v) == 0);
    }
    HOLDS(guest_adopt(guest, VCPUS, machine, (uint64_t)run_bytes, (void *)memory) == EINVAL);
    struct kvm_block block;
    HOLDS(guest_block(guest, 1, 5, 0, &block) == 0 && block.steps == 5 && guest_block(guest, 9, 0, 0, &block) == EINVAL);
    run_to(guest, 10);
    run_to(guest, 20);
    HOLDS(guest_limit(guest, GUEST_UNLIMITED) == 0 && guest_start(guest) == 0);
    HOLDS(guest_destroy(guest, in_seconds(20)) == 0); /* while they run */
}

int main(void) {
    int device = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    HOLDS(device >= 0);
    int machine = ioctl(device, KVM_CREATE_VM, 0);
    HOLDS(machine >= 0);
    uint8_t *memory = mmap(NULL, MACHINE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    HOLDS(memory != MAP_FAILED);
    memcpy(memory, program, sizeof program);
    struct kvm_userspace_memory_region slot = {.memory_size = MACHINE_BYTES, .userspace_addr = (uintptr_t)memory};
    HOLDS(ioctl(machine, KVM_SET_USER_MEMORY_REGION, &slot) == 0);
    int vcpus[VCPUS];
    for (uint32_t v = 0; v < VCPUS; v++)
        vcpus[v] = make_vcpu(machine, v);
    run_guest(device, machine, memory, vcpus, 0);
    run_guest(device, machine, memory, vcpus, 1000);
    for (uint32_t v = 0; v < VCPUS; v++)
        close(vcpus[v]);
    munmap(memory, MACHINE_BYTES);
    close(machine);
    close(device);
    puts("ok");
    return 0;
}
