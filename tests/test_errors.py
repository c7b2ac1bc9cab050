"""Every kind of wrong call: the error, its message, and that nothing was changed."""

import array
import builtins
import copy
import dataclasses
import os
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers.common import F32

import dynquant
from dynquant import (
    Calibrator,
    CalibStats,
    DTypeError,
    DynQuantError,
    DynQuantFormat,
    DynQuantTensor,
    EmptyInputError,
    FeatureDimMismatchError,
    InvalidAlphaError,
    InvalidPercentileError,
    IsaError,
    LayoutError,
    MaxAbs,
    NonFiniteError,
    ParameterError,
    Percentile,
    QuantLinear,
    ShapeMismatchError,
    SmoothQuantConfig,
    _isa,
    compute_scale,
    compute_smooth_factors,
    dynamic_quantize,
    dynamic_quantize_int4,
    dynamic_quantize_int8,
    dynamic_quantize_int8_per_row,
    fold_smooth_factors,
    int8_inner,
    quantization_mae,
    quantize_weights,
    search_alpha,
    smooth_activations,
    smooth_weights,
    w4a8_matmul,
    w4a8_matvec,
    w8a8_matvec,
)

NAN, INF = float("nan"), float("inf")
X = np.linspace(-1, 1, 12, dtype=F32).reshape(3, 4)
ROW = X[0]
WEIGHT = np.arange(12, dtype=np.int8).reshape(3, 4)
SCALES = np.ones(3, F32)
FACTORS = np.ones(4, F32)
INT8, PER_ROW = DynQuantFormat.INT8_PER_TENSOR, DynQuantFormat.INT8_PER_ROW
PACKED, PACKED_ROWS = DynQuantFormat(4, "per_tensor", packed=True), DynQuantFormat(4, "per_row", packed=True)
PER_GROUP, PACKED_GROUPS = DynQuantFormat.int8_per_group(3), DynQuantFormat(4, "per_group", 3, True)
Q = dynamic_quantize_int8(X)
SEEN = Calibrator(4)
SEEN.update(X)
SAMPLED = Calibrator(4, rows=2)
SAMPLED.update(X)
NANS = np.full((3, 4), NAN, F32)
INT4 = quantize_weights(X, bits=4, group_size=3)
LAYER = QuantLinear.from_float(X, bits=4, hadamard=True, smooth=[0.5, 1, 2, 4])

BASES = {
    ShapeMismatchError: ValueError,
    EmptyInputError: ValueError,
    FeatureDimMismatchError: ValueError,
    InvalidAlphaError: ValueError,
    InvalidPercentileError: ValueError,
    NonFiniteError: ValueError,
    ParameterError: ValueError,
    DTypeError: TypeError,
    LayoutError: ValueError,
    IsaError: ImportError,
}


def check_raises(error, message, fields, function, *args, **kwargs):
    arrays = [a for a in (*args, *kwargs.values()) if isinstance(a, np.ndarray)]
    before = [a.tobytes() for a in arrays]
    with pytest.raises(DynQuantError) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is error
    assert isinstance(caught.value, BASES[error])
    assert message in str(caught.value)
    for name, value in fields.items():
        np.testing.assert_equal(getattr(caught.value, name), value)
    assert [a.tobytes() for a in arrays] == before


# Arguments that take floats


class FloatArgument(NamedTuple):
    name: str
    shape: tuple[int, ...]
    call: Callable[..., Any]
    out: np.ndarray | None = None
    optional: bool = False


def full_of_77(shape, dtype=np.int8):
    """An `out` whose content shows whether it was written."""
    return np.full(shape, 77, dtype)


MEDIAN = Percentile(0.5)
CODES, VALUES, Y, PRODUCT = (
    full_of_77((3, 4)),
    full_of_77((3, 4), F32),
    full_of_77(3, F32),
    full_of_77((3, 3), F32),
)
BYTES, ROWS_OF_BYTES = full_of_77(6, np.uint8), full_of_77((3, 2), np.uint8)
per_row = dynamic_quantize_int8_per_row

