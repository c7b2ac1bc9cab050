"""`dynquant.torch.QuantLinear`: calls, copies, states, conversions, gradients and graphs."""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

import dynquant  # noqa: E402
from dynquant import DTypeError, NonFiniteError, ParameterError, ShapeMismatchError  # noqa: E402
from dynquant.torch import QuantLinear  # noqa: E402

RECIPES = {
    "int8": {},
    "groups": {"group_size": 32},
    "rotated": {"hadamard": True},
    "smoothed": {"smooth": np.linspace(0.5, 2, 96, dtype=np.float32)},
    "zero points": {"activation_symmetric": False},
    "int4": {"bits": 4},
    "int4 groups": {"bits": 4, "group_size": 32},
    "int4 symmetric": {"bits": 4, "group_size": 32, "symmetric": True},
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def layer(recipe=None, k=96, n=64):
    torch.manual_seed(0)
    return QuantLinear.from_float(nn.Linear(k, n), **(recipe or {}))


def inputs(*shape, k=96):
    return torch.randn(*shape, k, generator=torch.Generator().manual_seed(1))


def numpy_layer(module):
    """The NumPy layer of the same tensors."""
    weight = module._pack().linear
    return dynquant.QuantLinear.from_arrays(weight.to_arrays())


# Inputs


@each_recipe
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_input(recipe, dtype):
    module, x = layer(recipe), inputs(5).to(dtype)
    y = module(x)
    assert y.dtype is dtype
    assert torch.equal(y, torch.from_numpy(numpy_layer(module)(x.float().numpy())).to(dtype))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 4)])
def test_every_number_of_axes(shape):
    module, x = layer(), inputs(*shape)
    y = module(x)
    assert y.shape == (*shape, 64)
    assert torch.equal(y.reshape(-1, 64), module(x.reshape(-1, 96)))


def test_every_stride():
    module, x = layer(), inputs(6, 8)
    expected = module(x)
    assert torch.equal(module(x[:, 0]), expected[:, 0])
    assert torch.equal(module(x.transpose(0, 1)), expected.transpose(0, 1))
    assert torch.equal(module(x[::2, 1::3]), expected[::2, 1::3])
    assert torch.equal(module(x[:1].expand(4, 8, 96)), expected[:1].expand(4, 8, 64))
    wide = inputs(7, k=200)
    assert torch.equal(module(wide[:, 3:99]), module(wide[:, 3:99].clone()))
    assert torch.equal(module(x.reshape(48, 96).t().contiguous().t()), expected.reshape(48, 64))


def test_negative_and_conjugated_views():
    module, x = layer(), inputs(3)
    complex_ = torch.complex(x, x).conj()
    assert complex_.imag.is_neg()
    assert torch.equal(module(complex_.imag), module(-x))
    negative = torch._neg_view(x)
    assert negative.is_contiguous() and torch.equal(module(negative), module(-x))


@each_recipe
def test_a_row_does_not_depend_on_its_batch(recipe, shared):
    module, x = layer(recipe), inputs(70)
    y = module(x)
    assert all(torch.equal(module(x[i : i + 1])[0], y[i]) for i in (0, 31, 69))
    for threads in (1, 2, 5):
        module.num_threads = threads
        assert torch.equal(module(x), y)


def test_more_rows_than_are_quantized_at_once():
    module = layer(k=4096, n=48)
    x = inputs(700, k=4096)
    y = module(x)
    assert torch.equal(y[650:], module(x[650:]))


def test_threads_are_those_of_torch_by_default(monkeypatch):
    module, asked = layer(), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked.append(True) or 1)
    module(inputs(2))
    module.num_threads = 1
    module(inputs(2))
    assert len(asked) == 1


