"""Kernels of instruction sets that this CPU lacks, compiled for it with emulated intrinsics (see emulated/).

For AVX512-VNNI and AMX, plain C stands in for the instructions of AVX-512 and AMX, so that the code around
them is tested: offsets, packing in fours, compensation. For AVX-VNNI, AVX2 stands in. And the scalar code
for processors other than x86-64 and 64-bit ARM.
"""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, ISAS, assert_same_bits, distributions

from dynquant import (
    DynQuantFormat,
    DynQuantTensor,
    Percentile,
    QuantLinear,
    _core,
    _isa,
    dynamic_quantize,
    hadamard_transform,
    int8_inner,
    simd_info,
    smooth_activations,
    top_k,
    w4a8_matmul,
    w8a8_matmul,
    w8a8_matvec,
)

pytestmark = [pytest.mark.whitebox, pytest.mark.slow]
ROOT = pathlib.Path(__file__).parent.parent
# Flags of each build.
MACROS = ("SSE2", "AVX2", "AVXVNNI", "AVX512BW", "AVX512VNNI", "AMX_INT8", "F16C", "ARM_NEON")
VNNI = ["-D__SSE2__", "-D__AVX512BW__", "-D__AVX512VNNI__", "-U__ARM_NEON"]
BUILDS = {
    "avxvnni": ["-march=x86-64-v3", "-DEMULATED_AVXVNNI"],
    "vnni": VNNI,
    "amx": [*VNNI, "-D__AMX_INT8__"],
    "plain C": [f"-U__{macro}__" for macro in MACROS],
}
# -O1, for an unrolled emulation takes long to compile. No FMA contraction, as in the package's build.
SETUP = """
import json, sys
from Cython.Build import cythonize
from setuptools import Extension, setup
root, flags = json.loads(sys.argv.pop(1))
extension = Extension(
    "isa_emulated",
    ["isa_emulated.pyx"],
    include_dirs=[f"{root}/tests/emulated", f"{root}/dynquant"],
    extra_compile_args=["-O1", "-g0", "-ffp-contract=off", "-w", *flags],
)
directives = {"language_level": 3, "wraparound": False, "boundscheck": False, "cdivision": True}
include_path = [root, f"{root}/dynquant"]
setup(ext_modules=cythonize([extension], include_path=include_path, compiler_directives=directives))
"""


@pytest.fixture(scope="module", params=BUILDS)
def table(request, tmp_path_factory):
    """Name and kernel table of a module built here."""
    for name in ("Cython", "setuptools"):
        pytest.importorskip(name)
    compiler = (sysconfig.get_config_var("CC") or "").split()
    if not compiler or shutil.which(compiler[0]) is None:
        pytest.skip("no C compiler of the kind that Python was built with")
    if request.param == "avxvnni" and "avx2" not in ISAS:
        pytest.skip("no AVX2 to emulate it by")
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "isa_emulated.pyx").write_text('include "kernels/all.pxi"\n')
    options = json.dumps([str(ROOT), BUILDS[request.param]])
    command = [sys.executable, "-c", SETUP, options, "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}")
    spec = importlib.util.spec_from_file_location("isa_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return request.param, module.table


@pytest.fixture(autouse=True)
def emulated(table):
    name, kernels = table
    selected = simd_info()["selected"]
    _core.set_table(kernels)
    yield name
    _isa.select(selected)


def test_the_intended_kernels_are_built(emulated):
    """Sizes of packed weights and scratch tell the kernels apart.

    Outputs per panel, bytes per activation, and inputs per k-block.
    """
    panel, width, inputs = {
        "avxvnni": (16, 1, 8),
        "vnni": (32, 1, 8),
        "amx": (32, 1, 64),
        "plain C": (2, 2, 4),
    }[emulated]
    layer = _core.PackedLinear(1, 1024 + 1, 0, None, None, False, 0)
    assert layer.weight_bytes == panel * (1024 + inputs) + 4
    assert layer.activation_bytes() == 1024 * width + 192


def int8_arrays(m, n, k):
    rng = np.random.default_rng(k)
    weight = rng.integers(-128, 128, (n, k), dtype=np.int8)
    weight[0], weight[-1] = -128, 127
    x = rng.standard_normal((m, k)).astype(F32)
    x[0] = 1
    return weight, rng.standard_normal(n).astype(F32), x


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 63, 64, 65, 130, 1001, 2**16 + 5])
def test_int8(k):
    """Among them rows of -128 and 127, and activations that are all 127."""
    for n in (1, 33):
        weight, scales, x = int8_arrays(38, n, k)
        rows = np.stack([reference.w8a8_matvec(weight, scales, row) for row in x])
        for row, y in zip(x, rows, strict=True):
            assert_same_bits(w8a8_matvec(weight, scales, row), y)
        for m in (1, 2, 4, 6, 15, 17, 32, 38):
            assert_same_bits(w8a8_matmul(weight, scales, x[:m]), rows[:m])
        layer = QuantLinear.from_arrays({"weight_i8": weight, "weight_scales": scales})
        assert_same_bits(layer.to_arrays()["weight_i8"], weight)


