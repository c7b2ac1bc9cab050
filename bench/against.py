"""This build of dynquant beside another one, both in this process: `python -m bench --against FOLDER`.

Why one process: both builds then read the same input arrays in the same pages, on the same core, a
millisecond apart, so that a slow moment of the machine is slow for both. Two processes have memory of their
own, whose pages lie differently in the caches, which is worth some percent for as long as they live, and each
exchange of a message costs more than many of the calls measured.

How two packages of one name are loaded: `sys.modules` is emptied of the one before the other is imported, and
holds the modules of the build that is about to run. The extension modules of the two are different files, so
each has its own static data.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from . import cases as case_table
from .cases import Arrays, Case
from .sampling import Contender, sample_in_turns
from .summary import SummaryError
from .text import columns, duration

OLD, NEW = "old", "new"
ROUNDS, QUICK_ROUNDS = 61, 9
# How often a case that is beyond the threshold is measured, each time on new arrays; all rounds count.
REPETITIONS = 3


@dataclass
class Build:
    """One dynquant package, and the case table bound to it."""

    modules: dict[str, ModuleType]
    table: ModuleType
    cases: dict[str, Case]

    def activate(self, isa: str) -> None:
        """Whatever is imported, selected or called from now on is this build's."""
        if sys.modules.get("dynquant") is not self.modules["dynquant"]:
            _take_out()
            sys.modules.update(self.modules)
        self.modules["dynquant._isa"].select(isa)
        # Selecting imports the module of an instruction set when it is first asked for.
        self.modules |= _loaded()

    def described(self) -> str:
        package = self.modules["dynquant"]
        return f"dynquant {package.__version__} from {Path(package.__file__).parent}"


@dataclass(frozen=True)
class Result:
    """Seconds of a call in each round."""

    old: list[float]
    new: list[float]

    @property
    def ratios(self) -> list[float]:
        """old / new within each round, in ascending order."""
        return sorted(old / new for old, new in zip(self.old, self.new, strict=True))

    @property
    def speedup(self) -> float:
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """In which the median lies with 95 %, whatever the distribution of the ratios.

        Of n rounds the number below the median is binomial, n / 2 with a standard deviation of sqrt(n) / 2.
        """
        ratios, half = self.ratios, 0.98 * math.sqrt(len(self.old))
        low, high = math.floor(len(ratios) / 2 - half), math.ceil(len(ratios) / 2 + half) - 1
        return ratios[max(low, 0)], ratios[min(high, len(ratios) - 1)]

    def is_slower(self, threshold: float) -> bool:
        """Whether all of the interval is: a busy machine makes it wide, but nothing slower."""
        return 1 / self.interval[1] > 1 + threshold / 100

    def cells(self, threshold: float) -> list[str]:
        low, high = self.interval
        times = [duration(statistics.median(taken)) for taken in (self.old, self.new)]
        remark = "slower" if self.is_slower(threshold) else ""
        return [*times, f"{self.speedup:.3f}x", f"{low:.3f} - {high:.3f}", remark]


def _loaded() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "dynquant"}


def _take_out() -> None:
    """Of `sys.modules`; whoever has the modules keeps them."""
    for name in _loaded():
        del sys.modules[name]


def load(folder: Path, families: list[str]) -> Build:
    """The package in `folder`, which becomes the active one."""
    package = folder.resolve() / "dynquant"
    if not (package / "__init__.py").is_file():
        raise SummaryError(f"--against: {folder} holds no package dynquant")
    if package.samefile(Path(sys.modules["dynquant"].__file__).parent):
        raise SummaryError(f"--against: {package} is the build that runs already")
    _take_out()
    sys.path.insert(0, str(package.parent))
    try:
        importlib.import_module("dynquant")
        table = _case_table()
    except ImportError as error:
        raise SummaryError(f"--against: {error}") from error
    finally:
        sys.path.pop(0)
    return Build(_loaded(), table, {case.name: case for case in table.cases(families)})


