/* See place.h. */
#define _GNU_SOURCE
#include "place.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

/* All these ioctls begin with a range and end with a signed count of bytes done or -errno. */
struct copy_argument {
    uint64_t destination, source, length, mode;
    int64_t done;
};
struct range_argument {
    uint64_t start, length, mode;
    int64_t done;
};
struct wake_argument {
    uint64_t start, length;
};

_Static_assert(sizeof(struct copy_argument) == 40, "struct uffdio_copy and struct uffdio_move");
_Static_assert(sizeof(struct range_argument) == 32, "struct uffdio_zeropage, _continue and _poison");
_Static_assert(sizeof(struct wake_argument) == 16, "struct uffdio_range");

ssize_t uffd_read(int uffd, struct uffd_message *messages, size_t count) {
    struct iovec room = {.iov_base = messages, .iov_len = count * sizeof *messages};
    ssize_t got = preadv2(uffd, &room, 1, -1, RWF_NOWAIT);
    if (got < 0 && (errno == EOPNOTSUPP || errno == ENOSYS))
        got = read(uffd, room.iov_base, room.iov_len);
    return got;
}

void uffd_unblock(int uffd) { (void)fcntl(uffd, F_SETFL, O_NONBLOCK); }

static int refused(struct placer *placer, uint32_t operation, int number) {
    placer->operation = operation;
    placer->number = number;
    return -1;
}

int place_wake(struct placer *placer, uint64_t address, uint64_t length) {
    struct wake_argument wake = {.start = address, .length = length};
    if (ioctl(placer->uffd, UFFD_IOC_WAKE, &wake) == 0 || errno == ESRCH)
        return 0;
    return refused(placer, UFFD_IOC_WAKE, errno);
}

static int64_t attempt(struct placer *placer, uint32_t operation, uint64_t address, const void *content,
                       uint64_t length) {
    /* The result field is cleared first: where the kernel fails early it leaves it as it was. */
    int result;
    int64_t done;
    if (operation == UFFD_IOC_COPY || operation == UFFD_IOC_MOVE) {
        struct copy_argument copy = {.destination = address, .source = (uint64_t)(uintptr_t)content, .length = length};
        result = ioctl(placer->uffd, operation, &copy);
        done = copy.done;
    } else {
        struct range_argument range = {.start = address, .length = length};
        result = ioctl(placer->uffd, operation, &range);
        done = range.done;
    }
    if (result == 0)
        return (int64_t)length;
    if (errno == EAGAIN && done > 0)
        return done;
    return -errno;
}

static int place(struct placer *placer, uint32_t operation, uint64_t address, const uint8_t *content,
                 uint64_t length, uint64_t page_size) {
    placer->done = 0;
    while (length) {
        int64_t done = attempt(placer, operation, address, content, length);
        if (operation == UFFD_IOC_MOVE && (done == -EBUSY || done == -EINVAL)) {
            hist_add(&placer->counters->outcome_busy, 1);
            done = attempt(placer, UFFD_IOC_COPY, address, content, page_size);
        }
        /* Of a run it may be some pages only that are not there any more: on, one at a time. */
        if (done == -ENOENT && placer->foreign && length > page_size)
            done = attempt(placer, operation, address, content, page_size);
        if (done == -EAGAIN) {
            hist_add(&placer->counters->outcome_retry, 1);
            return PLACE_CHANGING;
        }
        if (done == -ESRCH) {
            hist_add(&placer->counters->outcome_gone, 1);
            placer->gone = true;
            return 0;
        }
        if (done == -EFAULT && operation == UFFD_IOC_CONTINUE)
            return PLACE_HOLE;
        if (done == -EEXIST) {
            /* The first page is there already: nobody was woken for it. Go on behind it. */
            hist_add(&placer->counters->outcome_present, 1);
            placer->found = true;
            if (place_wake(placer, address, page_size))
                return -1;
            done = (int64_t)page_size;
        } else if (done == -ENOENT && placer->foreign) {
            hist_add(&placer->counters->outcome_gone, 1);
            done = (int64_t)page_size;
        } else if (done < 0) {
            return refused(placer, operation, (int)-done);
        } else {
            hist_add(&placer->counters->outcome_placed, 1);
            hist_add(&placer->counters->bytes_placed, operation == UFFD_IOC_POISON ? 0 : (uint64_t)done);
        }
        placer->done += (uint64_t)done;
        address += (uint64_t)done;
        content = content ? content + done : NULL;
        length -= (uint64_t)done;
    }
    return 0;
}

int place_copy(struct placer *placer, uint64_t address, const void *content, uint64_t length, uint64_t page_size) {
    return place(placer, UFFD_IOC_COPY, address, content, length, page_size);
}

int place_move(struct placer *placer, uint64_t address, void *content, uint64_t length, uint64_t page_size) {
    return place(placer, UFFD_IOC_MOVE, address, content, length, page_size);
}

int place_continue(struct placer *placer, uint64_t address, uint64_t length, uint64_t page_size) {
    return place(placer, UFFD_IOC_CONTINUE, address, NULL, length, page_size);
}

int place_poison(struct placer *placer, uint64_t address, uint64_t length, uint64_t page_size) {
    return place(placer, UFFD_IOC_POISON, address, NULL, length, page_size);
}

int place_zero(struct placer *placer, uint64_t address, uint64_t length, uint64_t page_size) {
    return place(placer, UFFD_IOC_ZEROPAGE, address, NULL, length, page_size);
}
