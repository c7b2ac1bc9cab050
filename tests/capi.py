"""The C table seen from Python: its functions by name, and what the header and the pxd say about them."""

import ctypes
import os
import re

import numpy as np

import dynquant
from dynquant import capi

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
    """One line a function, spaced as in `int f(const float* x, int64_t n)`."""
    text = f"{result} {name}({parameters})"
    return re.sub(r"\s*\*\s*", "* ", re.sub(r"\s+", " ", text)).replace("* )", "*)")


def header_signatures():
    """Signatures of the table's functions, in the order of the struct."""
    text = re.sub(r"/\*.*?\*/", "", read(HEADER), flags=re.DOTALL)
    body = re.search(r"typedef struct dynquant_api \{(.*?)\} dynquant_api;", text, re.DOTALL)[1]
    found = re.findall(r"(\w+) \(\*(\w+)\)\((.*?)\);", body, re.DOTALL)
    rest = re.sub(r"\w+ \(\*\w+\)\(.*?\);", "", body, flags=re.DOTALL).split()
    assert rest == ["int32_t", "version;", "int32_t", "size;"]
    return [signature(*parts) for parts in found]


def pxd_signatures():
    """The same of the pxd's functions, less the version's."""
    found = re.findall(
        r"^cdef (\w+) dynquant_(\w+)\((.*?)\) noexcept nogil$", read(PXD), re.DOTALL | re.MULTILINE
    )
    assert found.pop(0) == ("int32_t", "api_version", "")
    return [signature(*parts) for parts in found]


def ctypes_of(parameter):
    kind = parameter.removeprefix("const ").rpartition(" ")[0]
    return ctypes.c_void_p if "*" in kind else _TYPES[kind]


def bound(address, line):
    """The function at `address`, to be called with arrays, None and numbers as `line` declares it."""
    result, name, parameters = re.fullmatch(r"(\w+) (\w+)\((.*)\)", line).groups()
    function = ctypes.CFUNCTYPE(_TYPES[result], *map(ctypes_of, parameters.split(", ")))(address)

    def call(*arguments):
        return function(*(a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments))

    return name, call


TABLE = pointer_of(capi._C_API, CAPSULE)
VERSION, SIZE = (ctypes.c_int32 * 2).from_address(TABLE)
ADDRESSES = list((ctypes.c_void_p * len(header_signatures())).from_address(TABLE + 8))
FUNCTIONS = dict(map(bound, ADDRESSES, header_signatures()))
