"""The weight gradient in Winograd's domain: ragged sizes, accuracy, special values.

Sizes are such that the algorithm is chosen (enough channels and pixels): 3x3 and 5x5 with any
dilation, 3x3 with stride 2, and 7x7 with stride 2 of a few channels. PyTorch's matrix products in
float64 are the judge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_F

import torchconv
import torchconv.functional as F
from conftest import in_layout, relative_error
from test_determinism import threads
from test_memory import _GUARD, run

FORMATS = ("contiguous", "channels_last")
on_formats = pytest.mark.parametrize("layout", FORMATS)

# Left, right, top, bottom.
PADDINGS = ((1, 1, 1, 1), (0, 0, 0, 0), (2, 0, 1, 3), (-1, 2, 1, -2), (0, 5, 4, 0))
Sides = tuple[int, int, int, int]


@dataclass(frozen=True)
class Kernel:
    size: int = 3
    stride: int = 1
    dilation: int | tuple[int, int] = 1

    @property
    def dilations(self) -> tuple[int, int]:
        return self.dilation if isinstance(self.dilation, tuple) else (self.dilation,) * 2

    def outputs(self, size: int, dilation: int) -> int:
        return (size - (self.size - 1) * dilation - 1) // self.stride + 1


DENSE, STRIDED, STEM = Kernel(), Kernel(stride=2), Kernel(7, stride=2)
LARGE = Kernel(5)


def problem(
    size: tuple[int, int, int, int], k: int, padding: Sides, layout: str, kernel: Kernel = DENSE
) -> tuple[Tensor, Tensor]:
    """x and dz."""
    n, c, h, w = size
    dilation_h, dilation_w = kernel.dilations
    p = kernel.outputs(h + padding[2] + padding[3], dilation_h)
    q = kernel.outputs(w + padding[0] + padding[1], dilation_w)
    return in_layout(torch.randn(size), layout), in_layout(torch.randn(n, k, p, q), layout)


def wgrad(
    x: Tensor,
    dz: Tensor,
    padding: Sides,
    layout: str,
    *,
    flip: bool = False,
    kernel: Kernel = DENSE,
) -> Tensor:
    side = kernel.size
    w = in_layout(torch.zeros(dz.shape[1], x.shape[1], side, side, dtype=x.dtype), layout)
    w.requires_grad_()
    y = F.conv2d(
        x, w, stride=kernel.stride, padding=padding, dilation=kernel.dilation, flip_kernel=flip
    )
    return torch.autograd.grad(y, w, dz)[0]


def reference(x: Tensor, dz: Tensor, padding: Sides, kernel: Kernel = DENSE) -> Tensor:
    """A matrix product for each tap in x's dtype, of PyTorch's, over the pixels inside the image:
    what is not finite meets no padding, as in PyTorch's float32."""
    padded = torch_F.pad(x, padding).contiguous()
    inside = torch_F.pad(torch.ones_like(x[:, :1], dtype=torch.bool), padding)
    p, q = ((n - 1) * kernel.stride + 1 for n in dz.shape[2:])
    dilation_h, dilation_w = kernel.dilations
    rows = dz.transpose(0, 1).flatten(1)
    taps = []
    for r in range(0, kernel.size * dilation_h, dilation_h):
        for s in range(0, kernel.size * dilation_w, dilation_w):
            window = (..., slice(r, r + p, kernel.stride), slice(s, s + q, kernel.stride))
            columns, chosen = padded[window].transpose(0, 1).flatten(1), inside[window].flatten()
            taps.append(rows[:, chosen] @ columns[:, chosen].T)
    return torch.stack(taps, -1).unflatten(-1, (kernel.size, kernel.size))


