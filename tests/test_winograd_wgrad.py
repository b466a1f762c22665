"""The weight gradient of 3x3 kernels in Winograd's domain: ragged sizes, accuracy, special values.

Sizes are such that the algorithm is chosen (float32, 3x3, stride 1, enough channels and pixels).
float64, which never takes it, is the judge.
"""

from __future__ import annotations

from collections.abc import Callable

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


def problem(
    size: tuple[int, int, int, int], k: int, padding: Sides, layout: str
) -> tuple[Tensor, Tensor]:
    """x and dz."""
    n, c, h, w = size
    p, q = h + padding[2] + padding[3] - 2, w + padding[0] + padding[1] - 2
    return in_layout(torch.randn(size), layout), in_layout(torch.randn(n, k, p, q), layout)


def wgrad(x: Tensor, dz: Tensor, padding: Sides, layout: str, *, flip: bool = False) -> Tensor:
    w = in_layout(torch.zeros(dz.shape[1], x.shape[1], 3, 3, dtype=x.dtype), layout)
    w.requires_grad_()
    y = F.conv2d(x, w, padding=padding, flip_kernel=flip)
    return torch.autograd.grad(y, w, dz)[0]


def reference(x: Tensor, dz: Tensor, padding: Sides) -> Tensor:
    """A matrix product for each tap in x's dtype, of PyTorch's."""
    padded = torch_F.pad(x, padding).contiguous()
    p, q = dz.shape[2:]
    rows = dz.transpose(0, 1).flatten(1)
    taps = [
        rows @ padded[:, :, r : r + p, s : s + q].transpose(0, 1).flatten(1).T
        for r in range(3)
        for s in range(3)
    ]
    return torch.stack(taps, -1).unflatten(-1, (3, 3))


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
def test_accuracy(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], layout: str) -> None:
    x, dz = change(*problem((4, 64, 28, 30), 64, (1, 1, 1, 1), layout))
    truth = reference(x.double(), dz.double(), (1, 1, 1, 1))
    assert relative_error(wgrad(x, dz, (1, 1, 1, 1), layout), truth) <= 1e-6


@on_formats
def test_a_sum_over_a_million_pixels(layout: str) -> None:
    """Of one sign, where a long float32 sum would lose most."""
    x, dz = problem((4, 32, 512, 513), 32, (1, 1, 1, 1), layout)
    x, dz = x.abs(), dz.abs()
    truth = reference(x.double(), dz.double(), (1, 1, 1, 1))
    assert relative_error(wgrad(x, dz, (1, 1, 1, 1), layout), truth) <= 1e-6


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
for layout, at_end, (n, c, h, w), k in itertools.product(
    FORMATS, (True, False), ((2, 32, 7, 9), (1, 45, 14, 13), (1, 33, 5, 62)), (32, 51)
):
    x = torch.randn(n, c, h, w).contiguous(memory_format=layout)
    dz = torch.randn(n, k, h, w).contiguous(memory_format=layout)
    weight = torch.zeros(k, c, 3, 3).contiguous(memory_format=layout)
    arguments = ([1, 1], [1, 1, 1, 1], [1, 1], 1, "none", False, [False, True, False])
    torch.ops.torchconv.conv2d_backward(
        guarded(dz, at_end), guarded(x, at_end), weight, None, *arguments)
print("alive")
"""


def test_reads_stay_inside_the_tensors() -> None:
    """x and dz that begin or end at an unreadable page."""
    assert "alive" in run(_GUARD + _GUARDED)


def test_the_switch_holds_for_it() -> None:
    sides = (1, 1, 1, 1)
    x, dz = problem((2, 64, 20, 20), 64, sides, "contiguous")
    fast = wgrad(x, dz, sides, "contiguous")
    with torchconv.backends.allow_winograd(False):
        direct = wgrad(x, dz, sides, "contiguous")
    assert not torch.equal(fast, direct)
    assert relative_error(direct, reference(x.double(), dz.double(), sides)) < 5e-7
