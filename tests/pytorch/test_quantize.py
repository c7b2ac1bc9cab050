"""`dynquant.torch.quantize`: what it takes, what it leaves, and what it refuses."""

import copy
import re

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn
prune = pytest.importorskip("torch.nn.utils.prune")

import dynquant  # noqa: E402
from dynquant import NonFiniteError, ParameterError  # noqa: E402
from dynquant.torch import QuantLinear, quantize, summary  # noqa: E402

RECIPES = {
    "int8": {},
    "groups": {"group_size": 32},
    "rotated": {"hadamard": True},
    "zero points": {"activation_symmetric": False},
    "int4": {"bits": 4, "group_size": 32},
    "int4 rotated": {"bits": 4, "group_size": 32, "hadamard": True},
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def block(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 48, bias=False))


def skipped(model):
    return summary(model).skipped


@each_recipe
def test_layers_compute_what_the_numpy_layer_does(recipe):
    model = block()
    weight, bias = model[0].weight.detach().numpy(), model[0].bias.detach().numpy()
    expected = dynquant.QuantLinear.from_float(weight.copy(), bias.copy(), **recipe)
    assert quantize(model, **recipe) is model
    assert all(type(model[i]) is QuantLinear for i in (0, 2))
    x = torch.randn(3, 5, 96)
    assert torch.equal(model[0](x), torch.from_numpy(expected(x.numpy())))
    assert torch.equal(model[0].weight_dequantized(), torch.from_numpy(expected.weight_dequantized()))


def test_memory_and_names_of_the_state():
    model = quantize(block())
    assert sorted(model.state_dict()) == [
        "0.bias",
        "0.weight",
        "0.weight_scale",
        "2.weight",
        "2.weight_scale",
    ]
    assert not list(model.parameters())
    assert model[0].weight.dtype is torch.int8 and model[0].weight_scale.shape == (64, 1)
    found = summary(model)
    assert (found.bytes_before, found.bytes_after) == (
        4 * (96 * 64 + 64 + 64 * 48),
        96 * 64 + 64 * 48 + 4 * (64 + 64 + 48),
    )


def test_include_exclude_and_filter():
    def net():
        parts = {name: nn.Linear(64, 64) for name in ("query", "value", "lm_head")}
        return nn.ModuleDict({"attention": nn.ModuleDict(parts), "out": nn.Linear(64, 64)})

    def taken(model):
        return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]

    assert taken(quantize(net())) == ["attention.query", "attention.value", "out"]
    assert taken(quantize(net(), exclude=None)) == [
        "attention.query",
        "attention.value",
        "attention.lm_head",
        "out",
    ]
    assert taken(quantize(net(), include="attention.*")) == ["attention.query", "attention.value"]
    assert taken(quantize(net(), include=["*query", "out"], exclude=["*y"])) == ["out"]
    seen = []
    model = quantize(net(), filter_fn=lambda module, name: seen.append((type(module), name)) or name == "out")
    assert taken(model) == ["out"]
    assert seen == [(nn.Linear, name) for name in ("attention.query", "attention.value", "out")]
    assert skipped(model) == {
        "attention.query": "excluded by filter_fn",
        "attention.value": "excluded by filter_fn",
        "attention.lm_head": "excluded",
    }
    quantize(model, include="*query")
    assert skipped(model) == {"attention.value": "not included", "attention.lm_head": "not included"}


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["nothing", ["0", "encoder.*"]])
def test_patterns_that_match_nothing(option, pattern):
    model = block()
    name = pattern if isinstance(pattern, str) else pattern[-1]
    message = f"{option}: expected patterns that match a linear layer, got {name!r}; the layers are 0, 2"
    with pytest.raises(ParameterError, match=re.escape(message)):
        quantize(model, **{option: pattern})
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("options", [{"include": 3}, {"exclude": [b"0"]}, {"filter_fn": "0"}])
def test_patterns_of_another_type(options):
    with pytest.raises(ParameterError, match=f"^{next(iter(options))}: expected"):
        quantize(block(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3},
        {"bits": 4, "activation_symmetric": False},
        {"bits": 8, "symmetric": False},
        {"group_size": 0},
        {"hadamard": 1},
        {"num_threads": 0},
    ],
)
def test_options_that_cannot_be(options):
    model = block()
    with pytest.raises(ParameterError):
        quantize(model, **options)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_weights_that_are_not_finite(value, tensor):
    model = nn.ModuleDict({"first": nn.Linear(64, 64), "last": nn.Linear(64, 64)})
    getattr(model["last"], tensor).data.reshape(-1)[7] = value
    with pytest.raises(NonFiniteError) as caught:
        quantize(model)
    assert (caught.value.argument, caught.value.index) == (f"last.{tensor}", 7)
    assert type(model["first"]) is type(model["last"]) is nn.Linear


def test_weights_that_leave_float32_when_rotated():
    model = nn.ModuleDict({"first": nn.Linear(64, 64), "last": nn.Linear(64, 64)})
    model["last"].weight.data[:] = 3e38
    with pytest.raises(ParameterError, match=r"^last\.weight"):
        quantize(model, hadamard=True)
    assert type(model["first"]) is nn.Linear


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Sequential(nn.ReLU()), nn.Embedding(8, 64)])
def test_models_without_linear_layers(model):
    with pytest.raises(ParameterError, match=f"to quantize, got none in {type(model).__name__}"):
        quantize(model)


