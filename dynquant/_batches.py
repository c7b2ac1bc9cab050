"""Calibration data, read batch by batch: one array, any iterable of arrays, or the sample of a Calibrator."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ._calibrator import Calibrator
from ._validate import F32, as_floats, check_finite, raise_non_finite
from .errors import (
    DTypeError,
    EmptyInputError,
    FeatureDimMismatchError,
    ParameterError,
    ShapeMismatchError,
)

if TYPE_CHECKING:
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


def is_one_batch(x: Any) -> bool:
    """Whether `x` is one batch: an array, a number, or a list or tuple that is empty or begins with a row."""
    if isinstance(x, (list, tuple)) and not x:
        return True
    return isinstance(x, (str, bytes)) or _is_literal(x) or (is_array(x) and not _is_array_of_arrays(x))


def named_batches(x: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The batches in `x`, each with the name that an error calls it by.

    What is not one batch is read by iteration, one batch at a time.

    Raises
    ------
    DTypeError
        If `x` is neither a batch nor an iterable of them.
    """
    if is_one_batch(x):
        yield name, x
        return
    try:
        iterator = iter(x)
    except TypeError as error:
        message = f"{name}: expected an array or an iterable of arrays, got {type(x).__name__}"
        raise DTypeError(message) from error
    for i, batch in enumerate(iterator):
        if i == 0 and isinstance(batch, numbers.Number) and not is_array(batch):
            raise DTypeError(f"{name}: expected a float array or an iterable of them, got numbers one by one")
        if isinstance(x, Mapping):
            raise DTypeError(f"{name}[0]: expected a float array, got a key of a mapping; pass its .values()")
        yield f"{name}[{i}]", batch


def _is_literal(x: Any) -> bool:
    """Whether `x` is a number, or a list or tuple that begins with one, with text or with a row of them."""
    for _ in range(2):
        if isinstance(x, (list, tuple)) and x:
            x = x[0]
    return isinstance(x, (numbers.Number, str, bytes))


def _is_array_of_arrays(x: Any) -> bool:
    """Whether `x` is an object array of batches, as NumPy makes it of arrays of unequal lengths."""
    array = np.asarray(x) if isinstance(x, np.ndarray) else None
    return (
        array is not None
        and array.dtype == object
        and array.ndim == 1
        and array.size > 0
        and all(is_array(item) or isinstance(item, (list, tuple)) for item in array)
    )


def row_batches(x: Any, name: str, in_features: int) -> Iterator[NDArray[np.floating[Any]]]:
    """The batches in `x` as finite matrices (rows, in_features) of float32, float16 or bfloat16.

    Of a Calibrator they are the rows that it has sampled. A batch has any number of axes in front of its
    features: (in_features,), (rows, in_features), (batch, tokens, in_features). Batches without elements are
    passed over. One batch is held at a time, and its memory may be used again for the next.

    Raises
    ------
    DTypeError, NonFiniteError
        If a batch does not hold floats, or holds NaN or infinity.
    ShapeMismatchError, FeatureDimMismatchError
        If a batch has no axes, or its last axis is not in_features long.
    """
    if isinstance(x, Calibrator):
        x = sampled_rows(x, name)
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


def sampled_rows(calibrator: Calibrator, name: str) -> NDArray[np.float32]:
    """The rows that a Calibrator has sampled, where one was passed as `name`."""
    if calibrator.rows is None:
        raise ParameterError(f"{name}: expected a Calibrator made with rows, got {calibrator}")
    return calibrator.sample()


class ActivationRows:
    """Rows that reached a layer, as matrices (rows, in_features).

    Batches of an iterable are read again each time that the rows are gone over.
    """

    def __init__(self, batches: Any, name: str, in_features: int, array: NDArray[Any] | None = None) -> None:
        self._batches, self._name, self.in_features = batches, name, in_features
        self._array = array

    @classmethod
    def of_array(cls, array: NDArray[Any], name: str) -> ActivationRows:
        """Those of one array (..., in_features), which is not looked at for NaN and infinity."""
        if array.ndim < 2:
            raise ShapeMismatchError("(..., in_features) with at least two axes", array.shape, name)
        if array.size == 0:
            raise EmptyInputError(f"{name}: expected at least one element, got shape {array.shape}")
        return cls([array.reshape(-1, array.shape[-1])], name, array.shape[-1], array)

    @classmethod
    def of_batches(cls, batches: Any, name: str, in_features: int, once: bool) -> ActivationRows:
        """Those of an iterable, each of whose batches is checked as by `row_batches`.

        Unless the rows are gone over but `once`, those of an iterator, which gives them once, are kept.
        """
        rows = cls(batches, name, in_features)
        if iter(batches) is batches and not once:
            # Copies: the memory of a batch may be used again for the next.
            rows._batches = [batch.copy() for batch in row_batches(batches, name, in_features)]
        return rows

    def __iter__(self) -> Iterator[NDArray[Any]]:
        if self._array is not None:
            return iter(self._batches)
        return row_batches(self._batches, self._name, self.in_features)

    def joined(self) -> ActivationRows:
        """The same in one matrix."""
        if self._array is not None:
            return self
        matrices = [batch.copy() for batch in self]
        if not matrices:
            raise EmptyInputError(f"{self._name}: expected at least one row, got none")
        if len({matrix.dtype for matrix in matrices}) > 1:
            matrices = [matrix.astype(F32, copy=False) for matrix in matrices]
        return self.of_array(np.concatenate(matrices), self._name)

    def raise_non_finite(self) -> NoReturn:
        """Raise for the first element that is NaN or infinite, which only one array may have."""
        assert self._array is not None
        raise_non_finite(self._array, self._name)
