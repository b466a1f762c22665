"""3x3 and 5x5 convolution by Winograd's algorithm: sizes, edges, accuracy, special values and its
switch.

The problems here have at least as many channels and filters as the algorithm asks for; the truth is
F.conv2d in float64.
"""

from __future__ import annotations

import math
import subprocess
import sys
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
# ||e|| / ||truth|| on random input, that is without cancellation.
BOUND = 1.5e-6

on_formats = pytest.mark.parametrize("layout", FORMATS)
# Of the kernel.
on_sides = pytest.mark.parametrize("side", [3, 5])


@pytest.fixture(autouse=True)
def _allowed() -> Iterator[None]:
    with torchconv.backends.allow_winograd(True):
        yield


def truth(x: Tensor, w: Tensor, b: Tensor | None, padding: tuple[int, int, int, int]) -> Tensor:
    bias = None if b is None else b.double()
    return torch_F.conv2d(torch_F.pad(x.double(), padding), w.double(), bias)


def truth_of(x: Tensor, w: Tensor, arguments: dict[str, int]) -> Tensor:
    return torch_F.conv2d(x.double(), w.double(), **arguments)


def check(
    x: Tensor, w: Tensor, b: Tensor | None, padding: tuple[int, int, int, int], bound: float = BOUND
) -> None:
    """fprop and dgrad against float64."""
    x = x.detach().requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    y, exact = F.conv2d(x, w, b, padding=padding), truth(exact_x, w, b, padding)
    assert relative_error(y, exact) <= bound
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, g.double())
    assert dx.shape == x.shape
    assert relative_error(dx, exact_dx) <= bound


def around(side: int) -> tuple[int, int, int, int]:
    """The padding that keeps x's size."""
    return (side // 2,) * 4


def used(x: Tensor, w: Tensor, padding: int) -> bool:
    """Whether the switch changes any bit."""
    with torchconv.backends.allow_winograd(False):
        direct = F.conv2d(x, w, padding=padding)
    return not torch.equal(F.conv2d(x, w, padding=padding), direct)


@on_formats
@on_sides
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_it_is_used(layout: str, side: int, padding: int) -> None:
    x = in_layout(torch.randn(1, 64, 28, 28), layout)
    assert used(x, in_layout(torch.randn(64, 64, side, side), layout), padding)


@on_formats
@pytest.mark.parametrize(
    "channels, filters, size, chosen",
    [(64, 64, 4, True), (12, 12, 8, True), (64, 11, 28, False)] + [(64, 64, 3, False)],
)
def test_5x5_is_for_wide_sides_and_images(
    layout: str, channels: int, filters: int, size: int, chosen: bool
) -> None:
    x = in_layout(torch.randn(1, channels, size, size), layout)
    assert used(x, in_layout(torch.randn(filters, channels, 5, 5), layout), 2) == chosen


@on_formats
@on_sides
@pytest.mark.parametrize("height", range(1, 14))
def test_heights_and_widths(layout: str, height: int, side: int) -> None:
    """Tiles of 3x3 have 4 or 3 outputs; 1, 2 and 5 fit neither. Tiles of 5x5 have 2 or 1."""
    for width in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 30):
        x = in_layout(torch.randn(2, 64, height, width), layout)
        w = in_layout(torch.randn(64, 64, side, side), layout)
        check(x, w, None, around(side))


@on_formats
@on_sides
@pytest.mark.parametrize(
    "padding",
    [(0, 0, 0, 0), (2, 2, 2, 2), (1, 0, 0, 2), (0, 3, 5, 0), (7, 6, 9, 8), (-1, 2, 1, -2)],
    ids=str,
)
def test_padding_of_each_side(layout: str, padding: tuple[int, int, int, int], side: int) -> None:
    for size in ((11, 10), (6, 17)):
        x = in_layout(torch.randn(2, 64, *size), layout)
        check(x, in_layout(torch.randn(64, 64, side, side), layout), torch.randn(64), padding)


