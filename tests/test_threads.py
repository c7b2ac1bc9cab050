"""Results with threads, after forks, in other processes and beside other libraries' thread pools."""

import concurrent.futures
import copy
import functools
import importlib.util
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
from helpers.common import F32, assert_same_bits, calibrator_of, whole_state
from helpers.programs import emulated

import dynquant
from dynquant import (
    CalibStats,
    DynQuantFormat,
    Percentile,
    QuantLinear,
    _core,
    _validate,
    compute_scale,
    compute_smooth_factors,
    dynamic_quantize,
    dynamic_quantize_int8,
    dynamic_quantize_int8_per_row,
    quantization_mae,
    smooth_activations,
    w8a8_matmul,
    w8a8_matvec,
)
from dynquant._threads import run_in_threads

X = np.random.default_rng(0).standard_normal((53, 700)).astype(F32)
FORMATS = [
    DynQuantFormat.INT8_PER_ROW,
    DynQuantFormat.INT8_PER_TENSOR,
    DynQuantFormat.INT4_PER_ROW,
    DynQuantFormat(4, "per_row", packed=True),
    DynQuantFormat(4, "per_group", 33, packed=True),
]
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=repr)


@pytest.fixture
def in_python():
    """Work is shared by threads of Python, however small it is."""
    _core.set_sharing(True, True)
    yield
    _core.set_sharing(False, False)


def assert_same_tensor(q, expected):
    assert_same_bits(q.data, expected.data)
    assert_same_bits(q.scales, expected.scales)


@each_format
@pytest.mark.parametrize("num_threads", [-1, *range(1, 6), np.int64(3), 1000, 10**30])
def test_any_number_of_threads(num_threads, fmt, shared):
    mode = Percentile(0.9)
    for x in (X[:11], X[:3], X[:1], X[:7, :1], X[:0], X[:5, :0], X[:9].astype(np.float16)):
        expected = dynamic_quantize(x, fmt, mode)
        assert_same_tensor(dynamic_quantize(x, fmt, mode, num_threads=num_threads), expected)
        out = np.full_like(expected.data, 77)
        assert_same_tensor(dynamic_quantize(x, fmt, mode, out=out, num_threads=num_threads), expected)


def test_no_thread_outlives_a_call(in_python):
    before = threading.active_count()
    dynamic_quantize_int8_per_row(X, num_threads=8)
    assert threading.active_count() == before
    bad = X.copy()
    bad[-1, -1] = np.nan
    with pytest.raises(ValueError, match="nan"):
        dynamic_quantize_int8_per_row(bad, num_threads=8)
    assert threading.active_count() == before


def test_number_of_threads_started(monkeypatch, in_python):
    """At most as many threads as rows, the caller's among them."""
    started = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (started.append(thread), start(thread)))
    for num_threads, rows, count in [(1, 9, 0), (4, 9, 3), (9, 4, 3), (5, 1, 0), (5, 0, 0)]:
        started.clear()
        dynamic_quantize_int8_per_row(X[:rows], num_threads=num_threads)
        assert len(started) == count


@pytest.mark.whitebox
def test_limit_of_threads():
    assert _validate.as_thread_count(10**30) == _validate.as_thread_count(257) == 256
    assert _validate.as_thread_count(np.int64(256)) == 256


def test_threads_that_cannot_start(monkeypatch, in_python):
    """The caller does the work of threads that cannot start, in both passes, so that `out` is complete."""
    calls, start = itertools.count(), threading.Thread.start

    def start_one(thread):
        if next(calls):
            raise RuntimeError("can't start new thread")
        start(thread)

    before = threading.active_count()
    expected = dynamic_quantize_int8_per_row(X)
    monkeypatch.setattr(threading.Thread, "start", start_one)
    assert_same_tensor(dynamic_quantize_int8_per_row(X, num_threads=4), expected)
    out = np.empty(X.shape, np.int8)
    assert_same_tensor(dynamic_quantize_int8_per_row(X, out=out, num_threads=4), expected)
    assert threading.active_count() == before


