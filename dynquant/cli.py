"""The command line: ``dynquant`` and ``python -m dynquant``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from .errors import DynQuantError

DONE, FAILED, WRONG_USAGE = 0, 1, 2

_EXCLUDE = ("lm_head*", "*embed*")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str, optional
        By default those of the process.

    Returns
    -------
    int
        0 when done, 1 when it failed. Wrong usage leaves by SystemExit with 2, as argparse does.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (DynQuantError, OSError, ImportError) as error:
        print(f"dynquant {options.command}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"dynquant {options.command}: interrupted", file=sys.stderr)
        return FAILED
    return DONE


# ---- Options ----


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="dynquant", description="Quantize model files and arrays, measure what it costs, and search."
    )
    parser.add_argument("--version", action="version", version=f"dynquant {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_info(commands)
    _add_quantize(commands)
    _add_report(commands)
    _add_convert(commands)
    _add_search(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[[Any], None], summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--quiet", action="store_true", help="print no settings and no progress")
    return parser


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_threads, default=1, metavar="N", help="threads; -1: all CPUs")


def _add_patterns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--include",
        action="append",
        metavar="PATTERN",
        help="layers to quantize, as 'model.layers.*'; may be repeated; by default all linear layers",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help=f"layers to leave as they are; may be repeated; by default {' and '.join(_EXCLUDE)}",
    )


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be written, and write nothing"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at TARGET")


def _add_info(commands: Any) -> None:
    parser = _command(commands, "info", _info, "show what is in a model file, or this build and CPU")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", metavar="FILE", help="a .safetensors or .gguf file, or a folder")
    what.add_argument("--cpu", action="store_true", help="instruction sets of this build and this CPU")


def _add_quantize(commands: Any) -> None:
    parser = _command(commands, "quantize", _quantize, "quantize the linear layers of a model file")
    parser.add_argument("source", metavar="SOURCE", help="a .safetensors or .gguf file, or a folder")
    parser.add_argument("target", metavar="TARGET", help="a folder, or a .safetensors or .gguf file")
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8)
    parser.add_argument("--group-size", type=_count, metavar="N", help="weights that share a scale")
    parser.add_argument("--zero-points", action="store_true", help="4-bit codes with zero points")
    parser.add_argument("--search", action="store_true", help="search for the ranges of least error")
    parser.add_argument(
        "--calibration", metavar="ROWS.npz", help="inputs of layers, as numpy.savez writes them"
    )
    parser.add_argument(
        "--format", choices=("compressed-tensors", "gguf"), help="by default by TARGET's name"
    )
    parser.add_argument("--report", metavar="FILE", help="write the report, as .json or .html")
    _add_patterns(parser)
    _add_target(parser)
    _add_threads(parser)


def _add_report(commands: Any) -> None:
    parser = _command(commands, "report", _report, "measure several recipes for each layer of a model")
    parser.add_argument("source", metavar="MODEL", help="a model file or folder with float weights")
    parser.add_argument(
        "--calibration", metavar="ROWS.npz", help="inputs of layers, as numpy.savez writes them"
    )
    parser.add_argument("--quantized-rows", metavar="ROWS.npz", help="the same inputs in the quantized model")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--max-bytes", type=_size, metavar="SIZE", help="pick within SIZE, as 300M")
    budget.add_argument("--min-db", type=_decibels, metavar="DB", help="pick the smallest of at least DB")
    parser.add_argument("--html", metavar="FILE", help="write a page that needs no network")
    _add_patterns(parser)
    _add_threads(parser)


def _add_convert(commands: Any) -> None:
    parser = _command(
        commands,
        "convert",
        _convert,
        "write quantized layers in another layout, with the same codes and scales",
    )
    parser.add_argument("source", metavar="SOURCE", help="a quantized model file or folder")
    parser.add_argument("target", metavar="TARGET", help="a folder, or a .safetensors or .gguf file")
    _add_target(parser)


def _add_search(commands: Any) -> None:
    parser = _command(commands, "search", _search, "find the nearest vectors in an index on disk")
    parser.add_argument("index", metavar="INDEX", help="a folder that EmbeddingIndex.save wrote")
    parser.add_argument("queries", metavar="QUERIES.npy", help="query vectors (n, d) or (d,)")
    parser.add_argument("-k", type=_count, default=10, metavar="N", help="hits for each query")
    parser.add_argument("--rescore", metavar="VECTORS.npy", help="float vectors to score the best again from")
    parser.add_argument("--oversample", type=_count, default=4, metavar="N")
    _add_threads(parser)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _threads(text: str) -> int:
    value = int(text)
    if value < 1 and value != -1:
        raise ValueError
    return value


def _decibels(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _size(text: str) -> int:
    """Bytes, with K, M or G for powers of 1024."""
    number, unit = (text[:-1], text[-1].upper()) if text and text[-1].upper() in "KMG" else (text, "")
    value = float(number) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[unit]
    if not (math.isfinite(value) and value >= 1):
        raise ValueError
    return int(value)


# What argparse calls them in messages.
_count.__name__, _threads.__name__, _decibels.__name__, _size.__name__ = (
    "count",
    "threads",
    "decibels",
    "size",
)


# ---- Output ----


def _print_json(content: Any) -> None:
    from .models._report import plain

    print(json.dumps(plain(content), indent=1))


def _echo(options: Any, **settings: Any) -> None:
    """Show the settings before work starts."""
    if options.quiet or options.json:
        return
    told = ", ".join(f"{key} {value}" for key, value in settings.items() if value not in (None, [], ()))
    print(f"dynquant {options.command}: {told}", file=sys.stderr)


def _progress(options: Any) -> Callable[[int, int], object] | None:
    """A line on stderr that is written again, where it is a terminal."""
    if options.quiet or not sys.stderr.isatty():
        return None
    start, last = time.monotonic(), [0.0]

    def show(done: int, n: int) -> None:
        now = time.monotonic()
        if done < n and now - last[0] < 0.1:
            return
        last[0] = now
        speed = done / max(now - start, 1e-9) / 1e6
        end = "\n" if done == n else ""
        print(
            f"\r{done / max(n, 1):4.0%}  {done >> 20} of {n >> 20} MiB, {speed:.0f} MB/s ",
            end=end,
            file=sys.stderr,
        )
        sys.stderr.flush()

    return show


def _patterns(options: Any) -> dict[str, Any]:
    exclude = {} if options.exclude is None else {"exclude": options.exclude}
    return {"include": options.include, **exclude}


# ---- Commands ----


def _info(options: Any) -> None:
    if options.cpu:
        _cpu_info(options)
        return
    from .models import open_model
    from .models._report import printable, size, table

    model = open_model(options.file)
    tensors: list[dict[str, Any]] = [
        {"name": n, "dtype": model.dtype(n), "shape": list(model.shape(n)), "bytes": model.n_bytes(n)}
        for n in model.names
    ]
    if options.json:
        _print_json(
            {
                "path": model.path,
                "format": model.format,
                "files": list(model.files),
                "tensors": tensors,
                "layers": dict(model.layers),
            }
        )
        return
    rows = [["tensor", "dtype", "shape", "bytes"]]
    rows += [
        [printable(t["name"]), t["dtype"], "x".join(map(str, t["shape"])), str(t["bytes"])] for t in tensors
    ]
    print("\n".join(table(rows)))
    total = sum(t["bytes"] for t in tensors)
    layouts: dict[str, int] = {}
    for layout in model.layers.values():
        layouts[layout] = layouts.get(layout, 0) + 1
    told = "; ".join(f"{count} layers quantized as {layout}" for layout, count in layouts.items())
    files = f"{len(model.files)} files" if len(model.files) > 1 else "1 file"
    print(f"{model.format}, {files}, {len(tensors)} tensors, {size(total)}" + (f"; {told}" if told else ""))


def _cpu_info(options: Any) -> None:
    from . import __version__, simd_info

    info = {"version": __version__, **simd_info()}
    if options.json:
        _print_json(info)
        return
    for key, value in info.items():
        print(f"{key}: {', '.join(value) if isinstance(value, tuple) else value}")


def _quantize(options: Any) -> None:
    from .models import quantize_model
    from .models._quantize import Job
    from .models._report import printable, size, table

    format = options.format or ("gguf" if options.target.endswith(".gguf") else "compressed-tensors")
    recipe = {
        "bits": options.bits,
        "group_size": options.group_size,
        "symmetric": not options.zero_points,
        "search": options.search,
        "calibration": options.calibration,
        "format": format,
        "overwrite": options.overwrite,
        **_patterns(options),
    }
    if options.dry_run:
        report = Job.planned_by_options(options.source, options.target, recipe).report()
        if options.json:
            _print_json(report.to_dict())
            return
        rows = [["tensor", "shape", "before", "after", "how"]]
        rows += [
            [
                printable(t.name),
                "x".join(map(str, t.shape)),
                str(t.bytes_before),
                str(t.bytes_after),
                t.recipe or f"copied: {t.reason}",
            ]
            for t in report.tensors
        ]
        print("\n".join(table(rows)))
        print(f"would write {size(report.bytes_after)} to {printable(report.target)}; nothing is written")
        return
    _echo(options, source=options.source, target=options.target, threads=options.threads, **recipe)
    report = quantize_model(
        options.source, options.target, num_threads=options.threads, progress=_progress(options), **recipe
    )
    if options.report:
        _save(report, options.report)
    if options.json:
        _print_json(report.to_dict())
    else:
        print(report)


def _save(report: Any, path: str) -> None:
    if os.fspath(path).endswith((".html", ".htm")):
        report.to_html(path)
    else:
        report.to_json(path)


def _report(options: Any) -> None:
    from .models import compare_recipes, open_model
    from .models._quantize import chosen_layers

    budget = None
    if options.max_bytes is not None:
        budget = {"bytes": options.max_bytes}
    elif options.min_db is not None:
        budget = {"sqnr_db": options.min_db}
    _echo(
        options,
        model=options.source,
        calibration=options.calibration,
        budget=budget,
        threads=options.threads,
        **_patterns(options),
    )
    model = open_model(options.source)
    names = chosen_layers(model, **_patterns(options))
    table = compare_recipes(
        {name: _Weight(model, name) for name in names},
        options.calibration,
        budget=budget,
        quantized_rows=options.quantized_rows,
        num_threads=options.threads,
    )
    if options.html:
        table.to_html(options.html)
    if options.json:
        _print_json(table.to_dict())
    else:
        print(table)


class _Weight:
    """A weight of a model, read when it is asked for."""

    def __init__(self, model: Any, name: str) -> None:
        self._model, self._name = model, name

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self._model.rows(self._name)


def _convert(options: Any) -> None:
    from .models._convert import convert_model
    from .models._report import size

    _echo(options, source=options.source, target=options.target)
    done = convert_model(options.source, options.target, overwrite=options.overwrite, dry_run=options.dry_run)
    if options.json:
        _print_json(done)
        return
    verb = "would write" if options.dry_run else "wrote"
    print(
        f"{verb} {done['layers']} layers as {done['format']}, {done['copied']} other tensors as they are, "
        f"{size(done['bytes'])}"
    )


def _search(options: Any) -> None:
    import numpy as np

    from . import EmbeddingIndex

    try:
        queries = np.load(options.queries, mmap_mode="r", allow_pickle=False)
        rescore = None
        if options.rescore is not None:
            rescore = np.load(options.rescore, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DynQuantError(f"expected a .npy file of numbers ({error})") from error
    index = EmbeddingIndex.open(options.index)
    _echo(options, index=options.index, vectors=len(index), queries=options.queries, k=options.k)
    found = index.search(
        queries.reshape(-1, queries.shape[-1]) if queries.ndim else queries,
        options.k,
        rescore=rescore,
        oversample=options.oversample,
        num_threads=options.threads,
    )
    scores, ids = found
    if options.json:
        _print_json({"ids": ids.tolist(), "scores": scores.tolist()})
        return
    for i, (own_ids, own_scores) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True)):
        for id_, score in zip(own_ids, own_scores, strict=True):
            print(f"{i}\t{id_}\t{score:.6g}")