def test_float32_is_read_where_it_lies():
    module, x = layer(), inputs(3)
    source = x.numpy()
    y = module(x)
    source[0] = 0  # the memory that NumPy sees is the one that is read
    assert torch.equal(module(x)[0], module.bias) and torch.equal(module(x)[1:], y[1:])


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(3, 95), ShapeMismatchError, r"x: expected shape \(..., 96\), got \(3, 95\)"),
        (torch.tensor(1.0), ShapeMismatchError, r"x: expected shape \(..., 96\), got \(\)"),
        (
            torch.ones(3, 96, dtype=torch.int8),
            DTypeError,
            "x: expected a tensor of floats, got dtype torch.int8",
        ),
        (torch.ones(3, 96, dtype=torch.complex64), DTypeError, "x: expected a tensor of floats"),
        (
            torch.ones(3, 96).to_sparse(),
            DTypeError,
            "x: expected a strided tensor, got layout torch.sparse_coo",
        ),
        (np.ones((3, 96), np.float32), DTypeError, "x: expected a torch.Tensor, got ndarray"),
        (None, DTypeError, "x: expected a torch.Tensor, got NoneType"),
    ],
)
def test_inputs_that_cannot_be(x, error, message):
    with pytest.raises(error, match=message):
        layer()(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(dtype, value):
    x = inputs(3).to(dtype)
    x[1, 5] = value
    with pytest.raises(NonFiniteError) as caught:
        layer()(x)
    assert caught.value.argument == "x" and caught.value.position == (1, 5)


def test_meta_tensors_have_shapes_alone():
    assert layer().to("meta")(inputs(3).to("meta")).shape == (3, 64)


# States and copies


@each_recipe
def test_copies_compute_the_same(recipe):
    module, x = layer(recipe), inputs(3)
    before = copy.deepcopy(module)
    y = module(x)
    for other in (before, copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), y)
        assert other.weight_scale.data_ptr() != 0
    size = len(pickle.dumps(module))
    assert size == len(pickle.dumps(before))  # the packed form is no part of it


@each_recipe
def test_states_go_through_safe_files(recipe):
    module, x = layer(recipe), inputs(3)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    options = {name: value for name, value in recipe.items() if name != "smooth"}
    for assign in (False, True):
        other = QuantLinear(96, 64, smooth="smooth" in recipe, **options)
        assert not other(x).any()  # packed before the weights come
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), module(x))


def test_changes_of_the_tensors_count():
    module, x = layer(), inputs(3)
    y = module(x)
    module.weight_scale.mul_(2)
    module.bias.mul_(2)
    assert torch.equal(module(x), 2 * y)
    module.bias = None
    assert torch.allclose(module(x), 2 * y - 2 * layer().bias, atol=1e-6)
    with pytest.raises(NonFiniteError):
        module.weight_scale[3] = float("nan")
        module(x)


def test_a_bias_that_comes_later_counts():
    module, x = QuantLinear.from_float(nn.Linear(96, 64, bias=False)), inputs(3)
    y = module(x)
    module.bias = torch.ones(64)
    assert torch.equal(module(x), y + 1)


def test_states_of_inference_mode_can_be_loaded():
    module, x = layer(), inputs(3)
    with torch.inference_mode():
        other = QuantLinear(96, 64)
        other.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
        made_here = QuantLinear.from_float(nn.Linear(96, 64))
        assert torch.equal(other(x), module(x)) and torch.equal(copy.deepcopy(other)(x), module(x))
    made_here.weight.zero_()
    assert torch.equal(made_here(x), made_here.bias.expand(3, 64))


def test_functional_call_takes_other_tensors():
    module, x = layer(), inputs(3)
    y = module(x)
    state = {"bias": torch.zeros(64)}
    assert torch.allclose(torch.func.functional_call(module, state, (x,)), y - module.bias)
    assert torch.equal(module(x), y)


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
def test_conversions_leave_the_tensors(convert):
    module, x = layer({"smooth": np.full(96, 2, np.float32)}), inputs(3)
    y = module(x)
    dtypes = {name: t.dtype for name, t in module.state_dict().items()}
    model = nn.Sequential(module, nn.LayerNorm(64))
    convert(model)
    assert {name: t.dtype for name, t in module.state_dict().items()} == dtypes
    assert model[1].weight.dtype is not torch.float32 and torch.equal(module(x), y)
    assert model.to(torch.float16) is model and torch.equal(module(x), y)


