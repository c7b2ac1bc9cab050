/* A pool of POSIX threads that share the work of calls.

   A call, here a job, covers range(n) in pieces. The pieces are dealt out in as many shares as threads may
   take part. Each thread begins with a share of its own, the same one in every call of a kind, so that it
   finds what it read last time in its core's cache; when that is used up it takes pieces of the other
   shares, so that a slow core does not decide when the call ends. A piece is taken by adding 1 to an
   atomic counter.

   The caller works too and waits for nobody but the threads that are in the middle of a piece when none is
   left to be taken. Jobs of several callers are open side by side; a worker without work joins the first
   that can take one more.

   A worker that finds no job spins for DQ_SPIN_NS, which spares the next call a system call on both sides,
   and then sleeps. Workers are started when more are asked for at one time than there are. They are never
   stopped: they hold no resource, touch static memory only, and end with the process. A forked child
   begins without any.

   Include it in one source file only, for its state is static. */
#ifndef DQ_POOL_H
#define DQ_POOL_H

#include <stddef.h>

#ifndef DQ_HAS_POOL
#if defined(_WIN32) || defined(__wasm__) || defined(__STDC_NO_ATOMICS__)
#define DQ_HAS_POOL 0
#else
#define DQ_HAS_POOL 1
#endif
#endif

/* Does range(first, end) of the work; returns 0 if the rest of it need not be done any more. It runs in
   any thread, several times at once. */
typedef int (*dq_work)(void *context, ptrdiff_t first, ptrdiff_t end);

/* Upper bound of the shares of a job, and so of its threads. Their counters are on the caller's stack, a cache line each. */
enum { DQ_MAX_THREADS = 256 };

#if DQ_HAS_POOL

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

/* About what the two system calls of sleeping and waking cost. */
#define DQ_SPIN_NS 30000

/* Kernels keep up to 100 KiB of scratch on the stack; musl's own default is 128 KiB. */
#define DQ_STACK_BYTES (1 << 20)

typedef struct {
    _Alignas(64) atomic_ptrdiff_t next; /* the piece to be taken */
} dq_share;

typedef struct dq_job {
    dq_work work;
    void *context;
    ptrdiff_t n, piece, pieces;
    int threads, joined;  /* at most, the caller among them; so far. `joined` is under the lock */
    int waiting;          /* under the lock: the caller sleeps until nobody is inside */
    atomic_int inside;    /* workers that have not left it; changed under the lock only */
    atomic_int wanted;    /* 0 after a piece has returned 0 */
    struct dq_job *other; /* the next in the list, under the lock */
    dq_share shares[DQ_MAX_THREADS];
} dq_job;

/* All but `vacancies` and `spinning` is read and written under the lock. */
typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t opened, left;
    dq_job *jobs;         /* those whose callers look for help, the oldest first */
    atomic_int vacancies; /* threads that these jobs could still take; spinning workers watch it */
    atomic_int spinning;  /* workers that would begin at once */
    int workers, busy;
} dq_pool_state;

#define DQ_NEW_POOL                                                                                \
    {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, 0, 0, 0, 0}

static dq_pool_state dq_pool = DQ_NEW_POOL;
static pthread_once_t dq_pool_once = PTHREAD_ONCE_INIT;

static inline void dq_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
    __asm__ volatile("yield");
#endif
}

static long long dq_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Until *value is 0, or is not 0, but not for longer than DQ_SPIN_NS. Where processors are short, others
   come first: the caller itself may wait for this one. */
static void dq_spin_until(atomic_int *value, int zero) {
    const long long end = dq_now_ns() + DQ_SPIN_NS;
    do {
        for (int i = 0; i < 16; i++) {
            if ((atomic_load_explicit(value, memory_order_acquire) == 0) == zero) return;
            dq_pause();
        }
        sched_yield();
    } while (dq_now_ns() < end);
}

