"""3x3 convolution by Winograd's algorithm: sizes, edges, accuracy, special values and its switch.

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


def used(x: Tensor, w: Tensor, padding: int) -> bool:
    """Whether the switch changes any bit."""
    with torchconv.backends.allow_winograd(False):
        direct = F.conv2d(x, w, padding=padding)
    return not torch.equal(F.conv2d(x, w, padding=padding), direct)


@on_formats
@pytest.mark.parametrize("padding", [0, 1])
def test_it_is_used(layout: str, padding: int) -> None:
    x = in_layout(torch.randn(1, 64, 28, 28), layout)
    assert used(x, in_layout(torch.randn(64, 64, 3, 3), layout), padding)


@on_formats
@pytest.mark.parametrize("height", range(1, 14))
def test_heights_and_widths(layout: str, height: int) -> None:
    """Tiles have 4 or 3 outputs; 1, 2 and 5 fit neither."""
    for width in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 30):
        x = in_layout(torch.randn(2, 64, height, width), layout)
        w = in_layout(torch.randn(64, 64, 3, 3), layout)
        check(x, w, None, (1, 1, 1, 1))


@on_formats
@pytest.mark.parametrize(
    "padding",
    [(0, 0, 0, 0), (2, 2, 2, 2), (1, 0, 0, 2), (0, 3, 5, 0), (7, 6, 9, 8), (-1, 2, 1, -2)],
    ids=str,
)
def test_padding_of_each_side(layout: str, padding: tuple[int, int, int, int]) -> None:
    for size in ((11, 10), (4, 17)):
        x = in_layout(torch.randn(2, 64, *size), layout)
        check(x, in_layout(torch.randn(64, 64, 3, 3), layout), torch.randn(64), padding)


@on_formats
@pytest.mark.parametrize("dilation", [(2, 2), (1, 3), (3, 1), (5, 2), (12, 12)], ids=str)
def test_dilation(layout: str, dilation: tuple[int, int]) -> None:
    """Every phase of rows and columns is a problem of its own, of two sizes at most."""
    for height, width in ((2, 9), (11, 30), (24, 13), (31, 17)):
        x = in_layout(torch.randn(2, 70, height, width), layout).requires_grad_()
        w, b = in_layout(torch.randn(75, 70, 3, 3), layout), torch.randn(75)
        exact_x = x.detach().double().requires_grad_()
        for padding in (dilation, (dilation[0] + 1, 0), (3, dilation[1] - 1)):
            if (
                height + 2 * padding[0] <= 2 * dilation[0]
                or width + 2 * padding[1] <= 2 * dilation[1]
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
def test_dilation_where_it_is_used(layout: str) -> None:
    """Also with special values, for any batch and number of threads; and not where a dilation
    leaves nothing to share."""
    x = in_layout(torch.randn(3, 64, 40, 29), layout)
    w = in_layout(torch.randn(64, 64, 3, 3), layout)
    arguments = {"padding": 6, "dilation": 6}
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
    arguments = {"padding": 28, "dilation": 28}
    with torchconv.backends.allow_winograd(False):
        direct = F.conv2d(x, w, **arguments)
    assert_same(F.conv2d(x, w, **arguments), direct)


@on_formats
@pytest.mark.parametrize("channels", [64, 65, 79, 80, 127, 129, 200, 257])
@pytest.mark.parametrize("filters", [64, 67, 95, 96, 113])
def test_channels_and_filters(layout: str, channels: int, filters: int) -> None:
    x = in_layout(torch.randn(1, channels, 9, 10), layout)
    w = in_layout(torch.randn(filters, channels, 3, 3), layout)
    check(x, w, torch.randn(filters), (1, 1, 1, 1))


@on_formats
@pytest.mark.parametrize("channels, filters", [(16, 16), (17, 40), (40, 17), (31, 35)])
def test_few_channels_or_filters(layout: str, channels: int, filters: int) -> None:
    x = in_layout(torch.randn(2, channels, 12, 10), layout)
    w = in_layout(torch.randn(filters, channels, 3, 3), layout)
    assert used(x, w, 1)
    check(x, w, torch.randn(filters), (1, 1, 1, 1))


@on_formats
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels, filters", [(64, 70), (261, 263), (520, 144)])
def test_weights_that_are_kept(layout: str, flip: bool, channels: int, filters: int) -> None:
    """In eval mode: U, or the gathered taps of deep layers, for few and many tiles."""
    layer = torchconv.nn.Conv2d(channels, filters, 3, padding=1, flip_kernel=flip).eval()
    layer.weight.data = in_layout(layer.weight.data, layout)
    for size in ((1, channels, 14, 11), (3, channels, 30, 29), (1, channels, 7, 9)):
        x = in_layout(torch.randn(size), layout)
        expected = F.conv2d(x, layer.weight, layer.bias, padding=1, flip_kernel=flip)
        with torch.no_grad():
            for _ in range(2):
                assert_same(layer(x), expected.detach())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
def test_layouts(layout: str, weight_layout: str) -> None:
    x = in_layout(torch.randn(2, 72, 9, 7), layout)
    check(x, in_layout(torch.randn(80, 72, 3, 3), weight_layout), None, (1, 1, 1, 1))


@on_formats
@pytest.mark.parametrize("size", [(9, 64, 7, 7), (2, 256, 14, 14), (1, 64, 61, 230)], ids=str)
def test_few_and_many_tiles(layout: str, size: tuple[int, ...]) -> None:
    filters = 320 if size[1] == 256 else 64
    w = in_layout(torch.randn(filters, size[1], 3, 3), layout)
    check(in_layout(torch.randn(size), layout), w, None, (1, 1, 1, 1))


def test_flipped_kernel() -> None:
    x, w = torch.randn(1, 64, 12, 12), torch.randn(64, 64, 3, 3)
    flipped = F.conv2d(x, w, padding=1, flip_kernel=True)
    assert_same(flipped, F.conv2d(x, w.flip(2, 3), padding=1))


@on_formats
@pytest.mark.parametrize("activation", ["relu", "relu6", "sigmoid", "tanh", "silu", "gelu"])
def test_activation(layout: str, activation: str) -> None:
    """With and without a gradient: then some of them keep the pre-activation."""
    x = in_layout(torch.randn(2, 64, 10, 9), layout).requires_grad_()
    w, b = in_layout(torch.randn(70, 64, 3, 3) / 24, layout), torch.randn(70)
    plain = F.conv2d(x, w, b, padding=1)
    fused = F.conv2d(x, w, b, padding=1, activation=activation)
    expected = getattr(torch_F, activation)(plain)
    assert relative_error(fused, expected) <= 1e-6
    with torch.no_grad():
        assert_same(F.conv2d(x, w, b, padding=1, activation=activation), fused.detach())
    g = torch.randn_like(plain)
    (dx,) = torch.autograd.grad(fused, x, g)
    (expected_dx,) = torch.autograd.grad(expected, x, g)
    assert relative_error(dx, expected_dx) <= 2e-6


@on_formats
@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_accuracy(layout: str, channels: int) -> None:
    """Fresh random numbers on every run."""
    seed = torch.seed()
    x = in_layout(torch.randn(2, channels, 14, 14), layout)
    w = in_layout(torch.randn(channels, channels, 3, 3), layout)
    print(f"seed {seed}")
    check(x, w, None, (1, 1, 1, 1))


@on_formats
def test_accuracy_after_relu(layout: str) -> None:
    x = in_layout(torch.randn(2, 128, 14, 14).relu(), layout)
    check(x, in_layout(torch.randn(128, 128, 3, 3), layout), None, (1, 1, 1, 1))


@on_formats
def test_accuracy_with_a_large_offset(layout: str) -> None:
    """No worse than ten times what the direct algorithm makes of it."""
    x = in_layout(torch.randn(2, 128, 14, 14) + 100, layout)
    w = in_layout(torch.randn(128, 128, 3, 3), layout)
    exact = truth(x, w, None, (1, 1, 1, 1))
    error = relative_error(F.conv2d(x, w, padding=1), exact)
    with torchconv.backends.allow_winograd(False):
        direct = relative_error(F.conv2d(x, w, padding=1), exact)
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
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, 3e38, -3.3e38])
def test_special_inputs_spread_to_their_windows_only(layout: str, special: float) -> None:
    for place in ((0, 0), (3, 4), (7, 9), (13, 11)):
        x = torch.randn(3, 64, 14, 12)
        x[1, 5, place[0], place[1]] = special
        x = in_layout(x, layout).requires_grad_()
        w = in_layout(torch.randn(64, 64, 3, 3), layout)
        w = w if math.isinf(special) or math.isnan(special) else w * 1e-3
        exact = truth(x, w, None, (1, 1, 1, 1))
        y = F.conv2d(x, w, padding=1)
        with torchconv.backends.allow_winograd(False):
            direct = F.conv2d(x, w, padding=1)
        same_specials(y[0], exact[0]), same_specials(y[2], exact[2])
        assert_same(y[1], direct[1])
        (dx,) = torch.autograd.grad(y, x, x.detach())
        with torchconv.backends.allow_winograd(False):
            (direct_dx,) = torch.autograd.grad(direct, x, x.detach())
        assert_same(dx[1], direct_dx[1])


@on_formats
@pytest.mark.parametrize("special", [math.nan, math.inf, 3.4e38])
def test_special_weights(layout: str, special: float) -> None:
    x, w = torch.randn(2, 64, 9, 9), torch.randn(64, 64, 3, 3)
    w[7, 3, 1, 2] = special
    x, w = in_layout(x, layout), in_layout(w, layout)
    y = F.conv2d(x, w, padding=1)
    with torchconv.backends.allow_winograd(False):
        assert_same(y, F.conv2d(x, w, padding=1))


@on_formats
@pytest.mark.parametrize("size", [(6, 256, 7, 7), (5, 64, 30, 31), (2, 160, 14, 14)], ids=str)
def test_same_bits_for_any_threads_and_batch(layout: str, size: tuple[int, ...]) -> None:
    x = in_layout(torch.randn(size), layout)
    x[1, 2, 3, 4] = math.inf  # one sample is computed again
    w = in_layout(torch.randn(256, size[1], 3, 3), layout)
    y = F.conv2d(x, w, padding=1)
    for count in (2, 3, 5):
        with threads(count):
            assert_same(F.conv2d(x, w, padding=1), y)
    for n in range(size[0]):
        alone = F.conv2d(x[n : n + 1], w, padding=1)
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
