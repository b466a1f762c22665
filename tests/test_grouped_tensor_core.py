"""Grouped convolutions on tensor cores (csrc/cuda/grouped_mma_*.cu; of groups of more than 64
channels mma_gather_*.cu; some of 32 and 64 on Hopper cutlass_sm90_groups*.cu): all passes against
float64.

Groups share a unit of 8 channels, are one, or have several; slabs are not full; images end inside a
tile or fit into one with others.

They are for the GPU and the emulator; the CPU's kernels pass them too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_F

import torchconv.functional as F
from conftest import assert_accurate, assert_same, everywhere, in_layout

pytestmark = everywhere

# name: batch and image, channels of a group, groups, kernel, further arguments of conv2d
CASES: dict[str, tuple[tuple[int, int, int], int, int, tuple[int, int], dict[str, Any]]] = {
    "of_4": ((2, 15, 14), 4, 8, (3, 3), {"padding": 1}),
    "of_4_and_rest": ((2, 10, 17), 4, 18, (3, 3), {"padding": 1}),
    "of_2": ((1, 9, 11), 2, 12, (3, 3), {"padding": 1}),
    "of_8": ((3, 7, 7), 8, 8, (3, 3), {"padding": 1}),
    "of_8_and_rest": ((1, 20, 35), 8, 11, (3, 3), {"padding": 1}),
    "of_16": ((2, 14, 14), 16, 5, (3, 3), {"padding": 1}),
    "of_24": ((2, 9, 9), 24, 3, (3, 3), {"padding": 1}),
    "of_4_many_tiles": ((9, 30, 29), 4, 2, (3, 3), {"padding": 1}),
    "of_32": ((5, 7, 7), 32, 3, (3, 3), {"padding": 1}),
    "of_64": ((3, 7, 6), 64, 2, (3, 3), {"padding": 1}),
    "of_4_s2": ((2, 15, 14), 4, 16, (3, 3), {"padding": 1, "stride": 2}),
    "of_8_s2": ((2, 16, 19), 8, 4, (3, 3), {"padding": 1, "stride": 2}),
    "of_32_s2": ((2, 11, 14), 32, 2, (3, 3), {"padding": 1, "stride": 2}),
    "of_64_s2": ((2, 14, 14), 64, 2, (3, 3), {"padding": 1, "stride": 2}),
    "of_32_dilated_s2": ((2, 13, 12), 32, 2, (3, 3), {"stride": 2, "dilation": (3, 2)}),
    "of_4_wide": ((2, 5, 150), 4, 4, (3, 3), {"padding": 1}),
    "of_4_wide_s2": ((1, 9, 141), 4, 10, (3, 3), {"padding": 1, "stride": 2}),
    "of_8_no_padding": ((2, 20, 9), 8, 3, (3, 3), {}),
    "of_8_more_padding": ((2, 6, 9), 8, 3, (3, 3), {"padding": (3, 2)}),
    "of_16_no_padding_s2": ((2, 9, 12), 16, 3, (3, 3), {"stride": 2}),
    "of_16_s2": ((5, 15, 13), 16, 5, (3, 3), {"padding": 1, "stride": 2}),
    "of_32_images": ((20, 7, 7), 32, 3, (3, 3), {"padding": 1}),
    "of_64_images_s2": ((11, 14, 13), 64, 2, (3, 3), {"padding": 1, "stride": 2}),
    "of_32_few_rows": ((3, 14, 13), 32, 3, (3, 3), {"padding": 1}),
    "of_32_4x2": ((2, 13, 12), 32, 4, (4, 2), {"padding": (2, 1)}),
    "of_64_few_rows_s2": ((2, 27, 28), 64, 2, (3, 3), {"padding": 1, "stride": 2}),
    "of_40": ((3, 9, 8), 40, 3, (3, 3), {"padding": 1}),
    "of_64_5x2": ((2, 9, 8), 64, 3, (5, 2), {"padding": (2, 1)}),
    "of_72_s2": ((2, 9, 8), 72, 2, (3, 3), {"padding": 1, "stride": 2}),
    "of_8_s3x4": ((2, 16, 19), 8, 2, (3, 3), {"padding": 2, "stride": (3, 4)}),
    "of_8_dilated": ((2, 13, 12), 8, 3, (3, 3), {"padding": 2, "dilation": 2}),
    "of_16_dilated_s2": ((2, 13, 12), 16, 2, (3, 3), {"stride": 2, "dilation": (3, 2)}),
    "of_4_5x5": ((2, 9, 10), 4, 4, (5, 5), {"padding": 2}),
    "of_16_7x2": ((2, 12, 10), 16, 3, (7, 2), {"padding": (3, 1)}),
    "of_8_1x1": ((2, 6, 9), 8, 5, (1, 1), {}),
    "of_16_1x1_s2": ((2, 7, 9), 16, 3, (1, 1), {"stride": 2}),
    "beyond_image": ((2, 2, 3), 8, 4, (5, 3), {"padding": (2, 4)}),
    "uncovered": ((2, 8, 10), 8, 4, (1, 3), {"stride": 3}),
}

on_cases = pytest.mark.parametrize("case", CASES)
on_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset"])
on_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def operands(case: str, dtype: torch.dtype, layout: str = "channels_last") -> list[Tensor]:
    """x, w and b, which begins at an odd element as parts of one flat buffer may."""
    (n, h, w), group, groups, kernel, _ = CASES[case]
    weights = torch.randn(group * groups, group, *kernel) * (group * kernel[0] * kernel[1]) ** -0.5
    tensors = [torch.randn(n, group * groups, h, w), weights]
    return [
        *(in_layout(t.to(dtype), layout) for t in tensors),
        torch.randn(group * groups + 1).to(dtype)[1:],
    ]


def arguments(case: str) -> dict[str, Any]:
    return {"groups": CASES[case][2], **CASES[case][4]}


@on_layouts
@on_dtypes
@on_cases
def test_all_passes(case: str, dtype: torch.dtype, layout: str) -> None:
    leaves = [t.requires_grad_() for t in operands(case, dtype, layout)]
    z = F.conv2d(*leaves, **arguments(case))
    dz = in_layout(torch.randn_like(z), layout)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch_F.conv2d(*doubles, **arguments(case))
    assert_accurate(z, truth)
    truths = torch.autograd.grad(truth, doubles, dz.double())
    for gradient, expected in zip(torch.autograd.grad(z, leaves, dz), truths, strict=True):
        assert_accurate(gradient, expected)


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
@on_dtypes
@pytest.mark.parametrize("case", ["of_4", "of_16", "of_32_s2", "of_64"])
def test_epilogue(case: str, dtype: torch.dtype, activation: str) -> None:
    x, w, b = (t.requires_grad_() for t in operands(case, dtype))
    y = F.conv2d(x, w, b, **arguments(case), activation=activation)
    truth = torch_F.conv2d(x.double(), w.double(), b.double(), **arguments(case))
    assert_accurate(y, getattr(torch_F, activation)(truth))
    with torch.no_grad():
        assert_same(F.conv2d(x, w, b, **arguments(case), activation=activation), y)


@on_dtypes
@pytest.mark.parametrize("case", ["of_4", "of_8_s2", "of_16", "of_32"])
def test_residual(case: str, dtype: torch.dtype) -> None:
    """Added before the one rounding, where the pre-activation is kept and where it is not."""
    x, w, b = operands(case, dtype)
    truth = torch_F.conv2d(x.double(), w.double(), b.double(), **arguments(case))
    residual = in_layout(torch.randn(truth.shape).to(dtype), "channels_last")
    truth += residual
    leaves = [t.requires_grad_() for t in (x, w, b, residual)]
    y = F.conv2d(*leaves[:3], **arguments(case), activation="silu", residual=residual)
    assert_accurate(y, torch_F.silu(truth))
    with torch.no_grad():
        same = F.conv2d(x, w, b, **arguments(case), activation="silu", residual=residual)
        assert_same(same, y)
        assert_accurate(F.conv2d(x, w, b, **arguments(case), residual=residual), truth)


@on_cases
def test_sample_by_itself(case: str) -> None:
    x, w, b = operands(case, torch.float16)
    x = in_layout(torch.cat([x.flip(0)] * 4), "channels_last").requires_grad_()
    z = F.conv2d(x, w, b, **arguments(case))
    dz = torch.randn_like(z)
    (dx,) = torch.autograd.grad(z, x, dz)
    for i in (0, len(x) - 1):
        alone = x.detach()[i : i + 1].requires_grad_()
        z_alone = F.conv2d(alone, w, b, **arguments(case))
        assert_same(z_alone, z[i : i + 1])
        assert_same(torch.autograd.grad(z_alone, alone, dz[i : i + 1])[0], dx[i : i + 1])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    "case",
    ["of_4", "of_2", "of_8", "of_4_s2", "of_16", "of_4_5x5", "of_32", "of_32_few_rows", "of_32_s2"]
    + ["of_64", "of_64_s2"],
)
def test_not_finite(case: str, value: float) -> None:
    """What is not finite reaches no other group, sample or tap."""
    x, w, _ = operands(case, torch.float16)
    x[0, 1, x.shape[2] // 2, x.shape[3] // 2] = x[-1, -1, 0, 0] = value
    x, w = x.requires_grad_(), w.requires_grad_()
    z = F.conv2d(x, w, **arguments(case))
    dz = torch.randn_like(z)
    truth = torch_F.conv2d(x.double(), w.double(), **arguments(case))
    assert torch.equal(torch.isfinite(z), torch.isfinite(truth))
    assert torch.equal(torch.isnan(z), torch.isnan(truth))
    (dw,) = torch.autograd.grad(z, w, dz, retain_graph=True)
    reached = torch.nn.grad.conv2d_weight(
        (~torch.isfinite(x.detach())).double(), w.shape, torch.ones_like(z).double(),
        **arguments(case),
    )  # fmt: skip
    assert torch.equal(~torch.isfinite(dw), reached > 0)
    dz[0, 0, 0, 0] = dz[-1, -1, -1, -1] = value
    (dx,) = torch.autograd.grad(z, x, dz)
    reached = torch.nn.grad.conv2d_input(
        x.shape, torch.ones_like(w).double(), (~torch.isfinite(dz)).double(), **arguments(case)
    )
    assert torch.equal(~torch.isfinite(dx), reached > 0)


@on_dtypes
@pytest.mark.parametrize("filters", [32, 40, 96])
def test_as_many_filters_as_wanted(filters: int, dtype: torch.dtype) -> None:
    """A wide group's filters need not be as many as its channels."""
    x = in_layout(torch.randn(2, 3 * 48, 7, 9).to(dtype), "channels_last").requires_grad_()
    w = (torch.randn(3 * filters, 48, 3, 3) * (48 * 9) ** -0.5).to(dtype).requires_grad_()
    b = torch.randn(3 * filters).to(dtype)
    z = F.conv2d(x, w, b, stride=(2, 1), padding=1, groups=3)
    doubles = [t.detach().double().requires_grad_() for t in (x, w)]
    truth = torch_F.conv2d(*doubles, b.double(), stride=(2, 1), padding=1, groups=3)
    assert_accurate(z, truth)
    dz = in_layout(torch.randn_like(z), "channels_last")
    truths = torch.autograd.grad(truth, doubles, dz.double())
    for gradient, expected in zip(torch.autograd.grad(z, (x, w), dz), truths, strict=True):
        assert_accurate(gradient, expected)
