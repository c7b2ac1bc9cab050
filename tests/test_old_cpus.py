"""On emulated CPUs without newer instructions: the instruction set that is selected, and all its kernels.

qemu stops a program at the first instruction that the emulated CPU does not have. It has no AVX-512. Where
the suite itself is emulated, as by `make arm`, the same emulator runs the other CPUs.
"""

import os
import platform
import shutil
import subprocess
import sys

import pytest
from fuzz import harness
from helpers.programs import EMULATOR, compiler, environment

import dynquant

MACHINE = platform.machine()
QEMU = EMULATOR or [shutil.which(f"qemu-{MACHINE}-static") or shutil.which(f"qemu-{MACHINE}")]
# What is selected on each CPU, and what a newer one has.
CPUS = {
    "x86_64": {"Nehalem": ("baseline", "avx2"), "Haswell": ("avx2", None)},
    "aarch64": {
        "cortex-a72": ("baseline", "dotprod"),
        "neoverse-n1": ("dotprod", "i8mm"),
        "max": ("i8mm", None),
    },
}.get(MACHINE, {})
NEWER = [(cpu, newer) for cpu, (_, newer) in CPUS.items() if newer]

pytestmark = [
    pytest.mark.skipif(QEMU == [None], reason=f"no qemu-{MACHINE}: Debian has it in qemu-user-static"),
    pytest.mark.skipif(not CPUS, reason="no instruction sets but the baseline"),
]


def on(cpu, *command, **options):
    """Run a command on the emulated `cpu`; warnings of qemu about missing features go to standard error."""
    options.setdefault("env", environment(DYNQUANT_ISA=""))
    # In the folder of the package under test: a checkout's source folder would hide it.
    options.setdefault("cwd", os.path.dirname(os.path.dirname(dynquant.__file__)))
    return subprocess.run([*QEMU, "-cpu", cpu, *command], capture_output=True, text=True, **options)


@pytest.mark.parametrize("cpu", CPUS)
def test_selected_instruction_set(cpu):
    code = "import dynquant as d; print(d.simd_info()['selected'], d.dynamic_quantize_int8([1.0, 2.0]).data)"
    done = on(cpu, sys.executable, "-c", code)
    assert done.stdout == f"{CPUS[cpu][0]} [ 64 127]\n", done.stderr


@pytest.mark.parametrize(("cpu", "newer"), NEWER)
def test_newer_instruction_set_is_refused(cpu, newer):
    done = on(cpu, sys.executable, "-c", "import dynquant", env=environment(DYNQUANT_ISA=newer))
    assert done.returncode == 1
    error = f"dynquant.errors.IsaError: DYNQUANT_ISA={newer!r} is not available: this build has "
    assert done.stderr.splitlines()[-1].startswith(error)


@pytest.mark.whitebox
@pytest.mark.parametrize(("cpu", "newer"), NEWER)
def test_emulator_stops_at_newer_instructions(cpu, newer):
    code = (
        "import numpy as np; from dynquant import _isa, _core, w8a8_matmul; "
        f"_core.set_table(_isa._table({newer!r})); "
        "w8a8_matmul(np.ones((40, 64), np.int8), np.ones(40), np.ones((5, 64)))"
    )
    done = on(cpu, sys.executable, "-c", code)
    assert done.returncode != 0
    assert "Illegal instruction" in done.stderr or done.returncode in (-4, 132)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not harness.TABLE.exists():
        pytest.skip("needs the source tree")
    return harness.build(tmp_path_factory.mktemp("fuzz"), compiler("CC"))


@pytest.mark.slow
@pytest.mark.whitebox
@pytest.mark.skipif(EMULATOR != [], reason="programs are built by the compiler of another machine")
@pytest.mark.parametrize("cpu", CPUS)
def test_every_kernel(cpu, program):
    """With the fuzzer's corpus, which compares each kernel with plain loops."""
    done = on(cpu, program, "1000", str(harness.CORPUS), env=harness.environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" inputs\n")
