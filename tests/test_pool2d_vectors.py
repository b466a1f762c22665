"""Pooling around the vectors, bands of rows and shared planes that kernels work in.

Sizes that fill a vector or miss it by one, memory that begins between two vectors, and heights of
many bands, for the windows of networks and global pooling. Values are small integers, so that ties
are everywhere and sums are exact.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchconv.functional as F
from conftest import assert_accurate, assert_same, everywhere, in_layout
from oracle import torch_F

pytestmark = everywhere

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WINDOWS: dict[str, dict[str, Any]] = {
    "2x2_s2": {"kernel_size": 2},
    "2x2_s2_p1": {"kernel_size": 2, "padding": 1},
    "2x2_s2_ceil": {"kernel_size": 2, "ceil_mode": True},
    "3x3_s2_p1": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3x3_s2_p1_ceil": {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    "3x3_s2": {"kernel_size": 3, "stride": 2},
    "3x3_s1_p1": {"kernel_size": 3, "stride": 1, "padding": 1},
    "3x3_s1": {"kernel_size": 3, "stride": 1},
    "4x3_s2x1": {"kernel_size": (4, 3), "stride": (2, 1), "padding": (2, 1)},
}
on_windows = pytest.mark.parametrize("window", WINDOWS)
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
on_formats = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def values(size: tuple[int, ...], dtype: torch.dtype, layout: str, shift: int) -> Tensor:
    """Small integers in memory that begins `shift` elements into an allocation."""
    count = torch.Size(size).numel()
    flat = torch.randint(-3, 4, (count + shift,)).to(dtype)[shift:]
    if layout == "contiguous":
        return flat.view(size)
    n, c, h, w = size
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def check_select(x: Tensor, kwargs: dict[str, Any]) -> None:
    x.requires_grad_()
    expected, indices = torch_F.max_pool2d(x, **kwargs, return_indices=True)
    y = F.max_pool2d(x, **kwargs)
    both = F.max_pool2d(x, **kwargs, return_indices=True)
    assert torch.equal(y, expected) and torch.equal(both[0], expected)
    assert torch.equal(both[1], indices)
    with torch.no_grad():
        assert torch.equal(F.max_pool2d(x, **kwargs), expected)
    dy = torch.randint_like(expected, -3, 4)
    truth = torch.autograd.grad(expected, x, dy)[0]
    for output in (y, both[0]):
        assert torch.equal(torch.autograd.grad(output, x, dy)[0], truth)


def check_average(x: Tensor, kwargs: dict[str, Any]) -> None:
    x.requires_grad_()
    double = x.detach().double().requires_grad_()
    y, truth = F.avg_pool2d(x, **kwargs), torch_F.avg_pool2d(double, **kwargs)
    assert_accurate(y, truth)
    dy = torch.randint_like(y, -3, 4)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_accurate(dx, torch.autograd.grad(truth, double, dy.double())[0])


@on_formats
@on_dtypes
@on_windows
def test_residues(window: str, dtype: torch.dtype, layout: str) -> None:
    """Rows of 1 to 18 columns, or as many channels; aligned memory and not."""
    for width in (2, 7, 8, 9, 12, 14, 16, 17, 18):
        for shift in (0, 1):
            size = (2, 3, 6, width) if layout == "contiguous" else (2, width, 6, 7)
            if min(size[2:]) >= 3:
                check_select(values(size, dtype, layout, shift), WINDOWS[window])
                check_average(values(size, dtype, layout, shift), WINDOWS[window])
    for count_include_pad in (False, True):
        kwargs = {**WINDOWS[window], "count_include_pad": count_include_pad}
        size = (2, 8, 9, 16)
        check_average(values(size, dtype, layout, 0), kwargs)
        check_average(values(size, dtype, layout, 0), {**kwargs, "divisor_override": 5})


@on_formats
@on_dtypes
@on_windows
def test_bands(window: str, dtype: torch.dtype, layout: str) -> None:
    """Heights of several bands of rows, whose seams lie anywhere."""
    for size in ((1, 8, 61, 40), (3, 16, 40, 24)):
        check_select(values(size, dtype, layout, 0), WINDOWS[window])
        check_average(values(size, dtype, layout, 0), WINDOWS[window])


@on_dtypes
@pytest.mark.parametrize("shift", [0, 1])
def test_planes(dtype: torch.dtype, shift: int) -> None:
    """Many small planes, of rows that are whole vectors, halves of them, or neither."""
    windows: dict[str, dict[str, Any]] = {
        **WINDOWS,
        "5x5_s1_p2": {"kernel_size": 5, "stride": 1, "padding": 2},
        "5x4_s3x2": {"kernel_size": (5, 4), "stride": (3, 2)},
    }
    for size in ((2, 67, 14, 14), (1, 40, 9, 28), (1, 33, 12, 20)):
        for kwargs in windows.values():
            check_select(values(size, dtype, "contiguous", shift), kwargs)
            check_average(values(size, dtype, "contiguous", shift), kwargs)
    x = values((3, 16, 14, 15), dtype, "contiguous", shift)
    check_select(x, {"kernel_size": 3, "dilation": 2, "padding": 1})
    kwargs = {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}
    check_average(x.detach(), kwargs)
    check_average(x.detach(), {**kwargs, "divisor_override": 5})


@on_dtypes
@pytest.mark.parametrize("shift", [0, 1])
def test_adaptive_planes(dtype: torch.dtype, shift: int) -> None:
    """Windows that overlap, that divide the plane, and more of them than elements."""
    for size, out in (
        ((2, 67, 14, 14), (7, 7)),
        ((2, 33, 28, 28), (3, 3)),
        ((1, 70, 9, 13), (4, 5)),
        ((3, 16, 5, 6), (7, 4)),
    ):
        x = values(size, dtype, "contiguous", shift).requires_grad_()
        y, indices = F.adaptive_max_pool2d(x, out, return_indices=True)
        expected = torch_F.adaptive_max_pool2d(x, out, return_indices=True)
        assert torch.equal(y, expected[0]) and torch.equal(indices, expected[1])
        dy = torch.randint_like(y, -3, 4)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(dx, torch.autograd.grad(expected[0], x, dy)[0])
        double = x.detach().double().requires_grad_()
        mean, truth = F.adaptive_avg_pool2d(x, out), torch_F.adaptive_avg_pool2d(double, out)
        assert_accurate(mean, truth)
        (dx,) = torch.autograd.grad(mean, x, dy)
        assert_accurate(dx, torch.autograd.grad(truth, double, dy.double())[0])


@on_formats
@on_dtypes
def test_global(dtype: torch.dtype, layout: str) -> None:
    """Planes of few and of many elements, whole and with padding around them."""
    for h, w in ((1, 1), (1, 3), (2, 3), (7, 7), (3, 3), (8, 8), (13, 19), (30, 33), (35, 40)):
        for planes in ((1, 1), (5, 13), (2, 64)):
            for shift in (0, 1):
                x = values((*planes, h, w), dtype, layout, shift)
                check_select(x, {"kernel_size": (h, w)})
                check_average(x.detach(), {"kernel_size": (h, w)})
    # Large enough to be cut in two halves, of pixels with and without a part of a vector.
    for size in ((1, 130, 61, 41), (2, 300, 29, 31), (3, 64, 60, 60)):
        x = values(size, dtype, layout, 1)
        check_select(x, {"kernel_size": size[2:]})
        check_average(x.detach(), {"kernel_size": size[2:]})
    padded: dict[str, Any] = {"kernel_size": (9, 8), "stride": 9, "padding": (2, 1)}
    check_select(values((3, 17, 7, 7), dtype, layout, 0), padded)
    check_average(values((3, 17, 7, 7), dtype, layout, 0), padded)
    padded["count_include_pad"] = False
    check_average(values((3, 17, 7, 7), dtype, layout, 0), padded)


# Image and arguments: windows that share most of their elements, of many and of few outputs.
LARGE: list[tuple[tuple[int, int], dict[str, Any]]] = [
    ((60, 52), {"kernel_size": (26, 24), "stride": 1}),
    ((50, 67), {"kernel_size": (24, 31), "stride": (5, 1), "padding": (12, 15)}),
    ((49, 48), {"kernel_size": 29, "stride": (2, 1), "padding": 7, "ceil_mode": True}),
    ((57, 56), {"kernel_size": 56, "stride": 1}),
    ((18, 17), {"kernel_size": (9, 7), "stride": 1, "padding": (4, 2)}),
    ((20, 25), {"kernel_size": (6, 16), "stride": (3, 1), "padding": (1, 8)}),
    ((8, 9), {"kernel_size": 7, "stride": 1}),
    ((7, 8), {"kernel_size": (7, 8), "stride": 1}),
    ((5, 7), {"kernel_size": 5, "stride": 1, "padding": 2}),
]


@on_formats
@on_dtypes
@pytest.mark.parametrize(("image", "kwargs"), LARGE, ids=str)
def test_large_windows(
    image: tuple[int, int], kwargs: dict[str, Any], dtype: torch.dtype, layout: str
) -> None:
    x = values((2, 19, *image), dtype, layout, 1)
    check_select(x, kwargs)
    check_average(x.detach(), kwargs)
    check_average(x.detach(), {**kwargs, "count_include_pad": False})


@on_formats
@on_dtypes
@pytest.mark.parametrize("kernel_size", [3, (2, 5), (4, 3), (7, 20)], ids=str)
def test_windows_side_by_side(
    kernel_size: int | tuple[int, int], dtype: torch.dtype, layout: str
) -> None:
    """Rows and columns that they cover, and some that are left over."""
    rows, columns = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    for more_rows, more_columns in ((0, 0), (1, 2), (rows - 1, 0)):
        size = (2, 33, 3 * rows + more_rows, 2 * columns + more_columns)
        x = values(size, dtype, layout, 1)
        check_select(x, {"kernel_size": kernel_size})
        check_average(x.detach(), {"kernel_size": kernel_size})
        check_average(x.detach(), {"kernel_size": kernel_size, "divisor_override": 3})


@on_formats
def test_one_large_window_folds_in_turns(layout: str) -> None:
    """Where several threads share a window: ties, NaN and infinities, and an exact mean."""
    x = in_layout(torch.randint(-2, 3, (2, 5, 70, 50)).float(), layout)
    x[0, 1, 20:40:3, 7::11] = float("nan")
    x[1, 2] = float("-inf")
    for kernel in ((70, 50), (35, 25), (9, 50), (70, 3), (23, 17)):
        y, indices = F.max_pool2d(x, kernel, return_indices=True)
        expected = torch_F.max_pool2d(x, kernel, return_indices=True)
        assert_same(y, expected[0])
        assert_same(indices, expected[1])
    ones = in_layout(torch.ones(1, 3, 300, 280), layout)
    assert torch.equal(F.avg_pool2d(ones, (300, 280)), torch.ones(1, 3, 1, 1))
