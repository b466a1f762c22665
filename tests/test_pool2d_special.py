"""Pooling of unusual values, dtypes and sizes: ties, NaN, infinities, integers, empty windows.

The scalar reference decides where PyTorch has no answer (bool) or a wrong one: its backward of a
dilated window without a valid element writes outside the gradient, so it is never called here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reference
import torchconv.functional as F
from conftest import assert_same, everywhere, from_numpy, in_layout, to_numpy
from oracle import torch_F
from test_pool2d import (
    OPERATORS,
    SELECT_CASES,
    on_dtypes,
    on_formats,
    on_operators,
    on_selecting,
    torch_select,
)

pytestmark = everywhere


def scalar_select(op: str, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    def pair(value: Any) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else tuple(value)

    size = pair(kwargs["kernel_size"])
    values, indices = reference.select_pool2d(
        to_numpy(x),
        size,
        pair(kwargs.get("stride", size)),
        pair(kwargs.get("padding", 0)),
        pair(kwargs.get("dilation", 1)),
        kwargs.get("ceil_mode", False),
        minimum=op == "min_pool2d",
    )
    return from_numpy(values), from_numpy(indices)


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@on_formats
@pytest.mark.parametrize("dtype", (*INTEGERS, torch.bool), ids=str)
@pytest.mark.parametrize("case", ["2x2_odd_ceil", "7x5_s2x4_p3x2_ceil", "5x5_s1_p2", "3x3_d2x3_p1"])
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
        {"kernel_size": 9, "stride": 1, "padding": 4},
        {"kernel_size": (5, 9), "stride": (2, 1), "padding": (2, 4)},
        {"kernel_size": 5, "stride": (2, 3), "padding": 2},
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
    for kwargs in (
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 1, "padding": 1},
        {"kernel_size": 6, "stride": 1, "padding": 3},
        {"kernel_size": 5, "stride": 3, "padding": 2},
    ):
        y, indices = getattr(F, op)(x, **kwargs, return_indices=True)
        values, places = scalar_select(op, x.detach().double(), **kwargs)
        assert torch.equal(y, values.to(dtype))
        assert torch.equal(indices, places)
        plain = getattr(F, op)(x, **kwargs)
        (dx,), (other,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(plain.sum(), x)
        ones = np.ones(places.shape)
        truth = reference.select_pool2d_backward(ones, to_numpy(places), 6, 7)
        assert torch.equal(dx, from_numpy(truth).to(dtype))
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
    (
        (1, 2, 2, 3),
        {"kernel_size": (2, 1), "stride": (2, 1), "padding": (1, 0), "dilation": (3, 1)},
    ),
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
        to_numpy(dy.double()), to_numpy(places), size[2], size[3]
    )
    for output in (y, plain):
        (dx,) = torch.autograd.grad(output, x, dy, create_graph=True)
        assert torch.equal(dx, from_numpy(truth).to(dtype))


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
    truth = reference.select_pool2d_backward(np.ones(places.shape), to_numpy(places), 7, 8)
    assert torch.equal(dx, from_numpy(truth))


# --- huge arguments -------------------------------------------------------------------------------


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
    """Half of a huge effective kernel as padding: the window's middle is the first element."""
    dilation = 2**30
    x = torch.randint(-8, 9, (1, 2, 3, 4)).double().requires_grad_()
    kwargs = {"kernel_size": 3, "stride": dilation, "padding": dilation, "dilation": dilation}
    y, indices = getattr(F, op)(x, **kwargs, return_indices=True)
    assert y.shape == (1, 2, 1, 1)
    assert torch.equal(y.flatten(), x[0, :, 0, 0]) and (indices == 0).all()
    (dx,) = torch.autograd.grad(getattr(F, op)(x, **kwargs).sum(), x)
    assert dx.sum() == 2 and (dx[..., 0, 0] == 1).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", ["max_pool2d", "min_pool2d"])
def test_of_a_positive_and_a_negative_zero_the_first_is_kept(op: str, layout: str) -> None:
    x = in_layout(torch.tensor([0.0, -0.0] * 64).repeat(20).view(1, 20, 1, 128), layout)
    for first in (x, -x):
        sign = torch.signbit(first[..., ::2])
        plain = getattr(F, op)(first, (1, 2))
        training = getattr(F, op)(first.clone().requires_grad_(), (1, 2))
        assert torch.equal(torch.signbit(plain), sign)
        assert torch.equal(torch.signbit(training), sign)


# Few or large images, whose gradient is taken in bands of rows: sizes, and arguments.
BANDS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((1, 3, 90, 61), {"kernel_size": (5, 3), "stride": (2, 3), "padding": (2, 0)}),
    ((1, 2, 150, 300), {"kernel_size": 6, "stride": 1}),
    ((1, 70, 80, 33), {"kernel_size": 3, "stride": 3, "dilation": (4, 1), "padding": (1, 1)}),
    ((2, 1, 200, 130), {"kernel_size": (20, 20), "stride": (3, 1), "ceil_mode": True}),
    ((1, 1, 100, 500), {"kernel_size": (1, 2), "stride": (7, 4)}),
]


@on_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "kwargs"), BANDS, ids=str)
def test_gradient_of_few_large_images(
    size: tuple[int, ...], kwargs: dict[str, Any], dtype: torch.dtype, layout: str
) -> None:
    # Few different values, so that windows share a maximum; sums of whole numbers are exact.
    x = in_layout(torch.randint(0, 50, size).to(dtype), layout).requires_grad_()
    adaptive = kwargs["kernel_size"]
    for pool, peer, arguments in (
        (F.max_pool2d, torch.nn.functional.max_pool2d, kwargs),
        (F.adaptive_max_pool2d, torch.nn.functional.adaptive_max_pool2d, {"output_size": adaptive}),
    ):
        expected = peer(x, **arguments)
        dy = in_layout(torch.randint(-4, 5, expected.shape).to(dtype), layout)
        (dx,) = torch.autograd.grad(pool(x, **arguments), x, dy)
        assert_same(dx, torch.autograd.grad(expected, x, dy)[0])
        with_indices, _ = pool(x, **arguments, return_indices=True)
        assert_same(torch.autograd.grad(with_indices, x, dy)[0], dx)
