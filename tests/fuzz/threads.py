"""Builds threads.c and pool.c with ThreadSanitizer and runs them: `python threads.py PACKAGE FOLDER`.

PACKAGE is the folder of the dynquant that was built with ``DYNQUANT_SANITIZE=thread``; the programs are
built in FOLDER.
"""

import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from fuzz import harness
from helpers import programs


def run(package, program, *arguments):
    settings = {**harness.environment(package), "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program, *arguments], env=settings, capture_output=True, text=True)


def check(package, folder, source):
    program = harness.build(
        folder, programs.compiler("CC"), "-fsanitize=thread", harness.SOURCES, sources=[source]
    )
    planted, real = run(package, program, "race"), run(package, program)
    print(real.stdout, real.stderr, sep="")
    if "data race" not in planted.stderr:
        sys.exit(f"the planted race was not reported:\n{planted.stderr}")
    if real.returncode:
        sys.exit(real.returncode)


def main(package, folder):
    os.makedirs(folder, exist_ok=True)
    for source in ("threads.c", "pool.c"):
        check(package, folder, source)


main(*sys.argv[1:])
