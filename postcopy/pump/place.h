/*
 * Placing: the userfaultfd ioctls that make page content present and wake whoever waits, with outcomes for results.
 *
 * The constants are the kernel's ABI, defined here because Debian 12's header predates some of them.
 */
#ifndef POSTCOPY_PLACE_H
#define POSTCOPY_PLACE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "pump.h"

#define UFFD_IOC_WAKE 0x8010AA02u
#define UFFD_IOC_COPY 0xC028AA03u
#define UFFD_IOC_MOVE 0xC028AA05u
#define UFFD_IOC_ZEROPAGE 0xC020AA04u
#define UFFD_IOC_CONTINUE 0xC020AA07u
#define UFFD_IOC_POISON 0xC020AA08u
#define FILE_ALLOCATE 1u /* none of a userfaultfd: fallocate(2) */
#define UFFD_EVENT_PAGEFAULT 0x12
#define UFFD_EVENT_FORK 0x13   /* the child's userfaultfd stands where a fault has flags */
#define UFFD_EVENT_REMOVE 0x15 /* start and end stand where a fault has flags and address */
#define UFFD_EVENT_UNMAP 0x16  /* the same */
#define UFFD_FAULT_WP 2u
#define UFFD_FAULT_MINOR 4u

struct uffd_message {
    uint8_t event;
    uint8_t reserved[7];
    uint64_t flags;
    uint64_t address;
    uint32_t thread;
    uint32_t padding;
};

_Static_assert(sizeof(struct uffd_message) == 32, "struct uffd_msg");

enum outcome { OUTCOME_PLACED = 0, OUTCOME_PRESENT = 1, OUTCOME_RETRY = 2, OUTCOME_GONE = 3 };

/*
 * Read the messages that wait: bytes, or -1 with errno, EAGAIN where none does. It does not wait for one, whatever
 * another holder of the same userfaultfd made of its O_NONBLOCK; before Linux 6.10 that alone decides.
 */
ssize_t uffd_read(int uffd, struct uffd_message *messages, size_t count);
/* Another holder took O_NONBLOCK away, and poll() is of no use without it: set it again. */
void uffd_unblock(int uffd);

/* What placing needs to know and where it counts. `operation` and `number` tell of a failure. */
struct placer {
    int uffd;
    struct destination_channel *counters;
    uint32_t operation;
    int number;
    bool found; /* set where a page was there already */
    bool gone;  /* set where the address space is ending */
    bool foreign;  /* another process's memory: it may take mappings away as it likes, which is no failure of ours */
    uint64_t done; /* bytes of the latest call that are present now */
};

/* Nothing more can be placed just now: the mappings are changing, maybe until somebody reads the events that tell of it. */
#define PLACE_CHANGING 1
/* The file has no page where CONTINUE wants to map one: the guest gave it back. placer->done bytes are present. */
#define PLACE_HOLE 2

/*
 * Each places `length` bytes at `address` and wakes the waiters. 0: all of it is present now, whoever placed it.
 * -1: the kernel refused; placer->operation and ->number say what. GONE (the address space is ending; of a foreign one
 * also that it has unmapped the page or traps it no more) counts as done.
 * PLACE_CHANGING, PLACE_HOLE: placer->done bytes are present, the others are not.
 */
int place_copy(struct placer *placer, uint64_t address, const void *content, uint64_t length, uint64_t page_size);
/*
 * Gives the pages at `content`, private anonymous memory of this process, to `address`: they are holes afterwards. A
 * page that the kernel will not move is copied: one that is pinned, shared by a fork or merged (BUSY), or any where the
 * memory is locked on one side only (EINVAL).
 */
int place_move(struct placer *placer, uint64_t address, void *content, uint64_t length, uint64_t page_size);
int place_continue(struct placer *placer, uint64_t address, uint64_t length, uint64_t page_size);
int place_zero(struct placer *placer, uint64_t address, uint64_t length, uint64_t page_size);
int place_wake(struct placer *placer, uint64_t address, uint64_t length);
/* Marks what is missing of the range as lost, as place_zero() would fill it: whoever touches such a page gets SIGBUS. */
int place_poison(struct placer *placer, uint64_t address, uint64_t length, uint64_t page_size);

#endif
