"""gradcheck and gradgradcheck of every derivative formula, in reverse, forward and batched mode.

Finite differences in float64 are the judge. The Functions of torchconv.autograd, applied directly,
must be the derivatives that the operators have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad
from torch.nn import functional as torch_F
from torch.overrides import TorchFunctionMode

import torchconv
import torchconv.functional as F
from conftest import assert_same, everywhere, in_layout
from operator_samples import ACTIVATIONS, FORMATS, OPS, distinct, samples
from torchconv.autograd import (
    AvgPool2dFunction,
    Conv2dFunction,
    MaxPool2dFunction,
    MinPool2dFunction,
)

pytestmark = everywhere

on_formats = pytest.mark.parametrize("layout", FORMATS)

CHECKED = {
    "check_forward_ad": True,
    "check_backward_ad": True,
    "check_batched_grad": True,
    "check_batched_forward_grad": True,
}
CHECKED_TWICE = {
    "check_fwd_over_rev": True,
    "check_rev_over_rev": True,
    "check_batched_grad": True,
    "gen_non_contig_grad_outputs": True,
}


def small_convolution(layout: str, groups: int = 1) -> list[Tensor]:
    x = in_layout(torch.randn(2, 2, 4, 3, dtype=torch.float64), layout)
    w = in_layout(torch.randn(2, 2 // groups, 2, 2, dtype=torch.float64), layout)
    b = torch.randn(2, dtype=torch.float64)
    return [t.requires_grad_() for t in (x, w, b)]


@on_formats
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"stride": (2, 1), "padding": (1, 0, 2, 1), "dilation": (1, 2)},
        {"groups": 2, "padding": 1},
        {"flip_kernel": True, "padding": "same", "stride": 2},
        {"groups": 2, "flip_kernel": True, "padding": (1, -1, 0, 1)},
    ],
    ids=str,
)
def test_gradcheck_conv2d(kwargs: dict[str, Any], layout: str) -> None:
    leaves = small_convolution(layout, kwargs.get("groups", 1))

    def op(*args: Tensor) -> Tensor:
        return F.conv2d(*args, **kwargs)

    assert gradcheck(op, leaves, **CHECKED)
    assert gradgradcheck(op, leaves, **CHECKED_TWICE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@on_formats
def test_gradcheck_activation(activation: str, layout: str) -> None:
    leaves = small_convolution(layout)

    def op(*args: Tensor) -> Tensor:
        return F.conv2d(*args, padding=1, stride=2, activation=activation)

    assert gradcheck(op, leaves, **CHECKED)
    assert gradgradcheck(op, leaves, **CHECKED_TWICE)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
@pytest.mark.parametrize("activation", [None, "sigmoid", "gelu"])
def test_gradcheck_of_some_operands(activation: str | None, needs: tuple[bool, ...]) -> None:
    """Every subset of input, weight and bias, in all orders of differentiation."""
    leaves = small_convolution("contiguous")
    for t, n in zip(leaves, needs, strict=True):
        t.requires_grad_(n)

    def op(*args: Tensor) -> Tensor:
        return F.conv2d(*args, padding=1, stride=2, activation=activation)

    assert gradcheck(op, leaves, check_forward_ad=True)
    assert gradgradcheck(op, leaves, check_fwd_over_rev=True)


@on_formats
@pytest.mark.parametrize("op", [F.max_pool2d, F.min_pool2d])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 1, "padding": 1},
        {"kernel_size": 2, "stride": 1, "dilation": 2, "padding": 1},
        {"kernel_size": 2, "stride": 3, "ceil_mode": True},
    ],
    ids=str,
)
def test_gradcheck_select(op: Callable[..., Any], kwargs: dict[str, Any], layout: str) -> None:
    x = in_layout(distinct(2, 2, 4, 5), layout).requires_grad_()
    for function in (
        lambda t: op(t, **kwargs),
        lambda t: op(t, **kwargs, return_indices=True)[0],
    ):
        assert gradcheck(function, (x,), **CHECKED)
        assert gradgradcheck(function, (x,), **CHECKED_TWICE)


@on_formats
@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 1, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
        {"kernel_size": 2, "stride": 3, "ceil_mode": True, "divisor_override": 3},
    ],
    ids=str,
)
def test_gradcheck_average(kwargs: dict[str, Any], layout: str) -> None:
    x = in_layout(torch.randn(2, 2, 4, 5, dtype=torch.float64), layout).requires_grad_()
    assert gradcheck(lambda t: F.avg_pool2d(t, **kwargs), (x,), **CHECKED)
    assert gradgradcheck(lambda t: F.avg_pool2d(t, **kwargs), (x,), **CHECKED_TWICE)


@on_formats
@pytest.mark.parametrize(
    "name", ["conv2d_backward", "select_pool2d_backward", "select_pool2d_gather"]
)
def test_gradcheck_of_the_other_operators(name: str, layout: str) -> None:
    """A backward is an operator with a derivative of its own."""
    for arguments in samples(name, layout):
        tensors = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]
        if name == "conv2d_backward" and arguments[8] != "none":
            continue  # differentiated through conv2d, where z follows the inputs

        def op(*leaves: Tensor) -> Any:
            full = list(arguments)  # noqa: B023
            for place, tensor in zip(places, leaves, strict=True):  # noqa: B023
                full[place] = tensor
            out = getattr(OPS, name)(*full)
            flat = out if isinstance(out, tuple) else (out,)
            return tuple(t for t in flat if t.requires_grad or t.numel() > 0)

        assert gradcheck(op, tensors, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(op, tensors, fast_mode=True)


FUNCTIONS: dict[str, tuple[Any, Callable[[], list[Any]]]] = {
    "conv2d": (
        Conv2dFunction,
        lambda: [
            *small_convolution("contiguous"),
            *((2, 1), (1, 0, 1, 1), (1, 1), 1, "none", False),
        ],
    ),
    "conv2d_relu": (
        Conv2dFunction,
        lambda: [
            *small_convolution("channels_last"),
            *((1, 1), (1, 0, 1, 1), (1, 2), 1, "relu", True),
        ],
    ),
    "conv2d_gelu": (
        Conv2dFunction,
        lambda: [
            *small_convolution("contiguous"),
            *((1, 1), (0, 0, 0, 0), (1, 1), 1, "gelu", False),
        ],
    ),
    "max_pool2d": (
        MaxPool2dFunction,
        lambda: [distinct(2, 2, 4, 5).requires_grad_(), (3, 2), (2, 1), (1, 0), (1, 2), False],
    ),
    "min_pool2d": (
        MinPool2dFunction,
        lambda: [distinct(2, 2, 4, 5).requires_grad_(), (3, 2), (2, 1), (1, 0), (1, 2), True],
    ),
    "avg_pool2d": (
        AvgPool2dFunction,
        lambda: [
            torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True),
            *((3, 2), (2, 1), (1, 0), True, False, None),
        ],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_apply(name: str) -> None:
    """torchconv.autograd's Functions, used directly, are the operators' own derivatives."""
    function, make = FUNCTIONS[name]
    arguments = make()
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    rest = arguments[len(tensors) :]

    def apply(*leaves: Tensor) -> Tensor:
        out = function.apply(*leaves, *rest)
        return out[0] if isinstance(out, tuple) else out

    def operator(*leaves: Tensor) -> Tensor:
        return getattr(OPS, name.split("_relu")[0].split("_gelu")[0])(*leaves, *rest)

    assert isinstance(function, type) and issubclass(function, torch.autograd.Function)
    y, expected = apply(*tensors), operator(*tensors)
    assert_same(y, expected)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, tensors, dy)
    for gradient, other in zip(got, torch.autograd.grad(expected, tensors, dy), strict=True):
        assert_same(gradient, other)
    assert gradcheck(apply, tensors, check_forward_ad=True)
    assert gradgradcheck(apply, tensors)


def small_calls() -> dict[str, tuple[Callable[..., Any], list[Tensor], Callable[..., Any]]]:
    """A plain function, its leaves, and the same through the operator."""
    x, w, b = small_convolution("contiguous")
    image, window = x.detach().requires_grad_(), ([2, 2], [2, 2], [0, 0])
    geometry = ([1, 1], [0, 0, 0, 0], [1, 1], 1)
    return {
        "conv2d": (F.conv2d, [x, w, b], lambda x, w, b: OPS.conv2d(x, w, b)),
        "conv2d_gelu": (
            lambda x, w: F.conv2d(x, w, activation="gelu"),
            [x, w],
            lambda x, w: OPS.conv2d(x, w, None, *geometry, "gelu", False),
        ),
        "max_pool2d": (
            lambda x: F.max_pool2d(x, 2),
            [image],
            lambda x: OPS.max_pool2d(x, *window, [1, 1], False),
        ),
        "avg_pool2d": (
            lambda x: F.avg_pool2d(x, 2),
            [image],
            lambda x: OPS.avg_pool2d(x, *window, False, True, None),
        ),
    }


@pytest.mark.parametrize("name", ["conv2d", "conv2d_gelu", "max_pool2d", "avg_pool2d"])
def test_a_recorded_call_is_the_operators(name: str) -> None:
    """The short way that a plain recorded call takes: node, gradients, hooks and modes."""
    function, leaves, operator = small_calls()[name]
    packed: list[Tensor] = []

    class Seen(TorchFunctionMode):
        names: list[str] = []

        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(*leaves)
    expected = operator(*leaves)
    assert expected.grad_fn.name().removesuffix("Backward") in y.grad_fn.name()
    assert bool(packed) == (name != "avg_pool2d")
    assert_same(y, expected)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, dy, create_graph=True)
    plain = torch.autograd.grad(function(*leaves), leaves, dy)
    for gradient, same, other in zip(
        got, plain, torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        torch.testing.assert_close(gradient, other)  # of an activation by PyTorch's formulas
        assert_same(same, other)
    assert any(gradient.requires_grad for gradient in got) == name.startswith("conv2d")
    with Seen():
        assert_same(function(*leaves), expected)
    assert any("torchconv" in name for name in Seen.names)


@pytest.mark.parametrize("way", ["recorded", "operator", "function"])
@pytest.mark.parametrize("leaves", [True, False])
def test_only_gradients_that_are_asked_for_are_computed(
    way: str, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As autograd.grad and backward name them, of tensors that all require one."""
    masks: list[tuple[bool, ...]] = []
    unrecorded = torchconv.autograd.unrecorded

    def spy(op: Any, tensors: Any, values: Any) -> Any:
        masks.append(tuple(values[-1]))
        return unrecorded(op, tensors, values)

    monkeypatch.setattr(torchconv.autograd, "unrecorded", spy)
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1], 1, "relu", False)
    call: Callable[..., Tensor] = {
        "recorded": lambda x, w, b, r: F.conv2d(x, w, b, padding=1, activation="relu", residual=r),
        "operator": lambda x, w, b, r: OPS.conv2d(x, w, b, *geometry, r),
        "function": lambda x, w, b, r: Conv2dFunction.apply(x, w, b, *geometry, r),
    }[way]
    shapes = [(1, 2, 5, 4), (3, 2, 3, 3), (3,), (1, 3, 5, 4)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    operands = inputs if leaves else [tensor * 1 for tensor in inputs]
    y = call(*operands)
    dy = torch.randn_like(y)
    whole = torch.autograd.grad(y, operands, dy, retain_graph=True)
    for count in (1, 2, 3):
        for chosen in itertools.combinations(range(4), count):
            masks.clear()
            asked = [operands[i] for i in chosen]
            got = torch.autograd.grad(y, asked, dy, retain_graph=True)
            for gradient, i in zip(got, chosen, strict=True):
                assert_same(gradient, whole[i])
            expected = tuple(i in chosen for i in range(3))
            assert masks == [expected] * any(expected)
    masks.clear()
    y.backward(dy, inputs=inputs[:1])
    assert_same(inputs[0].grad, whole[0])
    assert masks == [(True, False, False)]


def test_third_derivative() -> None:
    """d3/dt3 of a smooth loss along one direction, against PyTorch."""
    x, w, _ = small_convolution("contiguous")
    direction = torch.randn_like(w)

    def along(op: Callable[..., Tensor], t: Tensor) -> Tensor:
        return op(x, w + t * direction).pow(3).sum()

    t = torch.zeros((), dtype=torch.float64)
    ours = grad(grad(grad(lambda s: along(F.conv2d, s))))(t)
    theirs = grad(grad(grad(lambda s: along(torch_F.conv2d, s))))(t)
    torch.testing.assert_close(ours, theirs)


def test_gradient_of_a_gradient_penalty() -> None:
    """|dL/dx|^2 as part of a loss (pytorch#2106), through conv, activation and pooling."""
    model = nn.Sequential(
        torchconv.nn.Conv2d(2, 3, 3, dtype=torch.float64),
        nn.Tanh(),
        torchconv.nn.MaxPool2d(2),
        torchconv.nn.AvgPool2d(2),
    )
    twin = nn.Sequential(
        nn.Conv2d(2, 3, 3, dtype=torch.float64), nn.Tanh(), nn.MaxPool2d(2), nn.AvgPool2d(2)
    )
    twin.load_state_dict(model.state_dict())
    gradients = []
    for net in (model, twin):
        x = torch.ones(1, 2, 10, 10, dtype=torch.float64).cumsum(2).sin().requires_grad_()
        (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        gradients.append(torch.autograd.grad(dx.square().sum(), list(net.parameters())[:1]))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 16])
