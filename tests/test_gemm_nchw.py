"""The two products that compute dense convolutions in NCHW, against float64.

The product along pixels (csrc/cpu/pixel_gemm.cpp) takes 1x1 kernels: its vectors cross from sample
to sample. Those with a stride and kernels that lie side by side become such (csrc/cpu/patches.cpp),
and kernels as large as the image a product of samples (sample_gemm.cpp). The product over a band
(csrc/cpu/band_gemm.cpp) takes the other kernels that Winograd leaves: sizes here reach its chunks
of channels, its columns of taps, ragged filters and short rows. Where most of the gather's taps
would lie beside dz, or few pixels meet many weights, dgrad is the fold of a product
(csrc/cpu/col2im.cpp), in either layout, in bfloat16 that of a channel (column_pairs.cpp).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_F

import torchconv
import torchconv.functional as F
from conftest import assert_accurate, in_layout, threads

# name: input size, weight size, further arguments of conv2d
PIXEL_CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "samples_share_vectors": ((5, 20, 7, 7), (37, 20, 1, 1), {}),
    "one_pixel_each": ((70, 33, 1, 1), (29, 33, 1, 1), {}),
    "whole_panels": ((2, 40, 8, 16), (28, 40, 1, 1), {}),
    "blocks_of_the_reduction": ((3, 450, 6, 7), (71, 450, 1, 1), {}),
    "many_filters": ((1, 24, 5, 9), (530, 24, 1, 1), {}),
    "many_pixels": ((2, 9, 61, 67), (17, 9, 1, 1), {}),
    "weights_that_threads_share": ((3, 257, 17, 21), (250, 257, 1, 1), {}),
    "groups": ((3, 36, 9, 5), (42, 12, 1, 1), {"groups": 3}),
    "s2": ((3, 30, 13, 18), (21, 30, 1, 1), {"stride": 2}),
    "s2_wide": ((2, 30, 5, 70), (21, 30, 1, 1), {"stride": 2}),
    "s3": ((2, 12, 11, 20), (15, 12, 1, 1), {"stride": 3}),
    "p1": ((3, 12, 6, 7), (15, 12, 1, 1), {"padding": 1}),
    "row_of_windows": ((3, 20, 7, 7), (24, 20, 7, 7), {}),
    "narrow": ((3, 20, 9, 5), (24, 20, 3, 3), {}),
    "one_column_s3": ((3, 40, 50, 5), (24, 40, 3, 3), {"stride": 3, "dilation": 2}),
    "part_of_short_rows": ((2, 40, 20, 5), (24, 40, 3, 3), {"stride": 3}),
    "short_rows_s2": ((2, 12, 16, 5), (33, 12, 5, 5), {"stride": 2, "padding": 2}),
    "short_rows_many_filters": ((1, 9, 15, 14), (200, 9, 3, 3), {"stride": 4, "padding": 1}),
    "far_apart": ((3, 70, 14, 14), (21, 70, 3, 5), {"stride": 4}),
    "many_taps": ((1, 20, 16, 16), (10, 20, 9, 9), {"padding": 4, "dilation": 2}),
    "whole_image": ((5, 40, 3, 7), (50, 40, 3, 7), {}),
    "fully_connected": ((31, 2100, 1, 1), (263, 2100, 1, 1), {}),
    "patches_2x2": ((3, 12, 14, 78), (40, 12, 2, 2), {"stride": 2}),
    "patches_and_a_rest": ((2, 7, 15, 71), (33, 7, 2, 2), {"stride": 2}),
    "patches_4x4": ((2, 3, 35, 90), (36, 3, 4, 4), {"stride": 4}),
    "patches_3x5": ((2, 5, 20, 33), (32, 5, 3, 5), {"stride": (3, 5)}),
    "pixels_apart": ((3, 30, 14, 78), (40, 30, 1, 1), {"stride": 2}),
    "pixels_apart_to_the_end": ((2, 7, 15, 71), (33, 7, 1, 1), {"stride": 2}),
    "pixels_apart_and_a_rest": ((2, 5, 24, 33), (32, 5, 1, 1), {"stride": (5, 3)}),
    "rows_apart": ((2, 12, 16, 9), (33, 12, 1, 1), {"stride": (3, 1)}),
    "columns_apart": ((2, 12, 5, 70), (33, 12, 1, 1), {"stride": (1, 2)}),
    "patches_in_parts": ((6, 40, 80, 130), (32, 40, 2, 2), {"stride": 2}),
    "patches_in_parts_and_a_rest": ((7, 40, 81, 131), (32, 40, 2, 2), {"stride": 2}),
}
BAND_CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "s2": ((3, 40, 17, 19), (48, 40, 3, 3), {"stride": 2, "padding": 1}),
    "s2_even": ((2, 12, 20, 40), (16, 12, 4, 4), {"stride": 2, "padding": 1}),
    "s3": ((2, 20, 17, 31), (32, 20, 3, 3), {"stride": 3, "padding": 1}),
    "s2x1": ((2, 20, 17, 16), (30, 20, 3, 5), {"stride": (2, 1), "padding": (0, 2)}),
    "s1x2": ((2, 20, 9, 31), (30, 20, 5, 3), {"stride": (1, 2), "padding": (2, 0)}),
    "5x5_p2": ((3, 32, 7, 7), (64, 32, 5, 5), {"padding": 2}),
    "5x5_ragged": ((2, 13, 14, 29), (45, 13, 5, 5), {"padding": 2}),
    "padding_beyond_kernel": ((2, 24, 6, 7), (16, 24, 5, 5), {"padding": 6}),
    "dilated": ((2, 24, 15, 16), (29, 24, 3, 3), {"padding": 6, "dilation": 6}),
    "dilated_beyond_image": ((2, 40, 9, 8), (32, 40, 3, 3), {"padding": 12, "dilation": 12}),
    "chunks_of_channels": ((1, 530, 12, 12), (32, 530, 3, 5), {"padding": (1, 2)}),
    "several_bands": ((1, 20, 50, 44), (24, 20, 5, 5), {"padding": 2}),
    "one_row": ((3, 40, 1, 60), (16, 40, 1, 9), {"padding": (0, 4)}),
    "one_column": ((2, 40, 5, 30), (16, 40, 7, 1), {"padding": (3, 0)}),
    "few_channels_long_taps": ((2, 1, 21, 60), (32, 1, 5, 20), {"stride": 2}),
    "columns_deeper_than_a_block": ((1, 3, 150, 12), (16, 3, 140, 2), {}),
    "groups": ((2, 40, 9, 14), (48, 20, 5, 5), {"groups": 2, "padding": 2}),
}
COLUMN_CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "7x6": ((3, 24, 10, 11), (130, 24, 7, 6), {}),
    "s4": ((2, 9, 15, 14), (130, 9, 5, 3), {"stride": 4}),
    "s2x3_d2": ((2, 19, 16, 22), (128, 19, 4, 3), {"stride": (2, 3), "dilation": (2, 1)}),
    "s2_p2": ((3, 17, 16, 5), (130, 17, 5, 5), {"stride": 2, "padding": 2}),
    "uncovered": ((2, 12, 14, 17), (130, 12, 3, 3), {"stride": 5, "padding": (1, 0)}),
    "in_parts": ((6, 64, 14, 14), (128, 64, 9, 9), {}),
    "filters_in_blocks": ((3, 5, 11, 12), (451, 5, 7, 7), {}),
    "few_channels": ((5, 3, 13, 13), (256, 3, 9, 9), {}),
    "rows_apart": ((2, 2, 5, 40), (129, 2, 1, 30), {"stride": (2, 1)}),
}
CASES = {f"pixel_{k}": v for k, v in PIXEL_CASES.items()}
CASES |= {f"band_{k}": v for k, v in BAND_CASES.items()}
CASES |= {f"column_{k}": v for k, v in COLUMN_CASES.items()}

on_cases = pytest.mark.parametrize("case", CASES)
on_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
# Those with an epilogue in registers, and one without.
on_activations = pytest.mark.parametrize("activation", [None, "relu", "silu"])


@pytest.fixture(autouse=True)
def direct() -> Any:
    with torchconv.backends.allow_winograd(False):
        yield


def make(case: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    x_size, w_size, kwargs = CASES[case]
    scale = (w_size[1] * w_size[2] * w_size[3]) ** -0.5
    w = torch.randn(w_size) * scale
    return [t.to(dtype) for t in (torch.randn(x_size), w, torch.randn(w_size[0]))], kwargs


@pytest.mark.parametrize("weight_format", ["contiguous", "channels_last"])
@on_dtypes
@on_cases
def test_forward_and_input_gradient(case: str, dtype: torch.dtype, weight_format: str) -> None:
    (x, w, b), kwargs = make(case, dtype)
    w = in_layout(w, weight_format)
    x.requires_grad_()
    z = F.conv2d(x, w, b, **kwargs)
    dz = torch.randn_like(z)
    (dx,) = torch.autograd.grad(z, x, dz)
    x2 = x.detach().double().requires_grad_()
    truth = torch_F.conv2d(x2, w.double(), b.double(), **kwargs)
    assert_accurate(z, truth)
    assert_accurate(dx, torch.autograd.grad(truth, x2, dz.double())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", COLUMN_CASES)
def test_columns_in_channels_last(case: str, dtype: torch.dtype) -> None:
    """The input gradient, and its bits alone and in a batch."""
    (x, w, _), kwargs = make(f"column_{case}", dtype)
    x, w = (in_layout(t, "channels_last") for t in (x, w))
    x.requires_grad_()
    z = F.conv2d(x, w, **kwargs)
    dz = torch.randn_like(z)
    (dx,) = torch.autograd.grad(z, x, dz)
    x2 = x.detach().double().requires_grad_()
    truth = torch_F.conv2d(x2, w.double(), **kwargs)
    assert_accurate(dx, torch.autograd.grad(truth, x2, dz.double())[0])
    alone = x.detach()[:1].requires_grad_()
    z = F.conv2d(alone, w, **kwargs)
    assert torch.equal(torch.autograd.grad(z, alone, dz[:1])[0][0], dx[0])


def test_columns_leave_out_what_lies_beside() -> None:
    """An infinite weight makes no NaN of gradients that no product of it reaches."""
    (x, w, _), kwargs = make("column_7x6", torch.float32)
    x, w = (in_layout(t, "channels_last") for t in (x, w))
    w[:, :, 0, 0] = float("inf")
    x.requires_grad_()
    z = F.conv2d(x, w, **kwargs)
    (dx,) = torch.autograd.grad(z, x, torch.ones_like(z))
    assert torch.isinf(dx[:, :, : z.shape[2], : z.shape[3]]).all()
    assert torch.isfinite(dx[:, :, z.shape[2] :]).all()
    assert torch.isfinite(dx[:, :, :, z.shape[3] :]).all()


@on_activations
@pytest.mark.parametrize("bias", [True, False])
@on_dtypes
@pytest.mark.parametrize(
    "case", ["pixel_samples_share_vectors", "pixel_blocks_of_the_reduction", "band_5x5_ragged"]
)
def test_epilogue(case: str, dtype: torch.dtype, bias: bool, activation: str | None) -> None:
    (x, w, b), kwargs = make(case, dtype)
    leaves = [x, w, b if bias else None]
    z = F.conv2d(*leaves, **kwargs, activation=activation)
    doubles = [None if t is None else t.double() for t in leaves]
    truth = torch_F.conv2d(*doubles, **kwargs)
    if activation is not None:
        truth = getattr(torch_F, activation)(truth)
    assert_accurate(z, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@on_cases
def test_bits_of_a_sample(case: str, dtype: torch.dtype) -> None:
    """The same alone and in its batch, and for every number of threads."""
    (x, w, b), kwargs = make(case, dtype)
    x = torch.cat([x, x.flip(0)])
    x.requires_grad_()
    z = F.conv2d(x, w, b, **kwargs)
    dz = torch.randn_like(z)
    (dx,) = torch.autograd.grad(z, x, dz, retain_graph=True)
    with threads(1 if torch.get_num_threads() > 1 else 2):
        assert torch.equal(F.conv2d(x, w, b, **kwargs), z)
        assert torch.equal(torch.autograd.grad(z, x, dz)[0], dx)
    for n in (0, len(x) - 1):
        alone = x.detach()[n : n + 1].requires_grad_()
        z_alone = F.conv2d(alone, w, b, **kwargs)
        assert torch.equal(z_alone[0], z[n])
        assert torch.equal(torch.autograd.grad(z_alone, alone, dz[n : n + 1])[0][0], dx[n])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@on_cases
def test_not_finite(case: str, value: float) -> None:
    """A NaN or an infinity reaches the outputs whose windows hold it, and no others."""
    (x, w, b), kwargs = make(case, torch.float32)
    x[0, x.shape[1] // 2, x.shape[2] // 2, x.shape[3] // 2] = value
    x[-1, 0, 0, 0] = value
    z = F.conv2d(x, w, b, **kwargs)
    truth = torch_F.conv2d(x.double(), w.double(), b.double(), **kwargs)
    assert torch.equal(torch.isfinite(z), torch.isfinite(truth))
    assert torch.equal(torch.isnan(z), torch.isnan(truth))


@pytest.mark.parametrize("case", ["pixel_blocks_of_the_reduction", "band_chunks_of_channels"])
def test_error(case: str) -> None:
    """The bound of direct algorithms."""
    (x, w, b), kwargs = make(case, torch.float32)
    z = F.conv2d(x, w, b, **kwargs)
    truth = torch_F.conv2d(x.double(), w.double(), b.double(), **kwargs)
    assert ((z - truth).norm() / truth.norm()).item() <= 1e-6


def test_kept_weights_serve_other_images() -> None:
    """What is packed does not depend on the image."""
    for kernel, stride, padding in ((1, 1, 0), (5, 1, 2), (2, 2, 0)):
        layer = torchconv.nn.Conv2d(40, 48, kernel, stride, padding).eval()
        with torch.no_grad():
            for size in ((7, 9), (30, 20), (4, 61)):
                x = torch.randn(2, 40, *size)
                leaves = [t.double() for t in (x, layer.weight, layer.bias)]
                truth = torch_F.conv2d(*leaves, stride, padding)
                assert_accurate(layer(x), truth)
