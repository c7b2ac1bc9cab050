"""The C table from Python: its functions by name, and their signatures in the header and in the pxd."""

import ctypes
import os
import re

import numpy as np

import dynquant
from dynquant import capi
from helpers.common import F32, memory

OK, NON_FINITE, BAD_ARGUMENT = 0, 1, 2
HEADER = os.path.join(dynquant.get_include(), "dynquant.h")
PXD = os.path.join(os.path.dirname(dynquant.__file__), "capi.pxd")
CAPSULE = b"dynquant.capi._C_API"

_TYPES = {
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}

pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def read(path):
    with open(path) as file:
        return file.read()


def signature(result, name, parameters):
    """One line, spaced as in `int f(const float* x, int64_t n)`."""
    text = f"{result} {name}({parameters})"
    return re.sub(r"\s*\*\s*", "* ", re.sub(r"\s+", " ", text)).replace("* )", "*)")


def header_signatures():
    """Signatures of the functions of the table, in the order of the struct."""
    text = re.sub(r"/\*.*?\*/", "", read(HEADER), flags=re.DOTALL)
    body = re.search(r"typedef struct dynquant_api \{(.*?)\} dynquant_api;", text, re.DOTALL)[1]
    found = re.findall(r"(\w+) \(\*(\w+)\)\((.*?)\);", body, re.DOTALL)
    others = re.sub(r"\w+ \(\*\w+\)\(.*?\);", "", body, flags=re.DOTALL).split()
    assert others == ["int32_t", "version;", "int32_t", "size;"]
    return [signature(*parts) for parts in found]


def pxd_signatures():
    """The same from the pxd, without the function that returns the version."""
    found = re.findall(
        r"^cdef (\w+) dynquant_(\w+)\((.*?)\) noexcept nogil$", read(PXD), re.DOTALL | re.MULTILINE
    )
    assert found.pop(0) == ("int32_t", "api_version", "")
    return [signature(*parts) for parts in found]


def ctypes_of(parameter):
    kind = parameter.removeprefix("const ").rpartition(" ")[0]
    return ctypes.c_void_p if "*" in kind else _TYPES[kind]


def bound(address, line):
    """Name and function of the signature `line`; the function takes arrays, None and numbers."""
    result, name, parameters = re.fullmatch(r"(\w+) (\w+)\((.*)\)", line).groups()
    function = ctypes.CFUNCTYPE(_TYPES[result], *map(ctypes_of, parameters.split(", ")))(address)

    def call(*arguments):
        return function(*(a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments))

    return name, call


TABLE = pointer_of(capi._C_API, CAPSULE)
VERSION, SIZE = (ctypes.c_int32 * 2).from_address(TABLE)
ADDRESSES = list((ctypes.c_void_p * len(header_signatures())).from_address(TABLE + 8))
FUNCTIONS = dict(map(bound, ADDRESSES, header_signatures()))


def call(name, *arguments):
    """Call a function of the table that must succeed."""
    status = FUNCTIONS[name](*arguments)
    assert status == OK, (name, status)


def number():
    return np.full(1, 77, F32)


def packed_weights(w, offset=0):
    n_bytes = FUNCTIONS["w8a8_packed_bytes"](*w.shape)
    packed = memory(n_bytes, offset)
    call("w8a8_pack", w, *w.shape, packed)
    return packed


def packed_int4(tensor, offset=0):
    (n, k), group = tensor.shape, tensor.format.group_of(tensor.shape[1])
    packed = memory(FUNCTIONS["w4a8_packed_bytes"](n, k, group), offset)
    call("w4a8_pack", tensor.data, tensor.scales, tensor.zero_points, n, k, group, packed)
    return packed


def packed_minimums(tensor, offset=0):
    (n, k), group = tensor.shape, tensor.format.group_of(tensor.shape[1])
    packed = memory(FUNCTIONS["w4a8_minimums_packed_bytes"](n, k, group), offset)
    call("w4a8_minimums_pack", tensor.data, tensor.scales, tensor.minimums, n, k, group, packed)
    return packed


