"""Grouped convolution with several channels a group, against float64.

Narrow groups lie side by side in vectors (csrc/cpu/group_gather.cpp, group_wgrad.cpp, and for 3x3
kernels group_winograd*.cpp): widths here fill a vector, leave lanes of it empty, or need several of
them. Wide groups of 3x3 kernels go by Winograd's algorithm, group by group.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchconv
import torchconv.functional as F
from conftest import assert_accurate, cpu_only, everywhere, in_layout, threads
from oracle import torch_F

pytestmark = everywhere

# name: input size, weight size, further arguments of conv2d
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((2, 32, 15, 14), (32, 4, 3, 3), {"groups": 8, "padding": 1}),
    "3x3_s2": ((2, 32, 15, 14), (32, 4, 3, 3), {"groups": 8, "padding": 1, "stride": 2}),
    "3x3_s2_even": ((1, 24, 8, 28), (48, 8, 3, 3), {"groups": 3, "padding": 1, "stride": 2}),
    "3x3_s2_wide": ((2, 72, 7, 9), (72, 24, 3, 3), {"groups": 3, "padding": 1, "stride": 2}),
    "3x3_s3x2": ((2, 12, 13, 15), (18, 2, 3, 3), {"groups": 6, "padding": 1, "stride": (3, 2)}),
    "3x3_s2_uncovered": ((2, 12, 9, 9), (12, 3, 1, 3), {"groups": 4, "stride": 2}),
    "3x3_d2": ((2, 16, 9, 17), (16, 2, 3, 3), {"groups": 8, "padding": 2, "dilation": 2}),
    "3x3_s2_d3": ((1, 6, 12, 19), (9, 2, 3, 3), {"groups": 3, "stride": 2, "dilation": (1, 3)}),
    "5x5": ((2, 30, 9, 11), (30, 5, 5, 5), {"groups": 6, "padding": 2}),
    "7x4": ((1, 14, 20, 8), (6, 7, 7, 4), {"groups": 2, "padding": (3, 1)}),
    "1x1": ((2, 24, 6, 5), (36, 8, 1, 1), {"groups": 3}),
    "1x1_wide": ((2, 192, 5, 7), (160, 48, 1, 1), {"groups": 4}),
    "1x1_chunks": ((1, 32, 4, 5), (8400, 16, 1, 1), {"groups": 2}),
    "1x1_s2": ((2, 24, 6, 5), (36, 8, 1, 1), {"groups": 3, "stride": 2}),
    "kernel_beyond_image": ((2, 10, 2, 3), (15, 2, 5, 7), {"groups": 5, "padding": (2, 4)}),
    "padding_beyond_kernel": ((2, 12, 3, 4), (12, 4, 3, 3), {"groups": 3, "padding": 5}),
    "few_filters": ((2, 48, 7, 7), (6, 16, 3, 3), {"groups": 3, "padding": 1}),
    "many_filters": ((2, 6, 7, 7), (51, 2, 3, 3), {"groups": 3, "padding": 1}),
    "several_bands": ((1, 12, 70, 60), (12, 6, 3, 3), {"groups": 2, "padding": 1}),
    "long_rows": ((1, 10, 3, 450), (10, 5, 3, 3), {"groups": 2, "padding": 1}),
    "terms_in_pieces": ((1, 32, 9, 9), (32, 16, 9, 3), {"groups": 2, "padding": (4, 1)}),
    "7x7_p0": ((2, 32, 12, 13), (32, 8, 7, 7), {"groups": 4}),
    "9x9_p0": ((2, 64, 14, 12), (64, 32, 9, 9), {"groups": 2}),
    "5x6_s2_p0": ((2, 24, 9, 8), (24, 6, 5, 6), {"groups": 4, "stride": 2}),
    "7x5_p5": ((2, 16, 6, 5), (32, 8, 7, 5), {"groups": 2, "padding": 5}),
    "rows_winograd": ((2, 36, 17, 23), (72, 4, 3, 3), {"groups": 9, "padding": (0, 2)}),
    "whole_rows": ((4, 64, 58, 14), (64, 4, 3, 3), {"groups": 16, "padding": 1}),
    "whole_rows_of_tails": ((5, 20, 55, 13), (35, 4, 3, 3), {"groups": 5, "padding": (2, 1)}),
    "tiles_of_one_row": ((2, 16, 10, 64), (16, 4, 3, 3), {"groups": 4, "padding": 1}),
    "tiles_of_long_rows": ((2, 20, 7, 58), (35, 4, 3, 3), {"groups": 5, "padding": (0, 2)}),
    "tiles_of_two_rows": ((2, 24, 27, 29), (24, 8, 3, 3), {"groups": 3, "padding": 1}),
    "tiles_of_two_whole_rows": ((1, 12, 17, 32), (18, 4, 3, 3), {"groups": 3, "padding": 1}),
    "tiles_of_four_rows": ((3, 32, 14, 14), (32, 8, 3, 3), {"groups": 4, "padding": 1}),
    "tiles_of_four_rows_p0": ((2, 64, 16, 18), (64, 16, 3, 3), {"groups": 4}),
    "winograd": ((3, 96, 9, 14), (96, 32, 3, 3), {"groups": 3, "padding": 1}),
    "winograd_of_many": ((2, 160, 7, 7), (240, 16, 3, 3), {"groups": 10, "padding": 1}),
}
WIDTHS = (2, 3, 5, 6, 7, 8, 11, 12, 16, 17, 24)
BOUND = {torch.float32: 2e-6, torch.float64: 1e-14}

on_formats = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
on_cases = pytest.mark.parametrize("case", CASES)
on_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)


def problem(x_size: tuple[int, ...], w_size: tuple[int, ...], layout: str) -> list[Tensor]:
    scale = (w_size[1] * w_size[2] * w_size[3]) ** -0.5
    leaves = [torch.randn(x_size), torch.randn(w_size) * scale]
    return [in_layout(t, layout) for t in leaves] + [torch.randn(w_size[0])]


def make(case: str, layout: str) -> tuple[list[Tensor], dict[str, Any]]:
    x_size, w_size, kwargs = CASES[case]
    return problem(x_size, w_size, layout), kwargs


def check(out: Tensor, truth: Tensor) -> None:
    if out.dtype not in BOUND:
        return assert_accurate(out, truth)
    error = (out.double() - truth).norm() / truth.norm()
    assert error <= BOUND[out.dtype], f"relative error {error:.2e}"
    return None


def check_all(leaves: list[Tensor], kwargs: dict[str, Any]) -> None:
    leaves = [t.detach().requires_grad_() for t in leaves]
    z = F.conv2d(*leaves, **kwargs)
    dz = torch.randn_like(z)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch_F.conv2d(*doubles, **kwargs)
    check(z, truth)
    truths = torch.autograd.grad(truth, doubles, dz.double())
    for gradient, expected in zip(torch.autograd.grad(z, leaves, dz), truths, strict=True):
        check(gradient, expected)


@on_formats
@on_dtypes
@on_cases
def test_all_passes(case: str, dtype: torch.dtype, layout: str) -> None:
    leaves, kwargs = make(case, layout)
    check_all([t.to(dtype) for t in leaves], kwargs)


@on_formats
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int, layout: str) -> None:
    """Groups that do not fill a vector, and as many of them as do not fill the last one."""
    for groups in (2, 3, 5, 9):
        for filters in {width, 3, 16}:
            x, w, b = problem((1, groups * width, 5, 8), (groups * filters, width, 3, 3), layout)
            check_all([x, w, b], {"groups": groups, "padding": 1})


@on_formats
@pytest.mark.parametrize("stride", [1, 2])
def test_image_widths(stride: int, layout: str) -> None:
    """Every remainder of a register tile."""
    for width in range(1, 32):
        x, w, b = problem((2, 8, 3, width), (8, 4, 3, 3), layout)
        check_all([x, w, b], {"groups": 2, "padding": 1, "stride": stride})


@on_formats
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
@on_dtypes
@pytest.mark.parametrize(
    "case", ["3x3", "5x5", "few_filters", "rows_winograd", "tiles_of_four_rows", "winograd"]
)
def test_epilogue(case: str, dtype: torch.dtype, activation: str, layout: str) -> None:
    leaves, kwargs = make(case, layout)
    leaves = [t.to(dtype) for t in leaves]
    truth = torch_F.conv2d(*(t.double() for t in leaves), **kwargs)
    check(F.conv2d(*leaves, **kwargs, activation=activation), getattr(torch_F, activation)(truth))


@on_formats
@on_cases
def test_bits(case: str, layout: str) -> None:
    """The same for every number of threads, and for a sample alone and in its batch."""
    (x, w, b), kwargs = make(case, layout)
    x = in_layout(torch.cat([x, x.flip(0), x]), layout)
    x, w = x.requires_grad_(), w.requires_grad_()
    z = F.conv2d(x, w, b, **kwargs)
    dz = torch.randn_like(z)
    gradients = torch.autograd.grad(z, (x, w), dz, retain_graph=True)
    with threads(1 if torch.get_num_threads() > 1 else 2):
        assert torch.equal(F.conv2d(x, w, b, **kwargs), z)
        for one, other in zip(torch.autograd.grad(z, (x, w), dz), gradients, strict=True):
            assert torch.equal(one, other)
    alone = x.detach()[1:2].requires_grad_()
    z_alone = F.conv2d(alone, w, b, **kwargs)
    assert torch.equal(z_alone[0], z[1])
    assert torch.equal(torch.autograd.grad(z_alone, alone, dz[1:2])[0][0], gradients[0][1])


@on_formats
@pytest.mark.parametrize("size", [(56, 56), (28, 28), (20, 64)])
def test_large_batch(size: tuple[int, int], layout: str) -> None:
    """Outputs that go past the caches are those of a sample alone."""
    samples = (9 << 20) // (32 * size[0] * size[1] * 4)
    x, w, b = problem((samples, 32, *size), (32, 4, 3, 3), layout)
    z = F.conv2d(x, w, b, padding=1, groups=8, activation="relu")
    for n in (0, samples - 1):
        alone = F.conv2d(x[n : n + 1], w, b, padding=1, groups=8, activation="relu")
        assert torch.equal(z[n], alone[0])


@on_formats
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@on_cases
def test_not_finite(case: str, value: float, layout: str) -> None:
    """What is not finite in x or dz reaches what it should: no other group, sample or tap."""
    (x, w, _), kwargs = make(case, layout)
    x[0, 1, x.shape[2] // 2, x.shape[3] // 2] = x[-1, -1, 0, 0] = value
    x, w = x.requires_grad_(), w.requires_grad_()
    z = F.conv2d(x, w, **kwargs)
    dz = torch.randn_like(z)
    dz[0, 0, 0, 0] = dz[-1, -1, -1, -1] = value
    x2, w2 = (t.detach().double().requires_grad_() for t in (x, w))
    truth = torch_F.conv2d(x2, w2, **kwargs)
    assert torch.equal(torch.isfinite(z), torch.isfinite(truth))
    assert torch.equal(torch.isnan(z), torch.isnan(truth))
    # dx alone: torch's own weight gradient multiplies with the padding.
    (dx,) = torch.autograd.grad(z, x, dz)
    reached = torch.nn.grad.conv2d_input(
        x.shape, torch.ones_like(w2), (~torch.isfinite(dz)).double(), **kwargs
    )
    assert torch.equal(~torch.isfinite(dx), reached > 0)


@on_formats
@pytest.mark.parametrize("case", ["3x3", "3x3_s2", "terms_in_pieces", "winograd"])
def test_weight_gradient_meets_no_padding(case: str, layout: str) -> None:
    """Taps that see padding where dz is not finite get nothing from it. But on a GPU other kernels
    than 3x3 are a matrix product, which, like cuDNN's, multiplies dz by the zeros of padding."""
    (x, w, _), kwargs = make(case, layout)
    w = w.requires_grad_()
    z = F.conv2d(x, w, **kwargs)
    dz = torch.zeros_like(z)
    dz[0, 0, 0, 0] = float("inf")
    (dw,) = torch.autograd.grad(z, w, dz)
    top, left = kwargs["padding"] if isinstance(kwargs["padding"], tuple) else (1, 1)
    reached = torch.zeros_like(w, dtype=torch.bool)
    reached[0, :, top:, left:] = True
    if case == "terms_in_pieces" and x.is_cuda:
        assert not torch.isfinite(dw[reached]).any()
    else:
        assert torch.equal(~torch.isfinite(dw), reached)


