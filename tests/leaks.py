"""Memory that stays allocated after many calls of everything public; the argument is the number of calls.

It counts the small objects of the interpreter and the bytes from malloc. No leak escapes these: neither is
rounded to pages, and nothing else allocates in between.
"""

import collections
import ctypes
import functools
import gc
import itertools
import sys
import time

import numpy as np
import test_errors
import test_linear
import test_matmul_w8a8
from helpers.calls import CALLS, INTO
from helpers.capi import FUNCTIONS, arguments_of

from dynquant import DynQuantError

C_CALLS = {f"C, {name}": functools.partial(FUNCTIONS[name], *arguments_of(name)) for name in FUNCTIONS}


def refusals():
    """Bad calls of each function: those of the tests, and NaN in every float argument."""
    found = collections.defaultdict(list)
    for bad in test_errors.BAD_CALLS:
        found[_name_of(bad.function)].append((bad.function, bad.args, bad.kwargs))
    for function, arguments, options, *_ in [*test_linear.BAD_CALLS, *test_matmul_w8a8.BAD_CALLS]:
        found[_name_of(function)].append((function, arguments, options))
    for argument in test_errors.FLOAT_ARGUMENTS.values():
        into = {} if argument.out is None else {"out": argument.out}
        nan = np.full(argument.shape, np.nan, np.float32)
        found[_name_of(argument.call)].append((argument.call, (nan,), into))
    return found


def _name_of(function):
    function = getattr(function, "func", function)
    return getattr(function, "__qualname__", type(function).__name__)


def refused(calls):
    """A function that makes the next of the calls, all of which must raise."""
    turn = itertools.cycle(calls)

    def call():
        function, arguments, options = next(turn)
        try:
            function(*arguments, **options)
        except DynQuantError:
            return
        raise AssertionError(f"{function} took {arguments} {options}")

    return call


EVERY = {
    **CALLS,
    **{f"{name} into": functools.partial(*pair) for name, pair in INTO.items()},
    **C_CALLS,
    **{f"{name} refuses": refused(calls) for name, calls in refusals().items()},
}
# Calls that measure time or wait for the disk; thousands of them would take hours.
TOO_SLOW = {"a report of recall", "an index in a folder", "an array to a folder"}
# Free lists of the interpreter, of NumPy and of malloc may have grown. 2,000 calls that each leak the
# smallest block leak 32,000 bytes.
MAX_OBJECTS, MAX_BYTES = 200, 16_000


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")
    ] + [("others", ctypes.c_size_t * 2)]


def _in_use():
    """Small objects and bytes from malloc in use; 0 bytes where malloc does not tell."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return sys.getallocatedblocks(), 0
    libc.mallinfo2.restype = _MallInfo
    info = libc.mallinfo2()
    return sys.getallocatedblocks(), info.uordblks + info.hblkhd


def growth(call, times):
    """Small objects and bytes that `times` calls leave allocated, after 1,000 that fill caches."""
    for _ in range(1000):
        call()
    before = _in_use()
    for _ in range(times):
        call()
    return [after - was for after, was in zip(_in_use(), before, strict=True)]


def is_leak(objects, n_bytes):
    return objects > MAX_OBJECTS or n_bytes > MAX_BYTES


def main(times):
    leaks = 0
    for name, call in ((name, call) for name, call in EVERY.items() if name not in TOO_SLOW):
        start = time.perf_counter()
        objects, n_bytes = growth(call, times)
        seconds = time.perf_counter() - start
        leaks += is_leak(objects, n_bytes)
        print(
            f"{name:32} {times} calls {seconds:7.1f} s: {objects:+d} objects, {n_bytes:+d} bytes", flush=True
        )
    return int(leaks > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