/* Take pieces until none is left: those of the share `own` first. */
static void dq_do_pieces(dq_job *job, int own) {
    for (int i = 0; i < job->threads; i++) {
        const int share = (own + i) % job->threads;
        const ptrdiff_t end = job->pieces * (share + 1) / job->threads;
        while (atomic_load_explicit(&job->wanted, memory_order_relaxed)) {
            atomic_ptrdiff_t *next = &job->shares[share].next;
            const ptrdiff_t piece = atomic_fetch_add_explicit(next, 1, memory_order_relaxed);
            const ptrdiff_t first = piece * job->piece;
            if (piece >= end) break;
            if (!job->work(job->context, first, job->n - first < job->piece ? job->n : first + job->piece))
                atomic_store_explicit(&job->wanted, 0, memory_order_relaxed);
        }
    }
}

/* Nobody can join the job any more. With the lock. */
static void dq_close(dq_job *job) {
    atomic_fetch_sub_explicit(&dq_pool.vacancies, job->threads - job->joined, memory_order_relaxed);
    job->joined = job->threads;
}

/* How many sleepers to wake to fill all vacancies; each of them wakes more, so that waking many
   does not keep the caller from its work. With the lock. */
static int dq_to_wake(void) {
    const int spinning = atomic_load_explicit(&dq_pool.spinning, memory_order_relaxed);
    const int missing = atomic_load_explicit(&dq_pool.vacancies, memory_order_relaxed) - spinning;
    const int asleep = dq_pool.workers - dq_pool.busy - spinning;
    const int wake = missing < asleep ? missing : asleep;
    return wake < 2 ? wake : 2;
}

/* Call it without the lock: the threads that wake up need that at once. */
static void dq_wake(int n) {
    while (n-- > 0) pthread_cond_signal(&dq_pool.opened);
}

/* Join a job, work on it, leave it. The lock is held on entry and on return. */
static void dq_help(dq_job *job) {
    const int own = job->joined++;
    atomic_fetch_sub_explicit(&dq_pool.vacancies, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&job->inside, 1, memory_order_relaxed);
    dq_pool.busy++;
    const int wake = dq_to_wake();
    pthread_mutex_unlock(&dq_pool.lock);
    dq_wake(wake);
    dq_do_pieces(job, own);
    pthread_mutex_lock(&dq_pool.lock);
    dq_pool.busy--;
    dq_close(job);
    /* The caller may return, and the job be gone, as soon as nobody is inside. */
    const int waiting = job->waiting;
    if (atomic_fetch_sub_explicit(&job->inside, 1, memory_order_release) == 1 && waiting)
        pthread_cond_broadcast(&dq_pool.left);
}

static void *dq_worker(void *unused) {
    (void)unused;
#ifdef __linux__
    pthread_setname_np(pthread_self(), "dynquant");
#endif
    int helped = 0;
    pthread_mutex_lock(&dq_pool.lock);
    for (;;) {
        dq_job *job = dq_pool.jobs;
        while (job != NULL && job->joined == job->threads) job = job->other;
        if (job != NULL) {
            dq_help(job);
            helped = 1;
        } else if (helped) {
            helped = 0;
            atomic_fetch_add_explicit(&dq_pool.spinning, 1, memory_order_relaxed);
            pthread_mutex_unlock(&dq_pool.lock);
            dq_spin_until(&dq_pool.vacancies, 0);
            pthread_mutex_lock(&dq_pool.lock);
            atomic_fetch_sub_explicit(&dq_pool.spinning, 1, memory_order_relaxed);
        } else {
            pthread_cond_wait(&dq_pool.opened, &dq_pool.lock);
        }
    }
    return NULL;
}