FLOAT_ARGUMENTS = {
    "compute_scale": FloatArgument("x", (3, 4), partial(compute_scale, clip_val=127)),
    "compute_scale percentile": FloatArgument("x", (3, 4), partial(compute_scale, clip_val=127, mode=MEDIAN)),
    "int8": FloatArgument("x", (3, 4), dynamic_quantize_int8, CODES),
    "int8_per_row": FloatArgument("x", (3, 4), per_row, CODES),
    "int8_per_row threads": FloatArgument("x", (3, 4), partial(per_row, num_threads=3), CODES),
    "int8_per_row percentile": FloatArgument("x", (3, 4), partial(per_row, mode=MEDIAN), CODES),
    "int8_per_row long": FloatArgument("x", (2, 5000), partial(per_row, mode=MEDIAN), full_of_77((2, 5000))),
    "int4": FloatArgument("x", (3, 4), dynamic_quantize_int4),
    "int4 packed": FloatArgument("x", (3, 4), partial(dynamic_quantize, format=PACKED), BYTES),
    "int4 rows": FloatArgument("x", (3, 4), partial(dynamic_quantize, format=PACKED_ROWS), ROWS_OF_BYTES),
    "int8 groups": FloatArgument("x", (3, 4), partial(dynamic_quantize, format=PER_GROUP), CODES),
    "int4 groups": FloatArgument("x", (3, 4), partial(dynamic_quantize, format=PACKED_GROUPS), ROWS_OF_BYTES),
    "groups of a vector": FloatArgument(
        "x", (4,), partial(dynamic_quantize, format=PER_GROUP, mode=MEDIAN), full_of_77(4)
    ),
    "mae": FloatArgument("original", (3, 4), partial(quantization_mae, quantized=Q)),
    "factors, activations": FloatArgument("activations", (3, 4), partial(compute_smooth_factors, weights=X)),
    "factors, weights": FloatArgument("weights", (3, 4), partial(compute_smooth_factors, X)),
    "factors, percentile": FloatArgument(
        "activations", (3, 4), partial(compute_smooth_factors, weights=X, mode=MEDIAN)
    ),
    "factors, magnitudes": FloatArgument("activations", (4,), partial(compute_smooth_factors, weights=X)),
    "factors, several weights": FloatArgument(
        "weights[1]", (3, 4), lambda w: compute_smooth_factors(X, [X, w, X])
    ),
    "fold, factors": FloatArgument("factors", (4,), partial(fold_smooth_factors, gamma=FACTORS)),
    "fold, gamma": FloatArgument("gamma", (4,), partial(fold_smooth_factors, FACTORS)),
    "search, activations": FloatArgument("activations", (3, 4), partial(search_alpha, weights=X)),
    "search, weights": FloatArgument("weights", (3, 4), partial(search_alpha, X)),
    "search, several weights": FloatArgument("weights[1]", (3, 4), lambda w: search_alpha(X, [X, w])),
    "smooth_activations": FloatArgument(
        "activations", (3, 4), partial(smooth_activations, factors=FACTORS), VALUES
    ),
    "smooth_activations, factors": FloatArgument("factors", (4,), partial(smooth_activations, X), VALUES),
    "smooth_weights": FloatArgument("weights", (3, 4), partial(smooth_weights, factors=FACTORS), VALUES),
    "smooth_weights, factors": FloatArgument("factors", (4,), partial(smooth_weights, X), VALUES),
    "collect": FloatArgument("batches[1]", (3, 4), lambda x: CalibStats.collect([X, x])),
    "calibrator": FloatArgument("batch", (3, 4), lambda x: Calibrator().update(x)),
    "calibrator, channels": FloatArgument("batch", (3, 4), lambda x: Calibrator(4).update(x)),
    "matvec, activation": FloatArgument("activation", (4,), partial(w8a8_matvec, WEIGHT, SCALES), Y),
    "matvec, weight_scales": FloatArgument(
        "weight_scales", (3,), lambda x, **out: w8a8_matvec(WEIGHT, x, ROW, **out), Y
    ),
    "quantize_weights": FloatArgument("w", (3, 4), quantize_weights),
    "quantize_weights int4": FloatArgument("w", (3, 4), partial(quantize_weights, bits=4, group_size=3)),
    "quantize_weights search": FloatArgument("w", (3, 4), partial(quantize_weights, bits=4, search=True)),
    "w4a8_matvec": FloatArgument("activation", (4,), partial(w4a8_matvec, INT4), Y),
    "w4a8_matmul": FloatArgument("activations", (3, 4), partial(w4a8_matmul, INT4), PRODUCT),
    "w4a8_matmul threads": FloatArgument(
        "activations", (3, 4), partial(w4a8_matmul, INT4, num_threads=2), PRODUCT
    ),
    "w4a8_matmul, bias": FloatArgument("bias", (3,), partial(w4a8_matmul, INT4, X), PRODUCT, True),
    "from_float": FloatArgument("weight", (3, 4), partial(QuantLinear.from_float, bits=4)),
    "from_float hadamard": FloatArgument(
        "weight", (3, 4), partial(QuantLinear.from_float, bits=4, hadamard=True)
    ),
    "from_float, bias": FloatArgument(
        "bias", (3,), lambda b: QuantLinear.from_float(X, b, bits=4), optional=True
    ),
    "from_float, smooth": FloatArgument(
        "smooth", (4,), lambda s: QuantLinear.from_float(X, bits=4, smooth=s), optional=True
    ),
    "layer": FloatArgument("x", (3, 4), LAYER, PRODUCT),
}

NOT_FLOATS = {
    "int64": lambda shape: np.ones(shape, np.int64),
    "int8": lambda shape: np.ones(shape, np.int8),
    "uint16": lambda shape: np.ones(shape, np.uint16),
    "bool": lambda shape: np.ones(shape, np.bool_),
    "complex64": lambda shape: np.ones(shape, np.complex64),
    "object": lambda shape: np.full(shape, 1.0, object),
    "str": lambda shape: np.full(shape, "1.0"),
    "datetime64": lambda shape: np.full(shape, 1, "M8[s]"),
    "structured": lambda shape: np.zeros(shape, "f4,f4"),
    "None": lambda shape: None,
    "a string": lambda shape: "1.0",
    "list of strings": lambda shape: ["1.0"],
    "list of bools": lambda shape: np.ones(shape, bool).tolist(),
    "list of complex": lambda shape: np.ones(shape, complex).tolist(),
    "ragged list": lambda shape: [[1.0], [2.0, 3.0]],
    "generator": lambda shape: (value for value in (1.0, 2.0)),
    "int64 scalar": lambda shape: np.int64(1),
}

float_arguments = pytest.mark.parametrize("argument", FLOAT_ARGUMENTS.values(), ids=FLOAT_ARGUMENTS.keys())


def check_float_argument(argument, x, error, message, fields):
    check_raises(error, f"{argument.name}: {message}", fields, argument.call, x)
    if argument.out is not None:
        check_raises(error, f"{argument.name}: {message}", fields, argument.call, x, out=argument.out)


@float_arguments
@pytest.mark.parametrize("make", NOT_FLOATS.values(), ids=NOT_FLOATS.keys())
def test_not_floats(make, argument):
    made = make(argument.shape)
    if not (made is None and argument.optional):
        check_float_argument(argument, made, DTypeError, "expected a float array", {})


@float_arguments
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", ">f4", "bfloat16", "longdouble"])
def test_non_finite(dtype, argument):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    x = np.ones(argument.shape, dtype)
    for value in (NAN, INF, -INF):
        for index in {0, x.size // 2, x.size - 1}:
            bad = x.copy()
            bad.flat[index] = value
            # And a later one of another kind: the first is reported.
            bad.flat[-1] = value if index == x.size - 1 else -INF if value != value else NAN
            fields = {"index": index, "value": value, "argument": argument.name}
            message = f"expected finite values, got {value} at flat index {index}"
            check_float_argument(argument, bad, NonFiniteError, message, fields)


@float_arguments
def test_number_that_overflows_float32(argument):
    x = np.ones(argument.shape)
    x.flat[1] = -1e300
    expected = {"index": 1, "value": -1e300}
    check_float_argument(
        argument, x, NonFiniteError, "expected numbers within float32, got -1e+300", expected
    )
    x.flat[0] = INF
    check_float_argument(argument, x, NonFiniteError, "expected finite values", {"index": 0, "value": INF})


@float_arguments
def test_the_index_counts_in_c_order(argument):
    x = np.asfortranarray(np.ones(argument.shape, F32))
    index = 1 if x.ndim == 1 else x.shape[1] + 1
    x[(1,) * x.ndim] = NAN
    check_float_argument(argument, x, NonFiniteError, "expected finite values", {"index": index})


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF, 0x7FFF])
def test_every_kind_of_float16_infinity_and_nan(bits, isa):
    for n in (1, 8, 23):
        x = np.ones(n, np.float16)
        x.view(np.uint16)[n - 1] = bits
        check_raises(NonFiniteError, "x: expected finite", {"index": n - 1}, dynamic_quantize_int8, x)


