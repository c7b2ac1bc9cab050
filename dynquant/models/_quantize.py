"""Model files to quantized ones, tensor by tensor in blocks of rows."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from .._batches import row_batches
from .._compensate import SecondMoments
from .._files import sync_folder, write_json
from .._linear import QuantLinear
from .._progress import reporter
from .._tensor import DynQuantTensor
from .._validate import as_flag, as_path, as_thread_count, check_finite
from ..errors import NonFiniteError, ParameterError, shown
from ._calibration import checked_calibration
from ._file import ModelFile, open_model
from ._gguf import gguf_writer, name_fits, pair_of
from ._measure import WeightErrors, ratio_db
from ._recipe import FORMATS, Recipe, quantization_config
from ._report import ModelReport, TensorReport, layer_of
from ._safetensors import safetensors_writer
from ._stored import FLOATS, GGML_NUMBERS, PLAIN, Stored
from ._writer import Planned, TensorWriter

if TYPE_CHECKING:
    from numpy.typing import NDArray

_EXCLUDE = ("lm_head*", "*embed*")

# Bytes of float32 that are quantized together: with their codes in a core's own cache.
_BLOCK_BYTES = 1 << 20
_COPY_BYTES = 4 << 20
# Packed zero points are eight rows to a word.
_ROWS_OF_WORD = 8

# Calibration rows whose outputs are compared.
_OUTPUT_ROWS = 512

# Models of transformers whose linear weights are (in_features, out_features).
_TRANSPOSED = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")

# The same weights in other frameworks' formats, which would be copied beside the quantized ones.
_OTHER_WEIGHTS = (
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.onnx",
)
_NOT_COPIED = (".git", ".cache", "onnx", "openvino")


def quantize_model(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = _EXCLUDE,
    search: bool = False,
    calibration: Any = None,
    format: str = "compressed-tensors",
    num_threads: int = 1,
    progress: bool | Callable[[int, int], object] | None = None,
    overwrite: bool = False,
) -> ModelReport:
    """Quantize the linear layers of a model file, in memory that does not depend on its size.

    Parameters
    ----------
    source : str or os.PathLike
        What `open_model` opens, with float weights.
    target : str or os.PathLike
        Where the result goes; see the notes.
    bits, group_size, search
        How weights are quantized, as in `quantize_weights`. For "gguf" 8 bits become Q8_0 and 4 bits Q4_0;
        groups are of 32, and there is no search.
    symmetric : bool, optional
        By default True. False: 4-bit codes with zero points, for "gguf" Q4_1 with minimums. They are more
        accurate, and some readers refuse them: transformers 5 with compressed-tensors 0.20 expects zero
        points of another shape than compressed-tensors writes.
    include : str or sequence of str, optional
        Patterns as of `fnmatch`, for names of layers or their weights. By default every matrix called
        ``*.weight`` is a linear layer's, but for those with a row for each word of the vocabulary.
    exclude : str or sequence of str
        Patterns of what is left as it is.
    calibration : str, os.PathLike, or mapping, optional
        By name of the layer, rows that it has had as inputs, (..., in_features), an iterable of such arrays,
        or a Calibrator that has sampled rows; or the path of an archive of such rows that `numpy.savez`
        wrote. Codes are then chosen so that errors cancel on such rows, and the error of the outputs is
        reported. Such a layer is quantized as a whole, in memory of a few times its size. Only for
        "compressed-tensors".
    format : {"compressed-tensors", "gguf"}
    num_threads : int
        As for `dynamic_quantize`.
    progress : bool or callable, optional
        ``progress(done, n)`` is called with bytes of the source. True shows a bar, where tqdm is installed.
    overwrite : bool
        Replace what is at `target`.

    Returns
    -------
    ModelReport
        Of each tensor its bytes and its measured error.

    Raises
    ------
    ParameterError
        If an option has a value that it cannot take; if a pattern or a name of `calibration` matches nothing,
        or nothing is left to quantize; if there is something at `target`; if the source is quantized already,
        or a file is damaged.
    NonFiniteError
        If a weight is NaN or infinite; the error names it.
    DTypeError, ShapeMismatchError, FeatureDimMismatchError, EmptyInputError
        If calibration rows do not fit.
    OSError, ImportError
        If files cannot be read or written, as in `open_model`.

    Notes
    -----
    "compressed-tensors" writes a folder like the source: the same shards, an index, ``config.json`` with its
    ``quantization_config``, and every other file as it was, such as those of the tokenizer; weights in other
    frameworks' formats are left out. If `target` ends in ``.safetensors``, it writes that one file, whose
    metadata has the configuration. "gguf" writes one file, whose keys are those of a source in GGUF; of
    another source it has only the tensors, under their names, and is no model that llama.cpp runs.

    Scales are stored in the dtype of the weights, and are rounded to it before codes are made: what a reader
    computes from the file is exactly what was measured. Blocks of "gguf" are those of ggml's reference, byte
    for byte.

    Everything is written to a folder or file beside `target`, read back and compared, and then renamed. What
    is interrupted, or killed, leaves no `target`, and the source is never touched; a killed run leaves the
    unfinished ``.<name>.<digits>.partial`` beside it. With `overwrite` what was there before is removed after
    the new one is complete; between the two renames there is none.
    """
    job = Job.planned(
        source, target, bits, group_size, symmetric, include, exclude, search, calibration, format, overwrite
    )
    threads, report = as_thread_count(num_threads), reporter(progress, "B")
    start = time.perf_counter()
    tensors = job.run(threads, report)
    return replace(job.report(), tensors=tensors, seconds=time.perf_counter() - start)


@dataclass
class Plan:
    """What becomes of one tensor of the source."""

    stored: Stored
    written: list[Planned]
    reason: str | None  # why it is copied; None if it is quantized
    layer: str = ""  # of a quantized layer that is converted


@dataclass
class Job:
    """A checked call of `quantize_model`, before it has read or written any data."""

    model: ModelFile
    target: str
    recipe: Recipe
    plans: list[Plan]
    calibration: dict[str, Any]
    settings: dict[str, Any]
    overwrite: bool

    @classmethod
    def planned(
        cls,
        source: Any,
        target: Any,
        bits: Any,
        group_size: Any,
        symmetric: Any,
        include: Any,
        exclude: Any,
        search: Any,
        calibration: Any,
        format: Any,
        overwrite: Any,
    ) -> Job:
        recipe = Recipe.checked(format, bits, group_size, symmetric, search)
        if recipe.format == "gguf" and calibration is not None:
            raise ParameterError("calibration: expected None for gguf, whose rounding is ggml's, got some")
        included, excluded = _patterns(include, "include"), _patterns(exclude, "exclude")
        overwrite = as_flag(overwrite, "overwrite")
        model = open_model(source)
        path = check_target(model, as_path(target), recipe.format, overwrite)
        _check_source(model)
        plans = [Plan(model._stored(name), [], None) for name in model.names]
        _choose(plans, model, recipe, included, excluded, exclude is not _EXCLUDE)
        chosen = {layer_of(plan.stored.name): "" for plan in plans if plan.reason is None}
        if not chosen:
            raise ParameterError(f"source: expected linear layers to quantize, got none in {model!r}")
        settings = {
            "bits": recipe.weights.bits,
            "group_size": recipe.weights.group_size,
            "symmetric": recipe.symmetric,
            "search": recipe.search,
            "format": recipe.format,
            "include": included,
            "exclude": excluded,
            "recipe": str(recipe),
            "calibration": calibration is not None,
        }
        rows = checked_calibration(calibration, chosen)
        job = cls(model, path, recipe, plans, rows, settings, overwrite)
        job.check_plans()
        return job

    def check_plans(self) -> None:
        """Raise unless what is to be written fits the format."""
        names: set[str] = set()
        for plan in self.plans:
            if plan.reason is not None:
                _check_copy(plan.stored, self.recipe.format)
            for part in plan.written:
                if part.name in names:
                    raise ParameterError(f"source: expected no tensor called {shown(part.name)}, got one")
                names.add(part.name)
                if self.recipe.format == "gguf" and not name_fits(part.name, part.shape):
                    raise ParameterError(
                        "source: expected names of at most 63 bytes and 1 to 4 axes for gguf, got "
                        f"{shown(part.name)} of shape {part.shape}"
                    )

    @classmethod
    def planned_by_options(cls, source: Any, target: Any, options: dict[str, Any]) -> Job:
        """The same with the options of `quantize_model` by name."""
        defaults = {"bits": 8, "group_size": None, "symmetric": None, "include": None, "exclude": _EXCLUDE}
        more = {"search": False, "calibration": None, "format": FORMATS[0], "overwrite": False}
        return cls.planned(source, target, **{**defaults, **more, **options})

    def report(self) -> ModelReport:
        """What would be written, without errors."""
        tensors = tuple(
            TensorReport(
                plan.stored.name,
                plan.stored.shape,
                plan.stored.dtype,
                plan.stored.n_bytes,
                sum(part.n_bytes for part in plan.written),
                str(self.recipe) if plan.reason is None else None,
                plan.reason,
            )
            for plan in self.plans
        )
        return ModelReport(self.model.path, self.target, self.settings, tensors)

    def run(self, threads: int, progress: Callable[[int, int], object]) -> tuple[TensorReport, ...]:
        with _replacing(self.target, self.overwrite, self._is_one_file) as partial:
            outputs = self._outputs(partial)
            reports = self._write(outputs, threads, progress)
            if not self._is_one_file:
                self._write_index(partial, outputs)
                self._copy_files(partial)
                sync_folder(partial)
        return tuple(reports[plan.stored.name] for plan in self.plans)

    @property
    def _is_one_file(self) -> bool:
        return self.recipe.format == "gguf" or self.target.endswith(".safetensors")

    def _outputs(self, partial: str) -> list[tuple[str, list[Plan]]]:
        """Each file to write, and what goes into it."""
        if self._is_one_file:
            return [(partial, self.plans)]
        if self.model.format == "gguf":
            return [(os.path.join(partial, "model.safetensors"), self.plans)]
        return [
            (
                os.path.join(partial, os.path.basename(path)),
                [plan for plan in self.plans if plan.stored.path == path],
            )
            for path in self.model.files
        ]

    def _writer(self, path: str, plans: Sequence[Plan]) -> TensorWriter:
        written = [part for plan in plans for part in plan.written]
        if self.recipe.format == "gguf":
            return gguf_writer(path, written, *self._gguf_pairs())
        metadata = {} if self.model.format == "gguf" else dict(self.model.metadata)
        if self._is_one_file:
            metadata["quantization_config"] = json.dumps(self._quantization_config())
        return safetensors_writer(path, written, metadata)

    def _gguf_pairs(self) -> tuple[list[bytes], int]:
        """Keys and values of a GGUF file, and its alignment."""
        gguf = self.model._gguf
        pairs = {} if gguf is None else dict(gguf.pairs)
        if "general.architecture" not in pairs:
            architecture = str(self.model.config.get("model_type", "unknown"))
            pairs["general.architecture"] = pair_of("general.architecture", architecture)
        pairs["general.quantization_version"] = pair_of("general.quantization_version", 2)
        kinds = [part.dtype for plan in self.plans if plan.reason is None for part in plan.written]
        kind = max(sorted(set(kinds)), key=kinds.count)
        pairs["general.file_type"] = pair_of("general.file_type", _FILE_TYPES[kind])
        alignment = 32 if gguf is None else gguf.values.get("general.alignment", 32)
        return list(pairs.values()), alignment

    def _quantization_config(self) -> dict[str, Any]:
        matrices = (plan for plan in self.plans if plan.reason is not None and _is_matrix(plan.stored))
        ignored = [layer_of(plan.stored.name) for plan in matrices]
        # A head that shares the weights of the embeddings is a layer without a tensor of its own.
        return self._configuration(list(dict.fromkeys([*ignored, "lm_head"])))

    def _configuration(self, ignored: list[str]) -> dict[str, Any]:
        return quantization_config({self.recipe.scheme: ["Linear"]}, ignored)

    def _write(
        self,
        outputs: list[tuple[str, list[Plan]]],
        threads: int,
        progress: Callable[[int, int], object],
    ) -> dict[str, TensorReport]:
        total = sum(plan.stored.n_bytes for plan in self.plans)
        meter = _Meter(progress, total)
        reports = {}
        base = {tensor.name: tensor for tensor in self.report().tensors}
        for path, plans in outputs:
            writer = self._writer(path, plans)
            try:
                for plan in plans:
                    report = base[plan.stored.name]
                    if plan.reason is None:
                        report = self._quantize(plan, report, writer, threads, meter)
                    else:
                        self._copy(plan, writer, meter)
                    reports[plan.stored.name] = report
            except BaseException:
                writer.close(False)
                raise
            writer.close(True)
            _verify(path, plans, writer)
        return reports

    def _copy(self, plan: Plan, writer: TensorWriter, meter: _Meter) -> None:
        data = self.model._bytes(plan.stored)
        for start in range(0, data.size, _COPY_BYTES):
            part = data[start : start + _COPY_BYTES]
            writer.write(plan.stored.name, part)
            meter.add(part.size)

    def _quantize(
        self, plan: Plan, report: TensorReport, writer: TensorWriter, threads: int, meter: _Meter
    ) -> TensorReport:
        stored, recipe = plan.stored, self.recipe
        layer = layer_of(stored.name)
        n, k = stored.shape
        rows = self.calibration.get(layer)
        moments, kept = (None, None) if rows is None else _moments(rows, layer, k)
        block = n
        if moments is None:
            block = max(1, _BLOCK_BYTES // (4 * k * _ROWS_OF_WORD)) * _ROWS_OF_WORD
        errors = WeightErrors(recipe.may_clip or moments is not None)
        values: list[DynQuantTensor] = []
        for first in range(0, n, block):
            x = self.model.rows(stored.name, first, min(n, first + block))
            _check_rows(x, stored.name, first)
            parts, q = recipe.quantize(x, stored.name, stored.dtype, moments, threads)
            for key, part in parts.items():
                writer.write(_name_of(layer, key, stored.name), part)
            errors.add(x, q, threads)
            if kept is not None:
                values.append(q)
            meter.add(stored.n_bytes * len(x) // n)
        for key, part in recipe.constants(stored.shape).items():
            writer.write(f"{layer}.{key}", part)
        output_db = None
        if kept is not None:
            output_db = output_sqnr(self.model.rows(stored.name), values[0], kept)
        return replace(
            report,
            sqnr_db=errors.sqnr_db,
            max_abs=errors.max_abs,
            zero_share=errors.zero_share,
            clipped_share=errors.clipped_share,
            output_sqnr_db=output_db,
        )

    def _write_index(self, partial: str, outputs: list[tuple[str, list[Plan]]]) -> None:
        if self.model.index is not None:
            shard_of = {
                part.name: os.path.basename(path)
                for path, plans in outputs
                for plan in plans
                for part in plan.written
            }
            total = sum(part.n_bytes for plan in self.plans for part in plan.written)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
            write_json(os.path.join(partial, os.path.basename(self.model.index)), index)
        config = {**self.model.config, "quantization_config": self._quantization_config()}
        write_json(os.path.join(partial, "config.json"), config, 2)

    def _copy_files(self, partial: str) -> None:
        """Every other file of the source's folder."""
        if not os.path.isdir(self.model.path):
            return
        done = {*self.model.files, os.path.join(self.model.path, "config.json")}
        if self.model.index is not None:
            done.add(self.model.index)
        for folder, folders, files in os.walk(self.model.path):
            folders[:] = [name for name in folders if name not in _NOT_COPIED]
            into = os.path.join(partial, os.path.relpath(folder, self.model.path))
            os.makedirs(into, exist_ok=True)
            for name in files:
                path = os.path.join(folder, name)
                other = any(fnmatchcase(name, pattern) for pattern in _OTHER_WEIGHTS)
                if path not in done and not other and os.path.isfile(path):
                    _copy_file(path, os.path.join(into, name))


