"""Times every case on every instruction set, beside NumPy and the peers, or beside another build."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import dynquant as dq
from dynquant import _isa

from . import cases as case_table
from . import chart, machine, no_avx512, summary
from .cases import Arrays, Case, check
from .sampling import Contender, keep_freed_memory, median_ratio, sample_in_turns
from .text import columns, duration

# A quick look leaves out what touches more memory, unless it is asked for by name.
QUICK_BYTES = 1 << 24
WITHOUT_AVX512 = ("baseline", "avx2")


def main(args: argparse.Namespace) -> int:
    """Runs what the command line asks for; returns the exit status."""
    cases = chosen(case_table.cases(args.family), args)
    if not cases:
        raise summary.SummaryError(f"no case has a name like {args.cases!r}; --list prints the names")
    if args.list:
        print("\n".join(case.name for case in cases))
        return 0
    isas = chosen_isas(args)
    keep_freed_memory()
    print(f"dynquant {dq.__version__} from {Path(dq.__file__).parent}")
    if args.against:
        from . import against

        return against.main(args, cases, isas)
    return _measure_all(args, cases, isas)


def chosen(cases: list[Case], args: argparse.Namespace) -> list[Case]:
    cases = [case for case in cases if re.search(args.cases, case.name)]
    if args.quick and not args.cases:
        return [case for case in cases if case.read + case.written <= QUICK_BYTES]
    return cases


def chosen_isas(args: argparse.Namespace) -> list[str]:
    """Weakest first."""
    info = dq.simd_info()
    usable = [isa for isa in info["built"] if isa in info["supported"]]
    if args.no_avx512:
        usable = [isa for isa in usable if isa in WITHOUT_AVX512]
    if args.isa is None:
        return usable[-1:] if args.quick or args.no_avx512 or args.against else usable
    if unusable := [isa for isa in args.isa if isa not in usable]:
        raise summary.SummaryError(
            f"--isa {' '.join(unusable)} cannot be had here; there are {', '.join(usable)}"
        )
    return [isa for isa in usable if isa in args.isa]


def _measure_all(args: argparse.Namespace, cases: list[Case], isas: list[str]) -> int:
    rounds = args.rounds or (3 if args.quick else 15)
    limits = machine.measure_limits(isas[-1], 0.02 if args.quick else 0.2)
    found = _header(args, limits, rounds)
    print(machine.text(found["machine"], limits), flush=True)
    for case in cases:
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        found["cases"].append(measure(case, isas, rounds, args.peers, limits))
    for title, entries in _tables(found["cases"], isas).items():
        print("\n" + _table(title, entries))
    if args.out:
        summary.write(found, args.out)
        args.out.with_suffix(".svg").write_text(chart.svg(found), encoding="utf-8")
        print(f"\nsaved {args.out} and its chart")
    return 0


def _header(args: argparse.Namespace, limits: dict[str, Any], rounds: int) -> summary.Summary:
    versions = {"dynquant": dq.__version__, "numpy": np.__version__}
    if args.peers:
        from . import peers

        versions |= peers.versions()
        if args.no_avx512:
            no_avx512.check(peers)
    return {
        "schema": summary.SCHEMA,
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "versions": versions,
        "limits": limits,
        "avx512": not args.no_avx512,
        "rounds": rounds,
        "cases": [],
    }


# ----------------------------------------------------------------------------------------------------------
# Measuring


def measure(
    case: Case, isas: list[str], rounds: int, with_peers: bool, limits: dict[str, Any]
) -> summary.Entry:
    """The entry of a case, see summary.py. All instruction sets take part in the same rounds.

    On several threads only the strongest one does: work is shared out in the same way on all of them.
    """
    expected = case.oracle(case.setup())
    for isa in isas:
        _isa.select(isa)
        check(case, case.setup(), expected)
    isas = isas if case.threads == 1 else isas[-1:]
    arrays = case.setup()
    with numpy_threads(case.threads) as numpy_column:
        ours = [_on_isa(isa, case, arrays) for isa in isas]
        others = [Contender(numpy_column, lambda: case.numpy(arrays))]
        others += _other_contenders(case, arrays, with_peers)
        samples = sample_in_turns(ours + others, rounds, case.threads)
    return _entry(case, isas, samples, limits)


def _on_isa(isa: str, case: Case, arrays: Arrays) -> Contender:
    return Contender(isa, lambda: case.ours(arrays), lambda: _isa.select(isa))


@contextlib.contextmanager
def numpy_threads(threads: int) -> Iterator[str]:
    """Gives NumPy's products so many threads, and its column a name, which tells where they have but one."""
    try:
        import threadpoolctl
    except ImportError:
        threadpoolctl = None
    if threads == 1 or threadpoolctl is None:
        yield "numpy" if threads == 1 else "numpy_one_thread"
    else:
        with threadpoolctl.threadpool_limits(threads, "blas"):
            yield "numpy"


