/*
 * Every queue, frame and count of the pump that has an end, with the reason beside each. What is a limit of the protocol
 * as well is compared with postcopy/wire/limits.py by a test.
 */
#ifndef POSTCOPY_PUMP_LIMITS_H
#define POSTCOPY_PUMP_LIMITS_H

/* --- frames: what the other agent may say --------------------------------------------------------------------------- */

/* The most payload one frame carries where pages are smaller than this; a larger page travels alone. */
#define FRAME_BYTES_MAX (2u << 20)
/* A fixed table of them is part of each pump; a guest's memory has a handful. */
#define PUMP_REGIONS_MAX 64u

/* --- the destination ------------------------------------------------------------------------------------------------ */

/*
 * Faults accounted at a time. A thread has one fault at most, so this bounds the threads served at once, not the
 * work; while it is full no further message is read and those threads wait in the kernel's queue.
 */
#define PENDING_MAX 1024u
/* Messages of a userfaultfd read by one call: 2 KiB of stack, and more than vCPUs fault between two looks. */
#define MESSAGES_MAX 64u
/* Other processes that map the guest's files, in the life of one pump: backends of devices, one or two queues each. */
#define PUMP_VIEWS_MAX 16u
/* Bytes read beyond the header being waited for, so that a demand page comes with one system call. */
#define READ_AHEAD 4096u
/* A claimed run is placed once it is this long, so that a page early in a frame does not wait for the whole of it. */
#define RUN_BYTES_MAX (256u << 10)
/* Where events are told of, the push places no more than this at a time: the thread that reads them waits for it. */
#define GATE_BYTES_MAX (64u << 10)
/*
 * For so long nothing could be placed because the mappings were changing: that is not coming to an end. It may take a
 * thread of the guest to end it, and a machine with more to do than CPUs lets that wait for seconds.
 */
#define CHANGES_NS_MAX 20000000000u
/* How long it is tried again at once after something was read that stood against it; else there is a sleep between. */
#define CHANGES_SPIN_NS 200000u
#define CHANGES_SLEEP_NS 50000u
/* The same for memory that is not the guest's own, which others are not to wait for: views, a child that was forked. */
#define OTHERS_NS_MAX 100000000u

/* --- the source ----------------------------------------------------------------------------------------------------- */

/* Requests answered with one system call; none is read while answers wait, so the destination cannot pile them up. */
#define ANSWERS_MAX 64u
/* Where content is read from a file: as many bytes of answers are made at a time, at least one page. */
#define ANSWERS_BYTES_MAX (2u << 20)
/*
 * A request for a page that the push has sent already: up to this size it is sent once more, ahead of whatever the
 * push connection still holds; the destination drops the copy that comes second. A larger page is not worth twice
 * its time on the wire.
 */
#define AGAIN_BYTES_MAX 65536u
/* Extents that the owner may queue ahead: the push is planned while it runs, so this is far more than it needs. */
#define PUMP_RING_EXTENTS 4096u

#endif
