"""bfloat16 and float16: dot products of pairs, Winograd in float32, both layouts, all passes.

Where the processor multiplies pairs of bfloat16, channels (and, for the weight gradient, pixels)
come in twos: odd numbers of them, every residue of a vector and padding are what may go wrong. The
judge is float64 on the rounded operands: an error of two units in the last place, or of a sum's own
rounding where its terms cancel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchconv
import torchconv.functional as F
from conftest import everywhere, in_layout
from oracle import torch_F
from test_determinism import threads

pytestmark = everywhere

on_formats = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
on_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

# name: N, C, H, W, filters, kernel, arguments
CASES: dict[str, tuple[tuple[int, int, int, int], int, tuple[int, int], dict[str, Any]]] = {
    "1x1": ((3, 64, 7, 9), 96, (1, 1), {}),
    "1x1_odd": ((2, 33, 5, 7), 17, (1, 1), {}),
    "1x1_s2": ((2, 40, 9, 9), 20, (1, 1), {"stride": 2}),
    "1x1_aliased": ((1, 2048, 3, 3), 33, (1, 1), {}),
    "1x1_chunks": ((1, 5000, 2, 3), 20, (1, 1), {}),
    "1x1_wide": ((1, 20, 3, 421), 18, (1, 1), {}),
    "1x1_s2_runs": ((2, 72, 9, 55), 40, (1, 1), {"stride": 2}),
    "1x1_s2_runs_in_blocks": ((1, 2200, 3, 27), 33, (1, 1), {"stride": 2}),
    "1x1_padding_beside_runs": ((1, 256, 4, 26), 48, (1, 1), {"padding": 1}),
    "1x1_planes": ((3, 66, 6, 13), 29, (1, 1), {}),
    "1x1_planes_odd": ((2, 531, 5, 19), 45, (1, 1), {}),
    "1x1_planes_groups": ((2, 70, 4, 8), 68, (1, 1), {"groups": 2}),
    "pixel": ((5, 31, 1, 1), 34, (1, 1), {}),
    "winograd": ((2, 20, 11, 13), 35, (3, 3), {"padding": 1}),
    "few_filters_s2": ((2, 26, 9, 21), 5, (3, 2), {"stride": 2, "padding": (1, 0)}),
    "winograd_d2": ((1, 24, 17, 16), 20, (3, 3), {"padding": 2, "dilation": 2}),
    "3x3_s2": ((2, 35, 13, 16), 24, (3, 3), {"padding": 1, "stride": 2}),
    "3x3_s2_wide": ((1, 17, 7, 75), 18, (3, 3), {"padding": 1, "stride": 2}),
    "first": ((2, 3, 12, 15), 19, (3, 3), {"padding": 1}),
    "grey": ((2, 1, 14, 14), 18, (5, 5), {"padding": 2}),
    "first_wide": ((1, 3, 9, 821), 40, (3, 3), {"padding": 1, "stride": (2, 1)}),
    "stem": ((2, 3, 29, 30), 24, (7, 7), {"padding": 3, "stride": 2}),
    "5x5": ((2, 18, 9, 10), 34, (5, 5), {"padding": 2}),
    "one_vector_chunks": ((2, 300, 9, 19), 16, (5, 5), {"padding": 2}),
    "one_vector_chunks_back": ((2, 16, 9, 19), 300, (5, 5), {"padding": 2}),
    "3x1_s3": ((2, 17, 16, 11), 21, (3, 1), {"stride": 3, "padding": (1, 0)}),
    "3x5_s4": ((1, 37, 14, 13), 33, (3, 5), {"stride": 4}),
    "short_rows_s3_d2": ((2, 35, 22, 5), 18, (3, 3), {"stride": 3, "dilation": 2}),
    "short_rows_s2_d3_p1": ((2, 18, 19, 9), 20, (3, 3), {"stride": 2, "dilation": 3, "padding": 1}),
    "columns_apart": ((1, 20, 21, 40), 19, (3, 3), {"stride": 3, "dilation": 2, "padding": 2}),
    "few_filters_short_rows": ((3, 70, 7, 7), 7, (5, 5), {}),
    "padding_alone": ((3, 28, 15, 1), 19, (3, 1), {"stride": 2, "padding": 1}),
    "far": ((2, 16, 12, 12), 16, (3, 3), {"dilation": 5, "padding": 5}),
    "few_filters": ((2, 22, 11, 12), 3, (3, 3), {"padding": 1}),
    "few_filters_1x1": ((2, 37, 9, 11), 3, (1, 1), {}),
    "few_filters_3x1": ((2, 21, 9, 12), 5, (3, 1), {"padding": (1, 0)}),
    "ten_filters": ((2, 20, 11, 12), 10, (3, 3), {"padding": 1}),
    "few_pixels_chunks": ((1, 700, 5, 6), 70, (3, 3), {"padding": 1, "stride": 2}),
    "wide_groups": ((2, 96, 9, 10), 72, (3, 3), {"padding": 1, "groups": 2}),
    "wide_groups_5x5": ((2, 54, 8, 9), 96, (5, 5), {"padding": 2, "groups": 3}),
    "wide_groups_s2": ((2, 66, 9, 10), 40, (3, 3), {"padding": 1, "stride": 2, "groups": 2}),
    "narrow_groups": ((2, 24, 11, 9), 32, (3, 3), {"padding": 1, "groups": 8}),
    "groups_of_8": ((2, 40, 9, 31), 40, (3, 3), {"padding": 1, "groups": 5}),
    "groups_of_16": ((2, 48, 8, 14), 48, (3, 3), {"padding": 1, "groups": 3}),
    "groups_of_2_to_4": ((2, 22, 7, 16), 44, (1, 5), {"padding": (0, 2), "groups": 11}),
    "groups_of_40_to_4": ((2, 80, 7, 9), 8, (3, 2), {"dilation": 2, "groups": 2}),
    "groups_of_6_s2": ((2, 42, 13, 12), 70, (3, 3), {"padding": 1, "stride": 2, "groups": 7}),
    "groups_of_3": ((2, 15, 9, 8), 20, (3, 3), {"padding": 1, "groups": 5}),
    "row_5": ((2, 5, 9, 17), 35, (2, 3), {"padding": (1, 2), "stride": (1, 3)}),
    "row_7_wide": ((1, 7, 3, 621), 18, (1, 2), {}),
    "depthwise": ((2, 35, 11, 12), 35, (3, 3), {"padding": 1, "groups": 35}),
    "depthwise_s2": ((2, 20, 13, 12), 40, (5, 5), {"padding": 2, "stride": 2, "groups": 20}),
}


def operands(
    case: str, dtype: torch.dtype, layout: str, weight_layout: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    size, filters, kernel, _ = CASES[case]
    x = in_layout(torch.randn(size).to(dtype), layout)
    channels = size[1] // CASES[case][3].get("groups", 1)
    w = torch.randn(filters, channels, *kernel) / (channels * kernel[0] * kernel[1]) ** 0.5
    return x, in_layout(w.to(dtype), weight_layout or layout), torch.randn(filters).to(dtype)


def passes(conv: Any, x: Tensor, w: Tensor, b: Tensor, dz: Tensor, **kwargs: Any) -> list[Tensor]:
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    z = conv(x, w, b, **kwargs)
    return [z.detach(), *torch.autograd.grad(z, (x, w), dz)]


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    """Within two units in the last place, or of the sum's rounding."""
    assert found.shape == exact.shape
    if exact.numel() == 0:
        return
    unit = torch.finfo(found.dtype).eps * exact.abs()
    scale = exact.square().mean().sqrt()
    assert ((found.double() - exact).abs() <= 2 * unit + 2e-5 * scale).all()


