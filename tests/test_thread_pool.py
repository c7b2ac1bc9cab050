"""The pool of threads: the bits of one thread, forks, exits, interrupts, and how many threads there are."""

import functools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers.common import F32
from helpers.programs import emulated, environment

from dynquant import DynQuantFormat, QuantLinear, _core, _threads, _validate, dynamic_quantize

WEIGHT = np.random.default_rng(0).standard_normal((41, 96)).astype(F32)
PACKED_ROWS = DynQuantFormat(4, "per_row", packed=True)


def matrix(x):
    return _validate.float_matrix(x, *x.shape)


def codes_of(x):
    """Codes and scales that no entry leaves as they are, and the two as the entries take them."""
    m, k = x.shape
    codes, scales = np.full((m, k), 99, np.int8), np.full(m, 99, F32)
    return codes, scales, _core.CodeMatrix(codes, scales, None, m, k, k, False, True)


# Each of these calls entries with `threads` and returns what they wrote and returned.
def entry_quantize(x, threads):
    codes, scales, q = codes_of(x)
    return _core.dynamic_quantize_rows(matrix(x), q, 127, -1, -1, threads), codes, scales


def entry_percentile(x, threads):
    codes, scales, q = codes_of(x)
    rank = _core.percentile_rank(0.9, x.shape[1])
    return _core.dynamic_quantize_rows(matrix(x), q, 127, rank, rank, threads), codes, scales


def entry_scales(x, threads):
    scales, k = np.full(len(x), 99, F32), x.shape[1]
    return _core.scale_rows(matrix(x), scales, 127, -1, -1, k, threads), scales