/* Start workers until `wanted` are free; fewer where the system has no more. With the lock. */
static void dq_start_workers(int wanted) {
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t signals, before;
    if (dq_pool.workers - dq_pool.busy >= wanted || pthread_attr_init(&attributes)) return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, DQ_STACK_BYTES);
    /* Signals are for the program's own threads, but those that a thread brings upon itself. */
    sigfillset(&signals);
    sigdelset(&signals, SIGSEGV);
    sigdelset(&signals, SIGBUS);
    sigdelset(&signals, SIGFPE);
    sigdelset(&signals, SIGILL);
    pthread_sigmask(SIG_SETMASK, &signals, &before);
    while (dq_pool.workers - dq_pool.busy < wanted && dq_pool.workers < DQ_MAX_THREADS - 1) {
        if (pthread_create(&thread, &attributes, dq_worker, NULL)) break;
        dq_pool.workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

/* A fork is to find the pool between two changes. The child has none of the workers, and none of the other
   callers whose jobs there may be. */
static void dq_before_fork(void) { pthread_mutex_lock(&dq_pool.lock); }

static void dq_after_fork(void) { pthread_mutex_unlock(&dq_pool.lock); }

static void dq_after_fork_in_child(void) {
    const dq_pool_state fresh = DQ_NEW_POOL;
    dq_pool = fresh;
}

static void dq_prepare_forks(void) { pthread_atfork(dq_before_fork, dq_after_fork, dq_after_fork_in_child); }

/* Put the job at the end of the list, and see to it that there are workers for it. */
static void dq_open(dq_job *job) {
    dq_job **end = &dq_pool.jobs;
    pthread_mutex_lock(&dq_pool.lock);
    dq_start_workers(job->threads - 1);
    while (*end != NULL) end = &(*end)->other;
    *end = job;
    atomic_fetch_add_explicit(&dq_pool.vacancies, job->threads - 1, memory_order_relaxed);
    const int wake = dq_to_wake();
    pthread_mutex_unlock(&dq_pool.lock);
    dq_wake(wake);
}

/* Take the job out of the list, and wait until nobody works on it. */
static void dq_finish(dq_job *job) {
    dq_job **link = &dq_pool.jobs;
    pthread_mutex_lock(&dq_pool.lock);
    while (*link != job) link = &(*link)->other;
    *link = job->other;
    dq_close(job);
    pthread_mutex_unlock(&dq_pool.lock);
    dq_spin_until(&job->inside, 1);
    if (atomic_load_explicit(&job->inside, memory_order_acquire) == 0) return;
    pthread_mutex_lock(&dq_pool.lock);
    job->waiting = 1;
    while (atomic_load_explicit(&job->inside, memory_order_relaxed))
        pthread_cond_wait(&dq_pool.left, &dq_pool.lock);
    pthread_mutex_unlock(&dq_pool.lock);
}

/* work(context, first, end) for pieces of `piece` that cover range(n), n > 0, in at most `threads`
   threads, the caller's among them. Returns 0 if one of them did: then some may have been left out.
   Otherwise all are done. n / piece * threads must not overflow. */
static inline int dq_pool_run(dq_work work, void *context, ptrdiff_t n, ptrdiff_t piece, int threads) {
    dq_job job;
    job.work = work, job.context = context, job.n = n, job.piece = piece;
    job.pieces = n / piece + (n % piece != 0);
    job.threads = threads < DQ_MAX_THREADS ? threads : DQ_MAX_THREADS;
    if (job.threads > job.pieces) job.threads = (int)job.pieces;
    job.joined = 1, job.waiting = 0, job.other = NULL;
    atomic_init(&job.inside, 0);
    atomic_init(&job.wanted, 1);
    for (int i = 0; i < job.threads; i++) atomic_init(&job.shares[i].next, job.pieces * i / job.threads);
    pthread_once(&dq_pool_once, dq_prepare_forks);
    dq_open(&job);
    dq_do_pieces(&job, 0);
    dq_finish(&job);
    return atomic_load_explicit(&job.wanted, memory_order_relaxed);
}

/* Whether a worker would begin at once; a moment later it may be asleep. */
static inline int dq_pool_is_awake(void) {
    return atomic_load_explicit(&dq_pool.spinning, memory_order_relaxed) > 0;
}

/* Processors that the calling thread may run on. */
static inline int dq_usable_cpus(void) {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 1 ? (int)n : 1;
}

#else

static inline int dq_pool_run(dq_work work, void *context, ptrdiff_t n, ptrdiff_t piece, int threads) {
    (void)piece, (void)threads;
    return work(context, 0, n);
}

static inline int dq_pool_is_awake(void) { return 0; }

static inline int dq_usable_cpus(void) { return 1; }

#endif
#endif