@pytest.mark.parametrize("bits", [0x7F81, 0xFF81, 0x7FBF])
def test_signaling_nan_in_bfloat16(bits):
    x = np.ones(9, pytest.importorskip("ml_dtypes").bfloat16)
    x.view(np.uint16)[4] = bits
    check_raises(NonFiniteError, "x: expected finite", {"index": 4}, dynamic_quantize_int8, x)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0xFF800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000])
@pytest.mark.parametrize("n", [1, 64, 100, 4097, 8200])
def test_every_kind_of_infinity_and_nan_at_many_indices(n, bits, isa):
    for index in {0, n // 3, n - 1}:
        x = np.zeros(n, F32)
        x.view(np.uint32)[index] = bits
        for mode in (MaxAbs(), Percentile(0.5)):
            check_raises(NonFiniteError, "x:", {"index": index}, dynamic_quantize_int8, x, mode)


def test_nan_in_the_last_of_many_rows_leaves_out_unchanged():
    x = np.ones((1000, 33), F32)
    x[-1, -1] = NAN
    for fmt in (PER_ROW, DynQuantFormat.INT4_PER_ROW, PACKED_ROWS, PER_GROUP, PACKED_GROUPS):
        out = full_of_77(fmt.data_shape(x.shape), fmt.data_dtype)
        for threads in (1, 4):
            quantize = partial(dynamic_quantize, num_threads=threads)
            check_raises(NonFiniteError, "x:", {"index": x.size - 1}, quantize, x, fmt, out=out)


# In place

IN_PLACE = {
    "NaN": (np.array([[1, 2], [3, NAN]], F32), [1.0, 2.0], NonFiniteError, "expected finite values"),
    "too few factors": (np.ones((2, 3), F32), [1.0, 2.0], FeatureDimMismatchError, "factors:"),
    "zero factor": (np.ones((2, 3), F32), [1.0, 2.0, 0.0], ParameterError, "factors:"),
    "NaN factor": (np.ones((2, 3), F32), [1.0, NAN, 1.0], NonFiniteError, "factors:"),
    "float64": (np.ones((2, 3)), [1.0, 1.0, 1.0], DTypeError, "out:"),
    "Fortran order": (np.ones((2, 3), F32, "F"), [1.0, 1.0, 1.0], LayoutError, "out:"),
}


@pytest.mark.parametrize("smooth", [smooth_activations, smooth_weights])
@pytest.mark.parametrize("x, factors, error, message", IN_PLACE.values(), ids=IN_PLACE.keys())
def test_in_place(x, factors, error, message, smooth):
    check_raises(error, message, {}, smooth, x, factors, out=x)


# All other arguments


class Bad(NamedTuple):
    error: type
    message: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012  (a tuple's default, never changed)
    fields: dict[str, Any] = {}  # noqa: RUF012


def each(values, error, message, function, args=(), name=None, field=None):
    """One bad call for each value: as the argument `name`, else as the last positional argument."""
    return [
        Bad(
            error,
            message,
            function,
            args if name else (*args, value),
            {name: value} if name else {},
            {field: value} if field else {},
        )
        for value in values
    ]


def shape_fields(expected, actual, argument):
    return {"expected": expected, "actual": actual, "argument": argument}


NOT_A_MODE = [None, "MaxAbs", 0.99, MaxAbs, Percentile, ("p", 0.5)]
NOT_A_COUNT = [0, -1, 1.0, 2.5, "2", None, True, [1]]
NOT_THREADS = [*(value for value in NOT_A_COUNT if value != -1), -2]
NOT_A_PERCENTILE = [0, 0.0, -0.1, 1.0000001, 2, NAN, INF, -INF, "0.5", None, True, [0.5], 1j, 10**400]
NOT_AN_ALPHA = [-1e-9, 1.0000001, -1, 2, NAN, INF, "0.5", None, True, [0.5], 1j]
NOT_AN_EPSILON = [0, 0.99e-10, -1.0, NAN, INF, 3.5e38, "1", None, True, [1e-5]]
NOT_A_CLIP = [0, -127, NAN, INF, -INF, 1e-60, 1e39, 1e300, 10**400, "127", None, True, [127], 7j]
NOT_A_FLAG = [None, 0, 1, "yes", 1.0, [True]]
NOT_INT4 = [None, X, WEIGHT, "q", Q, dynamic_quantize_int4(X, packed=True), quantize_weights(X),
            dynamic_quantize(X, DynQuantFormat.int4_per_group(3))]  # fmt: skip
NOT_A_FORMAT = [None, "INT8_PER_ROW", 8, DynQuantFormat, MaxAbs()]
TWO_AXES = "(..., k) with at least two axes"


def with_scale(scale):
    """INT4 with `scale` in the first group of the last row."""
    scales = INT4.scales.copy()
    scales[2, 0] = scale
    return dataclasses.replace(INT4, scales=scales)


BAD_CALLS = [
    *each(NOT_A_CLIP, ParameterError, "clip_val:", compute_scale, (X,)),
    *each(NOT_A_MODE, ParameterError, "mode:", compute_scale, (X, 127)),
    *each(NOT_A_MODE, ParameterError, "mode:", compute_scale, ([], 127)),
    *each(NOT_A_MODE, ParameterError, "mode:", dynamic_quantize_int8, (X,)),
    *each(NOT_A_MODE, ParameterError, "mode:", dynamic_quantize_int8_per_row, (X,)),
    *each(NOT_A_MODE, ParameterError, "mode:", dynamic_quantize_int4, (X,)),
    *each(NOT_A_MODE, ParameterError, "mode:", dynamic_quantize, (X, INT8)),
    *each(NOT_A_FORMAT, ParameterError, "format:", dynamic_quantize, (X,)),
    *each(NOT_THREADS, ParameterError, "num_threads:", per_row, (X,), "num_threads"),
    *each(NOT_THREADS, ParameterError, "num_threads:", dynamic_quantize, (X,), "num_threads"),
    Bad(ParameterError, "num_threads:", dynamic_quantize, (X,), {"num_threads": 0, "out": CODES}),
    *each([[np.ones(3, np.int8)] * 2, [np.int8(1)], (memoryview(b"ab"),)], DTypeError,
          "x: expected a float array, got dtype", dynamic_quantize_int8),
    Bad(DTypeError, "x: expected a float array, got dtype object from MaxAbs", dynamic_quantize, (MaxAbs(),)),
    Bad(ParameterError, "packed:", dynamic_quantize, (X, PER_ROW), {"packed": True}),
    Bad(ParameterError, "packed:", dynamic_quantize, (X, PACKED_ROWS), {"packed": "yes"}),
    Bad(ParameterError, "packed:", dynamic_quantize, (X, PACKED_ROWS), {"packed": None}),
    Bad(ParameterError, "packed:", dynamic_quantize, (X,), {"packed": True, "out": ROWS_OF_BYTES}),
    *(
        Bad(ShapeMismatchError, "x:", function, (x,), {}, shape_fields(TWO_AXES, np.shape(x), "x"))
        for function in (dynamic_quantize_int8_per_row, dynamic_quantize)
        for x in (2.0, ROW, [], [1.0])
    ),
    # Modes and formats
    *each(NOT_A_PERCENTILE, InvalidPercentileError, "p: expected", Percentile, field="p"),
    *each([0, 3, 16, "8", None, [8]], ParameterError, "bits:", lambda bits: DynQuantFormat(bits, "per_row")),
    *each(["per_channel", "", None, 1], ParameterError, "granularity:", lambda name: DynQuantFormat(8, name)),
    *each([0, 32, "32"], ParameterError, "group_size:", lambda size: DynQuantFormat(8, "per_row", size)),
    Bad(ParameterError, "packed:", DynQuantFormat, (8, "per_row"), {"packed": True}),
    # DynQuantTensor
    *each([None, [1, 2], WEIGHT.astype(np.uint8), X], DTypeError, "data:", lambda data: DynQuantTensor(
        data, np.ones(1, F32), None, (3, 4), INT8)),
    *each([None, [1.0], 1.0, np.ones(1)], DTypeError, "scales:", lambda scales: DynQuantTensor(
        WEIGHT, scales, None, (3, 4), INT8)),
    Bad(DTypeError, "data:", DynQuantTensor, (WEIGHT, SCALES, None, (3, 8), PACKED_ROWS)),
    Bad(ShapeMismatchError, "data:", DynQuantTensor, (WEIGHT, SCALES, None, (4, 3), PER_ROW), {},
        shape_fields((4, 3), (3, 4), "data")),
    Bad(ShapeMismatchError, "data:", DynQuantTensor, (ROWS_OF_BYTES, SCALES, None, (3, 9), PACKED_ROWS), {},
        shape_fields((3, 5), (3, 2), "data")),
    Bad(ShapeMismatchError, "scales:", DynQuantTensor, (WEIGHT, SCALES, None, (3, 4), INT8), {},
        shape_fields((1,), (3,), "scales")),
    Bad(ShapeMismatchError, "scales:", DynQuantTensor, (WEIGHT, SCALES[:, None], None, (3, 4), PER_ROW), {},
        shape_fields((3,), (3, 1), "scales")),
    Bad(ShapeMismatchError, "shape:", DynQuantTensor, (WEIGHT, SCALES, None, (), PER_ROW)),
    *each([0, SCALES], ParameterError, "zero_points:", lambda zero: DynQuantTensor(
        WEIGHT, SCALES, zero, (3, 4), PER_ROW)),
    # quantization_mae
    *each([None, X, WEIGHT, [1], "q"], ParameterError, "quantized:", quantization_mae, (X,)),
    *(
        Bad(ShapeMismatchError, "", quantization_mae, (x, Q), {}, shape_fields((3, 4), x.shape, "original"))
        for x in (X.T, X.ravel(), X[:2], X[None], np.empty(0, F32))
    ),
    # Smoothing
    *each(NOT_AN_ALPHA, InvalidAlphaError, "alpha: expected", SmoothQuantConfig, field="alpha"),
    *each(NOT_AN_EPSILON, ParameterError, "epsilon:", SmoothQuantConfig, (0.5,)),
    *each([None, 0.5, SmoothQuantConfig, "0.5"], ParameterError, "config:", compute_smooth_factors, (X, X)),
    *each([2.0], ShapeMismatchError, "activations:", lambda a: compute_smooth_factors(a, X)),
    *(
        bad
        for call in (compute_smooth_factors, search_alpha)
        for bad in (
            Bad(FeatureDimMismatchError, "activations[1]: expected 4", call, ([X, X[:, :3]], X)),
            Bad(ShapeMismatchError, "activations[1]: expected", call, ([X, F32(2)], X)),
            Bad(NonFiniteError, "activations[1]: expected finite", call, ([X, NANS], X), {}, {"index": 0}),
            Bad(DTypeError, "activations[0]: expected a float array", call, ({"x": X}, X)),
            Bad(DTypeError, "activations: expected a float array", call, (range(4), X)),
            Bad(EmptyInputError, "activations: expected at least one row", call, ([X[:0], X[:0]], X)),
            Bad(EmptyInputError, "activations: expected at least one row", call, (iter([]), X)),
            Bad(ParameterError, "activations: expected a Calibrator made with", call, (Calibrator(), X)),
            Bad(FeatureDimMismatchError, "weights:", call, (SAMPLED, X[:, :3])),
            *each(NOT_THREADS, ParameterError, "num_threads: expected", call, (X, X), "num_threads"),
            *each(NOT_A_MODE, ParameterError, "mode:", call, (SAMPLED, X), "mode"),
        )
    ),
    Bad(ParameterError, "activations: expected a Calibrator made with rows", search_alpha, (SEEN, X)),
    Bad(EmptyInputError, "calibrator: expected at least", compute_smooth_factors, (Calibrator(4), X)),
    Bad(EmptyInputError, "activations: expected at least", search_alpha, (Calibrator(4, rows=2), X)),
    Bad(ParameterError, "calibration: expected a Calibrator made with rows", quantize_weights, (X,),
        {"calibration": SEEN}),
    Bad(FeatureDimMismatchError, "calibration: expected 3", quantize_weights, (X[:, :3],),
        {"calibration": SAMPLED}),
    Bad(EmptyInputError, "calibration: expected at least one row", quantize_weights, (X,),
        {"calibration": Calibrator(4, rows=2)}),
    *each([ROW, [1.0, -1e-45, 1, 1]], ParameterError, "activations: expected magnitudes of at least 0",
          lambda a: compute_smooth_factors(a, X)),
    *each([X[:0], X[:, :0], []], EmptyInputError, "activations:", lambda a: compute_smooth_factors(a, X)),
    *each([X, FACTORS], FeatureDimMismatchError, "weights:", lambda a: compute_smooth_factors(a, X[:, :3])),
    *each(NOT_A_MODE, ParameterError, "mode:", lambda mode: compute_smooth_factors(X, X, mode=mode)),
    *each([*NOT_A_MODE, MEDIAN, Percentile(1.0)], ParameterError, "mode: expected MaxAbs()",
          lambda mode: compute_smooth_factors(FACTORS, X, mode=mode)),
    *(
        bad
        for call in (compute_smooth_factors, search_alpha)
        for bad in (
            *each([2.0, ROW, X[None], [[[1.0] * 4]]], ShapeMismatchError, "weights: expected",
                  call, (X,)),
            *each([[X, ROW], (X, X[None]), [X, 1.0], [X, []]], ShapeMismatchError, "weights[1]: expected",
                  call, (X,)),
            *each([X[:0], X[:, :0], [], ()], EmptyInputError, "weights: expected", call, (X,)),
            Bad(EmptyInputError, "weights[1]: expected", call, (X, [X, X[:0]])),
            Bad(DTypeError, "weights[0]: expected", call, (X, [None, X])),
            Bad(FeatureDimMismatchError, "weights:", call, (X, X[:, :3]), {},
                {"in_features": 4, "factors_len": 3, "argument": "weights"}),
            Bad(FeatureDimMismatchError, "weights[1]:", call, (X, [X, X[:, :3]]), {},
                {"in_features": 4, "factors_len": 3, "argument": "weights[1]"}),
        )
    ),
    Bad(ParameterError, "config: expected factors within float32", compute_smooth_factors,
        (np.full(4, 3e38), X, SmoothQuantConfig(1.0, 1e38))),
    # Folding
    *each([FACTORS[:3], np.ones(5), []], FeatureDimMismatchError, "gamma:", fold_smooth_factors, (FACTORS,)),
    *each([FACTORS[:3], np.ones(5), []], FeatureDimMismatchError, "beta:", fold_smooth_factors,
          (FACTORS, FACTORS)),
    *each([1.0, X], ShapeMismatchError, "gamma:", fold_smooth_factors, (FACTORS,)),
    *each([1.0, X], ShapeMismatchError, "beta:", fold_smooth_factors, (FACTORS, FACTORS)),
    *each([[1, 1, 1, 0.0], [1, -1, 1, 1]], ParameterError, "factors:", lambda f: fold_smooth_factors(f, ROW)),
    Bad(NonFiniteError, "beta:", fold_smooth_factors, (FACTORS, FACTORS, [1.0, NAN, 1, 1]), {}, {"index": 1}),
    Bad(NonFiniteError, "gamma / factors:", fold_smooth_factors, ([1, 1, 1e-5, 1], [1, 1, 1e38, 1]), {},
        {"index": 2, "value": INF}),
    # Search
    *each([2.0, ROW, []], ShapeMismatchError, "activations:", lambda a: search_alpha(a, X)),
    *each([X[:0], X[:, :0]], EmptyInputError, "activations:", lambda a: search_alpha(a, X)),
    *each(NOT_AN_ALPHA, InvalidAlphaError, "alphas[1]: expected",
          lambda alpha: search_alpha(X, X, alphas=[0.5, alpha])),
    *each([0.5, 1], ParameterError, "alphas: expected", lambda alphas: search_alpha(X, X, alphas=alphas)),
    *each([[], (), iter([])], EmptyInputError, "alphas:", lambda alphas: search_alpha(X, X, alphas=alphas)),
    *each(NOT_AN_EPSILON, ParameterError, "epsilon:", lambda value: search_alpha(X, X, epsilon=value)),
    *each(NOT_A_MODE, ParameterError, "mode:", lambda mode: search_alpha(X, X, mode=mode)),
    *each([None, 0, 1, "no"], ParameterError, "relative:",
          lambda relative: search_alpha(X, X, relative=relative)),
    Bad(ParameterError, "activations: expected outputs within float32", search_alpha,
        (X * F32(1e38), X * F32(1e38)), {"alphas": [0.5]}),
    Bad(ParameterError, "activations: expected x / smooth within float32", search_alpha,
        (X * F32(1e38), X * F32(1e12)), {"alphas": [0.0], "epsilon": 1e-10}),
    *(
        bad
        for smooth in (smooth_activations, smooth_weights)
        for bad in (
            Bad(ShapeMismatchError, ": expected shape", smooth, (2.0, [1.0])),
            Bad(FeatureDimMismatchError, "factors:", smooth, (X, FACTORS[:3]), {},
                {"in_features": 4, "factors_len": 3, "expected": (4,), "actual": (3,)}),
            Bad(FeatureDimMismatchError, "factors:", smooth, (X, [])),
            Bad(FeatureDimMismatchError, "factors:", smooth, (X[:, :0], FACTORS)),
            Bad(ShapeMismatchError, "factors:", smooth, (X, X)),
            Bad(ShapeMismatchError, "factors:", smooth, (X, 1.0)),
            *each([[1, 1, 1, 0.0], [1, -1, 1, 1], [1, 1, 1, -0.0]], ParameterError, "factors:", smooth, (X,)),
            Bad(ParameterError, "factors:", smooth, (X, [1, 0.0, 1, 1]), {"out": VALUES}),
        )
    ),
    # Calibration
    *each([None, 3, b"a", np.array(5.0)], DTypeError, "batches: expected an iterable", CalibStats.collect),
    *each(
        [3, memoryview(np.ones((1, 2)))],
        ParameterError,
        "alphas: expected an iterable",
        lambda alphas: search_alpha(X, X, alphas=alphas),
    ),
    *each([[], (), iter([]), [[]], [X[:0], []], X[:0]], EmptyInputError, "batches:", CalibStats.collect),
    *each([["a"], "ab", [X, None]], DTypeError, "batches[", CalibStats.collect),
    *each([array.array("i", [1]), X.astype(int), [True], [10**400]], DTypeError, "batches[0]:",
          CalibStats.collect),
    *each([0, -1, 1.0, "2", True, [1]], ParameterError, "channels: expected an int >= 1", Calibrator),
    *each([2**61, 10**30], ParameterError, "channels: expected an int <=", Calibrator),
    *each([0, -1, 2.5, True, [1]], ParameterError, "rows: expected an int >= 1",
          lambda n: Calibrator(4, rows=n)),
    Bad(ParameterError, "rows: expected None without channels", Calibrator, (), {"rows": 3}),
    Bad(ParameterError, "rows: expected a Calibrator made with rows", SEEN.sample, ()),
    *each(NOT_THREADS, ParameterError, "num_threads: expected", SEEN.update, (X,), "num_threads"),
    *each([SAMPLED, Calibrator(4, rows=3)], ParameterError, "other: expected rows=None", SEEN.merge),
    *each([None, X, CalibStats.collect([X])], ParameterError, "other: expected a Calibrator", SEEN.merge),
    *each([Calibrator(), Calibrator(3)], ParameterError, "other: expected channels=4, got", SEEN.merge),
    *(
        Bad(ShapeMismatchError, "batch:", SEEN.update, (x,), {}, shape_fields("(..., 4)", x.shape, "batch"))
        for x in (X[0, 0], ROW[:3], X.T, X[:, :0])
    ),
    *each(NOT_A_PERCENTILE, InvalidPercentileError, "p: expected", SEEN.percentile, field="p"),
    *each(NOT_A_PERCENTILE, InvalidPercentileError, "p: expected", SEEN.channel_percentile, field="p"),
    Bad(EmptyInputError, "calibrator:", Calibrator().stats, ()),
    Bad(EmptyInputError, "calibrator:", Calibrator().percentile, (0.5,)),
    Bad(EmptyInputError, "calibrator:", Calibrator(4).channel_amax, ()),
    Bad(ParameterError, "channels: expected a Calibrator made with channels", Calibrator().channel_amax, ()),
    Bad(ParameterError, "channels:", Calibrator().channel_percentile, (0.5,)),
    *each([None, 3, b"x", [1]], ParameterError, "path: expected a str or os.PathLike", SEEN.save),
    *each([None, 3, b"x", [1]], ParameterError, "path: expected a str or os.PathLike", Calibrator.load),
    *each(["a\0b", "\ud800"], ParameterError, "path: expected a name that a file can have", SEEN.save),
    *each(["a\0b", "\ud800"], ParameterError, "path: expected a name that a file can have", Calibrator.load),
    *each([__file__, os.devnull], ParameterError, "path: expected an archive of", Calibrator.load),
    # Integer products
    *each([WEIGHT.tolist(), WEIGHT.astype(np.int16), WEIGHT.astype(np.uint8), X, None, "w"], DTypeError,
          "weight_i8:", lambda weight: w8a8_matvec(weight, SCALES, ROW)),
    *each([WEIGHT[0], WEIGHT[None], WEIGHT[0, 0]], ShapeMismatchError, "weight_i8:",
          lambda weight: w8a8_matvec(weight, SCALES, ROW)),
    *each([SCALES[:2], [], np.ones(4)], ShapeMismatchError, "weight_scales:",
          lambda scales: w8a8_matvec(WEIGHT, scales, ROW)),
    *each([1.0, SCALES[:, None], SCALES[None]], ShapeMismatchError, "weight_scales:",
          lambda scales: w8a8_matvec(WEIGHT, scales, ROW)),
    *each([ROW[:3], X, ROW[None], 1.0], ShapeMismatchError, "activation:", w8a8_matvec, (WEIGHT, SCALES)),
    *each([[], X[:0], np.empty((4, 0))], EmptyInputError, "activation:", w8a8_matvec, (WEIGHT, SCALES)),
    Bad(EmptyInputError, "activation:", w8a8_matvec, (WEIGHT[:, :0], SCALES, []), {"out": Y}),
    # 4-bit weights
    *each([0, 3, 16, "4", None, 4.0, True, np.float64(4), [4]], ParameterError, "bits: expected 4 or 8",
          lambda bits: quantize_weights(X, bits=bits)),
    *each([0, -1, 2.0, "32", True, [32], np.ones(1, int)], ParameterError, "group_size: expected an int",
          lambda size: quantize_weights(X, bits=4, group_size=size)),
    *each(NOT_A_FLAG[1:], ParameterError, "symmetric: expected a bool",
          lambda flag: quantize_weights(X, bits=4, symmetric=flag)),
    *each(NOT_A_FLAG, ParameterError, "search: expected a bool", quantize_weights, (X,), "search"),
    *each(NOT_THREADS, ParameterError, "num_threads:", quantize_weights, (X,), "num_threads"),
    Bad(ParameterError, "symmetric: expected True or None", quantize_weights, (X,), {"symmetric": False}),
    *each([2.0, ROW, X[None], []], ShapeMismatchError, "w: expected shape (out_features, in_features)",
          quantize_weights),
    *each([X[:0], X[:, :0]], EmptyInputError, "w: expected at least one element", quantize_weights),
    *each(NOT_INT4, ParameterError, "weight: expected", lambda weight: w4a8_matmul(weight, X)),
    *each(NOT_INT4, ParameterError, "weight: expected", lambda weight: w4a8_matvec(weight, ROW)),
    *(
        bad
        for call, x in ((w4a8_matmul, X), (w4a8_matvec, ROW))
        for bad in (
            Bad(ShapeMismatchError, "weight: expected shape (out_features, in_features)", call,
                (dynamic_quantize(X[None], PACKED_ROWS), x)),
            Bad(ShapeMismatchError, "weight: expected shape (out_features, in_features)", call,
                (dynamic_quantize(ROW, PACKED_GROUPS), x)),
            Bad(NonFiniteError, "weight.scales: expected finite", call, (with_scale(NAN), x), {},
                {"index": 4}),
            Bad(NonFiniteError, "weight.scales: expected finite", call, (with_scale(-INF), x), {},
                {"value": -INF}),
            Bad(DTypeError, "out:", call, (INT4, x), {"out": full_of_77((*x.shape[:-1], 3), float)}),
            Bad(ShapeMismatchError, "out:", call, (INT4, x), {"out": full_of_77((4, 3), F32)}),
            Bad(LayoutError, "out:", call, (INT4, x), {"out": full_of_77((6, 6), F32)[::2, ::2] if x is X
                                                       else full_of_77(6, F32)[::2]}),
        )
    ),
    *each([X[:, :3], X[None], ROW, 1.0, [], X[:, :0]], ShapeMismatchError, "activations:",
          w4a8_matmul, (INT4,)),
    *each([ROW[:3], X, ROW[None], 1.0], ShapeMismatchError, "activation:", w4a8_matvec, (INT4,)),
    *each([[], X[:0], np.empty((4, 0))], EmptyInputError, "activation:", w4a8_matvec, (INT4,)),
    *each([SCALES[:2], [], 1.0, SCALES[None]], ShapeMismatchError, "bias:", w4a8_matmul, (INT4, X)),
    *each(NOT_THREADS, ParameterError, "num_threads:", w4a8_matmul, (INT4, X), "num_threads"),
    *each(NOT_THREADS, ParameterError, "num_threads:", LAYER, (X,), "num_threads"),
    *each(NOT_THREADS, ParameterError, "num_threads:", QuantLinear.from_float, (X,), "num_threads"),
    *each([X[:, :3], ROW[:3], 1.0, []], ShapeMismatchError, "x: expected shape", LAYER),
    # QuantLinear
    *each([0, 16, "4", None, np.zeros(2, "f4,f4")], ParameterError, "bits:",
          lambda bits: QuantLinear.from_float(X, bits=bits)),
    *each([0, 2.0, True], ParameterError, "group_size:",
          lambda size: QuantLinear.from_float(X, bits=4, group_size=size)),
    *(
        bad
        for name in ("search", "hadamard")
        for bad in each(NOT_A_FLAG, ParameterError, f"{name}: expected", QuantLinear.from_float, (X,), name)
    ),
    Bad(ParameterError, "symmetric:", QuantLinear.from_float, (X,), {"symmetric": "no"}),
    Bad(ParameterError, "rows within float32 after rotation", QuantLinear.from_float, (X * F32(3e38),),
        {"hadamard": True}),
    Bad(ParameterError, "expected the range", QuantLinear.from_float, (X.T * F32(3e38),), {"bits": 4}),
    Bad(ParameterError, "w: expected the range", quantize_weights, (X.T * F32(3e38),), {"bits": 4}),
    # Instruction sets
    *each(["sse9", "", "AVX2", 7], IsaError, "is not available", _isa.select),
]  # fmt: skip


def name_of(bad):
    given = re.sub(r" at 0x\w+", "", repr(bad.kwargs or bad.args[-1:]))  # parallel runs need equal names
    return f"{getattr(bad.function, '__name__', '')} {bad.message} {given}".replace("\n", "")[:80]


@pytest.mark.parametrize("bad", BAD_CALLS, ids=name_of)
def test_bad_calls(bad):
    check_raises(bad.error, bad.message, bad.fields, bad.function, *bad.args, **bad.kwargs)


def test_granularity_given_as_an_array():
    check_raises(ParameterError, "granularity:", {}, DynQuantFormat, 8, np.array(["per_row"] * 2))


def test_keyword_only():
    for call in (
        lambda: dynamic_quantize_int8(X, MaxAbs(), CODES),
        lambda: dynamic_quantize_int8_per_row(X, MaxAbs(), CODES),
        lambda: dynamic_quantize_int4(X, MaxAbs(), True),
        lambda: dynamic_quantize(X, INT8, MaxAbs(), True),
        lambda: Q.dequantize(VALUES),
        lambda: smooth_activations(X, FACTORS, VALUES),
        lambda: smooth_weights(X, FACTORS, VALUES),
        lambda: compute_smooth_factors(X, X, SmoothQuantConfig(), MaxAbs()),
        lambda: search_alpha(X, X, [0.5]),
        lambda: w8a8_matvec(WEIGHT, SCALES, ROW, Y),
        lambda: quantize_weights(X, 4),
        lambda: w4a8_matvec(INT4, ROW, Y),
        lambda: w4a8_matmul(INT4, X, SCALES, PRODUCT),
        lambda: QuantLinear.from_float(X, SCALES, 4),
        lambda: int8_inner(WEIGHT, WEIGHT, np.int64),
        lambda: LAYER(X, PRODUCT),
    ):
        with pytest.raises(TypeError, match="positional"):
            call()


# The exceptions themselves

INSTANCES = [
    (ShapeMismatchError((2, 3), (3, 2)), "array: expected shape (2, 3), got (3, 2)"),
    (ShapeMismatchError("(n,)", (1, 2), "x"), "x: expected shape (n,), got (1, 2)"),
    (FeatureDimMismatchError(4, 3), "factors: expected 4 in_features, got 3"),
    (FeatureDimMismatchError(4, 3, "weights"), "weights: expected 4 in_features, got 3"),
    (InvalidAlphaError(1.5), "alpha: expected a number in [0, 1], got 1.5"),
    (InvalidAlphaError(-1, "alphas[3]"), "alphas[3]: expected a number in [0, 1], got -1"),
    (InvalidPercentileError("x"), "p: expected a number in (0, 1], got 'x'"),
    (NonFiniteError(7, -INF), "x: expected finite values, got -inf at flat index 7"),
    (NonFiniteError(0, INF, "weights"), "weights: expected finite values, got inf at flat index 0"),
    (EmptyInputError("nothing there"), "nothing there"),
    (ParameterError("bits: no"), "bits: no"),
    (DTypeError("x: no"), "x: no"),
    (LayoutError("out: no"), "out: no"),
    (IsaError("none"), "none"),
]


@pytest.mark.parametrize("error, text", INSTANCES, ids=lambda value: str(value)[:40])
def test_text_pickle_and_copy(error, text):
    assert str(error) == text
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert (str(twin), twin.args, vars(twin)) == (text, error.args, vars(error))


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no")


NESTED = [[["x" * 300] * 9] * 9] * 9


@pytest.mark.parametrize("value", [-(10**5000), "x" * 10**6, [0.1] * 10**6, NESTED, Unprintable()], ids=type)
def test_messages_are_short(value):
    for call in (
        lambda: Percentile(value),
        lambda: SmoothQuantConfig(value),
        lambda: DynQuantFormat(value, "per_tensor"),
        lambda: dynamic_quantize_int8(X, value),
        lambda: dynamic_quantize_int8_per_row(X, num_threads=value),
        lambda: compute_scale(X, value),
    ):
        with pytest.raises((ParameterError, InvalidPercentileError, InvalidAlphaError)) as error:
            call()
        assert len(str(error.value)) < 400


class Refuses:
    def __init__(self, error):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, OverflowError, AttributeError])