@on_formats
@on_dtypes
@pytest.mark.parametrize("case", CASES)
def test_every_pass(case: str, dtype: torch.dtype, layout: str) -> None:
    kwargs = CASES[case][3]
    x, w, b = operands(case, dtype, layout)
    dz = torch.randn_like(torch_F.conv2d(x.double(), w.double(), **kwargs)).to(dtype)
    dz = in_layout(dz, layout)
    found = passes(F.conv2d, x, w, b, dz, **kwargs)
    exact = passes(torch_F.conv2d, x.double(), w.double(), b.double(), dz.double(), **kwargs)
    for ours, reference in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        assert_rounded(ours, reference)


@on_formats
@on_dtypes
@pytest.mark.parametrize(
    "case", ["1x1_odd", "1x1_planes", "3x3_s2", "5x5", "winograd", "stem", "groups_of_8"]
)
def test_same_bits(case: str, dtype: torch.dtype, layout: str) -> None:
    """For one and two threads, and a sample alone; and from a layer that keeps its weights."""
    (_, channels, *size), filters, kernel, kwargs = CASES[case]
    _, w, b = operands(case, dtype, layout)
    x = in_layout(torch.randn(9, channels, *size).to(dtype), layout)
    dz = in_layout(torch.randn_like(F.conv2d(x, w, **kwargs)), layout)
    with threads(1):
        one = passes(F.conv2d, x, w, b, dz, **kwargs)
    with threads(2):
        two = passes(F.conv2d, x, w, b, dz, **kwargs)
    for first, second in zip(one, two, strict=True):
        assert torch.equal(first, second)
    alone = F.conv2d(x[3:4], w, b, **kwargs)
    assert torch.equal(alone, one[0][3:4])
    layer = torchconv.nn.Conv2d(channels, filters, kernel, dtype=dtype, **kwargs).eval()
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.copy_(b)
        layer.to(memory_format=torch.channels_last if layout == "channels_last" else None)
        for _ in range(2):
            assert torch.equal(layer(x), one[0])


