"""Build of the extension modules; everything else about the package is in pyproject.toml.

One kernel source is compiled once per instruction set. The modules named ``_isa_*`` are the only ones
that get instruction-set flags; ``_core``, which holds the CPU detector, never does.

Environment: ``DYNQUANT_DEBUG=1`` turns Cython's bounds checks on. ``DYNQUANT_BUILD_ISAS=avx2,avx512`` builds
the baseline and only those instruction sets, for a short edit loop. ``DYNQUANT_SANITIZE=address,undefined``,
or whatever else ``-fsanitize=`` of gcc and clang takes, makes modules that need the library of the sanitizer
loaded before Python: `make sanitize` and `make tsan` do that.
"""

import contextlib
import glob
import os
import re
import tempfile

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

DEBUG = os.environ.get("DYNQUANT_DEBUG", "0") not in ("", "0")
SANITIZE = os.environ.get("DYNQUANT_SANITIZE")

# Each mode has its own folder, or one would take the other's files for up to date.
MODE = "-".join(["debug"] * DEBUG + (SANITIZE or "").replace(",", "-").split())
BUILD = os.path.join("build", MODE) if MODE else "build"

# Contraction to FMA would make instruction sets disagree. Trapping is off because no floating-point
# exception flag is ever read here, and with it the compiler may not vectorize a compare. -g0: Python's own
# flags may carry -g, which makes the modules five times larger. A function that no header declares would be
# called all the same, its pointers cut to 32 bits. A loop of one vector runs at half the speed where its code
# straddles two cache lines, and any change before it in the source moves it: loops start at a line.
GNU_FLAGS = [
    *("-g0", "-ffp-contract=off", "-fno-trapping-math", "-fvisibility=hidden", "-falign-loops=64"),
    "-Werror=implicit-function-declaration",
]
# CFLAGS may hold -Ofast or -ffast-math, with which results differ, and which in the linker's command flush
# the whole process's subnormals to zero. These follow it.
STRICT = ["-O3", "-fno-fast-math", "-fno-unsafe-math-optimizations"]
MSVC_FLAGS = ["/O2", "/fp:precise"]

# Later flags win: these follow all others. A float that does not fit its integer is not in "undefined", and
# an overflow is not with the -fwrapv of Python's own flags.
SANITIZER_FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv", f"-fsanitize={SANITIZE}"]
if SANITIZE and "undefined" in SANITIZE:
    SANITIZER_FLAGS += ["-fsanitize=float-cast-overflow", "-fno-sanitize-recover=all"]

GNU_ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avxvnni": ["-march=x86-64-v3", "-mavxvnni"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx512vnni": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512vnni"],
}
GNU_ISA_FLAGS["amx"] = [*GNU_ISA_FLAGS["avx512vnni"], "-mamx-tile", "-mamx-int8"]
# gcc takes armv8-a+dotprod too, but then refuses the intrinsics.
GNU_ISA_FLAGS["dotprod"] = ["-march=armv8.2-a+dotprod"]
GNU_ISA_FLAGS["i8mm"] = ["-march=armv8.2-a+dotprod+i8mm"]
# Of the modules without an instruction set, by the macro of the target: CFLAGS may hold -march=native, with
# which the detector would not run elsewhere, and the baseline would use tiles without asking the system. The
# compilers of macOS have dot products by default. Flags for single instructions stay in force after it, and
# are taken away; so are processors, which gcc does not take beside an architecture.
PORTABLE = {"__x86_64__": "-march=x86-64", "__aarch64__": "-march=armv8-a"}
INSTRUCTIONS = re.compile(r"-m(s?sse|avx|amx|fma|f16c|bmi|popcnt|lzcnt|gfni|vaes|vpclmul|cpu=).*")
# No switch of MSVC stands for VNNI or AMX, nor does it say that it compiles dot products of ARM.
MSVC_ISA_FLAGS = {"baseline": [], "avx2": ["/arch:AVX2"], "avx512": ["/arch:AVX512"]}
ISA_MACROS = {
    "avx2": "__AVX2__",
    "avxvnni": "__AVXVNNI__",
    "avx512": "__AVX512BW__",
    "avx512vnni": "__AVX512VNNI__",
    "amx": "DQ_AMX",
    "dotprod": "__ARM_FEATURE_DOTPROD",
    "i8mm": "__ARM_FEATURE_MATMUL_INT8",
}

# Cython sees the #include in its own files alone.
VECTOR_HEADERS = sorted(glob.glob("dynquant/kernels/simd/*.h"))

WANTED_ISAS = set(GNU_ISA_FLAGS)
if os.environ.get("DYNQUANT_BUILD_ISAS"):
    WANTED_ISAS = {"baseline", *os.environ["DYNQUANT_BUILD_ISAS"].replace(",", " ").split()}
if unknown := sorted(WANTED_ISAS - set(GNU_ISA_FLAGS)):
    raise SystemExit(f"DYNQUANT_BUILD_ISAS: expected names among {sorted(GNU_ISA_FLAGS)}, got {unknown}")

