"""Convolutions on tensor cores (csrc/cuda/mma_*.cu): every pass against float64, with sizes that
leave a rest in each direction of a tile (64 or 128 pixels and filters, 32 terms of a sum), and taps
that hit or miss by stride, dilation and padding.

They are for the GPU and the emulator; the CPU's kernels pass them too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_F

import torchconv.functional as F
from conftest import assert_accurate, assert_same, everywhere, in_layout, relative_error

EMULATED = "TORCHCONV_EMULATED_LIBRARY" in os.environ

pytestmark = everywhere

# name: input size, weight size, further arguments of conv2d
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "one_tile": ((1, 32, 8, 8), (64, 32, 1, 1), {}),
    "ragged_pixels": ((3, 16, 7, 9), (64, 16, 3, 3), {"padding": 1}),
    "ragged_filters": ((2, 24, 6, 11), (72, 24, 3, 3), {"padding": 1}),
    "ragged_terms": ((2, 40, 9, 7), (136, 40, 3, 2), {"padding": (1, 0)}),
    "large_tiles": ((2, 136, 12, 13), (144, 136, 1, 1), {}),
    "odd_filters": ((2, 16, 9, 8), (35, 16, 3, 3), {"padding": 1}),
    "odd_channels": ((2, 19, 10, 9), (48, 19, 3, 3), {"padding": 1}),
    "odd_both": ((2, 33, 5, 12), (21, 33, 1, 3), {"padding": (0, 1)}),
    "four_channels": ((2, 4, 13, 11), (40, 4, 3, 3), {"padding": 1}),
    "stem": ((2, 3, 23, 25), (64, 3, 7, 7), {"padding": 3, "stride": 2}),
    # Few channels: tiles of 8 x 16 outputs and 64 filters, or a rest; taps in pairs, or not.
    "stem_tiles": ((2, 3, 35, 66), (72, 3, 7, 7), {"padding": 3, "stride": 2}),
    "stem_even": ((1, 4, 22, 37), (64, 4, 4, 4), {"padding": 1, "stride": 2}),
    "stem_s1": ((2, 3, 19, 21), (24, 3, 3, 3), {"padding": 1}),
    "stem_s1x4": ((1, 3, 12, 70), (35, 3, 3, 5), {"padding": (1, 2), "stride": (1, 4)}),
    "stem_s1x3": ((1, 4, 12, 59), (64, 4, 3, 3), {"padding": (1, 0), "stride": (1, 3)}),
    "stem_s2x1": ((1, 3, 25, 19), (65, 3, 3, 2), {"padding": (2, 1), "stride": (2, 1)}),
    "stem_dilated": ((1, 3, 17, 23), (40, 3, 3, 3), {"padding": 2, "dilation": 2}),
    "stem_dilated_s2": ((1, 3, 27, 33), (64, 3, 3, 3), {"stride": 2, "dilation": (3, 2)}),
    "few_channels": ((2, 5, 20, 37), (32, 5, 3, 3), {"padding": 1}),
    "few_channels_s2": ((1, 8, 37, 35), (64, 8, 3, 3), {"padding": 1, "stride": 2}),
    "few_channels_apart": ((1, 3, 21, 36), (32, 3, 1, 1), {"stride": 2}),
    "few_channels_around": ((1, 2, 9, 11), (32, 2, 5, 4), {"padding": (6, 3), "stride": 2}),
    "one_channel": ((3, 1, 14, 14), (16, 1, 5, 5), {"padding": 2}),
    "s2": ((2, 32, 15, 14), (48, 32, 3, 3), {"padding": 1, "stride": 2}),
    "s2_1x1": ((2, 72, 9, 9), (32, 72, 1, 1), {"stride": 2}),
    "s3x2": ((2, 16, 17, 16), (24, 16, 2, 5), {"padding": (0, 2), "stride": (3, 2)}),
    "patches": ((2, 8, 16, 16), (40, 8, 4, 4), {"stride": 4}),
    "stride_beyond_kernel": ((1, 16, 19, 20), (24, 16, 2, 2), {"stride": (5, 7)}),
    "dilated": ((2, 16, 15, 13), (24, 16, 3, 3), {"padding": 4, "dilation": (2, 4)}),
    "dilated_s2": ((2, 16, 15, 16), (24, 16, 3, 3), {"padding": 2, "stride": 2, "dilation": 2}),
    "dilated_3_s2": ((2, 16, 19, 16), (24, 16, 3, 3), {"padding": 3, "stride": 2, "dilation": 3}),
    "dilated_4_s6": ((1, 16, 23, 26), (24, 16, 4, 3), {"padding": 5, "stride": 6, "dilation": 4}),
    "padded_beyond": ((1, 16, 3, 4), (24, 16, 3, 3), {"padding": 6}),
    "one_pixel": ((5, 48, 1, 1), (72, 48, 3, 3), {"padding": 1}),
    "many_pixels": ((3, 16, 40, 40), (16, 16, 1, 1), {}),
}

on_cases = pytest.mark.parametrize("case", CASES)
on_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["float16", "bfloat16", "tf32"]
)


@pytest.fixture(autouse=True)
def tf32_allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHCONV_EMULATED_TF32", "1")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        yield


@pytest.fixture(
    params=[1, 4, 132] if EMULATED else [132], ids=lambda count: f"{count}_multiprocessors"
)
def multiprocessors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated device's, which choose among the tiles."""
    monkeypatch.setenv("TORCHCONV_EMULATED_MULTIPROCESSORS", str(request.param))


