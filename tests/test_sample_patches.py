"""Convolutions of few outputs for each image as the fully connected layer of their patches
(csrc/cpu/sample_patches.cpp), against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchconv
import torchconv.functional as F
from conftest import assert_accurate, cpu_only, everywhere, in_layout
from oracle import torch_F
from test_determinism import threads

pytestmark = everywhere

# name: input size, weight size, further arguments of conv2d
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "strided": ((1, 300, 14, 14), (96, 300, 3, 5), {"stride": 4}),
    "several_images": ((5, 64, 10, 10), (33, 64, 4, 5), {"stride": (4, 2)}),
    "small_kernel": ((3, 256, 5, 4), (40, 256, 2, 2), {"stride": (2, 1)}),
    "wide_kernel": ((2, 8, 9, 41), (64, 8, 4, 37), {"stride": (3, 2)}),
    "rows_apart": ((2, 120, 13, 7), (65, 120, 3, 3), {"stride": 3, "dilation": (2, 1)}),
    "part_of_the_image": ((2, 130, 17, 20), (48, 130, 3, 3), {"stride": (9, 6)}),
    "many_filters": ((2, 64, 14, 14), (256, 64, 5, 5), {"stride": 4}),
}
WORDS = "patches as samples"
FORMATS = ("contiguous", "channels_last")
on_cases = pytest.mark.parametrize("case", CASES)
on_formats = pytest.mark.parametrize("layout", FORMATS)
on_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def make(
    case: str, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> tuple[list[Tensor], dict[str, Any]]:
    x_size, w_size, kwargs = CASES[case]
    x, w = torch.randn(x_size, dtype=dtype), torch.randn(w_size, dtype=dtype) / 9
    return [in_layout(x, layout), in_layout(w, layout), torch.randn(w_size[0], dtype=dtype)], kwargs


@cpu_only
@on_cases
def test_explained(case: str) -> None:
    (x, w, _), kwargs = make(case)
    report = torchconv.explain(x, w, **kwargs, peak=100.0, bandwidth=10.0)
    assert WORDS in report["wgrad"].blocking
    many = torchconv.explain(x.repeat(64, 1, 1, 1), w, **kwargs, peak=100.0, bandwidth=10.0)
    assert WORDS not in many["wgrad"].blocking
    # The choice is that of a sample alone.
    assert many["fprop"].algorithm == report["fprop"].algorithm
    assert (WORDS in report["fprop"].blocking) == (case not in ("many_filters", "wide_kernel"))


@on_cases
@on_dtypes
@on_formats
def test_against_float64(case: str, dtype: torch.dtype, layout: str) -> None:
    tensors, kwargs = make(case, dtype, layout)
    wide = [t.double().contiguous().requires_grad_() for t in tensors]
    leaves = [t.detach().requires_grad_() for t in tensors]
    truth, got = torch_F.conv2d(*wide, **kwargs), F.conv2d(*leaves, **kwargs)
    assert_accurate(got, truth)
    dz = in_layout(torch.randn(truth.shape, dtype=dtype), layout)
    grads = torch.autograd.grad(got, leaves, dz)
    for g, t in zip(grads, torch.autograd.grad(truth, wide, dz.double()), strict=True):
        assert_accurate(g, t)


@on_cases
def test_epilogue(case: str) -> None:
    tensors, kwargs = make(case)
    truth = torch_F.conv2d(*(t.double() for t in tensors), **kwargs)
    residual = torch.randn(truth.shape)
    got = F.conv2d(*tensors, **kwargs, activation="silu", residual=residual)
    assert_accurate(got, torch_F.silu(truth + residual.double()))


@on_cases
@on_formats
def test_bits_depend_on_neither_threads_nor_batch(case: str, layout: str) -> None:
    (x, w, b), kwargs = make(case, layout=layout)
    w.requires_grad_()
    with threads(1):
        first = F.conv2d(x, w, b, **kwargs)
        gradient = torch.autograd.grad(first.sum(), w)[0]
    with threads(3):
        again = F.conv2d(x, w, b, **kwargs)
        assert torch.equal(again, first)
        assert torch.equal(torch.autograd.grad(again.sum(), w)[0], gradient)
        many = in_layout(x.repeat(9, 1, 1, 1), layout)
        assert torch.equal(F.conv2d(many, w, b, **kwargs)[-len(x) :], first)