def test_another_device_is_refused():
    module, x = layer(), inputs(3)
    y = module(x)
    for device in ("cuda", "mps"):
        if not getattr(torch, device).is_available():
            with pytest.raises(ParameterError, match="expected a QuantLinear to stay on the CPU"):
                module.to(device)
    assert torch.equal(module(x), y) and torch.equal(module.to("cpu")(x), y)
    assert module.to("meta").weight.device.type == "meta"
    with pytest.raises(ParameterError, match="x: expected a tensor on the CPU, got one on meta"):
        layer()(x.to("meta"))


def test_share_memory():
    module, x = layer(), inputs(3)
    y = module(x)
    assert module.share_memory().weight.is_shared() and torch.equal(module(x), y)


def test_packed_forms_go_with_their_weights():
    module, x = layer(), inputs(3)
    module(x)
    gone = weakref.ref(module._packed)
    del module
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "options",
    [
        {"in_features": 0},
        {"out_features": -1},
        {"bits": 5},
        {"group_size": 0},
        {"bias": None},
        {"hadamard": 2},
        {"smooth": 1},
        {"num_threads": 0},
        {"bits": 4, "activation_symmetric": False},
    ],
)
def test_options_that_cannot_be(options):
    with pytest.raises(ParameterError, match=f"^{list(options)[-1]}: expected"):
        QuantLinear(**{"in_features": 8, "out_features": 8, **options})


def test_what_is_no_linear_layer():
    with pytest.raises(ParameterError, match=r"^linear: expected an nn\.Linear, got Conv2d"):
        QuantLinear.from_float(nn.Conv2d(3, 3, 3))


# Gradients


@each_recipe
def test_gradients_pass_by_the_dequantized_weights(recipe):
    module, x = layer(recipe), inputs(2, 3).requires_grad_()
    y = module(x)
    assert torch.equal(y, module(x.detach()))
    grad = torch.randn(2, 3, 64)
    y.backward(grad)
    assert torch.allclose(x.grad, grad @ module.weight_dequantized(), rtol=1e-5, atol=1e-5)


def test_gradients_in_bfloat16_and_without():
    module = layer()
    x = inputs(2).bfloat16().requires_grad_()
    module(x).sum().backward()
    assert x.grad.dtype is torch.bfloat16
    with torch.no_grad():
        assert not module(x).requires_grad
    assert not module(x.detach()).requires_grad


def test_adapters_train_beside_quantized_weights():
    """As with LoRA: the first adapter's gradient passes the second layer, whose weights are quantized."""
    torch.manual_seed(0)
    down, up = nn.Linear(96, 4, bias=False), nn.Linear(4, 64, bias=False)
    base, head = layer(), layer(k=64, n=48)
    x, target = inputs(32), torch.randn(32, 48)
    optimizer = torch.optim.Adam([*down.parameters(), *up.parameters()], 0.02)
    losses = []
    for _ in range(30):
        loss = (head(base(x) + up(down(x))) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# Graphs


def arguments(module, x):
    tensors = (getattr(module, name) for name in ("weight", "weight_scale", "weight_zero_point"))
    options = module.bits, module.in_features, module.group_size, module.activation_symmetric, None
    return (x, *tensors, module.bias, module.smooth, module.signs, *options)


@each_recipe
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.filterwarnings("ignore")  # of PyTorch about itself
def test_opcheck(recipe, requires_grad):
    x = inputs(2, 3).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.dynquant.linear.default, arguments(layer(recipe), x))


@each_recipe
@pytest.mark.filterwarnings("ignore")
def test_compiled_and_exported_models_compute_the_same(recipe):
    torch._dynamo.reset()
    model, x = nn.Sequential(layer(recipe), nn.ReLU()), inputs(2, 3)
    y = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x), y)
    assert torch.equal(compiled(inputs(5, 4)), model(inputs(5, 4)))
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    assert torch.equal(exported.module()(x), y)
    assert torch.equal(exported.module()(inputs(7, 3)), model(inputs(7, 3)))