def packed_groups(codes, scales, group, symmetric, offset=0):
    shape = *codes.shape, group, symmetric
    packed = memory(FUNCTIONS["w8a8_groups_packed_bytes"](*shape), offset)
    call("w8a8_groups_pack", codes, scales, *shape, packed)
    return packed


def arguments_of(name):
    """Valid arguments for the function `name`."""
    x, codes, scales, value = np.ones(6, F32), np.ones(6, np.int8), np.ones(2, F32), number()
    packed, scratch = (
        packed_weights(np.ones((2, 3), np.int8)),
        memory(FUNCTIONS["w8a8_scratch_bytes"](2, 3), 0),
    )
    packed_4 = packed_int4(dynquant.quantize_weights(np.ones((2, 3), F32), bits=4))
    scratch_4 = memory(FUNCTIONS["w4a8_scratch_bytes"](2, 3, 3), 0)
    packed_8 = packed_groups(np.ones((2, 3), np.int8), scales, 3, 0)
    scratch_8 = memory(FUNCTIONS["w8a8_groups_scratch_bytes"](2, 3, 3), 0)
    inner = memory(FUNCTIONS["int8_inner_scratch_bytes"](2, 2, 3), 0)
    search = memory(FUNCTIONS["top_k_scratch_bytes"](2, 2, 3, 8, 3, 1), 0)
    found, indices = np.full(2, 77, F32), np.full(2, 77, np.int64)
    out = np.full(6, 77, F32)
    return {
        "dot_s8s8_s64": [codes, codes, 6],
        "w8a8_packed_bytes": [2, 3],
        "w8a8_scratch_bytes": [2, 3],
        "w4a8_packed_bytes": [2, 3, 3],
        "w4a8_scratch_bytes": [2, 3, 3],
        "amax_f32": [x, 6, value],
        "percentile_f32": [x, 6, 0.5, value],
        "amax_scale_f32": [x, 6, 127, value],
        "percentile_scale_f32": [x, 6, 0.5, 127, value],
        "quantize_row_f32_s8": [x, 6, 1.0, 127, codes],
        "quantize_row_f32_s4": [x, 6, 1.0, codes],
        "dynamic_quantize_row_f32_s8": [x, 6, codes, value],
        "dynamic_quantize_row_f32_s4": [x, 6, codes, value],
        "dequantize_row_s8_f32": [codes, 6, 1.0, out],
        "dequantize_row_s4_f32": [codes, 6, 1.0, out],
        "w8a8_matvec": [codes, scales, 2, 3, codes.copy(), 1.0, out],
        "w8a8_pack": [codes, 2, 3, packed],
        "w8a8_matmul": [packed, scales, scales.copy(), x, 2, 2, 3, scratch, out],
        "w4a8_pack": [codes, scales, np.ones(2, np.uint8), 2, 3, 3, packed_4],
        "w4a8_matmul": [packed_4, scales.copy(), x, 2, 2, 3, 3, scratch_4, out],
        "w4a8_minimums_packed_bytes": [2, 3, 3],
        "w4a8_minimums_pack": [codes, scales, np.ones(2, F32), 2, 3, 3, np.zeros(4096, np.uint8)],
        "w8a8_groups_packed_bytes": [2, 3, 3, 0],
        "w8a8_groups_pack": [codes, scales, 2, 3, 3, 0, packed_8],
        "w8a8_groups_scratch_bytes": [2, 3, 3],
        "w8a8_groups_matmul": [packed_8, scales.copy(), x, 2, 2, 3, 3, 0, scratch_8, out],
        "int8_inner_scratch_bytes": [2, 2, 3],
        "int8_inner_s32": [codes, codes, 2, 2, 3, inner, np.full(4, 77, np.int32)],
        "int8_inner_s64": [codes, codes, 2, 2, 3, inner, np.full(4, 77, np.int64)],
        "top_k_scratch_bytes": [2, 2, 3, 8, 3, 1],
        "top_k": [
            *(x, codes, scales, None, scales.copy(), np.ones(4, np.uint8), 2),
            *(2, 2, 3, 8, 3, 0, 1, search, found, indices),
        ],
        "divide_rows_f32": [x, np.ones(3, F32), 2, 3, out],
        "multiply_rows_f32": [x, np.ones(3, F32), 2, 3, out],
    }[name]