def test_models_with_nothing_left_to_quantize():
    model = quantize(block())
    with pytest.raises(ParameterError, match="got 2 that are quantized already"):
        quantize(model)
    with pytest.raises(ParameterError, match=r"got 0 \(too small to gain: 2 x 64\)"):
        quantize(nn.Sequential(nn.Linear(64, 2)))


@pytest.mark.parametrize("model", [nn.Linear(64, 64), "model", None, nn.Linear])
def test_what_is_no_model(model):
    with pytest.raises(ParameterError, match=r"^model: expected"):
        quantize(model)


def test_models_on_another_device():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, device="meta"))
    with pytest.raises(ParameterError, match=r"^1\.weight: expected a tensor on the CPU, got one on meta"):
        quantize(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes(dtype):
    model = block().to(dtype)
    expected = dynquant.QuantLinear.from_float(model[0].weight.detach().float().numpy())
    quantize(model)
    assert torch.equal(model[0].weight, torch.from_numpy(expected.to_arrays()["weight_i8"]))
    x = torch.randn(4, 96).to(dtype)
    assert model(x).dtype is dtype


# What stays as it is


def test_a_head_tied_to_the_embedding_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.out = nn.Embedding(80, 64), nn.Linear(64, 64), nn.Linear(64, 80)
            self.out.weight = self.embed.weight

    model = quantize(Net())
    assert skipped(model) == {"out": "tied to embed"}
    assert model.out.weight is model.embed.weight


def test_layers_tied_to_one_that_stays():
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("a", "b", "c")})
    model["b"].weight = model["a"].weight
    quantize(model, exclude="b")
    assert skipped(model) == {"a": "tied to b", "b": "excluded"}


def test_tied_layers_share_one_quantized_weight():
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("a", "b", "c")})
    model["b"].weight = model["a"].weight
    x = torch.randn(4, 64)
    separate = {name: QuantLinear.from_float(layer)(x) for name, layer in model.items()}
    quantize(model)
    assert model["a"].weight is model["b"].weight and model["a"].weight_scale is model["b"].weight_scale
    for name, layer in model.items():
        assert torch.equal(layer(x), separate[name])
    assert summary(model).bytes_before == 4 * (2 * 64 * 64 + 3 * 64)
    assert summary(model).bytes_after == 2 * (64 * 64 + 4 * 64) + 4 * 3 * 64


def test_one_module_in_two_places():
    layer = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": layer, "deep": nn.Sequential(layer, nn.ReLU())})
    quantize(model, include="deep.0")
    assert type(model["a"]) is QuantLinear and model["a"] is model["deep"][0]


def test_parents_that_read_weights_go_on_working():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    decoder = nn.TransformerDecoderLayer(64, 4, 96, batch_first=True)
    model = nn.ModuleDict(
        {"encoder": nn.TransformerEncoder(encoder, 2), "decoder": decoder, "out": nn.Linear(64, 64)}
    ).eval()
    x = torch.randn(2, 7, 64)
    with torch.no_grad():
        expected = model["encoder"](x)
        quantize(model)
        assert torch.equal(model["encoder"](x), expected)
        assert model["decoder"](x, x).shape == x.shape
    reasons = skipped(model)
    assert reasons["encoder.layers.0.linear1"] == "TransformerEncoderLayer reads its weight"
    assert reasons["decoder.self_attn.out_proj"] == "MultiheadAttention reads its weight"
    assert type(model["decoder"].linear1) is QuantLinear


def test_layers_that_may_compute_something_else_stay():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    names = ("subclass", "parametrized", "normed", "replaced", "small", "taken")
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in names})
    model["subclass"], model["small"] = Scaled(64, 64), nn.Linear(64, 8)
    nn.utils.parametrizations.orthogonal(model["parametrized"])
    prune.identity(model["normed"], "weight")
    model["replaced"].forward = lambda x: x
    quantize(model)
    assert skipped(model) == {
        "subclass": "a subclass of nn.Linear: Scaled",
        "parametrized": "parametrized",
        "normed": "its weight is no parameter of its own",
        "replaced": "its forward was replaced",
        "small": "too small to gain: 8 x 64",
    }
    assert type(model["taken"]) is QuantLinear


def test_hooks_and_the_mode_of_training_stay():
    model = block().eval()
    calls = []
    handle = model[0].register_forward_hook(lambda module, args, y: calls.append(type(module)))
    quantize(model)
    model(torch.randn(1, 96))
    assert calls == [QuantLinear] and not model[0].training
    handle.remove()
    model(torch.randn(1, 96))
    assert len(calls) == 1


def test_summary_as_a_table():
    model = quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), hadamard=True)
    assert str(summary(model)).splitlines() == [
        "1 layers quantized, 1 left as they are; the model's bytes: 17,160 -> 5,192",
        "layer  out x in  recipe                   bytes  SQNR, dB",
        "0      64 x 64   int8, rotated  16,640 -> 4,672",
        "left as it is  why",
        "1              too small to gain: 2 x 64",
    ]
    assert skipped(copy.deepcopy(model)) == skipped(model)
    with pytest.raises(ParameterError, match=r"^model: expected an nn\.Module"):
        summary(3)


def test_hooks_of_gradients_get_what_they_got():
    def gradients(model, before):
        got = []
        model[0].register_full_backward_hook(lambda module, of_x, of_y: got.append((of_x[0], of_y[0])))
        before(model)
        model(torch.ones(2, 96, requires_grad=True)).sum().backward()
        return got

    ((of_x, of_y),) = gradients(block(), quantize)
    ((float_x, float_y),) = gradients(block(), lambda model: None)
    assert torch.allclose(of_x, float_x, atol=0.02) and torch.allclose(of_y, float_y, atol=0.02)
