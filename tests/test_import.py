"""Side effects of the import, selection of the instruction set, public names and docstring examples."""

import contextlib
import doctest
import importlib.util
import inspect
import json
import os
import pkgutil
import platform
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
from helpers.common import ISAS
from helpers.programs import EMULATOR, emulated

import dynquant
from dynquant import _core, _isa


def run(code, check=True, **environment):
    """Standard output of a new interpreter that ran `code`; the whole process with `check` off."""
    command = [sys.executable, "-W", "error", "-c", code]
    # In the folder of the package under test: a checkout's source folder would hide it.
    folder = os.path.dirname(os.path.dirname(dynquant.__file__))
    environment = {**os.environ, **environment}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else every import would compile the package again
    done = subprocess.run(emulated(command), env=environment, cwd=folder, capture_output=True, text=True)
    if not check:
        return done
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Side effects


def test_subnormals_survive():
    """A library built with -ffast-math would flush them to zero in the whole process."""
    code = """if True:
        import numpy as np
        import dynquant
        dynquant.dynamic_quantize_int8_per_row([[1e-44, 1e-45], [1, 2]], num_threads=2).dequantize()
        dynquant.w8a8_matvec(np.ones((2, 2), np.int8), [1e-44, 1], [1e-40, 1])
        tiny = np.float32(1e-45)
        assert tiny > 0 and tiny * np.float32(2) > tiny and np.float32(2.0**-126) / np.float32(4) > 0
        assert (np.full(64, 2.0**-126, np.float32) / np.float32(2) > 0).all()
        assert 5e-324 / 1 > 0 and 2.3e-308 / 4 > 0
    """
    for isa in ISAS:
        run(code, DYNQUANT_ISA=isa)


def test_only_numpy_and_the_standard_library_are_imported():
    code = "import json, sys, numpy; before = set(sys.modules); import dynquant; "
    names = json.loads(run(code + "print(json.dumps(sorted(set(sys.modules) - before)))"))
    roots = {name.partition(".")[0] for name in names}
    # Entries that Cython makes, without code.
    foreign = {root for root in roots if not root.startswith(("_cython_", "cython_runtime"))}
    assert foreign - set(sys.stdlib_module_names) <= {"dynquant", "numpy"}
    assert "dynquant" in roots


def test_threads_environment_and_random_state_are_unchanged():
    run("""if True:
        import os, random, threading, warnings
        import numpy as np
        def state():
            process = dict(os.environ), threading.active_count(), random.getstate()
            return process, warnings.filters[:], np.geterr()
        before = state()
        import dynquant
        assert state() == before
    """)


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a GIL")
def test_the_gil_stays_off():
    run("import sys, dynquant, dynquant.capi; assert not sys._is_gil_enabled()")


def test_time_and_memory_of_the_import():
    """Relative to NumPy's, with a margin for a busy machine, which slows both imports."""
    pytest.importorskip("resource")
    code = """if True:
        import resource, sys, time
        start = time.perf_counter()
        import numpy
        numpy_time = time.perf_counter() - start
        n_bytes = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * n_bytes
        start = time.perf_counter()
        import dynquant
        ratio = (time.perf_counter() - start) / numpy_time
        print(ratio, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * n_bytes - before)
    """
    runs = np.array([run(code).split() for _ in range(5)], float)
    assert runs[:, 0].min() < 0.25
    assert runs[:, 1].min() < 6e6


def test_works_without_ml_dtypes():
    run("""if True:
        import sys
        sys.modules["ml_dtypes"] = None
        import dynquant, numpy as np
        assert dynquant.dynamic_quantize_int8(np.ones(3, np.float16)).data.tolist() == [127] * 3
    """)


def test_pytorch_works_without_transformers():
    pytest.importorskip("torch", exc_type=ImportError)
    error = run("""if True:
        import sys
        sys.modules["transformers"] = None
        import dynquant.torch
        try:
            dynquant.torch.DynQuantConfig
        except ImportError as error:
            print(error)
    """)
    assert error == "DynQuantConfig needs transformers: pip install transformers"