def _other_contenders(case: Case, arrays: Arrays, with_peers: bool) -> list[Contender]:
    others = []
    if case.threads > 1:
        alone = {**arrays, "threads": 1}
        others.append(Contender("one_thread", lambda: case.ours(alone)))
    if with_peers:
        from . import peers

        calls = peers.contenders(case.operation, arrays)
        others += [Contender(name, call) for name, call in calls.items()]
    return others


def _entry(
    case: Case, isas: list[str], samples: dict[str, list[float]], limits: dict[str, Any]
) -> summary.Entry:
    level = machine.level_of(case.read + case.written)
    others = [name for name in samples if name not in isas]
    return {
        "name": case.name,
        "what": case.what,
        "group": case.group,
        "layer": case.layer,
        "activations": case.activations,
        "threads": case.threads,
        "level": level,
        "seconds": {name: statistics.median(taken) for name, taken in samples.items()},
        "isas": {
            isa: {
                "ratios": {name: median_ratio(samples[name], samples[isa]) for name in others},
                # The limits are those of one core.
                "limit": least_seconds(case, limits, level) / min(samples[isa])
                if case.threads == 1
                else None,
            }
            for isa in isas
        },
    }


def least_seconds(case: Case, limits: dict[str, Any], level: str) -> float:
    """What the machine needs at the least: reads, writes and arithmetic overlap, the longest one counts."""
    return max(
        case.read * case.passes / limits[level]["read"],
        case.written / limits[level]["write"],
        case.divides / limits["divides"],
        case.multiply_adds / limits["multiply_adds"],
    )


# ----------------------------------------------------------------------------------------------------------
# Printing


def _tables(entries: list[summary.Entry], isas: list[str]) -> dict[tuple[str, str], list[summary.Entry]]:
    """The cases of each table, by instruction set and title; the instruction sets one after another."""
    tables: dict[tuple[str, str], list[summary.Entry]] = {}
    for isa in isas:
        for entry in (entry for entry in entries if isa in entry["isas"]):
            threads = f", {entry['threads']} threads" if entry["threads"] > 1 else ""
            tables.setdefault((isa, f"{entry['group']}{threads}"), []).append(entry)
    return tables


def _table(key: tuple[str, str], entries: list[summary.Entry]) -> str:
    isa, title = key
    results = [entry["isas"][isa] for entry in entries]
    names = list(dict.fromkeys(name for result in results for name in result["ratios"]))
    rows = [[f"{isa}: {title}", *names, "limit", "at", "time"]]
    for entry, result in zip(entries, results, strict=True):
        ratios = [f"{result['ratios'][name]:.2f}x" if name in result["ratios"] else "" for name in names]
        share = "" if result["limit"] is None else f"{result['limit']:.0%}"
        rows.append([entry["name"], *ratios, share, entry["level"], duration(entry["seconds"][isa])])
    return columns(rows)
