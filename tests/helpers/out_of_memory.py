"""The program of test_allocation.py, run with failing_malloc.c preloaded: every allocation fails once.

Prints one line for each fault, and how many allocations failed.
"""

import ctypes
import functools
import gc
import pickle
import sys

import numpy as np

from helpers.calls import CALLS, INTO, UPDATES, A, K
from helpers.common import calibrator_of, whole_state

_malloc = ctypes.CDLL(None)
_malloc.fail_allocations.argtypes = [ctypes.c_long, ctypes.c_long]
_malloc.stop_failing.restype = _malloc.live_blocks.restype = ctypes.c_long
# More than any call makes: all allocations from the first on fail.
ALL = 1_000_000
# Of a call that makes more allocations than this, only some of the later ones are made to fail.
EVERY_ONE = 400


def take_arrays_from_malloc():
    """Give NumPy the allocator of failing_malloc.c: its own caches small blocks."""
    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype, api.PyCapsule_New.restype = ctypes.c_void_p, ctypes.py_object
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    numpy_core = getattr(np, "_core", None) or np.core
    table = api.PyCapsule_GetPointer(numpy_core._multiarray_umath._ARRAY_API, None)
    # PyDataMem_SetHandler, at the same index in every NumPy since 1.22.
    address = ctypes.c_void_p.from_address(table + 304 * ctypes.sizeof(ctypes.c_void_p))
    handler = ctypes.addressof(ctypes.c_char.in_dll(_malloc, "array_memory"))
    set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(address.value)
    set_handler(api.PyCapsule_New(handler, b"mem_handler", None))
    assert numpy_core.multiarray.get_handler_name(np.zeros(1)) == "malloc"


def stop_failing():
    """Let all allocations succeed again, a call that allocates itself; returns how many had failed."""
    while True:
        try:
            return _malloc.stop_failing()
        except MemoryError:
            pass


def outcome(call, first, count):
    """Result or exception of a call while `count` allocations from `first` on fail; how many did fail."""
    try:
        _malloc.fail_allocations(first, count)
        result = call()
    except BaseException as error:
        result = error
    failed = stop_failing()
    if isinstance(result, BaseException):
        # It holds this frame, and this frame holds the error: neither would be freed before a collection.
        # CPython would then run out of its 16 spare MemoryErrors, and raise one that since 3.12 never drops a
        # traceback.
        result.with_traceback(None)
    return result, failed


def problem(result, expected, out, before):
    """Description of the fault in a result, or None."""
    if isinstance(result, MemoryError) or _memory_error_in_disguise(result):
        return None if out is None or out.tobytes() == before else "out was changed"
    if isinstance(result, BaseException):
        return f"raised {type(result).__name__}: {result}"
    return None if pickle.dumps(result) == expected else "another result"


def _memory_error_in_disguise(result):
    """NumPy's iterators may set no exception; CPython raises another error when it cannot make a lock."""
    text = str(result)
    unset = isinstance(result, SystemError) and "without" in text
    return unset or (isinstance(result, (RuntimeError, ValueError)) and "can't allocate" in text)


def sweep(name, call, out, count):
    """Make each allocation of a call fail in turn; returns how many failed."""
    call()
    expected, total, first = pickle.dumps(call()), 0, 0
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


def sweep_and_count(name, call, out=None):
    """Sweep until no block stays allocated, whichever allocation failed. A leak loses some each time."""
    total = 0
    for warm in (False, True, True, True):
        gc.collect()
        before = _malloc.live_blocks()
        total += sum(sweep(name, call, out, count) for count in (1, 2, ALL))
        gc.collect()
        lost = _malloc.live_blocks() - before
        if warm and lost <= 0:
            return total
    print(f"{name}: {lost} blocks were lost")
    return total


def sweep_updates(name, call):
    """Make each allocation of an update fail: the calibrator has all of the update, or nothing of it."""
    states, total = [], 0
    while True:
        calibrator = calibrator_of([A[:2] / 3], K)
        before = whole_state(calibrator)
        result, failed = outcome(functools.partial(call, calibrator), total, 1)
        states.append(whole_state(calibrator))
        if not failed:
            break
        if isinstance(result, BaseException) and states[-1] != before:
            print(f"{name}: the calibrator was changed, allocation {total}")
        total += 1
    if len({*states, before}) != 2:
        print(f"{name}: a state other than before and after")
    return total


def into(call, out):
    return lambda: call(out)


# NumPy crashes where the iterator of a division by a column finds no memory.
CRASH_IN_NUMPY = {"an index in a folder"}


def main():
    take_arrays_from_malloc()
    # A ZipFile whose constructor failed complains in its destructor.
    sys.unraisablehook = lambda _: None
    pick = sys.argv[1:]
    calls = [(name, call, None) for name, call in CALLS.items() if name not in CRASH_IN_NUMPY]
    calls += [(f"{name} into", into(call, out), out) for name, (call, out) in INTO.items()]
    calls = [each for each in calls if each[0] in pick or not pick]
    total = sum(sweep_and_count(*each) for each in calls)
    total += sum(sweep_updates(*each) for each in UPDATES.items() if each[0] in pick or not pick)
    print(f"failed allocations: {total}")


main()
