/* See thread.h. */
#define _GNU_SOURCE
#include "thread.h"

#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static uint64_t clock_ns(clockid_t clock) {
    struct timespec used;
    if (clock_gettime(clock, &used))
        return 0;
    return (uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec;
}

static void *body(void *argument) {
    struct thread *thread = argument;
    thread->run(thread->argument);
    atomic_store(&thread->cpu_ns, clock_ns(CLOCK_THREAD_CPUTIME_ID));
    return NULL;
}

int thread_start(struct thread *thread, const char *name, void (*run)(void *), void *argument) {
    if (thread->joined) {
        atomic_fetch_add(&thread->before_ns, atomic_exchange(&thread->cpu_ns, 0));
        thread->started = thread->joined = false;
    }
    thread->run = run;
    thread->argument = argument;
    /* A thread inherits the mask of its creator: block everything around the creation. */
    sigset_t all, before;
    sigfillset(&all);
    int result = pthread_sigmask(SIG_SETMASK, &all, &before);
    if (result)
        return -result;
    int created = pthread_create(&thread->id, NULL, body, thread);
    result = pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (created)
        return -created;
    thread->started = true;
    pthread_setname_np(thread->id, name); /* too long a name is refused, and harmless */
    return -result;
}

struct scheduling {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};

_Static_assert(sizeof(struct scheduling) == 48, "struct sched_attr, first version");

void thread_prefer(void) {
    /* From Linux 6.12 on, runtime is the slice of an ordinary thread; 0.1 ms is the shortest there is. */
    struct scheduling wish = {.size = sizeof wish, .nice = -10, .runtime = 100000};
    if (syscall(SYS_sched_setattr, 0, &wish, 0) == 0)
        return;
    wish.nice = 0;
    if (syscall(SYS_sched_setattr, 0, &wish, 0) != 0)
        return; /* an older kernel: served as any other thread is */
}

void thread_join(struct thread *thread) {
    if (!thread->started || thread->joined)
        return;
    pthread_join(thread->id, NULL);
    thread->joined = true;
}

uint64_t thread_cpu_ns(const struct thread *thread) {
    uint64_t finished = atomic_load(&thread->cpu_ns), before = atomic_load(&thread->before_ns);
    clockid_t clock;
    if (finished || !thread->started || thread->joined || pthread_getcpuclockid(thread->id, &clock))
        return before + finished;
    uint64_t running = clock_ns(clock);
    return before + (running ? running : atomic_load(&thread->cpu_ns));
}

void close_fd(int descriptor) {
    if (descriptor >= 0)
        close(descriptor);
}

void signal_fd(int event_fd) {
    /* An eventfd refuses only when its counter is full, and then it is readable as it should be. */
    uint64_t one = 1;
    ssize_t written = write(event_fd, &one, sizeof one);
    (void)written;
}
