/* The pool of threads by itself: callers in several threads whose jobs cover every unit once, with pauses
   in which workers fall asleep; forks while they work; and an end of the program that waits for nobody.
   With the argument "race" two pieces write to the same memory, for ThreadSanitizer to show that it looks;
   with "forks" there are forks too, which ThreadSanitizer does not take. */
#include "core/pool.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

enum { CALLERS = 5, JOBS = 400, UNITS = 3000, FORKS = 30 };

static int race;
static long shared;

/* What a job counts: how often each unit was done, as plain memory, so that two threads on one unit race. */
typedef struct {
    uint8_t done[UNITS];
    ptrdiff_t stop; /* the unit that ends the job early */
} counts;

static uint32_t random_below(uint32_t *state, uint32_t n) {
    *state = *state * 1664525 + 1013904223;
    return (uint32_t)(((uint64_t)*state * n) >> 32);
}

static int count(void *context, ptrdiff_t first, ptrdiff_t end) {
    counts *c = context;
    int go_on = 1;
    if (race) shared++;
    for (ptrdiff_t i = first; i < end; i++) {
        c->done[i]++;
        go_on &= i != c->stop;
    }
    return go_on;
}

/* One job of random size; returns whether it did what it should. */
static int job(counts *c, uint32_t *state) {
    const ptrdiff_t n = 1 + random_below(state, UNITS);
    const ptrdiff_t piece = 1 + random_below(state, random_below(state, 2) ? 8 : 999);
    const int threads = 1 + (int)random_below(state, 7);
    int right = 1;
    memset(c->done, 0, sizeof c->done);
    c->stop = random_below(state, 4) ? -1 : (ptrdiff_t)random_below(state, UNITS);
    const int all = dq_pool_run(count, c, n, piece, threads);
    for (ptrdiff_t i = 0; i < UNITS; i++) right &= c->done[i] <= (i < n) && (!all || c->done[i] == (i < n));
    return right && all == !(c->stop >= 0 && c->stop < n);
}

static void *caller(void *argument) {
    uint32_t state = (uint32_t)(uintptr_t)argument;
    intptr_t wrong = 0;
    counts *c = malloc(sizeof *c);
    for (int i = 0; i < JOBS; i++) {
        const struct timespec pause = {0, 1000 * (long)random_below(&state, 200)};
        if (random_below(&state, 8) == 0) nanosleep(&pause, NULL);
        wrong += !job(c, &state);
    }
    free(c);
    return (void *)wrong;
}

static int forks(counts *c) {
    uint32_t state = 99;
    int wrong = 0, status;
    for (int i = 0; i < FORKS; i++) {
        const pid_t child = fork();
        if (child == 0) {
            for (int j = 0; j < 20; j++) wrong += !job(c, &state);
            _exit(wrong != 0);
        }
        wrong += child < 0 || waitpid(child, &status, 0) != child || status != 0;
        wrong += !job(c, &state);
    }
    return wrong;
}

int main(int argc, char **argv) {
    pthread_t threads[CALLERS];
    counts *c = malloc(sizeof *c);
    intptr_t wrong = 0;
    race = argc > 1 && strcmp(argv[1], "race") == 0;
    for (int i = 0; i < CALLERS; i++)
        if (pthread_create(&threads[i], NULL, caller, (void *)(uintptr_t)(i + 1))) return 2;
    if (argc > 1 && strcmp(argv[1], "forks") == 0) wrong += forks(c);
    for (int i = 0; i < CALLERS; i++) {
        void *result;
        pthread_join(threads[i], &result);
        wrong += (intptr_t)result;
    }
    free(c);
    printf("%ld wrong of %d jobs\n", (long)wrong, CALLERS * JOBS);
    return wrong != 0;
}
