/* Loaded before Python by test_allocation.py: the allocations of a process, counted, and failing on demand.
   glibc has the same functions under a second name, so that nothing needs to be looked up. */
#include <errno.h>
#include <pthread.h>
#include <stddef.h>

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *block, size_t size);
void *__libc_memalign(size_t alignment, size_t size);
void __libc_free(void *block);

static long until_first, to_fail, failed, live;
static size_t least;
static pthread_t thread;

/* From now on `skipped` allocations of at least `bytes` by this thread work, then `count` fail. Those of other
   threads work: CPython waits for ever for a thread that cannot allocate what it begins with. */
void fail_allocations(size_t bytes, long skipped, long count) {
    __atomic_store_n(&to_fail, 0, __ATOMIC_SEQ_CST);
    failed = 0;
    least = bytes;
    thread = pthread_self();
    __atomic_store_n(&until_first, skipped, __ATOMIC_SEQ_CST);
    __atomic_store_n(&to_fail, count, __ATOMIC_SEQ_CST);
}

/* All allocations work again; returns how many did not. */
long stop_failing(void) {
    __atomic_store_n(&to_fail, 0, __ATOMIC_SEQ_CST);
    return __atomic_load_n(&failed, __ATOMIC_SEQ_CST);
}

/* Blocks that were allocated and not freed. */
long live_blocks(void) { return live; }

static int fails(size_t size) {
    if (__atomic_load_n(&to_fail, __ATOMIC_SEQ_CST) <= 0) return 0;
    if (size < least || !pthread_equal(thread, pthread_self())) return 0;
    if (__atomic_fetch_sub(&until_first, 1, __ATOMIC_SEQ_CST) > 0) return 0;
    __atomic_fetch_sub(&to_fail, 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&failed, 1, __ATOMIC_SEQ_CST);
    errno = ENOMEM;
    return 1;
}

static void *counted(void *block) {
    if (block != NULL) __atomic_fetch_add(&live, 1, __ATOMIC_SEQ_CST);
    return block;
}

void *malloc(size_t size) { return fails(size) ? NULL : counted(__libc_malloc(size)); }

void *calloc(size_t count, size_t size) { return fails(count * size) ? NULL : counted(__libc_calloc(count, size)); }

void *realloc(void *block, size_t size) {
    if (fails(size)) return NULL;
    return block == NULL ? counted(__libc_realloc(block, size)) : __libc_realloc(block, size);
}

void *memalign(size_t alignment, size_t size) {
    return fails(size) ? NULL : counted(__libc_memalign(alignment, size));
}

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **block, size_t alignment, size_t size) {
    void *found = memalign(alignment, size);
    if (found == NULL) return ENOMEM;
    *block = found;
    return 0;
}

void free(void *block) {
    if (block != NULL) __atomic_fetch_sub(&live, 1, __ATOMIC_SEQ_CST);
    __libc_free(block);
}
