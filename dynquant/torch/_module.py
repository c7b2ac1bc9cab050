"""The module that stands for a linear layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .._linear import as_activations, moments_of, transform_of
from .._smooth import as_factors
from .._tensor import DynQuantTensor
from .._transform import InputTransform
from .._validate import F32, as_count, as_finite_vector, as_flag, as_matrix, as_thread_count, check_finite
from .._weights import quantize_matrix, weight_format
from ..errors import DTypeError, ParameterError
from ._ops import TENSORS, Packed, check_graph_input, check_input, codes_of, is_watched, packed_of, version_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MATRIX = "(out_features, in_features)"


class QuantLinear(nn.Module):
    """A linear layer with int8 or 4-bit weights, in place of an `nn.Linear`, on the CPU.

    Made by `quantize` or `from_float`. The constructor makes one whose weights are all zero, for
    ``load_state_dict``.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
        Whether something is added to the outputs.
    bits : {8, 4}
    group_size : int, optional
        How many in_features share a scale of the weights; by default all.
    symmetric : bool, optional
        Whether 4-bit codes are around zero; by default they have zero points.
    hadamard : bool
        Whether inputs are rotated.
    smooth : bool
        Whether inputs are divided by factors.
    activation_symmetric : bool
        Whether the codes of inputs are around zero; otherwise each row has a zero point.
    num_threads : int, optional
        The most threads that a call uses; by default ``torch.get_num_threads()``, asked for in each call.

    Attributes
    ----------
    weight : Tensor of int8
        Codes (out_features, in_features); or, with 4 bits, (out_features, ceil(in_features / 2)): two to a
        byte, the even one in the low nibble.
    weight_scale : Tensor of float32, (out_features, groups)
    weight_zero_point : Tensor of uint8, (out_features, groups), or None
        With 4 bits, unless they are symmetric.
    bias : Tensor of float32, (out_features,), or None
    smooth : Tensor of float32, (in_features,), or None
    signs : Tensor of int8, (in_features,), or None
        What inputs are multiplied by before they are rotated.

    Raises
    ------
    ParameterError
        If an option has a value that it cannot take.

    Notes
    -----
    All tensors are buffers, none a parameter. Conversions such as ``.half()`` and ``.to(torch.bfloat16)``
    leave them as they are, because scales have to be float32; one to another device than the CPU is an error.
    The kernels' own form of the weights is made when first needed, takes as much memory again, and is part of
    no state, copy or file.

    Inputs are float32, which are read where they lie, or float16, bfloat16 or float64, with any leading axes
    and strides. Each row is quantized by itself: its output does not depend on the batch, on padding or on
    the number of threads. The output has the dtype of the input.

    The gradient for the inputs is that of the float layer whose weights the codes stand for. Quantized
    weights have none: train adapters, not them.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None
    smooth: Tensor | None
    signs: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool | None = None,
        hadamard: bool = False,
        smooth: bool = False,
        activation_symmetric: bool = True,
        num_threads: int | None = None,
    ) -> None:
        fmt, symmetric = weight_format(bits, group_size, symmetric)
        k, n = as_count(in_features, "in_features"), as_count(out_features, "out_features")
        _, activation_symmetric = as_activations(8, activation_symmetric, fmt.bits)
        transform = transform_of(k, None, as_flag(hadamard, "hadamard"))
        scale = np.zeros(fmt.scales_shape((n, k)), F32)
        codes = DynQuantTensor(
            np.zeros(fmt.data_shape((n, k)), fmt.data_dtype),
            scale,
            None if symmetric else np.zeros(scale.shape, np.uint8),
            (n, k),
            fmt,
        )
        self._set(
            codes,
            np.zeros(n, F32) if as_flag(bias, "bias") else None,
            np.ones(k, F32) if as_flag(smooth, "smooth") else None,
            transform.signs,
            activation_symmetric,
            num_threads,
        )

    def _set(
        self,
        weight: DynQuantTensor,
        bias: NDArray[np.float32] | None,
        smooth: NDArray[np.float32] | None,
        signs: NDArray[np.float32] | None,
        activation_symmetric: bool,
        num_threads: int | None,
    ) -> None:
        """Everything that a module consists of, from checked arguments, whose memory is kept."""
        super().__init__()
        n, self.in_features = weight.shape
        self.out_features = n
        self.bits, self.group_size = weight.format.bits, weight.format.group_size
        self.activation_symmetric = activation_symmetric
        self.num_threads = None if num_threads is None else as_thread_count(num_threads)
        # Output SQNR on calibration rows, in dB, where there were any.
        self.sqnr_db: float | None = None
        zero_points = None if weight.zero_points is None else weight.zero_points.reshape(n, -1)
        arrays = (
            weight.data.view(np.int8),
            weight.scales.reshape(n, -1),
            zero_points,
            bias,
            smooth,
            None if signs is None else signs.astype(np.int8),
        )
        # Tensors of inference mode would not tell when they are changed.
        with torch.inference_mode(False):
            for name, array in zip(TENSORS, arrays, strict=True):
                self.register_buffer(name, None if array is None else torch.from_numpy(array))
        self._packed: Packed | None = None
        self._made_of: tuple[tuple[str, Tensor, int], ...] = ()

    @classmethod
    def from_float(
        cls,
        linear: nn.Module,
        *,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool | None = None,
        hadamard: bool = False,
        activation_symmetric: bool = True,
        smooth: Any = None,
        calibration: Any = None,
        num_threads: int | None = None,
        name: str = "linear",
    ) -> QuantLinear:
        """Quantize one layer.

        Parameters
        ----------
        linear : nn.Linear, or Conv1D of transformers
            On the CPU. It stays as it is.
        bits, group_size, symmetric, hadamard, activation_symmetric
            As in `dynquant.QuantLinear.from_float`.
        smooth : array_like of floats, (in_features,), optional
            SmoothQuant factors above zero.
        calibration : array_like of floats, (..., in_features), or an iterable of such arrays, optional
            Inputs that the layer has had: codes are chosen so that their errors cancel in the output.
        num_threads : int, optional
            The most threads that a call uses; by default ``torch.get_num_threads()``.
        name : str
            What errors call the layer.

        Returns
        -------
        QuantLinear

        Raises
        ------
        NonFiniteError
            If a weight is NaN or infinite.
        DynQuantError
            If another argument is not as described.
        """
        fmt, symmetric = weight_format(bits, group_size, symmetric)
        _, activation_symmetric = as_activations(8, activation_symmetric, fmt.bits)
        w, bias, transform = prepared(linear, name, smooth, as_flag(hadamard, "hadamard"))
        k = w.shape[1]
        moments = None if calibration is None else moments_of(calibration, k, True, transform)
        threads = torch.get_num_threads() if num_threads is None else as_thread_count(num_threads)
        codes = quantize_matrix(w, fmt, symmetric, False, moments, threads, f"{name}.weight")
        module = cls.__new__(cls)
        module._set(codes, bias, transform.smooth, transform.signs, activation_symmetric, num_threads)
        module.train(linear.training)
        return module

    @classmethod
    def of_codes(
        cls, codes: DynQuantTensor, bias: Tensor | None, activation_symmetric: bool = True
    ) -> QuantLinear:
        """A module of weights that are quantized already, whose memory is kept."""
        module = cls.__new__(cls)
        offset = None if bias is None else as_finite_vector(_array_of(bias), "bias", codes.shape[0])
        module._set(codes, offset, None, None, activation_symmetric, None)
        return module

    def codes(self) -> DynQuantTensor:
        """The weights, smoothed and rotated where the layer is, as `quantize_weights` gives them."""
        fmt = weight_format(self.bits, self.group_size, None)[0]
        return codes_of(self.weight, self.weight_scale, self.weight_zero_point, self.in_features, fmt)

    def check_values(self) -> None:
        """Raise unless the tensors hold what those of a layer can hold."""
        check_finite(self.codes().scales, "weight_scale")
        if self.bias is not None:
            as_finite_vector(_array_of(self.bias), "bias", self.out_features)
        if self.smooth is not None:
            as_factors(_array_of(self.smooth), "smooth", self.in_features)
        if self.signs is not None and not bool((self.signs.abs() == 1).all()):
            raise ParameterError("signs: expected 1 and -1, got another number")

    def options(self) -> dict[str, Any]:
        """What the constructor makes a module of the same kind from."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.weight_zero_point is None,
            "hadamard": self.hadamard,
            "smooth": self.smooth is not None,
            "activation_symmetric": self.activation_symmetric,
        }

    def tied(self, linear: nn.Module, name: str) -> QuantLinear:
        """A module for `linear`, whose weight this one was made of: the same tensors, but its own bias."""
        _, bias = float_arrays(linear, name)
        module = copy.copy(self)
        module._buffers = {**self._buffers, "bias": None if bias is None else torch.from_numpy(bias)}
        module.train(linear.training)
        return module

    @property
    def hadamard(self) -> bool:
        """Whether inputs are rotated."""
        return self.signs is not None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Parameters
        ----------
        x : Tensor of floats, (..., in_features)
            On the CPU.

        Returns
        -------
        Tensor, (..., out_features)
            Of the dtype of `x`.

        Raises
        ------
        ShapeMismatchError, DTypeError, NonFiniteError, ParameterError
            If `x` has another shape, does not hold floats, holds NaN or infinity, or is on another device.
        """
        if (
            type(x) is not Tensor
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or (x.requires_grad and torch.is_grad_enabled())
            or is_watched()
        ):
            return self._traced(x)
        if not x.is_cpu or x.layout is not torch.strided or x.is_nested:
            if x.is_meta and self.weight.is_meta:
                return self._traced(x)
            check_input(x)
        packed, buffers = self._packed, self._buffers
        for name, tensor, version in self._made_of:
            if buffers[name] is not tensor or tensor._version != version:
                packed = None  # made of what is no longer there
        return (packed or self._pack())(x, self.num_threads)

    def _pack(self) -> Packed:
        tensors = [self._buffers[name] for name in TENSORS]
        packed = packed_of(tensors, self.bits, self.in_features, self.group_size, self.activation_symmetric)
        # Those of inference mode cannot be asked; they are packed again only when others take their place.
        self._made_of = tuple(
            (name, tensor, version_of(tensor))
            for name, tensor in zip(TENSORS, tensors, strict=True)
            if tensor is not None and not tensor.is_inference()
        )
        self._packed = packed
        return packed

    def _traced(self, x: Tensor) -> Tensor:
        """The same by the operator, which graphs and autograd see."""
        if not isinstance(x, (Tensor, torch.fx.Proxy)):
            raise DTypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if isinstance(x, Tensor):
            check_graph_input(x)
        tensors = (self.weight, self.weight_scale, self.weight_zero_point, self.bias, self.smooth, self.signs)
        options = (self.bits, self.in_features, self.group_size, self.activation_symmetric, self.num_threads)
        return torch.ops.dynquant.linear(x, *tensors, *options)

    def weight_dequantized(self) -> Tensor:
        """The float32 weights (out_features, in_features) that the layer stands for, as they were given."""
        return torch.from_numpy(self._pack().linear.weight_dequantized())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move the tensors, but leave their dtypes: the way of every conversion of a module."""
        kept = {name: self._buffers[name] for name in TENSORS}
        moved = {name: None if tensor is None else _moved(tensor, fn) for name, tensor in kept.items()}
        self._buffers.update(dict.fromkeys(TENSORS))
        try:
            super()._apply(fn, recurse)
            kept = moved
        finally:
            self._buffers.update(kept)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuse tensors of other dtypes: float weights, for one, would be cut to integers without a word."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        wrong = [
            f"{prefix}{name}: expected {own.dtype}, got {given.dtype}"
            for name, own, given in ((t, self._buffers[t], state_dict.get(prefix + t)) for t in TENSORS)
            if own is not None and isinstance(given, Tensor) and not _can_load(own, given, assign)
        ]
        error_msgs.extend(wrong)
        if not wrong:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """A tensor in place of None is not among those that `forward` looks at."""
        super().__setattr__(name, value)
        if name in TENSORS:
            super().__setattr__("_packed", None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_made_of": ()}

    def extra_repr(self) -> str:
        """What stands between the brackets of the module's repr."""
        group = "" if self.group_size is None else f", group_size={self.group_size}"
        options = "".join(
            f", {name}={value}"
            for name, value, usual in (
                ("smooth", self.smooth is not None, False),
                ("hadamard", self.hadamard, False),
                ("activation_symmetric", self.activation_symmetric, True),
            )
            if value != usual
        )
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}{group}{options}"
        )


