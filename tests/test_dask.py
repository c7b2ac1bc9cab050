"""Dask: equal to one machine whatever the chunks; a cluster of processes, one of which is killed."""

import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from helpers.common import F32, assert_same_bits
from helpers.programs import EMULATOR, environment

import dynquant as dq
from dynquant import DynQuantFormat

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
dd = pytest.importorskip("dynquant.dask")

INT8 = DynQuantFormat.INT8_PER_ROW
FORMATS = {
    "int8": INT8,
    "int8 groups": DynQuantFormat.int8_per_group(7),
    "int4": DynQuantFormat.INT4_PER_ROW,
    "packed": DynQuantFormat.INT4_PER_ROW_PACKED,
    "packed groups": DynQuantFormat.int4_per_group_packed(7),
}
CHUNKS = [(300, 41), (130, 17), ((0, 999, 0, 1), (41,))]


@pytest.fixture(autouse=True)
def one_thread():
    """Errors and their order are those of one thread; names must be such that a second call finds them."""
    with dask.config.set({"scheduler": "sync", "tokenize.ensure-deterministic": True}):
        yield


@pytest.fixture
def x():
    x = np.random.default_rng(0).standard_normal((1000, 41)).astype(F32)
    x[500:600] = x[:100]  # equal scores in different chunks
    return x


def equal_tensors(codes, scales, tensor):
    codes, scales = dask.compute(codes, scales)
    assert_same_bits(codes, tensor.data)
    assert_same_bits(scales, tensor.scales)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_quantize(x, name, chunks):
    fmt = FORMATS[name]
    codes, scales = dd.quantize(da.from_array(x, chunks=chunks), fmt)
    assert (codes.dtype, scales.dtype) == (fmt.data_dtype, F32)
    assert (codes._meta.dtype, scales._meta.dtype) == (codes.dtype, F32)
    assert (codes._meta.ndim, scales._meta.ndim) == (codes.ndim, scales.ndim)
    tensor = dq.dynamic_quantize(x, fmt)
    assert (codes.shape, scales.shape) == (tensor.data.shape, tensor.scales.shape)
    assert len(codes.chunks[-1]) == 1
    equal_tensors(codes, scales, tensor)
    assert_same_bits(scales.compute(), tensor.scales)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_quantize_more_axes_other_floats_and_modes(dtype):
    x = np.random.default_rng(1).standard_normal((4, 6, 10)).astype(dtype)
    mode = dq.Percentile(0.9)
    codes, scales = dd.quantize(da.from_array(x, chunks=(3, 4, 5)), mode=mode)
    equal_tensors(codes, scales, dq.dynamic_quantize(x, mode=mode))
    fmt = DynQuantFormat.int4_per_group(4)
    equal_tensors(*dd.quantize(x[0, 0], fmt, packed=True), dq.dynamic_quantize(x[0, 0], fmt, packed=True))


def test_rows_of_unknown_number(x):
    a = da.from_array(x, chunks=(130, 41))
    some = a[a[:, 0] > 0]
    equal_tensors(*dd.quantize(some), dq.dynamic_quantize(x[x[:, 0] > 0]))
    assert dd.calibrate(some, channels=True).compute().count == int((x[:, 0] > 0).sum()) * 41
    with pytest.raises(dq.ParameterError, match="compute_chunk_sizes"):
        dd.top_k(x[:1], dd.quantize(some), 1)
    with pytest.raises(dq.ParameterError, match="rows of known length"):
        dd.quantize(a.T[:, a[:, 0] > 0])


def test_nothing_is_computed_before_it_is_asked_for(x):
    blocks = []

    def block(block_id):
        blocks.append(block_id)
        return x[500 * block_id[0] : 500 * block_id[0] + 500]

    with dask.config.set({"tokenize.ensure-deterministic": False}):
        a = da.map_blocks(block, chunks=((500, 500), (41,)), dtype=F32, meta=np.empty((0, 0), F32), name="x")
    lazy = [*dd.quantize(a), dd.calibrate(a), *dd.top_k(a[:5], dd.quantize(a), 3)]
    assert blocks == []
    dask.compute(*lazy[:2])
    assert len(blocks) == 2  # once for both


