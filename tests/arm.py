"""Builds and tests for 64-bit ARM on another machine: with its cross compiler, and an emulated Python.

Run as `python tests/arm.py test` (or `build`, `wheel`) on Debian, in a checkout. It needs
gcc-aarch64-linux-gnu and qemu-user-static. All else goes to build/arm: Debian's Python and C libraries for
arm64, which are unpacked and not installed, and Python packages for them.

Debian's Python for arm64 calls its compiler aarch64-linux-gnu-gcc, which is the name of the cross compiler
too. The emulator starts that as what it is, a program of this machine. So setup.py, with its probes and
flags, runs as it would on an ARM machine, at nearly the speed of this one. Only Cython runs here beforehand.
"""

import argparse
import concurrent.futures
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
ARM = ROOT / "build" / "arm"
DEBIAN = ARM / "debian"
PACKAGES = ARM / "packages"
SYSTEM_PACKAGES = ["python3", "libpython3-dev", "libstdc++6"]
PYTHON_PACKAGES = ["numpy", "cython", "setuptools", "pytest", "hypothesis", "ml_dtypes"]
# What runs on which CPU, side by side: longest first.
TESTS = [
    ("max", "golden digests quantize rounding matmul_w8a8 matmul_w4a8 smooth hadamard inner capi old_cpus"),
    ("max", "isa_parity"),
    ("neoverse-n1", "golden digests rounding hadamard"),
    ("cortex-a72", "golden digests rounding hadamard"),
]


def run(*command, **environment):
    print("+", shlex.join(map(str, command)), flush=True)
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PATH": path, **environment})


def fetch_debian():
    """Unpack Debian's Python for arm64, from where this machine has its packages, with an apt of its own."""
    apt = ARM / "apt"
    for folder in ("etc/apt.conf.d", "etc/preferences.d", "state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    shutil.copytree("/etc/apt/sources.list.d", apt / "etc/sources.list.d", dirs_exist_ok=True)
    (apt / "status").touch()
    options = {
        "Dir::Etc": apt / "etc",
        "Dir::State": apt / "state",
        "Dir::Cache": apt / "cache",
        "Dir::State::status": apt / "status",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
    }
    command = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in options.items())]
    run(*command, "update")
    run(*command, "-y", "--no-install-recommends", "--download-only", "install", *SYSTEM_PACKAGES)
    for package in sorted(apt.glob("cache/archives/*.deb")):
        run("dpkg-deb", "-x", package, DEBIAN)


def python():
    """Path of the emulated Python, and its version: "3.11"."""
    (path,) = DEBIAN.glob("usr/bin/python3.?*[0-9]")
    return path, path.name.removeprefix("python")


def fetch_packages():
    platforms = ("manylinux2014", "manylinux_2_17", "manylinux_2_27", "manylinux_2_28")
    tags = [f"--platform={name}_aarch64" for name in platforms]
    options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python()[1]}", *tags]
    run(sys.executable, "-m", "pip", "install", "-q", "--target", PACKAGES, *options, *PYTHON_PACKAGES)


def fetched(folder, fetch):
    """Have `folder` filled once."""
    done = folder.with_suffix(".done")
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fetch()
        done.touch()


def emulated(cpu):
    """The command of a Python for ARM on the emulated `cpu`, and its environment."""
    emulator = ["qemu-aarch64-static", "-L", str(DEBIAN), "-cpu", cpu]
    return [*emulator, str(python()[0]), "-P"], {"EMULATOR": shlex.join(emulator)}


def build(compiler, *more):
    """Build for ARM as `setup.py build` does there, and run `more` of its commands; returns the folder."""
    for name in ("qemu-aarch64-static", "aarch64-linux-gnu-gcc", "dpkg-deb"):
        if shutil.which(name) is None:
            raise SystemExit(f"no {name}: `apt install qemu-user-static gcc-aarch64-linux-gnu`, on Debian")
    fetched(DEBIAN, fetch_debian)
    fetched(PACKAGES, fetch_packages)
    # A compiler that does nothing: what is left of a build is its Cython.
    isas = {"DYNQUANT_BUILD_ISAS": "dotprod,i8mm"}
    nothing = ["build_ext", "--build-lib", ARM / "nothing", "--build-temp", ARM / "nothing"]
    run(sys.executable, "setup.py", "-q", *nothing, CC="true", LDSHARED="true", **isas)
    command, environment = emulated("max")
    include = DEBIAN / "usr/include"
    environment |= {"CFLAGS": f"-I{include}/python{python()[1]} -I{include}", "PYTHONPATH": str(PACKAGES)}
    name = "gcc"
    if compiler:
        name = pathlib.Path(shlex.split(compiler)[0]).name
        environment |= {"CC": compiler, "LDSHARED": f"{compiler} -shared"}
    folders = ["--build-lib", ARM / name / "lib", "--build-temp", ARM / name / "temp"]
    run(
        *command, "setup.py", "-q", "build", "-j", str(os.cpu_count()), *folders, *more, **environment, **isas
    )
    built = {path.name.partition(".")[0] for path in (ARM / name / "lib" / "dynquant").glob("_isa_*.so")}
    if built != {"_isa_baseline", "_isa_dotprod", "_isa_i8mm"}:
        raise SystemExit(f"built only {sorted(built)}")
    return ARM / name / "lib"


def run_tests(package, pytest_args):
    """The tests of the dynquant in the folder `package`."""
    # 5: no test is left, as where an argument selects tests of other files.
    passed = {0, 5} if pytest_args else {0}

    def test(job):
        cpu, names = job
        command, environment = emulated(cpu)
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (package, PACKAGES)))
        command += ["-m", "pytest", "-q", "-p", "no:cacheprovider", *pytest_args]
        command += [f"tests/test_{name}.py" for name in names.split()]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
        )
        print(f"== {cpu}: {names}\n{done.stdout}{done.stderr}", flush=True)
        return done.returncode in passed

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        if not all(list(pool.map(test, TESTS))):
            raise SystemExit("tests failed")


def build_wheel(compiler):
    """The folder of a wheel, unpacked, of what `build` built, tagged for the oldest systems that run it."""
    for folder in ("raw", "wheel", "unpacked", "bdist"):
        shutil.rmtree(ARM / folder, ignore_errors=True)
    folders = ["--dist-dir", ARM / "raw", "--bdist-dir", ARM / "bdist"]
    build(compiler, "bdist_wheel", "--skip-build", *folders)
    (raw,) = (ARM / "raw").glob("*.whl")
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", ARM / "wheel", raw)
    (wheel,) = (ARM / "wheel").glob("*manylinux*_aarch64.whl")
    tag = wheel.stem.rpartition("-")[2].split(".")[0]
    options = ["--no-deps", "--only-binary=:all:", f"--python-version={python()[1]}", f"--platform={tag}"]
    run(sys.executable, "-m", "pip", "install", "-q", "--target", ARM / "unpacked", *options, wheel)
    print(f"{wheel.stat().st_size:,} bytes: {wheel}")
    return ARM / "unpacked"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["build", "test", "wheel"])
    parser.add_argument(
        "--compiler", help="a command such as 'clang --target=aarch64-linux-gnu'; gcc by default"
    )
    parser.add_argument("--pytest-args", type=shlex.split, default=[])
    arguments = parser.parse_args()
    package = (build_wheel if arguments.what == "wheel" else build)(arguments.compiler)
    if arguments.what != "build":
        run_tests(package, arguments.pytest_args)


if __name__ == "__main__":
    main()