# Instruction sets


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set_forced_by_name(isa):
    code = "import dynquant as d; print(d.simd_info()['selected'], d.dynamic_quantize_int8([2.0]).data[0])"
    assert run(code, DYNQUANT_ISA=isa) == f"{isa} 127"


def test_best_instruction_set_is_selected():
    code = "import dynquant; print(dynquant.simd_info()['selected'])"
    best = "dotprod" if (sys.platform, ISAS[-1]) == ("darwin", "i8mm") else ISAS[-1]
    assert run(code, DYNQUANT_ISA="") == best


@pytest.mark.whitebox
def test_no_i8mm_by_itself_on_macos(monkeypatch):
    names = ("baseline", "dotprod", "i8mm")
    selected = dynquant.simd_info()["selected"]
    for name in ("isas_built", "isas_supported"):
        monkeypatch.setattr(_core, name, lambda: names)
    monkeypatch.setattr(_core, "set_table", lambda table, instead: None)
    monkeypatch.setattr(_isa, "_table", lambda name: name)
    chosen = []
    for platform_name, isa in (("linux", None), ("darwin", None), ("darwin", "i8mm")):
        monkeypatch.setattr(sys, "platform", platform_name)
        _isa.select(isa)
        chosen.append(dynquant.simd_info()["selected"])
    monkeypatch.undo()
    _isa.select(selected)
    assert chosen == ["i8mm", "dotprod", "i8mm"]


@pytest.mark.parametrize("name", ["sse9", "AVX2", " baseline"])
def test_unavailable_instruction_set(name):
    done = run("import dynquant", check=False, DYNQUANT_ISA=name)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"dynquant.errors.IsaError: DYNQUANT_ISA={name!r} is not available")
    caught = "try:\n import dynquant\nexcept ImportError as error:\n print(type(error).__name__)"
    assert run(caught, DYNQUANT_ISA=name) == "IsaError"


def test_simd_info():
    info = dynquant.simd_info()
    order = ("baseline", "avx2", "avxvnni", "avx512", "avx512vnni", "amx", "dotprod", "i8mm")
    assert sorted(info) == ["built", "selected", "supported"]
    for names in (info["built"], info["supported"]):
        assert type(names) is tuple
        assert names == tuple(name for name in order if name in names)
        assert names[0] == "baseline"
    assert info["selected"] in set(info["built"]) & set(info["supported"])
    info["selected"] = "nothing"
    assert dynquant.simd_info()["selected"] in ISAS


SIGNAL_STACK = """if True:
    import ctypes
    class Stack(ctypes.Structure):
        _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
    memory = ctypes.create_string_buffer(8192)
    stack = Stack(ctypes.addressof(memory), 0, 8192)
    def refused():
        return ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) != 0
"""


@pytest.mark.skipif("amx" not in ISAS, reason="no AMX")
def test_permission_for_amx():
    """Requested when weights are first packed, unless a weaker set is forced or the signal stack is small."""
    shown = "; print(dynquant.simd_info()['selected'], refused())"
    pack = "; dynquant.QuantLinear.from_float([[1.0]])"
    code = SIGNAL_STACK + "\nimport dynquant"
    assert run(code + shown) == "amx False"
    assert run(code + pack + shown) == run(code + shown, DYNQUANT_ISA="amx") == "amx True"
    assert run(code + pack + shown, DYNQUANT_ISA="avx512vnni") == "avx512vnni False"
    code = SIGNAL_STACK + "\nassert not refused(); import dynquant"
    shown += "; print(dynquant.simd_info()['supported'][-1])"
    assert run(code + pack + shown) == "avx512vnni False\navx512vnni"
    done = run(code, check=False, DYNQUANT_ISA="amx")
    assert "DYNQUANT_ISA='amx' is not available" in done.stderr
    assert "system run baseline, avx2, avxvnni, avx512, avx512vnni; Linux refuses AMX" in done.stderr


