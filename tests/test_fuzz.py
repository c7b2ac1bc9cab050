"""The fuzzers' targets, each a little: `make fuzz` is the rest.

What a fuzzer found before is in tests/fuzz/corpus.txt, and is tried in full.
"""

import os
import sys

import pytest
from common import ISAS
from hypothesis import given
from programs import compiler, run

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "fuzz"))

import facade

import build


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no python3-config")
@pytest.mark.skipif(not build.TABLE.exists(), reason="needs the source tree")
def test_kernels(tmp_path):
    program = build.build(tmp_path, compiler("CC"))
    inputs = len(build.CORPUS.read_text().splitlines())
    printed = run([program, "20000", str(build.CORPUS)], env=build.environment())
    assert printed == f"{inputs + 20_000} inputs\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pthreads")
def test_threads_on_shared_memory(tmp_path):
    program = build.build(tmp_path, compiler("CC"), sources=["threads.c"])
    assert run([program], env=build.environment()) == "".join(f"{isa}: same\n" for isa in ISAS)


NAMES = [function.__name__ for function, _ in facade.PROPERTIES]


@pytest.mark.parametrize(("function", "strategies"), facade.PROPERTIES, ids=NAMES)
def test_facade(function, strategies):
    given(*strategies)(function)()
