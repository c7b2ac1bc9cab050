"""The same operations in PyTorch and ONNX Runtime, each as its own users would write it.

A library that is not installed has no column. Where a library offers several ways, the fastest on this
machine stands for it. Everything that can be done once, before the first call, is done once: conversion to
tensors, building and optimising the model, packing the weights.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracle

try:
    import torch
except ImportError:
    torch = None

try:
    import onnx
    import onnxruntime
except ImportError:
    onnxruntime = None

Arrays = dict[str, Any]
Call = Callable[[], Any]


def contenders(operation: str, arrays: Arrays) -> dict[str, Call]:
    """The columns for one operation: a name, and a call without arguments."""
    installed = {"torch": torch is not None, "ort": onnxruntime is not None}
    return {
        column: _fastest([way(arrays) for way in ways])
        for column, ways in PEERS.get(operation, {}).items()
        if installed[column.partition("_")[0]]
    }


def versions() -> dict[str, str]:
    return {module.__name__: module.__version__ for module in (torch, onnxruntime) if module is not None}


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
    torch.set_num_threads(1)
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
    return lambda: torch.mm(x, w.T, out=out)


def torch_dynamic_linear(engine: str) -> Callable[[Arrays], Call]:
    """A Linear without bias whose int8 weights, per channel, `engine` has packed."""

    def way(a: Arrays) -> Call:
        from torch.ao import quantization

        n, k = a["w"].shape
        linear = torch.nn.Linear(k, n, bias=False)
        linear.weight.data = torch.from_numpy(a["w_f32"])
        torch.backends.quantized.engine = engine
        config = {torch.nn.Linear: quantization.per_channel_dynamic_qconfig}
        model = quantization.quantize_dynamic(torch.nn.Sequential(linear), config, dtype=torch.qint8)
        x = torch.from_numpy(np.atleast_2d(a["x"]))

        def call() -> Any:
            with torch.inference_mode():
                return model(x)

        return call

    return way


# ----------------------------------------------------------------------------------------------------------
# ONNX Runtime


def ort_session(nodes: list[Any], inputs: Arrays, outputs: Arrays, weights: Arrays | None = None) -> Any:
    """A session of one thread; arrays in `inputs` and `outputs` stand for their dtype and shape."""

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
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


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
    """With its results in arrays that were made once."""
    session, outputs = ort_quantize_session(a)
    binding = session.io_binding()
    binding.bind_cpu_input("x", a["x"])
    for name, value in outputs.items():
        binding.bind_output(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)

    def call(kept: Any = outputs) -> None:
        session.run_with_iobinding(binding)

    return call


def ort_dequantize(a: Arrays) -> Call:
    scale = np.float32(a["scale"]).reshape(())
    node = onnx.helper.make_node("DequantizeLinear", ["codes", "scale"], ["out"])
    session = ort_session([node], {"codes": a["codes"]}, {"out": a["out"]}, {"scale": scale})
    feeds = {"codes": a["codes"]}
    return lambda: session.run(None, feeds)


def ort_dynamic_matmul(a: Arrays) -> Call:
    """Activation uint8 as the operator has it, weights int8 with a scale per column."""
    x = np.atleast_2d(a["x"])
    node = onnx.helper.make_node("DynamicQuantizeMatMul", ["x", "w", "scales"], ["y"], domain="com.microsoft")
    weights = {"w": np.ascontiguousarray(a["w"].T), "scales": a["w_scales"]}
    session = ort_session([node], {"x": x}, {"y": np.atleast_2d(a["out"])}, weights)
    feeds = {"x": x}
    return lambda: session.run(None, feeds)


# Operation -> column -> the ways to do it, of which the fastest is measured. A column's name begins with its
# library's.
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
    "w8a8_matvec": {
        "torch": [torch_dynamic_linear("x86")],
        "torch_fbgemm": [torch_dynamic_linear("fbgemm")],
        "ort": [ort_dynamic_matmul],
    },
    "w8a8_linear": {
        "torch": [torch_dynamic_linear("x86")],
        "torch_fbgemm": [torch_dynamic_linear("fbgemm")],
        "ort": [ort_dynamic_matmul],
        "torch_f32": [torch_float_linear],
    },
}
