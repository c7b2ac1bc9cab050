"""Products of tensors with quantized weights: the kernels on the tensors' own memory, and the operator.

Eager calls go straight to the kernels, because PyTorch's dispatcher takes longer than a short row does. Where
PyTorch records a graph (torch.compile, torch.export, torch.jit.trace, autograd) the operator
``dynquant::linear`` stands in it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _linear
from .._format import DynQuantFormat
from .._packed import raise_bad_row, rows_of_part
from .._tensor import DynQuantTensor
from ..errors import DTypeError, ParameterError, ShapeMismatchError

_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._functorch.maybe_current_level

# Numbers of the input formats in _core.pxd.
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_KIND_F32 = 0

# What a layer consists of besides its options, in the order of the operator's arguments.
TENSORS = ("weight", "weight_scale", "weight_zero_point", "bias", "smooth", "signs")


class Packed:
    """Weights in the form of the kernels, made of the tensors of a layer.

    Attributes
    ----------
    linear : dynquant.QuantLinear
    """

    __slots__ = ("__weakref__", "_core", "_k", "_max_rows", "_n", "linear")

    def __init__(self, linear: _linear.QuantLinear) -> None:
        self.linear = linear
        self._core = _linear.packed_form(linear)
        self._n, self._k = linear.out_features, linear.in_features
        self._max_rows = rows_of_part(self._core)

    def __call__(self, x: Tensor, num_threads: int | None) -> Tensor:
        """The layer's outputs (..., out_features) for strided floats `x` on the CPU, in their dtype."""
        dtype, shape = x.dtype, x.shape
        kind = _KINDS.get(dtype)
        if kind is None:
            return self._converted(x, num_threads)
        k = self._k
        if not shape or shape[-1] != k:
            raise ShapeMismatchError(f"(..., {k})", tuple(shape), "x")
        if x.is_neg():  # a view that changes signs
            x = x.resolve_neg()
        if not x.is_contiguous():
            x = x.contiguous()
        # Naming the dtype costs as much as the rest of an allocation.
        rows = (*shape[:-1], self._n)
        y = x.new_empty(rows) if kind == _KIND_F32 else x.new_empty(rows, dtype=torch.float32)
        threads = torch.get_num_threads() if num_threads is None else num_threads
        m = x.numel() // k
        if not self._core.apply_at(x.data_ptr(), kind, m, y.data_ptr(), self._max_rows, threads):
            raise_bad_row(x.detach().float().numpy(), self._core, "x")
        return y if kind == _KIND_F32 else y.to(dtype)

    def _converted(self, x: Tensor, num_threads: int | None) -> Tensor:
        if x.dtype != torch.float64:
            raise DTypeError(f"x: expected a tensor of floats, got dtype {x.dtype}")
        return self(x.float(), num_threads).double()


def pack(
    tensors: list[Tensor | None], bits: int, in_features: int, group_size: int | None, symmetric: bool
) -> Packed:
    """The packed form of `tensors`, as TENSORS names them; `symmetric` is about activations.

    Raises
    ------
    DynQuantError
        If the tensors do not fit each other, are not finite, or have a code that is none.
    """
    weight, scale, zero_point, *vectors = tensors
    assert weight is not None and scale is not None
    for name, tensor in zip(TENSORS, tensors, strict=True):
        if tensor is not None and tensor.is_meta:
            raise ParameterError(f"{name}: expected a tensor on the CPU, got one on meta, which has no data")
    fmt = DynQuantFormat(bits, "per_row" if group_size is None else "per_group", group_size, bits == 4)
    codes = codes_of(weight, scale, zero_point, in_features, fmt)
    bias, smooth, signs = (None if tensor is None else tensor.detach().numpy() for tensor in vectors)
    layer = _linear.QuantLinear(
        codes, bias, smooth, signs is not None, signs=signs, activation_symmetric=symmetric
    )
    return Packed(layer)


def codes_of(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, in_features: int, fmt: DynQuantFormat
) -> DynQuantTensor:
    """The tensor that shares the memory of a layer's tensors."""
    shape = len(weight), in_features
    scales = scale.detach().numpy().reshape(fmt.scales_shape(shape))
    zero_points = None if zero_point is None else zero_point.numpy().reshape(scales.shape)
    return DynQuantTensor(weight.numpy().view(fmt.data_dtype), scales, zero_points, shape, fmt)