@pytest.mark.skipif("amx" in ISAS, reason="AMX would be permitted")
@pytest.mark.parametrize("pack", ["d.QuantLinear.from_float(w)", "d.w8a8_matmul(q.data, q.scales, w)"])
def test_where_the_registers_of_amx_are_refused(pack):
    """The weaker kernels take over when weights are packed; layers that exist keep theirs."""
    isa = ISAS[-1]
    assert (
        run(f"""if True:
        import numpy as np, dynquant as d
        from dynquant import _core, _isa
        w = np.random.default_rng(0).standard_normal((40, 70)).astype(np.float32)
        q = d.quantize_weights(w)
        before = d.QuantLinear(q)
        expected = before(w)
        _core.set_table(_isa._table({isa!r}), _isa._table("baseline"))
        _isa._selected, _isa._weaker = "amx", "baseline"
        assert np.array_equal(d.dynamic_quantize_int8_per_row(w).data, q.data)
        print(d.simd_info()["selected"])
        {pack}
        print(d.simd_info()["selected"])
        assert np.array_equal(before(w), expected) and np.array_equal(d.QuantLinear(q)(w), expected)
    """)
        == "amx\nbaseline"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has this file")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no instruction sets")
@pytest.mark.skipif(EMULATOR != [], reason="the file describes the real processor, not the emulated one")
def test_supported_agrees_with_proc_cpuinfo():
    with open("/proc/cpuinfo") as file:
        flags = set(next(line for line in file if line.startswith(("flags", "Features"))).split())
    v3 = {"avx2", "fma", "bmi1", "bmi2", "abm", "movbe", "f16c", "popcnt"}
    v4 = v3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    vnni = v4 | {"avx512_vnni"}
    needs = {"baseline": set(), "avx2": v3, "avxvnni": v3 | {"avx_vnni"}, "avx512": v4, "avx512vnni": vnni}
    needs["amx"] = vnni | {"amx_tile", "amx_int8"}
    needs["dotprod"] = {"crc32", "atomics", "asimdrdm", "asimddp"}
    needs["i8mm"] = needs["dotprod"] | {"i8mm"}
    expected = tuple(name for name, needed in needs.items() if needed <= flags)
    assert dynquant.simd_info()["supported"] == expected


# Names and documentation


# Modules that need the package of the same name, which comes with an extra.
EXTRAS = {"dask", "torch"}


def modules():
    for info in pkgutil.iter_modules(dynquant.__path__):
        if info.name.startswith("_isa_"):
            continue
        if info.name in EXTRAS and importlib.util.find_spec(info.name) is None:
            continue
        yield importlib.import_module(f"dynquant.{info.name}")


def public(kind=object):
    return {name: value for name in dynquant.__all__ if isinstance(value := getattr(dynquant, name), kind)}


