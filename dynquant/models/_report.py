"""What `quantize_model` did to each tensor, and what it cost."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from .._files import write_text

# Layers that the table of str() shows, the worst first.
_SHOWN = 10


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a `ModelReport`.

    Attributes
    ----------
    name : str
    shape : tuple of int
    dtype : str
        That of the source.
    bytes_before, bytes_after : int
    recipe : str or None
        How it was quantized; None where it was copied.
    reason : str or None
        Why it was copied.
    sqnr_db : float or None
        Power of the weights over power of their error, in decibels; None where nothing was measured.
    max_abs : float or None
        Largest error of a weight.
    zero_share, clipped_share : float or None
        Shares of the weights whose code stands for 0, and that lie beyond the range of the codes.
    output_sqnr_db : float or None
        The same of the layer's output, on its calibration rows.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes_before: int
    bytes_after: int
    recipe: str | None = None
    reason: str | None = None
    sqnr_db: float | None = None
    max_abs: float | None = None
    zero_share: float | None = None
    clipped_share: float | None = None
    output_sqnr_db: float | None = None


class Written:
    """What the reports have in common: files of themselves."""

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def _page(self) -> str:
        raise NotImplementedError

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the content of `to_dict` as JSON.

        Parameters
        ----------
        path : str or os.PathLike

        Raises
        ------
        OSError
            If it cannot be written.
        """
        write_text(path, json.dumps(self.to_dict(), indent=1))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page with tables and plots, which needs no other file and no network.

        Parameters
        ----------
        path : str or os.PathLike

        Raises
        ------
        OSError
            If it cannot be written.
        """
        write_text(path, self._page())


@dataclass(frozen=True)
class ModelReport(Written):
    """What `quantize_model` wrote, or would write. ``str()`` is a table.

    Attributes
    ----------
    source, target : str
    settings : dict
        The options of the call.
    tensors : tuple of TensorReport
        In the order of the source.
    seconds : float or None
        How long it took; None where nothing was written.
    """

    source: str
    target: str
    settings: dict[str, Any]
    tensors: tuple[TensorReport, ...]
    seconds: float | None = None

    @property
    def quantized(self) -> tuple[TensorReport, ...]:
        """The tensors that were quantized, the worst first: by output where there were calibration rows."""
        return tuple(sorted((t for t in self.tensors if t.recipe), key=_badness))

    @property
    def copied(self) -> tuple[TensorReport, ...]:
        """The tensors that were copied."""
        return tuple(t for t in self.tensors if not t.recipe)

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(t.bytes_before for t in self.tensors)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors of the target."""
        return sum(t.bytes_after for t in self.tensors)

    def exclude(self, below: float) -> tuple[str, ...]:
        """Names to exclude, ready to paste: layers whose SQNR is less than `below` decibels.

        Parameters
        ----------
        below : float
            Of the output where there were calibration rows, else of the weights.
        """
        return tuple(layer_of(t.name) for t in self.quantized if _badness(t) < below)

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists and numbers, as in the JSON. NaN and infinity are None."""
        content = {
            "source": self.source,
            "target": self.target,
            "settings": self.settings,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "seconds": self.seconds,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }
        result: dict[str, Any] = plain(content)
        return result

    def _page(self) -> str:
        from ._html import model_page

        return model_page(self)


def layer_of(name: str) -> str:
    """The layer that a weight belongs to."""
    return name.removesuffix(".weight")


def _badness(tensor: TensorReport) -> float:
    for value in (tensor.output_sqnr_db, tensor.sqnr_db):
        if value is not None and not math.isnan(value):
            return value
    return math.inf


def plain(content: Any) -> Any:
    """`content` for JSON, which has neither NaN nor infinity."""
    if isinstance(content, dict):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def printable(text: str) -> str:
    """A name from a file for a terminal: what is not printable is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def size(n_bytes: float) -> str:
    """Bytes as a terminal shows them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024 or unit == "GiB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError("unreachable")


def decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def table(rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, others to the right; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _lines(report: ModelReport) -> list[str]:
    worst = report.quantized[:_SHOWN]
    lines = []
    if worst:
        has_output = any(t.output_sqnr_db is not None for t in report.quantized)
        head = ["worst layers first", "shape", "recipe", "bytes", "SQNR dB", "max error", "zeros", "clipped"]
        rows = [head + ["output dB"] * has_output]
        for t in worst:
            rows.append(
                [
                    printable(layer_of(t.name)),
                    "x".join(map(str, t.shape)),
                    t.recipe or "",
                    f"{t.bytes_after}",
                    decibels(t.sqnr_db),
                    "" if t.max_abs is None else f"{t.max_abs:.3g}",
                    "" if t.zero_share is None else f"{t.zero_share:.2%}",
                    "" if t.clipped_share is None else f"{t.clipped_share:.2%}",
                ]
                + [decibels(t.output_sqnr_db)] * has_output
            )
        lines += table(rows)
        if len(report.quantized) > len(worst):
            lines.append(f"... and {len(report.quantized) - len(worst)} more")
    reasons: dict[str, int] = {}
    for t in report.copied:
        reasons[t.reason or ""] = reasons.get(t.reason or "", 0) + 1
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    lines.append(f"{len(report.quantized)} tensors quantized, {len(report.copied)} copied ({told})")
    ratio = report.bytes_before / report.bytes_after if report.bytes_after else math.nan
    lines.append(f"{size(report.bytes_before)} -> {size(report.bytes_after)}, {ratio:.2f} times smaller")
    return lines
