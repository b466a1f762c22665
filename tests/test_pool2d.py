"""max_pool2d, min_pool2d and avg_pool2d against torch.nn.functional, forward and backward.

Selecting poolings are exact: the same bits, indices and strides as PyTorch, min_pool2d(x) being
-max_pool2d(-x). Where PyTorch has no answer (bool) or a wrong one (a dilated window without a valid
element, whose backward writes outside the gradient), the scalar reference decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import torchconv.functional as F
from conftest import (
    FLOATS,
    LAYOUTS,
    assert_accurate,
    assert_same,
    everywhere,
    from_numpy,
    in_layout,
    to_numpy,
)
from oracle import torch_F

pytestmark = everywhere

FORMATS = ("contiguous", "channels_last")
SELECTING = ("max_pool2d", "min_pool2d")

# name: input size, arguments of max_pool2d
SELECT_CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "2x2": ((2, 5, 8, 6), {"kernel_size": 2}),
    "2x2_odd": ((2, 5, 9, 7), {"kernel_size": 2}),
    "2x2_odd_ceil": ((2, 5, 9, 7), {"kernel_size": 2, "ceil_mode": True}),
    "2x2_s1": ((2, 5, 6, 7), {"kernel_size": 2, "stride": 1}),
    "2x2_s3": ((2, 3, 9, 11), {"kernel_size": 2, "stride": 3}),
    "2x2_many_channels": ((1, 67, 6, 6), {"kernel_size": 2}),
    "2x2_wide": ((1, 2, 4, 150), {"kernel_size": 2}),
    "3x3_s2_p1": ((2, 17, 9, 10), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "3x3_s2": ((2, 5, 9, 10), {"kernel_size": 3, "stride": 2}),
    "3x3_s2_p1_ceil": (
        (2, 5, 8, 9),
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    ),
    "3x3_s1_p1": ((2, 5, 7, 40), {"kernel_size": 3, "stride": 1, "padding": 1}),
    "3x2_s1x2_p1x0": ((2, 5, 7, 6), {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)}),
    "5x5_s1_p2": ((1, 19, 12, 11), {"kernel_size": 5, "stride": 1, "padding": 2}),
    "9x9_s1_p4": ((1, 3, 16, 17), {"kernel_size": 9, "stride": 1, "padding": 4}),
    "9x9_s1_p4_some_channels": (
        (2, 35, 14, 21),
        {"kernel_size": 9, "stride": 1, "padding": 4},
    ),
    # Strips of columns, and more channels than are folded at once.
    "9x9_s1_p4_strips": ((1, 64, 10, 75), {"kernel_size": 9, "stride": 1, "padding": 4}),
    "6x5_s1_p2_strips_ceil": (
        (2, 70, 9, 71),
        {"kernel_size": (6, 5), "stride": (2, 1), "padding": 2, "ceil_mode": True},
    ),
    "7x9_s1_p3x4": ((2, 5, 23, 40), {"kernel_size": (7, 9), "stride": 1, "padding": (3, 4)}),
    "12x10_s3x1_ceil": (
        (1, 19, 30, 33),
        {"kernel_size": (12, 10), "stride": (3, 1), "padding": (5, 2), "ceil_mode": True},
    ),
    "31x31_s1_p15": ((1, 2, 40, 70), {"kernel_size": 31, "stride": 1, "padding": 15}),
    "10x4_s1": ((1, 17, 12, 50), {"kernel_size": (10, 4), "stride": 1}),
    "5x5_s2_p2": ((2, 17, 20, 21), {"kernel_size": 5, "stride": 2, "padding": 2}),
    "4x4_s4": ((2, 3, 16, 140), {"kernel_size": 4, "stride": 4}),
    "4x4_s4_wide": ((1, 3, 9, 1100), {"kernel_size": 4, "stride": 4}),
    "7x7_s7_planes": ((3, 11, 14, 14), {"kernel_size": 7}),
    # Strides above 2, windows that share columns and rows, some wholly in the padding.
    "5x4_s2x3_d2x4_p2": (
        (3, 3, 20, 67),
        {"kernel_size": (5, 4), "stride": (2, 3), "dilation": (2, 4), "padding": 2},
    ),
    "7x5_s2x4_p3x2_ceil": (
        (3, 3, 13, 21),
        {"kernel_size": (7, 5), "stride": (2, 4), "padding": (3, 2), "ceil_mode": True},
    ),
    "3x3_s2_p1_narrow_pixels": (
        (3, 3, 20, 40),
        {"kernel_size": 3, "stride": 2, "padding": 1},
    ),
    "2x3_s2_wide": ((1, 3, 6, 90), {"kernel_size": (2, 3), "stride": 2, "padding": (0, 1)}),
    "2x2_s1_wide": ((1, 3, 6, 90), {"kernel_size": 2, "stride": 1, "padding": 1}),
    "16x16": ((1, 2, 17, 33), {"kernel_size": 16, "stride": 1, "padding": 8}),
    "50x45": ((1, 2, 51, 53), {"kernel_size": (50, 45), "stride": 1}),
    "5x1_s2x1_narrow": ((2, 5, 23, 5), {"kernel_size": (5, 1), "stride": (2, 1)}),
    "300x1": ((1, 2, 310, 3), {"kernel_size": (300, 1), "stride": (7, 1)}),
    "global": ((2, 33, 7, 7), {"kernel_size": 7}),
    "global_many_channels": ((2, 256, 3, 5), {"kernel_size": (3, 5)}),
    "global_by_channels": ((1, 80, 64, 48), {"kernel_size": (64, 48)}),
    "global_padded": ((2, 256, 4, 3), {"kernel_size": (6, 5), "stride": 9, "padding": (1, 1)}),
    "1x1": ((2, 5, 6, 7), {"kernel_size": 1}),
    "1x1_s2": ((2, 5, 6, 7), {"kernel_size": 1, "stride": 2}),
    "1x5": ((2, 5, 6, 9), {"kernel_size": (1, 5), "stride": (1, 2), "padding": (0, 2)}),
    "3x3_d2": ((2, 5, 9, 8), {"kernel_size": 3, "stride": 1, "dilation": 2}),
    "3x3_d2x3_p1": (
        (2, 5, 11, 12),
        {"kernel_size": 3, "stride": (2, 1), "dilation": (2, 3), "padding": 1},
    ),
    "2x2_d3_ceil": (
        (2, 5, 10, 9),
        {"kernel_size": 2, "stride": 2, "dilation": 3, "padding": 1, "ceil_mode": True},
    ),
    "ceil_drops_a_window_in_the_padding": (
        (1, 3, 4, 4),
        {"kernel_size": 1, "stride": 4, "ceil_mode": True},
    ),
    "ceil_stride_beyond_kernel": (
        (2, 3, 10, 7),
        {"kernel_size": 2, "stride": 4, "padding": 1, "ceil_mode": True},
    ),
    "one_row": ((2, 5, 1, 9), {"kernel_size": (1, 3), "stride": 2}),
    "one_pixel": ((3, 5, 1, 1), {"kernel_size": 1}),
    "one_channel": ((2, 1, 6, 6), {"kernel_size": 2}),
}

AVERAGE_CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    **{
        name: (size, kwargs)
        for name, (size, kwargs) in SELECT_CASES.items()
        if "dilation" not in kwargs
    },
    "no_pad_count": (
        (2, 5, 8, 9),
        {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
    ),
    "no_pad_count_ceil": (
        (2, 17, 8, 9),
        {
            "kernel_size": (3, 4),
            "stride": 2,
            "padding": (1, 2),
            "ceil_mode": True,
            "count_include_pad": False,
        },
    ),
    "ceil_padded": (
        (2, 5, 8, 9),
        {"kernel_size": (4, 3), "stride": 3, "padding": (2, 1), "ceil_mode": True},
    ),
    "divisor_3": ((2, 5, 8, 9), {"kernel_size": 2, "divisor_override": 3}),
    "divisor_-2": ((2, 5, 8, 9), {"kernel_size": 2, "divisor_override": -2}),
    "divisor_and_padding": (
        (2, 5, 8, 9),
        {"kernel_size": 3, "padding": 1, "divisor_override": 1, "count_include_pad": False},
    ),
    "divisor_2**40": ((2, 5, 8, 9), {"kernel_size": 2, "divisor_override": 2**40}),
}

on_dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
on_formats = pytest.mark.parametrize("layout", FORMATS)
on_select_cases = pytest.mark.parametrize("case", SELECT_CASES)
on_selecting = pytest.mark.parametrize("op", SELECTING)


def torch_select(op: str, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """PyTorch's values and indices; its min pooling is the negated max pooling of the negation."""
    if op == "max_pool2d":
        return torch_F.max_pool2d(x, **kwargs, return_indices=True)
    values, indices = torch_F.max_pool2d(-x, **kwargs, return_indices=True)
    return values.neg_(), indices  # in place: a new tensor would get other strides for sizes of 1


