"""Depthwise convolution: every residue of the vectors, strides, dilation, paddings and types.

float64 is the judge. The kernels differ by layout, by kernel size and by stride.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import torchconv
import torchconv.functional as F
from conftest import assert_accurate, assert_same, cpu_only, everywhere, in_layout
from oracle import torch_F
from test_determinism import threads
from torchconv import _load, explain

pytestmark = everywhere

FORMATS = ("contiguous", "channels_last")
on_formats = pytest.mark.parametrize("layout", FORMATS)
on_types = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)


def operands(
    n: int, c: int, h: int, w: int, r: int, layout: str, dtype: torch.dtype, multiplier: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(n, c, h, w, dtype=torch.float64).to(dtype)
    filters = torch.randn(c * multiplier, 1, r, r, dtype=torch.float64).to(dtype)
    bias = torch.randn(c * multiplier, dtype=torch.float64).to(dtype)
    return in_layout(x, layout), filters, bias


def results(function: Any, x: Tensor, w: Tensor, b: Tensor, dz: Tensor, **kwargs: Any) -> Any:
    x, w, b = (t.detach().requires_grad_() for t in (x, w, b))
    z = function(x, w, b, groups=x.shape[1], **kwargs)
    return z.detach(), *torch.autograd.grad(z, (x, w, b), dz)


def check(x: Tensor, w: Tensor, b: Tensor, layout: str, **kwargs: Any) -> None:
    doubles = [t.double().contiguous() for t in (x, w, b)]
    z = torch_F.conv2d(*doubles, groups=x.shape[1], **kwargs)
    dz = in_layout(torch.randn_like(z).to(x.dtype), layout)
    found = results(F.conv2d, x, w, b, dz, **kwargs)
    truth = results(torch_F.conv2d, *doubles, dz.double().contiguous(), **kwargs)
    for out, wanted in zip(found[:3], truth[:3], strict=True):
        assert_accurate(out, wanted)
    # A bias's gradient: dz's elements, of variance one, added up.
    assert_accurate(found[3], truth[3], usual=dz.numel() ** 0.5)


@on_formats
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("r", [3, 5, 7])
def test_every_width(r: int, stride: int, layout: str) -> None:
    """Rows that end in every lane, of one vector, half a vector and several."""
    for width in (*range(1, 36), 47, 64, 65):
        x, w, b = operands(2, 17, 6, width, r, layout, torch.float32)
        check(x, w, b, layout, stride=stride, padding=r // 2)


@on_formats
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("r", [3, 5, 7])
@on_types
def test_every_type(dtype: torch.dtype, r: int, stride: int, layout: str) -> None:
    for channels, size in ((40, (7, 7)), (16, (14, 15)), (33, (9, 23))):
        x, w, b = operands(2, channels, *size, r, layout, dtype)
        check(x, w, b, layout, stride=stride, padding=r // 2)


@on_formats
@pytest.mark.parametrize("r, stride", [(3, 1), (5, 1), (7, 1), (3, 2), (5, 2), (7, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_strips(dtype: torch.dtype, r: int, stride: int, layout: str) -> None:
    """Rows of whole strips, planes side by side and in bands, in memory that begins anywhere."""
    sizes = (
        (2, 67, 7, 7),
        (2, 9, 8, 8),
        (3, 10, 14, 14),
        (1, 5, 27, 28),
        (1, 2, 150, 56),
        (2, 3, 9, 21),
    )
    for offset, (n, channels, h, w) in enumerate(sizes):
        x, filters, b = operands(n, channels, h, w, r, layout, dtype)
        memory = torch.empty(x.numel() + offset, dtype=dtype)
        x = memory[offset:].as_strided(x.shape, x.stride(), offset).copy_(x)
        for padding in {r // 2, r // 2 - 1, r - 1}:
            check(x, filters, b, layout, stride=stride, padding=padding)


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "kernel",
    [
        (1, 1),
        (1, 3),
        (3, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (1, 11),
        (11, 1),
        (2, 5),
        (6, 3),
        (9, 9),
        (8, 10),
    ]
    + [(1, 12), (30, 1), (31, 2), (4, 7), (7, 3)],
    ids=str,
)
@on_types
def test_any_kernel(dtype: torch.dtype, kernel: tuple[int, int], stride: int) -> None:
    """Sides that differ, of kernels with and without a loop over their rows; rows in the padding
    alone, of one line and of both, the last line of an odd number, vectors that overlap.
    """
    r, s = kernel
    cases = (
        (17, (9, 13), (r // 2, s // 2)),
        (70, (6, 5), (r - 1, s)),
        (33, (3, 4), (r + 3, s + 2)),
    )
    for channels, size, padding in cases:
        x = in_layout(torch.randn(2, channels, *size).to(dtype), "channels_last")
        w = torch.randn(channels, 1, r, s).to(dtype)
        check(
            x, w, torch.randn(channels).to(dtype), "channels_last", stride=stride, padding=padding
        )
    if stride > 1:
        return
    size, dilation = (3 * r + 2, 2 * s + 9), (3, 2)
    x = in_layout(torch.randn(1, 33, *size).to(dtype), "channels_last")
    w, b = torch.randn(33, 1, r, s).to(dtype), torch.randn(33).to(dtype)
    check(x, w, b, "channels_last", padding=(r, s), dilation=dilation)
    z = F.conv2d(x, w, b, padding=(r, s), dilation=dilation, groups=33, activation="hardswish")
    doubles = (t.double().contiguous() for t in (x, w, b))
    truth = torch_F.conv2d(*doubles, padding=(r, s), dilation=dilation, groups=33)
    assert_accurate(z, torch.nn.functional.hardswish(truth))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("r", [3, 5, 7])
def test_wide_images(r: int, stride: int) -> None:
    """Bands that are cut by their bytes, and fetched ahead; the last vectors overlap."""
    x, w, b = operands(2, 203, 21, 30, r, "channels_last", torch.float32)
    for padding in (r // 2, r + 2):
        check(x, w, b, "channels_last", stride=stride, padding=padding)


@on_formats
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("r", [2, 3, 4, 5, 6, 7])
def test_steps(r: int, stride: int, layout: str) -> None:
    """Even kernels and all steps, some filters of a channel, rows within and beyond a vector."""
    cases = (
        ((2, 18, 8, 9), 1, torch.float32),
        ((1, 5, 21, 70), 1, torch.float32),
        ((2, 3, 13, 30), 2, torch.float32),
        ((1, 4, 15, 14), 3, torch.float64),
        ((2, 9, 12, 37), 1, torch.bfloat16),
        ((1, 2, 150, 110), 1, torch.float32),
    )
    for (n, c, h, w), multiplier, dtype in cases:
        x, filters, b = operands(n, c, h, w, r, layout, dtype, multiplier)
        for padding in (0, r // 2) if n == 2 else (r - 1,):
            check(x, filters, b, layout, stride=stride, padding=padding)


@on_formats
@pytest.mark.parametrize("padding", [(0, 0), (0, 1), (1, 0), (2, 3), (5, 6)])
@pytest.mark.parametrize("stride", [1, 2, (1, 2), 3])
@pytest.mark.parametrize("r", [3, 5])
def test_paddings(r: int, stride: Any, padding: tuple[int, int], layout: str) -> None:
    """Also wider than the kernel, and strides that take the general path."""
    for size in ((9, 20), (10, 19), (5, 5)):
        x, w, b = operands(1, 20, *size, r, layout, torch.float32)
        check(x, w, b, layout, stride=stride, padding=padding)


@on_formats
@pytest.mark.parametrize("dilation", [2, 3, 4, (1, 2), (3, 1), (2, 4)])
@pytest.mark.parametrize("stride", [1, 2])
def test_dilation(stride: int, dilation: Any, layout: str) -> None:
    for r, size in ((3, (11, 18)), (5, (21, 20)), (7, (25, 35))):
        x, w, b = operands(2, 19, *size, r, layout, torch.float32)
        for padding in (r // 2, (2 * r, 7)):
            check(x, w, b, layout, stride=stride, padding=padding, dilation=dilation)


@on_types
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 6, 8, 12, 15, 16, 20, 31, 32, 33])
def test_few_channels_packed(channels: int, dtype: torch.dtype) -> None:
    """In channels_last, where a vector holds several pixels: sides of a kernel that differ, rows
    that end in every lane of a unit, several bands, strides and dilation.
    """
    cases: tuple[tuple[tuple[int, int], tuple[int, int], dict[str, Any]], ...] = (
        ((9, 11), (1, 3), {"padding": (0, 1)}),
        ((13, 7), (5, 2), {"padding": (2, 0)}),
        ((6, 15), (3, 3), {"padding": 1}),
        ((10, 18), (3, 4), {"stride": 2, "padding": (1, 3)}),
        ((11, 12), (2, 3), {"dilation": (1, 2), "padding": 2}),
        ((90, 70), (3, 1), {"padding": (1, 0)}),
    )
    for size, kernel, kwargs in cases:
        x = in_layout(torch.randn(2, channels, *size).to(dtype), "channels_last")
        w = torch.randn(channels, 1, *kernel).to(dtype)
        check(x, w, torch.randn(channels).to(dtype), "channels_last", **kwargs)


@cpu_only
def test_few_channels_are_packed() -> None:
    for channels, packed in ((2, True), (3, True), (70, False)):
        x, w, _ = operands(1, channels, 40, 40, 4, "channels_last", torch.bfloat16)
        found = explain(x, w, None, groups=channels, peak=100.0, bandwidth=10.0)
        for name in ("fprop", "dgrad", "wgrad"):
            assert ("several pixels in a vector" in found[name].blocking) == packed


@on_formats
@pytest.mark.parametrize("multiplier", [2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_multiplier(stride: int, multiplier: int, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, w, b = operands(3, 5, 9, 18, 3, layout, dtype, multiplier)
        check(x, w, b, layout, stride=stride, padding=1)


@pytest.mark.parametrize("multiplier", [2, 3, 4, 7, 33])
@on_types
def test_repeated_channels(dtype: torch.dtype, multiplier: int) -> None:
    """Vectors that begin within a channel's filters, more filters than lanes, a last vector that
    overlaps, channels fewer than a vector's.
    """
    for channels, size, r, stride in ((20, (9, 11), 3, 1), (33, (7, 8), 5, 2), (11, (12, 9), 2, 1)):
        x, w, b = operands(2, channels, *size, r, "channels_last", dtype, multiplier)
        check(x, w, b, "channels_last", stride=stride, padding=r // 2)


def test_repeated_channels_some_images_at_a_time() -> None:
    x, w, b = operands(3, 8, 120, 120, 3, "channels_last", torch.float32, 8)
    residual = in_layout(torch.randn(3, 64, 120, 120), "channels_last")
    z = F.conv2d(x, w, b, padding=1, groups=8, activation="silu", residual=residual)
    exact = torch_F.conv2d(*(t.double().contiguous() for t in (x, w, b)), padding=1, groups=8)
    assert_accurate(z, torch_F.silu(exact + residual))
    alone = F.conv2d(
        x[2:],
        w,
        b,
        padding=1,
        groups=8,
        activation="silu",
        residual=residual[2:].contiguous(memory_format=torch.channels_last),
    )
    assert_same(alone[0], z[2])


@cpu_only
def test_channels_are_repeated() -> None:
    for multiplier, layout in ((2, "channels_last"), (2, "contiguous"), (1, "channels_last")):
        x, w, _ = operands(1, 40, 20, 20, 3, layout, torch.float32, multiplier)
        found = explain(x, w, None, groups=40, peak=100.0, bandwidth=10.0)["fprop"]
        repeats = multiplier > 1 and layout == "channels_last"
        assert ("each channel once for each filter" in found.blocking) == repeats
        assert found.algorithm.startswith("depthwise")


@cpu_only
def test_large_copies_are_not_made_for_strides() -> None:
    x, w, b = operands(1, 40, 400, 400, 3, "channels_last", torch.float32, 2)
    for stride in (1, 2):
        found = explain(x, w, None, stride=stride, groups=40, peak=100.0, bandwidth=10.0)["fprop"]
        assert ("each channel once for each filter" in found.blocking) == (stride == 1)
    check(x, w, b, "channels_last", stride=2)


@on_formats
@pytest.mark.parametrize("r", [3, 6])
def test_multiplied_gradient(r: int, layout: str) -> None:
    """The input gradient of one filter for several channels, whose weights lie in any order."""
    for weight_layout in FORMATS:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 8, 13, 14).to(dtype)
            x, w = in_layout(x, layout), torch.randn(4, 2, r, r).to(dtype)
            w = in_layout(w, weight_layout).requires_grad_()
            kwargs = {"stride": r // 3, "padding": 1, "groups": 4}
            leaves = [t.detach().double().contiguous().requires_grad_() for t in (x, w)]
            z = torch_F.conv2d(*leaves, **kwargs)
            dz = in_layout(torch.randn_like(z).to(dtype), layout)
            x.requires_grad_()
            found = torch.autograd.grad(F.conv2d(x, w, **kwargs), (x, w), dz)
            truth = torch.autograd.grad(z, leaves, dz.double())
            for out, wanted in zip(found, truth, strict=True):
                assert_accurate(out, wanted)


@on_formats
@pytest.mark.parametrize("channels", [2, 7, 15, 16, 31, 130])
def test_channels(channels: int, layout: str) -> None:
    for stride in (1, 2):
        x, w, b = operands(1, channels, 13, 12, 5, layout, torch.float32)
        check(x, w, b, layout, stride=stride, padding=2)


@on_formats
@pytest.mark.parametrize("stride", [1, 2])
def test_large_planes(stride: int, layout: str) -> None:
    """Several bands of rows a plane, and sums that are cut."""
    for dtype in (torch.float32, torch.float16):
        x, w, b = operands(1, 16, 190, 210, 3, layout, dtype)
        check(x, w, b, layout, stride=stride, padding=1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("r", [3, 5, 7])
def test_long_rows(r: int, stride: int) -> None:
    """Many strips, the last of which is short or overlaps."""
    for width in (256, 258, 289, 513, 575):
        x, w, b = operands(2, 2, 7, width, r, "contiguous", torch.float32)
        check(x, w, b, "contiguous", stride=stride, padding=r // 2)


@on_types
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_bands(stride: int, dtype: torch.dtype) -> None:
    """Planes so large that bands of their rows are taken apart, which read more rows the longer the
    stride."""
    for r in (3, 4, 7):
        x, w, b = operands(1, 2, 250, 331, r, "contiguous", dtype)
        check(x, w, b, "contiguous", stride=stride, padding=1)


@cpu_only
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(2, 10, 330, 660), (8, 690, 28, 28), (1, 60, 288, 256)], ids=str)
def test_planes_from_memory(size: tuple[int, int, int, int], stride: int) -> None:
    """So many that they are asked for ahead, and whole rows streamed past the caches."""
    x, w, b = operands(*size, 3, "contiguous", torch.float32)
    check(x, w, b, "contiguous", stride=stride, padding=1)


@on_formats
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
@on_types
def test_activation(dtype: torch.dtype, activation: str, layout: str) -> None:
    """Of narrow and of several strips, by every kernel; NaN stays."""
    cases = [(3, 1, (9, 10)), (3, 2, (11, 41)), (5, 2, (9, 14)), (7, 1, (8, 35)), (3, 1, (21, 17))]
    for r, stride, size in cases:
        x, w, b = operands(2, 40, *size, r, layout, dtype)
        x, b = 3 * x, 2 * b
        x[1, 5, 4, 7] = math.nan
        kwargs = {"stride": stride, "padding": r // 2, "groups": 40}
        kwargs["dilation"] = 2 if size == (21, 17) else 1
        out = F.conv2d(x, w, b, **kwargs, activation=activation)
        truth = torch_F.conv2d(x.double(), w.double(), b.double(), **kwargs)
        wanted = getattr(torch_F, activation)(truth)
        assert torch.equal(out.isnan(), wanted.isnan())
        assert_accurate(out.nan_to_num(), wanted.nan_to_num())


@on_formats
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("r", [3, 5])
def test_bfloat16_extremes(r: int, stride: int, layout: str) -> None:
    """Sums beyond the largest number are infinite, NaN stays NaN, and denormals, which may count as
    zero, harm nothing else."""
    x, w, _ = operands(2, 40, 9, 12, r, layout, torch.bfloat16)
    kwargs = {"stride": stride, "padding": r // 2, "groups": 40}
    w = w.abs() + 1
    x[0, ::2] = 3e38
    x[1, ::3] = 1e-39
    x[1, 1, 4, 4] = math.nan
    x[1, 2, 5, 5] = -math.inf
    found = F.conv2d(x, w, **kwargs)
    truth = torch_F.conv2d(x.double(), w.double(), **kwargs)
    rounded = truth.bfloat16()
    assert torch.equal(found.isnan(), rounded.isnan())
    assert torch.equal(found.isinf(), rounded.isinf())
    finite = rounded.isfinite()
    assert_accurate(found[finite], truth[finite])


@on_formats
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("r", [3, 5])
def test_bits(r: int, stride: int, layout: str) -> None:
    """The same for every number of threads, and for a sample alone."""
    x, w, b = operands(3, 40, 29, 31, r, layout, torch.float32)
    kwargs = {"stride": stride, "padding": 1}
    dz = in_layout(torch.randn_like(F.conv2d(x, w, b, groups=40, **kwargs)), layout)
    with threads(1):
        first = results(F.conv2d, x, w, b, dz, **kwargs)
    with threads(2):
        for one, two in zip(first, results(F.conv2d, x, w, b, dz, **kwargs), strict=True):
            assert_same(two, one)
    alone = results(F.conv2d, x[1:2], w, b, dz[1:2], **kwargs)
    assert torch.equal(alone[0], first[0][1:2]) and torch.equal(alone[1], first[1][1:2])


@on_formats
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("r", [2, 3, 4, 7])
@pytest.mark.parametrize("width, dtype", [(19, torch.float32), (14, torch.float16)], ids=str)
def test_padding_meets_no_infinity(
    width: int, dtype: torch.dtype, r: int, stride: int, layout: str
) -> None:
    """Nor do columns that no window holds."""
    x, w, b = operands(2, 16, 8, width, r, layout, dtype)
    kwargs = {"stride": stride, "padding": r // 2}
    dz = in_layout(torch.randn_like(F.conv2d(x, w, b, groups=16, **kwargs)), layout)
    x[0, 3, 0, 0], x[1, 5, 7, width - 1] = math.inf, math.nan
    dz[0, 7, 0, 0], dz[1, 9, -1, -1] = math.nan, math.inf
    x[0, 2, 4] = math.inf
    found = results(F.conv2d, x, w, b, dz, **kwargs)

    def products(x: Tensor, dz: Tensor) -> list[Tensor]:
        ones = torch.ones(16, 1, r, r)
        return results(torch_F.conv2d, x.float(), ones, torch.zeros(16), dz.float(), **kwargs)

    # How many products there are of each sum, and how many of finite numbers.
    whole = products(torch.ones_like(x), torch.ones_like(dz))
    finite = products(x.isfinite(), dz.isfinite())
    for out, all_of_them, good in zip(found, whole, finite, strict=True):
        assert torch.equal(out.isfinite(), all_of_them == good)


@cpu_only
@pytest.mark.parametrize(
    ("layout", "r"),
    [("channels_last", 3), ("channels_last", 5), ("channels_last", 7)]
    + [("contiguous", 5), ("contiguous", 7)],
)
def test_minimal_filtering(layout: str, r: int) -> None:
    """One to several vectors and tiles, rows alone; with and without Winograd."""
    if layout == "channels_last":
        cases = ((16, (5, 7)), (33, (1, 20)), (83, (8, 14)), (150, (3, 27)))
    else:
        cases = ((3, (7, 9)), (5, (8, 14)), (2, (9, 32)), (20, (4, 53)))
    for channels, size in cases:
        x, w, b = operands(3, channels, *size, r, layout, torch.float32)
        for winograd in (True, False):
            with torchconv.backends.allow_winograd(winograd):
                check(x, w, b, layout, padding=r // 2)
        # Differences of the second sample's rows overflow, which its outputs do not.
        if size[0] == 1:
            continue
        x[1, 0, ::2, 3], x[1, 0, 1::2, 3] = 3e38, -3e38
        w *= 0.01
        kwargs = {"groups": channels, "padding": r // 2}
        found = F.conv2d(x, w, b, **kwargs)
        assert found.isfinite().all()
        for n in (0, 2):
            assert_same(found[n : n + 1], F.conv2d(x[n : n + 1], w, b, **kwargs))
        with torchconv.backends.allow_winograd(False):
            assert_same(found[1:2], F.conv2d(x[1:2], w, b, **kwargs))


@cpu_only
@pytest.mark.parametrize("r", [5, 7])
def test_minimal_filtering_of_planes_and_their_borders(r: int) -> None:
    """From no to all columns of padding on one side, and two filters of a plane."""
    for top, left in ((0, 0), (1, 1), (r - 1, r - 1), (0, r - 1)):
        x, w, b = operands(2, 3, 8 + r, 25, r, "contiguous", torch.float32)
        check(x, w, b, "contiguous", padding=(top, left))
    for columns in (9, 13, 14, 16):  # a row in one vector
        x, w, b = operands(2, 3, 9, columns, r, "contiguous", torch.float32)
        check(x, w, b, "contiguous", padding=r // 2)
    x, w, b = operands(2, 3, 9, 17, r, "contiguous", torch.float32)
    w, b = torch.cat((w, -w)), torch.cat((b, b))
    check(x, w, b, "contiguous", padding=r // 2)


@cpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("r", "stride"), [(3, 1), (3, 2), (5, 1), (7, 1)])
def test_bands_of_converted_planes(r: int, stride: int, dtype: torch.dtype) -> None:
    x, w, b = operands(1, 3, 101, 125, r, "contiguous", dtype)
    check(x, w, b, "contiguous", padding=r // 2, stride=stride)


@cpu_only
@pytest.mark.parametrize(
    ("layout", "along"), [("contiguous", "pixels"), ("channels_last", "channels")]
)
def test_explained(layout: str, along: str) -> None:
    wide = _load.isa() == "avx512"
    direct = "rolling columns" if along == "channels" else "rows"
    for r, stride, size in ((3, 1, 12), (3, 2, 12), (5, 1, 12), (7, 1, 12), (3, 1, 17), (5, 1, 17)):
        x, w, _ = operands(1, 32, size, size, r, layout, torch.float32)
        # Planes whose rows are longer than a vector, and pixels in tiles that overlap little or not
        # in tiles.
        of_planes = r == 7 or (r == 5 and size == 17)
        of_pixels = (r, size) != (5, 17)
        filtered = wide and stride == 1 and (of_pixels if layout == "channels_last" else of_planes)
        for each in explain(
            x, w, None, stride, r // 2, groups=32, peak=100.0, bandwidth=10.0
        ).passes:
            minimal = filtered and each.name != "wgrad"
            how = ["minimal filtering" if minimal else direct]
            if along == "pixels":  # only where a processor does half a vector at a time
                halves = os.environ.get("TORCHCONV_HALF_VECTORS")
                how = {"0": [direct], "1": how}.get(halves or "", [*how, direct])
            assert each.algorithm.startswith(tuple(f"depthwise {name}" for name in how))
            assert along in each.algorithm
    # However many residues a dilation has, down to two rows and columns of each.
    for dilation in (2, 4, 6):
        x, w, _ = operands(1, 32, 12, 12, 3, layout, torch.float32)
        fprop = explain(x, w, None, 1, dilation, dilation, 32, peak=100.0, bandwidth=10.0).passes[0]
        assert fprop.algorithm.startswith(f"depthwise {direct}")


@cpu_only
def test_phases_explained() -> None:
    """An input gradient of a stride that no rolling rows spread, all residues at once."""
    x, w, _ = operands(1, 32, 12, 12, 3, "contiguous", torch.float32)
    passes = explain(x, w, None, 3, 1, groups=32, peak=100.0, bandwidth=10.0).passes
    by_phases = [each.name for each in passes if each.algorithm.startswith("depthwise phases")]
    assert by_phases == ["dgrad"]
