"""convert and restore: what they swap, what they leave alone, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_accurate
from dispatch_log import DispatchLog
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import torchconv


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding="same", groups=4, padding_mode="circular")),
        nn.AvgPool2d(3, 2, 1),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
    )


def images() -> Tensor:
    return torch.randn(2, 3, 15, 16)


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def snapshot(model: nn.Module) -> list[tuple[nn.Module, type, dict[str, Any]]]:
    """Every module with its class and its own attributes, containers copied one level deep."""
    return [
        (
            m,
            type(m),
            {k: copy.copy(v) if isinstance(v, (dict, set)) else v for k, v in vars(m).items()},
        )
        for m in model.modules()
    ]


def assert_untouched(
    model: nn.Module, before: list[tuple[nn.Module, type, dict[str, Any]]]
) -> None:
    """The very same objects, classes and attributes, and no more of them."""
    after = snapshot(model)
    assert len(after) == len(before)
    for (m, cls, attributes), (m0, cls0, attributes0) in zip(after, before, strict=True):
        assert m is m0 and cls is cls0
        assert list(attributes) == list(attributes0)
        for name, value in attributes.items():
            expected = attributes0[name]
            if isinstance(value, dict):
                assert list(value) == list(expected)
                assert all(value[k] is expected[k] for k in value)
            else:
                assert value is expected or value == expected


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Output and all gradients of one training step's loss."""
    x = x.detach().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return (y.detach(), *torch.autograd.grad((y * weights).sum(), wanted))


def assert_same_step(model: nn.Module, x: Tensor, expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(step(model, x), expected, strict=True):
        torch.testing.assert_close(a, e)


def calls(model: nn.Module, x: Tensor) -> DispatchLog:
    with DispatchLog() as log, torch.no_grad():
        model(x)
    return log


# --- the swap ------------------------------------------------------------------------------------


def test_swaps_in_place_and_restores() -> None:
    model, x = network().double(), images().double()
    expected, before, text = step(model, x), snapshot(model), str(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}

    assert torchconv.convert(model) is model
    swapped = [model[0], model[3], model[4][0], model[5]]  # type: ignore[index]
    assert [type(m) for m in swapped] == [
        torchconv.nn.Conv2d, torchconv.nn.MaxPool2d, torchconv.nn.Conv2d, torchconv.nn.AvgPool2d
    ]  # fmt: skip
    assert str(model) == text
    log = calls(model, x)
    assert [log.count(n) for n in ("conv2d", "max_pool2d", "avg_pool2d")] == [2, 1, 1]
    assert not log.from_torch()
    for name, value in model.state_dict().items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(value, state[name])

    # The running averages moved; the swap itself is compared in the same state.
    model.load_state_dict(state)
    assert_same_step(model, x, expected)
    assert torchconv.restore(model) is model
    assert_untouched(model, before)


def test_keeps_everything_but_the_class() -> None:
    model = network()
    before = snapshot(model)
    torchconv.convert(model)
    for m, _, attributes in before:
        now = dict(vars(m))
        assert now.pop("_converted", True) is True
        assert list(now) == list(attributes)
        assert all(now[k] is vars(m)[k] for k in now)
    assert all(
        p is q
        for p, q in zip(
            model.parameters(),
            (p for _, _, a in before for p in a["_parameters"].values()),
            strict=True,
        )
    )


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 4, 3), lambda: nn.MaxPool2d(2)])
def test_a_bare_layer(make: Callable[[], nn.Module]) -> None:
    layer = make()
    before = snapshot(layer)
    assert torchconv.convert(layer) is layer
    assert type(layer).__module__ == "torchconv.nn"
    assert torchconv.restore(layer) is layer
    assert_untouched(layer, before)


def test_twice_is_once() -> None:
    model = network()
    before = snapshot(model)
    torchconv.restore(model)
    assert_untouched(model, before)
    torchconv.convert(model)
    once = snapshot(model)
    torchconv.convert(model)
    assert_untouched(model, once)
    torchconv.restore(model)
    torchconv.restore(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [None, torch.zeros(1), [nn.Conv2d(1, 1, 1)], nn.Conv2d])
def test_refuses_what_is_no_module(value: Any) -> None:
    for function in (torchconv.convert, torchconv.restore):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, but got"):
            function(value)


def test_every_flag_stays() -> None:
    model = network().eval()
    model[0].requires_grad_(False)
    model[3].train()
    model[4].half()
    model[5].note = "kept"  # type: ignore[assignment]
    torchconv.convert(model)
    assert [m.training for m in model] == [False, False, False, True] + [False] * 4
    assert not any(p.requires_grad for p in model[0].parameters())
    assert {p.dtype for p in model[4].parameters()} == {torch.half}
    assert model[5].note == "kept"
    model.train().double()
    assert model[0].training and model[0].weight.dtype == torch.double


