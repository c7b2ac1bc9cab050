"""Quantized layers from one layout to another: the codes and scales stay the same."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .._tensor import DynQuantTensor
from .._validate import F32, as_flag, as_path
from ..errors import ParameterError
from ._file import open_model
from ._modules import check_supported
from ._quantize import Job, Plan, check_target
from ._recipe import Recipe, Scheme, quantization_config
from ._report import TensorReport
from ._stored import GGML_NAMES
from ._writer import Planned

if TYPE_CHECKING:
    from numpy.typing import NDArray


def convert_model(
    source: Any, target: Any, *, overwrite: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Write a quantized model in the format that the name of `target` asks for.

    Returns what was written, or would be: format, layers, copied tensors and bytes.
    """
    path = as_path(target)
    format = "gguf" if path.endswith(".gguf") else "compressed-tensors"
    job = _planned(source, path, format, as_flag(overwrite, "overwrite"))
    if not dry_run:
        job.run(1, lambda done, n: None)
    return {
        "target": path,
        "format": format,
        "layers": sum(plan.reason is None for plan in job.plans),
        "copied": sum(plan.reason is not None for plan in job.plans),
        "bytes": sum(part.n_bytes for plan in job.plans for part in plan.written),
    }


@dataclass
class Conversion(Job):
    """A job whose layers are quantized already."""

    schemes: dict[Scheme, list[str]] = field(default_factory=dict)

    def _quantize(
        self, plan: Plan, report: TensorReport, writer: Any, threads: int, meter: Any
    ) -> TensorReport:
        for name, array in _arrays(self.model.tensor(plan.layer), plan.layer, self.recipe.format).items():
            writer.write(name, array)
        meter.add(plan.stored.n_bytes)
        return replace(report, recipe=self.recipe.format)

    def _configuration(self, ignored: list[str]) -> dict[str, Any]:
        targets = {scheme: ["Linear"] for scheme in self.schemes} if len(self.schemes) == 1 else self.schemes
        return quantization_config(targets, ignored)


def _planned(source: Any, path: str, format: str, overwrite: bool) -> Conversion:
    model = open_model(source)
    check_target(model, path, format, overwrite)
    check_supported(model.quantization)
    if not model.layers:
        raise ParameterError(f"source: expected quantized layers, got none in {model!r}")
    absorbed = {stored.name for layer in model._quantized.values() for stored in layer.tensors.values()}
    plans: list[Plan] = []
    schemes: dict[Scheme, list[str]] = {}
    for layer, own in model._quantized.items():
        tensor = model.tensor(layer)
        symmetric = tensor.zero_points is None or bool((tensor.zero_points == 8).all())
        schemes.setdefault(Scheme(tensor.format.bits, tensor.format.group_size, symmetric), []).append(layer)
        written = [_planned_array(name, a) for name, a in _arrays(tensor, layer, format).items()]
        if format == "gguf":
            written = [Planned(f"{layer}.weight", _kind(tensor), tensor.shape, written[0].n_bytes)]
        plans.append(Plan(next(iter(own.tensors.values())), written, None, layer))
    for name in model.names:
        if name not in absorbed:
            stored = model._stored(name)
            plan = Plan(stored, [Planned(name, stored.dtype, stored.shape, stored.n_bytes)], "kept")
            plans.append(plan)
    place = {name: i for i, name in enumerate(model.names)}
    plans.sort(key=lambda plan: place[plan.stored.name])
    recipe = Recipe.checked(format, 8, None, None, False)
    job = Conversion(model, path, recipe, plans, {}, {"format": format}, overwrite, schemes)
    job.check_plans()
    return job


def _kind(tensor: DynQuantTensor) -> str:
    return GGML_NAMES[int(tensor.to_layout("gguf")["type"])]


_DTYPES = {"i1": "I8", "i4": "I32", "i8": "I64", "f4": "F32", "f2": "F16", "u1": "U8"}


def _planned_array(name: str, array: NDArray[Any]) -> Planned:
    return Planned(name, _DTYPES[array.dtype.str[1:]], array.shape, array.nbytes)


def _arrays(tensor: DynQuantTensor, layer: str, format: str) -> dict[str, NDArray[Any]]:
    """What is written for a layer: scales of float16 where they are, else of float32."""
    try:
        if format == "gguf":
            return {f"{layer}.weight": tensor.to_layout("gguf")["data"]}
        with np.errstate(over="ignore", under="ignore"):
            halves = bool((tensor.scales.astype(np.float16).astype(F32) == tensor.scales).all())
        arrays = tensor.to_layout(format, scale_dtype=np.float16 if halves else None)
    except ParameterError as error:
        raise ParameterError(f"{layer}: {error}") from error
    return {f"{layer}.{key}": np.ascontiguousarray(array) for key, array in arrays.items()}
