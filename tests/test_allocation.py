"""Failing allocations: MemoryError, `out` unchanged, nothing leaked, and the next call works."""

import os
import platform
import sys

import numpy as np
import pytest
from helpers.programs import compiler, environment, run

TESTS = os.path.dirname(__file__)
HELPERS = os.path.join(TESTS, "helpers")


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="replaces the allocator of glibc")
@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.4.0",
    reason="without memory, older NumPy's linalg returns anything, and NumPy 1's maximum crashes",
)
def test_every_allocation_may_fail(tmp_path):
    """In turn, alone and with all that follow; not those of pooled small objects and of other threads."""
    library = str(tmp_path / "failing_malloc.so")
    source = os.path.join(HELPERS, "failing_malloc.c")
    run([*compiler("CC"), "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", source, "-o", library])
    folders = os.pathsep.join([environment()["PYTHONPATH"], TESTS])
    # Threads of BLAS would allocate at any time.
    settings = environment(LD_PRELOAD=library, PYTHONPATH=folders, OPENBLAS_NUM_THREADS="1")
    settings.pop("PYTHONMALLOC", None)
    printed = run([sys.executable, os.path.join(HELPERS, "out_of_memory.py")], env=settings).split("\n")
    *problems, total = filter(None, printed)
    assert problems == []
    assert int(total.removeprefix("failed allocations: ")) > 4000