# ggml's numbers of the types that most weights of a file have.
_FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}


def _name_of(layer: str, key: str, weight: str) -> str:
    return f"{layer}.{key}" if key else weight


class _Meter:
    """Adds up what is done."""

    def __init__(self, progress: Callable[[int, int], object], total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        progress(0, total)

    def add(self, n_bytes: int) -> None:
        self._done += n_bytes
        self._progress(self._done, self._total)


# ---- What is quantized ----


def _patterns(value: Any, name: str) -> list[str]:
    if value is None:
        return []
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise ParameterError(f"{name}: expected patterns of names, got {shown(value)}")
    return list(patterns)


def _check_source(model: ModelFile) -> None:
    if model.layers and model.format != "gguf":
        raise ParameterError(
            f"source: expected float weights, got {model!r} with {len(model.layers)} quantized layers"
        )
    if model.quantization:
        raise ParameterError(
            "source: expected float weights, got a quantization_config with method "
            f"{shown(model.quantization.get('quant_method'))}"
        )
    kind = model.config.get("model_type")
    if kind in _TRANSPOSED:
        raise ParameterError(
            f"source: expected weights (out_features, in_features), got a model of type {kind!r}, whose are "
            "(in_features, out_features)"
        )


def _choose(
    plans: list[Plan],
    model: ModelFile,
    recipe: Recipe,
    include: list[str],
    exclude: list[str],
    excluded_by_caller: bool,
) -> None:
    """Decide what is quantized, and what each tensor becomes."""
    used = set()
    vocabulary = model.config.get("vocab_size")
    for plan in plans:
        stored = plan.stored
        plan.reason = _reason_of(stored, recipe)
        if plan.reason is None:
            hits = {p for p in include if _matches(stored.name, p)}
            outs = {p for p in exclude if _matches(stored.name, p)}
            used |= hits | outs
            if include and not hits:
                plan.reason = "not included"
            elif outs:
                plan.reason = "excluded"
            elif not include and stored.shape[0] == vocabulary:
                plan.reason = "a row for each word"
        if plan.reason is None:
            plan.written = recipe.planned(layer_of(stored.name), stored.name, stored.dtype, stored.shape)
        else:
            plan.written = [Planned(stored.name, stored.dtype, stored.shape, stored.n_bytes)]
    asked = [("include", p) for p in include] + [("exclude", p) for p in exclude if excluded_by_caller]
    for name, pattern in asked:
        if pattern not in used:
            raise ParameterError(f"{name}: expected patterns that match a linear layer, got {shown(pattern)}")


def chosen_layers(model: ModelFile, include: Any = None, exclude: Any = _EXCLUDE) -> list[str]:
    """The weights of a float model that `quantize_model` quantizes."""
    _check_source(model)
    plans = [Plan(model._stored(name), [], None) for name in model.names]
    recipe = Recipe.checked("compressed-tensors", 8, None, None, False)
    patterns = _patterns(include, "include"), _patterns(exclude, "exclude")
    _choose(plans, model, recipe, *patterns, exclude is not _EXCLUDE)
    names = [plan.stored.name for plan in plans if plan.reason is None]
    if not names:
        raise ParameterError(f"source: expected linear layers, got none in {model!r}")
    return names


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(layer_of(name), pattern)


def _is_matrix(stored: Stored) -> bool:
    return stored.name.endswith(".weight") and len(stored.shape) == 2


def _reason_of(stored: Stored, recipe: Recipe) -> str | None:
    """Why a tensor is not a weight to quantize; None if it is one."""
    if stored.dtype not in FLOATS:
        return f"of {stored.dtype}"
    if not _is_matrix(stored):
        return "no matrix called *.weight"
    if 0 in stored.shape:
        return "empty"
    return recipe.refusal(stored.shape[1])


def _check_copy(stored: Stored, format: str) -> None:
    if format == "gguf" and stored.dtype in PLAIN and stored.dtype not in GGML_NUMBERS:
        raise ParameterError(f"source: expected dtypes that GGUF has, got {stored.name!r} of {stored.dtype}")
    if format != "gguf" and stored.dtype not in PLAIN:
        raise ParameterError(
            f"source: expected dtypes that safetensors has, got {stored.name!r} of {stored.dtype}"
        )


# ---- The target ----


def check_target(model: ModelFile, path: str, format: str, overwrite: bool) -> str:
    if format == "gguf" and not path.endswith(".gguf"):
        raise ParameterError(f"target: expected a file .gguf, got {path!r}")
    if path.endswith(".safetensors") and len(model.files) > 1:
        raise ParameterError(f"target: expected a folder for {len(model.files)} shards, got {path!r}")
    real, own = os.path.realpath(path), os.path.realpath(model.path)
    inside = any(_is_inside(a, b) for a, b in ((real, own), (own, real)))
    if inside or any(_is_inside(os.path.realpath(file), real) for file in model.files):
        raise ParameterError(f"target: expected a place apart from the source, got {path!r}")
    if os.path.lexists(path) and not overwrite:
        raise ParameterError(f"target: expected nothing there unless overwrite is True, got {path!r}")
    parent = os.path.dirname(real)
    if not os.path.isdir(parent):
        raise ParameterError(f"target: expected a place in a folder that exists, got {path!r}")
    return path


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


@contextlib.contextmanager
def _replacing(target: str, overwrite: bool, one_file: bool) -> Iterator[str]:
    """A path beside `target` that is renamed to it when the block ends, and removed when it fails."""
    real = os.path.realpath(target)
    parent, name = os.path.split(real)
    partial = os.path.join(parent, f".{name}.{os.urandom(8).hex()}.partial")
    try:
        if not one_file:
            os.mkdir(partial)
        yield partial
        _rename(partial, real, overwrite)
    except BaseException:
        _remove(partial)
        raise
    sync_folder(parent)


def _rename(partial: str, target: str, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(target):
        raise ParameterError(f"target: expected nothing there unless overwrite is True, got {target!r}")
    if os.path.isdir(target) or (os.path.exists(target) and os.path.isdir(partial)):
        before = f"{partial}.before"
        os.rename(target, before)
        try:
            os.rename(partial, target)
        except BaseException:
            os.rename(before, target)
            raise
        _remove(before)
        return
    os.replace(partial, target)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _copy_file(source: str, target: str) -> None:
    with open(source, "rb") as a, open(target, "xb") as b:
        shutil.copyfileobj(a, b, _COPY_BYTES)
        b.flush()
        os.fsync(b.fileno())


def _verify(path: str, plans: Sequence[Plan], writer: TensorWriter) -> None:
    """Open what was written, and compare every byte with what should be there."""
    model = open_model(path)
    expected = {part.name: part for plan in plans for part in plan.written}
    damaged = set(model.names) ^ set(expected)
    for name in set(model.names) & set(expected):
        stored, part = model._stored(name), expected[name]
        data = model._bytes(stored)
        checksum = 0
        for start in range(0, data.size, _COPY_BYTES):
            checksum = zlib.crc32(data[start : start + _COPY_BYTES].data, checksum)
        if (stored.dtype, stored.shape, stored.n_bytes) != part[1:] or checksum != writer.checksums[name]:
            damaged.add(name)
    if damaged:
        raise OSError(f"{path}: read back other bytes than were written, of {sorted(damaged)[0]!r}")


# ---- One tensor ----


def _check_rows(x: NDArray[np.float32], name: str, first: int) -> None:
    try:
        check_finite(x if x.flags.aligned else x.copy(), name)
    except NonFiniteError as error:
        row, column = error.position
        position = row + first, column
        raise NonFiniteError(error.index + first * x.shape[1], error.value, name, position) from error


def _moments(rows: Any, layer: str, k: int) -> tuple[SecondMoments, NDArray[np.float32]]:
    """Moments of calibration rows, and the first of the rows."""
    kept: list[NDArray[np.float32]] = []

    def batches() -> Iterator[NDArray[Any]]:
        for batch in row_batches(rows, f"calibration[{layer!r}]", k):
            wanted = _OUTPUT_ROWS - sum(map(len, kept))
            if wanted > 0:
                kept.append(batch[:wanted].astype(np.float32))
            yield batch

    return SecondMoments(batches(), k, True), np.concatenate(kept)


def output_sqnr(w: NDArray[np.float32], q: DynQuantTensor, rows: NDArray[np.float32]) -> float:
    """SQNR of the layer's output on rows, in decibels."""
    with np.errstate(all="ignore"):
        expected = (rows @ w.T).astype(np.float64)
        errors = QuantLinear(q)(rows) - expected
        power, error = float((expected**2).sum()), float((errors**2).sum())
    return ratio_db(power, error) if math.isfinite(power) else math.nan
