"""What test_allocation.py runs with failing_malloc.c loaded: every allocation of every call fails once.

Prints what went wrong, a line each, and how many allocations failed.
"""

import ctypes
import gc
import sys

import numpy as np
from calls import CALLS, INTO

from dynquant import DynQuantTensor

_malloc = ctypes.CDLL(None)
_malloc.fail_allocations.argtypes = [ctypes.c_size_t, ctypes.c_long, ctypes.c_long]
_malloc.stop_failing.restype = _malloc.live_blocks.restype = ctypes.c_long
# Smaller blocks come from the interpreter's own pools.
LEAST = 513
# These end in NumPy's arithmetic on matrices: `a / b` alone may crash when NumPy gets no memory for its
# buffers.
LEFT_OUT = {"search_alpha", "weights, calibrated", "a layer's weights"}
# More than any call makes: from the first on none works.
ALL = 1_000_000
# A call that makes more allocations than this has only some of the later ones fail.
EVERY_ONE = 400


def stop_failing():
    """Let all allocations work, which takes some itself; returns how many did not."""
    while True:
        try:
            return _malloc.stop_failing()
        except MemoryError:
            pass


def outcome(call, first, count):
    """What the call gave or raised when `count` allocations from `first` on fail, and how many did fail."""
    try:
        _malloc.fail_allocations(LEAST, first, count)
        result = call()
    except BaseException as error:
        result = error
    return result, stop_failing()


def arrays_of(result):
    """The arrays in a result, as bytes."""
    if isinstance(result, DynQuantTensor):
        return [result.data.tobytes(), result.scales.tobytes()]
    if isinstance(result, np.ndarray):
        return [result.tobytes()]
    return []


def problem(result, expected, out, before):
    """What is wrong with what a call gave, or None."""
    if isinstance(result, MemoryError) or _numpy_forgot_to_raise(result):
        return None if out is None or out.tobytes() == before else "out was changed"
    if isinstance(result, BaseException):
        return f"raised {type(result).__name__}: {result}"
    return None if arrays_of(result) == expected else "another result"


def _numpy_forgot_to_raise(result):
    """A ufunc that gets no memory for its buffers returns an error without an exception."""
    return isinstance(result, SystemError) and "without" in str(result)


def sweep(name, call, out, count):
    """Fail each allocation in turn; returns how many did fail."""
    call()
    expected, total, first = arrays_of(call()), 0, 0
    while True:
        if out is not None:
            out.view(np.uint8).fill(77)
        before = None if out is None else out.tobytes()
        result, failed = outcome(call, first, count)
        if not failed:
            return total
        if wrong := problem(result, expected, out, before):
            print(f"{name}: {wrong}, allocation {first}, {failed} failed")
        result = None
        total += 1
        first += 1 if first < EVERY_ONE else first // 10


def sweep_twice(name, call, out=None):
    """The second time nothing is allocated for good, whatever failed."""
    total = sum(sweep(name, call, out, count) for count in (1, 2, ALL))
    gc.collect()
    before = _malloc.live_blocks()
    total += sum(sweep(name, call, out, count) for count in (1, 2, ALL))
    gc.collect()
    # Free lists of the interpreter and of NumPy keep a few blocks; a leak would show once for each failure.
    if _malloc.live_blocks() - before > 40:
        print(f"{name}: {_malloc.live_blocks() - before} blocks were lost")
    return total


def into(call, out):
    return lambda: call(out)


def main():
    pick = sys.argv[1:]
    calls = [(name, call, None) for name, call in CALLS.items()]
    calls += [(f"{name} into", into(call, out), out) for name, (call, out) in INTO.items()]
    calls = [each for each in calls if (each[0] in pick if pick else each[0] not in LEFT_OUT)]
    total = sum(sweep_twice(*each) for each in calls)
    print(f"failed allocations: {total}")


main()
