"""Calibration data, read batch by batch: one array, or any iterable of arrays."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ._validate import as_floats, check_finite
from .errors import DTypeError, FeatureDimMismatchError, ShapeMismatchError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ARRAY_PROTOCOLS = ("__array__", "__array_interface__", "__array_struct__")


def is_array(x: Any) -> bool:
    """Whether `x` is one array: it has the array or the buffer protocol."""
    if any(hasattr(x, name) for name in _ARRAY_PROTOCOLS):
        return True
    try:
        memoryview(x)
    except TypeError:
        return False
    return True


def named_batches(x: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The batches in `x`, each with the name that an error calls it by.

    `x` is one batch if it is an array, a number, or a list or tuple of numbers or of rows of numbers.
    Otherwise it is read by iteration, one batch at a time.

    Raises
    ------
    DTypeError
        If `x` is neither.
    """
    if is_array(x) or isinstance(x, str) or _is_literal(x):
        yield name, x
        return
    try:
        iterator = iter(x)
    except TypeError as error:
        message = f"{name}: expected an array or an iterable of arrays, got {type(x).__name__}"
        raise DTypeError(message) from error
    for i, batch in enumerate(iterator):
        yield f"{name}[{i}]", batch


def _is_literal(x: Any) -> bool:
    """Whether `x` is a number, or a list or tuple that begins with one or with a row of them."""
    for _ in range(2):
        if isinstance(x, (list, tuple)) and x:
            x = x[0]
    return isinstance(x, numbers.Number)


def row_batches(x: Any, name: str, in_features: int) -> Iterator[NDArray[np.floating[Any]]]:
    """The batches in `x` as finite matrices (rows, in_features) of float32, float16 or bfloat16.

    A batch has any number of axes in front of its features: (in_features,), (rows, in_features),
    (batch, tokens, in_features). Batches without elements are passed over. One batch is held at a time, and
    its memory may be used again for the next.

    Raises
    ------
    DTypeError, NonFiniteError
        If a batch does not hold floats, or holds NaN or infinity.
    ShapeMismatchError, FeatureDimMismatchError
        If a batch has no axes, or its last axis is not in_features long.
    """
    for label, batch in named_batches(x, name):
        array = as_floats(batch, label)
        if array.ndim == 0:
            raise ShapeMismatchError(f"(..., {in_features})", array.shape, label)
        if array.size == 0:
            continue
        if array.shape[-1] != in_features:
            raise FeatureDimMismatchError(in_features, array.shape[-1], label)
        check_finite(array, label)
        yield array.reshape(-1, in_features)