@pytest.mark.parametrize("k", [1, 5, 65, 1001, 2050])
def test_int8_inner(k):
    rng = np.random.default_rng(0)
    for m, n in ((2, 40), (38, 67), (67, 38)):
        a, b = rng.integers(-128, 128, (m, k), dtype=np.int8), rng.integers(-128, 128, (n, k), dtype=np.int8)
        a[0] = b[0] = -128
        assert_same_bits(int8_inner(a, b, dtype=np.int64), a.astype(np.int64) @ b.astype(np.int64).T)


@pytest.mark.parametrize("d", [3, 64, 387])
def test_top_k(d):
    rng = np.random.default_rng(d)
    x, queries = rng.standard_normal((700, d)).astype(F32), rng.standard_normal((70, d)).astype(F32)
    corpus, q = dynamic_quantize(x), dynamic_quantize(queries)
    sums = q.data.astype(np.int64) @ corpus.data.astype(np.int64).T
    scores = sums.astype(F32) * corpus.scales * q.scales[:, None]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    for rows in (1, 5, 6, 17, 70):
        found = top_k(queries[:rows], corpus, 20)
        np.testing.assert_array_equal(found.indices, best[:rows])
        assert_same_bits(found.scores, np.take_along_axis(scores, best, 1)[:rows])


@pytest.mark.parametrize("kind", ["zero points", "symmetric", "minimums"])
@pytest.mark.parametrize(
    ("k", "size"),
    [
        *((1, 1), (9, 3), (64, 32), (100, 64), (383, 7), (8200, 8192), (18_003, 9001)),
        *((160, 32), (288, 96), (320, 64), (800, 288), (576, 512)),
    ],
)
def test_int4(k, size, kind):
    rng, symmetric = np.random.default_rng(k), kind == "symmetric"
    for n in (1, 33):
        groups = -(-k // size)
        codes = rng.integers(-8 if symmetric else 0, 8 if symmetric else 16, (n, k), dtype=np.int8)
        codes[0], codes[-1] = codes.min(), codes.max()
        scales = rng.standard_normal((n, groups)).astype(F32)
        zero_points = rng.integers(0, 16, (n, groups), dtype=np.uint8) if kind == "zero points" else None
        minimums = rng.standard_normal((n, groups)).astype(F32) if kind == "minimums" else None
        x = rng.standard_normal((6 if k > 1000 else 140, k)).astype(F32)
        x[0], x[1] = 1, -1
        fmt = DynQuantFormat(4, "per_group", size, True)
        data, offsets = reference.pack(codes, per_row=True), zero_points if minimums is None else minimums
        weight = DynQuantTensor(data, scales, zero_points, (n, k), fmt, minimums)
        y = reference.w4a8_matmul(codes, scales, offsets, size, x)
        for m in (1, 2, 4, 5, 6, 15, 17, 33, 140):
            assert_same_bits(w4a8_matmul(weight, x[:m]), y[:m])


@pytest.mark.parametrize("n", [1, 63, 64, 65, 4097])
def test_quantize(n):
    for name, x in distributions(n, np.random.default_rng(n)).items():
        for fmt in (DynQuantFormat.INT8_PER_TENSOR, DynQuantFormat.INT4_PER_TENSOR):
            for p in (None, 0.9):
                q = dynamic_quantize(x, fmt, *(() if p is None else (Percentile(p),)))
                codes, scales = reference.quantize(x, fmt.clip, p)
                assert_same_bits(q.data, codes, name)
                assert_same_bits(q.scales, scales, name)


def test_division_by_factors():
    rng = np.random.default_rng(1)
    x = np.stack(list(distributions(333, rng).values()))
    factors = rng.uniform(0.01, 100, 333).astype(F32)
    assert_same_bits(smooth_activations(x, factors), reference.smooth_activations(x, factors))


def test_float16_and_rotation():
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    x = x[np.isfinite(x)]
    # Groups of one: each scale is its value / 127.
    scales = dynamic_quantize(x, DynQuantFormat.int8_per_group(1)).scales
    assert_same_bits(scales, np.abs(x.astype(F32)) / F32(127))
    rows = np.random.default_rng(0).standard_normal((3, 96)).astype(F32)
    rotated = hadamard_transform(rows)
    _isa.select("baseline")
    assert_same_bits(rotated, hadamard_transform(rows))