def test_error_in_array_conversion_becomes_dtype_error(kind):
    """PyTorch tensors that require a gradient raise RuntimeError, for example."""
    with pytest.raises(DTypeError, match="x: expected a float array, got Refuses") as caught:
        dynamic_quantize_int8(Refuses(kind("no gradient, please" + "!" * 10**6)))
    assert len(str(caught.value)) <= 1000
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize("kind", [MemoryError, SystemError, KeyboardInterrupt])
def test_memory_and_system_errors_pass_through(kind):
    with pytest.raises(kind):
        dynamic_quantize_int8(Refuses(kind()))


def test_short_message_for_a_dtype_of_many_fields():
    fields = np.zeros(3, [(f"field {i}", "f4") for i in range(5000)])
    for call in (
        lambda: dynamic_quantize_int8(fields),
        lambda: dynamic_quantize_int8([1.0, 2.0, 3.0], out=fields),
        lambda: smooth_activations(X, fields),
    ):
        with pytest.raises(DTypeError) as caught:
            call()
        assert len(str(caught.value)) <= 1000
        assert len(repr(caught.value)) <= 1100


def test_every_exception_has_two_bases():
    tree = {e for e in vars(dynquant).values() if isinstance(e, type) and issubclass(e, DynQuantError)}
    assert tree == {DynQuantError, *BASES}
    assert {type(error) for error, _ in INSTANCES} == set(BASES)
    for error, base in BASES.items():
        assert issubclass(error, DynQuantError)
        assert issubclass(error, base)
        assert getattr(builtins, base.__name__) is base


