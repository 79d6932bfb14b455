/* The threads of a pump: named, deaf to signals (those are Python's), and their CPU time readable from outside. */
#ifndef POSTCOPY_THREAD_H
#define POSTCOPY_THREAD_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct thread {
    pthread_t id;
    void (*run)(void *);
    void *argument;
    bool started, joined;
    _Atomic uint64_t cpu_ns;    /* written by the thread as its last act */
    _Atomic uint64_t before_ns; /* of threads that this one follows */
};

/* Start a thread that calls `run(argument)`; the struct must outlive it. Again after a join. Returns 0 or -errno. */
int thread_start(struct thread *thread, const char *name, void (*run)(void *), void *argument);
/*
 * Ask the scheduler to let the calling thread in quickly when it wakes: a short slice, and a better nice value where
 * that is allowed. It asks for no more CPU time, and kernels that know nothing of it are no error.
 */
void thread_prefer(void);
/* Wait for its end. Idempotent, and nothing for a thread that was never started. */
void thread_join(struct thread *thread);
/* Nanoseconds of CPU so far; may be called at any time by the thread's owner. */
uint64_t thread_cpu_ns(const struct thread *thread);
/* Close a descriptor if it is one. */
void close_fd(int descriptor);
/* Make an eventfd readable. */
void signal_fd(int event_fd);

#endif