@on_formats
@on_sides
@pytest.mark.parametrize("dilation", [(2, 2), (1, 3), (3, 1), (5, 2), (12, 12)], ids=str)
def test_dilation(layout: str, dilation: tuple[int, int], side: int) -> None:
    """Every phase of rows and columns is a problem of its own, of two sizes at most."""
    for height, width in ((2, 9), (11, 30), (24, 13), (31, 17)):
        x = in_layout(torch.randn(2, 70, height, width), layout).requires_grad_()
        w, b = in_layout(torch.randn(75, 70, side, side), layout), torch.randn(75)
        exact_x = x.detach().double().requires_grad_()
        for padding in (dilation, (dilation[0] + 1, 0), (3, dilation[1] - 1)):
            if (
                height + 2 * padding[0] <= (side - 1) * dilation[0]
                or width + 2 * padding[1] <= (side - 1) * dilation[1]
            ):
                continue
            y = F.conv2d(x, w, b, padding=padding, dilation=dilation)
            exact = torch_F.conv2d(
                exact_x, w.double(), b.double(), padding=padding, dilation=dilation
            )
            assert relative_error(y, exact) <= BOUND
            g = torch.randn_like(y)
            (dx,) = torch.autograd.grad(y, x, g)
            (exact_dx,) = torch.autograd.grad(exact, exact_x, g.double())
            assert relative_error(dx, exact_dx) <= BOUND


