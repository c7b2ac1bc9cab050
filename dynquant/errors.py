"""The exceptions that dynquant raises. Each is also the built-in exception that a caller would expect."""

from __future__ import annotations

import math
import reprlib
from typing import Any

__all__ = [
    "DTypeError",
    "DynQuantError",
    "EmptyInputError",
    "FeatureDimMismatchError",
    "InvalidAlphaError",
    "InvalidPercentileError",
    "IsaError",
    "LayoutError",
    "NonFiniteError",
    "ParameterError",
    "ShapeMismatchError",
    "SilentChannelWarning",
]


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlevel = 1
_REPR.maxtuple = 64  # the axes that a shape of NumPy may have


def shown(value: Any) -> str:
    """`value` in a message: its repr, shortened; where that fails, as with ints of 5,000 digits, its type."""
    try:
        return _REPR.repr(value)
    except Exception:
        return object.__repr__(value)


def _cut(message: str) -> str:
    return message if len(message) <= 1000 else f"{message[:498]} ... {message[-497:]}"


class DynQuantError(Exception):
    """Base of every exception that dynquant raises by itself."""

    def __init__(self, *args: Any) -> None:
        """Messages may quote text from elsewhere, so they are cut to 1,000 characters."""
        super().__init__(*(_cut(arg) if isinstance(arg, str) else arg for arg in args))


class ShapeMismatchError(DynQuantError, ValueError):
    """An array does not have the shape that the call needs.

    Attributes
    ----------
    expected : tuple of int, or str where several shapes would do
    actual : tuple of int
    argument : str
        Name of the argument.
    """

    def __init__(self, expected: Any, actual: Any, argument: str = "array") -> None:
        super().__init__(expected, actual, argument)
        self.expected = expected
        self.actual = actual
        self.argument = argument

    def __str__(self) -> str:
        expected = self.expected if isinstance(self.expected, str) else shown(self.expected)
        return f"{self.argument}: expected shape {expected}, got {shown(self.actual)}"


class FeatureDimMismatchError(ShapeMismatchError):
    """Two arrays that share the feature axis disagree in its length.

    Attributes
    ----------
    in_features : int
        Length of the feature axis.
    factors_len : int
        Length of what should match it.
    expected, actual, argument
        As in `ShapeMismatchError`.
    """

    def __init__(self, in_features: int, factors_len: int, argument: str = "factors") -> None:
        super().__init__((in_features,), (factors_len,), argument)
        self.args = (in_features, factors_len, argument)
        self.in_features = in_features
        self.factors_len = factors_len

    def __str__(self) -> str:
        return f"{self.argument}: expected {self.in_features} in_features, got {self.factors_len}"


class EmptyInputError(DynQuantError, ValueError):
    """An array without elements was given where the result would be undefined."""


class InvalidAlphaError(DynQuantError, ValueError):
    """A migration strength outside [0, 1].

    Attributes
    ----------
    alpha : float
    argument : str
        Name of the argument.
    """

    def __init__(self, alpha: Any, argument: str = "alpha") -> None:
        super().__init__(alpha, argument)
        self.alpha = alpha
        self.argument = argument

    def __str__(self) -> str:
        return f"{self.argument}: expected a number in [0, 1], got {shown(self.alpha)}"


class InvalidPercentileError(DynQuantError, ValueError):
    """A percentile outside (0, 1].

    Attributes
    ----------
    p : float
    """

    def __init__(self, p: Any) -> None:
        super().__init__(p)
        self.p = p

    def __str__(self) -> str:
        return f"p: expected a number in (0, 1], got {shown(self.p)}"


class NonFiniteError(DynQuantError, ValueError):
    """An input holds NaN, infinity, or a number beyond float32.

    Attributes
    ----------
    index : int
        Flat index of the first such element, in C order.
    position : tuple of int
        The same as an index for each axis.
    value : float
        The element.
    argument : str
        Name of the argument.
    """

    def __init__(
        self, index: int, value: float, argument: str = "x", position: tuple[int, ...] | None = None
    ) -> None:
        super().__init__(index, value, argument, position)
        self.index = index
        self.position = (index,) if position is None else position
        self.value = value
        self.argument = argument

    def __str__(self) -> str:
        expected = "numbers within float32" if math.isfinite(self.value) else "finite values"
        position = f", position {self.position}" if len(self.position) > 1 else ""
        return f"{self.argument}: expected {expected}, got {self.value} at flat index {self.index}{position}"


class ParameterError(DynQuantError, ValueError):
    """An option has a value that it cannot take."""


class DTypeError(DynQuantError, TypeError):
    """An array has a dtype that the call does not take."""


class LayoutError(DynQuantError, ValueError):
    """A result array is read-only, overlaps an input, or is not C-contiguous."""


class IsaError(DynQuantError, ImportError):
    """The instruction set asked for by ``DYNQUANT_ISA`` is not available."""


class SilentChannelWarning(UserWarning):
    """Smoothing factors of channels that were never active, by an equation that makes them tiny.

    Attributes
    ----------
    channels : tuple of int
        All of them.
    in_features : int
    """

    def __init__(self, channels: tuple[int, ...], in_features: int) -> None:
        super().__init__(channels, in_features)
        self.channels = channels
        self.in_features = in_features

    def __str__(self) -> str:
        first = ", ".join(map(str, self.channels[:5])) + (", ..." if len(self.channels) > 5 else "")
        return (
            f"activations: {len(self.channels)} of {self.in_features} channels were never active: {first}. "
            "Their factors are tiny, and a row in which one of them becomes active loses its other channels. "
            "mode=Percentile(1.0) gives them factor 1; MaxAbs() with a larger epsilon limits the damage"
        )
