"""convert and restore on parametrized layers, and the layers and inputs that stay with PyTorch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import torchconv
from dispatch_log import DispatchLog
from model_state import assert_same_step, assert_untouched, calls, classes, snapshot, step
from torchconv import _coverage

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

    model, twin, x = make(), make(), torch.randn(2, 3, 8, 9, dtype=torch.double)
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
    x = torch.randn(2, 3, 8, 9)

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


# --- what is left alone --------------------------------------------------------------------------


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Inner(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight, bias) + 1


class Marked(nn.Conv2d):
    """A subclass with something else, that nothing says is not used by what it computes."""

    scale = 1


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
        lambda: Marked(3, 4, 3),
        lambda: Pool(2),
        lambda: CalledOtherwise(3, 4, 3),
        lambda: parametrizations.weight_norm(Standardized(3, 4, 3)),
        lambda: nn.Conv2d(3, 4, 3, dtype=torch.cfloat),
        lambda: nn.Conv1d(3, 4, 3),
        lambda: nn.ConvTranspose2d(3, 4, 3),
        lambda: nn.AdaptiveAvgPool3d(2),
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


class Twice(nn.Module):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 2


class CalledOtherwise(nn.Conv2d, Twice):
    """Of two bases, of which the second comes before torch.nn.Module."""


class Built(nn.Conv2d):
    """As transformers' EfficientNet builds its depthwise convolutions: the rest is torch.nn's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, groups=channels)


class BuiltAgain(Built):
    """With nothing but a name."""


@pytest.mark.parametrize("kind", [Built, BuiltAgain])
def test_subclasses_that_are_only_built_otherwise(kind: type[Built]) -> None:
    model, x = nn.Sequential(kind(4), nn.BatchNorm2d(4)).eval(), torch.randn(2, 4, 6, 6)
    before = classes(model)
    expected, state = model(x), model.state_dict()
    weight = model[0].weight
    torchconv.convert(torchconv.convert(model))
    assert isinstance(model[0], torchconv.nn.Conv2d) and isinstance(model[0], kind)
    assert type(model[0]).__name__ == kind.__name__ and model[0].weight is weight
    assert calls(model, x).count("conv2d") == 1
    swapped = classes(model)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(other) == swapped
        torch.testing.assert_close(other(x), expected)
        other.load_state_dict(state)
        parametrize.register_parametrization(other[0], "weight", Doubled())
        parametrize.remove_parametrizations(other[0], "weight", leave_parametrized=False)
        torchconv.restore(other)
        assert classes(other) == before
        torch.testing.assert_close(other(x), expected)
    fused = torchconv.fuse(model)
    assert [type(layer) for layer in fused.children()] == [torchconv.nn.Conv2d]
    torch.testing.assert_close(fused(x), expected)
    trained = torchconv.fuse_training(model.train())
    assert type(getattr(trained, "0")) is torchconv.nn.Conv2d
    assert getattr(trained, "0").weight is weight


class AsksForClasses(nn.Module):
    """What it does with a layer depends on the class; it refuses new attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Built(4), nn.Conv2d(4, 4, 1), CalledOtherwise(4, 4, 1)])
        self.done = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "done" in vars(self) and name != "training":
            raise AttributeError(name)
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * (3 if isinstance(layer, Built) else 1)
        return x


def test_classes_that_a_model_asks_for() -> None:
    model, x = nn.Sequential(AsksForClasses()).eval(), torch.randn(2, 4, 6, 6)
    expected = model(x)
    torch.testing.assert_close(torchconv.fuse(model)(x), expected)
    torch.testing.assert_close(torchconv.fuse_training(model.train())(x), expected)
    torch.testing.assert_close(torchconv.convert(model)(x), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripted_modules_are_left_alone() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))), nn.MaxPool2d(1))
    before = classes(model)
    torchconv.convert(model)
    assert classes(model)[:-1] == before[:-1]
    assert type(model[1]) is torchconv.nn.MaxPool2d


class Wrapped(torch.Tensor):
    """A subclass of somebody else's, with PyTorch's default behaviour."""


def _image() -> Tensor:
    return torch.randn(1, 3, 6, 6)


def _quantized() -> Tensor:
    return torch.quantize_per_tensor(_image(), 0.1, 8, torch.quint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("layer", "image"),
    [
        (nn.Conv2d(3, 4, 3), lambda: _image().as_subclass(Wrapped)),
        (nn.Conv2d(3, 4, 3, padding_mode="reflect"), lambda: _image().as_subclass(Wrapped)),
        (nn.MaxPool2d(2), lambda: _image().as_subclass(Wrapped)),
        (nn.MaxPool2d(2), _quantized),
        (nn.AvgPool2d(2), _quantized),
        (nn.AvgPool2d(2), lambda: torch.randint(9, (1, 3, 6, 6))),
    ],
)
def test_input_without_a_kernel_goes_to_torch(
    layer: nn.Module, image: Callable[[], Tensor]
) -> None:
    x = image()
    with torch.no_grad():
        expected = layer(x)
        actual = torchconv.convert(copy.deepcopy(layer))(x)
    assert type(actual) is type(expected)
    assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_cast_to_complex_after_convert() -> None:
    model, x = torchconv.convert(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 6, 6, dtype=torch.cfloat)
    model.to(torch.cfloat)
    assert torch.equal(model(x), F.conv2d(x, model.weight, model.bias))


def test_device_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands in for such a device, so that the test needs no other."""
    monkeypatch.setattr(_coverage, "_DEVICES", ("meta",))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.AvgPool2d(2))
    x = torch.randn(1, 3, 14, 14)
    expected = model(x)
    log = calls(torchconv.convert(model), x)
    with torchconv.patch(), DispatchLog() as patched:
        y = model(x)
    for names in (log.names, patched.names):
        assert not [n for n in names if n.startswith("torchconv")]
    assert len(log.from_torch()) >= 3
    assert torch.equal(y, expected)