def _case_table() -> ModuleType:
    """A second copy of cases.py, whose `dynquant` is the one that can be imported now."""
    spec = importlib.util.spec_from_file_location(f"{__package__}.cases_of_old", case_table.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(args: argparse.Namespace, cases: list[Case], isas: list[str]) -> int:
    """Prints a table; returns 1 if this build is slower in a case by more than the threshold, else 0."""
    new = Build(_loaded(), case_table, {case.name: case for case in cases})
    old = load(args.against, args.family)
    print(f"against {old.described()}", flush=True)
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    rows, results = [["case", "isa", OLD, NEW, "old/new", "95 % of medians", ""]], []
    for isa, name in itertools.product(isas, new.cases):
        print(f"{name} on {isa} ...", file=sys.stderr, flush=True)
        if missing := _missing(old, name, isa):
            print(f"{name}: left out, for the other build has no {missing}", file=sys.stderr)
            continue
        results.append(measure(old, new, name, isa, rounds, args.threshold))
        rows.append([name, isa, *results[-1].cells(args.threshold)])
    if not results:
        raise SummaryError("--against: the two builds have no case in common")
    slower = sum(result.is_slower(args.threshold) for result in results)
    print(columns(rows))
    print(
        f"median {statistics.median(result.speedup for result in results):.3f}x; "
        f"{slower} of {len(results)} slower by more than {args.threshold:g} %"
    )
    return int(slower > 0)


def _missing(old: Build, name: str, isa: str) -> str:
    """What an older build lacks for a case, or nothing."""
    try:
        old.activate(isa)
        case = old.cases[name]
        case.ours(case.setup())
    except (AttributeError, ImportError, TypeError) as error:
        return str(error)
    except old.modules["dynquant.errors"].IsaError:
        return isa
    return ""


def measure(old: Build, new: Build, name: str, isa: str, rounds: int, threshold: float) -> Result:
    """A case in both builds.

    Where the median ratio is beyond the threshold, either way, more rounds follow on arrays and layers made
    anew, since where they lie in memory can be worth some percent.
    """
    samples = _samples(old, new, name, isa, rounds)
    if abs(Result(**samples).speedup - 1) > threshold / 100:
        for _ in range(REPETITIONS - 1):
            old.table.forget_layers()
            new.table.forget_layers()
            for side, seconds in _samples(old, new, name, isa, rounds).items():
                samples[side] += seconds
    return Result(**samples)


def _samples(old: Build, new: Build, name: str, isa: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of a call in each round, by OLD and NEW."""
    arrays = _arrays(new, name, isa, {})
    expected = new.cases[name].oracle(arrays)
    _check(new, name, isa, _arrays(new, name, isa, {}), expected)
    shared = {key: value for key, value in arrays.items() if not _is_of_a_build(value)}
    old_arrays = _arrays(old, name, isa, shared)
    _check(old, name, isa, _arrays(old, name, isa, {}), expected)
    contenders = [
        _contender(NEW, new, name, isa, arrays),
        _contender(OLD, old, name, isa, old_arrays),
    ]
    return sample_in_turns(contenders, rounds, new.cases[name].threads)


def _is_of_a_build(value: Any) -> bool:
    """A tensor, or the function that makes a layer; all else is shared."""
    return callable(value) or type(value).__module__.partition(".")[0] == "dynquant"


def _arrays(build: Build, name: str, isa: str, shared: Arrays) -> Arrays:
    """The arrays of a case, those in `shared` instead of the build's own."""
    build.activate(isa)
    return {**build.cases[name].setup(), **shared}


def _check(build: Build, name: str, isa: str, arrays: Arrays, expected: Any) -> None:
    build.activate(isa)
    build.table.check(build.cases[name], arrays, expected)


def _contender(name: str, build: Build, case: str, isa: str, arrays: Arrays) -> Contender:
    ours = build.cases[case].ours
    return Contender(name, lambda: ours(arrays), lambda: build.activate(isa))
