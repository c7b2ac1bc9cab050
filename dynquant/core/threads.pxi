# How the work of an entry is shared between threads: by the pool of pool.h, or where there are no POSIX
# threads by threads of Python (_threads.py).
#
# An entry puts its arguments into a struct, and hands it over with a function that does a range of the work
# on them. It also says how many nanoseconds the whole takes one thread, roughly and rather too few: whether a
# call is worth a second thread, or even letting go of the interpreter, is decided by that alone. Ranges are
# told apart by what they write, and no sum goes beyond one: results do not depend on how many threads there
# were.

cdef extern from "core/pool.h" nogil:
    ctypedef bint (*dq_work)(void* context, Py_ssize_t first, Py_ssize_t end) noexcept
    bint dq_pool_run(dq_work work, void* context, Py_ssize_t n, Py_ssize_t piece, int threads)
    bint dq_pool_is_awake()
    int dq_usable_cpus()
    enum: DQ_HAS_POOL
    enum: DQ_MAX_THREADS


cdef enum:
    # To let go of the interpreter and take it back costs 70 ns, and much more where other threads want it.
    GIL_NS = 5000
    # What each thread must have to do, by how quickly it can begin: a worker of the pool that spins (1 us),
    # one that sleeps (10 to 20 us, 5 of them the caller's), a thread of Python that is started (100 us).
    AWAKE_NS = 4000
    ASLEEP_NS = 16000
    STARTED_NS = 200000
    # Each thread's share is cut into pieces: for a slow core the others wait for at most one, an eighth of a
    # share. Taking a piece costs some time, so it should not be too short.
    PIECES = 8
    PIECE_NS = 1500

# In tests: share work however small and however few processors there are; by threads of Python.
cdef bint shares_all = False
cdef bint in_python = not DQ_HAS_POOL


def set_sharing(bint everything, bint python):
    """For tests: share `everything` that may be shared, however small; and in threads of Python."""
    global shares_all, in_python
    shares_all, in_python = everything, python or not DQ_HAS_POOL


# The threads, of at most num_threads, that n units of work which take one thread `ns` are worth.
cdef int threads_for(Py_ssize_t n, Py_ssize_t ns, int num_threads) noexcept nogil:
    cdef Py_ssize_t share = STARTED_NS if in_python else AWAKE_NS if dq_pool_is_awake() else ASLEEP_NS
    cdef Py_ssize_t threads = num_threads if num_threads < n else n
    if threads <= 1 or shares_all:
        return <int> threads
    threads = max(1, min(threads, ns // share))
    if threads == 1 or in_python:
        return <int> threads
    return <int> min(threads, dq_usable_cpus())


# work(context, first, end) for ranges that cover range(n), in the threads that this is worth; returns whether
# all of them returned true.
cdef bint run_ranges(dq_work work, void* context, Py_ssize_t n, Py_ssize_t ns, int threads) noexcept nogil:
    cdef Py_ssize_t pieces = PIECES * threads
    if threads <= 1:
        return work(context, 0, n)
    if not shares_all:
        pieces = max(threads, min(pieces, ns // PIECE_NS))
    return dq_pool_run(work, context, n, max(1, n // pieces), threads)


cdef bint parallel_ranges(dq_work work, void* context, Py_ssize_t n, Py_ssize_t ns,
                          int num_threads) except -1:
    """The same from an entry. Calls of a few microseconds keep the interpreter."""
    cdef int threads
    cdef bint result
    if n <= 0:
        return True
    if ns < GIL_NS and not shares_all:
        return work(context, 0, n)
    threads = threads_for(n, ns, num_threads)
    if in_python and threads > 1:
        return in_python_threads(work, context, n, threads)
    with nogil:
        result = run_ranges(work, context, n, ns, threads)
    return result


cdef bint in_python_threads(dq_work work, void* context, Py_ssize_t n, int threads) except -1:
    cdef Work bound = Work()
    from dynquant._threads import run_in_threads

    bound.work, bound.context = work, context
    return run_in_threads(bound, n, threads)


@cython.final
cdef class Work:
    """A function of an entry with its arguments, which live no longer than the entry's call."""
    cdef dq_work work
    cdef void* context

    def __call__(self, Py_ssize_t first, Py_ssize_t end):
        cdef bint result
        with nogil:
            result = self.work(self.context, first, end)
        return result