def operands(case: str, dtype: torch.dtype, layout: str = "channels_last") -> list[Tensor]:
    """x, w and b."""
    x_size, w_size, _ = CASES[case]
    scale = (w_size[1] * w_size[2] * w_size[3]) ** -0.5
    x, w, b = torch.randn(x_size), torch.randn(w_size) * scale, torch.randn(w_size[0])
    x, w, b = (t.to(dtype) for t in (x, w, b))
    return [in_layout(x, layout), in_layout(w, layout), b]


def gradients(conv: Any, x: Tensor, w: Tensor, dz: Tensor | None, **kwargs: Any) -> list[Tensor]:
    """z without bias, dz, dx and dw."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    z = conv(x, w, **kwargs)
    if dz is None:
        dz = torch.randn(z.shape).to(z.dtype)
    return [z.detach(), dz, *torch.autograd.grad(z, (x, w), dz)]


def exactly(*tensors: Tensor) -> list[Tensor]:
    """In float64 on the CPU, which judges."""
    return [t.detach().cpu().double() for t in tensors]


def assert_right(out: Tensor, truth: Tensor) -> None:
    out = out.cpu()
    if out.dtype != torch.float32:
        return assert_accurate(out, truth)
    # Both factors of a product are rounded to 11 bits.
    scale = float(truth.abs().mean()) * truth.numel() ** 0.5 * 0.1
    error = float(torch.linalg.vector_norm(out.double() - truth))
    assert error <= 4e-4 * (float(torch.linalg.vector_norm(truth)) + scale)
    return None


@on_cases
@on_dtypes
@pytest.mark.usefixtures("multiprocessors")
def test_every_pass(case: str, dtype: torch.dtype) -> None:
    x, w, _ = operands(case, dtype)
    kwargs = CASES[case][2]
    z, dz, dx, dw = gradients(F.conv2d, x, w, None, **kwargs)
    exact = gradients(torch_F.conv2d, *exactly(x, w, dz), **kwargs)
    for out, truth in ((z, exact[0]), (dx, exact[2]), (dw, exact[3])):
        assert_right(out, truth)


@pytest.mark.parametrize("case", ["ragged_terms", "odd_filters", "stem"])
@pytest.mark.parametrize("layout", ["contiguous", "offset", "sliced_channels_last"])
@on_dtypes
def test_layouts(case: str, layout: str, dtype: torch.dtype) -> None:
    """Copies are made; where no address is a multiple of 16, elements are read one by one."""
    x, w, _ = operands(case, dtype, layout)
    kwargs = CASES[case][2]
    z, dz, dx, dw = gradients(F.conv2d, x, w, None, **kwargs)
    exact = gradients(torch_F.conv2d, *exactly(x, w, dz), **kwargs)
    for out, truth in ((z, exact[0]), (dx, exact[2]), (dw, exact[3])):
        assert_right(out, truth)


@pytest.mark.parametrize("offset", [1, 4])
@on_dtypes
def test_unaligned_channels_last(offset: int, dtype: torch.dtype) -> None:
    """Where nothing else differs, alignment changes no bits."""
    x, w, _ = operands("ragged_filters", dtype)
    z = F.conv2d(x, w, padding=1)
    memory = torch.zeros(x.numel() + offset, dtype=dtype)
    shifted = memory.as_strided(x.shape, x.stride(), offset).copy_(x)
    assert_same(F.conv2d(shifted, w, padding=1), z)


@pytest.mark.parametrize("case", ["ragged_pixels", "s2", "stem"])
@on_dtypes
def test_sample_alone(case: str, dtype: torch.dtype) -> None:
    """A sample's z and dx do not depend on its batch, whatever tile the batch brings with it."""
    x, w, _ = operands(case, dtype)
    kwargs = CASES[case][2]
    x = torch.cat([x] * 30)
    x = x + torch.randn_like(x)
    z, dz, dx, _ = gradients(F.conv2d, x, w, None, **kwargs)
    for n in (0, 1, len(x) - 1):
        alone = gradients(F.conv2d, x[n : n + 1], w, dz[n : n + 1], **kwargs)
        assert torch.equal(alone[0], z[n : n + 1])
        assert torch.equal(alone[2], dx[n : n + 1])