def test_infinity_reaches_only_the_weights_that_met_it(
    channels: int, layout: str, value: float
) -> None:
    """An image whose last pixel, seen by one tap of one window, is not finite."""
    x = torch.randn(1, channels, 4, 4)
    x[..., 3, 3] = value
    w = torch.randn(1, channels, 3, 3, requires_grad=True)
    (dw,) = torch.autograd.grad(F.conv2d(in_layout(x, layout), w), w, torch.ones(1, 1, 2, 2))
    met = torch.zeros(3, 3, dtype=torch.bool)
    met[2, 2] = True
    assert torch.equal(~torch.isfinite(dw), met.expand(1, channels, 3, 3))


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
@pytest.mark.parametrize("incoming", [float("inf"), float("nan")])
def test_no_gradient_where_the_activation_is_constant(activation: str, incoming: float) -> None:
    """Not even an infinite one, whether or not it is to be differentiated again."""
    x = torch.tensor([-4.0, 1.0, -5.0, 2.0]).view(1, 1, 1, 4).requires_grad_()
    y = F.conv2d(x, torch.ones(1, 1, 1, 1), activation=activation)
    dy = torch.full_like(y, incoming)
    once = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    again = torch.autograd.grad(y, x, dy, create_graph=True)[0]
    for dx in (once, again):
        assert torch.equal(dx[..., ::2], torch.zeros(1, 1, 1, 2))
        assert not torch.isfinite(dx[..., 1::2]).any()
