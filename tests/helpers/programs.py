"""Compiling and running other programs against the installed package."""

import os
import shlex
import shutil
import subprocess
import sysconfig

import numpy as np
import pytest

import dynquant

INCLUDE = sysconfig.get_paths()["include"]
# The emulator that the suite runs under, if any: child processes of an emulated program are not emulated.
EMULATOR = shlex.split(os.environ.get("EMULATOR", ""))
STRICT = ["-Wall", "-Wextra", "-pedantic", "-Werror"]


def variable(name):
    return sysconfig.get_config_var(name) or ""


def compiler(kind):
    """The command of Python's own C or C++ compiler."""
    command = shlex.split(variable(kind))
    if not command or shutil.which(command[0]) is None:
        pytest.skip(f"no compiler: {kind} of sysconfig is {command}")
    if not os.path.exists(os.path.join(INCLUDE, "Python.h")):
        pytest.skip("no Python.h: the headers of this Python are not installed")
    return command


def environment(**more):
    """Environment in which a new interpreter finds the packages under test."""
    roots = {os.path.dirname(os.path.dirname(module.__file__)) for module in (dynquant, np)}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sorted(roots)), **more}


def emulated(command):
    """`command` under the emulator of the suite, if any; not compilers, which are named without a path."""
    return [*EMULATOR, *command] if os.path.isabs(command[0]) else command


def run(command, **options):
    options = {"env": environment(), **options}
    done = subprocess.run(emulated(command), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def library_flags():
    """Flags that link a program with libpython, as `python3-config --embed --ldflags` prints them."""
    folders = [variable("LIBDIR"), variable("LIBPL")]
    names = {variable("LDLIBRARY"), variable("LIBRARY")} - {""}
    if not any(os.path.exists(os.path.join(folder, name)) for folder in folders for name in names):
        pytest.skip(f"no libpython: none of {sorted(names)} in {folders}")
    flags = [f"-L{folder}" for folder in folders] + [
        f"-Wl,-rpath,{folders[0]}",
        f"-lpython{variable('LDVERSION')}",
    ]
    return flags + shlex.split(" ".join(map(variable, ("LIBS", "SYSLIBS", "LINKFORSHARED"))))