@pytest.mark.parametrize(
    "case, layout",
    [
        ("ragged_filters", "channels_last"),
        ("odd_filters", "channels_last"),
        ("stem", "contiguous"),
        ("stem_even", "contiguous"),
    ],
)
@pytest.mark.parametrize("activation", ["relu", "relu6", "sigmoid", "tanh", "silu", "gelu"])
@on_dtypes
def test_epilogue(case: str, layout: str, activation: str, dtype: torch.dtype) -> None:
    x, w, b = operands(case, dtype, layout)
    y = F.conv2d(x, w, b, activation=activation, **CASES[case][2])
    z = torch_F.conv2d(*exactly(x, w, b), **CASES[case][2])
    assert_right(y, getattr(torch_F, activation)(z))


@on_dtypes
def test_negative_and_uneven_padding(dtype: torch.dtype) -> None:
    x, w, _ = operands("ragged_pixels", dtype)
    z, dz, dx, dw = gradients(F.conv2d, x, w, None, padding=(-1, 2, 3, -2), stride=2)

    def padded(x: Tensor, w: Tensor, **kwargs: Any) -> Tensor:
        return torch_F.conv2d(torch_F.pad(x, (-1, 2, 3, -2)), w, **kwargs)

    exact = gradients(padded, *exactly(x, w, dz), stride=2)
    for out, truth in ((z, exact[0]), (dx, exact[2]), (dw, exact[3])):
        assert_right(out, truth)


@on_dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_where_they_belong(value: float, dtype: torch.dtype) -> None:
    """No lane that a tile does not fill, and no padding, carries one on."""
    x, w, _ = operands("odd_both", dtype)
    x[0, 5, 2, 3] = value
    w = w.abs() + 0.01
    kwargs = CASES["odd_both"][2]
    z = F.conv2d(x, w, **kwargs).cpu()
    truth = torch_F.conv2d(*exactly(x, w), **kwargs)
    assert torch.equal(z.isnan(), truth.isnan())
    assert torch.equal(z.isinf(), truth.isinf())


@on_dtypes
def test_long_sums(dtype: torch.dtype) -> None:
    """Of dw over many pixels and z over many terms, all of one sign, where truncation adds up."""

    def positive(*size: int) -> Tensor:
        return in_layout((torch.rand(size) / 16).to(dtype), "channels_last")

    x, w, dz = positive(2, 16, 160, 128), positive(16, 16, 1, 1), positive(2, 16, 160, 128)
    dw = gradients(F.conv2d, x, w, dz)[3]
    assert_right(dw, gradients(torch_F.conv2d, *exactly(x, w, dz))[3])
    x, w = positive(1, 1024, 4, 4), positive(16, 1024, 3, 3)
    z = F.conv2d(x, w).cpu()
    bound = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 4e-4}[dtype]
    assert relative_error(z, torch_F.conv2d(*exactly(x, w))) <= bound