def test_layers_built_as_ours_stay() -> None:
    model = nn.Sequential(
        torchconv.nn.Conv2d(3, 4, 3, activation="relu"),
        nn.Conv2d(4, 4, 1),
        torchconv.nn.MinPool2d(2),
    )
    before = snapshot(model)
    torchconv.convert(model)
    torchconv.restore(model)
    assert_untouched(model, before)


def test_a_converted_layer_given_an_activation_stays() -> None:
    model = torchconv.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    model[0].activation = "relu"  # type: ignore[assignment]
    model[1].activation = "relu"  # type: ignore[assignment]
    model[1].activation = None  # type: ignore[assignment]
    torchconv.restore(model)
    assert type(model[0]) is torchconv.nn.Conv2d
    assert type(model[1]) is nn.Conv2d and "activation" not in vars(model[1])


def test_pooling_with_indices() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.MaxPool2d(2, return_indices=True)
            self.unpool = nn.MaxUnpool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.unpool(*self.pool(x))

    model, x = Model(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    torchconv.convert(model)
    assert torch.equal(model(x), expected)
    assert calls(model, x).count("max_pool2d") == 1


def test_lazy_layers() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyConv2d(5, 3))
    torchconv.convert(model)
    assert classes(model)[1:] == [torchconv.nn.LazyConv2d] * 2
    torchconv.restore(model)
    assert classes(model)[1:] == [nn.LazyConv2d] * 2
    torchconv.convert(model)
    model(images())
    assert classes(model)[1:] == [torchconv.nn.Conv2d] * 2
    torchconv.restore(model)
    assert classes(model)[1:] == [nn.Conv2d] * 2
    assert vars(model[1]).keys() == vars(nn.Conv2d(4, 5, 3)).keys()


