"""Depthwise and grouped convolution: sizes that do not fill the tiles of the GPU's kernels.

csrc/cuda/gather.h and the kernels above it cut images into tiles of pixels, channels into vectors
and reductions into slices; float64 is the judge of every remainder.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchconv.functional as F
from conftest import assert_accurate, everywhere, in_layout
from oracle import torch_F

pytestmark = everywhere

on_formats = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
on_widths = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
SIDES = [(-1, 2, 0, -2), (0, -3, -1, 1), (2, 1, 1, 2), (3, 0, 5, 4)]  # left, right, top, bottom


def check(x: Tensor, w: Tensor, layout: str, sides: Any = (1, 1, 1, 1), **kwargs: Any) -> None:
    """All three passes. x and w are as the kernels shall find them in memory."""
    b = torch.randn(w.shape[0]).to(x.dtype)
    groups = x.shape[1] // w.shape[1]
    doubles = [t.detach().double().contiguous().requires_grad_() for t in (x, w, b)]
    padded = torch_F.pad(doubles[0], sides)
    turned = doubles[1].flip(2, 3) if kwargs.pop("flip_kernel", False) else None
    truth = torch_F.conv2d(
        padded, doubles[1] if turned is None else turned, doubles[2], groups=groups, **kwargs
    )
    dz = in_layout(torch.randn_like(truth).to(x.dtype), layout)
    if turned is not None:
        kwargs["flip_kernel"] = True
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    z = F.conv2d(*leaves, padding=sides, groups=groups, **kwargs)
    assert_accurate(z, truth)
    expected = torch.autograd.grad(truth, doubles, dz.double())
    for out, value in zip(torch.autograd.grad(z, leaves, dz), expected, strict=True):
        assert_accurate(out, value)


def operands(
    x_size: tuple[int, ...], w_size: tuple[int, ...], layout: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return in_layout(torch.randn(x_size).to(dtype), layout), torch.randn(w_size).to(dtype)


@on_formats
@on_widths
@pytest.mark.parametrize("channels", [8, 24, 136, 272])
def test_channels_of_a_block(channels: int, dtype: torch.dtype, layout: str) -> None:
    for r, size in ((3, (5, 5, 9)), (5, (3, 7, 6)), (7, (2, 9, 8))):
        x, w = operands((size[0], channels, *size[1:]), (channels, 1, r, r), layout, dtype)
        for stride in (1, 2):
            check(x, w, layout, (r // 2,) * 4, stride=stride)


@on_formats
@on_widths
@pytest.mark.parametrize("width", [4, 8, 20])
def test_groups_of_a_block(width: int, dtype: torch.dtype, layout: str) -> None:
    for groups, filters in ((9, width), (3, width + 4), (2, 4)):
        x, w = operands((3, groups * width, 6, 11), (groups * filters, width, 3, 3), layout, dtype)
        for stride in (1, 2):
            check(x, in_layout(w, layout), layout, stride=stride)


@on_formats
@on_widths
@pytest.mark.parametrize("stride", [1, 2])
def test_unaligned(stride: int, dtype: torch.dtype, layout: str) -> None:
    """Tensors that begin between two vectors."""
    for width in (1, 4):
        x, w = operands((2, 16, 8, 16), (16, width, 3, 3), layout, dtype)
        memory = torch.full((x.numel() + 1,), 77.0).to(dtype)
        shifted = memory[1:].as_strided(x.shape, x.stride(), 1)
        shifted.copy_(x)
        check(shifted, w, layout, stride=stride)


@on_formats
@on_widths
@pytest.mark.parametrize("sides", SIDES)
def test_sides(sides: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """Padding of every parity, and crops; the kernel read in both directions."""
    for width, r in ((1, 3), (1, 5), (4, 3)):
        x, w = operands((2, 16, 9, 12), (16, width, r, r), layout, dtype)
        for stride in (1, 2):
            for flip in (False, True):
                check(x, w, layout, sides, stride=stride, flip_kernel=flip)


@on_formats
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 3), (4, 2)])
def test_image_within_the_kernel(size: tuple[int, int], layout: str) -> None:
    for r in (3, 5, 7):
        x, w = operands((3, 16, *size), (16, 1, r, r), layout, torch.float32)
        for stride in (1, 2):
            check(x, w, layout, (r // 2,) * 4, stride=stride)
    x, w = operands((3, 16, *size), (16, 4, 3, 3), layout, torch.float32)
    check(x, w, layout, stride=2)


@on_formats
@on_widths
@pytest.mark.parametrize("dilation", [(1, 2), (3, 1), (8, 9), (32, 1), (1, 33)])
def test_far_taps(dilation: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    x, w = operands((2, 16, 11, 14), (16, 1, 3, 3), layout, dtype)
    sides = (dilation[1],) * 2 + (dilation[0],) * 2
    check(x, w, layout, sides, dilation=dilation)


@on_formats
@pytest.mark.parametrize("width", [1, 4])
def test_long_sums(width: int, layout: str) -> None:
    """Weight gradients of several slices and long rows."""
    for stride in (1, 2):
        x, w = operands((2, 8, 120, 130), (8, width, 3, 3), layout, torch.float32)
        check(x, w, layout, stride=stride)


@on_formats
@pytest.mark.parametrize("width", [1, 4])
def test_saved_sums(width: int, layout: str) -> None:
    """An activation whose derivative needs what came before it."""
    for kwargs in ({"padding": 1}, {"padding": 1, "stride": 2}, {"dilation": 2}):
        x, w = operands((2, 16, 10, 9), (16, width, 3, 3), layout, torch.float32)
        kwargs = {**kwargs, "groups": 16 // width}
        leaves = [t.requires_grad_() for t in (x, w)]
        doubles = [t.detach().double().contiguous().requires_grad_() for t in (x, w)]
        out = F.conv2d(*leaves, **kwargs, activation="silu")
        truth = torch_F.silu(torch_F.conv2d(*doubles, **kwargs))
        assert_accurate(out, truth)
        dy = torch.randn_like(out)
        expected = torch.autograd.grad(truth, doubles, dy.double())
        for gradient, value in zip(torch.autograd.grad(out, leaves, dy), expected, strict=True):
            assert_accurate(gradient, value)


@on_formats
@on_widths
@pytest.mark.parametrize("r", [3, 5, 7])
def test_weight_gradient_meets_no_padding(r: int, dtype: torch.dtype, layout: str) -> None:
    """Where numbers at an edge are not finite, taps get them from true products alone."""
    for size, stride in ((5, 1), (9, 1), (12, 1), (7, 2), (12, 2)):
        x, w = operands((2, 16, size, size), (16, 1, r, r), layout, dtype)
        w.requires_grad_()
        z = F.conv2d(x, w, padding=r // 2, stride=stride, groups=16)
        dz = in_layout(torch.randn_like(z), layout)
        odd_x, odd_dz = torch.zeros_like(x), torch.zeros_like(dz)
        for channel, (row, column) in enumerate([(0, 0), (0, -1), (-1, 0), (-1, -1), (2, -1)]):
            odd_x[1, channel, row, column] = odd_dz[0, channel + 6, row, column] = 1
        x = in_layout(torch.where(odd_x > 0, torch.inf, x), layout)
        dz = in_layout(torch.where(odd_dz > 0, torch.nan, dz), layout)
        z = F.conv2d(x, w, padding=r // 2, stride=stride, groups=16)
        (dw,) = torch.autograd.grad(z, w, dz)
        reached = sum(
            torch.nn.grad.conv2d_weight(
                a.double(), w.shape, b.double(), padding=r // 2, stride=stride, groups=16
            )
            for a, b in ((odd_x, torch.ones_like(dz)), (torch.ones_like(x), odd_dz))
        )
        assert torch.equal(~torch.isfinite(dw), reached > 0)