@on_formats
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize(
    ("size", "k"),
    [
        ((2, 32, 8, 8), 32),
        ((2, 33, 9, 13), 47),
        ((1, 48, 14, 15), 65),
        ((3, 64, 7, 7), 63),
        ((1, 95, 6, 150), 34),
        ((1, 32, 150, 6), 40),
        ((9, 40, 22, 19), 33),
        ((2, 290, 10, 11), 270),
    ],
    ids=str,
)
def test_against_float64(
    size: tuple[int, int, int, int], k: int, padding: Sides, layout: str
) -> None:
    x, dz = problem(size, k, padding, layout)
    truth = reference(x.double(), dz.double(), padding)
    assert relative_error(wgrad(x, dz, padding, layout), truth) <= 1e-6


@on_formats
def test_every_ragged_size(layout: str) -> None:
    """All residues of rows and columns by the tile, and of the channels by some vectors."""
    for i in range(12):
        size = (2, 32 + i % 5 * 3, 6 + i % 4 + i, 17 - i)
        x, dz = problem(size, 37 - i % 4, (1, 1, 1, 1), layout)
        truth = reference(x.double(), dz.double(), (1, 1, 1, 1))
        assert relative_error(wgrad(x, dz, (1, 1, 1, 1), layout), truth) <= 1e-6, size


# Kernels other than 3x3 with stride 1, and 3x3 of a few channels: x, filters.
OTHERS = (
    (DENSE, (2, 5, 30, 41), 64),
    (DENSE, (1, 15, 19, 70), 35),
    (Kernel(dilation=2), (2, 5, 22, 19), 40),
    (STRIDED, (2, 32, 17, 16), 33),
    (STRIDED, (3, 47, 29, 34), 40),
    (STRIDED, (1, 35, 60, 131), 64),
    (STRIDED, (3, 150, 14, 15), 260),
    (Kernel(dilation=2), (2, 33, 15, 18), 36),
    (Kernel(dilation=3), (1, 64, 33, 29), 34),
    (Kernel(dilation=(1, 4)), (2, 32, 15, 23), 40),
    (Kernel(dilation=(5, 1)), (2, 40, 24, 18), 32),
    (Kernel(dilation=12), (1, 36, 65, 62), 48),
    (LARGE, (2, 8, 30, 41), 64),
    (LARGE, (1, 15, 19, 70), 35),
    (LARGE, (2, 33, 9, 13), 47),
    (LARGE, (3, 64, 7, 7), 63),
    (LARGE, (9, 40, 22, 19), 33),
    (LARGE, (2, 290, 10, 11), 150),
    (LARGE, (2, 50, 13, 11), 8),
    (Kernel(5, dilation=2), (2, 33, 15, 18), 36),
    (Kernel(5, dilation=(1, 3)), (2, 12, 13, 23), 40),
    (Kernel(5, dilation=(4, 1)), (1, 40, 24, 18), 32),
    (STEM, (2, 3, 33, 38), 64),
    (STEM, (3, 1, 64, 29), 19),
    (STEM, (1, 4, 90, 131), 50),
    (STEM, (2, 2, 21, 140), 33),
)
on_others = pytest.mark.parametrize(("kernel", "size", "k"), OTHERS, ids=str)


