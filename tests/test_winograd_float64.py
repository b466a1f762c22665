"""Winograd's algorithms in float64: accuracy against longer sums, sizes, special values, threads.

The algorithms are those of float32 on vectors of half the lanes, so these tests go through what a
vector's length and a tile leave over; what does not depend on the type is tested in
test_winograd.py and test_winograd_wgrad.py. Sums in NumPy's longdouble, which has 11 bits more,
judge the accuracy, the direct product everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_F

import torchconv
import torchconv.functional as F
from conftest import assert_same, in_layout, relative_error
from test_determinism import threads

FORMATS = ("contiguous", "channels_last")
# ||e|| / ||truth|| on random input, of outputs, input gradients and weight gradients: float32's
# bounds, 2^29 times smaller, which is 2.8e-15 and 1.9e-15.
BOUNDS = (1.5e-6 * 2**-29, 1.5e-6 * 2**-29, 1e-6 * 2**-29)
# What the direct product may differ from the truth, on top of it.
DIRECT = 6e-16

on_formats = pytest.mark.parametrize("layout", FORMATS)
Passes = list[Tensor]


@pytest.fixture(autouse=True)
def _allowed() -> Iterator[None]:
    with torchconv.backends.allow_winograd(True):
        yield


def randn(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def passes(x: Tensor, w: Tensor, dy: Tensor, b: Tensor | None = None, **arguments: Any) -> Passes:
    """y, dx and dw."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = F.conv2d(x, w, b, **arguments)
    return [y.detach(), *torch.autograd.grad(y, (x, w), dy)]


def direct(f: Callable[[], Passes]) -> Passes:
    with torchconv.backends.allow_winograd(False):
        return f()


def check(size: tuple[int, ...], filters: int, side: int, layout: str, **arguments: Any) -> None:
    """All passes, at least one of them by Winograd's algorithms, against the direct product."""
    channels = size[1] // arguments.get("groups", 1)
    x, w = in_layout(randn(*size), layout), in_layout(randn(filters, channels, side, side), layout)
    dy = in_layout(randn(*F.conv2d(x, w, **arguments).shape), layout)
    arguments["b"] = randn(filters)
    found = passes(x, w, dy, **arguments)
    without = direct(lambda: passes(x, w, dy, **arguments))
    assert not all(torch.equal(a, b) for a, b in zip(found, without, strict=True))
    for out, truth, bound in zip(found, without, BOUNDS, strict=True):
        assert relative_error(out, truth) <= bound + DIRECT, (size, filters)


def longer_sums(x: Tensor, w: Tensor, dy: Tensor) -> Passes:
    """Of a 3x3 kernel with padding 1."""
    xs, ws, ds = (t.numpy().astype(np.longdouble) for t in (torch_F.pad(x, (1,) * 4), w, dy))
    p, q = dy.shape[2:]
    y, dx, dw = np.zeros_like(ds), np.zeros_like(xs), np.zeros_like(ws)
    for r in range(3):
        for s in range(3):
            window = (slice(None), slice(None), slice(r, r + p), slice(s, s + q))
            y += np.einsum("kc,nchw->nkhw", ws[:, :, r, s], xs[window])
            dx[window] += np.einsum("kc,nkhw->nchw", ws[:, :, r, s], ds)
            dw[:, :, r, s] = np.einsum("nkhw,nchw->kc", ds, xs[window])
    return [torch.from_numpy(t.astype(np.float64)) for t in (y, dx[:, :, 1:-1, 1:-1], dw)]


@on_formats
@pytest.mark.parametrize(
    "change", [lambda x: x, torch.relu, lambda x: x + 100], ids=["plain", "relu", "mean 100"]
)
@pytest.mark.parametrize("channels, size", [(16, 14), (64, 11), (130, 7)])
def test_accuracy(
    channels: int, size: int, change: Callable[[Tensor], Tensor], layout: str
) -> None:
    """Fresh random numbers on every run."""
    print(f"seed {torch.seed()}")
    x = in_layout(change(randn(1, channels, size, size)), layout)
    w, dy = in_layout(randn(channels, channels, 3, 3), layout), randn(1, channels, size, size)
    found = passes(x, w, in_layout(dy, layout), padding=1)
    without = direct(lambda: passes(x, w, in_layout(dy, layout), padding=1))
    for out, other, truth, bound in zip(found, without, longer_sums(x, w, dy), BOUNDS, strict=True):
        assert not torch.equal(out, other)
        assert relative_error(out, truth) <= bound