def test_all_is_sorted_and_complete():
    assert dynquant.__all__ == sorted(dynquant.__all__)
    visible = {
        name
        for name, value in vars(dynquant).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    lazy = set(dynquant._LAZY)
    assert not visible & lazy
    assert set(dynquant.__all__) == visible - {"Any", "TYPE_CHECKING"} | lazy


def members():
    for name, value in public().items():
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value
        if inspect.isclass(value):
            own = {key: item for key, item in vars(value).items() if not key.startswith("_")}
            yield from ((f"{name}.{key}", item) for key, item in own.items() if documented(item))


def documented(item):
    return inspect.isroutine(item) or isinstance(item, (property, classmethod, staticmethod))


def test_docstrings():
    for name, member in members():
        text = inspect.getdoc(member)
        assert text, name
        # The default docstring of a dataclass.
        assert not text.startswith(f"{name}("), name


def test_signatures():
    """Order, keywords and defaults of arguments, on which callers rely."""
    expected = {
        "compute_scale": "x, clip_val, mode=MaxAbs(), *, num_threads=1",
        "dynamic_quantize": "x, format=INT8_PER_ROW, mode=MaxAbs(), *, packed=False, out=None, "
        "check_finite=True, num_threads=1",
        "quantize": "x, scales, format=INT8_PER_ROW, *, zero_points=None, packed=False, out=None, "
        "num_threads=1",
        "dynamic_quantize_int4": "x, mode=MaxAbs(), *, packed=False, num_threads=1",
        "dynamic_quantize_int8": "x, mode=MaxAbs(), *, out=None, num_threads=1",
        "dynamic_quantize_int8_per_row": "x, mode=MaxAbs(), *, out=None, check_finite=True, num_threads=1",
        "quantization_mae": "original, quantized",
        "compute_smooth_factors": "activations, weights, config=SmoothQuantConfig(alpha=0.5, epsilon=1e-05), "
        "*, mode=MaxAbs(), num_threads=1",
        "fold_smooth_factors": "factors, gamma, beta=None",
        "search_alpha": "activations, weights, *, alphas=None, epsilon=1e-05, mode=MaxAbs(), relative=False, "
        "bits=8, group_size=None, symmetric=None, hadamard=False, num_threads=1",
        "smooth_activations": "activations, factors, *, out=None, check_finite=True, num_threads=1",
        "smooth_weights": "weights, factors, *, out=None, check_finite=True, num_threads=1",
        "top_k": "queries, corpus, k, *, metric='dot', allowed=None, rescore=None, oversample=4, "
        "num_threads=1",
        "quantize_array": "source, target, *, bits=8, group_size=None, rows_per_block=None, num_threads=1, "
        "progress=None",
        "recall_report": "vectors, queries, k=10, *, recipes=None, metric='dot', num_threads=1",
        "w8a8_matvec": "weight_i8, weight_scales, activation, *, out=None",
        "int8_inner": "a, b, *, dtype=<class 'numpy.int32'>, out=None, num_threads=1",
        "w8a8_matmul": "weight_i8, weight_scales, activations, bias=None, *, out=None, num_threads=1",
        "dynamic_quantize_linear": "x",
        "error_metrics": "original, quantized, *, per_row=False",
        "get_include": "",
        "open_model": "path",
        "compare_recipes": "weight, rows=None, *, recipes=None, budget=None, quantized_rows=None, "
        "num_threads=1",
        "quantize_model": "source, target, *, bits=8, group_size=None, symmetric=None, include=None, "
        "exclude=('lm_head*', '*embed*'), search=False, calibration=None, format='compressed-tensors', "
        "num_threads=1, progress=None, overwrite=False",
        "hadamard_transform": "x, *, block_size=None, out=None",
        "quantize_weights": "w, *, bits=8, group_size=None, symmetric=None, search=False, "
        "calibration=None, relative=True, num_threads=1",
        "w4a8_matvec": "weight, activation, *, out=None",
        "w4a8_matmul": "weight, activations, bias=None, *, out=None, num_threads=1",
        "simd_info": "",
    }
    functions = {name: value for name, value in public().items() if inspect.isfunction(value)}
    assert sorted(functions) == sorted(expected)
    for name, function in functions.items():
        parameters = inspect.signature(function).parameters.values()
        bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
        text = str(bare)[1:-1].replace(repr(dynquant.DynQuantFormat.INT8_PER_ROW), "INT8_PER_ROW")
        assert text == expected[name], name


def test_examples_in_the_documentation():
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    tried = set()
    for module in [dynquant, *modules()]:
        own = {}
        for name in getattr(module, "__all__", ()):
            with contextlib.suppress(ImportError):  # a name that needs a library which is not installed
                own[name] = getattr(module, name)
        for test in finder.find(module, globs={**public(), **own, "np": np}):
            if test.examples:
                output = []
                runner.run(test, out=output.append)
                assert not output, "".join(output)
                tried.add(test.name.rpartition(".")[2])
    assert {"compute_scale", "dynamic_quantize", "w8a8_matvec", "quantization_mae", "collect"} <= tried
