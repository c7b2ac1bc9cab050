"""How tensors are quantized for a file, a block of rows at a time, and the parts they are written in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _core
from .._compensate import SecondMoments
from .._format import DynQuantFormat
from .._layouts import BLOCK, BLOCK_BYTES, Q4_0, Q4_1, Q8_0, unsigned, words, words_of_rows
from .._tensor import DynQuantTensor
from .._validate import U8, as_flag, float_matrix
from .._weights import quantize_matrix, weight_format
from ..errors import ParameterError, shown
from ._stored import GGML_NAMES, PLAIN, round_scales, stored_scales
from ._writer import Planned

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMATS = ("compressed-tensors", "gguf")

# What a block's arrays are called in a file beside its layer's name.
Parts = dict[str, "NDArray[Any]"]


@dataclass(frozen=True)
class Recipe:
    """Options of `quantize_model` for one tensor after another, checked."""

    format: str
    weights: DynQuantFormat
    symmetric: bool
    search: bool

    @classmethod
    def checked(cls, format: Any, bits: Any, group_size: Any, symmetric: Any, search: Any) -> Recipe:
        if format not in FORMATS:
            raise ParameterError(f"format: expected one of {list(FORMATS)}, got {shown(format)}")
        if format == "gguf":
            if group_size not in (None, BLOCK):
                raise ParameterError(
                    f"group_size: expected {BLOCK} or None for gguf, got {shown(group_size)}"
                )
            group_size = BLOCK
        # Zero points are refused by some readers, so it is the caller who asks for them.
        weights, symmetric = weight_format(bits, group_size, True if symmetric is None else symmetric)
        search = as_flag(search, "search")
        if search and format == "gguf":
            raise ParameterError("search: expected False for gguf, whose rounding is ggml's, got True")
        return cls(format, weights, symmetric, search)

    def __str__(self) -> str:
        if self.format == "gguf":
            return GGML_NAMES[self.ggml_type]
        bits, group = self.weights.bits, self.weights.group_size
        parts = [f"int{bits}", "per row" if group is None else f"g{group}"]
        return " ".join(parts + ["zero points"] * (not self.symmetric) + ["searched"] * self.search)

    @property
    def ggml_type(self) -> int:
        """ggml's number of the block type, for format "gguf"."""
        if self.weights.bits == 8:
            return Q8_0
        return Q4_0 if self.symmetric else Q4_1

    @property
    def scheme(self) -> Scheme:
        """What config.json says."""
        return Scheme(self.weights.bits, self.weights.group_size, self.symmetric)

    def refusal(self, k: int) -> str | None:
        """Why rows of k cannot be quantized so; None if they can."""
        group = self.weights.group_size
        if self.format == "gguf":
            return None if k % BLOCK == 0 else f"rows not in blocks of {BLOCK}"
        if group is not None and k > group and k % group:
            return f"rows not in groups of {group}"
        return None

    def planned(self, layer: str, weight: str, dtype: str, shape: tuple[int, ...]) -> list[Planned]:
        """What a weight becomes in the file."""
        n, k = shape
        if self.format == "gguf":
            n_bytes = n * (k // BLOCK) * BLOCK_BYTES[self.ggml_type]
            return [Planned(weight, GGML_NAMES[self.ggml_type], shape, n_bytes)]
        groups = -(-k // self.weights.group_of(k))
        scales = _planned(f"{layer}.weight_scale", _scale_dtype(dtype), (n, groups))
        if self.weights.bits == 8:
            return [_planned(f"{layer}.weight", "I8", shape), scales]
        parts = [
            _planned(f"{layer}.weight_packed", "I32", (n, -(-k // 8))),
            scales,
            _planned(f"{layer}.weight_shape", "I64", (2,)),
        ]
        if not self.symmetric:
            parts.append(_planned(f"{layer}.weight_zero_point", "I32", (-(-n // 8), groups)))
        return parts

    def constants(self, shape: tuple[int, ...]) -> Parts:
        """What is written once for a weight."""
        if self.format == "gguf" or self.weights.bits == 8:
            return {}
        return {"weight_shape": np.array(shape, np.int64)}

    def quantize(
        self, x: NDArray[np.float32], name: str, dtype: str, moments: SecondMoments | None, threads: int
    ) -> tuple[Parts, DynQuantTensor]:
        """A block of finite rows, 8 or a multiple unless it is the last: what is written, and its values."""
        if self.format == "gguf":
            return self._blocks(x, name, threads)
        stored = _scale_dtype(dtype)
        q = quantize_matrix(
            x,
            self.weights,
            self.symmetric,
            self.search,
            moments,
            threads,
            name,
            None if stored == "F32" else lambda scales: round_scales(scales, stored),
        )
        n, k = x.shape
        parts: Parts = {"weight_scale": stored_scales(q.scales, stored)}
        if self.weights.bits == 8:
            return {"weight": q.data, **parts}, q
        parts["weight_packed"] = words_of_rows(unsigned(q), k)
        if q.zero_points is not None:
            parts["weight_zero_point"] = np.ascontiguousarray(words(q.zero_points.reshape(n, -1).T).T)
        return parts, q

    def _blocks(self, x: NDArray[np.float32], name: str, threads: int) -> tuple[Parts, DynQuantTensor]:
        n, k = x.shape
        number = self.ggml_type
        blocks = np.empty((n, k // BLOCK * BLOCK_BYTES[number]), U8)
        if not _core.quantize_blocks(float_matrix(x, n, k), blocks, number, threads):
            raise ParameterError(f"{name}: expected scales within float16 for gguf, got one beyond it")
        return {"": blocks}, tensor_of_blocks(blocks, number)

    @property
    def may_clip(self) -> bool:
        """Whether values may lie beyond those of the codes."""
        return self.search or (self.format == "gguf" and self.ggml_type == Q4_0)


def tensor_of_blocks(blocks: NDArray[np.uint8], number: int) -> DynQuantTensor:
    """Blocks of ggml as a tensor."""
    return DynQuantTensor.from_layout("gguf", {"data": blocks, "type": number})


def _planned(name: str, dtype: str, shape: tuple[int, ...]) -> Planned:
    n_bytes = PLAIN[dtype].itemsize
    for length in shape:
        n_bytes *= length
    return Planned(name, dtype, shape, n_bytes)


def _scale_dtype(dtype: str) -> str:
    """The dtype of the scales of weights of a dtype."""
    return dtype if dtype in ("F16", "BF16") else "F32"


class Scheme(NamedTuple):
    """What config.json says of a weight."""

    bits: int
    group_size: int | None
    symmetric: bool


def quantization_config(targets: Mapping[Scheme, Sequence[str]], ignored: Sequence[str]) -> dict[str, Any]:
    """What config.json says of weights in the format of compressed-tensors, in the fewest keys.

    `targets` are names of layers, or of the class of all of them. Readers refuse keys that they do not know.
    """
    formats = {"int-quantized" if scheme.bits == 8 else "pack-quantized" for scheme in targets}
    groups = {}
    for i, (scheme, names) in enumerate(targets.items()):
        groups[f"group_{i}"] = _config_group(scheme, names)
        if len(formats) > 1:
            format = "int-quantized" if scheme.bits == 8 else "pack-quantized"
            groups[f"group_{i}"]["format"] = format
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignored),
    }


def _config_group(scheme: Scheme, names: Sequence[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
    }
    if scheme.group_size is not None:
        weights["group_size"] = scheme.group_size
    group: dict[str, Any] = {"targets": list(names), "weights": weights}
    if scheme.bits == 8:
        tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        group["input_activations"] = tokens
    return group
