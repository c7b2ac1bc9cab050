"""Builds kernels.c: as a program that replays inputs, or with libFuzzer.

Run as `python harness.py SECONDS PACKAGE FOLDER` it fuzzes the kernels of the dynquant in PACKAGE, which
clang built with ``DYNQUANT_SANITIZE=fuzzer-no-link,address,undefined``. Its files go to FOLDER; the inputs
that reached new code are written to corpus.txt.
"""

import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

CORPUS = HERE / "corpus.txt"
TABLE = HERE.parent.parent / "dynquant" / "_table.pxd"
# Where pool.c finds what it tests.
SOURCES = f"-I{TABLE.parent}"
# Only the kernels guide the fuzzer: the plain loops of kernels.c are only checked for bad accesses.
CHECKS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def table_header():
    """The struct of row kernels in C, made from the text of _table.pxd."""
    constants, _, fields = TABLE.read_text().partition("ctypedef struct Kernels:\n")
    fields = re.sub(r"#.*", "", fields).replace(" noexcept nogil", ";").replace("bint", "int")
    fields = re.sub(r"^(    \w+ \w+)$", r"\1;", fields, flags=re.MULTILINE)
    enums = "".join(
        f"enum {{ {name} = {value} }};\n" for name, value in re.findall(r"(\w+) = (\w+)", constants)
    )
    includes = "#include <Python.h>\n#include <stdint.h>\n"
    return f"{includes}{enums}typedef struct {{\n{fields}}} Kernels;\n"


def build(folder, command, *flags, sources=("kernels.c", "replay.c"), linking=()):
    """Build `sources` into a program in `folder`; `linking` are flags for the linker alone."""
    from helpers import programs  # skips the test where there is no compiler

    import dynquant

    folder = pathlib.Path(folder)
    (folder / "table.h").write_text(table_header())
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-ffp-contract=off", *programs.STRICT, *flags]
    folders = ["-isystem", programs.INCLUDE, "-I", dynquant.get_include(), "-I", str(folder)]
    objects = [str(folder / f"{source}.o") for source in sources]
    for source, compiled in zip(sources, objects, strict=True):
        programs.run([*command, *flags, *folders, "-c", str(HERE / source), "-o", compiled])
    program = str(folder / "program")
    libraries = [*programs.library_flags(), "-lm", "-lpthread"]
    programs.run([*command, *flags, *linking, *objects, "-o", program, *libraries])
    return program


def environment(*packages):
    """Environment of a program that embeds Python and imports dynquant, first looked up in `packages`."""
    from helpers import programs

    home = os.pathsep.join(dict.fromkeys([sys.base_prefix, sys.base_exec_prefix]))
    settings = programs.environment(PYTHONHOME=home, PYTHONMALLOC="malloc", ASAN_OPTIONS="detect_leaks=0")
    settings["PYTHONPATH"] = os.pathsep.join([*map(os.path.abspath, packages), settings["PYTHONPATH"]])
    return settings


def fuzz(seconds, package, folder):
    """Run libFuzzer for `seconds`; the corpus is read before and written after."""
    inputs, smallest = folder / "inputs", folder / "smallest"
    for path in (inputs, smallest):
        path.mkdir(parents=True, exist_ok=True)
    for i, line in enumerate(CORPUS.read_text().splitlines()):
        (inputs / f"seed-{i}").write_bytes(bytes.fromhex(line))
    compiler = os.environ.get("CLANG", "clang").split()
    driver = ["-fsanitize=fuzzer", "-rdynamic"]
    program = build(folder, compiler, *CHECKS, sources=["kernels.c"], linking=driver)
    command = [program, "-max_len=96", "-len_control=0", "-detect_leaks=0", "-print_final_stats=1"]
    settings = environment(package)
    places = [f"-artifact_prefix={folder}/", str(inputs)]
    subprocess.run([*command, f"-max_total_time={seconds}", *places], env=settings, check=True)
    subprocess.run([*command, "-merge=1", str(smallest), str(inputs)], env=settings, check=True)
    lines = sorted(path.read_bytes().hex() for path in smallest.iterdir())
    CORPUS.write_text("".join(f"{line}\n" for line in lines if line))


if __name__ == "__main__":
    fuzz(int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]))
