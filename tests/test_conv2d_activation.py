"""conv2d with an activation: g(conv2d(x)) in one pass, and its derivative in backward.

The truth is PyTorch's two calls in float64. The output must be as accurate as without an
activation, which for the half types means one rounding where PyTorch's two calls make two.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import torchconv.functional as F
from conftest import (
    FLOATS,
    NORM_BOUND,
    assert_accurate,
    cpu_only,
    everywhere,
    in_layout,
    relative_error,
    threads,
)
from oracle import torch_F
from test_conv2d import FORMATS, make

pytestmark = everywhere

on_dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch_F.relu,
    "relu6": torch_F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": torch_F.silu,
    "hardswish": torch_F.hardswish,
    "gelu": torch_F.gelu,
}


@on_dtypes
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", ["3x3_s2_p1", "1x1", "groups_2", "depthwise_multiplier_2"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str, case: str, layout: str, dtype: torch.dtype) -> None:
    """g(conv2d(x)) against float64, and no further from it than PyTorch's two calls are."""
    (x, w, b), kwargs = make(case, dtype)
    leaves = [in_layout(x, layout), w, b]
    a = F.conv2d(*leaves, **kwargs, activation=name)
    g = ACTIVATIONS[name]
    theirs = g(torch_F.conv2d(*leaves, **kwargs))
    assert a.dtype == dtype and a.stride() == theirs.stride()
    doubles = [t.detach().double().requires_grad_() for t in (x, w, b)]
    truth = g(torch_F.conv2d(*doubles, **kwargs))
    assert_accurate(a, truth)
    da = torch.randn_like(a)
    got = torch.autograd.grad(a, leaves, da)
    torchs = torch.autograd.grad(theirs, leaves, da)
    expected = torch.autograd.grad(truth, doubles, da.double())
    for gradient, other, value in zip(got, torchs, expected, strict=True):
        if dtype in NORM_BOUND:
            assert_accurate(gradient, value)
            continue
        # The half types keep y or z rounded for backward, as PyTorch does, and so does its error.
        # A second rounding, of dz, may or may not happen: 1.5 covers the luck of the draw.
        limit = 1.5 * relative_error(other, value) + torch.finfo(dtype).eps
        assert relative_error(gradient, value) <= limit


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 7, 64, 1001])
def test_activation_pointwise(name: str, dtype: torch.dtype, count: int) -> None:
    """Through a 1x1 convolution by one: a range of values, some far out, and the derivative."""
    values = torch.linspace(-30, 30, count, dtype=dtype) if count > 1 else torch.full((1,), 0.3)
    # 3 and -3 are left out: PyTorch releases differ in hardswish's one-sided derivative there.
    extra = torch.tensor([0.0, -0.0, 6.0, 1e-30, -1e-30, 1e-4, -88.0, 100.0, -100.0, 5.999, 1e4])
    values = torch.cat([values.to(dtype), extra.to(dtype)])
    x = values.view(1, 1, 1, -1).requires_grad_()
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    a = F.conv2d(x, one, activation=name)
    (dx,) = torch.autograd.grad(a.sum(), x)
    double = x.detach().double().requires_grad_()
    truth = ACTIVATIONS[name](double)
    (expected,) = torch.autograd.grad(truth.sum(), double)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(a.double(), truth, rtol=8 * eps, atol=8 * eps)
    assert not a[(x == 0) & ~x.signbit() & (a == 0)].signbit().any()
    torch.testing.assert_close(dx.double(), expected, rtol=16 * eps, atol=16 * eps)


def test_gelu_in_float32() -> None:
    """No further from the exact value, anywhere, than a few units in the last place of x."""
    x = torch.cat([torch.linspace(-12, 12, 100001), torch.logspace(-30, 30, 1001)])
    x = torch.cat([x, -x]).requires_grad_()
    a = F.conv2d(x.view(1, 1, 1, -1), torch.ones(1, 1, 1, 1), activation="gelu").flatten()
    double = x.detach().double().requires_grad_()
    expected = torch_F.gelu(double)
    assert ((a - expected).abs() <= 3e-7 * double.abs()).all()
    (dx,) = torch.autograd.grad(a.sum(), x)
    (derivative,) = torch.autograd.grad(expected.sum(), double)
    assert ((dx - derivative).abs() <= 3e-7).all()