# Not the stable ABI: measured beside these modules, it adds 8 % to dynamic_quantize_int8 of 64 floats and
# 15 % to a QuantLinear of 64 x 64 on one row, and spares 3.10 and free-threaded Pythons no wheel.
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": DEBUG,
    "embedsignature": True,
    "freethreading_compatible": True,
}

INSTALL = (
    "to get it: `apt install gcc python3-dev` on Debian, `xcode-select --install` on macOS, "
    "Build Tools for Visual Studio on Windows"
)


def isa_of(extension):
    return extension.name.partition("._isa_")[2]


@contextlib.contextmanager
def silenced():
    """Nothing that is written to standard error meanwhile is shown, compilers included."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


class BuildKernels(build_ext):
    """build_ext that drops the instruction sets which this target or compiler cannot have."""

    def build_extensions(self):
        self.check_compiler()
        msvc = self.compiler.compiler_type == "msvc"
        if not msvc:
            command = self.compiler.compiler_so
            self.compiler.compiler_so = [arg for arg in command if not INSTRUCTIONS.fullmatch(arg)]
        flags, isa_flags = (MSVC_FLAGS, MSVC_ISA_FLAGS) if msvc else (STRICT + GNU_FLAGS, GNU_ISA_FLAGS)
        wanted = [isa for isa in isa_flags if isa == "baseline" or isa in WANTED_ISAS]
        isas = [isa for isa in wanted if isa == "baseline" or self.can_compile(isa, isa_flags[isa])]
        if left_out := sorted(set(GNU_ISA_FLAGS) & WANTED_ISAS - set(isas)):
            print(f"dynquant: leaving out {', '.join(left_out)}: not for this processor or compiler")
        self.extensions = [e for e in self.extensions if isa_of(e) in ("", *isas)]
        self.translate()
        portable = [] if msvc else [flag for macro, flag in PORTABLE.items() if self.can_be_for(macro, flag)]
        for extension in self.extensions:
            extension.extra_compile_args = flags + (isa_flags.get(isa_of(extension)) or portable)
            extension.extra_link_args = [] if msvc else [*STRICT, "-pthread"]
            if SANITIZE:
                extension.extra_compile_args += SANITIZER_FLAGS
                extension.extra_link_args += [f"-fsanitize={SANITIZE}"]
            extension.define_macros = [
                (f"DQ_BUILT_{isa.upper()}", str(int(isa in isas))) for isa in GNU_ISA_FLAGS
            ]
        super().build_extensions()

    def translate(self):
        """Cython to C, which takes a minute: only for what is built, once a compiler has been found."""
        from Cython.Build import cythonize

        translated = cythonize(
            [Extension(e.name, e.sources, depends=e.depends) for e in self.extensions],
            build_dir=os.path.join(BUILD, "cython"),
            compiler_directives=DIRECTIVES,
            nthreads=int(self.parallel or 0),
        )
        for extension, source in zip(self.extensions, translated, strict=True):
            extension.sources, extension.depends = source.sources, source.depends

    def check_compiler(self):
        """Say in one line what is missing, before compiler and distutils say it in many."""
        if refusal := self.refusal("int probe(void) { return 0; }"):
            raise PlatformError(f"dynquant needs a C compiler, but {refusal}; {INSTALL}")
        if refusal := self.refusal("#include <Python.h>"):
            folders = ", ".join(self.compiler.include_dirs)
            raise PlatformError(f"dynquant needs Python.h, and none that compiles is in {folders}; {INSTALL}")

    def can_be_for(self, macro, flag):
        """Whether the target is the one that `macro` stands for, and `flag` is for it."""
        return not self.refusal(f"#ifndef {macro}\n#error\n#endif", [flag])

    def can_compile(self, isa, flags):
        """Whether the compiler takes the flags for this target, and then the vector steps."""
        # gcc for Windows does not align the stack for wide registers, and crashes where it spills one.
        usable = f"defined({ISA_MACROS[isa]}) && !defined(__MINGW32__)"
        return not self.refusal(f'#include "kernels/simd/simd.h"\n#if !({usable})\n#error\n#endif', flags)

    def refusal(self, code, flags=()):
        """Why `code` does not compile; empty if it does."""
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.c")
            with open(source, "w") as file:
                file.write(code + "\n")
            try:
                with silenced():
                    self.compiler.compile(
                        [source], folder, include_dirs=["dynquant"], extra_postargs=list(flags)
                    )
            except (CompileError, PlatformError) as error:
                return str(error)
        return ""


setup(
    ext_modules=[
        Extension(
            f"dynquant.{name}",
            [f"dynquant/{name}.pyx"],
            include_dirs=["dynquant"],
            depends=["setup.py", *VECTOR_HEADERS],
        )
        for name in ["_core", "capi", *(f"_isa_{isa}" for isa in GNU_ISA_FLAGS)]
    ],
    options={"build": {"build_base": BUILD}},
    cmdclass={"build_ext": BuildKernels},
)