def around(kernel: Kernel) -> Sides:
    """The padding that keeps x's size, but for the stride."""
    h, w = (kernel.size // 2 * d for d in kernel.dilations)
    return w, w, h, h


@on_formats
@on_others
def test_other_kernels_against_float64(
    kernel: Kernel, size: tuple[int, int, int, int], k: int, layout: str
) -> None:
    for more in PADDINGS:
        padding: Sides = tuple(a + b - 1 for a, b in zip(around(kernel), more, strict=True))
        x, dz = problem(size, k, padding, layout, kernel)
        truth = reference(x.double(), dz.double(), padding, kernel)
        got = wgrad(x, dz, padding, layout, kernel=kernel)
        assert relative_error(got, truth) <= 1e-6, padding


@on_formats
@pytest.mark.parametrize("kernel", [STRIDED, STEM, LARGE, Kernel(dilation=2)], ids=str)
def test_every_ragged_size_of_other_kernels(kernel: Kernel, layout: str) -> None:
    """All residues of rows and columns by the tile, and by the phases."""
    padding = around(kernel)
    for i in range(12):
        c = 1 + i % 4 if kernel is STEM else 32 + i % 5 * 3
        size = (2, c, 14 + i % 4 + i, 27 - i)
        x, dz = problem(size, 37 - i % 4, padding, layout, kernel)
        truth = reference(x.double(), dz.double(), padding, kernel)
        assert relative_error(wgrad(x, dz, padding, layout, kernel=kernel), truth) <= 1e-6, size


@pytest.mark.parametrize("w_layout", FORMATS)
@on_formats
@on_others
def test_flipped_other_kernels_and_mixed_layouts(
    kernel: Kernel, size: tuple[int, int, int, int], k: int, layout: str, w_layout: str
) -> None:
    padding = around(kernel)
    x, dz = problem(size, k, padding, layout, kernel)
    truth = reference(x.double(), dz.double(), padding, kernel)
    assert relative_error(wgrad(x, dz, padding, w_layout, kernel=kernel), truth) <= 1e-6
    flipped = wgrad(x, dz, padding, w_layout, flip=True, kernel=kernel)
    assert relative_error(flipped, truth.flip(2, 3)) <= 1e-6


@pytest.mark.parametrize("w_layout", FORMATS)
@on_formats
def test_a_gradient_of_many_weights(layout: str, w_layout: str) -> None:
    """Which goes past the caches where whole vectors can, with filters in either order."""
    for c, k, kernel in (
        (384, 385, DENSE),
        (392, 385, DENSE),
        (395, 385, DENSE),
        (208, 205, LARGE),
    ):
        padding = around(kernel)
        x, dz = problem((1, c, 9, 7), k, padding, layout, kernel)
        truth = reference(x.double(), dz.double(), padding, kernel)
        assert relative_error(wgrad(x, dz, padding, w_layout, kernel=kernel), truth) <= 1e-6
        flipped = wgrad(x, dz, padding, w_layout, flip=True, kernel=kernel)
        assert relative_error(flipped, truth.flip(2, 3)) <= 1e-6


@pytest.mark.parametrize("w_layout", FORMATS)
@on_formats
def test_flipped_kernel_and_mixed_layouts(layout: str, w_layout: str) -> None:
    padding = (1, 1, 1, 1)
    x, dz = problem((2, 35, 12, 13), 33, padding, layout)
    truth = reference(x.double(), dz.double(), padding)
    assert relative_error(wgrad(x, dz, padding, w_layout), truth) <= 1e-6
    flipped = wgrad(x, dz, padding, w_layout, flip=True)
    assert relative_error(flipped, truth.flip(2, 3)) <= 1e-6


@on_formats
@pytest.mark.parametrize("kernel", [DENSE, LARGE], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        lambda x, dz: (x.relu(), dz),
        lambda x, dz: (x + 100, dz),
        lambda x, dz: (x.relu(), dz.abs()),
        lambda x, dz: (x * 1e-12, dz * 1e12),
    ],
    ids=["relu", "mean 100", "positive", "scaled"],
)
def test_accuracy(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], kernel: Kernel, layout: str
) -> None:
    padding = around(kernel)
    x, dz = change(*problem((4, 64, 28, 30), 64, padding, layout, kernel))
    truth = reference(x.double(), dz.double(), padding, kernel)
    assert relative_error(wgrad(x, dz, padding, layout, kernel=kernel), truth) <= 1e-6


@on_formats
def test_a_sum_over_a_million_pixels(layout: str) -> None:
    """Of one sign, where a long float32 sum would lose most."""
    x, dz = problem((4, 32, 512, 513), 32, (1, 1, 1, 1), layout)
    x, dz = x.abs(), dz.abs()
    truth = reference(x.double(), dz.double(), (1, 1, 1, 1))
    assert relative_error(wgrad(x, dz, (1, 1, 1, 1), layout), truth) <= 1e-6


