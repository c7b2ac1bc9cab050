"""What became of the linear layers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import ParameterError
from ._module import QuantLinear
from ._ops import TENSORS

# Where a model keeps why layers of it were left as they are.
_SKIPPED = "_dynquant_skipped"


@dataclass(frozen=True)
class LayerSummary:
    """A layer that was quantized.

    Attributes
    ----------
    name : str
        Qualified.
    shape : tuple of int
        (out_features, in_features).
    recipe : str
        How it was quantized.
    bytes_before, bytes_after : int
        Of weight and bias: in float32, and as quantized with all that belongs to it.
    sqnr_db : float or None
        Of the outputs on the calibration rows, if there were any.
    """

    name: str
    shape: tuple[int, int]
    recipe: str
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None


@dataclass(frozen=True)
class Summary:
    """What `summary` found; ``str()`` is a table.

    Attributes
    ----------
    layers : tuple of LayerSummary
        Those quantized: by output SQNR, the worst first, where that is known, and then in the model's order.
    skipped : dict of str to str
        Why each other linear layer was left as it is, by its name.
    bytes_before, bytes_after : int
        Of all parameters and buffers of the model, each counted once: with the layers in float32, and as they
        are. The kernels' own form of the weights, which is made in the first call, is not part of it: it
        takes about as much again as the quantized layers.
    """

    layers: tuple[LayerSummary, ...]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} layers quantized, {len(self.skipped)} left as they are; the model's bytes: "
            f"{self.bytes_before:,} -> {self.bytes_after:,}"
        ]
        rows = [("layer", "out x in", "recipe", "bytes", "SQNR, dB")]
        for layer in self.layers:
            n, k = layer.shape
            sqnr = "" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}"
            sizes = f"{layer.bytes_before:,} -> {layer.bytes_after:,}"
            rows.append((layer.name, f"{n} x {k}", layer.recipe, sizes, sqnr))
        lines += _table(rows, right=(3, 4)) if self.layers else []
        if self.skipped:
            lines += _table([("left as it is", "why"), *self.skipped.items()])
        return "\n".join(lines)


def _table(rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def summary(model: nn.Module) -> Summary:
    """What was quantized in a model, what was not and why, and the bytes.

    Parameters
    ----------
    model : nn.Module
        As from `quantize`.

    Returns
    -------
    Summary
        ``print`` shows it as a table.

    Raises
    ------
    ParameterError
        If `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise ParameterError(f"model: expected an nn.Module, got {type(model).__name__}")
    layers = [
        LayerSummary(
            name,
            (module.out_features, module.in_features),
            recipe_of(module),
            _bytes_before(module),
            sum(t.nbytes for t in map(module._buffers.get, TENSORS) if t is not None),
            module.sqnr_db,
        )
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
    ]
    order = sorted(layers, key=lambda layer: float("inf") if layer.sqnr_db is None else layer.sqnr_db)
    after = _bytes_of(model)
    return Summary(tuple(order), dict(getattr(model, _SKIPPED, {})), after + _saved(model), after)


def recipe_of(module: QuantLinear) -> str:
    """How a layer is quantized, in a few words."""
    group = "" if module.group_size is None else f" g{module.group_size}"
    flags = [
        (module.activation_symmetric, ", zero points"),
        (module.smooth is None, ", smoothed"),
        (not module.hadamard, ", rotated"),
    ]
    return f"int{module.bits}{group}" + "".join(text for usual, text in flags if not usual)


def _bytes_before(module: QuantLinear) -> int:
    n, k = module.out_features, module.in_features
    return 4 * (n * k + (0 if module.bias is None else n))


def _bytes_of(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in tensors.values())


def _saved(model: nn.Module) -> int:
    """How many bytes quantization saved. Tied weights count once."""
    saved = 0
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            own = [t for t in map(module._buffers.get, TENSORS) if t is not None and id(t) not in seen]
            if id(module.weight) not in seen:
                saved += 4 * module.out_features * module.in_features
            saved += sum(0 if t is module.bias else -t.nbytes for t in own)
            seen.update(map(id, own))
    return saved


def note_skipped(model: nn.Module, reasons: dict[str, str]) -> None:
    """Remember why layers were left as they are."""
    setattr(model, _SKIPPED, {**getattr(model, _SKIPPED, {}), **reasons})


def forget_skipped(model: nn.Module, names: list[str]) -> None:
    """Layers that were quantized after all."""
    setattr(model, _SKIPPED, {k: v for k, v in getattr(model, _SKIPPED, {}).items() if k not in names})