# 1x1 kernels over NCHW as it lies: input size, filters. Planes of whole units of 16 bytes, of 8 (in
# half types), and others, of which copies are made.
PLANES: dict[str, tuple[tuple[int, ...], int]] = {
    "whole_units": ((3, 32, 8, 12), 64),
    "half_units": ((5, 40, 6, 14), 72),
    "tiles_over_samples": ((7, 72, 2, 2), 136),
    "large_tiles": ((2, 136, 16, 17), 144),
    "few_filters": ((2, 200, 14, 14), 24),
    "few_filters_whole_units": ((3, 200, 6, 12), 40),
    "few_channels_whole_units": ((3, 24, 8, 13), 136),
    "odd_filters": ((2, 48, 10, 10), 35),
    "odd_channels": ((2, 19, 8, 9), 48),
    "odd_planes": ((2, 32, 7, 7), 40),
    "many_pixels": ((3, 16, 48, 48), 16),
}
on_planes = pytest.mark.parametrize("case", PLANES)


def planes_operands(case: str, dtype: torch.dtype, layout: str = "contiguous") -> list[Tensor]:
    size, filters = PLANES[case]
    x, w = torch.randn(size), torch.randn(filters, size[1], 1, 1) * size[1] ** -0.5
    b = torch.randn(filters)
    return [in_layout(x.to(dtype), layout), in_layout(w.to(dtype), layout), b.to(dtype)]


@on_planes
@on_dtypes
@pytest.mark.parametrize("layout", ["contiguous", "offset"])
@pytest.mark.parametrize("flip", [False, True])
def test_planes(case: str, layout: str, flip: bool, dtype: torch.dtype) -> None:
    x, w, _ = planes_operands(case, dtype, layout)
    z, dz, dx, dw = gradients(F.conv2d, x, w, None, flip_kernel=flip)
    exact = gradients(torch_F.conv2d, *exactly(x, w, dz))
    for out, truth in ((z, exact[0]), (dx, exact[2]), (dw, exact[3])):
        assert out.is_contiguous()
        assert_right(out, truth)


@on_planes
@on_dtypes
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_planes_epilogue(case: str, activation: str | None, dtype: torch.dtype) -> None:
    x, w, b = planes_operands(case, dtype)
    w.requires_grad_()
    y = F.conv2d(x, w, b, activation=activation)  # keeps z too for some
    z = torch_F.conv2d(*exactly(x, w, b))
    assert_right(y.detach(), z if activation is None else getattr(torch_F, activation)(z))


@on_planes
@on_dtypes
def test_planes_sample_alone(case: str, dtype: torch.dtype) -> None:
    x, w, _ = planes_operands(case, dtype)
    z, dz, dx, _ = gradients(F.conv2d, x, w, None)
    for n in (0, len(x) - 1):
        alone = gradients(F.conv2d, x[n : n + 1], w, dz[n : n + 1])
        assert torch.equal(alone[0], z[n : n + 1])
        assert torch.equal(alone[2], dx[n : n + 1])


@on_dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_planes_keep_nan_and_infinity(value: float, dtype: torch.dtype) -> None:
    """In their pixel, and in dw to their channel."""
    x, w, _ = planes_operands("half_units", dtype)
    x[1, 5, 2, 3] = value
    w = w.abs() + 0.01
    z, dz, _, dw = gradients(F.conv2d, x, w, None)
    exact = gradients(torch_F.conv2d, *exactly(x, w, dz))
    for out, truth in ((z, exact[0]), (dw, exact[3])):
        assert torch.equal(out.cpu().isfinite(), truth.isfinite())


@on_dtypes
def test_planes_long_sums(dtype: torch.dtype) -> None:
    def positive(*size: int) -> Tensor:
        return (torch.rand(size) / 16).to(dtype)

    x, w, dz = positive(2, 16, 160, 128), positive(16, 16, 1, 1), positive(2, 16, 160, 128)
    dw = gradients(F.conv2d, x, w, dz)[3]
    assert_right(dw, gradients(torch_F.conv2d, *exactly(x, w, dz))[3])