@on_formats
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["relu", "relu6", "gelu"])
def test_activations_and_weight_layouts(activation: str, weight_layout: str, layout: str) -> None:
    """The kernel rounds what it clamps itself; other activations go by scratch."""
    cases = ["1x1_odd", "1x1_planes", "3x3_s2", "stem", "groups_of_16", "groups_of_2_to_4"]
    for case in [*cases, "padding_alone"]:
        x, w, b = operands(case, torch.bfloat16, layout, weight_layout)
        kwargs = CASES[case][3]
        z = torch_F.conv2d(x.double(), w.double(), b.double(), **kwargs)
        found = F.conv2d(x, w, b, activation=activation, **kwargs)
        assert_rounded(found, getattr(torch_F, activation)(z))


@on_formats
@pytest.mark.parametrize("case", ["1x1", "1x1_odd", "3x3_s2", "winograd", "first", "groups_of_8"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinity_and_nan(case: str, value: float, layout: str) -> None:
    """They stand where they do in float64: padding is not multiplied, but in the weight gradient on
    a GPU, whose matrix product, like cuDNN's, multiplies dz by the zeros of padding."""
    x, w, b = operands(case, torch.bfloat16, layout)
    kwargs = CASES[case][3]
    dz = in_layout(torch.randn_like(F.conv2d(x, w, b, **kwargs)), layout)
    x[0, 0, 0, 0] = x[-1, -1, -1, 2] = value
    dz[0, -1, 0, 0] = dz[-1, 0, -1, -1] = value
    found = passes(F.conv2d, x, w, b, dz, **kwargs)
    exact = passes(torch_F.conv2d, x.float(), w.float(), b.float(), dz.float(), **kwargs)
    if x.is_cuda:
        dw, truth = found.pop(), exact.pop()
        assert not (dw.isfinite() & ~truth.isfinite()).any()
    for ours, reference in zip(found, exact, strict=True):
        assert torch.equal(ours.isnan(), reference.isnan())
        assert torch.equal(ours.isinf(), reference.isinf())


@pytest.mark.parametrize("offset", [1, 2])
def test_storage_offset(offset: int) -> None:
    """Pairs are read in place only where they are aligned."""
    shape = (2, 32, 6, 5)
    memory = torch.randn(2 * 32 * 6 * 5 + offset).bfloat16()
    strides = (32 * 30, 1, 32 * 5, 32)
    x = memory.as_strided(shape, strides, offset)
    w = torch.randn(24, 32, 1, 1).bfloat16()
    assert torch.equal(F.conv2d(x, w), F.conv2d(x.clone(memory_format=torch.preserve_format), w))


def test_denormals() -> None:
    """Denormal bfloat16 may count as zero, and harms nothing else."""
    x = torch.randn(1, 32, 8, 8).bfloat16()
    w = (torch.randn(32, 32, 1, 1) / 6).bfloat16()
    expected = F.conv2d(x, w)
    x[:, ::2] = 1e-39
    found = F.conv2d(x, w)
    x[:, ::2] = 0
    assert torch.equal(found, F.conv2d(x, w)) and not torch.equal(found, expected)