# --- selecting: max and min ----------------------------------------------------------------------


@on_formats
@on_dtypes
@on_select_cases
@on_selecting
def test_select_forward_and_backward(op: str, case: str, dtype: torch.dtype, layout: str) -> None:
    """The same bits as PyTorch, with few distinct values, so that ties are everywhere."""
    size, kwargs = SELECT_CASES[case]
    x = in_layout(torch.randint(-6, 7, size).to(dtype), layout).requires_grad_()
    y = getattr(F, op)(x, **kwargs)
    expected, indices = torch_select(op, x, **kwargs)
    assert_same(y, expected)
    both = getattr(F, op)(x, **kwargs, return_indices=True)
    assert_same(both[0], expected)
    assert_same(both[1], indices)
    dy = in_layout(torch.randint(-4, 5, y.shape).to(dtype), layout)
    (torchs,) = torch.autograd.grad(expected, x, dy)
    torchs.add_(0.0)  # minus zero, from the negation, to zero
    for output in (y, both[0]):
        (dx,) = torch.autograd.grad(output, x, dy)
        assert_same(dx, torchs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["2x2_odd", "3x3_s2_p1_ceil", "3x3_s1_p1", "3x3_d2"])
@on_selecting
def test_select_any_strides(op: str, case: str, layout: str) -> None:
    size, kwargs = SELECT_CASES[case]
    plain = torch.randint(-6, 7, size).float()
    x = in_layout(plain, layout).requires_grad_()
    y = getattr(F, op)(x, **kwargs)
    expected, _ = torch_select(op, x, **kwargs)
    assert_same(y, expected)
    dy = in_layout(torch.randint(-4, 5, y.shape).float(), layout)
    (dx,), (torchs,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
    assert torch.equal(dx, torchs)
    assert torch.equal(x, plain)


@on_selecting
def test_select_expanded(op: str) -> None:
    """Stride 0 in the input and in the incoming gradient."""
    x = torch.randn(1, 3, 6, 7).expand(4, -1, -1, -1).requires_grad_()
    y = getattr(F, op)(x, 3, 2, 1)
    expected, _ = torch_select(op, x, kernel_size=3, stride=2, padding=1)
    assert torch.equal(y, expected)
    (dx,), (torchs,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
    assert torch.equal(dx, torchs)


@on_formats
@on_dtypes
@on_selecting
def test_select_backward_adds_up(op: str, dtype: torch.dtype, layout: str) -> None:
    """One element that many windows select gets the sum of their gradients."""
    x = in_layout(torch.randn(2, 19, 8, 9).to(dtype), layout).requires_grad_()
    kwargs: dict[str, Any] = {"kernel_size": 5, "stride": 1, "padding": 2}
    y = getattr(F, op)(x, **kwargs)
    dy = torch.randn(y.shape).to(dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    double = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(torch_select(op, double, **kwargs)[0], double, dy.double())
    assert_accurate(dx, truth)


# --- average -------------------------------------------------------------------------------------


@on_formats
@on_dtypes
@pytest.mark.parametrize("case", AVERAGE_CASES)
def test_average_forward_and_backward(case: str, dtype: torch.dtype, layout: str) -> None:
    size, kwargs = AVERAGE_CASES[case]
    x = in_layout(torch.randn(size).to(dtype), layout).requires_grad_()
    y = F.avg_pool2d(x, **kwargs)
    theirs = torch_F.avg_pool2d(x, **kwargs)
    assert y.dtype == dtype and y.stride() == theirs.stride()
    double = x.detach().double().requires_grad_()
    truth = torch_F.avg_pool2d(double, **kwargs)
    assert_accurate(y, truth)
    dy = in_layout(torch.randn(y.shape).to(dtype), layout)
    (dx,), (torchs,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(theirs, x, dy)
    assert dx.stride() == torchs.stride()
    (expected,) = torch.autograd.grad(truth, double, dy.double())
    assert_accurate(dx, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["2x2_odd", "no_pad_count_ceil", "3x3_s1_p1"])
def test_average_any_strides(case: str, layout: str) -> None:
    size, kwargs = AVERAGE_CASES[case]
    plain = torch.randn(size)
    x = in_layout(plain, layout).requires_grad_()
    y = F.avg_pool2d(x, **kwargs)
    assert y.stride() == torch_F.avg_pool2d(x, **kwargs).stride()
    double = plain.double().requires_grad_()
    truth = torch_F.avg_pool2d(double, **kwargs)
    assert_accurate(y, truth)
    dy = in_layout(torch.randn(y.shape), layout)
    (dx,), (expected,) = (
        torch.autograd.grad(y, x, dy),
        torch.autograd.grad(truth, double, dy.double()),
    )
    assert_accurate(dx, expected)
    assert torch.equal(x, plain)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("divisor", [None, 5])
def test_average_divisors(ceil_mode: bool, count_include_pad: bool, divisor: int | None) -> None:
    """Every way to divide, over every kernel, stride and padding that fits, against the loops."""
    for size in ((3, 2), (4, 4), (1, 3)):
        for stride in ((1, 1), (2, 3), (3, 2)):
            for pad in ((0, 0), (size[0] // 2, size[1] // 2)):
                x = torch.randn(1, 2, 7, 8, dtype=torch.float64)
                args = (size, stride, pad, ceil_mode, count_include_pad, divisor)
                truth = reference.avg_pool2d(to_numpy(x), *args)
                assert_accurate(F.avg_pool2d(x, *args), from_numpy(truth))


@on_formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_average_adds_up_in_float32(dtype: torch.dtype, layout: str) -> None:
    """A 64x64 mean of ones is one; a half-type sum would stop at 256 or 2048."""
    x = in_layout(torch.ones(2, 3, 64, 64, dtype=dtype), layout)
    assert F.avg_pool2d(x, 64).unique().tolist() == [1]
    small = in_layout(torch.ones(1, 2, 5, 5, dtype=dtype), layout).requires_grad_()
    y = F.avg_pool2d(small, 5, 1, 2, divisor_override=1)
    (dx,) = torch.autograd.grad(y.sum(), small)
    assert dx[0, 0, 2, 2] == 25


@on_formats
def test_average_keeps_nan_in_its_windows(layout: str) -> None:
    """Running sums would carry a NaN or an infinity into windows that do not hold it."""
    x = torch.randn(1, 17, 9, 40)
    x[0, 3, 4, 5], x[0, 7, 2, 30] = math.nan, math.inf
    for kwargs in (
        {"kernel_size": 3, "stride": 1, "padding": 1},
        {"kernel_size": 2},
        {"kernel_size": 9, "stride": 1, "padding": 4},
    ):
        y = F.avg_pool2d(in_layout(x, layout), **kwargs)
        truth = torch_F.avg_pool2d(x, **kwargs)
        assert torch.equal(y.isnan(), truth.isnan()) and torch.equal(y.isinf(), truth.isinf())


@on_formats
def test_average_of_large_and_small_numbers(layout: str) -> None:
    """Nor may a running sum lose the small numbers that follow a large one."""
    x = torch.full((1, 16, 8, 64), 1e-3)
    x[..., 0] = 1e8
    for kernel in (3, 8):
        y = F.avg_pool2d(in_layout(x, layout), kernel, 1)
        torch.testing.assert_close(y[..., 1:], torch.full_like(y[..., 1:], 1e-3))


@on_formats
def test_arrays_larger_than_the_cache(layout: str) -> None:
    """They are prefetched and written past the cache, up to their very ends."""
    x = in_layout(torch.randn(1, 48, 307, 311), layout).requires_grad_()
    for size, stride, pad in ((3, 1, 1), (2, 1, 0), (2, 2, 0), (9, 1, 4)):
        y, truth = F.max_pool2d(x, size, stride, pad), torch_F.max_pool2d(x, size, stride, pad)
        assert_same(y, truth)
        dy = torch.randn_like(truth)
        (dx,), (torchs,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(truth, x, dy)
        assert_accurate(dx, torchs.double())
        with torch.no_grad():
            assert_same(F.max_pool2d(x, size, stride, pad), truth)
        y, truth = F.avg_pool2d(x, size, stride, pad), torch_F.avg_pool2d(x, size, stride, pad)
        assert_accurate(y, truth.double())
        (dx,), (torchs,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(truth, x, dy)
        assert_accurate(dx, torchs.double())


def test_a_window_far_larger_than_its_image() -> None:
    """Takes time for the outputs that an element belongs to, not for the window's elements."""
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    y = F.avg_pool2d(x, 2**21, 1, 2**20, divisor_override=1)
    assert_accurate(y, x.sum((2, 3), keepdim=True).expand_as(y))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert (dx == y.shape[2] * y.shape[3]).all()


# --- all three -----------------------------------------------------------------------------------

OPERATORS: dict[str, Callable[..., Any]] = {
    "max_pool2d": torch_F.max_pool2d,
    "min_pool2d": lambda x, *args, **kwargs: -torch_F.max_pool2d(-x, *args, **kwargs),
    "avg_pool2d": torch_F.avg_pool2d,
}
on_operators = pytest.mark.parametrize("op", OPERATORS)


@pytest.mark.parametrize(
    "args", [(2,), (3, 2), (3, 2, 1), ((3, 2), (1, 2), (1, 0)), ([2], [1], [1])], ids=str
)
@on_operators
def test_positional_arguments(op: str, args: tuple[Any, ...]) -> None:
    x = torch.randint(-8, 9, (2, 3, 8, 9)).double()
    assert_accurate(getattr(F, op)(x, *args), OPERATORS[op](x, *args))
    names = ("kernel_size", "stride", "padding")
    named = dict(zip(names, args, strict=False))
    assert_accurate(getattr(F, op)(input=x, **named), OPERATORS[op](x, *args))


def test_positional_flags() -> None:
    """(kernel, stride, padding, dilation, ceil_mode, return_indices), and those of avg_pool2d."""
    x = torch.randn(2, 3, 8, 9)
    for op in SELECTING:
        got = getattr(F, op)(x, 3, 2, 1, 1, True, True)
        expected = torch_select(op, x, kernel_size=3, stride=2, padding=1, ceil_mode=True)
        assert_same(got[0], expected[0])
        assert_same(got[1], expected[1])
    args = (3, 2, 1, True, False, 7)
    assert_accurate(F.avg_pool2d(x, *args), torch_F.avg_pool2d(x.double(), *args))


@on_dtypes
@on_operators
def test_unbatched(op: str, dtype: torch.dtype) -> None:
    """(C, H, W) in, (C, P, Q) out, forward and backward."""
    x = torch.randint(-8, 9, (5, 8, 9)).to(dtype).requires_grad_()
    y, expected = getattr(F, op)(x, 2, 1, 1), OPERATORS[op](x, 2, 1, 1)
    assert_same(y, expected)
    dy = torch.randint(-4, 5, y.shape).to(dtype)
    (dx,), (torchs,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
    assert_same(dx, torchs.add_(0.0))
    if op != "avg_pool2d":
        _, indices = getattr(F, op)(x, 2, 1, 1, return_indices=True)
        assert_same(indices, torch_select(op, x, kernel_size=2, stride=1, padding=1)[1])


@on_dtypes
@on_formats
@on_operators
def test_empty_batch(op: str, layout: str, dtype: torch.dtype) -> None:
    x = in_layout(torch.randn(0, 4, 8, 9).to(dtype), layout).requires_grad_()
    y, expected = getattr(F, op)(x, 2), OPERATORS[op](x, 2)
    assert y.shape == expected.shape == (0, 4, 4, 4) and y.dtype == dtype
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == x.shape
    if op != "avg_pool2d":
        values, indices = getattr(F, op)(x, 2, return_indices=True)
        assert values.shape == indices.shape == y.shape and indices.dtype == torch.int64


@on_formats
@on_operators
def test_input_is_not_changed(op: str, layout: str) -> None:
    x = in_layout(torch.randn(2, 5, 8, 9), layout).requires_grad_()
    y = getattr(F, op)(x, 3, 2, 1)
    dy = in_layout(torch.randn(y.shape), layout)
    before = x.detach().clone(), dy.clone()
    torch.autograd.grad(y, x, dy)
    assert torch.equal(x, before[0]) and torch.equal(dy, before[1])


@on_selecting
def test_indices_take_no_gradient_and_unpool(op: str) -> None:
    """int64, not differentiable, and what max_unpool2d expects."""
    x = torch.randn(2, 3, 8, 10, requires_grad=True)
    y, indices = getattr(F, op)(x, 2, return_indices=True)
    assert indices.dtype == torch.int64 and not indices.requires_grad and y.requires_grad
    back = torch_F.max_unpool2d(y, indices, 2)
    assert torch.equal(back[back != 0].sort().values, y.flatten().sort().values)
    gathered = x.flatten(2).gather(2, indices.flatten(2)).view_as(y)
    assert torch.equal(gathered, y)
