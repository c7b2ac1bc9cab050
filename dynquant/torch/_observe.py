"""What reaches the linear layers of a model while it runs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from .._calibrator import Calibrator
from .._validate import F32, as_count, check_finite
from ..errors import ParameterError
from ._ops import version_of
from ._select import LM_HEAD, select_layers

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SEED = 0


@contextlib.contextmanager
def observe(
    model: nn.Module,
    *,
    rows: int = 512,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = LM_HEAD,
) -> Iterator[dict[str, Any]]:
    """Collect what reaches the linear layers of a model, for the calibration of `quantize`.

    Parameters
    ----------
    model : nn.Module
        Not quantized yet. Run it inside the ``with``, in eager mode, on inputs like those to come.
    rows : int
        How many rows of inputs are kept for each layer, drawn at random from all that come. 0: none, but
        statistics of all of them, which are smaller, and serve smoothing alone.
    include, exclude : str or iterable of str, optional
        Which layers, as in `quantize`.

    Yields
    ------
    dict
        Filled when the ``with`` ends: for the qualified name of each layer that had rows, an array (rows,
        in_features) of float32; or with ``rows=0`` a `dynquant.Calibrator` with channels. Layers that read
        one tensor, such as those for query, key and value, have one object together, and are smoothed by the
        same factors.

    Raises
    ------
    ParameterError
        If an argument has a value that it cannot take, or there is no layer to observe.
    NonFiniteError
        From the model's call, if an input of a layer is NaN or infinite.

    Notes
    -----
    Memory is bounded: ``4 * rows * in_features`` bytes for each distinct input, or with ``rows=0`` what a
    `dynquant.Calibrator` takes. The same batches in the same order give the same rows.
    """
    kept = 0 if type(rows) is int and rows == 0 else as_count(rows, "rows", " or 0")
    layers = [layer for layer in select_layers(model, include, exclude) if layer.reason is None]
    if not layers:
        raise ParameterError(f"model: expected a linear layer to observe, got none in {type(model).__name__}")
    watch = _Watch(kept)
    handles = [
        layer.module.register_forward_pre_hook(watch.hook_of(layer.name), with_kwargs=True)
        for layer in layers
    ]
    seen: dict[str, Any] = {}
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        seen.update(watch.result())


class _Sample:
    """Rows drawn from all that come, each with the same probability (Vitter's algorithm R)."""

    def __init__(self, size: int, k: int) -> None:
        self._rows, self._seen = np.empty((size, k), F32), 0
        self._random = np.random.default_rng(_SEED)

    def update(self, x: NDArray[np.float32]) -> None:
        size = len(self._rows)
        new = x[: max(0, size - self._seen)]
        self._rows[self._seen : self._seen + len(new)] = new
        self._seen += len(new)
        rest = x[len(new) :]
        if len(rest):
            index = self._random.integers(0, np.arange(self._seen + 1, self._seen + len(rest) + 1))
            self._rows[index[index < size]] = rest[index < size]
            self._seen += len(rest)

    def result(self) -> NDArray[np.float32]:
        return self._rows[: min(self._seen, len(self._rows))]


class _Watch:
    """What each layer has seen. Layers called one after the other with one tensor share what is kept."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._kept: dict[str, Any] = {}
        self._leader: dict[int, str] = {}  # by the identity of what is kept, the layer that it is filled by
        self._last: tuple[Tensor | None, int, Any] = None, 0, None

    def hook_of(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self._see(name, x)

        return hook

    def _see(self, name: str, x: Tensor) -> None:
        kept, (last, version, latest) = self._kept.get(name), self._last
        if x is last and version_of(x) == version and (kept is None or kept is latest):
            self._kept[name] = latest
            return
        rows = np.ascontiguousarray(x.detach().reshape(-1, x.shape[-1]).float().numpy())
        check_finite(rows, f"input of {name}")
        if kept is None or self._leader[id(kept)] != name:
            # Its own from now on; what it has seen together with others counts for it too.
            k = rows.shape[1]
            new = _Sample(self._rows, k) if self._rows else Calibrator(channels=k)
            kept = self._kept[name] = new if kept is None else copy.deepcopy(kept)
            self._leader[id(kept)] = name
        kept.update(rows)
        self._last = x, version_of(x), kept

    def result(self) -> dict[str, Any]:
        self._last = None, 0, None
        results = {id(kept): kept.result() if self._rows else kept for kept in self._kept.values()}
        # Such as an expert that no row was sent to: it is quantized as if it had not been called.
        empty = {key for key, kept in results.items() if not (len(kept) if self._rows else kept.count)}
        return {name: results[id(kept)] for name, kept in self._kept.items() if id(kept) not in empty}