# --- training and hooks --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    lambda p: torch.optim.Adam(p, 0.01),
])  # fmt: skip
def test_an_optimizer_goes_on(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Two steps before convert, two after, two after restore, against six steps of PyTorch."""
    reference = network().double()
    model = copy.deepcopy(reference)
    optimizers = make(reference.parameters()), make(model.parameters())
    for i in range(6):
        if i in (2, 4):
            (torchconv.convert if i == 2 else torchconv.restore)(model)
        x = images().double()
        for m, optimizer in zip((reference, model), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_hooks_of_every_kind() -> None:
    layer, x = nn.Conv2d(3, 4, 3), images().requires_grad_()
    seen: list[str] = []

    def note(kind: str) -> Callable[..., None]:
        return lambda *args, **kwargs: seen.append(kind)

    def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 2 * output

    layer.register_forward_pre_hook(note("forward_pre"))
    layer.register_forward_hook(note("forward"))
    layer.register_forward_hook(note("forward_kwargs"), with_kwargs=True)
    layer.register_forward_hook(scale)
    layer.register_full_backward_pre_hook(note("backward_pre"))
    layer.register_full_backward_hook(note("backward"))
    layer.register_state_dict_pre_hook(note("state_dict_pre"))
    layer.register_state_dict_post_hook(note("state_dict_post"))
    layer.register_load_state_dict_pre_hook(note("load_pre"))
    layer.register_load_state_dict_post_hook(note("load_post"))
    layer.weight.register_hook(note("weight"))

    def run() -> tuple[list[str], Tensor]:
        seen.clear()
        y = layer(x)
        y.sum().backward()
        layer.load_state_dict(layer.state_dict())
        return list(seen), y.detach()

    order, y = run()
    assert len(order) == 10
    torchconv.convert(layer)
    converted, z = run()
    assert converted == order
    torch.testing.assert_close(z, y)
    torchconv.restore(layer)
    assert run()[0] == order


# --- parametrized layers -------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _doubled_twice(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Doubled())
    parametrize.register_parametrization(layer, "bias", Doubled())


REPARAMETRIZE: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "two parameters": _doubled_twice,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", REPARAMETRIZE)
@pytest.mark.parametrize("training", [False, True])
def test_reparametrized(name: str, training: bool) -> None:
    def make() -> nn.Sequential:  # the old hooks leave behind what cannot be deep-copied
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        REPARAMETRIZE[name](model[0])
        return model.double().train(training)

    model, twin, x = make(), make(), images().double()
    before, keys = snapshot(model), list(model.state_dict())
    parameters = dict(model.named_parameters())

    torchconv.convert(model)
    assert isinstance(model[0], torchconv.nn.Conv2d)
    assert list(model.state_dict()) == keys
    assert all(p is parameters[n] for n, p in model.named_parameters())
    for _ in range(2):  # spectral_norm's power iteration goes on from call to call
        with DispatchLog() as log:
            assert_same_step(model, x, step(twin, x))
        assert log.count("conv2d") == 1
    torchconv.restore(model)
    if name in ("old weight_norm", "old spectral_norm", "pruned"):
        # Their computed weight is a plain attribute, a new tensor after every call.
        assert classes(model) == [cls for _, cls, _ in before]
        assert [list(vars(m)) for m in model.modules()] == [list(a) for _, _, a in before]
    else:
        assert_untouched(model, before)
    assert_same_step(model, x, step(twin, x))


def test_parametrized_serialises_as_before() -> None:
    layer = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    with pytest.raises(RuntimeError) as before:
        pickle.dumps(layer)
    torchconv.convert(layer)
    with pytest.raises(RuntimeError) as after:
        pickle.dumps(layer)
    assert str(after.value) == str(before.value)
    assert type(layer).__name__ == "ParametrizedConv2d"
    assert repr(layer) == repr(torchconv.restore(copy.deepcopy(layer)))


def test_parametrizations_come_and_go_after_convert() -> None:
    x = images()

    layer = torchconv.convert(nn.Conv2d(3, 4, 3))
    parametrize.register_parametrization(layer, "weight", Doubled())
    assert calls(layer, x).count("conv2d") == 1
    torchconv.restore(layer)
    assert type(layer).__mro__[1] is nn.Conv2d and "_converted" not in vars(layer)
    expected = F.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Conv2d

    layer = torchconv.convert(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    parametrize.register_parametrization(layer, "bias", Doubled())
    torchconv.restore(layer)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias))
    assert parametrize.is_parametrized(layer, "bias")
    assert torchconv.nn.Conv2d not in type(layer).__mro__

    layer = torchconv.convert(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is torchconv.nn.Conv2d
    torchconv.restore(layer)
    assert type(layer) is nn.Conv2d and "_converted" not in vars(layer)


def test_copies_of_a_parametrized_layer_are_apart() -> None:
    """torch gives copies one class between them; converting one must not convert the other."""
    layer = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    other = copy.deepcopy(layer)
    cls = type(layer)
    assert type(other) is cls
    torchconv.convert(layer)
    assert type(other) is cls and not isinstance(other, torchconv.nn.Conv2d)
    assert type(torchconv.restore(layer)) is cls


# --- models that hold layers in unusual ways -----------------------------------------------------


def test_shared_and_contained_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Conv2d(3, 3, 3, padding=1)
            self.again = self.shared
            self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 1), self.shared])
            self.named = nn.ModuleDict({"pool": nn.MaxPool2d(2)})
            self.shortcut = [self.shared]  # not registered, but the same object

        def forward(self, x: Tensor) -> Tensor:
            x = self.again(self.shared(x))
            for block in self.blocks:
                x = block(x)
            return self.named["pool"](self.shortcut[0](x))

    model, x = Model().double(), images().double()
    before, expected = snapshot(model), step(model, x)
    torchconv.convert(model)
    assert model.again is model.shared is model.blocks[1] is model.shortcut[0]
    log = calls(model, x)
    assert log.count("conv2d") == 5 and not log.from_torch()
    assert_same_step(model, x, expected)
    torchconv.restore(model)
    assert_untouched(model, before)


def test_graph_module() -> None:
    model, x = network().eval(), images()
    traced = torch.fx.symbolic_trace(model)
    code, expected = traced.code, traced(x)
    torchconv.convert(traced)
    assert traced.code == code
    log = calls(traced, x)
    assert log.count("conv2d") == 2 and not log.from_torch()
    torch.testing.assert_close(traced(x), expected)
    again = torch.fx.symbolic_trace(torchconv.convert(network().eval()))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), expected)


def test_data_parallel() -> None:
    model = nn.DataParallel(network())
    before = snapshot(model)
    torchconv.convert(model)
    assert type(model.module[0]) is torchconv.nn.Conv2d
    assert calls(model, images()).count("conv2d") == 2
    torchconv.restore(model)
    assert_untouched(model, before)


def test_compiled_model_notices() -> None:
    model, x = network().eval(), images()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def convolutions() -> list[str]:
        targets = [str(n.target) for n in graphs[-1].graph.nodes if n.op == "call_function"]
        return [t for t in targets if "conv2d" in t]

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = compiled(x)
    assert torchconv.convert(compiled) is compiled
    torch.testing.assert_close(compiled(x), expected)
    assert type(model[0]) is torchconv.nn.Conv2d
    assert len(graphs) == 2 and convolutions() == ["torchconv.conv2d"] * 2
    torchconv.restore(compiled)
    assert torch.equal(compiled(x), expected)
    if len(graphs) == 3:  # neither the first graph nor a third may call torchconv
        assert not any("torchconv" in c for c in convolutions())


# --- what is left alone --------------------------------------------------------------------------


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Inner(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight, bias) + 1


class Named(nn.Conv2d):
    """Computes the same, but nothing says that it does."""


class Pool(nn.MaxPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(-x)


def _instance_forward() -> nn.Module:
    layer = nn.Conv2d(3, 4, 3)
    layer.forward = lambda x: F.conv2d(x, layer.weight).relu()  # type: ignore[method-assign]
    return layer


def _with_attribute(name: str, value: Any) -> nn.Module:
    layer = nn.Conv2d(3, 4, 3)
    setattr(layer, name, value)
    return layer


def _quantizable() -> nn.Module:
    qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.nn.qat.Conv2d(3, 4, 3, qconfig=qconfig)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Standardized(3, 4, 3),
        lambda: Inner(3, 4, 3),
        lambda: Named(3, 4, 3),
        lambda: Pool(2),
        lambda: parametrizations.weight_norm(Standardized(3, 4, 3)),
        lambda: nn.Conv2d(3, 4, 3, dtype=torch.cfloat),
        lambda: nn.Conv1d(3, 4, 3),
        lambda: nn.ConvTranspose2d(3, 4, 3),
        lambda: nn.AdaptiveAvgPool2d(2),
        _instance_forward,
        lambda: _with_attribute("activation", nn.ReLU()),
        lambda: _with_attribute("activation", "tanh"),
        lambda: _with_attribute("flip_kernel", True),
        _quantizable,
    ],
)
def test_left_alone(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make())
    before = snapshot(model)
    torchconv.convert(model)
    assert_untouched(model, before)
    torchconv.restore(model)
    assert_untouched(model, before)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripted_modules_are_left_alone() -> None:
    model = nn.Sequential(torch.jit.script(network()), nn.MaxPool2d(1))
    before = classes(model)
    torchconv.convert(model)
    assert classes(model)[:-1] == before[:-1]
    assert type(model[1]) is torchconv.nn.MaxPool2d


class Wrapped(torch.Tensor):
    """A subclass of somebody else's, with PyTorch's default behaviour."""


@pytest.mark.filterwarnings(
    "ignore:Complex modules", "ignore::DeprecationWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(3, 4, 3), torch.randn(1, 3, 6, 6).as_subclass(Wrapped)),
        (nn.Conv2d(3, 4, 3, padding_mode="reflect"), torch.randn(1, 3, 6, 6).as_subclass(Wrapped)),
        (nn.MaxPool2d(2), torch.randn(1, 3, 6, 6).as_subclass(Wrapped)),
        (nn.MaxPool2d(2), torch.quantize_per_tensor(torch.randn(1, 3, 6, 6), 0.1, 8, torch.quint8)),
        (nn.AvgPool2d(2), torch.quantize_per_tensor(torch.randn(1, 3, 6, 6), 0.1, 8, torch.quint8)),
        (nn.AvgPool2d(2), torch.randint(9, (1, 3, 6, 6))),
    ],
)  # fmt: skip
def test_input_without_a_kernel_goes_to_torch(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = layer(x)
        actual = torchconv.convert(copy.deepcopy(layer))(x)
    assert type(actual) is type(expected)
    assert torch.equal(actual, expected)


def test_cast_to_complex_after_convert() -> None:
    model, x = torchconv.convert(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 6, 6, dtype=torch.cfloat)
    model.to(torch.cfloat)
    assert torch.equal(model(x), F.conv2d(x, model.weight, model.bias))


# --- copies and files ----------------------------------------------------------------------------


def _pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
def test_copies_can_be_restored(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, x = torchconv.convert(network().eval()), images()
    other = duplicate(model)
    assert classes(other) == classes(model)
    assert torch.equal(other(x), model(x))
    torchconv.restore(other)
    assert classes(other) == classes(network())
    assert [vars(m).keys() for m in other.modules()] == [
        vars(m).keys() for m in network().modules()
    ]
    assert type(model[0]) is torchconv.nn.Conv2d
    torch.testing.assert_close(other(x), model(x))


def test_state_dicts_are_exchangeable() -> None:
    plain, swapped = network(), torchconv.convert(network())
    assert list(plain.state_dict()) == list(swapped.state_dict())
    swapped.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(swapped.state_dict(), strict=True)
    x = images().double()
    assert_accurate(swapped.double()(x).detach(), plain.double()(x).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_reduced_precision_and_autocast(dtype: torch.dtype) -> None:
    model, x = network().eval(), images()
    with torch.autocast("cpu", dtype):
        expected = model(x)
        actual = torchconv.convert(model)(x)
    assert actual.dtype == expected.dtype == dtype
    # Both round every layer's output to dtype, so they may differ by a few of its units.
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.05)
    model.to(dtype)
    torch.testing.assert_close(model(x.to(dtype)), expected, rtol=0, atol=0.05)
