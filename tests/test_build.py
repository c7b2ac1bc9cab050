"""The build: which modules a change recompiles, flags, and messages when there is no compiler or header.

The compiler is a stub that logs its arguments.
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("Cython")
pytest.importorskip("setuptools")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="MSVC is not found by the variable CC")

ROOT = pathlib.Path(__file__).parent.parent
ISAS = {"_isa_baseline", "_isa_avx2", "_isa_avxvnni", "_isa_avx512", "_isa_avx512vnni", "_isa_amx"}
# The stub takes every flag, so that those of other processors are built too.
ISAS |= {"_isa_dotprod", "_isa_i8mm"}
MODULES = {"_core", "capi", *ISAS}
PORTABLE = ("-march=x86-64", "-march=armv8-a")

COMPILER = """if True:
    import os, pathlib, shlex, sys
    refused = os.environ.get("REFUSED")
    if refused in sys.argv:
        sys.exit(f"no {refused}")
    with open(os.environ["LOG"], "a") as log:
        log.write(shlex.join(sys.argv[1:]) + "\\n")
    pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).touch()
"""


class Tree:
    """A copy of the sources, and builds in it."""

    def __init__(self, folder):
        self.folder, self.log = folder / "tree", folder / "log"
        shutil.copytree(ROOT / "dynquant", self.folder / "dynquant", ignore=shutil.ignore_patterns("*.so"))
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.folder)
        (folder / "compiler.py").write_text(COMPILER)
        self.compiler = f"{sys.executable} {folder / 'compiler.py'}"

    def run(self, *arguments, **environment):
        """Run a build; returns the process and the names of the modules that it compiled."""
        return self.run_python("setup.py", "--quiet", "build_ext", *arguments, **environment)

    def install(self, *arguments, **environment):
        """Run pip install with the Cython of this environment; returns the same."""
        # Without touching the installed package, which is under test.
        options = ("--ignore-installed", "--no-deps", "--no-build-isolation", "--no-index")
        return self.run_python("-m", "pip", "install", *options, *arguments, **environment)

    def run_python(self, *arguments, **environment):
        self.log.write_text("")
        given = {"CC": self.compiler, "LDSHARED": self.compiler, "LOG": str(self.log), "DYNQUANT_DEBUG": "0"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**os.environ, **given, **environment},
            capture_output=True,
            text=True,
        )
        return done, {pathlib.Path(source).stem for _, source in self.commands(".c")}

    def commands(self, ending):
        """Logged command lines that name a file with this ending, each with that file; not the probes."""
        for command in map(shlex.split, self.log.read_text().splitlines()):
            files = [arg for arg in command if arg.endswith(ending) and "probe" not in arg]
            if files:
                yield command, files[-1]

    def compiled(self, *arguments, **environment):
        done, modules = self.run(*arguments, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return modules

    def touch(self, name):
        (self.folder / name).touch()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = Tree(tmp_path_factory.mktemp("build"))
    assert tree.compiled() == MODULES
    return tree


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (None, set()),
        ("dynquant/_core.pyi", set()),
        ("dynquant/kernels/matmul_u4.pxi", ISAS),
        ("dynquant/kernels/simd/simd.h", MODULES),
        ("dynquant/cpu.h", {"_core"}),
        ("dynquant/include/dynquant.h", {"capi"}),
        ("dynquant/_core.pxd", {"_core", "capi"}),
        ("dynquant/_table.pxd", MODULES),
        ("dynquant/_isa_avx2.pyx", {"_isa_avx2"}),
        ("setup.py", MODULES),
    ],
)
def test_what_a_change_rebuilds(tree, changed, expected):
    if changed:
        tree.touch(changed)
    assert tree.compiled("--inplace") == expected
    assert tree.compiled("--inplace") == set()


def test_debug_build_shares_no_file_with_the_release_build(tree):
    assert tree.compiled(DYNQUANT_DEBUG="1") == MODULES
    assert tree.compiled() == set()
    assert not list((tree.folder / "dynquant").glob("*.c"))


def test_instruction_set_that_the_compiler_refuses_is_left_out(tree):
    done, modules = tree.run("--force", REFUSED="-march=x86-64-v4")
    assert (done.returncode, done.stderr) == (0, "")
    assert "leaving out amx, avx512, avx512vnni" in done.stdout
    assert modules == MODULES - {"_isa_amx", "_isa_avx512", "_isa_avx512vnni"}


def test_march_and_fast_math_flags_are_overridden(tree):
    """CFLAGS are passed to compiler and linker; the last flag wins, also between -O3 and -Ofast."""
    instructions = "-march=native -mcpu=native -mavx2 -mavxvnni -mamx-int8 -msse4.2"
    flags = f"{instructions} -Ofast -ffast-math -funsafe-math-optimizations"
    assert tree.compiled("--force", CFLAGS=flags) == MODULES
    compiled, linked = list(tree.commands(".c")), list(tree.commands(".so"))
    assert len(compiled) == len(linked) == len(MODULES)
    for command, _ in compiled + linked:
        assert command.index("-fno-fast-math") > command.index("-ffast-math")
        assert command.index("-fno-unsafe-math-optimizations") > command.index("-funsafe-math-optimizations")
        assert command.index("-O3") > command.index("-Ofast")
    for command, source in compiled:
        *_, architecture = (arg for arg in command if arg.startswith("-march="))
        isa = pathlib.Path(source).stem
        assert (architecture in PORTABLE) == (isa in ("_core", "capi", "_isa_baseline"))
        assert architecture != "-march=native"
        assert not {"-msse4.2", "-mcpu=native"} & set(command)
        assert command.count("-mamx-int8") == (isa == "_isa_amx")
        assert command.count("-mavxvnni") == (isa == "_isa_avxvnni")


@pytest.mark.parametrize(
    "flags", [[], *([f"-march={name}"] for name in ("x86-64-v4", "sapphirerapids", "armv8.6-a+fp16"))]
)
def test_simd_header_compiles(flags):
    """Also where the compiler targets a CPU with float16 arithmetic."""
    compiler = [shutil.which("cc") or pytest.skip("no cc"), "-fsyntax-only", "-xc", *flags]
    if subprocess.run([*compiler, os.devnull], capture_output=True).returncode:
        pytest.skip(f"the compiler has no {flags}")
    done = subprocess.run([*compiler, ROOT / "dynquant/kernels/simd/simd.h"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_compiler(tree):
    done, _ = tree.run("--force", CC="/nonexistent/cc")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: dynquant needs a C compiler, but")
    assert "/nonexistent/cc" in line
    assert "`apt install gcc python3-dev`" in line


def test_pip_without_a_compiler(tree, tmp_path):
    """pip shows that line among its own, and no traceback."""
    done, modules = tree.install("--target", str(tmp_path), ".", CC="/nonexistent/cc")
    assert (done.returncode, modules) == (1, set())
    shown = done.stdout + done.stderr
    assert len([line for line in shown.splitlines() if "error: dynquant needs a C compiler" in line]) == 1
    assert "Traceback" not in shown


def test_change_after_an_editable_install(tree, tmp_path):
    done, _ = tree.install("--prefix", str(tmp_path), "--editable", ".")
    assert done.returncode == 0, done.stdout + done.stderr
    links = [*tmp_path.rglob("__editable__*.pth"), *tmp_path.rglob("__editable__*.py")]
    assert any(str(tree.folder / "dynquant") in link.read_text() for link in links)
    assert tree.compiled("--inplace") == set()
    tree.touch("dynquant/kernels/quantize.pxi")
    assert tree.compiled("--inplace") == ISAS


def test_without_headers(tree, tmp_path):
    """A compiler that works, but finds no header."""
    script = tmp_path / "compiler.py"
    refuse = (
        "    if '#include' in pathlib.Path(sys.argv[sys.argv.index('-c') + 1]).read_text(): sys.exit(1)\n"
    )
    script.write_text(COMPILER + refuse)
    done, _ = tree.run("--force", CC=f"{sys.executable} {script}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: dynquant needs Python.h, and none that compiles is in /")
