"""The command line of `python -m bench`. Imports nothing that is measured: settings come first."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .summary import SummaryError, read

PROGRAM = "python -m bench"
OK, SLOWER, WRONG_USAGE = 0, 1, 2
FAMILIES = ("operations", "layers", "rows", "activations")
DEFAULT_FAMILIES = FAMILIES[:2]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks, or what the first argument names; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = COMMANDS.get(argv[0]) if argv else None
    try:
        return command(argv[1:]) if command else _run(argv)
    except SummaryError as error:
        print(error, file=sys.stderr)
        return WRONG_USAGE


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Time every case beside NumPy, other libraries, or another build of dynquant.",
        epilog=f"other commands, each with its own --help: {', '.join(COMMANDS)}",
        allow_abbrev=False,
    )
    _choose_cases(parser)
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument(
        "--peers", action="store_true", help="also PyTorch, ONNX Runtime and NumKong, if installed"
    )
    beside.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="another build of dynquant instead of other libraries: a folder that holds its package, such as "
        "a checkout built in place; exit status 1 if this one is slower",
    )
    _threshold(parser, 3, "with --against: percent from which a case counts as slower")
    parser.add_argument("--no-avx512", action="store_true", help="keep everybody from AVX-512")
    parser.add_argument(
        "--isa",
        nargs="+",
        help="instruction sets (default: all; with --quick, --no-avx512 or --against, the best)",
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        help="samples of each contender (default: 15; 3 with --quick; 61 with --against)",
    )
    parser.add_argument("--quick", action="store_true", help="a look: few rounds, no large arrays")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="save a summary, and a chart beside it")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and end")
    args = parser.parse_args(argv)
    if args.against and args.out:
        parser.error("--against compares, and saves nothing: leave out --out")
    _one_thread()
    if args.no_avx512:
        from . import no_avx512

        no_avx512.apply(with_peers=args.peers)
    from . import run

    return run.main(args)


def _choose_cases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cases", default="", metavar="PATTERN", help="regular expression to find in the cases' names"
    )
    parser.add_argument(
        "--family",
        nargs="+",
        choices=FAMILIES,
        default=DEFAULT_FAMILIES,
        help="kinds of cases: operations and layers (the default), layers on every number of rows from 1 to "
        "64, layers on real and artificial activations",
    )


def _threshold(parser: argparse.ArgumentParser, default: float, text: str) -> None:
    parser.add_argument(
        "--threshold",
        type=_positive_float,
        default=default,
        metavar="PERCENT",
        help=f"{text} (default: {default})",
    )


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"at least 1 is expected, got {text}")
    return value


def _positive_float(text: str) -> float:
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"a number above 0 is expected, got {text}")
    return value


def _one_thread() -> None:
    """For everybody, unless a case asks for more; libraries read this while they are imported."""
    os.environ.update(OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_NUM_THREADS="1")


def _compare(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} compare",
        description="Compare two saved runs. Exit status 0: no case is slower; 1: one is; 2: wrong usage.",
    )
    parser.add_argument("old", type=Path, metavar="old.json")
    parser.add_argument("new", type=Path, metavar="new.json")
    _threshold(parser, 10, "percent from which a case counts as slower")
    parser.add_argument(
        "--by",
        choices=("numpy", "time"),
        default="numpy",
        help="compare dynquant's time over NumPy's in the same run, which the load of the machine changes "
        "less (the default), or times themselves",
    )
    args = parser.parse_args(argv)
    from . import compare

    old, new = read(args.old), read(args.new)
    found = compare.changes(old, new, args.by)
    print(compare.report(old, new, found, args.threshold))
    return SLOWER if any(change.is_slower(args.threshold) for change in found) else OK


def _chart(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} chart", description="Draw a saved run.")
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("chart", type=Path, metavar="CHART.svg")
    args = parser.parse_args(argv)
    from . import chart

    args.chart.write_text(chart.svg(read(args.results)), encoding="utf-8")
    return OK


def _table(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} table",
        description="Print saved runs as a Markdown table: of each library the way that is hardest to beat.",
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    parser.add_argument(
        "--cases", default="", metavar="PATTERN", help="regular expression to find in the cases' names"
    )
    args = parser.parse_args(argv)
    from . import markdown

    print(markdown.table([read(path) for path in args.results], args.cases))
    return OK


def _demo(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} demo",
        description="Quantize a real feed-forward block: bytes, accuracy, and speed beside NumPy.",
    )
    parser.add_argument(
        "--full", action="store_true", help="also formats of activations, and smoothing factors"
    )
    parser.add_argument("--speeds", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    _one_thread()
    from . import demo

    return demo.print_speeds() if args.speeds else demo.main(args.full)


def _sentences(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} sentences",
        description="Encode sentences with a quantized model of PyTorch: accuracy, bytes and speed.",
    )
    parser.add_argument("--no-avx512", action="store_true", help="keep everybody from AVX-512")
    parser.add_argument("--profile", action="store_true", help="only where the time goes")
    args = parser.parse_args(argv)
    _one_thread()
    if args.no_avx512:
        from . import no_avx512

        os.environ["DYNQUANT_ISA"] = "avx2"
        no_avx512.apply(with_peers=True)
    from . import sentences

    return sentences.main(args.profile)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "compare": _compare,
    "chart": _chart,
    "table": _table,
    "demo": _demo,
    "sentences": _sentences,
}
