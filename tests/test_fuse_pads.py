"""torchconv.fuse and fuse_training of networks that put zeros around images themselves."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchconv
from conftest import relative_error

PADS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer": nn.ZeroPad2d((0, 1, 0, 1)),
    "both sides": nn.ZeroPad2d(2),
    "constant layer": nn.ConstantPad2d((1, 0, 2, 3), 0.0),
    "function": lambda x: F.pad(x, (0, 1, 2, 1)),
    "keywords": lambda x: F.pad(x, pad=[0, 1, 2, 1], mode="constant", value=0),
    "columns": lambda x: F.pad(x, (3, 1)),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": nn.ConstantPad2d((0, 1, 0, 1), 1.0),
    "cut": lambda x: F.pad(x, (-1, 1, 0, 0)),
    "reflected": lambda x: F.pad(x, (1, 1, 0, 1), mode="reflect"),
    "channels": lambda x: F.pad(x, (0, 0, 0, 0, 0, 0)),
}


class Padded(nn.Module):
    def __init__(self, pad: Callable[[Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.pad, self.layer, self.norm = pad, layer, nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.layer(self.pad(x))))


def pads_left(fused: torch.fx.GraphModule) -> int:
    return sum(
        node.target is F.pad
        or (
            node.op == "call_module"
            and isinstance(fused.get_submodule(str(node.target)), nn.ConstantPad2d)
        )
        for node in fused.graph.nodes
    )


def layers() -> list[nn.Module]:
    return [
        nn.Conv2d(8, 8, 3, stride=2, groups=8),
        nn.Conv2d(8, 8, 3, padding=(1, 2), bias=False),
        torchconv.nn.Conv2d(8, 8, (3, 5), padding=(0, 1, 2, 0), dilation=2),
    ]


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_zeros_go_into_the_convolution(
    pad: str, number: int, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    model = Padded(PADS[pad], layers()[number]).to(memory_format=memory_format)
    x = torch.randn(2, 8, 13, 12).to(memory_format=memory_format)
    expected = model.eval()(x)
    fused = torchconv.fuse(model)
    assert not pads_left(fused)
    with torch.no_grad():
        for other in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            for _ in range(3):
                assert relative_error(other(x), expected) < 1e-6
                assert other(x).stride() == expected.stride()
    model.train()
    trained = torchconv.fuse_training(model)
    assert not pads_left(trained)
    assert relative_error(trained(x), copy.deepcopy(model)(x)) < 1e-5


def test_gradients() -> None:
    torch.manual_seed(0)
    model = Padded(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(8, 8, 3, stride=2)).double()
    trained = torchconv.fuse_training(model)
    x = torch.randn(2, 8, 9, 9, dtype=torch.double, requires_grad=True)
    weight = model.layer.weight
    found = torch.autograd.grad(trained(x).square().sum(), (x, weight))
    expected = torch.autograd.grad(copy.deepcopy(model)(x).square().sum(), x)
    assert relative_error(found[0], expected[0]) < 1e-12
    expected = torch.autograd.grad(model(x).square().sum(), weight)
    assert relative_error(found[1], expected[0]) < 1e-12


@pytest.mark.parametrize("pad", OTHERS)
def test_other_padding_stays(pad: str) -> None:
    model = Padded(OTHERS[pad], layers()[0]).eval()
    x = torch.randn(2, 8, 13, 12)
    fused = torchconv.fuse(model)
    assert pads_left(fused) == 1
    assert relative_error(fused(x), model(x)) < 1e-6


class Several(nn.Module):
    """Zeros for two convolutions, for one that is called twice, and for one and a sum."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(x, (0, 1, 0, 1))
        if self.kind == "two":
            return self.first(y) + self.second(y)
        if self.kind == "twice":
            return self.first(self.first(y))
        if self.kind == "returned":
            return torch.cat((self.first(y).flatten(1), y.flatten(1)), 1)
        if self.kind == "image overwritten":
            x += 1
        else:
            y += 1
        return self.first(y)


@pytest.mark.parametrize(
    ("kind", "left"),
    [("two", 0), ("twice", 1), ("returned", 1), ("overwritten", 1), ("image overwritten", 1)],
)
def test_other_readers(kind: str, left: int) -> None:
    model, x = Several(kind).eval(), torch.randn(2, 4, 9, 9)
    fused = torchconv.fuse(model)
    assert pads_left(fused) == left
    assert relative_error(fused(x.clone()), model(x)) < 1e-6


@pytest.mark.parametrize("by_view", [False, True])
def test_image_that_is_overwritten_behind(by_view: bool) -> None:
    """Backward reads what the convolution has read."""

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y = self.second(F.pad(x[:, :] if by_view else x, (1, 1, 2, 0)))
            x += y
            return x

    model, x = Behind().double(), torch.randn(2, 4, 9, 9, dtype=torch.double)
    trained = torchconv.fuse_training(model)
    weight = model.first.weight
    found = torch.autograd.grad(trained(x).square().sum(), weight)
    expected = torch.autograd.grad(model(x).square().sum(), weight)
    assert relative_error(found[0], expected[0]) < 1e-12
    fused = torchconv.fuse(model.eval())
    assert not pads_left(fused)
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-12


def unpadded() -> nn.Module:
    layer = nn.Conv2d(8, 8, 3)
    layer._conv_forward = lambda x, w, b: F.conv2d(x, w, b)  # type: ignore[method-assign]
    return layer


def padded_alike() -> nn.Module:
    layer = nn.Conv2d(8, 8, 3)
    layer.padding = (1,)
    return layer


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize(
    "make", [unpadded, padded_alike, lambda: nn.Conv2d(8, 8, 3, dtype=torch.cfloat)]
)
def test_layers_that_pad_otherwise(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), make()).eval()
    x = torch.randn(2, 8, 9, 9).to(next(model.parameters()).dtype)
    for other in (torchconv.fuse(model), torchconv.fuse_training(copy.deepcopy(model).train())):
        assert pads_left(other) == 1
        assert torch.allclose(other(x), model(x), atol=1e-5)


def test_amounts_that_sizes_decide() -> None:
    """As transformers' MobileNets pad."""

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            h, w = (int(size) for size in x.shape[-2:])
            down = max(3 - 2, 0) if h % 2 == 0 else max(3 - h % 2, 0)
            across = max(3 - 2, 0) if w % 2 == 0 else max(3 - w % 2, 0)
            sides = (across // 2, across - across // 2, down // 2, down - down // 2)
            return self.layer(F.pad(x, sides, "constant", 0.0))

    model, x = Same().eval(), torch.randn(1, 4, 8, 9)
    fused = torchconv.fuse(model, x)
    assert not pads_left(fused)
    assert relative_error(fused(x), model(x)) < 1e-6
    with pytest.raises(RuntimeError, match="recorded where"):
        fused(torch.randn(1, 4, 9, 9))
