"""The same operations in PyTorch, ONNX Runtime and NumKong, each as its own users would write it.

A library that is not installed has no column. Where a library offers several ways, the fastest on this
machine stands for it. Everything that can be done once, before the first call, is done once: conversion to
tensors, building and optimizing the model, packing the weights.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import oracle

try:
    import torch
except ImportError:
    torch = None

try:
    import onnx
    import onnxruntime
except ImportError:
    onnxruntime = None

try:
    import numkong
except ImportError:
    numkong = None

Arrays = dict[str, Any]
Call = Callable[[], Any]


# A column's name begins with its library's.
LIBRARIES = {"torch": torch, "ort": onnxruntime, "numkong": numkong}


def contenders(operation: str, arrays: Arrays) -> dict[str, Call]:
    """The columns for one operation: a name, and a call without arguments."""
    threads = arrays.get("threads", 1)
    if torch is not None:
        torch.set_num_threads(threads)
    return {
        column: _fastest([way(arrays) for way in ways])
        for column, ways in PEERS.get(operation, {}).items()
        if _takes_part(column.partition("_")[0], threads)
    }


def _takes_part(library: str, threads: int) -> bool:
    """Where it is installed; NumKong has no threads of its own."""
    return LIBRARIES[library] is not None and (threads == 1 or library != "numkong")


def versions() -> dict[str, str]:
    return {module.__name__: module.__version__ for module in LIBRARIES.values() if module is not None}


def _fastest(calls: Sequence[Call]) -> Call:
    def seconds(call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    if len(calls) == 1:
        return calls[0]
    return min(calls, key=lambda call: min(seconds(call) for _ in range(20)))


# ----------------------------------------------------------------------------------------------------------
# PyTorch


if torch is not None:
    # PyTorch announces that these operators are to move to another package.
    warnings.filterwarnings("ignore", message=r"(?s).*(torch\.quantize|torch\.ao)")


def torch_quantize_per_tensor(a: Arrays) -> Call:
    x = torch.from_numpy(a["x"])
    return lambda: torch.quantize_per_tensor_dynamic(x, torch.qint8, False)


def torch_quantize_per_tensor_f16(a: Arrays) -> Call:
    x = torch.from_numpy(a["x"])
    return lambda: torch.quantize_per_tensor_dynamic(x.float(), torch.qint8, False)


def torch_per_channel(a: Arrays) -> Call:
    x = torch.from_numpy(a["x"])
    zero_points = torch.zeros(len(x), dtype=torch.int64)
    return lambda: torch.quantize_per_channel(x, x.abs().amax(1) / 127, zero_points, 0, torch.qint8)


def torch_round_rows(a: Arrays) -> Call:
    x = torch.from_numpy(a["x"])

    def call() -> Any:
        scale = x.abs().amax(1, keepdim=True) / 127
        return (x / scale).round_().clamp_(-127, 127).to(torch.int8), scale

    return call


def torch_round_rows_aminmax(a: Arrays) -> Call:
    x = torch.from_numpy(a["x"])

    def call() -> Any:
        least, most = x.aminmax(dim=1, keepdim=True)
        scale = torch.maximum(least.neg_(), most) / 127
        return (x / scale).round_().clamp_(-127, 127).to(torch.int8), scale

    return call


def torch_kthvalue(a: Arrays) -> Call:
    x, rank = torch.from_numpy(a["x"]), oracle.rank(a["p"], a["x"].size)
    return lambda: x.abs().kthvalue(rank + 1).values / 127


def torch_dequantize(a: Arrays) -> Call:
    codes = torch.from_numpy(a["codes"])
    q = torch._make_per_tensor_quantized_tensor(codes, float(a["scale"]), 0)
    return lambda: q.dequantize()


def torch_multiply_codes(a: Arrays) -> Call:
    codes, out, scale = torch.from_numpy(a["codes"]), torch.from_numpy(a["out"]), float(a["scale"])
    return lambda: torch.mul(codes, scale, out=out)


def torch_copy_codes(a: Arrays) -> Call:
    codes, out, scale = torch.from_numpy(a["codes"]), torch.from_numpy(a["out"]), float(a["scale"])
    return lambda: out.copy_(codes).mul_(scale)


def torch_smooth(ufunc: str) -> Callable[[Arrays], Call]:
    def way(a: Arrays) -> Call:
        x, out, operate = torch.from_numpy(a["x"]), torch.from_numpy(a["out"]), getattr(torch, ufunc)
        return lambda: operate(x, torch.from_numpy(next(a["turns"])), out=out)

    return way


def torch_column_maxima(a: Arrays) -> Call:
    x, w = torch.from_numpy(a["x"]), torch.from_numpy(a["w"])
    return lambda: (x.abs().amax(0), w.abs().amax(0))


def torch_column_norms(a: Arrays) -> Call:
    x, w = torch.from_numpy(a["x"]), torch.from_numpy(a["w"])

    def amax(m: Any) -> Any:
        return torch.linalg.vector_norm(m, ord=float("inf"), dim=0)

    return lambda: (amax(x), amax(w))


def torch_column_aminmax(a: Arrays) -> Call:
    x, w = torch.from_numpy(a["x"]), torch.from_numpy(a["w"])

    def amax(m: Any) -> Any:
        least, most = m.aminmax(dim=0)
        return torch.maximum(least.neg_(), most)

    return lambda: (amax(x), amax(w))


def torch_float_linear(a: Arrays) -> Call:
    x, w, out = (torch.from_numpy(a[name]) for name in ("x", "w_f32", "out"))
    return checked_linear(a, lambda: torch.mm(x, w.T, out=out))


def torch_dynamic_linear(engine: str) -> Callable[[Arrays], Call]:
    """The operator behind a dynamically quantized Linear, its int8 weights packed by `engine`."""

    def way(a: Arrays) -> Call:
        torch.backends.quantized.engine = engine
        w, scales = torch.from_numpy(a["w"]), torch.from_numpy(a["w_scales"]).double()
        zero_points = torch.zeros(len(w), dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(w, scales, zero_points, 0)
        packed = torch.ops.quantized.linear_prepack(weight, None)
        x, linear_dynamic = torch.from_numpy(np.atleast_2d(a["x"])), torch.ops.quantized.linear_dynamic
        # Activations of 7 bits, as in PyTorch's own module: with 8, a CPU without VNNI saturates.
        return checked_linear(a, lambda: linear_dynamic(x, packed, True))

    return way


# ----------------------------------------------------------------------------------------------------------
# ONNX Runtime


def ort_session(
    nodes: list[Any], inputs: Arrays, outputs: Arrays, weights: Arrays | None = None, threads: int = 1
) -> Any:
    """A session of so many threads; arrays in `inputs` and `outputs` stand for their dtype and shape."""

    def described(arrays: Arrays) -> list[Any]:
        return [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for name, v in arrays.items()
        ]

    constants = [onnx.numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    graph = onnx.helper.make_graph(nodes, "bench", described(inputs), described(outputs), constants)
    opsets = [onnx.helper.make_opsetid("", 13), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def ort_bound_call(session: Any, inputs: Arrays, outputs: Arrays) -> Call:
    """With inputs and results in arrays that were made once."""
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_cpu_input(name, value)
    for name, value in outputs.items():
        binding.bind_output(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)

    def call() -> Any:
        session.run_with_iobinding(binding)
        return next(iter(outputs.values()))

    return call


def ort_quantize_session(a: Arrays) -> tuple[Any, Arrays]:
    dtypes = {"scale": np.float32, "zero_point": np.uint8}
    outputs = {"y": np.empty(a["x"].shape, np.uint8), **{name: np.empty((), t) for name, t in dtypes.items()}}
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], list(outputs))
    return ort_session([node], {"x": a["x"]}, outputs), outputs


def ort_quantize(a: Arrays) -> Call:
    session, _ = ort_quantize_session(a)
    feeds = {"x": a["x"]}
    return lambda: session.run(None, feeds)


def ort_quantize_bound(a: Arrays) -> Call:
    session, outputs = ort_quantize_session(a)
    return ort_bound_call(session, {"x": a["x"]}, outputs)


def ort_dequantize(a: Arrays) -> Call:
    scale = np.float32(a["scale"]).reshape(())
    node = onnx.helper.make_node("DequantizeLinear", ["codes", "scale"], ["out"])
    session = ort_session([node], {"codes": a["codes"]}, {"out": a["out"]}, {"scale": scale})
    feeds = {"codes": a["codes"]}
    return lambda: session.run(None, feeds)


def ort_dynamic_matmul(a: Arrays) -> tuple[Any, Arrays]:
    """Activation uint8 as the operator has it, weights int8 with a scale per column."""
    node = onnx.helper.make_node("DynamicQuantizeMatMul", ["x", "w", "scales"], ["y"], domain="com.microsoft")
    return node, {"w": np.ascontiguousarray(a["w"].T), "scales": a["w_scales"]}


def ort_matmul_nbits(a: Arrays) -> tuple[Any, Arrays]:
    """The same codes, scales and zero points as dynquant's. At accuracy level 4 activations are quantized to
    int8, a block at a time; at the others the product is in floating point, and slower."""
    (n, row_bytes), groups = a["w_packed"].shape, a["w_scales"].shape[1]
    weights = {
        "w": a["w_packed"].reshape(n, groups, -1),
        "scales": a["w_scales"].reshape(-1),
        "zero_points": oracle.packed(a["zero_points"]).reshape(-1),
    }
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", *weights],
        ["y"],
        domain="com.microsoft",
        N=n,
        K=2 * row_bytes,
        bits=4,
        block_size=2 * row_bytes // groups,
        accuracy_level=4,
    )
    return node, weights


def ort_linear(layer: Callable[[Arrays], tuple[Any, Arrays]], *, bound: bool) -> Callable[[Arrays], Call]:
    def way(a: Arrays) -> Call:
        node, weights = layer(a)
        inputs, outputs = {"x": np.atleast_2d(a["x"])}, {"y": np.empty_like(np.atleast_2d(a["out"]))}
        session = ort_session([node], inputs, outputs, weights, a.get("threads", 1))
        if bound:
            return checked_linear(a, ort_bound_call(session, inputs, outputs))
        return checked_linear(a, lambda: session.run(None, inputs)[0])

    return way


# ----------------------------------------------------------------------------------------------------------
# NumKong: the integer products alone, of activations that are quantized before


def numkong_dots(x: np.ndarray, w: np.ndarray, dtype: str, expected: np.ndarray) -> Call:
    """Exact by its own account, and so compared."""
    activations, packed = numkong_tensor(x, dtype), numkong.dots_pack(numkong_tensor(w, dtype), dtype=dtype)
    out = numkong.zeros(expected.shape, dtype="int32")

    def call() -> Any:
        return numkong.dots_packed(activations, packed, out=out)

    np.testing.assert_array_equal(np.asarray(call()), expected)
    return call


def numkong_tensor(values: np.ndarray, dtype: str) -> Any:
    """The bytes of `values`: NumPy has no dtype for two codes to a byte."""
    return numkong.from_pointer(values.ctypes.data, values.shape, dtype, owner=values)


def numkong_inner(a: Arrays) -> Call:
    """With the packing of one side in each call, as dynquant has it."""
    q, w, out = numkong_tensor(a["q"], "int8"), numkong_tensor(a["w"], "int8"), a["out"]
    sums = numkong.zeros(out.shape, dtype="int32")

    def call() -> Any:
        return numkong.dots_packed(q, numkong.dots_pack(w, dtype="int8"), out=sums)

    np.testing.assert_array_equal(np.asarray(call()), oracle.integer_product(a["q"], a["w"]))
    return call


def numkong_inner_packed(a: Arrays) -> Call:
    """With a side that was packed before."""
    return numkong_dots(a["q"], a["w"], "int8", oracle.integer_product(a["q"], a["w"]))


def numkong_int8(a: Arrays) -> Call:
    codes, _ = oracle.quantized(a["x"], 127, axis=1)
    return numkong_dots(codes, a["w"], "int8", oracle.integer_product(codes, a["w"]))


def numkong_int4(a: Arrays) -> Call:
    """Both sides of four bits. Its codes are signed: 0..15 become -8..7, for which the top bit is flipped."""
    codes, _ = oracle.quantized(a["x"], 7, axis=1)
    w = oracle.unpacked(a["w_packed"]).astype(np.int8) - 8
    return numkong_dots(oracle.packed(codes), a["w_packed"] ^ 0x88, "int4", oracle.integer_product(codes, w))


# ----------------------------------------------------------------------------------------------------------


def checked_linear(a: Arrays, call: Call) -> Call:
    """`call`, after a look at its answer, which shows that the peer was given the right weights.

    A scale for all rows together, and 7 bits, put a peer 2 % off the float32 product for normal activations,
    and up to some 30 % where a few rows are much larger than the others. A layer that was handed over in the
    wrong order would be off by more than all of it.
    """
    expected = np.atleast_2d(a["x"] @ a["w_f32"].T)
    error = np.linalg.norm(np.asarray(call()) - expected) / np.linalg.norm(expected)
    if not error < 0.5:
        raise AssertionError(f"a peer's linear layer is {error:.0%} off the float32 product")
    return call


INT8_LINEAR: dict[str, Sequence[Callable[[Arrays], Call]]] = {
    "torch": [torch_dynamic_linear("x86")],
    "torch_fbgemm": [torch_dynamic_linear("fbgemm")],
    "ort": [ort_linear(ort_dynamic_matmul, bound=False)],
    "ort_bound": [ort_linear(ort_dynamic_matmul, bound=True)],
}

# Operation -> column -> the ways to do it, of which the fastest is measured.
PEERS: dict[str, dict[str, Sequence[Callable[[Arrays], Call]]]] = {
    "int8_per_tensor": {
        "torch": [torch_quantize_per_tensor],
        "ort": [ort_quantize],
        "ort_bound": [ort_quantize_bound],
    },
    "int8_per_tensor_f16": {"torch": [torch_quantize_per_tensor_f16]},
    "int8_per_row": {"torch": [torch_per_channel, torch_round_rows, torch_round_rows_aminmax]},
    "percentile_scale": {"torch": [torch_kthvalue]},
    "dequantize": {
        "torch": [torch_dequantize, torch_multiply_codes, torch_copy_codes],
        "ort": [ort_dequantize],
    },
    "smooth_activations": {"torch": [torch_smooth("div")]},
    "smooth_weights": {"torch": [torch_smooth("mul")]},
    "column_maxima": {"torch": [torch_column_maxima, torch_column_norms, torch_column_aminmax]},
    "int8_inner": {"numkong": [numkong_inner], "numkong_packed": [numkong_inner_packed]},
    "w8a8_matvec": INT8_LINEAR,
    "w8a8_linear": {**INT8_LINEAR, "torch_f32": [torch_float_linear], "numkong": [numkong_int8]},
    "w4a8_linear": {
        "torch_f32": [torch_float_linear],
        "ort": [ort_linear(ort_matmul_nbits, bound=False)],
        "ort_bound": [ort_linear(ort_matmul_nbits, bound=True)],
        "numkong_int4": [numkong_int4],
    },
}
