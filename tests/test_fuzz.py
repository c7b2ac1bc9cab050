"""The fuzz targets, each for a short time; `make fuzz` runs them longer.

The inputs in tests/fuzz/corpus.txt are all replayed.
"""

import sys

import pytest
from fuzz import facade, harness
from helpers.common import ISAS
from helpers.programs import compiler, run
from hypothesis import given


@pytest.mark.slow
@pytest.mark.whitebox
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no python3-config")
@pytest.mark.skipif(not harness.TABLE.exists(), reason="needs the source tree")
def test_kernels(tmp_path):
    program = harness.build(tmp_path, compiler("CC"))
    inputs = len(harness.CORPUS.read_text().splitlines())
    printed = run([program, "20000", str(harness.CORPUS)], env=harness.environment())
    assert printed == f"{inputs + 20_000} inputs\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pthreads")
def test_threads_on_shared_memory(tmp_path):
    program = harness.build(tmp_path, compiler("CC"), sources=["threads.c"])
    assert run([program], env=harness.environment()) == "".join(f"{isa}: same\n" for isa in ISAS)


@pytest.mark.whitebox
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pthreads")
@pytest.mark.skipif(not harness.TABLE.exists(), reason="needs the source tree")
def test_pool_of_threads(tmp_path):
    program = harness.build(tmp_path, compiler("CC"), harness.SOURCES, sources=["pool.c"])
    assert run([program, "forks"]) == "0 wrong of 2000 jobs\n"


NAMES = [function.__name__ for function, _ in facade.PROPERTIES]


@pytest.mark.parametrize(("function", "strategies"), facade.PROPERTIES, ids=NAMES)
def test_facade(function, strategies):
    given(*strategies)(function)()
