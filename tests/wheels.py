"""Wheels for Linux, one for each Python given: from the sdist, repaired, checked, tested with no compiler.

Run in a git checkout by a Python that has the extra "wheels". All goes to wheelhouse/.
"""

import argparse
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
HOUSE = ROOT / "wheelhouse"
BIN = pathlib.Path(sys.executable).parent
MAX_BYTES = 2_000_000
# Of no use without the repository, and what building an sdist adds to it.
NOT_IN_SDIST = (".ci/", ".github/", ".gitignore")
ADDED_TO_SDIST = ("PKG-INFO", "setup.cfg", "dynquant.egg-info/")


def run(*command, folder=ROOT, **environment):
    print("+", shlex.join(map(str, command)), flush=True)
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, check=True, cwd=folder, env={**os.environ, "PATH": path, **environment})


def build_sdist():
    run(BIN / "python", "-m", "build", "--sdist", "--outdir", HOUSE)
    (sdist,) = HOUSE.glob("*.tar.gz")
    return sdist


def unpacked(sdist, folder):
    """The folder of the sdist's files, which are those of the checkout."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (top,) = folder.iterdir()
    packed = {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    expected = {name for name in tracked if not name.startswith(NOT_IN_SDIST)}
    missing = expected - packed
    added = {name for name in packed - expected if not name.startswith(ADDED_TO_SDIST)}
    if missing or added:
        raise SystemExit(f"{sdist.name}: missing {sorted(missing)}, not in the checkout {sorted(added)}")
    return top


def build_wheel(sdist, python, folder):
    # Python's own linker command may give the modules a run path, which is this machine's.
    command = (python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder / "raw", sdist)
    run(*command, LDSHARED="cc -shared")
    (raw,) = (folder / "raw").iterdir()
    run(BIN / "auditwheel", "repair", "--wheel-dir", folder / "repaired", raw)
    (wheel,) = (folder / "repaired").iterdir()
    if wheel.stat().st_size > MAX_BYTES:
        raise SystemExit(f"{wheel.name} has {wheel.stat().st_size:,} bytes, more than {MAX_BYTES:,}")
    return shutil.copy(wheel, HOUSE)


def test_wheel(wheel, python, source, pytest_args):
    """Install and test with nothing on the PATH but the environment's own programs."""
    path = str(python.parent)
    if found := [name for name in ("cc", "gcc", "clang") if shutil.which(name, path=path)]:
        raise SystemExit(f"{path} has {found}")
    run(python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", f"{wheel}[test]", PATH=path)
    run(python.parent / "pytest", "-q", *pytest_args, folder=source, PATH=path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", nargs="+", help="Python to build a wheel for: a name or a path")
    parser.add_argument("--pytest-args", type=shlex.split, default=[])
    arguments = parser.parse_args()
    shutil.rmtree(HOUSE, ignore_errors=True)
    run(BIN / "validate-pyproject", "pyproject.toml")
    sdist = build_sdist()
    with tempfile.TemporaryDirectory() as temporary:
        source = unpacked(sdist, pathlib.Path(temporary, "sdist"))
        for number, command in enumerate(arguments.python):
            folder = pathlib.Path(temporary, str(number))
            run(command, "-m", "venv", folder / "venv")
            python = folder / "venv" / "bin" / "python"
            test_wheel(build_wheel(sdist, python, folder), python, source, arguments.pytest_args)
    wheels = sorted(HOUSE.glob("*.whl"))
    run(BIN / "check-wheel-contents", "--toplevel", "dynquant", *wheels)
    run(BIN / "twine", "check", "--strict", sdist, *wheels)
    for path in (sdist, *wheels):
        print(f"{path.stat().st_size:9,} {path.name}")


if __name__ == "__main__":
    main()