def _can_load(own: Tensor, given: Tensor, assign: bool) -> bool:
    """Whether `given` can take the place of `own`: floats are converted, but only where they are copied."""
    if own.is_floating_point() and not assign:
        return given.is_floating_point()
    return given.dtype == own.dtype


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    try:
        moved = fn(tensor)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ParameterError(f"device: expected a QuantLinear to stay on the CPU ({error})") from error
    if moved.device.type not in ("cpu", "meta"):
        raise ParameterError(f"device: expected a QuantLinear to stay on the CPU, got {moved.device}")
    if moved.dtype == tensor.dtype:
        return moved
    return tensor if moved.device == tensor.device else torch.empty_like(tensor, device=moved.device)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is the Conv1D of transformers: a linear layer whose weight is (in, out)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def float_arrays(linear: nn.Module, name: str) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Weight (out, in), where it lies if that can be, and a copy of the bias, which is finite."""
    if not (type(linear) is nn.Linear or is_conv1d(linear)):
        raise ParameterError(f"{name}: expected an nn.Linear, got {type(linear).__name__}")
    weight, bias = linear.weight, linear.bias
    for key, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device.type != "cpu":
            raise ParameterError(f"{name}.{key}: expected a tensor on the CPU, got one on {tensor.device}")
    w = as_matrix(_array_of(weight.t() if is_conv1d(linear) else weight), f"{name}.weight", _MATRIX)
    if bias is None:
        return w, None
    return w, as_finite_vector(_array_of(bias), f"{name}.bias", len(w)).copy()


def prepared(
    linear: nn.Module, name: str, smooth: Any, hadamard: bool
) -> tuple[NDArray[Any], NDArray[np.float32] | None, InputTransform]:
    """The finite weights to quantize, the bias, and what the layer does to its inputs."""
    w, bias = float_arrays(linear, name)
    factors = None if smooth is None else as_factors(smooth, "smooth", w.shape[1])
    transform = transform_of(w.shape[1], factors, hadamard)
    return transform.of_weights(w, f"{name}.weight"), bias, transform


def _array_of(tensor: Tensor) -> NDArray[Any]:
    """NumPy's view of a tensor, or of a float32 copy where NumPy has no such dtype."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
