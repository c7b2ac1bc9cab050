"""On emulated CPUs without newer instructions: the instruction set that is selected, and all its kernels.

qemu stops a program at the first instruction that the emulated CPU does not have. It has no AVX-512.
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
SELECTED = {"Nehalem": "baseline", "Haswell": "avx2"}

pytestmark = [
    pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64: Debian has it in qemu-user-static"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86-64 machine"),
]


def on(cpu, *command, **options):
    """Run a command on the emulated `cpu`; warnings of qemu about missing features go to standard error."""
    options.setdefault("env", environment(DYNQUANT_ISA=""))
    # In the folder of the package under test: a checkout's source folder would hide it.
    options.setdefault("cwd", os.path.dirname(os.path.dirname(dynquant.__file__)))
    return subprocess.run([QEMU, "-cpu", cpu, *command], capture_output=True, text=True, **options)


@pytest.mark.parametrize("cpu", SELECTED)
def test_selected_instruction_set(cpu):
    code = "import dynquant as d; print(d.simd_info()['selected'], d.dynamic_quantize_int8([1.0, 2.0]).data)"
    done = on(cpu, sys.executable, "-c", code)
    assert done.stdout == f"{SELECTED[cpu]} [ 64 127]\n", done.stderr


@pytest.mark.whitebox
def test_emulator_stops_at_newer_instructions():
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


@pytest.mark.slow
@pytest.mark.whitebox
@pytest.mark.parametrize("cpu", SELECTED)
def test_every_kernel(cpu, program):
    """With the fuzzer's corpus, which compares each kernel with plain loops."""
    done = on(cpu, program, "1000", str(harness.CORPUS), env=harness.environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" inputs\n")