def test_error_in_the_callers_iterator_passes_through():
    def batches():
        yield X
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        CalibStats.collect(batches())


PACKED = DynQuantFormat.INT4_PER_ROW_PACKED
ML_FLOATS = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float6_e2m3fn", "float4_e2m1fn"]


@pytest.mark.parametrize("name", ML_FLOATS)
def test_small_floats_go_through_float32(name):
    dtype = getattr(pytest.importorskip("ml_dtypes"), name, None)
    if dtype is None:
        pytest.skip(f"this ml_dtypes has no {name}")
    x = np.linspace(-2, 2, 9).astype(dtype)
    expected = dynamic_quantize_int8(x.astype(F32))
    assert dynamic_quantize_int8(x).data.tolist() == expected.data.tolist()


@pytest.mark.parametrize(
    "x, way",
    [
        (np.ones(3, int), r"\.astype\(np.float32\)"),
        (np.ones(3, bool), r"\.astype\(np.float32\)"),
        (np.array([np.ones(2), np.ones(2), None], object), r"\.to_numpy\(np.float32\).*np\.stack"),
        ({1.0, 2.0}, "from set; make an array or a list"),
        (iter([1.0, 2.0]), "from list_iterator; make an array or a list"),
    ],
)
def test_what_is_no_float_array_is_told_the_way(x, way):
    with pytest.raises(DTypeError, match=way):
        dynquant.dynamic_quantize_int8(x)


