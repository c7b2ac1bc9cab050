"""What a linear layer does to its inputs before they are quantized, and to its weights once to match.

Smoothing first, then signs, then rotation. A call of a layer does the same to its inputs row by row:
`prepared_row` in core/linear.pxi.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._hadamard import hadamard_block
from ._validate import F32, check_finite, float_matrix, raise_non_finite
from .errors import ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Longest span of channels that a layer rotates.
_MAX_SPAN = 128

# Bit i stands for the pair of bits i and i + 1.
_SIGN_PAIRS = 0b11101


@dataclass(frozen=True)
class InputTransform:
    """Inputs (..., k) are divided by `smooth`, multiplied by `signs`, and rotated `span` channels at a time.

    Weights are multiplied by both and rotated, which leaves the product with the inputs as it was. Vectors
    are float32 (k,) or None, and 0 is the span where nothing is rotated. What comes in has been checked.
    """

    smooth: NDArray[np.float32] | None
    signs: NDArray[np.float32] | None
    span: int

    @cached_property
    def factors(self) -> NDArray[np.float32] | None:
        """What weights are multiplied by: `smooth` and `signs` in one, for a sign never rounds."""
        if self.smooth is None or self.signs is None:
            return self.signs if self.smooth is None else self.smooth
        return self.smooth * self.signs

    @property
    def divides(self) -> bool:
        """Whether inputs are divided by `factors`; by signs alone they are multiplied, which is quicker."""
        return self.smooth is not None

    def of_weights(self, w: NDArray[Any], name: str) -> NDArray[Any]:
        """The weights (n, k) to quantize: `w` itself, now known to be finite, or a new array."""
        if self.factors is None:
            check_finite(w, name)
            return w if self.span == 0 else self._rotated(w.astype(F32), name)
        out = np.empty(w.shape, F32)
        if not _core.scale_columns(float_matrix(w, *w.shape), self.factors, False, out, check_first=False):
            raise_non_finite(w, name)
        if self.smooth is not None:
            check_finite(out, f"{name} * smooth")
        return self._rotated(out, name)

    def of_inputs(self, x: NDArray[Any], name: str) -> NDArray[Any]:
        """The finite rows (m, k) that are quantized for the inputs `x`: `x` itself or a new array."""
        if self.factors is None:
            return x if self.span == 0 else self._rotated(x.astype(F32), name)
        out = np.empty(x.shape, F32)
        _core.scale_columns(float_matrix(x, *x.shape), self.factors, self.divides, out, check_first=False)
        if self.smooth is not None:
            check_finite(out, f"{name} / smooth")
        return self._rotated(out, name)

    def undo_weights(self, w: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        """The inverse of `of_weights` up to rounding, in place."""
        self._rotated(w, name)
        if self.factors is not None:
            _core.scale_columns(float_matrix(w, *w.shape), self.factors, self.divides, w)
        return w

    def _rotated(self, x: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        """`x`, rotated in place."""
        if self.span:
            _core.hadamard(x.reshape(-1), self.span)
            if not _core.all_finite(float_matrix(x, *x.shape)):
                raise ParameterError(
                    f"{name}: expected rows within float32 after rotation, got one that overflows"
                )
        return x


def rotated_span(k: int) -> int:
    """How many of k channels a layer rotates together; 0 where k is odd, which leaves nothing to rotate."""
    span = min(hadamard_block(k), _MAX_SPAN)
    return span if span > 1 else 0


def fixed_signs(k: int) -> NDArray[np.float32]:
    """Signs of k channels, 1 or -1, so that inputs of one sign do not gather in one channel when rotated.

    -1 where channel j has an odd number of pairs of ones among the pairs _SIGN_PAIRS of neighboring bits: the
    Golay-Rudin-Shapiro sequence with some pairs left out. As with that sequence, the Hadamard transform is
    flat: over each aligned span of n = 2**m <= 128 channels no sum is larger than sqrt(n) with even m and
    sqrt(2 * n) with odd m, while the sum of equal signs is n, all of it in one channel. So a mean that the
    channels share is distributed as evenly as it can be. Several choices of pairs are as flat; this one was
    taken because layers of a real model lost nothing by it.
    """
    j = np.arange(k)
    pairs = j & (j >> 1) & _SIGN_PAIRS
    for shift in (4, 2, 1):
        pairs ^= pairs >> shift
    return np.where(pairs & 1, F32.type(-1), F32.type(1))
