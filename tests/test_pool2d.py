"""max_pool2d, min_pool2d and avg_pool2d against torch.nn.functional, forward and backward.

Selecting poolings are exact: the same bits, indices and strides as PyTorch, min_pool2d(x) being
-max_pool2d(-x). Where PyTorch has no answer (bool) or a wrong one (a dilated window without a valid
element, whose backward writes outside the gradient), the scalar reference decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import FLOATS, LAYOUTS, assert_accurate, assert_same, in_layout
from torch import Tensor
from torch.nn import functional as torch_F

import torchconv.functional as F

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
    "16x16": ((1, 2, 17, 33), {"kernel_size": 16, "stride": 1, "padding": 8}),
    "300x1": ((1, 2, 310, 3), {"kernel_size": (300, 1), "stride": (7, 1)}),
    "global": ((2, 33, 7, 7), {"kernel_size": 7}),
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


def scalar_select(op: str, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    def pair(value: Any) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else tuple(value)

    size = pair(kwargs["kernel_size"])
    values, indices = reference.select_pool2d(
        x.detach().numpy(),
        size,
        pair(kwargs.get("stride", size)),
        pair(kwargs.get("padding", 0)),
        pair(kwargs.get("dilation", 1)),
        kwargs.get("ceil_mode", False),
        minimum=op == "min_pool2d",
    )
    return torch.from_numpy(values), torch.from_numpy(indices)


# --- selecting: max and min ----------------------------------------------------------------------


@on_formats
@on_dtypes
@on_select_cases
@on_selecting
def test_select_forward_and_backward(
    op: str, case: str, dtype: torch.dtype, layout: str, device: str
) -> None:
    """The same bits as PyTorch, with few distinct values, so that ties are everywhere."""
    size, kwargs = SELECT_CASES[case]
    x = in_layout(torch.randint(-6, 7, size).to(device, dtype), layout).requires_grad_()
    y = getattr(F, op)(x, **kwargs)
    expected, indices = torch_select(op, x, **kwargs)
    assert_same(y, expected)
    both = getattr(F, op)(x, **kwargs, return_indices=True)
    assert_same(both[0], expected)
    assert_same(both[1], indices)
    dy = in_layout(torch.randint(-4, 5, y.shape).to(device, dtype), layout)
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


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@on_formats
@pytest.mark.parametrize("dtype", (*INTEGERS, torch.bool), ids=str)
@pytest.mark.parametrize("case", ["2x2_odd_ceil", "3x3_s2_p1", "5x5_s1_p2", "3x3_d2x3_p1"])
@on_selecting
def test_select_integers_and_bool(op: str, case: str, dtype: torch.dtype, layout: str) -> None:
    size, kwargs = SELECT_CASES[case]
    if dtype is torch.bool:
        x = torch.rand(size) < 0.3
    else:
        info = torch.iinfo(dtype)
        x = torch.randint(max(info.min, -(2**62)), min(info.max, 2**62), size).to(dtype)
        x[0, 0, 0, :2] = torch.tensor([info.min, info.max], dtype=dtype)
        x[:, 1] = info.min  # a whole channel of the value that padding must lose to
        x[:, 2] = info.max
    x = in_layout(x, layout)
    y, indices = getattr(F, op)(x, **kwargs, return_indices=True)
    values, places = scalar_select(op, x, **kwargs)
    assert y.dtype == dtype and torch.equal(y, values)
    assert torch.equal(indices, places)
    assert torch.equal(getattr(F, op)(x, **kwargs), y)
    if op == "max_pool2d" and dtype.itemsize > 1:  # PyTorch counts in int8 there and gives up
        assert_same(y, torch_F.max_pool2d(x, **kwargs))


@on_formats
@on_dtypes
@on_selecting
def test_nan_wins(op: str, dtype: torch.dtype, layout: str) -> None:
    """A NaN in the window gives NaN, its own index, and takes the gradient."""
    x = torch.randint(-3, 4, (2, 18, 9, 10)).to(dtype)
    x[torch.rand(x.shape) < 0.08] = math.nan
    x[1, 3] = math.nan
    x = in_layout(x, layout).requires_grad_()
    for kwargs in (
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 5, "stride": 1, "padding": 2},
    ):
        y, indices = getattr(F, op)(x, **kwargs, return_indices=True)
        expected, places = torch_select(op, x, **kwargs)
        assert_same(y, expected)
        assert_same(indices, places)
        (dx,), (torchs,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
        assert torch.equal(dx, torchs)
        assert_same(getattr(F, op)(x, **kwargs), expected)


@on_formats
@on_dtypes
@on_selecting
def test_all_infinite_window(op: str, dtype: torch.dtype, layout: str) -> None:
    """-inf everywhere (+inf for min) is what padding counts as; the first valid index wins."""
    worst = -math.inf if op == "max_pool2d" else math.inf
    x = in_layout(torch.full((2, 17, 6, 7), worst, dtype=dtype), layout).requires_grad_()
    for kwargs in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 1, "padding": 1}):
        y, indices = getattr(F, op)(x, **kwargs, return_indices=True)
        values, places = scalar_select(op, x.detach().double(), **kwargs)
        assert torch.equal(y, values.to(dtype))
        assert torch.equal(indices, places)
        plain = getattr(F, op)(x, **kwargs)
        (dx,), (other,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(plain.sum(), x)
        ones = np.ones(places.shape)
        truth = reference.select_pool2d_backward(ones, places.numpy(), 6, 7)
        assert torch.equal(dx, torch.from_numpy(truth).to(dtype))
        assert torch.equal(other, dx)


@on_formats
@on_dtypes
@pytest.mark.parametrize("value", [1.0, 0.0, -0.0])
@on_selecting
def test_first_of_equals_wins(op: str, value: float, dtype: torch.dtype, layout: str) -> None:
    x = in_layout(torch.full((1, 20, 6, 6), value, dtype=dtype), layout).requires_grad_()
    y, indices = getattr(F, op)(x, 3, return_indices=True)
    assert torch.equal(indices, torch.tensor([[0, 3], [18, 21]]).expand(1, 20, 2, 2))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx[0, 0].flatten().nonzero().flatten(), torch.tensor([0, 3, 18, 21]))


@on_selecting
def test_signed_zeros_are_equal(op: str) -> None:
    x = torch.tensor([0.0, -0.0, -0.0, 0.0]).view(1, 1, 1, 4)
    y, indices = getattr(F, op)(x, (1, 2), return_indices=True)
    assert indices.flatten().tolist() == [0, 2]
    assert torch.equal(torch.signbit(y.flatten()), torch.tensor([False, True]))


# --- a dilated window with no valid element ------------------------------------------------------

# Size, arguments. PyTorch's backward is never called here: it writes outside the gradient.
EMPTY_WINDOWS: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((2, 3, 1, 6), {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 2}),
    ((2, 18, 6, 1), {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 2}),
    ((1, 2, 1, 1), {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 2}),
    ((2, 3, 1, 40), {"kernel_size": (2, 3), "stride": 1, "padding": (1, 1), "dilation": (2, 1)}),
    ((1, 5, 2, 9), {"kernel_size": (2, 2), "stride": (1, 2), "padding": 1, "dilation": (3, 2)}),
    ((1, 2, 2, 3), {"kernel_size": (2, 1), "stride": (2, 1), "padding": (1, 0), "dilation": (3, 1)}),
)


@on_formats
@on_dtypes
@pytest.mark.parametrize(("size", "kwargs"), EMPTY_WINDOWS, ids=str)
@on_selecting
def test_window_without_a_valid_element(
    op: str, size: tuple[int, ...], kwargs: dict[str, Any], dtype: torch.dtype, layout: str
) -> None:
    """-inf (+inf for min), index -1, no gradient, and no address made from it."""
    x = in_layout(torch.randint(-5, 6, size).to(dtype), layout).requires_grad_()
    values, places = scalar_select(op, x.detach().double(), **kwargs)
    y, indices = getattr(F, op)(x, **kwargs, return_indices=True)
    assert torch.equal(y, values.to(dtype))
    assert torch.equal(indices, places)
    plain = getattr(F, op)(x, **kwargs)
    assert_same(plain, y)
    dy = torch.randint(1, 5, y.shape).to(dtype)
    truth = reference.select_pool2d_backward(
        dy.double().numpy(), places.numpy(), size[2], size[3]
    )
    for output in (y, plain):
        (dx,) = torch.autograd.grad(output, x, dy, create_graph=True)
        assert torch.equal(dx, torch.from_numpy(truth).to(dtype))


def test_the_window_of_field_notes_is_empty() -> None:
    """The case itself: height 1, kernel 2, padding 1, dilation 2 has no element in any window."""
    x = torch.randn(1, 2, 1, 5, requires_grad=True)
    y, indices = F.max_pool2d(x, 2, 1, 1, 2, return_indices=True)
    assert y.shape == (1, 2, 1, 5)
    assert (y == -math.inf).all() and (indices == -1).all()
    y.sum().backward()
    assert x.grad is not None and torch.count_nonzero(x.grad) == 0
    smallest, indices = F.min_pool2d(x, 2, 1, 1, 2, return_indices=True)
    assert (smallest == math.inf).all() and (indices == -1).all()


@pytest.mark.parametrize("dtype", (*INTEGERS, torch.bool), ids=str)
@on_selecting
def test_integer_window_without_a_valid_element(op: str, dtype: torch.dtype) -> None:
    """The worst value of the dtype and index -1."""
    x = torch.ones(1, 2, 1, 5, dtype=dtype)
    y, indices = getattr(F, op)(x, 2, 1, 1, 2, return_indices=True)
    if dtype is torch.bool:
        worst: int | bool = op == "min_pool2d"
    else:
        info = torch.iinfo(dtype)
        worst = info.max if op == "min_pool2d" else info.min
    assert (y == worst).all() and (indices == -1).all()


def test_padding_counts_the_effective_kernel() -> None:
    """Kernel 3 dilated by 2 spans 5: padding 2 is half of it (pytorch#7541, #154395)."""
    x = torch.randint(-9, 10, (2, 3, 7, 8)).double().requires_grad_()
    kwargs: dict[str, Any] = {"kernel_size": 3, "stride": 1, "padding": 2, "dilation": 2}
    y, indices = F.max_pool2d(x, **kwargs, return_indices=True)
    values, places = scalar_select("max_pool2d", x, **kwargs)
    assert torch.equal(y, values) and torch.equal(indices, places)
    (dx,) = torch.autograd.grad(F.max_pool2d(x, **kwargs), x, torch.ones_like(y))
    truth = reference.select_pool2d_backward(np.ones(places.shape), places.numpy(), 7, 8)
    assert torch.equal(dx, torch.from_numpy(truth))


# --- average -------------------------------------------------------------------------------------


@on_formats
@on_dtypes
@pytest.mark.parametrize("case", AVERAGE_CASES)
def test_average_forward_and_backward(
    case: str, dtype: torch.dtype, layout: str, device: str
) -> None:
    size, kwargs = AVERAGE_CASES[case]
    x = in_layout(torch.randn(size).to(device, dtype), layout).requires_grad_()
    y = F.avg_pool2d(x, **kwargs)
    theirs = torch_F.avg_pool2d(x, **kwargs)
    assert y.dtype == dtype and y.stride() == theirs.stride()
    double = x.detach().double().requires_grad_()
    truth = torch_F.avg_pool2d(double, **kwargs)
    assert_accurate(y, truth)
    dy = in_layout(torch.randn(y.shape).to(device, dtype), layout)
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
                truth = reference.avg_pool2d(x.numpy(), *args)
                assert_accurate(F.avg_pool2d(x, *args), torch.from_numpy(truth))


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
    for kwargs in ({"kernel_size": 3, "stride": 1, "padding": 1}, {"kernel_size": 2}):
        y = F.avg_pool2d(in_layout(x, layout), **kwargs)
        truth = torch_F.avg_pool2d(x, **kwargs)
        assert torch.equal(y.isnan(), truth.isnan()) and torch.equal(y.isinf(), truth.isinf())


@on_formats
def test_average_of_large_and_small_numbers(layout: str) -> None:
    """Nor may a running sum lose the small numbers that follow a large one."""
    x = torch.full((1, 16, 8, 64), 1e-3)
    x[..., 0] = 1e8
    y = F.avg_pool2d(in_layout(x, layout), 3, 1)
    torch.testing.assert_close(y[..., 1:], torch.full_like(y[..., 1:], 1e-3))


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
    """max_pool2d(x, kernel, stride, padding, dilation, ceil_mode, return_indices) and avg_pool2d."""
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


@on_operators
def test_huge_stride(op: str) -> None:
    """One window is left of the largest stride that PyTorch takes; a larger one is refused."""
    x = torch.randint(-8, 9, (2, 3, 6, 7)).double().requires_grad_()
    y, expected = getattr(F, op)(x, 2, 2**31 - 1), OPERATORS[op](x, 2)[:, :, :1, :1]
    assert torch.equal(y, expected)
    (dx,), (torchs,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
    assert torch.equal(dx, torchs)
    for stride in (2**31, 2**40, 2**62):
        with pytest.raises(RuntimeError, match=str(stride)):
            getattr(F, op)(x, 2, stride)


@on_selecting
def test_huge_dilation(op: str) -> None:
    """A 1x1 kernel has nothing to dilate, a larger one does not fit."""
    x = torch.randint(-8, 9, (2, 3, 6, 7)).double().requires_grad_()
    y = getattr(F, op)(x, 1, dilation=2**31 - 1)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))
    for dilation in (2**31 - 1, 2**31, 2**40, 2**62):
        with pytest.raises(RuntimeError):
            getattr(F, op)(x, 2, dilation=dilation)


@on_selecting
def test_padding_and_dilation_that_reach_past_32_bits(op: str) -> None:
    """Half of a huge effective kernel as padding: every window holds the image's middle or nothing."""
    dilation = 2**30
    x = torch.randint(-8, 9, (1, 2, 3, 4)).double().requires_grad_()
    kwargs = {"kernel_size": 3, "stride": dilation, "padding": dilation, "dilation": dilation}
    y, indices = getattr(F, op)(x, **kwargs, return_indices=True)
    assert y.shape == (1, 2, 1, 1)
    assert torch.equal(y.flatten(), x[0, :, 0, 0]) and (indices == 0).all()
    (dx,) = torch.autograd.grad(getattr(F, op)(x, **kwargs).sum(), x)
    assert dx.sum() == 2 and (dx[..., 0, 0] == 1).all()


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