def version_of(tensor: Tensor) -> int:
    """How often `tensor` was changed in place; 0 for those of inference mode, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


class _Entry:
    """A packed form, and what it was made of: the same tensors, unchanged, with the same options."""

    def __init__(self, tensors: list[Tensor | None], options: tuple[Any, ...], packed: Packed) -> None:
        self._made_of = [None if t is None else (weakref.ref(t), version_of(t)) for t in tensors]
        self._options, self.packed = options, packed

    def fits(self, tensors: list[Tensor | None], options: tuple[Any, ...]) -> bool:
        return options == self._options and all(
            t is None if kept is None else (t is kept[0]() and t is not None and version_of(t) == kept[1])
            for t, kept in zip(tensors, self._made_of, strict=True)
        )


# By the identity of the weight; entries go with it. Modules with tied weights share what is here, and the
# operator, which gets tensors alone, finds it.
_entries: dict[int, _Entry] = {}


def packed_of(
    tensors: list[Tensor | None], bits: int, in_features: int, group_size: int | None, symmetric: bool
) -> Packed:
    """`pack`, made once as long as the tensors stay what they are."""
    options = bits, in_features, group_size, symmetric
    weight = tensors[0]
    assert weight is not None
    key = id(weight)
    entry = _entries.get(key)
    if entry is None:
        weakref.finalize(weight, _entries.pop, key, None).atexit = False
    elif entry.fits(tensors, options):
        return entry.packed
    packed = pack(tensors, *options)
    _entries[key] = _Entry(tensors, options, packed)
    return packed


_SCHEMA = (
    "(Tensor {}, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias, "
    "Tensor? smooth, Tensor? signs, int bits, int in_features, int? group_size, bool activation_symmetric, "
    "int? num_threads) -> Tensor"
)

_library = torch.library.Library("dynquant", "DEF")
_library.define("linear" + _SCHEMA.format("x"), tags=(torch.Tag.pt2_compliant_tag,))
_library.define("linear_backward" + _SCHEMA.format("grad"), tags=(torch.Tag.pt2_compliant_tag,))


def _linear_cpu(x: Tensor, *args: Any) -> Tensor:
    *tensors, bits, in_features, group_size, symmetric, num_threads = args
    check_input(x)
    return packed_of(tensors, bits, in_features, group_size, symmetric)(x, num_threads)


def _linear_fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    in_features = args[-4]
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ShapeMismatchError(f"(..., {in_features})", tuple(x.shape), "x")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward_cpu(grad: Tensor, *args: Any) -> Tensor:
    *tensors, bits, in_features, group_size, symmetric, _ = args
    linear = packed_of(tensors, bits, in_features, group_size, symmetric).linear
    return (grad.float() @ torch.from_numpy(linear.weight_dequantized())).to(grad.dtype)


def _backward_fake(grad: Tensor, *args: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], args[-4]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.bits, ctx.in_features, ctx.group_size, ctx.symmetric, ctx.threads = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """As if the layer were the float one with the weights that the codes stand for."""
    options = ctx.bits, ctx.in_features, ctx.group_size, ctx.symmetric, ctx.threads
    grad_x = torch.ops.dynquant.linear_backward(grad, *ctx.saved_tensors, *options)
    return grad_x, *(None,) * (len(TENSORS) + len(options))


def _second_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """For gradients of gradients: `linear_backward` is a product with the same weights."""
    options = ctx.bits, ctx.in_features, ctx.group_size, ctx.symmetric
    linear = packed_of(list(ctx.saved_tensors), *options).linear
    weight = torch.from_numpy(linear.weight_dequantized())
    return (grad.float() @ weight.T).to(grad.dtype), *(None,) * (len(TENSORS) + len(options) + 1)


_library.impl("linear", _linear_cpu, "CPU")
_library.impl("linear_backward", _backward_cpu, "CPU")
torch.library.register_fake("dynquant::linear", _linear_fake, lib=_library)
torch.library.register_fake("dynquant::linear_backward", _backward_fake, lib=_library)
torch.library.register_autograd("dynquant::linear", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(
    "dynquant::linear_backward", _second_backward, setup_context=_setup_context, lib=_library
)


def is_watched() -> bool:
    """Whether something looks at PyTorch's operators: a mode that traces or counts them, forward-mode
    gradients, or a transform of ``torch.func``. A call that goes past them would be lost to it.
    """
    return _modes() > 0 or forward_ad._current_level >= 0 or _transforms() is not None


def check_graph_input(x: Tensor) -> None:
    """Raise for what the operator cannot take, and would refuse in its own words or not at all."""
    if torch.compiler.is_compiling():
        return
    if x.is_nested:
        check_input(x)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise ParameterError(
            "x: expected a tensor without a tangent, got one of forward-mode differentiation; use backward"
        )


def check_input(x: Any) -> None:
    """Raise unless `x` is a strided tensor on the CPU."""
    if not isinstance(x, Tensor):
        raise DTypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested one" if x.is_nested else f"layout {x.layout}"
        raise DTypeError(f"x: expected a strided tensor, got {kind}")
    if x.device.type != "cpu":
        raise ParameterError(f"x: expected a tensor on the CPU, got one on {x.device}")
