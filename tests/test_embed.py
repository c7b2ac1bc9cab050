"""Programs in other languages against the installed package: the examples in embed/, and the header alone."""

import glob
import importlib.metadata
import importlib.util
import os
import shutil
import sys

import numpy as np
import pytest
from helpers.capi import HEADER, PXD
from helpers.common import F32, assert_same_bits
from helpers.programs import INCLUDE, STRICT, compiler, environment, library_flags, run, variable

import dynquant

EXAMPLES = os.path.join(os.path.dirname(__file__), "embed")


def run_python(code, folder):
    return run([sys.executable, "-W", "error", "-c", code], cwd=folder)


def built(example, folder, *flags):
    """Build the extension modules of an example, in a copy at `folder`."""
    compiler("CC")
    pytest.importorskip("setuptools")
    shutil.copytree(os.path.join(EXAMPLES, example), folder)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    run(build, cwd=folder, env=environment(CFLAGS=" ".join([variable("CFLAGS"), *flags])))
    return folder


def imported(name, folder):
    (path,) = glob.glob(os.path.join(folder, f"{name}*{variable('EXT_SUFFIX')}"))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def key_cache(tmp_path_factory):
    pytest.importorskip("Cython")
    return imported("key_cache", built("cython_package", tmp_path_factory.mktemp("cython") / "package"))


