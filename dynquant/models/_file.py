"""Model files: what is in them, and their tensors as they are asked for."""

from __future__ import annotations

import difflib
import glob
import json
import mmap
import os
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._linear import QuantLinear
from .._tensor import DynQuantTensor
from .._validate import U8, as_path
from ..errors import DTypeError, NonFiniteError, ParameterError, ShapeMismatchError, shown
from ._gguf import GgufHeader, read_gguf
from ._modules import QuantizedLayer, check_supported, quantized_layers
from ._safetensors import read_safetensors
from ._stored import PLAIN, Stored, bad_file, block_rows, is_float, plain_array, rows_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_INDEX = "*.safetensors.index.json"

# Longest JSON that is read: an index has 100 bytes for each tensor.
_MOST_BYTES = 64 << 20

# Options of `linear` that weights which are quantized already still leave open.
_OPEN_OPTIONS = {"activation_bits", "activation_symmetric"}


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Open a model file, or a folder of them, for reading.

    Parameters
    ----------
    path : str or os.PathLike
        A ``.safetensors`` or ``.gguf`` file; or a folder with one of these, or with several safetensors files
        and the index that names them.

    Returns
    -------
    ModelFile

    Raises
    ------
    ParameterError
        If a file is damaged or something else: lengths or offsets beyond its end, tensors that overlap,
        unknown dtypes; if a folder has no model or several, or its index names a file that is not in it.
    OSError
        If a file cannot be read.
    ImportError
        If safetensors files are opened without the safetensors library.

    Notes
    -----
    Only headers are read. Data is memory-mapped: a file that another program shortens meanwhile ends this
    program with a bus error, as any mapped file does.

    The safetensors library checks the headers of its files. Those of GGUF files, version 2 and 3, are checked
    here. Block types besides Q8_0, Q4_0 and Q4_1 need the gguf library.
    """
    return ModelFile(as_path(path))


class ModelFile:
    """The tensors of a model, read as they are asked for. Made by `open_model`.

    Attributes
    ----------
    path : str
    format : {"safetensors", "gguf"}
    names : tuple of str
        Of the tensors, in the order of the files.
    files : tuple of str
        Paths of the files that hold tensors.
    metadata : mapping
        Of a safetensors file its ``__metadata__``, of a GGUF file its plain values.
    config : mapping
        The ``config.json`` beside the file, or nothing.
    layers : mapping of str to str
        Name -> layout of each layer whose weight is quantized, as in `DynQuantTensor.from_layout`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.config: Mapping[str, Any] = {}
        self._memory: dict[str, NDArray[np.uint8]] = {}
        self._gguf: GgufHeader | None = None
        self.metadata: Mapping[str, Any] = {}
        self._tensors: dict[str, Stored] = {}
        self.index: str | None = None
        if os.path.isdir(path):
            self._open_folder(path)
        else:
            self._open_file(path)
            self.config = _read_config(os.path.dirname(path))
        self.format = "gguf" if self._gguf is not None else "safetensors"
        self.names = tuple(self._tensors)
        self._quantized = quantized_layers(self._tensors, self.quantization)
        self.layers = types.MappingProxyType({n: layer.layout for n, layer in self._quantized.items()})

    def _open_folder(self, folder: str) -> None:
        self.config = _read_config(folder)
        indices = sorted(glob.glob(os.path.join(glob.escape(folder), _INDEX)))
        if len(indices) > 1:
            raise ParameterError(f"path: expected a folder with one index, got {[*map(_base, indices)]}")
        if indices:
            self.index = indices[0]
            self._open_shards(folder, _read_index(indices[0]))
            return
        found = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
        models = [file for file in found if file.endswith(".safetensors")]
        models = [file for file in models if _base(file) == "model.safetensors"] or models
        models = models or [file for file in found if file.endswith(".gguf")]
        if len(models) != 1:
            raise ParameterError(
                "path: expected a folder with one .safetensors or .gguf file or an index of several, got "
                f"{folder!r} with {shown([*map(_base, models)])}"
            )
        self._open_file(models[0])

    def _open_file(self, path: str) -> None:
        self.files: tuple[str, ...] = (path,)
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            self._gguf = read_gguf(path, self._map(path).data)
            self.metadata = types.MappingProxyType(self._gguf.values)
            tensors = self._gguf.tensors
        else:
            self.metadata, tensors = read_safetensors(path)
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._check_dtypes()

    def _open_shards(self, folder: str, shard_of: Mapping[str, str]) -> None:
        shards = sorted(set(shard_of.values()))
        self.files = tuple(os.path.join(folder, shard) for shard in shards)
        for shard, path in zip(shards, self.files, strict=True):
            if not os.path.isfile(path):
                raise ParameterError(f"path: expected the files that the index names, got none at {path!r}")
            metadata, tensors = read_safetensors(path)
            self.metadata = self.metadata or metadata
            for tensor in tensors:
                if shard_of.get(tensor.name, shard) != shard:
                    continue  # a copy of what the index has elsewhere
                if tensor.name in self._tensors:
                    raise ParameterError(
                        f"path: expected each tensor once, got {tensor.name!r} in several files"
                    )
                self._tensors[tensor.name] = tensor
        missing = sorted(set(shard_of) - set(self._tensors))
        if missing:
            raise ParameterError(
                f"path: expected the tensors that the index names, got none called {shown(missing[0])} "
                f"in {shard_of[missing[0]]!r}"
            )
        self._check_dtypes()

    def _check_dtypes(self) -> None:
        for tensor in self._tensors.values():
            if any(length >= 1 << 62 for length in tensor.shape):
                raise bad_file(tensor.path, "shapes of arrays", f"{tensor.name!r} of shape {tensor.shape}")

    def _map(self, path: str) -> NDArray[np.uint8]:
        memory = self._memory.get(path)
        if memory is None:
            with open(path, "rb") as file:
                try:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except ValueError as error:
                    raise bad_file(path, "a model file", error) from error
            memory = self._memory[path] = np.frombuffer(mapped, U8)
        return memory

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The ``quantization_config`` of the model, or nothing."""
        for config in (self.config, self.config.get("text_config")):
            found = config.get("quantization_config") if isinstance(config, Mapping) else None
            if isinstance(found, Mapping):
                return found
        found = self.config.get("compression_config")
        if found is None and self._gguf is None and "quantization_config" in self.metadata:
            try:
                found = json.loads(self.metadata["quantization_config"])
            except (ValueError, RecursionError) as error:
                raise bad_file(self.path, "JSON as quantization_config", error) from error
        return found if isinstance(found, Mapping) else {}

    def _stored(self, n: Any) -> Stored:
        stored = self._tensors.get(n) if isinstance(n, str) else None
        if stored is None:
            raise ParameterError(f"n: expected the name of a tensor, got {shown(n)}{self._hint(n)}")
        return stored

    def _hint(self, n: Any) -> str:
        names = [*self._tensors, *self.layers]
        near = difflib.get_close_matches(n, names, 3) if isinstance(n, str) and len(n) < 200 else []
        return f"; near that: {', '.join(near)}" if near else ""

    def shape(self, n: str) -> tuple[int, ...]:
        """Shape of a tensor; of block types the numbers that they stand for.

        Raises
        ------
        ParameterError
            If there is no tensor of this name.
        """
        return self._stored(n).shape

    def dtype(self, n: str) -> str:
        """Dtype of a tensor as the file names it, such as "F32", "BF16", "I8" or "Q8_0".

        Raises
        ------
        ParameterError
            If there is no tensor of this name.
        """
        return self._stored(n).dtype

    def n_bytes(self, n: str) -> int:
        """Bytes of a tensor in its file.

        Raises
        ------
        ParameterError
            If there is no tensor of this name.
        """
        return self._stored(n).n_bytes

    def rows(self, n: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows of a tensor along its first axis, as float32.

        Parameters
        ----------
        n : str
            Name of a tensor of F32, F16, BF16 or F64, or of a block type of GGUF.
        start, stop : int
            The first row, and the one after the last; by default all.

        Returns
        -------
        ndarray of float32, (stop - start, ...)
            Of F32 a read-only view of the file, otherwise new.

        Raises
        ------
        ParameterError
            If there is no such tensor, or no such rows.
        DTypeError
            If it holds no floats.
        ShapeMismatchError
            If it has no axes.
        """
        stored = self._stored(n)
        if not stored.shape:
            raise ShapeMismatchError("(rows, ...)", stored.shape, stored.name)
        length = stored.shape[0]
        end = length if stop is None else stop
        if not all(isinstance(i, (int, np.integer)) for i in (start, end)) or not 0 <= start <= end <= length:
            raise ParameterError(
                f"start, stop: expected rows in 0..{length}, got {shown(start)}, {shown(stop)}"
            )
        return rows_of(stored, self._map(stored.path), int(start), int(end))

    def array(self, n: str) -> NDArray[Any]:
        """A tensor of plain numbers as a read-only view of the file; bfloat16 as float32, new.

        Raises
        ------
        ParameterError
            If there is no such tensor.
        DTypeError
            If it is of a block type, or a dtype that NumPy has no numbers for.
        """
        stored = self._stored(n)
        if stored.dtype not in PLAIN:
            raise DTypeError(f"{n}: expected plain numbers, got {stored.dtype}")
        if stored.dtype == "BF16" and stored.shape:
            return self.rows(n)
        return plain_array(stored, self._map(stored.path))

    def tensor(self, n: str) -> DynQuantTensor:
        """The quantized weight of a layer, with the codes and scales that are in the file.

        Parameters
        ----------
        n : str
            Name of a layer in `layers`, or that of its weight before it was quantized.

        Returns
        -------
        DynQuantTensor
            Codes are memory-mapped where their layout is the same.

        Raises
        ------
        ParameterError
            If there is no such layer, or its weight cannot be held by a DynQuantTensor.
        DTypeError, ShapeMismatchError, EmptyInputError, NonFiniteError
            If the tensors of the layer do not fit each other.
        """
        layer = self._layer_name(n)
        if layer not in self._quantized:
            raise ParameterError(f"n: expected a quantized layer, got {shown(n)}{self._hint(n)}")
        check_supported(self.quantization)
        return self._read_layer(layer, self._quantized[layer])

    def _read_layer(self, name: str, layer: QuantizedLayer) -> DynQuantTensor:
        try:
            if layer.layout == "gguf":
                stored = layer.tensors["data"]
                data = block_rows(stored, self._map(stored.path))
                return DynQuantTensor.from_layout("gguf", {"data": data, "type": _number_of(stored)})
            arrays = {key: self.array(stored.name) for key, stored in layer.tensors.items()}
            return DynQuantTensor.from_layout(layer.layout, arrays)
        except ParameterError as error:
            raise ParameterError(f"{name}: {error}") from error

    def _bytes(self, stored: Stored) -> NDArray[np.uint8]:
        return self._map(stored.path)[stored.start : stored.start + stored.n_bytes]

    def _layer_name(self, n: Any) -> str:
        """The layer that `n`, its own name or that of its weight, stands for."""
        if not isinstance(n, str):
            raise ParameterError(f"n: expected the name of a layer, got {shown(n)}")
        if n in self._quantized or f"{n}.weight" in self._tensors:
            return n
        return n.removesuffix(".weight")

    def linear(self, n: str, **recipe: Any) -> QuantLinear:
        """A layer of the model, with its bias where there is one.

        Parameters
        ----------
        n : str
            Name of a layer, or that of its weight as it was before quantizing: ``model.layers.0.mlp.up_proj``
            or ``model.layers.0.mlp.up_proj.weight``.
        **recipe
            Options of `QuantLinear.from_float`. For a weight that is quantized already only those of
            activations: `activation_bits`, `activation_symmetric`.

        Returns
        -------
        QuantLinear
            Of a quantized weight with the codes and scales in the file. Of others, floats (out_features,
            in_features) and block types besides Q8_0 and Q4_0, as `QuantLinear.from_float` makes it.

        Raises
        ------
        ParameterError
            If there is no such layer, its weight is in a layout that cannot be held, or an option cannot be
            had.
        DTypeError, ShapeMismatchError, EmptyInputError, NonFiniteError
            If a tensor is no weight matrix of finite floats, or does not fit the others.
        """
        layer = self._layer_name(n)
        bias = self.rows(f"{layer}.bias") if f"{layer}.bias" in self._tensors else None
        if layer in self._quantized:
            closed = sorted(set(recipe) - _OPEN_OPTIONS)
            if closed:
                raise ParameterError(f"{closed[0]}: expected nothing for weights that are quantized already")
            return QuantLinear(self.tensor(layer), bias, **recipe)
        weight = f"{layer}.weight" if f"{layer}.weight" in self._tensors else n
        stored = self._stored(weight)
        if not is_float(stored.dtype):
            raise DTypeError(f"{weight}: expected floats or a layout that dynquant reads, got {stored.dtype}")
        try:
            return QuantLinear.from_float(self.rows(weight), bias, **recipe)
        except NonFiniteError as error:
            name = f"{layer}.bias" if error.argument == "bias" else weight
            raise NonFiniteError(error.index, error.value, name, error.position) from error

    def __contains__(self, n: object) -> bool:
        return n in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"ModelFile({self.path!r}, {self.format}, {len(self)} tensors)"


