"""Stride 2 by Winograd: 3x3 kernels, and 7x7 ones of few channels, fprop and dgrad.

Sizes, edges, accuracy, special values, and that neither batch nor threads change a bit. The
problems here are ones that the algorithm takes; the truth is F.conv2d in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_F

import torchconv
import torchconv.functional as F
from conftest import LAYOUTS, assert_same, in_layout, relative_error
from test_determinism import threads

FORMATS = ("contiguous", "channels_last")
Sides = tuple[int, int, int, int]
SAME3, SAME7 = (1, 1, 1, 1), (3, 3, 3, 3)
# ||e|| / ||truth|| on random input, that is without cancellation.
BOUND = 1.5e-6
# With vectors of four floats a panel has no room for the four phases of three channels.
STEM_CHANNELS = 2 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 3

on_formats = pytest.mark.parametrize("layout", FORMATS)


@pytest.fixture(autouse=True)
def _allowed() -> Iterator[None]:
    with torchconv.backends.allow_winograd(True):
        yield


def truth(x: Tensor, w: Tensor, b: Tensor | None, padding: Sides) -> Tensor:
    bias = None if b is None else b.double()
    return torch_F.conv2d(torch_F.pad(x.double(), padding), w.double(), bias, stride=2)


def check(x: Tensor, w: Tensor, b: Tensor | None, padding: Sides, flip: bool = False) -> None:
    """fprop and dgrad against float64."""
    x = x.detach().requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    y = F.conv2d(x, w, b, stride=2, padding=padding, flip_kernel=flip)
    exact = truth(exact_x, w.flip(2, 3) if flip else w, b, padding)
    assert relative_error(y, exact) <= BOUND
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, g.double())
    assert dx.shape == x.shape
    assert relative_error(dx, exact_dx) <= BOUND


def problem(layout: str, stem: bool, *size: int, filters: int = 64) -> tuple[Tensor, Tensor, Sides]:
    """x of N, H, W with the weights and padding of a 3x3 layer or of a stem."""
    channels, kernel = (STEM_CHANNELS, 7) if stem else (64, 3)
    x = in_layout(torch.randn(size[0], channels, *size[1:]), layout)
    w = in_layout(torch.randn(filters, channels, kernel, kernel), layout)
    return x, w, SAME7 if stem else SAME3


@on_formats
@pytest.mark.parametrize("stem", [False, True])
def test_it_is_used(layout: str, stem: bool) -> None:
    """The switch changes bits of fprop and dgrad."""
    x, w, padding = problem(layout, stem, 1, 28, 28)
    x.requires_grad_()
    y = F.conv2d(x, w, stride=2, padding=padding)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    with torchconv.backends.allow_winograd(False):
        direct = F.conv2d(x, w, stride=2, padding=padding)
        (direct_dx,) = torch.autograd.grad(direct, x, y.detach())
    assert not torch.equal(y, direct)
    assert not torch.equal(dx, direct_dx)


@on_formats
@pytest.mark.parametrize("height", [1, 2, 3, 5, 7, 8, 10, 11, 13, 14, 16, 19, 24])
def test_heights_and_widths(layout: str, height: int) -> None:
    """Tiles have 8 or 6 pixels; both parities of either, and sizes that fit neither."""
    for width in (1, 3, 6, 7, 8, 9, 14, 15, 30, 61):
        for stem in (False, True):
            x, w, padding = problem(layout, stem, 2, height, width)
            check(x, w, None, padding)


@on_formats
@pytest.mark.parametrize("kernel", [(3, 3), (7, 7), (6, 7), (7, 6)], ids=str)
@pytest.mark.parametrize(
    "padding",
    [(0, 0, 0, 0), (2, 2, 2, 2), (1, 0, 0, 2), (0, 3, 5, 0), (7, 6, 9, 8), (-1, 2, 1, -2)],
    ids=str,
)
def test_padding_of_each_side(layout: str, kernel: tuple[int, int], padding: Sides) -> None:
    channels = STEM_CHANNELS if max(kernel) > 3 else 64
    w = in_layout(torch.randn(64, channels, *kernel), layout)
    for size in ((17, 18), (12, 31)):
        x = in_layout(torch.randn(2, channels, *size), layout)
        for flip in (False, True):
            check(x, w, torch.randn(64), padding, flip)


@on_formats
@pytest.mark.parametrize("channels", [64, 65, 80, 127, 129, 257])
@pytest.mark.parametrize("filters", [64, 67, 96, 113])
def test_channels_and_filters(layout: str, channels: int, filters: int) -> None:
    x = in_layout(torch.randn(1, channels, 17, 15), layout)
    w = in_layout(torch.randn(filters, channels, 3, 3), layout)
    check(x, w, torch.randn(filters), SAME3)


@on_formats
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("filters", [33, 64, 150])
def test_stem_channels_and_filters(layout: str, channels: int, filters: int) -> None:
    x = in_layout(torch.randn(2, channels, 27, 42), layout)
    w = in_layout(torch.randn(filters, channels, 7, 7), layout)
    check(x, w, torch.randn(filters), SAME7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
def test_layouts(layout: str, weight_layout: str) -> None:
    for stem in (False, True):
        x, w, padding = problem(layout, stem, 2, 13, 17)
        check(x, in_layout(w, weight_layout), None, padding)


@on_formats
@pytest.mark.parametrize("size", [(9, 64, 14, 14), (2, 256, 28, 28), (1, 64, 61, 230)], ids=str)
def test_few_and_many_tiles(layout: str, size: tuple[int, ...]) -> None:
    filters = 320 if size[1] == 256 else 64
    w = in_layout(torch.randn(filters, size[1], 3, 3), layout)
    check(in_layout(torch.randn(size), layout), w, None, SAME3)


@on_formats
@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activation(layout: str, stem: bool, activation: str) -> None:
    x, w, padding = problem(layout, stem, 2, 21, 18, filters=70)
    b = torch.randn(70)
    plain = F.conv2d(x, w, b, stride=2, padding=padding)
    fused = F.conv2d(x, w, b, stride=2, padding=padding, activation=activation)
    assert relative_error(fused, getattr(torch_F, activation)(plain)) <= 1e-6


@on_formats
@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_accuracy(layout: str, channels: int) -> None:
    """Fresh random numbers on every run."""
    print(f"seed {torch.seed()}")
    x = in_layout(torch.randn(2, channels, 14, 14), layout)
    check(x, in_layout(torch.randn(channels, channels, 3, 3), layout), None, SAME3)


@on_formats
@pytest.mark.parametrize("stem", [False, True])
def test_accuracy_with_a_large_offset(layout: str, stem: bool) -> None:
    """No worse than ten times what the direct algorithm makes of it."""
    x, w, padding = problem(layout, stem, 2, 28, 28)
    x = in_layout(x + 100, layout)
    exact = truth(x, w, None, padding)
    error = relative_error(F.conv2d(x, w, stride=2, padding=padding), exact)
    with torchconv.backends.allow_winograd(False):
        direct = relative_error(F.conv2d(x, w, stride=2, padding=padding), exact)
    assert error <= 10 * direct


def same_specials(out: Tensor, exact: Tensor) -> None:
    """NaN and each infinity in the same places, and the numbers accurate."""
    exact = exact.float()
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isposinf(), exact.isposinf())
    assert torch.equal(out.isneginf(), exact.isneginf())
    numbers = exact.isfinite()
    assert relative_error(out[numbers], exact[numbers]) <= BOUND


@on_formats
@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_special_inputs_spread_to_their_windows_only(
    layout: str, stem: bool, special: float
) -> None:
    for place in ((0, 0), (3, 4), (7, 9), (27, 22)):
        x, w, padding = problem(layout, stem, 3, 28, 23)
        x[1, 1, place[0], place[1]] = special
        x.requires_grad_()
        exact = truth(x, w, None, padding)
        y = F.conv2d(x, w, stride=2, padding=padding)
        g = torch.randn_like(y)
        g[1, 5, place[0] // 2, place[1] // 2] = special
        (dx,) = torch.autograd.grad(y, x, g)
        with torchconv.backends.allow_winograd(False):
            direct = F.conv2d(x, w, stride=2, padding=padding)
            (direct_dx,) = torch.autograd.grad(direct, x, g)
        same_specials(y[0].detach(), exact[0].detach())
        same_specials(y[2].detach(), exact[2].detach())
        assert_same(y[1].detach(), direct[1].detach())
        same_specials(dx[1], direct_dx[1])
        assert relative_error(dx[0], direct_dx[0]) <= BOUND


@on_formats
@pytest.mark.parametrize("stem", [False, True])
def test_special_weights(layout: str, stem: bool) -> None:
    x, w, padding = problem(layout, stem, 2, 19, 18)
    w[7, 1, 1, 2] = math.inf
    y = F.conv2d(x, w, stride=2, padding=padding)
    with torchconv.backends.allow_winograd(False):
        assert_same(y, F.conv2d(x, w, stride=2, padding=padding))


@on_formats
@pytest.mark.parametrize("size", [(6, 256, 14, 14), (5, 64, 60, 61), (4, 3, 61, 90)], ids=str)
def test_same_bits_for_any_threads_and_batch(layout: str, size: tuple[int, ...]) -> None:
    x = in_layout(torch.randn(size), layout)
    x[1, 2, 3, 4] = math.inf  # one sample is computed again
    x.requires_grad_()
    kernel, padding = (7, SAME7) if size[1] == 3 else (3, SAME3)
    w = in_layout(torch.randn(256, size[1], kernel, kernel), layout)

    def both(x: Tensor, g: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = F.conv2d(x, w, stride=2, padding=padding)
        (dx,) = torch.autograd.grad(y, x, y.detach() if g is None else g)
        return y.detach(), dx

    y, dx = both(x)
    for count in (2, 3, 5):
        with threads(count):
            for out, expected in zip(both(x), (y, dx), strict=True):
                assert_same(out, expected)
    for n in range(size[0]):
        alone = x.detach()[n : n + 1].requires_grad_()
        for out, expected in zip(both(alone), (y, dx), strict=True):
            assert torch.equal(out.nan_to_num(7), expected[n : n + 1].nan_to_num(7))
