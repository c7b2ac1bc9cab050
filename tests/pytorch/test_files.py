"""`dynquant.torch.save` and `load_into`; and other libraries that read what is saved."""

import copy
import json
import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
nn = torch.nn

from safetensors.torch import load_file, save_file  # noqa: E402

from dynquant import ParameterError  # noqa: E402
from dynquant.torch import QuantLinear, load_into, observe, quantize, save  # noqa: E402

RECIPES = {
    "int8": {},
    "groups": {"group_size": 32},
    "zero points": {"activation_symmetric": False},
    "int4": {"bits": 4},
    "int4 groups": {"bits": 4, "group_size": 32},
    "int4 symmetric": {"bits": 4, "group_size": 32, "symmetric": True},
    "rotated": {"hadamard": True},
    "int4 rotated": {"bits": 4, "group_size": 32, "hadamard": True},
    "smoothed": {"smooth": 0.5},
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = (
            nn.Embedding(40, 64),
            nn.Linear(64, 96),
            nn.Linear(96, 64, bias=False),
        )
        self.norm, self.lm_head = nn.LayerNorm(64), nn.Linear(64, 40, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        return self.lm_head(self.norm(self.down(torch.relu(self.up(self.embed(tokens))))))


def net(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


TOKENS = torch.arange(40).reshape(4, 10)


def quantized(recipe, model=None):
    model = net() if model is None else model
    if "smooth" in recipe:
        with observe(model) as seen:
            model(TOKENS)
        recipe = {**recipe, "calibration": seen}
    return quantize(model, **recipe)


def output(model):
    with torch.no_grad():
        y = model(TOKENS)
    return y if isinstance(y, torch.Tensor) else y.logits


@each_recipe
def test_what_was_saved_computes_the_same(recipe, tmp_path):
    model = quantized(recipe)
    expected = output(model)
    save(model, tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "new")) == ["config.json", "model.safetensors"]
    other = net(1)
    head = other.embed.weight
    assert load_into(other, str(tmp_path / "new")) is other
    assert torch.equal(output(other), expected)
    assert other.lm_head.weight is other.embed.weight is head
    assert not other.up.training
    # On top of another quantized model, and over the files that it came from.
    save(other, tmp_path / "new")
    assert torch.equal(output(load_into(quantize(net(2)), tmp_path / "new")), expected)


def test_models_on_meta_are_filled(tmp_path):
    model = quantized({})
    save(model, tmp_path)
    with torch.device("meta"):
        other = Net().eval()
    load_into(other, tmp_path)
    assert torch.equal(output(other), output(model))
    assert other.lm_head.weight is other.embed.weight


def test_names_and_shapes_of_tensors(tmp_path):
    save(quantized({"bits": 4, "group_size": 32}), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    found = {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
    assert found == {
        "embed.weight": ("torch.float32", (40, 64)),
        "norm.weight": ("torch.float32", (64,)),
        "norm.bias": ("torch.float32", (64,)),
        "up.bias": ("torch.float32", (96,)),
        "up.weight_packed": ("torch.int32", (96, 8)),
        "up.weight_scale": ("torch.float32", (96, 2)),
        "up.weight_shape": ("torch.int64", (2,)),
        "up.weight_zero_point": ("torch.int32", (12, 2)),
        "down.weight_packed": ("torch.int32", (64, 12)),
        "down.weight_scale": ("torch.float32", (64, 3)),
        "down.weight_shape": ("torch.int64", (2,)),
        "down.weight_zero_point": ("torch.int32", (8, 3)),
    }


def test_files_in_parts(tmp_path):
    model = quantized({})
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(output(load_into(net(1), tmp_path)), output(model))
    save(model, tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../a.safetensors"}}')
    with pytest.raises(ParameterError, match="expected names of files"):
        load_into(net(), tmp_path)


def changed(name, **changes):
    def change(tensors, section):
        for key, value in changes.items():
            if value is None:
                del tensors[f"{name}.{key}"]
            else:
                tensors[f"{name}.{key}"] = value

    return change


def groups_are(group):
    return lambda tensors, section: section.update(config_groups={"group_0": group})


def without_layers(tensors, section):
    section.clear()


def other_method(tensors, section):
    section["quant_method"] = "gptq"


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        ({}, changed("up", weight_scale=None), r"expected torch\.float32 as up\.weight, got torch\.int8"),
        ({}, changed("up", bias=None), r"\(96, 64, True\) in up, got \(96, 64, False\)"),
        ({}, changed("up", weight_scale=torch.ones(95, 1)), "a quantized layer in up: weight_scale"),
        ({}, changed("up", weight_scale=torch.full((96, 1), torch.nan)), "layer in up: weight_scale"),
        ({}, changed("up", weight=torch.ones(96, 64)), "layer in up: weight: expected dtype int8"),
        ({}, changed("up", weight_zero_point=torch.ones(96, 1, dtype=torch.int8)), "weight_zero_point"),
        ({}, changed("norm", weight=None), r"missing norm\.weight, unknown none"),
        ({}, changed("norm", weight=torch.ones(63)), r"expected shape \(64,\) as norm\.weight, got \(63,\)"),
        ({}, changed("norm", other=torch.ones(3)), r"missing none, unknown norm\.other"),
        ({}, changed("else", weight_scale=torch.ones(3, 1)), "expected layers of the model, got 'else'"),
        ({}, changed("norm", weight_scale=torch.ones(3, 1)), "expected a linear layer as norm"),
        ({}, other_method, "expected the quantization method compressed-tensors or dynquant, got 'gptq'"),
        ({}, without_layers, "expected a quantization_config"),
        ({}, changed("up", bias=torch.full((96,), torch.nan)), "layer in up: bias: expected finite values"),
        ({}, groups_are(1), "expected groups with targets and activations"),
        ({}, groups_are({"targets": None}), "expected groups with targets and activations"),
        ({}, groups_are({"targets": [1]}), "expected groups with targets and activations"),
        ({}, groups_are({"targets": ["re:("]}), "expected groups with targets and activations"),
        ({}, groups_are({"targets": ["Linear"], "input_activations": "x"}), "expected groups with targets"),
        (
            {"hadamard": True},
            changed("up", signs=None),
            r"expected torch\.int8 \(64,\) as up\.signs, got none",
        ),
        ({"hadamard": True}, changed("up", smooth=torch.ones(64)), r"expected no up\.smooth, got one"),
        ({"hadamard": True}, changed("up", weight=torch.ones(96, 64)), r"expected torch\.int8 \(96, 64\)"),
        ({"hadamard": True}, lambda t, s: s.update(layers={}), "expected layers in the quantization_config"),
        ({"hadamard": True}, lambda t, s: s["layers"]["up"].update(bits=3), "options of a layer in up"),
        ({"hadamard": True}, lambda t, s: s["layers"]["up"].update(x=3), "options of a layer in up"),
        ({"hadamard": True}, lambda t, s: s["layers"].update(up=[3]), r"\(96, 64\) in up, got None"),
        (
            {"hadamard": True},
            lambda t, s: s["layers"]["up"].update(in_features=10**12),
            r"\(96, 64\) in up, got \(96, 1000000000000\)",
        ),
        (
            {"hadamard": True},
            changed("up", weight_scale=torch.full((96, 1), torch.inf)),
            "layer in up: weight_scale: expected finite values",
        ),
        (
            {"hadamard": True},
            changed("up", bias=torch.full((96,), torch.nan)),
            "layer in up: bias: expected finite values",
        ),
        (
            {"hadamard": True},
            changed("up", signs=torch.full((64,), 7, dtype=torch.int8)),
            "layer in up: signs: expected 1 and -1",
        ),
    ],
)
def test_checkpoints_with_missing_or_strange_tensors(recipe, change, message, tmp_path):
    save(quantized(recipe), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = net(1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ParameterError, match=message):
        load_into(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model.up) is nn.Linear


@pytest.mark.parametrize(
    ("name", "text"), [("config.json", "{"), ("config.json", "[]"), ("model.safetensors", "x")]
)
def test_damaged_files(name, text, tmp_path):
    save(quantized({}), tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ParameterError, match=r"^folder: expected"):
        load_into(net(), tmp_path)


def test_wrong_arguments(tmp_path):
    with pytest.raises(ParameterError, match="expected one with quantized layers"):
        save(net(), tmp_path)
    with pytest.raises(ParameterError, match=r"^path"):
        save(quantized({}), 3)
    with pytest.raises(ParameterError, match=r"^model: expected an nn\.Module"):
        load_into("model", tmp_path)
    with pytest.raises(FileNotFoundError):
        load_into(net(), tmp_path / "nothing")
    with pytest.raises(ParameterError, match="expected data in"):
        save(quantized({}).to("meta"), tmp_path / "meta")
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model = quantized({})
    save(model, tmp_path)

    def fail(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save(quantized({"bits": 4}), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert torch.equal(output(load_into(net(1), tmp_path)), output(model))


def test_loading_maps_the_weights(tmp_path):
    save(quantized({}), tmp_path)
    model = load_into(net(1), tmp_path)
    stored = QuantLinear.of_codes(model.up.codes(), None)
    assert stored.weight.data_ptr() == model.up.weight.data_ptr()
    with open("/proc/self/maps") as maps:
        assert "model.safetensors" in maps.read()


def test_states_of_other_things_than_tensors_are_refused(tmp_path):
    """A file of tensors cannot hold them, and `load_into` would miss them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(64, 96)

        def get_extra_state(self):
            return {"step": 3}

        def set_extra_state(self, state):
            pass

    model = quantize(Net())
    with pytest.raises(ParameterError, match=r"expected a state of tensors, got .* in _extra_state"):
        save(model, tmp_path)
    assert os.listdir(tmp_path) == []
