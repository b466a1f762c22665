"""torchconv.fuse and fuse_training of networks whose Python asks for sizes, by an example."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchconv
from conftest import relative_error


def unit(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


@dataclass
class Output(OrderedDict):
    """As transformers has them: a dict with attributes."""

    logits: Any = None
    features: Any = None


class Checked(nn.Module):
    """A branch that a size decides, defaults, and a result with attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = unit(3, 8), nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor, labels: Tensor | None = None, features: Any = None) -> Any:
        if images.shape[1] != 3:
            raise ValueError("expected 3 channels")
        found = self.body(images)
        logits = self.head(found)
        if labels is not None:
            return F.cross_entropy(logits, labels)
        return Output(logits=logits, features=found if features is not None else None)


class Chunks(nn.Module):
    """Loops over chunks, as YOLO's networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = unit(3, 8), unit(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        parts = list(self.first(images).chunk(2, 1))
        parts.append(parts[-1] + self.second(parts[-1]))
        return torch.cat(parts, 1)


class Ints(nn.Module):
    """Sizes that become ints of Python, and ranges of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = unit(3, 8), unit(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        size = int(math.ceil(images.shape[-1] / 4) * 4)
        x = self.first(F.interpolate(images, size=(size, size)))
        for _ in range(len(x.shape) - 2):
            x = self.second(x)
        return x


class Halves(nn.Conv2d):
    """A layer with a result that may be None."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input), None


class MaybeNone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.halves, self.body = Halves(3, 4, 3), unit(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        high, low = self.halves(images)
        return self.body(high) if low is None else self.body(high + low)


def result_of(model: Callable[..., Any], *inputs: Any) -> Tensor:
    out = model(*inputs)
    tensor: Tensor = out if isinstance(out, Tensor) else out.logits
    return tensor


@pytest.mark.parametrize("kind", [Checked, Chunks, Ints, MaybeNone])
def test_inference(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    images = torch.randn(2, 3, 13, 13)
    before = copy.deepcopy(model.state_dict())
    fused = torchconv.fuse(model, images)
    assert not [layer for layer in fused.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for batch in (images, images[:1], torch.randn(5, 3, 13, 13)):
            for _ in range(3):  # the chain's plan too
                assert relative_error(result_of(fused, batch), result_of(model, batch)) < 1e-6
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert torch.equal(result_of(other, images), result_of(fused, images))


@pytest.mark.parametrize("kind", [Checked, Chunks, Ints, MaybeNone])
def test_training(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().double().train()
    images = torch.randn(2, 3, 13, 13, dtype=torch.double)
    expected_model = copy.deepcopy(model)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    fused = torchconv.fuse_training(model, images)
    # The statistics, which it shares, have not moved.
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    expected, got = result_of(expected_model, images), result_of(fused, images)
    assert relative_error(got, expected) < 1e-12
    expected.square().sum().backward()
    got.square().sum().backward()
    gradients = dict(fused.named_parameters())
    for name, parameter in expected_model.named_parameters():
        assert parameter.grad is not None
        found = gradients[name].grad
        assert found is not None
        assert torch.allclose(found, parameter.grad, rtol=1e-9, atol=1e-10), name
    for name, value in expected_model.named_buffers():
        assert torch.allclose(dict(fused.named_buffers())[name], value)


def test_other_way_raises() -> None:
    checked = torchconv.fuse(Checked().eval(), torch.randn(1, 3, 8, 8))
    with torch.no_grad(), pytest.raises(RuntimeError, match="recorded where"):
        checked(torch.randn(1, 4, 8, 8))
    sizes = torchconv.fuse(Ints().eval(), torch.randn(1, 3, 8, 8))
    with torch.no_grad(), pytest.raises(RuntimeError, match="gave 8, which now gives 12"):
        sizes(torch.randn(1, 3, 9, 9))


def test_result_with_attributes() -> None:
    model, images = Checked().eval(), torch.randn(1, 3, 8, 8)
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    plain = torchconv.fuse(model, images)
    with_features = torchconv.fuse(model, images, None, True)
    with_loss = torchconv.fuse(model, images, labels)
    with torch.no_grad():
        assert isinstance(plain(images), Output)
        assert plain(images).features is None
        found = with_features(images, None, True)
        assert relative_error(found.features, model(images, features=True).features) < 1e-6
        assert relative_error(with_loss(images, labels), model(images, labels)) < 1e-6
    with torch.no_grad(), pytest.raises(TypeError):
        plain(images, labels)


def test_errors() -> None:
    images = torch.randn(1, 3, 8, 8)
    for model in (Checked(), Chunks(), Ints()):
        with pytest.raises((TypeError, torch.fx.proxy.TraceError), match="example of the inputs"):
            torchconv.fuse(model.eval())
    with pytest.raises(TypeError, match="too many positional arguments"):
        torchconv.fuse(Chunks().eval(), images, images)

    class Data(Chunks):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images if images.sum() > 0 else -images)

    with pytest.raises(torch.fx.proxy.TraceError, match="from the example's sizes alone"):
        torchconv.fuse(Data().eval(), images)

    class Squeezed(Chunks):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.mean((2, 3), keepdim=True))

    with pytest.raises(torch.fx.proxy.TraceError, match="Expected more than 1 value per channel"):
        torchconv.fuse_training(Squeezed().train(), images)  # no statistics of one value
    with pytest.raises(ValueError, match="expected 3 channels"):
        torchconv.fuse(Checked().eval(), torch.randn(1, 5, 8, 8))