@pytest.mark.whitebox
def test_interrupt_waits_for_the_threads(monkeypatch):
    """A KeyboardInterrupt while the caller waits is raised, but only after the other threads have ended."""
    join, pending, release = (
        threading.Thread.join,
        [KeyboardInterrupt(), KeyboardInterrupt()],
        threading.Event(),
    )
    ended = []

    def work(first, end):
        if first:
            release.wait()
            ended.append(first)
        return True

    def interrupted(thread, timeout=None):
        if pending:
            raise pending.pop()
        release.set()
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_in_threads(work, 4, 2)
    assert ended == [2]


@pytest.mark.whitebox
@pytest.mark.parametrize("delay", [0.0, 0.03])
def test_interrupt_while_a_thread_starts(monkeypatch, delay):
    """The thread does not count as alive yet, and must not write after the call has raised."""
    begun, ended, bootstrap = [], [], threading.Thread._bootstrap

    def work(first, end):
        begun.append(first)
        time.sleep(0.02)
        ended.append(first)
        return True

    def delayed(thread):
        time.sleep(delay)
        bootstrap(thread)

    def interrupted(event, timeout=None):
        time.sleep(0.01)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "_bootstrap", delayed)
        patch.setattr(threading.Event, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_in_threads(work, 4, 2)
    at_return = list(begun)
    time.sleep(0.1)
    assert begun == ended == at_return


@pytest.mark.whitebox
def test_at_the_end_of_the_stack():
    """A RecursionError, at whatever depth it is raised."""

    def nested(depth):
        return nested(depth - 1) if depth else run_in_threads(lambda first, end: True, 4, 2)

    raised = 0
    for depth in range(sys.getrecursionlimit() - 400, sys.getrecursionlimit()):
        try:
            assert nested(depth)
        except RecursionError:
            raised += 1
    assert 0 < raised < 400


LAYER = QuantLinear.from_float(X[:41], bias=X[0, :41], smooth=abs(X[1]) + F32(0.5))


def everything(x):
    """One of each kind of result for `x`, and those of one shared layer."""
    q = dynamic_quantize_int8_per_row(x, num_threads=2)
    packed = dynamic_quantize(x, FORMATS[3], Percentile(0.99))
    factors = compute_smooth_factors(x, x)
    return [
        whole_state(calibrator_of([x], x.shape[1])),
        *(q.data.tobytes(), q.scales.tobytes(), q.dequantize().tobytes(), packed.data.tobytes()),
        *(packed.dequantize().tobytes(), quantization_mae(x, packed), compute_scale(x, 127)),
        *(smooth_activations(x, factors).tobytes(), w8a8_matvec(q.data, q.scales, x[0]).tobytes()),
        *(w8a8_matmul(q.data, q.scales, x, num_threads=2).tobytes(), CalibStats.collect([x])),
        *(LAYER(x).tobytes(), LAYER(x[:3], num_threads=2).tobytes()),
    ]


def test_concurrent_calls_on_shared_inputs(shared):
    expected = everything(X)
    barrier = threading.Barrier(8)
    failures = []

    def work():
        barrier.wait()
        failures.extend(i for i in range(20) if everything(X) != expected)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_input_written_during_the_call():
    """Results may mix old and new values, but no access is out of bounds."""
    x, stop = np.ones(70_000, F32), threading.Event()

    def write():
        while not stop.is_set():
            x.fill(0)
            x.fill(3)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for p in [0.3, 0.6, 1.0] * 100:
            assert compute_scale(x, 1, Percentile(p)) >= 0
            assert dynamic_quantize(x.reshape(7, -1), FORMATS[3], Percentile(p)).data.max() <= 0x77
    finally:
        stop.set()
        writer.join()


def test_in_an_executor(shared):
    batches = [X * F32(i + 1) for i in range(12)]
    expected = [everything(x) for x in batches]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(everything, batches)) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("busy", [0, 3])
def test_after_a_fork(busy, shared):
    """The child of a process that used threads can use them too, even if some were running at the fork."""
    expected, stop = everything(X), threading.Event()

    def work():
        while not stop.is_set():
            everything(X)

    with concurrent.futures.ThreadPoolExecutor(max(busy, 1)) as pool:
        running = [pool.submit(work) for _ in range(busy)]
        try:
            assert [exit_code_of_a_fork(lambda: everything(X) == expected) for _ in range(5)] == [0] * 5
        finally:
            stop.set()
        assert [future.result() for future in running] == [None] * busy


