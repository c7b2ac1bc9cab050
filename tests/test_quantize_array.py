"""Quantizing files: equal to quantizing at once, in blocks, after a kill, and never over something else."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from helpers.common import F32, assert_same_bits
from helpers.programs import environment, run

import dynquant._array_file as array_file
from dynquant import (
    DTypeError,
    EmptyInputError,
    NonFiniteError,
    ParameterError,
    ShapeMismatchError,
    quantize_array,
    quantize_weights,
)

pytestmark = pytest.mark.whitebox

OPTIONS = [{}, {"group_size": 8}, {"bits": 4}, {"bits": 4, "group_size": 32}]


def source(tmp_path, n=200, d=40, dtype=F32, name="x.npy"):
    x = np.random.default_rng(0).standard_normal((n, d)).astype(dtype)
    np.save(tmp_path / name, x)
    return x


def assert_equal(tensor, x, **options):
    expected = quantize_weights(x, **{"bits": 8, **options})
    assert tensor.shape == expected.shape and tensor.format == expected.format
    assert_same_bits(np.asarray(tensor.data), expected.data)
    assert_same_bits(np.asarray(tensor.scales), expected.scales)
    assert (tensor.zero_points is None) == (expected.zero_points is None)
    if expected.zero_points is not None:
        assert_same_bits(np.asarray(tensor.zero_points), expected.zero_points)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", [None, 1, 7, 200, 1000])
def test_equals_quantizing_at_once(tmp_path, options, rows):
    x = source(tmp_path)
    tensor = quantize_array(tmp_path / "x.npy", tmp_path / "q", rows_per_block=rows, **options)
    assert isinstance(tensor.data, np.memmap)
    assert_equal(tensor, x, **options)
    assert_same_bits(np.load(tmp_path / "q" / "codes.npy"), np.asarray(tensor.data))
    assert_same_bits(np.load(tmp_path / "q" / "scales.npy"), np.asarray(tensor.scales))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4", ml_dtypes.bfloat16])
def test_every_kind_of_floats(tmp_path, dtype):
    x = np.random.default_rng(1).standard_normal((50, 12)).astype(dtype)
    assert_equal(quantize_array(x, tmp_path / "array", rows_per_block=16), x.astype(F32))
    assert_equal(quantize_array(x[::-2, ::-1], tmp_path / "strided"), x[::-2, ::-1].astype(F32))
    if dtype is not ml_dtypes.bfloat16:  # which .npy files cannot name
        np.save(tmp_path / "x.npy", x)
        np.save(tmp_path / "f.npy", np.asfortranarray(x))
        assert_equal(quantize_array(tmp_path / "x.npy", tmp_path / "file"), x.astype(F32))
        assert_equal(quantize_array(str(tmp_path / "f.npy"), tmp_path / "columns"), x.astype(F32))
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        assert_equal(quantize_array(mapped, tmp_path / "mapped"), x.astype(F32))


def test_no_vectors(tmp_path):
    x = source(tmp_path, n=0)
    for options in OPTIONS:
        tensor = quantize_array(tmp_path / "x.npy", tmp_path / str(options), **options)
        assert tensor.shape == x.shape and tensor.data.size == 0


class Stop(Exception):
    pass


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_goes_on_after_an_interrupt(tmp_path, monkeypatch, options):
    x = source(tmp_path)
    monkeypatch.setattr(array_file, "_CHECKPOINT_BYTES", 4 * 40 * 30)
    calls = []

    def stop_at(done, n):
        calls.append(done)
        assert n == 200
        if len(calls) % 6 == 0:
            raise Stop

    for _ in range(20):
        try:
            tensor = quantize_array(
                tmp_path / "x.npy", tmp_path / "q", rows_per_block=10, progress=stop_at, **options
            )
            break
        except Stop:
            calls.append(0)
            continue
    assert_equal(tensor, x, **options)
    assert calls.count(30) >= 1 and calls.count(10) == 1  # what was durable was not done again
    before = os.stat(tmp_path / "q" / "codes.npy").st_mtime_ns
    calls.clear()
    assert_equal(
        quantize_array(tmp_path / "x.npy", tmp_path / "q", progress=lambda *a: calls.append(a), **options),
        x,
        **options,
    )
    assert not calls and os.stat(tmp_path / "q" / "codes.npy").st_mtime_ns == before


def test_goes_on_after_a_kill(tmp_path):
    x = source(tmp_path, n=400)
    program = (
        "import os, sys, signal, dynquant, dynquant._array_file as a\n"
        "a._CHECKPOINT_BYTES = 4 * 40 * 50\n"
        "def progress(done, n):\n"
        "    if done >= 330: os.kill(os.getpid(), signal.SIGKILL)\n"
        "dynquant.quantize_array(sys.argv[1], sys.argv[2], rows_per_block=10, progress=progress)\n"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "x.npy"), str(tmp_path / "q")]
    if sys.platform == "win32":
        pytest.skip("there are no signals")
    # Not in a checkout: its source folder would hide the installed package.
    assert subprocess.run(arguments, cwd=tmp_path, env=environment()).returncode == -9
    done = []
    tensor = quantize_array(tmp_path / "x.npy", tmp_path / "q", progress=lambda d, n: done.append(d))
    assert done[0] == 300
    assert_equal(tensor, x)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_memory_is_bounded(tmp_path):
    """64 MiB above what it takes to import NumPy, for a file of 256 MB."""
    path = tmp_path / "x.npy"
    file = np.lib.format.open_memmap(path, "w+", F32, (1 << 16, 1024))
    file[::64] = 1
    file.flush()
    del file
    program = (
        "import re, sys, dynquant\n"
        "def anonymous():\n"  # without mapped files; a peak would be the parent's
        "    return int(re.search(r'RssAnon:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "seen = [anonymous()]\n"
        "dynquant.quantize_array(*sys.argv[1:], progress=lambda done, n: seen.append(anonymous()))\n"
        "print(max(seen) - seen[0])\n"
    )
    printed = run([sys.executable, "-c", program, str(path), str(tmp_path / "q")], cwd=tmp_path)
    assert int(printed) < 64 << 10


def test_nan_is_found_where_it_is(tmp_path):
    x = source(tmp_path)
    x[150, 7] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(NonFiniteError, match=r"source: expected finite values.*6007, position \(150, 7\)"):
        quantize_array(tmp_path / "x.npy", tmp_path / "q", rows_per_block=20)


def test_other_work_is_left_alone(tmp_path):
    x = source(tmp_path)
    folder = tmp_path / "q"
    quantize_array(tmp_path / "x.npy", folder)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    np.save(tmp_path / "y.npy", x[:100])
    os.utime(tmp_path / "x.npy", (1, 1))
    calls = [
        lambda: quantize_array(tmp_path / "x.npy", folder),  # changed since
        lambda: quantize_array(tmp_path / "y.npy", folder),
        lambda: quantize_array(tmp_path / "x.npy", folder, bits=4),
        lambda: quantize_array(tmp_path / "x.npy", folder, group_size=4),
    ]
    for call in calls:
        with pytest.raises(ParameterError, match="target: expected"):
            call()
    (folder / "array.json").unlink()
    with pytest.raises(ParameterError, match=r"target: expected no codes\.npy"):
        quantize_array(tmp_path / "x.npy", folder)
    del before["array.json"]
    assert before == {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_damage_to_what_was_begun_is_refused(tmp_path, monkeypatch):
    source(tmp_path)
    monkeypatch.setattr(array_file, "_CHECKPOINT_BYTES", 1)

    def stop(done, n):
        if done == 50:
            raise Stop

    def begin():
        return quantize_array(tmp_path / "x.npy", tmp_path / "q", rows_per_block=10, progress=stop)

    with pytest.raises(Stop):
        begin()
    state = tmp_path / "q" / "array.json"
    good = state.read_text()
    for change in ({"done": 201}, {"done": -1}, {"done": "5"}, {"complete": 1}, {"kind": "x"}, {"more": 1}):
        state.write_text(json.dumps({**json.loads(good), **change}))
        with pytest.raises(ParameterError, match="target: expected a new folder"):
            begin()
    for text in ("", "{", "[]"):
        state.write_text(text)
        with pytest.raises(ParameterError, match=r"array\.json"):
            begin()
    state.write_text(good)
    codes = tmp_path / "q" / "codes.npy"
    whole = codes.read_bytes()
    for damaged in (whole[:500], b"x" + whole[1:]):
        codes.write_bytes(damaged)
        with pytest.raises(ParameterError, match=r"codes\.npy.*damage"):
            begin()


def test_progress_bar(tmp_path, monkeypatch):
    source(tmp_path)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    quantize_array(tmp_path / "x.npy", tmp_path / "without", progress=True)
    bars = []

    class Bar:
        def __init__(self, total, initial, **_):
            self.n, self.total, self.closed = initial, total, False
            bars.append(self)

        def update(self, n):
            self.n += n

        def close(self):
            self.closed = True

    module = type(sys)("tqdm.auto")
    module.tqdm = Bar
    monkeypatch.setitem(sys.modules, "tqdm", type(sys)("tqdm"))
    monkeypatch.setitem(sys.modules, "tqdm.auto", module)
    quantize_array(tmp_path / "x.npy", tmp_path / "with", rows_per_block=33, progress=True)
    assert [(bar.n, bar.total, bar.closed) for bar in bars] == [(200, 200, True)]


def test_bad_calls(tmp_path):
    x = source(tmp_path)
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "ints.npy", np.ones((3, 3), int))
    np.save(tmp_path / "vector.npy", np.ones(3))
    np.save(tmp_path / "objects.npy", np.array([[None]]), allow_pickle=True)
    (tmp_path / "short.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    q = tmp_path / "q"
    calls = [
        (lambda: quantize_array(tmp_path / "text.npy", q), ParameterError, "source: expected a .npy file"),
        (lambda: quantize_array(tmp_path / "ints.npy", q), DTypeError, "source: expected a float array"),
        (lambda: quantize_array(tmp_path / "vector.npy", q), ShapeMismatchError, "source: expected shape"),
        (lambda: quantize_array(tmp_path / "objects.npy", q), DTypeError, "source: expected a float array"),
        (lambda: quantize_array(tmp_path / "short.npy", q), ParameterError, "that is shorter"),
        (lambda: quantize_array(tmp_path / "none.npy", q), FileNotFoundError, "none"),
        (lambda: quantize_array(x[:, :0], q), EmptyInputError, "source: expected vectors"),
        (lambda: quantize_array(x[0], q), ShapeMismatchError, "source: expected shape"),
        (lambda: quantize_array(x.astype(int), q), DTypeError, "source: expected a float array"),
        (lambda: quantize_array(x, q, bits=3), ParameterError, "bits: expected"),
        (lambda: quantize_array(x, q, group_size=0), ParameterError, "group_size: expected"),
        (lambda: quantize_array(x, q, rows_per_block=0), ParameterError, "rows_per_block: expected"),
        (lambda: quantize_array(x, q, num_threads=0), ParameterError, "num_threads: expected"),
        (lambda: quantize_array(x, q, progress=3), ParameterError, "progress: expected"),
        (lambda: quantize_array(x, 3), ParameterError, "path: expected"),
    ]
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()
    assert not q.exists()


@pytest.mark.parametrize("shape", [b"(4, 4, #", b"(4, -4)", b"(4.0, 4)", b"(9**99,)", b"{4, 4}  "])
def test_headers_that_numpy_stumbles_over(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.ones((4, 4), np.float32))
    content = (tmp_path / "x.npy").read_bytes()
    bad = content.replace(b"(4, 4), }" + b" " * (len(shape) - 6), shape + b", }")
    assert bad != content
    (tmp_path / "x.npy").write_bytes(bad)
    with pytest.raises(ParameterError, match=r"source: expected a .npy file"):
        quantize_array(tmp_path / "x.npy", tmp_path / "q")
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]