@on_formats
@pytest.mark.parametrize(
    ("kernel", "c", "size"),
    [(STRIDED, 32, 500), (STEM, 3, 400), (Kernel(dilation=2), 32, 400), (LARGE, 16, 300)],
    ids=str,
)
def test_many_pixels_of_other_kernels(kernel: Kernel, c: int, size: int, layout: str) -> None:
    x, dz = problem((3, c, size, size + 1), 32, around(kernel), layout, kernel)
    x, dz = x.abs(), dz.abs()
    truth = reference(x.double(), dz.double(), around(kernel), kernel)
    got = wgrad(x, dz, around(kernel), layout, kernel=kernel)
    assert relative_error(got, truth) <= 1e-6


@on_formats
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3.0e38])
@pytest.mark.parametrize("operand", ["x", "dz"])
def test_what_is_not_finite_stays_where_it_is(operand: str, value: float, layout: str) -> None:
    """Only the taps whose sums hold the element, as in a direct sum."""
    padding = (1, 1, 1, 1)
    for at in ((0, 3, 0, 0), (1, 31, 5, 7), (1, 0, 9, 10)):
        x, dz = problem((2, 34, 10, 11), 36, padding, layout)
        (x if operand == "x" else dz)[at] = value
        got, expected = wgrad(x, dz, padding, layout), reference(x.double(), dz.double(), padding)
        finite = expected.abs() < torch.finfo(torch.float32).max
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isfinite() & finite, finite)
        assert relative_error(got[finite], expected[finite]) <= 1e-6


@on_formats
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3.0e38])
@pytest.mark.parametrize("operand", ["x", "dz"])
@pytest.mark.parametrize(
    ("kernel", "c"),
    [(DENSE, 3), (STRIDED, 34), (STEM, 3), (Kernel(dilation=2), 33), (LARGE, 34), (LARGE, 9)],
    ids=str,
)
def test_what_is_not_finite_in_other_kernels(
    kernel: Kernel, c: int, operand: str, value: float, layout: str
) -> None:
    padding = around(kernel)
    for at in ((0, 2, 0, 0), (1, 1, 5, 4), (1, 0, -1, -1)):
        x, dz = problem((4, c, 13, 12), 36, padding, layout, kernel)
        (x if operand == "x" else dz)[at] = value
        got = wgrad(x, dz, padding, layout, kernel=kernel)
        expected = reference(x.double(), dz.double(), padding, kernel)
        finite = expected.abs() < torch.finfo(torch.float32).max
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isfinite() & finite, finite)
        assert relative_error(got[finite], expected[finite]) <= 1e-6


@on_formats
def test_pixels_that_no_window_holds(layout: str) -> None:
    """A cropped border may hold anything."""
    padding = (-2, -1, -1, -3)
    x, dz = problem((2, 32, 14, 15), 32, padding, layout)
    clean = wgrad(x, dz, padding, layout)
    x[:, :, 0], x[:, :, -3:], x[..., :2], x[..., -1:] = torch.nan, torch.inf, torch.nan, torch.inf
    assert torch.equal(wgrad(x, dz, padding, layout), clean)


@on_formats
@pytest.mark.parametrize(
    ("size", "k"),
    [((2, 64, 14, 14), 64), ((5, 33, 40, 41), 70), ((16, 32, 60, 60), 32), ((1, 300, 9, 9), 290)],
    ids=str,
)
def test_threads_and_repetition(size: tuple[int, int, int, int], k: int, layout: str) -> None:
    x, dz = problem(size, k, (1, 1, 1, 1), layout)
    with threads(1):
        first = wgrad(x, dz, (1, 1, 1, 1), layout)
    for count in (1, 2, 3, 7):
        with threads(count):
            assert torch.equal(wgrad(x, dz, (1, 1, 1, 1), layout), first)