def exit_code_of_a_fork(check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
        child = os.fork()
    if child == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("method", sorted({"fork", "spawn"} & set(multiprocessing.get_all_start_methods())))
def test_in_other_processes(method, shared):
    """Results come back by pickling."""
    with multiprocessing.get_context(method).Pool(1, _core.set_sharing, (True, False)) as pool:
        expected = dynamic_quantize_int8_per_row(X, num_threads=3)
        assert_same_tensor(pool.apply(dynamic_quantize_int8_per_row, (X,), {"num_threads": 3}), expected)
        assert_same_tensor(pool.apply(dynamic_quantize_int8, (X,)), dynamic_quantize_int8(X))
        calibrator = calibrator_of([X], X.shape[1])
        assert whole_state(pool.apply(copy.copy, (calibrator,))) == whole_state(calibrator)
        with pytest.raises(ValueError, match="flat index 1"):
            pool.apply(dynamic_quantize_int8, ([1.0, float("inf")],))


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_layer_in_a_process_pool(method, shared):
    """It is pickled, and its weights are packed again in each process."""
    batches = [X[:7] * F32(i + 1) for i in range(4)]
    context = multiprocessing.get_context(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            layer = functools.partial(LAYER, num_threads=2)
            for y, x in zip(pool.map(layer, batches), batches, strict=True):
                assert_same_bits(y, LAYER(x))


# Another library's thread pool computes in the same process as dynquant, from several threads at once. Both
# must give the results that they gave alone, and so must a forked child. POOL is replaced.
BESIDE_A_POOL = """if True:
    import os, threading
    import numpy as np
    import dynquant as dq
    from dynquant import _core

    _core.set_sharing(True, False)

    POOL

    x = np.random.default_rng(0).standard_normal((96, 1024)).astype(np.float32)
    layer = dq.QuantLinear.from_float(x)

    def ours():
        q = dq.dynamic_quantize_int8_per_row(x, dq.Percentile(0.99), num_threads=2)
        return q.data.tobytes(), layer(x, num_threads=2).tobytes(), dq.compute_smooth_factors(x, x).tobytes()

    alone = ours(), theirs(x)
    assert alone[1]
    barrier, failures = threading.Barrier(6), []

    def work(function, expected):
        barrier.wait()
        failures.extend(i for i in range(15) if function() != expected)

    pairs = [(ours, alone[0]), (lambda: theirs(x), alone[1])] * 3
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            os._exit(0 if ours() == alone[0] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
POOLS = {
    "numpy": """
    def theirs(x):
        return np.allclose(x @ x.T, (x.astype(np.float64) @ x.T).astype(np.float32), 1e-3, 1e-3)
    """,
    "torch": """
    import torch
    torch.set_num_threads(3)
    first, second = torch.nn.Linear(1024, 512), torch.nn.Linear(512, 64)

    def theirs(x):
        with torch.inference_mode():
            return second(torch.relu(first(torch.from_numpy(x)))).numpy().tobytes()
    """,
}


@pytest.mark.parametrize("library", POOLS)
def test_beside_the_thread_pool_of(library, tmp_path):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    roots = {os.path.dirname(os.path.dirname(module.__file__)) for module in (dynquant, np)}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sorted(roots)), "OPENBLAS_NUM_THREADS": "3"}
    command = [sys.executable, "-c", BESIDE_A_POOL.replace("POOL", POOLS[library])]
    # Not in a checkout: its source folder would hide the installed package.
    done = subprocess.run(
        emulated(command), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("num_threads", [True, np.True_, 1.0, "1", None, np.array([1])])
def test_thread_count_must_be_an_integer(num_threads):
    with pytest.raises(dynquant.ParameterError, match="num_threads"):
        dynquant.dynamic_quantize_int8_per_row(np.ones((2, 2), np.float32), num_threads=num_threads)


@pytest.mark.parametrize("num_threads", [0, -2, np.int64(0), -(10**30)])
def test_thread_count_must_be_positive_or_minus_one(num_threads):
    with pytest.raises(dynquant.ParameterError, match="num_threads: expected an int >= 1 or -1"):
        dynquant.dynamic_quantize_int8_per_row(np.ones((2, 2), np.float32), num_threads=num_threads)
