"""convert and restore: what they swap, what they leave alone, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchconv
from conftest import assert_accurate
from model_state import assert_same_step, assert_untouched, calls, classes, snapshot, step


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


def test_a_converted_layer_given_an_activation_applies_it_to_every_input() -> None:
    class Other(Tensor):
        """Which a layer without an activation leaves to PyTorch."""

    layer, x = torchconv.convert(nn.Conv2d(3, 4, 3)), images()
    layer.activation = "relu"  # type: ignore[assignment]
    got = layer(x.as_subclass(Other))
    assert torch.equal(got.as_subclass(Tensor), layer(x))


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
    assert len(graphs) == 2 and convolutions() == ["torchconv.conv2d.default"] * 2
    torchconv.restore(compiled)
    assert torch.equal(compiled(x), expected)
    if len(graphs) == 3:  # neither the first graph nor a third may call torchconv
        assert not any("torchconv" in c for c in convolutions())


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
