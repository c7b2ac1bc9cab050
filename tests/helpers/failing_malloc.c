/* Preloaded by test_allocation.py: counts the allocations of a process, and makes them fail on demand.
   glibc has the same functions under a second name, so no symbol needs to be looked up. */
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *block, size_t size);
void *__libc_memalign(size_t alignment, size_t size);
void __libc_free(void *block);

static long until_first, to_fail, failed, live;
static pthread_t thread;

/* The next `skipped` allocations of this thread succeed, then `count` fail. Those of other threads succeed, because
   CPython waits forever for a thread that fails to allocate as it starts. */
void fail_allocations(long skipped, long count) {
    __atomic_store_n(&to_fail, 0, __ATOMIC_SEQ_CST);
    failed = 0;
    thread = pthread_self();
    __atomic_store_n(&until_first, skipped, __ATOMIC_SEQ_CST);
    __atomic_store_n(&to_fail, count, __ATOMIC_SEQ_CST);
}

/* All allocations succeed again; returns how many failed. */
long stop_failing(void) {
    __atomic_store_n(&to_fail, 0, __ATOMIC_SEQ_CST);
    return __atomic_load_n(&failed, __ATOMIC_SEQ_CST);
}

/* Blocks allocated and not freed. */
long live_blocks(void) { return live; }

static int fails(void) {
    if (__atomic_load_n(&to_fail, __ATOMIC_SEQ_CST) <= 0) return 0;
    if (!pthread_equal(thread, pthread_self())) return 0;
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

void *malloc(size_t size) { return fails() ? NULL : counted(__libc_malloc(size)); }

void *calloc(size_t count, size_t size) { return fails() ? NULL : counted(__libc_calloc(count, size)); }

void *realloc(void *block, size_t size) {
    if (fails()) return NULL;
    return block == NULL ? counted(__libc_realloc(block, size)) : __libc_realloc(block, size);
}

void *memalign(size_t alignment, size_t size) {
    return fails() ? NULL : counted(__libc_memalign(alignment, size));
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

static void *array_malloc(void *context, size_t size) { return (void)context, malloc(size); }

static void *array_calloc(void *context, size_t count, size_t size) { return (void)context, calloc(count, size); }

static void *array_realloc(void *context, void *block, size_t size) { return (void)context, realloc(block, size); }

static void array_free(void *context, void *block, size_t size) {
    (void)context, (void)size;
    free(block);
}

/* What NumPy's PyDataMem_SetHandler takes, PyDataMem_Handler of numpy/ndarraytypes.h. */
struct {
    char name[127];
    uint8_t version;
    void *context;
    void *(*malloc)(void *, size_t);
    void *(*calloc)(void *, size_t, size_t);
    void *(*realloc)(void *, void *, size_t);
    void (*free)(void *, void *, size_t);
} array_memory = {"malloc", 1, NULL, array_malloc, array_calloc, array_realloc, array_free};