def test_names_are_those_of_the_work(x):
    def names(a, p=0.5, k=3):
        quantized = dd.quantize(a, mode=dq.Percentile(p))
        return [
            *(array.name for array in (*quantized, *dd.top_k(x[:5], quantized, k))),
            dd.calibrate(a).key,
            dd.calibrate(a, channels=True).key,
        ]

    a = da.from_array(x, chunks=(100, 41))
    assert names(a) == names(da.from_array(x, chunks=(100, 41)))
    assert not set(names(a)) & set(names(a + 1))
    assert set(names(a)) & set(names(a, p=0.6)) == set(names(a)[-2:])
    assert set(names(a)) - set(names(a, k=4)) == set(names(a)[2:4])


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("channels", [False, True])
def test_calibrate(x, channels, chunks):
    whole = dq.Calibrator(41 if channels else None)
    whole.update(x)
    found = dd.calibrate(da.from_array(x, chunks=chunks), channels).compute()
    assert found.channels == whole.channels
    for p in (0.01, 0.5, 0.99, 1.0):
        assert found.percentile(p) == whole.percentile(p)
        if channels:
            np.testing.assert_array_equal(found.channel_percentile(p), whole.channel_percentile(p))
    a, b = found.stats(), whole.stats()
    assert (found.count, a.min, a.max, a.p99) == (whole.count, b.min, b.max, b.p99)
    assert abs(a.mean - b.mean) <= 1e-12 * (b.std_dev + abs(b.mean))
    assert abs(a.std_dev - b.std_dev) <= 1e-12 * b.std_dev


def test_calibrate_of_any_number_of_axes():
    assert dd.calibrate(da.asarray(F32(3))).compute().stats().max == 3
    assert dd.calibrate(da.ones((2, 3, 4), chunks=1, dtype=F32)).compute().count == 24
    assert dd.calibrate(da.ones((2, 3, 4), chunks=1, dtype=F32), channels=True).compute().channels == 4


@pytest.mark.parametrize(
    ("name", "metric"), [("int8", "dot"), ("int8", "l2"), ("packed", "cosine"), ("packed groups", "l2")]
)
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_top_k(x, name, metric, chunks):
    fmt = FORMATS[name]
    queries = np.random.default_rng(2).standard_normal((9, 41)).astype(F32)
    corpus = dd.quantize(da.from_array(x, chunks=chunks), fmt)
    for k, q in ((10, queries), (1003, da.from_array(queries, chunks=(5, 20)))):
        scores, indices = dd.top_k(q, corpus, k, metric=metric, format=fmt)
        assert (scores.dtype, indices.dtype) == (F32, np.int64)
        assert scores.shape == indices.shape == (9, k)
        expected = dq.top_k(queries, dq.dynamic_quantize(x, fmt), k, metric=metric)
        scores, indices = dask.compute(scores, indices)
        assert_same_bits(scores, expected.scores)
        assert_same_bits(indices, expected.indices)


def test_top_k_of_floats_and_of_files(x, tmp_path):
    expected = dq.top_k(x[:3], dq.dynamic_quantize(x), 5)
    assert_same_bits(dd.top_k(x[:3], da.from_array(x, chunks=(300, 41)), 5).scores.compute(), expected.scores)
    corpus = dq.quantize_array(x, tmp_path / "corpus", bits=4, group_size=8)
    arrays = [da.from_array(a, chunks=(300, -1)) for a in (corpus.data, corpus.scales, corpus.zero_points)]
    fmt = DynQuantFormat.int4_per_group_packed(8)
    with dask.config.set({"tokenize.ensure-deterministic": False}):
        scores, indices = dask.compute(*dd.top_k(x[:3], arrays, 5, format=fmt))
    expected = dq.top_k(x[:3], corpus, 5)
    assert_same_bits(scores, expected.scores)
    assert_same_bits(indices, expected.indices)