def _number_of(stored: Stored) -> int:
    from ._stored import GGML_NUMBERS

    return GGML_NUMBERS[stored.dtype]


def _base(path: str) -> str:
    return os.path.basename(path)


def read_json_file(path: str) -> dict[str, Any]:
    """The object in a JSON file, of bounded length."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError("too long")
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except (ValueError, RecursionError) as error:
        raise bad_file(path, "a JSON object", error) from error
    return found


def _read_config(folder: str) -> Mapping[str, Any]:
    """The configuration of the model in a folder; of GPTQ's own file what quantizes, where that has it."""
    config: dict[str, Any] = {}
    path = os.path.join(folder, "config.json")
    if os.path.isfile(path):
        config = read_json_file(path)
    path = os.path.join(folder, "quantize_config.json")
    if "quantization_config" not in config and os.path.isfile(path):
        config["quantization_config"] = {"quant_method": "gptq", **read_json_file(path)}
    return config


def _read_index(path: str) -> dict[str, str]:
    """{tensor: shard}, where each shard is a file beside the index."""
    shard_of = read_json_file(path).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise bad_file(path, "an index of safetensors files", "no weight_map")
    for shard in shard_of.values():
        if (
            not isinstance(shard, str)
            or shard in ("", ".", "..")
            or "\0" in shard
            or any(separator in shard for separator in "/\\")
        ):
            raise bad_file(path, "names of files beside the index", shown(shard))
    return shard_of
