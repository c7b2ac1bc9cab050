"""Build of the extension modules; everything else about the package is in pyproject.toml.

One kernel source is compiled once per instruction set. The modules named ``_isa_*`` are the only ones
that get instruction-set flags; ``_core``, which holds the CPU detector, never does.

Environment: ``DYNQUANT_DEBUG=1`` turns Cython's bounds checks on.
"""

import os
import platform
import tempfile

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

DEBUG = os.environ.get("DYNQUANT_DEBUG", "0") not in ("", "0")

# Contraction to FMA would make instruction sets disagree. Trapping is off because no floating-point
# exception flag is ever read here, and with it the compiler may not vectorise a compare. -g0: Python's own
# flags may carry -g, which makes the modules five times larger.
GNU_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-trapping-math", "-fvisibility=hidden"]
MSVC_FLAGS = ["/O2", "/fp:precise"]

ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx512vnni": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512vnni"],
}

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": DEBUG,
    "embedsignature": True,
    "freethreading_compatible": True,
}


def isa_of(extension):
    return extension.name.partition("._isa_")[2]


class BuildKernels(build_ext):
    """build_ext that drops the instruction sets which this processor or compiler cannot have."""

    def build_extensions(self):
        flags = MSVC_FLAGS if self.compiler.compiler_type == "msvc" else GNU_FLAGS
        isas = [isa for isa in ISA_FLAGS if self.can_compile(isa)]
        if left_out := sorted(set(ISA_FLAGS) - set(isas)):
            print(f"dynquant: leaving out {', '.join(left_out)}: not for this processor or compiler")
        self.extensions = [e for e in self.extensions if isa_of(e) in ("", *isas)]
        for extension in self.extensions:
            extension.extra_compile_args = flags + ISA_FLAGS.get(isa_of(extension), [])
            extension.define_macros = [(f"DQ_BUILT_{isa.upper()}", "1") for isa in isas]
        super().build_extensions()

    def can_compile(self, isa):
        if isa == "baseline":
            return True
        # The detector in dynquant/cpu.h speaks only the dialect of gcc and clang.
        if self.compiler.compiler_type == "msvc" or platform.machine().lower() not in ("x86_64", "amd64"):
            return False
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.c")
            with open(source, "w") as file:
                file.write("#include <immintrin.h>\nint probe(void) { return 0; }\n")
            try:
                self.compiler.compile([source], output_dir=folder, extra_postargs=ISA_FLAGS[isa])
            except CompileError:
                return False
        return True


setup(
    ext_modules=cythonize(
        [
            Extension(f"dynquant.{name}", [f"dynquant/{name}.pyx"], include_dirs=["dynquant"])
            for name in ["_core", "capi", *(f"_isa_{isa}" for isa in ISA_FLAGS)]
        ],
        compiler_directives=DIRECTIVES,
    ),
    cmdclass={"build_ext": BuildKernels},
)
