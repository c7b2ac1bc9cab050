"""Builds threads.c with ThreadSanitizer and runs it: `python threads.py PACKAGE FOLDER`.

PACKAGE is the folder of the dynquant that was built with ``DYNQUANT_SANITIZE=thread``; the program is built
in FOLDER.
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


def main(package, folder):
    os.makedirs(folder, exist_ok=True)
    program = harness.build(folder, programs.compiler("CC"), "-fsanitize=thread", sources=["threads.c"])
    planted, real = run(package, program, "race"), run(package, program)
    print(real.stdout, real.stderr, sep="")
    if "data race" not in planted.stderr:
        sys.exit(f"the planted race was not reported:\n{planted.stderr}")
    sys.exit(real.returncode)


main(*sys.argv[1:])