@pytest.mark.parametrize("x", [[np.ma.ones(3)], [[1.0], (np.ma.ones(1),)]])
def test_a_list_of_masked_arrays(x):
    with pytest.raises(
        DTypeError, match="x: expected a float array, got a list of masked ones; fill them first"
    ):
        dynamic_quantize_int8(x)


def test_the_position_of_what_is_not_finite():
    x = np.ones((2, 3, 4), F32)
    x[1, 2, 0] = np.nan
    with pytest.raises(NonFiniteError, match=r"got nan at flat index 20, position \(1, 2, 0\)") as caught:
        dynquant.dynamic_quantize_int8_per_row(x)
    assert (caught.value.index, caught.value.position) == (20, (1, 2, 0))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.index, copy.position, str(copy)) == (20, (1, 2, 0), str(caught.value))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"scales": -1.0}, ParameterError, "scales: expected numbers of at least 0, got -1"),
        ({"scales": np.nan}, NonFiniteError, "scales: expected finite values"),
        ({"scales": [1.0]}, ShapeMismatchError, r"scales: expected shape \(2,\)"),
        ({"scales": [1, 2]}, None, ""),
        ({"scales": np.ones(2, int)}, DTypeError, "scales: expected a float array"),
        ({"zero_points": 3}, ParameterError, "zero_points: expected None unless codes are packed"),
        ({"zero_points": 16, "format": PACKED}, ParameterError, r"zero_points: expected numbers in 0\.\.15"),
        ({"zero_points": 1.0, "format": PACKED}, DTypeError, "zero_points: expected integers"),
        ({"zero_points": [1], "format": PACKED}, ShapeMismatchError, r"zero_points: expected shape \(2,\)"),
        ({"format": "int8"}, ParameterError, "format: expected a DynQuantFormat"),
        ({"out": np.zeros((2, 4), np.int16)}, DTypeError, "out: expected dtype int8"),
        ({"num_threads": 0}, ParameterError, "num_threads"),
    ],
)
def test_scales_that_cannot_be(options, error, message):
    x = np.ones((2, 4), F32)
    call = partial(dynquant.quantize, x, **({"scales": 1.0} | options))
    if error is None:
        call()
        return
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("out", [(), (np.zeros((2, 4), np.int8),), (np.zeros((2, 4), np.int8), np.zeros(2))])
def test_a_pair_of_outs_that_cannot_be(out):
    with pytest.raises((ParameterError, DTypeError), match="out: expected"):
        dynquant.dynamic_quantize(np.ones((2, 4), F32), out=out)