def test_top_k_of_nothing(x):
    scores, indices = dask.compute(*dd.top_k(x[:2], dd.quantize(x[:0]), 3))
    assert np.isneginf(scores).all() and (indices == -1).all() and scores.shape == (2, 3)
    scores, indices = dask.compute(*dd.top_k(x[:0], dd.quantize(x), 3))
    assert scores.shape == indices.shape == (0, 3)


def test_what_is_not_finite_is_found_where_it_is(x):
    x[777, 30] = np.nan
    with pytest.raises(dq.NonFiniteError) as caught:
        dask.compute(dd.quantize(da.from_array(x, chunks=(100, 10))))
    assert (caught.value.position, caught.value.index) == ((777, 30), 777 * 41 + 30)
    assert pickle.loads(pickle.dumps(caught.value)).position == (777, 30)
    for channels in (False, True):
        with pytest.raises(dq.NonFiniteError, match=r"^a: expected finite values") as caught:
            dd.calibrate(da.from_array(x, chunks=(100, 10)), channels).compute()
        assert (caught.value.position, caught.value.index) == ((777, 30), 777 * 41 + 30)


ONES = np.ones((4, 3), F32)
PAIR = dd.quantize(ONES)
BAD_CALLS = {
    "ints": (lambda: dd.quantize(da.ones((2, 2), dtype=int)), dq.DTypeError, "a: "),
    "one axis": (lambda: dd.quantize(ONES[0]), dq.ShapeMismatchError, "a: "),
    "per tensor": (lambda: dd.quantize(ONES, DynQuantFormat.INT8_PER_TENSOR), dq.ParameterError, "format: "),
    "mode": (lambda: dd.quantize(ONES, mode=0.9), dq.ParameterError, "mode: "),
    "packed int8": (lambda: dd.quantize(ONES, packed=True), dq.ParameterError, "packed: "),
    "channels": (lambda: dd.calibrate(ONES, channels=3), dq.ParameterError, "channels: "),
    "channels of a number": (lambda: dd.calibrate(F32(1), True), dq.ShapeMismatchError, "a: "),
    "complex": (lambda: dd.calibrate(ONES * 1j), dq.DTypeError, "a: "),
    "k": (lambda: dd.top_k(ONES, PAIR, 0), dq.ParameterError, "k: "),
    "metric": (lambda: dd.top_k(ONES, PAIR, 1, metric="cos"), dq.ParameterError, "metric: "),
    "query": (lambda: dd.top_k(ONES[0], PAIR, 1), dq.ShapeMismatchError, "queries: "),
    "queries of 3 axes": (lambda: dd.top_k(ONES[None], PAIR, 1), dq.ShapeMismatchError, "queries: "),
    "long queries": (lambda: dd.top_k(np.ones((2, 4), F32), PAIR, 1), dq.ShapeMismatchError, "corpus, codes"),
    "a tensor": (lambda: dd.top_k(ONES, dq.dynamic_quantize(ONES), 1), dq.ParameterError, "corpus: "),
    "codes alone": (lambda: dd.top_k(ONES, (PAIR.codes,), 1), dq.ParameterError, "corpus: "),
    "scales of others": (
        lambda: dd.top_k(ONES, (PAIR.codes, PAIR.scales[:3]), 1),
        dq.ShapeMismatchError,
        "corpus, scales: ",
    ),
    "scales in float64": (
        lambda: dd.top_k(ONES, (PAIR.codes, PAIR.scales.astype(float)), 1),
        dq.DTypeError,
        "corpus, scales: ",
    ),
    "another format": (
        lambda: dd.top_k(ONES, PAIR, 1, format=DynQuantFormat.INT4_PER_ROW_PACKED),
        dq.DTypeError,
        "corpus, codes: ",
    ),
    "a format without search": (
        lambda: dd.top_k(ONES, PAIR, 1, format=DynQuantFormat.INT4_PER_ROW),
        dq.ParameterError,
        "corpus: ",
    ),
    "no elements": (lambda: dd.top_k(ONES[:, :0], PAIR, 1), dq.EmptyInputError, "corpus: "),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_raise_before_anything_is_computed(name):
    call, error, start = BAD_CALLS[name]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(start)


def test_the_package_does_not_import_it(tmp_path):
    code = "import sys, dynquant; assert 'dask' not in sys.modules; sys.modules['dask'] = None\n"
    code += "try:\n import dynquant.dask\nexcept ImportError as error:\n print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.stdout == "dynquant.dask needs Dask: install dynquant with the extra dask\n", done.stderr


CLUSTER = textwrap.dedent("""
    import os, pathlib, signal, sys, time
    import dask.array as da, numpy as np
    from distributed import Client, LocalCluster
    import dynquant as dq, dynquant.dask as dd

    ROWS, D, BLOCKS = 500, 32, 16

    def block(folder, block_id=None):
        (folder / f"{block_id[0]}-{os.getpid()}-{time.time_ns()}").touch()
        time.sleep(0.1)
        return rows(block_id[0])

    def rows(i):
        return np.random.default_rng(i).standard_normal((ROWS, D), dtype=np.float32)

    def killed_midway(client, lazy, folder):
        begun = set(folder.iterdir())
        work = client.compute(lazy)
        while len(set(folder.iterdir()) - begun) < BLOCKS // 2:
            assert not any(each.status == "error" for each in work), work
            time.sleep(0.02)
        os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
        result = client.gather(work)
        begun = set(folder.iterdir()) - begun
        assert len(begun) > BLOCKS, "no block was lost with the worker"
        return result

    def main(folder):
        with (
            LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
                         local_directory=f"{folder}-scratch") as cluster,
            Client(cluster) as client,
        ):
            a = da.map_blocks(block, folder=folder, chunks=((ROWS,) * BLOCKS, (D,)), dtype=np.float32,
                              meta=np.empty((0, 0), np.float32))
            corpus, queries = dd.quantize(a), rows(99)[:20]
            lazy = [*corpus, *dd.top_k(queries, corpus, 10)]
            codes, scales, scores, indices = killed_midway(client, lazy, folder)
            (calibrator,) = killed_midway(client, [dd.calibrate(a, channels=True)], folder)
        whole = np.concatenate([rows(i) for i in range(BLOCKS)])
        tensor = dq.dynamic_quantize(whole)
        assert codes.tobytes() == tensor.data.tobytes() and scales.tobytes() == tensor.scales.tobytes()
        expected = dq.top_k(queries, tensor, 10)
        assert scores.tobytes() == expected.scores.tobytes()
        assert indices.tobytes() == expected.indices.tobytes()
        one = dq.Calibrator(D)
        one.update(whole)
        assert (calibrator.count, calibrator.percentile(0.99)) == (one.count, one.percentile(0.99))
        assert np.array_equal(calibrator.channel_amax(), one.channel_amax())
        found, stats = calibrator.stats(), one.stats()
        assert abs(found.mean - stats.mean) < 1e-12 and abs(found.std_dev / stats.std_dev - 1) < 1e-12
        print("equal")

    if __name__ == "__main__":
        main(pathlib.Path(sys.argv[1]))
""")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a process is killed by a signal")
@pytest.mark.skipif(EMULATOR != [], reason="a cluster under emulation takes minutes to start")
def test_a_cluster_of_two_processes_one_of_which_is_killed(tmp_path):
    pytest.importorskip("distributed")
    program, folder = tmp_path / "cluster.py", tmp_path / "begun"
    program.write_text(CLUSTER)
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(program), str(folder)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "equal\n", done.stderr[-5000:]