@on_formats
@pytest.mark.parametrize("side", [3, 5])
def test_sizes(layout: str, side: int) -> None:
    """Tiles of 3x3 have 4 or 3 outputs, those of 5x5 2 or 1."""
    for height in range(4, 14):
        for width in (7, 8, 9, 10, 30):
            check((2, 20, height, width), 18, side, layout, padding=side // 2)


@on_formats
@pytest.mark.parametrize("side", [3, 5])
def test_channels_and_filters(layout: str, side: int) -> None:
    for i in range(16):
        check((2, 16 + i, 9, 10), 31 - i, side, layout, padding=side // 2)
    for channels, filters in ((65, 80), (129, 67), (200, 33), (261, 263)):
        check((1, channels, 9, 7), filters, side, layout, padding=side // 2)


@on_formats
@pytest.mark.parametrize(
    "size, filters, side, arguments",
    [
        ((2, 40, 24, 13), 36, 3, {"padding": 2, "dilation": 2}),
        ((1, 36, 31, 17), 33, 3, {"padding": (3, 0), "dilation": (3, 1)}),
        ((2, 33, 15, 18), 36, 5, {"padding": 4, "dilation": 2}),
        ((2, 64, 11, 10), 64, 3, {"padding": (1, 0, 0, 2)}),
        ((1, 64, 6, 17), 64, 3, {"padding": (-1, 2, 1, -2)}),
        ((2, 34, 12, 10), 35, 3, {"padding": 1, "flip_kernel": True}),
        ((3, 96, 9, 14), 96, 3, {"padding": 1, "groups": 3}),
        ((2, 47, 29, 34), 60, 3, {"padding": 1, "stride": 2}),
        ((2, 3, 33, 38), 64, 7, {"padding": 3, "stride": 2}),
        ((1, 5, 20, 23), 40, 3, {"padding": 1}),
        ((1, 16, 90, 131), 16, 3, {"padding": 1}),
    ],
    ids=str,
)
def test_arguments(
    layout: str, size: tuple[int, ...], filters: int, side: int, arguments: dict[str, Any]
) -> None:
    check(size, filters, side, layout, **arguments)


@on_formats
@pytest.mark.parametrize("channels, filters", [(64, 70), (261, 263), (520, 144)])
def test_weights_that_are_kept(layout: str, channels: int, filters: int) -> None:
    layer = torchconv.nn.Conv2d(channels, filters, 3, padding=1, dtype=torch.float64).eval()
    layer.weight.data = in_layout(layer.weight.data, layout)
    for size in ((1, channels, 14, 11), (3, channels, 15, 14), (1, channels, 7, 9)):
        x = in_layout(randn(*size), layout)
        expected = F.conv2d(x, layer.weight, layer.bias, padding=1)
        with torch.no_grad():
            for _ in range(2):
                assert_same(layer(x), expected.detach())


@on_formats
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, 1.7e308])
def test_special_values_stay_where_they_are(layout: str, special: float) -> None:
    """The sample that has one is computed again by the direct product, and so is dw."""
    w = in_layout(randn(34, 33, 3, 3), layout)
    for operand in (0, 1):
        operands = [randn(3, 33, 14, 12), randn(3, 34, 14, 12)]
        operands[operand][1, 5, 13, 11] = special
        x, dy = (in_layout(t, layout) for t in operands)
        found = passes(x, w, dy, padding=1)
        without = direct(partial(passes, x, w, dy, padding=1))
        assert_same(found[operand][1], without[operand][1])
        assert_same(found[2], without[2])
        for n in (0, 2):
            assert relative_error(found[operand][n], without[operand][n]) <= BOUNDS[0] + DIRECT


@on_formats
@pytest.mark.parametrize(
    "size, filters",
    [((5, 64, 7, 7), 256), ((5, 64, 30, 31), 64), ((2, 160, 14, 14), 256), ((4, 20, 8, 9), 100)],
    ids=str,
)
def test_same_bits_for_any_threads_and_batch(
    layout: str, size: tuple[int, ...], filters: int
) -> None:
    x, w = in_layout(randn(*size), layout), in_layout(randn(filters, size[1], 3, 3), layout)
    dy = in_layout(randn(size[0], filters, *size[2:]), layout)
    expected = passes(x, w, dy, padding=1)
    for count in (2, 3, 5):
        with threads(count):
            for out, one in zip(passes(x, w, dy, padding=1), expected, strict=True):
                assert_same(out, one)
    for n in range(size[0]):
        y, dx, _ = passes(x[n : n + 1], w, dy[n : n + 1], padding=1)
        assert torch.equal(y, expected[0][n : n + 1]) and torch.equal(dx, expected[1][n : n + 1])


def test_second_derivatives() -> None:
    """By finite differences, through the double backward of all three operands."""
    x, w = randn(1, 16, 6, 6).requires_grad_(), (randn(16, 16, 3, 3) / 12).requires_grad_()

    def f(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1, activation="tanh")

    with torchconv.backends.allow_winograd(False):
        plain = f(x, w)
    assert not torch.equal(plain, f(x, w))
    torch.autograd.gradcheck(f, (x, w), fast_mode=True)
    torch.autograd.gradgradcheck(f, (x, w), fast_mode=True)