def entry_weights(x, threads):
    m, k = x.shape
    codes, scales = np.empty((m, -(-k // 2)), np.uint8), np.empty((m, -(-k // 48)), F32)
    zero_points, values = np.empty(scales.shape, np.uint8), np.empty((m, k), F32)
    q = _core.CodeMatrix(codes, scales, zero_points, m, k, 48, True, True)
    _core.fit_rows(matrix(x), q, 15, x.size < 10_000, None, threads)
    _core.quantize_rows(matrix(x), q, 7, False, threads)
    _core.dequantize_rows(q, values, threads)
    return codes, scales, zero_points, values


def entry_errors(x, threads):
    m, k = x.shape
    tensor = dynamic_quantize(x, PACKED_ROWS)
    q = _core.CodeMatrix(tensor.data, tensor.scales, None, m, k, k, True)
    total, rows, floats = np.zeros((1, 6)), np.zeros((m, 6)), np.zeros((1, 6))
    _core.error_sums(matrix(x), q, m * k, total, threads)
    _core.error_sums(matrix(x), q, k, rows, threads)
    _core.error_sums_of(matrix(x), matrix(x * F32(0.5)), m * k, floats, threads)
    return total, rows, floats, _core.sum_abs_error(matrix(x), q, threads)


def entry_smooth(x, threads):
    m, k = x.shape
    factors = abs(x[0].astype(F32)) + F32(0.25)
    quotients, products, amax = np.empty((m, k), F32), np.empty((m, k), F32), np.zeros(k, np.int32)
    finite = _core.scale_columns(matrix(x), factors, True, quotients, threads)
    _core.scale_columns(matrix(x), factors, False, products, threads)
    _core.column_amax(matrix(x), amax, threads)
    return finite, quotients, products, amax, _core.all_finite(matrix(x), threads)


def entry_calibrate(x, threads):
    k = x.shape[1]
    count, extremes, sums = np.zeros(1, np.int64), np.array([np.inf, -np.inf], F32), np.zeros(4)
    bins, amax = np.zeros(1 << 16, np.int64), np.zeros(k, np.int32)
    octaves = np.zeros((256, k, _core.BINS_PER_OCTAVE), np.uint32)
    nothing, seen = np.zeros((2, 256), np.uint8)
    hashes = np.empty(len(x), np.uint64)
    state = _core.CalibratorState(count, extremes, sums, bins, amax)
    for octave, counts in enumerate(octaves):
        state.add_octave(octave, counts)
    for part in (x, x * F32(3)):
        new = amax.copy()
        _core.column_amax(matrix(part), new, threads)
        _core.mark_octaves(matrix(part), nothing, seen, threads)
        state.update(matrix(part), new, threads)
    _core.hash_rows(matrix(x), hashes, threads)
    return count, extremes, sums, bins, amax, octaves, seen, hashes


def entry_layers(x, threads):
    smooth, bias = abs(WEIGHT[1]) + F32(0.5), WEIGHT[:, 0]
    layers = [
        QuantLinear.from_float(WEIGHT),
        QuantLinear.from_float(WEIGHT, bias, bits=4, group_size=32),
        QuantLinear.from_float(WEIGHT, smooth=smooth, hadamard=True),
        QuantLinear.from_float(WEIGHT, bits=4, smooth=smooth),
    ]
    return [layer(x[:, :96], num_threads=threads) for layer in layers]


ENTRIES = [value for name, value in dict(globals()).items() if name.startswith("entry_")]
SHAPES = [(53, 700), (3, 140_001), (1, 200_003), (2000, 96), (1, 100), (70, 5000)]


@functools.cache
def floats_of(shape):
    x = np.random.default_rng(1).standard_normal(shape).astype(F32)
    x[0] *= 100  # so that sums depend on their order
    return x


def assert_same_results(found, expected):
    assert len(found) == len(expected)
    for ours, alone in zip(found, expected, strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(alone).tobytes()


@pytest.mark.whitebox
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
def test_same_bits_from_any_number_of_threads(entry, shape, shared):
    expected = entry(floats_of(shape), 1)
    for threads in (2, 3, 8):
        assert_same_results(entry(floats_of(shape), threads), expected)


@pytest.mark.whitebox
@pytest.mark.parametrize("entry", [entry_quantize, entry_weights, entry_smooth, entry_layers])
def test_same_bits_of_halves(entry, shared):
    x = floats_of((53, 700)).astype(np.float16)
    assert_same_results(entry(x, 3), entry(x, 1))


@pytest.mark.whitebox
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_non_finite_is_found_in_any_thread(shape, shared):
    for index in np.random.default_rng(2).integers(0, np.prod(shape), 20):
        x = floats_of(shape).copy()
        x.flat[index] = np.nan
        assert not _core.all_finite(matrix(x), 4)
        assert not entry_scales(x, 4)[0]
        assert not entry_quantize(x, 4)[0]
        assert not _core.scale_columns(matrix(x), np.ones(shape[1], F32), True, x.copy(), 4)


# What the programs below begin with.
PROGRAM = """if True:
    import os, signal, sys, threading, time, warnings
    import numpy as np
    import dynquant as dq
    from dynquant import _core

    warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads

    def threads_alive():
        return len(os.listdir("/proc/self/task"))

    x = np.random.default_rng(0).standard_normal((300, 4000)).astype(np.float32)
    expected = dq.dynamic_quantize_int8_per_row(x).data.tobytes()
    _core.set_sharing(True, False)

    def quantize(threads):
        assert dq.dynamic_quantize_int8_per_row(x, num_threads=threads).data.tobytes() == expected
"""
on_linux = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
with_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def run_program(text, folder, **variables):
    command = emulated([sys.executable, "-c", PROGRAM + text])
    settings = environment(OPENBLAS_NUM_THREADS="1", **variables)
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.whitebox
@on_linux
def test_number_of_workers(tmp_path):
    """As many as helped one call at most; none for small work, or where there is one processor."""
    run_program(
        """
    before = threads_alive()
    quantize(1)
    _core.set_sharing(False, False)
    dq.dynamic_quantize_int8_per_row(x[:4], num_threads=8)
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usable)})
    quantize(8)
    assert threads_alive() == before
    os.sched_setaffinity(0, usable)
    _core.set_sharing(True, False)
    for threads, workers in ((2, 1), (2, 1), (4, 3), (3, 3)):
        quantize(threads)
        assert threads_alive() - before == workers
    """,
        tmp_path,
    )


def test_workers_sleep(tmp_path):
    """Soon after a call nothing uses the processor."""
    run_program(
        """
    quantize(4)
    time.sleep(0.2)
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.1
    quantize(4)
    """,
        tmp_path,
    )


ENDS = {
    "asleep": "quantize(3); time.sleep(0.1)",
    "spinning": "quantize(3)",
    "os._exit": "quantize(3); os._exit(0)",
    "sys.exit": "quantize(3); sys.exit(0)",
    "at exit": "import atexit; atexit.register(quantize, 3); quantize(3)",
    "in daemons": """
    def work():
        while True:
            dq.dynamic_quantize_int8_per_row(x, num_threads=3)

    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.2)
    """,
}


@pytest.mark.parametrize("end", ENDS)
def test_the_program_ends(end, tmp_path):
    run_program(f"\n    {ENDS[end].strip()}\n", tmp_path)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers on this system")
def test_interrupts(tmp_path):
    """They come when a call is over, and the next one is as good as any."""
    run_program(
        """
    def handler(number, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, handler)
    out = np.empty(x.shape, np.int8)
    caught = 0
    for i in range(100):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.00002 * i)
            while True:
                dq.dynamic_quantize_int8_per_row(x, out=out, num_threads=3)
        except KeyboardInterrupt:
            caught += 1
        quantize(3)
    assert caught == 100
    """,
        tmp_path,
    )


@with_fork
def test_forks_while_workers_work(tmp_path):
    run_program(
        """
    stop = threading.Event()

    def work():
        while not stop.is_set():
            quantize(3)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        child = os.fork()
        if child == 0:
            quantize(3)
            grandchild = os.fork()
            quantize(2)
            if grandchild:
                assert os.waitpid(grandchild, 0)[1] == 0
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        quantize(3)
    stop.set()
    for thread in threads:
        thread.join()
    """,
        tmp_path,
    )


def test_as_many_threads_as_the_variable_says(tmp_path):
    show = """
    from dynquant._threads import default_threads
    print(default_threads())
    quantize(-1)
    """
    assert run_program(show, tmp_path, DYNQUANT_NUM_THREADS="3") == "3\n"
    assert run_program(show, tmp_path, DYNQUANT_NUM_THREADS=" 100000 ") == "256\n"
    assert 1 <= int(run_program(show, tmp_path, DYNQUANT_NUM_THREADS="")) <= os.cpu_count()


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "\u0663"])
def test_variable_must_be_a_positive_integer(value, monkeypatch):
    x = np.ones((2, 2), F32)
    monkeypatch.setenv("DYNQUANT_NUM_THREADS", value)
    _threads.default_threads.cache_clear()
    with pytest.raises(ValueError, match="DYNQUANT_NUM_THREADS: expected an int >= 1, got"):
        dynamic_quantize(x, num_threads=-1)
    assert dynamic_quantize(x, num_threads=2).data.tolist() == [[127, 127], [127, 127]]


@pytest.mark.whitebox
@pytest.mark.parametrize(
    ("files", "groups", "quota"),
    [
        ({}, None, 256),
        ({"cpu.max": "max 100000"}, "0::/", 256),
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"a/cpu.max": "50000 100000", "a/b/cpu.max": "300000 100000"}, "0::/a/b", 0.5),
        ({"a/cpu.max": "50000 100000"}, "0::/c", 256),
        ({"cpu.max": "200000 100000"}, "0::/elsewhere/on/the/host", 2),
        ({"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/", 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/", 256),
        (
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "100000", "cpu,cpuacct/x/cpu.cfs_period_us": "50000"},
            "9:name=systemd:/y\n3:cpu,cpuacct:/x\n0::/",
            2,
        ),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, "3:cpuset:/", 256),
        ({"cpu.max": "nonsense"}, "0::/", 256),
        ({"cpu.max": ""}, "without colons", 256),
    ],
)
def test_quota_of_control_groups(files, groups, quota, tmp_path):
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    if groups is not None:
        (tmp_path / "cgroup").write_text(f"{groups}\n")
    assert _threads._cpu_quota(str(tmp_path / "root"), str(tmp_path / "cgroup")) == quota


@pytest.mark.whitebox
@pytest.mark.parametrize(
    ("quota", "cpus", "threads"), [(1.5, 8, 2), (0.2, 8, 1), (256.0, 3, 3), (999.0, 999, 256)]
)
def test_default_threads(quota, cpus, threads, monkeypatch):
    monkeypatch.delenv(_threads.VARIABLE, raising=False)
    monkeypatch.setattr(_threads, "_cpu_quota", lambda: quota)
    monkeypatch.setattr(_threads, "_cpus", lambda: cpus)
    assert _threads.default_threads() == threads


@pytest.fixture(autouse=True)
def forget_default_threads():
    _threads.default_threads.cache_clear()
    yield
    _threads.default_threads.cache_clear()