@pytest.fixture(scope="module")
def byte_rows_folder(tmp_path_factory):
    return built("c_extension", tmp_path_factory.mktemp("c") / "extension", "-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="module")
def byte_rows(byte_rows_folder):
    return imported("byte_rows", byte_rows_folder)


# What is installed


def test_the_header_and_the_pxd_are_installed():
    for path in (HEADER, PXD):
        assert os.path.getsize(path) > 1000
    try:
        files = importlib.metadata.files("dynquant")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed from a wheel")
    names = {str(file) for file in files or ()}
    if "dynquant/__init__.py" in names:  # and not an editable install
        assert {"dynquant/capi.pxd", "dynquant/capi.pyi", "dynquant/include/dynquant.h"} <= names
        assert not {name for name in names if name.endswith((".c", ".pyx", ".pxi"))}


def test_the_interface_is_imported_on_demand():
    code = "import sys, dynquant; dynquant.get_include(); assert 'dynquant.capi' not in sys.modules; "
    run_python(code + "import dynquant.capi; dynquant.capi._C_API", os.path.dirname(PXD))


@pytest.mark.parametrize(
    ("kind", "suffix", "standard"),
    [
        ("CC", "c", "-std=c99"),
        ("CC", "c", "-std=c11"),
        ("CXX", "cpp", "-std=c++11"),
        ("CXX", "cpp", "-std=c++17"),
    ],
)
@pytest.mark.parametrize("used", [False, True])
def test_the_header_compiles(tmp_path, kind, suffix, standard, used):
    source = tmp_path / f"program.{suffix}"
    call = "dynquant_import() == NULL" if used else "0"
    source.write_text(f"#include <dynquant.h>\nint main(void) {{ return {call}; }}\n")
    # -isystem: the strict flags do not apply to Python's headers.
    folders = ["-isystem", INCLUDE, "-I", dynquant.get_include()]
    run([*compiler(kind), standard, *STRICT, *folders, "-c", str(source), "-o", os.devnull])


# The Cython package


def test_cython_package(key_cache):
    rng = np.random.default_rng(0)
    keys, query = rng.standard_normal((5, 70), F32), rng.standard_normal(70, F32)
    cache = key_cache.KeyCache(8, 70)
    cache.append(keys[:2])
    cache.append(keys[2:])
    assert cache.used == 5
    expected = dynquant.dynamic_quantize_int8_per_row(keys)
    for i, key in enumerate(expected.dequantize()):
        assert_same_bits(cache.key(i), key)
    assert_same_bits(cache.scores(query), dynquant.w8a8_matvec(expected.data, expected.scales, query))
    keys[3, 5] = np.nan
    with pytest.raises(ValueError, match="key 2 holds NaN"):
        cache.append(keys[1:4])
    assert cache.used == 5


def test_the_cython_package_needs_no_private_file_and_no_numpy_header(key_cache):
    """Checked in its C source: what that names, a user's compiler must find."""
    with open(os.path.join(os.path.dirname(key_cache.__file__), "key_cache.c")) as file:
        source = file.read()
    assert "dynquant.capi" in source
    for name in ("arrayobject.h", "dynquant.h", "simd.h", "dynquant._core", "dynquant._table"):
        assert name not in source, name


# The C extension


def test_c_extension(byte_rows):
    x, codes = np.linspace(-3, 2, 33, dtype=F32), np.zeros(33, np.int8)
    expected = dynquant.dynamic_quantize_int8(x)
    assert byte_rows.quantize(x, codes) == expected.scales[0]
    assert_same_bits(codes, expected.data)
    x[5] = np.inf
    with pytest.raises(ValueError, match="finite"):
        byte_rows.quantize(x, codes)
    with pytest.raises(ValueError, match="length of x"):
        byte_rows.quantize(x[1:], codes)
    with pytest.raises(TypeError, match="'f'"):
        byte_rows.quantize(codes, codes)
    assert_same_bits(codes, expected.data)


TABLES = """if True:
    import ctypes, sys, types
    import dynquant.capi
    at = ctypes.pythonapi.PyCapsule_GetPointer
    at.restype, at.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    real = at(dynquant.capi._C_API, b"dynquant.capi._C_API")
    size = ctypes.c_int32.from_address(real + 4).value

    def install(version, more, name=b"dynquant.capi._C_API"):
        # The real table, as another release of dynquant might have it.
        global table, label
        label, table = name, ctypes.create_string_buffer(ctypes.string_at(real, size), size + 64)
        ctypes.c_int32.from_buffer(table, 0).value = version
        ctypes.c_int32.from_buffer(table, 4).value = size + more
        module = types.ModuleType("dynquant.capi")
        module._C_API = new(ctypes.addressof(table), label, None)
        sys.modules["dynquant.capi"] = module

    def outcome():
        try:
            import byte_rows
        except ImportError as error:
            assert type(error) in (ImportError, ModuleNotFoundError)
            return str(error)
        codes = bytearray(2)
        byte_rows.quantize(memoryview(bytes(8)).cast("f"), memoryview(codes).cast("b"))
        return "works"

    CHANGE
    print(outcome())
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pass", "works"),
        ("install(1, 0)", "works"),
        ("install(1, 64)", "works"),
        ("install(1, -8)", "version 1 with"),
        ("install(2, 64)", "compiled for C API version 1 with a table of at least"),
        ("install(0, 0)", "the dynquant installed has version 0 with"),
        ("install(1, 0, b'other')", "expected _C_API to be the capsule of a table"),
        (
            "sys.modules['dynquant.capi'] = types.ModuleType('dynquant.capi')",
            "expected a table _C_API, found none",
        ),
        ("dynquant.capi._C_API = 3", "expected _C_API to be the capsule of a table"),
        ("sys.modules['dynquant.capi'] = None", "dynquant.capi"),
    ],
)
def test_table_of_another_release(byte_rows_folder, change, message):
    """A longer table of the same version works; a shorter one or another version is an ImportError."""
    found = run_python(TABLES.replace("CHANGE", change), byte_rows_folder)
    assert message in found
    assert (message == "works") == (found.strip() == "works")


# The C programs


def c_program(name, folder):
    """Build a program of c_program/; a function that runs it with arguments and returns what it prints."""
    if sys.platform == "win32":
        pytest.skip("Windows has no python3-config")
    command, program = compiler("CC"), str(folder / "program")
    source = os.path.join(EXAMPLES, "c_program", f"{name}.c")
    folders = ["-isystem", INCLUDE, "-I", dynquant.get_include()]
    run([*command, "-std=c99", *STRICT, *folders, source, "-o", program, *library_flags()])
    home = os.pathsep.join(dict.fromkeys([sys.base_prefix, sys.base_exec_prefix]))
    return lambda *arguments: run(
        [program, *arguments], env=environment(PYTHONHOME=home), cwd=folder
    ).splitlines()


def test_c_program(tmp_path):
    lines = c_program("quantize_own_buffer", tmp_path)()
    expected = dynquant.dynamic_quantize_int8_per_row(((np.arange(15, dtype=F32) - 7) / 4).reshape(3, 5))
    assert lines[0] == str(expected.scales.tolist())
    assert [[int(code) for code in line.split()] for line in lines[1:]] == expected.data.tolist()


def test_search_of_an_index_in_c(tmp_path):
    rng = np.random.default_rng(0)
    vectors, queries = (rng.standard_normal((n, 48)).astype(F32) for n in (1000, 9))
    index = dynquant.EmbeddingIndex(48)
    index.add(vectors, ids=rng.permutation(1000) + 5)
    index.save(tmp_path / "index")
    np.save(tmp_path / "queries.npy", queries)
    files = [glob.glob(f"{tmp_path}/index/{name}-*.npy")[0] for name in ("codes", "scales", "ids")]
    search = c_program("search_index", tmp_path)
    for k in ("0", "10", "1003"):
        lines = search(*files, "queries.npy", k)
        expected = index.search(queries, max(int(k), 1))
        assert len(lines) == 9
        for line, scores, ids in zip(lines, *expected, strict=True):
            found = line.split()
            assert [int(text) for text in found[::2]] == ids[ids >= 0][: int(k)].tolist()
            assert_same_bits(np.array(found[1::2], F32), scores[ids >= 0][: int(k)])
    with open(files[0], "r+b") as file:
        file.truncate(os.path.getsize(files[0]) - 1)
    with pytest.raises(AssertionError, match=r"codes-\w+\.npy: expected a \.npy file of"):
        search(*files, "queries.npy", "3")
