"""On emulated processors without newer instructions: what is picked, and every kernel of it.

The emulator stops a program at the first instruction that the processor does not have. It knows no AVX-512.
"""

import os
import platform
import shutil
import subprocess
import sys

import pytest
from fuzz import harness
from helpers.programs import compiler, environment

import dynquant

QEMU = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
PICKED = {"Nehalem": "baseline", "Haswell": "avx2"}

pytestmark = [
    pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64: Debian has it in qemu-user-static"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="libraries of another processor"),
]


def on(cpu, *command, **options):
    """A process that ran as on `cpu`; qemu's warnings of features that it lacks go to standard error."""
    options.setdefault("env", environment(DYNQUANT_ISA=""))
    # Where the package under test lies: a checkout's source folder would hide it.
    options.setdefault("cwd", os.path.dirname(os.path.dirname(dynquant.__file__)))
    return subprocess.run([QEMU, "-cpu", cpu, *command], capture_output=True, text=True, **options)


@pytest.mark.parametrize("cpu", PICKED)
def test_what_is_picked(cpu):
    code = "import dynquant as d; print(d.simd_info()['selected'], d.dynamic_quantize_int8([1.0, 2.0]).data)"
    done = on(cpu, sys.executable, "-c", code)
    assert done.stdout == f"{PICKED[cpu]} [ 64 127]\n", done.stderr


@pytest.mark.whitebox
def test_the_emulator_notices():
    code = (
        "from dynquant import _isa, _core, dynamic_quantize_int8 as f; _core.set_table(_isa._table('avx2')); "
    )
    done = on("Nehalem", sys.executable, "-c", code + "f([1.0] * 99)")
    assert done.returncode != 0
    assert "Illegal instruction" in done.stderr or done.returncode in (-4, 132)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not harness.TABLE.exists():
        pytest.skip("needs the source tree")
    return harness.build(tmp_path_factory.mktemp("fuzz"), compiler("CC"))


@pytest.mark.whitebox
@pytest.mark.parametrize("cpu", PICKED)
def test_every_kernel(cpu, program):
    """The fuzzer's inputs, which compare each kernel with plain loops."""
    done = on(cpu, program, "1000", str(harness.CORPUS), env=harness.environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" inputs\n")