@pytest.mark.filterwarnings("ignore")
def test_compiled_models_train():
    torch._dynamo.reset()
    module, x = layer(), inputs(4).requires_grad_()
    torch.compile(module, fullgraph=True, backend="aot_eager")(x).sum().backward()
    got, x.grad = x.grad, None
    module(x).sum().backward()
    assert torch.equal(got, x.grad)


@pytest.mark.filterwarnings("ignore")
def test_traced_models_compute_the_same():
    module, x = layer(), inputs(4)
    traced = torch.jit.trace(module, (x,))
    assert torch.equal(traced(inputs(9)), module(inputs(9)))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), module(x))


@pytest.mark.filterwarnings("ignore")
def test_symbolic_traces_compute_the_same():
    model, x = nn.Sequential(layer(), nn.ReLU()), inputs(4)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.filterwarnings("error")
def test_gradients_of_gradients():
    module = layer(k=64)
    weight, x = module.weight_dequantized(), inputs(3, k=64).requires_grad_()
    y = module(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.allclose(second, 2 * (torch.ones(3, 64) @ weight.T @ weight), rtol=1e-4, atol=1e-4)


def test_modes_that_watch_operators_see_the_layer():
    make_fx = pytest.importorskip("torch.fx.experimental.proxy_tensor").make_fx
    module, x = layer(), inputs(3)
    graph = make_fx(module)(inputs(3) + 1)
    assert torch.equal(graph(x), module(x))


@pytest.mark.parametrize("axis", [0, 1])
def test_vmap(axis):
    module, x = layer(), inputs(3, 5)
    y = torch.func.vmap(module, in_dims=axis, out_dims=axis)(x)
    assert torch.equal(y, module(x))


@pytest.mark.filterwarnings("ignore")  # of PyTorch about itself
def test_forward_mode_is_refused():
    """A tangent that is dropped without a word would count as a derivative of zero."""
    module, x = layer(), inputs(3)
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(module(x), module(x.clone()))
        with pytest.raises(ParameterError, match="without a tangent"):
            module(torch.autograd.forward_ad.make_dual(x, x))
    with pytest.raises(ParameterError, match="without a tangent"):
        torch.func.jvp(module, (x,), (x,))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.filterwarnings("ignore")  # of PyTorch about itself
def test_nested_tensors_are_refused(layout, requires_grad):
    x = torch.nested.nested_tensor([inputs(2), inputs(3)], layout=layout, requires_grad=requires_grad)
    with pytest.raises(DTypeError, match=r"^x: expected a strided tensor, got a nested one"):
        layer()(x)


def test_weights_on_meta_have_no_outputs():
    with pytest.raises(ParameterError, match=r"^weight: .* on meta"):
        layer().to("meta")(inputs(2))


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}])
def test_states_of_float_layers_are_refused(options):
    """They have the same names and shapes; copied into int8 they would be cut to zeros."""
    model, x = nn.Sequential(layer()), inputs(2)
    y = model(x)
    with pytest.raises(RuntimeError, match=r"0\.weight: expected torch\.int8, got torch\.float32"):
        model.load_state_dict(nn.Sequential(nn.Linear(96, 64)).state_dict(), **options)
    assert torch.equal(model(x), y)


def test_states_in_other_float_dtypes_can_be_copied():
    module = layer()
    state = {key: t.double() if t.is_floating_point() else t for key, t in module.state_dict().items()}
    other = QuantLinear(96, 64)
    other.load_state_dict(state)
    assert torch.equal(other(inputs(2)), module(inputs(2)))
    with pytest.raises(RuntimeError, match=r"weight_scale: expected torch\.float32, got torch\.float64"):
        other.load_state_dict(state, assign=True)