@cpu_only
@pytest.mark.parametrize("name", ["sigmoid", "silu"])
@pytest.mark.parametrize(("dtype", "end"), [(torch.float32, 87), (torch.float64, 708)], ids=str)
def test_logistic_far_out(name: str, dtype: torch.dtype, end: int) -> None:
    """To a few units in their own last place while they are normal numbers, and then 0."""
    x = torch.linspace(-1.2 * end, 1.2 * end, 20011, dtype=dtype)
    a = F.conv2d(x.view(1, 1, 1, -1), torch.ones(1, 1, 1, 1, dtype=dtype), activation=name)
    a = a.flatten()
    inside = x >= -end
    truth = (x if name == "silu" else 1.0) / (1 + torch.exp(-x.double()))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(a[inside].double(), truth[inside].double(), rtol=4 * eps, atol=0)
    assert (a[~inside].abs() <= 2 * end * torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@on_dtypes
def test_activation_of_nan_and_infinity(name: str, dtype: torch.dtype) -> None:
    """NaN stays NaN; at minus infinity the limit or NaN, as PyTorch has it; at infinity the limit,
    also of GELU, where PyTorch has NaN in some types."""
    x = torch.tensor([math.nan, 1.0, -math.inf, math.inf], dtype=dtype)
    out = F.conv2d(x.view(1, 1, 1, 4), torch.ones(1, 1, 1, 1, dtype=dtype), activation=name)
    out = out.flatten()
    torch.testing.assert_close(out[:3], ACTIVATIONS[name](x)[:3], equal_nan=True)
    assert out[3] == {"relu6": 6.0, "sigmoid": 1.0, "tanh": 1.0}.get(name, math.inf)


@pytest.mark.parametrize("way", ["kernel", "formula", "residual"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@on_dtypes
def test_gradient_at_nan_and_infinity(name: str, dtype: torch.dtype, way: str) -> None:
    """What PyTorch gives one element. Its vectors give 0 and NaN at a NaN for relu6 and hardswish,
    and this wherever the element stands."""
    # 40 elements, so that there are vectors and a rest.
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype=dtype).repeat(8)
    x = values.view(1, 1, 5, 8).requires_grad_()
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    residual = torch.zeros_like(x).requires_grad_() if way == "residual" else None
    a = F.conv2d(x, one, activation=name, residual=residual)
    of = x if residual is None else residual
    (dx,) = torch.autograd.grad(a.sum(), of, create_graph=way == "formula")
    single = [v.view(1).requires_grad_() for v in values]
    for got, v in zip(dx.flatten(), single, strict=True):
        expected = torch.autograd.grad(ACTIVATIONS[name](v), v)[0]
        torch.testing.assert_close(got, expected[0], equal_nan=True)


@cpu_only
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("channels", [1, 3, 16, 24, 100, 1000, 5000])
def test_bias_gradient_channels_last(channels: int, activation: str | None) -> None:
    """Sums over many pixels, and the same bits for every number of threads."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 37, 29).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, 2, 1, 1)
    bias = torch.randn(channels, requires_grad=True)
    y = F.conv2d(x, weight, bias, activation=activation)
    dy = (1 + torch.randn_like(y)).contiguous(memory_format=torch.channels_last)
    truth = (dy.double() * (1 if activation is None else y > 0)).sum((0, 2, 3))
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found += torch.autograd.grad(y, bias, dy, retain_graph=True)
    assert all(torch.equal(found[0], other) for other in found)
    assert relative_error(found[0], truth) < 5e-7


@on_dtypes
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", [None, "relu", "hardswish"])
@pytest.mark.parametrize("channels", [2, 24, 300, 5000])
def test_gradient_of_a_part(
    channels: int, name: str | None, layout: str, dtype: torch.dtype
) -> None:
    """The gradient is a view of channels of an image, or of something else: the same bits as of a
    copy of it."""
    x = in_layout(torch.randn(2, 3, 7, 5, dtype=dtype), layout)
    weight = torch.randn(channels, 3, 1, 1, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, weight, torch.randn(channels, dtype=dtype))]
    y = F.conv2d(*leaves, activation=name)
    whole = torch.randn(3, channels + 9, 7, 6, dtype=dtype)
    for part, gaps in ((whole[:2, :, :, :5], False), (whole[1:, :, :, 1:], True)):
        image = part if gaps else in_layout(part, layout)
        dy = image.narrow(1, 4, channels)
        for got, expected in zip(
            torch.autograd.grad(y, leaves, dy, retain_graph=True),
            torch.autograd.grad(y, leaves, dy.clone(), retain_graph=True),
            strict=True,
        ):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["relu", "relu6", "hardswish", "silu", "gelu"])
def test_activation_with_everything_else(name: str) -> None:
    """Flipped, padded by side, grouped, strided, dilated and unbatched at once."""
    x = torch.randn(4, 11, 12, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, dtype=torch.float64, requires_grad=True)
    kwargs = {"stride": (2, 1), "dilation": (1, 3), "groups": 2}
    a = F.conv2d(x, w, b, **kwargs, padding=(1, 2, 0, 3), activation=name, flip_kernel=True)
    padded = torch_F.pad(x, (1, 2, 0, 3))
    truth = ACTIVATIONS[name](torch_F.conv2d(padded, w.flip(2, 3), b, **kwargs))
    assert_accurate(a, truth)
    da = torch.randn_like(a)
    expected = torch.autograd.grad(truth, (x, w, b), da)
    for gradient, value in zip(torch.autograd.grad(a, (x, w, b), da), expected, strict=True):
        assert_accurate(gradient, value)