@on_formats
@pytest.mark.parametrize(
    ("kernel", "size", "k"),
    [
        (STRIDED, (2, 64, 28, 28), 64),
        (STRIDED, (4, 33, 79, 80), 40),
        (Kernel(dilation=2), (3, 40, 50, 41), 40),
        (STEM, (3, 3, 120, 131), 32),
        (LARGE, (5, 33, 28, 27), 40),
        (LARGE, (1, 300, 9, 9), 130),
    ],
    ids=str,
)
def test_threads_of_other_kernels(
    kernel: Kernel, size: tuple[int, int, int, int], k: int, layout: str
) -> None:
    x, dz = problem(size, k, around(kernel), layout, kernel)
    with threads(1):
        first = wgrad(x, dz, around(kernel), layout, kernel=kernel)
    for count in (1, 2, 3, 7):
        with threads(count):
            assert torch.equal(wgrad(x, dz, around(kernel), layout, kernel=kernel), first)


@pytest.mark.parametrize("w_layout", FORMATS)
@on_formats
def test_nine_live_taps_of_a_larger_kernel(layout: str, w_layout: str) -> None:
    """Taps that only see padding have gradient zero, and the others are not neighbours."""
    padding = (1, 0, 0, 1)
    x = in_layout(torch.randn(70, 64, 3, 3), layout)
    w = in_layout(torch.zeros(64, 64, 4, 4), w_layout).requires_grad_()
    dz = in_layout(torch.randn(70, 64, 1, 1), layout)
    got = torch.autograd.grad(F.conv2d(x, w, padding=padding), w, dz)[0]
    truth = torch.zeros(64, 64, 4, 4, dtype=torch.float64)
    truth[:, :, :3, 1:] = torch.einsum("nkij,ncrs->kcrs", dz.double(), x.double())
    assert relative_error(got, truth) <= 1e-6
    assert not got[:, :, 3].any() and not got[..., 0].any()


_GUARDED = """
cases = (
    ((2, 32, 7, 9), 32, 3, 1, 1), ((1, 45, 14, 13), 51, 3, 1, 1), ((1, 33, 5, 62), 51, 3, 1, 1),
    ((2, 33, 19, 15), 35, 3, 2, 1), ((1, 32, 8, 63), 32, 3, 2, 1), ((1, 35, 9, 17), 32, 3, 1, 2),
    ((2, 17, 7, 9), 32, 5, 1, 1), ((1, 35, 13, 15), 32, 5, 1, 2),
    ((2, 3, 23, 26), 40, 7, 2, 1), ((1, 1, 9, 61), 16, 7, 2, 1),
)
for layout, at_end, ((n, c, h, w), k, r, stride, dilation) in itertools.product(
    FORMATS, (True, False), cases
):
    pad = r // 2 * dilation
    x = torch.randn(n, c, h, w).contiguous(memory_format=layout)
    dz = torch.randn(n, k, -(-h // stride), -(-w // stride)).contiguous(memory_format=layout)
    weight = torch.zeros(k, c, r, r).contiguous(memory_format=layout)
    arguments = ([stride] * 2, [pad] * 4, [dilation] * 2, 1, "none", False, [False, True, False])
    torch.ops.torchconv.conv2d_backward(
        guarded(dz, at_end), guarded(x, at_end), weight, None, *arguments)
print("alive")
"""


def test_reads_stay_inside_the_tensors() -> None:
    """x and dz that begin or end at an unreadable page."""
    assert "alive" in run(_GUARD + _GUARDED)


@pytest.mark.parametrize("kernel", [DENSE, STRIDED, STEM, LARGE, Kernel(dilation=2)], ids=str)
def test_the_switch_holds_for_it(kernel: Kernel) -> None:
    sides = around(kernel)
    x, dz = problem((2, 3 if kernel is STEM else 64, 20, 20), 64, sides, "contiguous", kernel)
    fast = wgrad(x, dz, sides, "contiguous", kernel=kernel)
    with torchconv.backends.allow_winograd(False):
        direct = wgrad(x, dz, sides, "contiguous", kernel=kernel)
    assert not torch.equal(fast, direct)
    assert relative_error(direct, reference(x.double(), dz.double(), sides, kernel)) < 5e-7