@on_formats
@on_sides
def test_dilation_where_it_is_used(layout: str, side: int) -> None:
    """Also with special values, for any batch and number of threads."""
    x = in_layout(torch.randn(3, 64, 40, 29), layout)
    w = in_layout(torch.randn(64, 64, side, side), layout)
    arguments = {"padding": side // 2 * 6, "dilation": 6}
    y = F.conv2d(x, w, **arguments)
    with torchconv.backends.allow_winograd(False):
        direct = F.conv2d(x, w, **arguments)
    assert not torch.equal(y, direct)
    with threads(3):
        assert_same(F.conv2d(x, w, **arguments), y)
    assert_same(F.conv2d(x[1:2], w, **arguments), y[1:2])
    x[1, 5, 20, 20], x[1, 6, 3, 0] = math.nan, math.inf
    y = F.conv2d(x, w, **arguments)
    with torchconv.backends.allow_winograd(False):
        direct = F.conv2d(x, w, **arguments)
    assert_same(y[1], direct[1])
    same_specials(y, truth_of(x, w, arguments))


@on_formats
def test_a_dilation_that_leaves_nothing_to_share(layout: str) -> None:
    x = in_layout(torch.randn(3, 64, 40, 29), layout)
    w = in_layout(torch.randn(64, 64, 3, 3), layout)
    arguments = {"padding": 28, "dilation": 28}
    with torchconv.backends.allow_winograd(False):
        direct = F.conv2d(x, w, **arguments)
    assert_same(F.conv2d(x, w, **arguments), direct)


@on_formats
@pytest.mark.parametrize("channels", [64, 65, 79, 80, 127, 129, 200, 257])
@pytest.mark.parametrize("filters", [64, 67, 95, 96, 113])
@on_sides
def test_channels_and_filters(layout: str, channels: int, filters: int, side: int) -> None:
    x = in_layout(torch.randn(1, channels, 9, 10), layout)
    w = in_layout(torch.randn(filters, channels, side, side), layout)
    check(x, w, torch.randn(filters), around(side))


@on_formats
@on_sides
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels, filters", [(16, 16), (17, 40), (40, 17), (31, 35)])
def test_few_channels_or_filters(
    layout: str, channels: int, filters: int, flip: bool, side: int
) -> None:
    x = in_layout(torch.randn(2, channels, 12, 10), layout).requires_grad_()
    w = in_layout(torch.randn(filters, channels, side, side), layout)
    assert used(x.detach(), w, side // 2)
    check(x, w, torch.randn(filters), around(side))
    y = F.conv2d(x, w, padding=side // 2, flip_kernel=flip)
    plain = F.conv2d(x, w.flip(2, 3) if flip else w, padding=side // 2)
    g = torch.randn_like(y)
    assert_same(y, plain)
    assert_same(*(torch.autograd.grad(out, x, g)[0] for out in (y, plain)))


@on_formats
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "channels, filters, side",
    [(64, 70, 3), (261, 263, 3), (520, 144, 3), (256, 256, 3), (20, 35, 5), (261, 263, 5)],
)
def test_weights_that_are_kept(
    layout: str, flip: bool, channels: int, filters: int, side: int
) -> None:
    """In eval mode: U, but of deep layers, for few and many tiles."""
    padding = side // 2
    layer = torchconv.nn.Conv2d(channels, filters, side, padding=padding, flip_kernel=flip).eval()
    layer.weight.data = in_layout(layer.weight.data, layout)
    for n, h, w in ((1, 14, 11), (3, 30, 29), (2, 31, 30), (1, 7, 9)):
        size = (n, channels, h, w)
        x = in_layout(torch.randn(size), layout)
        expected = F.conv2d(x, layer.weight, layer.bias, padding=padding, flip_kernel=flip)
        with torch.no_grad():
            for _ in range(2):
                assert_same(layer(x), expected.detach())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@on_sides
def test_layouts(layout: str, weight_layout: str, side: int) -> None:
    x = in_layout(torch.randn(2, 72, 9, 7), layout)
    check(x, in_layout(torch.randn(80, 72, side, side), weight_layout), None, around(side))


@on_formats
@on_sides
@pytest.mark.parametrize(
    "size, filters",
    [
        ((9, 64, 7, 7), 64),
        ((2, 256, 14, 14), 320),
        ((1, 64, 61, 230), 64),
        ((4, 650, 14, 14), 80),
        ((4, 80, 14, 14), 650),
    ],
    ids=str,
)
def test_few_and_many_tiles(layout: str, side: int, size: tuple[int, ...], filters: int) -> None:
    """A task owns filters, or a block of tiles."""
    w = in_layout(torch.randn(filters, size[1], side, side), layout)
    check(in_layout(torch.randn(size), layout), w, None, around(side))


@on_formats
@pytest.mark.parametrize(
    "activation, side",
    [(f, 3) for f in ("relu", "relu6", "sigmoid", "tanh", "silu", "gelu")] + [("tanh", 5)],
)
def test_activation(layout: str, activation: str, side: int) -> None:
    """With and without a gradient: then some of them keep the pre-activation."""
    x = in_layout(torch.randn(2, 64, 10, 9), layout).requires_grad_()
    w, b = in_layout(torch.randn(70, 64, side, side) / (8 * side), layout), torch.randn(70)
    padding = side // 2
    plain = F.conv2d(x, w, b, padding=padding)
    fused = F.conv2d(x, w, b, padding=padding, activation=activation)
    expected = getattr(torch_F, activation)(plain)
    assert relative_error(fused, expected) <= 1e-6
    with torch.no_grad():
        assert_same(F.conv2d(x, w, b, padding=padding, activation=activation), fused.detach())
    g = torch.randn_like(plain)
    (dx,) = torch.autograd.grad(fused, x, g)
    (expected_dx,) = torch.autograd.grad(expected, x, g)
    assert relative_error(dx, expected_dx) <= 2e-6


@on_formats
@on_sides
@pytest.mark.parametrize("channels", [16, 64, 128, 256, 512])
def test_accuracy(layout: str, channels: int, side: int) -> None:
    """Fresh random numbers on every run."""
    seed = torch.seed()
    x = in_layout(torch.randn(2, channels, 14, 14), layout)
    w = in_layout(torch.randn(channels, channels, side, side), layout)
    print(f"seed {seed}")
    check(x, w, None, around(side))


@on_formats
@on_sides
def test_accuracy_after_relu(layout: str, side: int) -> None:
    x = in_layout(torch.randn(2, 128, 14, 14).relu(), layout)
    check(x, in_layout(torch.randn(128, 128, side, side), layout), None, around(side))


@on_formats
@on_sides
def test_accuracy_with_a_large_offset(layout: str, side: int) -> None:
    """No worse than ten times what the direct algorithm makes of it, and within the bound."""
    x = in_layout(torch.randn(2, 128, 14, 14) + 100, layout)
    w = in_layout(torch.randn(128, 128, side, side), layout)
    exact = truth(x, w, None, around(side))
    error = relative_error(F.conv2d(x, w, padding=side // 2), exact)
    with torchconv.backends.allow_winograd(False):
        direct = relative_error(F.conv2d(x, w, padding=side // 2), exact)
    assert error <= min(10 * direct, 2e-6)


def same_specials(out: Tensor, exact: Tensor) -> None:
    """NaN and each infinity in the same places, and the numbers accurate."""
    exact = exact.float()
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isposinf(), exact.isposinf())
    assert torch.equal(out.isneginf(), exact.isneginf())
    numbers = exact.isfinite()
    assert relative_error(out[numbers], exact[numbers]) <= BOUND


@on_formats
@on_sides
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, 3e38, -3.3e38])
def test_special_inputs_spread_to_their_windows_only(
    layout: str, special: float, side: int
) -> None:
    for place in ((0, 0), (3, 4), (7, 9), (13, 11)):
        x = torch.randn(3, 64, 14, 12)
        x[1, 5, place[0], place[1]] = special
        x = in_layout(x, layout).requires_grad_()
        w = in_layout(torch.randn(64, 64, side, side), layout)
        w = w if math.isinf(special) or math.isnan(special) else w * 1e-3
        exact = truth(x, w, None, around(side))
        y = F.conv2d(x, w, padding=side // 2)
        with torchconv.backends.allow_winograd(False):
            direct = F.conv2d(x, w, padding=side // 2)
        same_specials(y[0], exact[0]), same_specials(y[2], exact[2])
        assert_same(y[1], direct[1])
        (dx,) = torch.autograd.grad(y, x, x.detach())
        with torchconv.backends.allow_winograd(False):
            (direct_dx,) = torch.autograd.grad(direct, x, x.detach())
        assert_same(dx[1], direct_dx[1])


@on_formats
@on_sides
@pytest.mark.parametrize("special", [math.nan, math.inf, 3.4e38])
def test_special_weights(layout: str, special: float, side: int) -> None:
    x, w = torch.randn(2, 64, 9, 9), torch.randn(64, 64, side, side)
    w[7, 3, 1, 2] = special
    x, w = in_layout(x, layout), in_layout(w, layout)
    y = F.conv2d(x, w, padding=side // 2)
    with torchconv.backends.allow_winograd(False):
        assert_same(y, F.conv2d(x, w, padding=side // 2))


@on_formats
@on_sides
@pytest.mark.parametrize(
    "size, filters",
    [
        ((6, 256, 7, 7), 256),
        ((5, 64, 30, 31), 256),
        ((2, 160, 14, 14), 256),
        ((9, 400, 7, 7), 70),
        ((4, 20, 8, 9), 100),
        ((2, 60, 9, 14), 1100),
    ],
    ids=str,
)
def test_same_bits_for_any_threads_and_batch(
    layout: str, size: tuple[int, ...], filters: int, side: int
) -> None:
    x = in_layout(torch.randn(size), layout)
    x[1, 2, 3, 4] = math.inf  # one sample is computed again
    w, padding = in_layout(torch.randn(filters, size[1], side, side), layout), side // 2
    y = F.conv2d(x, w, padding=padding)
    for count in (2, 3, 5):
        with threads(count):
            assert_same(F.conv2d(x, w, padding=padding), y)
    for n in range(size[0]):
        alone = F.conv2d(x[n : n + 1], w, padding=padding)
        assert torch.equal(alone.nan_to_num(7), y[n : n + 1].nan_to_num(7))


def test_switch() -> None:
    allowed = torchconv.backends.winograd_allowed
    assert allowed()
    with torchconv.backends.allow_winograd(False):
        assert not allowed()
        with torchconv.backends.allow_winograd():
            assert allowed()
        assert not allowed()
    assert allowed()
    torchconv.backends.allow_winograd(False)
    assert not allowed()
    torchconv.backends.allow_winograd(True)
    with pytest.raises(ZeroDivisionError), torchconv.backends.allow_winograd(False):
        _ = 1 / 0
    assert allowed()


def test_switches_are_no_flags() -> None:
    for name in torchconv.backends.__all__:
        with pytest.raises(AttributeError, match=r"is called, not set: \w+\(False\)"):
            setattr(torchconv.backends, name, False)
    assert torchconv.backends.winograd_allowed()


def test_switch_and_compile() -> None:
    """A compiled graph obeys when it runs; the context manager works inside a function too."""
    x, w = torch.randn(1, 64, 20, 20), torch.randn(64, 64, 3, 3)

    def inside(x: Tensor) -> Tensor:
        with torchconv.backends.allow_winograd(False):
            return F.conv2d(x, w)

    compiled = torch.compile(lambda x: F.conv2d(x, w), backend="eager", fullgraph=True)
    allowed = compiled(x)
    with torchconv.backends.allow_winograd(False):
        direct = F.conv2d(x, w)
        assert torch.equal(compiled(x), direct)
    assert torch.equal(compiled(x), allowed) and not torch.equal(allowed, direct)
    function = torch.compile(inside, backend="eager")
    assert all(torch.equal(function(x), direct) for _ in range(3))
    assert torchconv.backends.winograd_allowed()


def test_switched_off_it_is_the_direct_algorithm() -> None:
    x, w = torch.randn(1, 128, 28, 28), torch.randn(128, 128, 3, 3)
    with torchconv.backends.allow_winograd(False):
        y = F.conv2d(x, w, padding=1)
    assert relative_error(y, truth(x, w, None, (1, 1, 1, 1))) <= 4e-7


def test_on_at_the_start_of_a_process() -> None:
    code = "import torchconv; print(torchconv.backends.winograd_allowed())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
