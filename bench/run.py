"""Times every case on every instruction set, against NumPy and the peers.

All contenders of a case take turns within one process: in each round each is sampled once, and the round
starts with another one each time. A ratio is taken within a round and its median over the rounds reported, so
that a machine that is slow for a while is slow for both sides of it.
"""

from __future__ import annotations

import os
import sys

import no_avx512

# One thread for everybody, unless a case asks for more; the libraries read these while they are imported.
os.environ.update(OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_NUM_THREADS="1")
if "--no-avx512" in sys.argv:
    no_avx512.apply(with_peers="--peers" in sys.argv)

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import gc
import importlib.util
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
from cases import CASES, Case

import dynquant as dq
from dynquant import _isa

try:
    import threadpoolctl
except ImportError:
    threadpoolctl = None

Call = Callable[[], Any]
SAMPLE_SECONDS = 1e-3
WARM_UP_SECONDS = 0.1
# A quick look leaves out what touches more memory, unless it is asked for by name.
QUICK_BYTES = 1 << 24

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    args = _arguments()
    cases = _chosen(args)
    if not cases:
        print(f"no case's name matches {args.cases!r}; there are: " + " ".join(case.name for case in CASES))
        return 2
    isas = [isa for isa in usable_isas() if isa in (args.isa or _default_isas(args))]
    rounds = args.rounds or (3 if args.quick else 15)
    keep_freed_memory()
    print(f"dynquant {dq.__version__} from {Path(dq.__file__).parent}")
    limits = machine.measure_limits(isas[-1], 0.02 if args.quick else 0.2)
    report = _header(limits, rounds, args)
    print(_limits_text(report["machine"], limits), flush=True)

    for case in cases:
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        report["rows"] += measure(case, isas, rounds, args.peers, limits)
    for title, rows in _tables(report["rows"]).items():
        print("\n" + table(title, rows))
    if out := args.out or _default_out(args):
        save(report, out)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--peers", action="store_true", help="also other libraries, where installed")
    parser.add_argument("--no-avx512", action="store_true", help="keep everybody from AVX-512")
    parser.add_argument("--cases", default="", metavar="PATTERN", help="regular expression to find in names")
    parser.add_argument(
        "--isa",
        nargs="+",
        choices=usable_isas(),
        help="instruction sets (default: all; when quick, the best)",
    )
    parser.add_argument("--rounds", type=int, help="samples of each contender (default: 15; 3 when quick)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="save the results and a chart")
    parser.add_argument("--quick", action="store_true", help="a look: few rounds, no large arrays")
    return parser.parse_args()


def _chosen(args: argparse.Namespace) -> list[Case]:
    cases = [case for case in CASES if re.search(args.cases, case.name)]
    if args.quick and not args.cases:
        return [case for case in cases if case.read + case.written <= QUICK_BYTES]
    return cases


def _default_isas(args: argparse.Namespace) -> list[str]:
    return usable_isas()[-1:] if args.quick or args.no_avx512 else usable_isas()


def _default_out(args: argparse.Namespace) -> Path | None:
    """A measurement of everything is always saved; a part of it must not replace it."""
    partial = args.cases or args.isa or args.quick or args.rounds
    name = ("peers" if args.peers else "numpy") + ("_avx2" if args.no_avx512 else "")
    return None if partial else RESULTS / f"{name}.json"


def save(report: dict[str, Any], out: Path) -> None:
    """As JSON, and as a chart where matplotlib is installed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nsaved {out}")
    if importlib.util.find_spec("matplotlib"):
        import chart

        chart.save(report, out.with_suffix(".svg"))


def usable_isas() -> list[str]:
    info = dq.simd_info()
    allowed = {"baseline", "avx2"} if "--no-avx512" in sys.argv else set(info["supported"])
    return [isa for isa in info["built"] if isa in allowed & set(info["supported"])]


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, where it is glibc's.

    Otherwise large results come from new pages in some calls and from used ones in others, depending on what
    ran before; and a page fault costs more than quantising the page. Who allocates a result, as most peers
    do, is spared that here.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _header(limits: dict[str, Any], rounds: int, args: argparse.Namespace) -> dict[str, Any]:
    versions = {"dynquant": dq.__version__, "numpy": np.__version__}
    if args.peers:
        import peers

        versions |= peers.versions()
        if args.no_avx512:
            no_avx512.check(peers)
    return {
        "schema": 2,
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "versions": versions,
        "limits": limits,
        "avx512": not args.no_avx512,
        "rounds": rounds,
        "rows": [],
    }


# ----------------------------------------------------------------------------------------------------------
# Measuring


def measure(
    case: Case, isas: list[str], rounds: int, with_peers: bool, limits: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row for each instruction set; all of them and the others take part in the same rounds.

    On several threads only for the strongest one: work is shared out in the same way on all of them.
    """
    # Correct first.
    expected = case.oracle(case.setup())
    for isa in isas:
        _isa.select(isa)
        check(case, case.setup(), expected)
    isas = isas if case.threads == 1 else isas[-1:]
    arrays = case.setup()
    with numpy_threads(case.threads) as numpy_column:
        calls: dict[str, Call] = {isa: lambda: case.ours(arrays) for isa in isas}
        calls[numpy_column] = lambda: case.numpy(arrays)
        calls |= _other_calls(case, arrays, with_peers)
        samples = _sampled(calls, isas, rounds, rest=case.threads > 1)
    others = [name for name in calls if name not in isas]
    return [_row(case, isa, samples, others, limits) for isa in isas]


@contextlib.contextmanager
def numpy_threads(threads: int) -> Iterator[str]:
    """Gives NumPy's products so many threads, and its column a name, which tells where they have but one."""
    if threads == 1 or threadpoolctl is None:
        yield "numpy" if threads == 1 else "numpy_one_thread"
    else:
        with threadpoolctl.threadpool_limits(threads, "blas"):
            yield "numpy"


def _other_calls(case: Case, arrays: dict[str, Any], with_peers: bool) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    if case.threads > 1:
        alone = {**arrays, "threads": 1}
        calls["one_thread"] = lambda: case.ours(alone)
    if with_peers:
        import peers

        calls |= peers.contenders(case.operation, arrays)
    return calls


def check(case: Case, arrays: dict[str, Any], expected: Any) -> None:
    result = case.ours(arrays)
    for ours, theirs in zip(_parts(result), _parts(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=case.rtol, atol=0, err_msg=case.name)


def _parts(result: Any) -> tuple[Any, ...]:
    if isinstance(result, dq.DynQuantTensor):
        return result.data, result.scales
    if isinstance(result, dq.CalibStats):
        return dataclasses.astuple(result)
    return result if isinstance(result, tuple) else (result,)


def _sampled(calls: dict[str, Call], isas: list[str], rounds: int, rest: bool) -> dict[str, list[float]]:
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    repeats = {name: _enough(calls[name]) for name in names}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            if name in isas:
                _isa.select(name)
            if rest:
                _wait_for_rest()
            samples[name].append(_sample(calls[name], repeats[name]))
    gc.enable()
    return samples


def _wait_for_rest() -> None:
    """Until no thread of this process computes, or for half a second.

    The threads of a library spin for a while after their last task, and would take a core from the next one.
    """
    used = time.process_time()
    for _ in range(250):
        time.sleep(2e-3)
        before, used = used, time.process_time()
        if used - before < 2e-4:
            return


def _enough(call: Call) -> int:
    """How many calls make a sample; some first calls, which find and keep memory, are not looked at."""
    end = time.perf_counter() + WARM_UP_SECONDS
    for _ in range(10):
        call()
        if time.perf_counter() > end:
            break
    repeats = 1
    while repeats * _sample(call, repeats) < SAMPLE_SECONDS:
        repeats *= 2
    return repeats


def _sample(call: Call, repeats: int) -> float:
    """Seconds of one call. The first is not counted: it finds the caches as another contender left them."""
    call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _row(
    case: Case, isa: str, samples: dict[str, list[float]], others: list[str], limits: dict[str, Any]
) -> dict[str, Any]:
    ours = samples[isa]
    level = machine.level_of(case.read + case.written)
    ratios = {
        name: statistics.median(other / own for other, own in zip(samples[name], ours, strict=True))
        for name in others
    }
    return {
        "case": case.name,
        "what": case.what,
        "isa": isa,
        "group": case.group,
        "layer": case.layer,
        "threads": case.threads,
        "ratios": ratios,
        "seconds": {name: statistics.median(samples[name]) for name in (isa, *others)},
        "level": level,
        # The limits are those of one core.
        "limit_share": least_seconds(case, limits, level) / min(ours) if case.threads == 1 else None,
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


def _tables(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each table, by its title; the instruction sets one after another."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for isa in dict.fromkeys(row["isa"] for row in rows):
        for row in (row for row in rows if row["isa"] == isa):
            threads = f", {row['threads']} threads" if row["threads"] > 1 else ""
            tables.setdefault(f"{isa}: {row['group']}{threads}", []).append(row)
    return tables


def table(title: str, rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    lines = [[title, *columns, "limit", "at", "time"]]
    for row in rows:
        ratios = [f"{row['ratios'][name]:.2f}x" if name in row["ratios"] else "" for name in columns]
        share = "" if row["limit_share"] is None else f"{row['limit_share']:.0%}"
        lines.append([row["case"], *ratios, share, row["level"], _duration(row["seconds"][row["isa"]])])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines
    )


def _duration(seconds: float) -> str:
    for unit, size in (("s ", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _limits_text(described: dict[str, Any], limits: dict[str, Any]) -> str:
    lines = ["{cpu}, {cores} cores, {os}, Python {python}".format(**described)]
    for level in machine.LEVELS:
        rates = [f"{name} {limits[level][name] / 1e9:.0f} GB/s" for name in ("read", "write", "copy")]
        lines.append(f"{level:5}{', '.join(rates)}  ({limits[level]['bytes'] >> 10:,} KiB)")
    rates = [f"{limits[name] / 1e9:.1f} G {name}/s" for name in ("divides", "multiply_adds")]
    return "\n".join([*lines, f"core {', '.join(rates)}"])


if __name__ == "__main__":
    sys.exit(main())