@on_formats
def test_kept_weights_serve_other_images(layout: str) -> None:
    for width in (4, 24, 32):
        layer = torchconv.nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4).eval()
        with torch.no_grad():
            for size in ((7, 9), (30, 20), (4, 61)):
                x = in_layout(torch.randn(2, 4 * width, *size), layout)
                truth = torch_F.conv2d(
                    x.double(), layer.weight.double(), layer.bias.double(), padding=1, groups=4
                )
                for _ in range(2):
                    check(layer(x), truth)


@cpu_only
@on_formats
def test_streamed(layout: str) -> None:
    """An output too large for the caches, in bands of rows of which the last has fewer."""
    x, w, b = problem((2, 16, 257, 256), (16, 8, 3, 3), layout)
    truth = torch_F.relu(torch_F.conv2d(*(t.double() for t in (x, w, b)), padding=1, groups=2))
    check(F.conv2d(x, w, b, padding=1, groups=2, activation="relu"), truth)


@cpu_only
@on_formats
def test_streamed_input_gradient(layout: str) -> None:
    """The same of a stride, whose phases write between each other's pixels."""
    leaves = problem((2, 16, 258, 256), (16, 8, 3, 3), layout)
    check_all(leaves, {"padding": 1, "stride": 2, "groups": 2})
