"""Sizes that divide no tile of the GPU's exact product, and sums that it takes in pieces.

Filters, pixels, channels and taps stand across its tiles of 32 to 128 rows and columns, its steps
of 8 and its chunks of 256 terms; strides past 16 take more than one launch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_F

import torchconv.functional as F
from conftest import FLOATS, assert_accurate, in_layout, relative_error

FORMATS = ("contiguous", "channels_last", "offset")
# Winograd's algorithms promise it, which the tables may choose.
FLOAT_BOUND = 2e-6

CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "more_filters_than_a_tile": ((2, 40, 11, 9), (136, 40, 3, 3), {"padding": 1}),
    "strided": ((2, 20, 17, 13), (70, 20, 3, 3), {"padding": 1, "stride": 2}),
    "quads": ((3, 68, 9, 9), (72, 68, 3, 3), {"padding": 1}),
    "odd_1x1": ((1, 133, 12, 11), (129, 133, 1, 1), {}),
    "dilated": ((2, 24, 15, 15), (65, 24, 3, 3), {"padding": 2, "stride": (3, 2), "dilation": 2}),
    "groups": ((2, 66, 9, 10), (66, 33, 5, 2), {"groups": 2, "padding": (2, 1), "stride": (2, 3)}),
    "few_filters": ((1, 300, 5, 5), (20, 300, 3, 3), {"padding": 1}),
    "patches": ((2, 8, 30, 33), (6, 8, 16, 16), {"stride": 16}),
    "pixels_apart": ((2, 19, 9, 14), (513, 19, 1, 1), {"stride": 2}),
    "stride_20": ((2, 8, 40, 40), (6, 8, 3, 3), {"stride": 20}),
    "stride_18": ((2, 6, 9, 40), (6, 6, 3, 3), {"stride": (1, 18)}),
    "one_pixel": ((9, 68, 1, 1), (72, 68, 1, 1), {}),
}


def check(out: Tensor, truth: Tensor) -> None:
    if out.dtype == torch.float32:
        assert relative_error(out, truth) <= FLOAT_BOUND
    else:
        assert_accurate(out, truth)


@pytest.mark.parametrize("weight_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("input_format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_residues(
    case: str, dtype: torch.dtype, input_format: str, weight_format: str, device: str
) -> None:
    x_size, w_size, kwargs = CASES[case]
    x, w, b = (torch.randn(s).to(device, dtype) for s in (x_size, w_size, w_size[:1]))
    leaves = [in_layout(x, input_format), in_layout(w, weight_format), b]
    leaves = [t.requires_grad_() for t in leaves]
    z = F.conv2d(*leaves, **kwargs)
    dz = in_layout(torch.randn_like(z), input_format)
    doubles = [t.detach().double().contiguous().requires_grad_() for t in leaves]
    truth = torch_F.conv2d(*doubles, **kwargs)
    expected = torch.autograd.grad(truth, doubles, dz.double())
    for out, value in zip(
        (z, *torch.autograd.grad(z, leaves, dz)), (truth, *expected), strict=True
    ):
        check(out, value)


@pytest.mark.parametrize("layout", FORMATS[:2])
@pytest.mark.parametrize(
    ("x_size", "w_size"),
    [
        ((1, 4096, 5, 4), (8, 4096, 1, 1)),
        ((1, 512, 5, 4), (72, 512, 3, 3)),
        ((12, 6, 40, 40), (7, 6, 3, 3)),
    ],
    ids=str,
)
def test_long_sums(
    x_size: tuple[int, ...], w_size: tuple[int, ...], layout: str, device: str
) -> None:
    """Of all passes: many channels, many filters, many pixels."""
    x = in_layout(torch.randn(x_size, device=device), layout).requires_grad_()
    w = in_layout(torch.randn(w_size, device=device), layout).requires_grad_()
    z = F.conv2d(x, w, padding=w_size[2] // 2)
    dz = torch.randn_like(z)
    doubles = [t.detach().double().requires_grad_() for t in (x, w)]
    truth = torch_F.conv2d(*doubles, padding=w_size[2] // 2)
    expected = torch.autograd.grad(truth, doubles, dz.double())
    for out, value in zip(
        (z, *torch.autograd.grad(z, (x, w), dz)), (truth, *expected), strict=True
    ):
        check(out, value)


@pytest.mark.parametrize("layout", FORMATS[:2])
@pytest.mark.parametrize(("channels", "filters", "batch"), [(72, 80, 5), (260, 40, 3)])
def test_a_sample_does_not_depend_on_its_batch(
    channels: int, filters: int, batch: int, layout: str, device: str
) -> None:
    """Tiles and slices may change with the batch, and no bit does."""
    x = in_layout(torch.randn(batch, channels, 9, 7, device=device), layout).requires_grad_()
    w = torch.randn(filters, channels, 3, 3, device=device)
    z = F.conv2d(x, w, padding=1)
    dz = torch.randn_like(z)
    (dx,) = torch.autograd.grad(z, x, dz)
    for n in range(batch):
        alone = in_layout(x[n : n + 1], layout)
        alone_z = F.conv2d(alone, w, padding=1)
        assert torch.equal(alone_z[0], z[n])
        assert torch.equal(torch.autograd.grad(alone_z, alone, dz[n : n + 1])[0][0], dx[n])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [(3, 37, 7, 7), (2, 40, 50, 60), (300, 3, 5, 8), (1, 300, 9, 9)])
def test_bias_gradient(size: tuple[int, ...], dtype: torch.dtype, layout: str, device: str) -> None:
    """Sums over strips and ranges of pixels that are not whole, after an activation's gradient."""
    n, k, p, q = size
    x = in_layout(torch.randn(n, 1, p, q).to(device, dtype), layout)
    w = torch.randn(k, 1, 1, 1).to(device, dtype)
    b = torch.randn(k).to(device, dtype).requires_grad_()
    dy = in_layout((torch.rand(size) + 1).to(device, dtype), layout)
    for activation in (None, "relu"):
        y = F.conv2d(x, w, b, activation=activation)
        (db,) = torch.autograd.grad(y, b, dy)
        reached = dy.double() if activation is None else torch.where(y > 0, dy.double(), 0.0)
        assert_accurate(db, reached.sum((0, 2, 3)))
