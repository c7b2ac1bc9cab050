"""Whether a saved run is slower than an earlier one: `python -m bench compare old.json new.json`.

Times of two runs on a shared machine differ for many reasons. What is compared is therefore dynquant's time
over NumPy's in the same run (`by="numpy"`): what slowed the whole machine down slowed both. Where NumPy or
its settings changed between the runs, times themselves are better (`by="time"`).
"""

from __future__ import annotations

from dataclasses import dataclass

from .summary import Entry, Summary, SummaryError
from .text import columns


@dataclass(frozen=True)
class Change:
    """A case on one instruction set in two runs. `speedup` is 2 where the new run takes half the time."""

    name: str
    isa: str
    speedup: float

    def is_slower(self, threshold: float) -> bool:
        """Whether the new time is longer by more than `threshold` percent."""
        return 1 / self.speedup > 1 + threshold / 100


def changes(old: Summary, new: Summary, by: str) -> list[Change]:
    """Every case and instruction set that both runs have."""
    before, after = _relative_times(old, by), _relative_times(new, by)
    common = [key for key in after if key in before]
    if not common:
        raise SummaryError("the two runs have no case in common")
    return [Change(*key, before[key] / after[key]) for key in common]


def _relative_times(summary: Summary, by: str) -> dict[tuple[str, str], float]:
    return {
        (case["name"], isa): case["seconds"][isa] if by == "time" else 1 / _numpy_ratio(case, isa)
        for case in summary["cases"]
        for isa in case["isas"]
    }


def _numpy_ratio(case: Entry, isa: str) -> float:
    ratios = case["isas"][isa]["ratios"]
    return next(ratio for name, ratio in ratios.items() if name.startswith("numpy"))


def report(old: Summary, new: Summary, found: list[Change], threshold: float) -> str:
    """What changed by more than `threshold` percent, slowest first, then a line about all."""
    notes = [
        f"note: {key} differ: {old[key]} and {new[key]}"
        for key in ("machine", "versions", "avx512")
        if old[key] != new[key]
    ]
    moved = [
        c
        for c in sorted(found, key=lambda c: c.speedup)
        if not 1 / (1 + threshold / 100) <= c.speedup <= 1 + threshold / 100
    ]
    rows = [["case", "isa", "old/new"], *([c.name, c.isa, f"{c.speedup:.2f}x"] for c in moved)]
    slower = sum(change.is_slower(threshold) for change in found)
    last = f"{slower} of {len(found)} slower by more than {threshold:g} %"
    return "\n".join([*notes, *([columns(rows)] if moved else []), last])
