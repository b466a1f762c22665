"""Dense convolution in channels_last by the product in place: every residue of its tiles, the edges
of its bands and groups of pixels, long reductions, special values.

The truth is F.conv2d in float64. Winograd's algorithm is off, so that 3x3 goes this way too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_F

import torchconv
import torchconv.functional as F
from conftest import FLOATS, assert_accurate, assert_same, relative_error
from test_determinism import threads

on_dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


@pytest.fixture(autouse=True)
def _direct() -> Iterator[None]:
    with torchconv.backends.allow_winograd(False):
        yield


def channels_last(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)


def check(
    x: Tensor, w: Tensor, b: Tensor | None = None, bound: float | None = None, **arguments: Any
) -> Tensor:
    """fprop and dgrad against float64."""
    x = x.detach().requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    exact = torch_F.conv2d(exact_x, w.double(), None if b is None else b.double(), **arguments)
    y = F.conv2d(x, w, b, **arguments)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, dy.double())
    for out, truth in ((y, exact), (dx, exact_dx)):
        if bound is None:
            assert_accurate(out, truth)
        else:
            assert relative_error(out, truth) <= bound
    return y.detach()


@on_dtypes
def test_residues_of_filters(dtype: torch.dtype) -> None:
    """Ragged last vectors and panels, for fprop (K) and dgrad (C)."""
    for count in (*range(1, 36), 47, 48, 49, 63, 65):
        check(channels_last(2, 9, 5, 4, dtype=dtype), channels_last(count, 9, 1, 1, dtype=dtype))
        check(
            channels_last(1, count, 4, 5, dtype=dtype), channels_last(9, count, 1, 1, dtype=dtype)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_residues_of_pixels(dtype: torch.dtype) -> None:
    """Tiles of every height, within a row and across rows and samples."""
    w = channels_last(24, 11, 1, 1, dtype=dtype)
    for width in range(1, 31):
        check(channels_last(1, 11, 1, width, dtype=dtype), w)
    for height, width in ((2, 7), (3, 5), (5, 13), (7, 7), (17, 29)):
        check(channels_last(3, 11, height, width, dtype=dtype), w)


def test_runs_of_pixels() -> None:
    """Tiles without tables, of every width, add up what those with tables do: the bits of pixels
    that are too few for them are the same."""
    for channels in (7, 300):
        x = channels_last(1, channels, 20, 26)
        for count in (3, 8, 9, 16, 17, 24, 25, 32, 33, 56, 57, 80):
            w, b = torch.randn(count, channels, 1, 1), torch.randn(count)
            y = check(x, w, b)
            assert torch.equal(y[..., :1, :13], F.conv2d(x[..., :1, :13], w, b))
            z = torch.randn_like(y)
            out = F.conv2d(x, w, b, activation="relu6", residual=z)
            assert torch.equal(out, torch_F.relu6(y + z))


def test_residues_of_terms() -> None:
    """Blocks of sums that go to memory at any term, and chunks of channels of unequal size."""
    for channels in (*range(1, 19), 255, 256, 257, 511, 513, 1000, 2047, 2049, 2100):
        check(channels_last(1, channels, 3, 5), torch.randn(17, channels, 1, 1))
    for channels in (27, 28, 29, 57, 85, 113, 127, 129, 227, 228, 300):
        check(channels_last(1, channels, 4, 5), torch.randn(18, channels, 3, 3), padding=1)


# C, H, W, K, kernel, arguments
SHAPES: dict[str, tuple[int, int, int, int, tuple[int, int], dict[str, Any]]] = {
    "first_layer": (3, 40, 51, 20, (3, 3), {"padding": 1}),
    "stem": (3, 45, 38, 33, (7, 7), {"padding": 3, "stride": 2}),
    "one_channel": (1, 31, 60, 32, (5, 20), {"stride": 2}),
    "wide": (6, 3, 1000, 16, (3, 3), {"padding": 1}),
    "tall": (6, 1000, 3, 16, (3, 3), {"padding": 1}),
    "wide_and_deep": (70, 5, 300, 16, (3, 3), {"padding": 1}),
    "small_5x5": (70, 7, 7, 40, (5, 5), {"padding": 2}),
    "one_pixel": (40, 1, 1, 40, (5, 5), {"padding": 2}),
    "dilated_rows": (33, 15, 12, 20, (3, 3), {"padding": (6, 0), "dilation": (6, 1)}),
    "dilated_columns": (33, 12, 30, 20, (3, 3), {"padding": (0, 12), "dilation": (1, 12)}),
    "dilation_of_the_image": (20, 13, 13, 20, (3, 3), {"padding": 12, "dilation": 12}),
    "padding_beyond_kernel": (20, 6, 7, 20, (3, 3), {"padding": (5, 4)}),
    "stride_above_kernel": (20, 17, 18, 20, (2, 2), {"stride": 5}),
    "stride_3_dilation_2": (20, 17, 18, 20, (3, 3), {"stride": 3, "dilation": 2, "padding": 2}),
    "1x1_stride_2": (64, 15, 14, 40, (1, 1), {"stride": 2}),
    "1x1_stride_2_runs": (40, 11, 56, 70, (1, 1), {"stride": 2}),
    "1x1_stride_2x1_run": (40, 11, 14, 70, (1, 1), {"stride": (2, 1)}),
    "1x1_padding": (64, 5, 6, 40, (1, 1), {"padding": 1}),
    "1x1_blocks_of_tiles": (24, 41, 43, 144, (1, 1), {}),
    "same_cache_sets": (1024, 6, 5, 40, (1, 1), {}),
    "same_cache_sets_strided": (512, 7, 9, 40, (1, 1), {"stride": 2}),
    "many_filters": (64, 5, 5, 700, (1, 1), {}),
    "few_pixels_chunks": (700, 5, 6, 70, (3, 2), {"stride": 2, "padding": 1}),
    "no_padding": (40, 12, 33, 50, (3, 3), {}),
    "no_padding_strided": (9, 13, 40, 35, (3, 4), {"stride": 2, "dilation": (2, 1)}),
    "groups": (48, 9, 8, 60, (3, 3), {"padding": 1, "groups": 3}),
    "groups_1x1": (48, 9, 8, 60, (1, 1), {"groups": 3}),
}


@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last], ids=str)
@on_dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, dtype: torch.dtype, weight_format: torch.memory_format) -> None:
    C, H, W, K, kernel, arguments = SHAPES[shape]
    w = torch.randn(K, C // arguments.get("groups", 1), *kernel).to(dtype)
    w = w.contiguous(memory_format=weight_format)
    check(channels_last(2, C, H, W, dtype=dtype), w, torch.randn(K).to(dtype), **arguments)


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_of_a_sample_alone(shape: str) -> None:
    """Neither the batch nor the threads change how a sum is cut."""
    C, H, W, K, kernel, arguments = SHAPES[shape]
    x = channels_last(5, C, H, W)
    w, b = torch.randn(K, C // arguments.get("groups", 1), *kernel), torch.randn(K)
    dz = torch.randn_like(F.conv2d(x, w, b, **arguments))

    def both(x: Tensor, dz: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = F.conv2d(x, w, b, **arguments)
        return [y.detach(), *torch.autograd.grad(y, x, dz)]

    with threads(2):
        together = both(x, dz)
    with threads(1):
        alone = [both(x[n : n + 1], dz[n : n + 1]) for n in range(5)]
    for batch, samples in zip(together, zip(*alone, strict=True), strict=True):
        assert_same(batch, torch.cat(samples))


@on_dtypes
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_weights_that_threads_share(weight_format: torch.memory_format, dtype: torch.dtype) -> None:
    """So many products that packed weights are streamed to memory, by one thread or by several."""
    x = channels_last(3, 257, 17, 21, dtype=dtype)
    w = torch.randn(250, 257, 1, 1).to(dtype).contiguous(memory_format=weight_format)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(check(x, w))
    for y in results[1:]:
        assert_same(y, results[0])
    w = torch.randn(129, 60, 3, 3).to(dtype).contiguous(memory_format=weight_format)
    check(channels_last(2, 60, 20, 31, dtype=dtype), w, padding=1)


@pytest.mark.parametrize("channels", [64, 300, 2048])
def test_accuracy(channels: int) -> None:
    for kernel, padding in ((1, 0), (3, 1)):
        w = torch.randn(40, channels, kernel, kernel)
        check(channels_last(1, channels, 8, 8), w, bound=1e-6, padding=padding)


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "gelu"])
@pytest.mark.parametrize("C", [20, 300])
def test_epilogue(activation: str, C: int) -> None:
    """In registers or in scratch, after one chunk of channels or several."""
    x, w, b = channels_last(2, C, 6, 7), torch.randn(19, C, 3, 3) / 9, torch.randn(19)
    exact = torch_F.conv2d(x.double(), w.double(), b.double(), padding=1)
    theirs = getattr(torch_F, activation)(exact)
    assert_accurate(F.conv2d(x, w, b, padding=1, activation=activation), theirs)
    settings = ((1, 1), (1, 1, 1, 1), (1, 1), 1, activation, False)
    residual = torch.randn_like(theirs, dtype=x.dtype)
    y, z = torch.ops.torchconv.conv2d_with_preactivation(x, w, b, *settings, residual)
    assert_accurate(z, exact + residual)
    assert_accurate(y, getattr(torch_F, activation)(exact + residual))


def test_outputs_past_the_caches() -> None:
    """An output that is streamed to memory, also of filters that tasks share by half vectors, and
    gradients with gaps between the pixels."""
    x, w = channels_last(2, 8, 200, 200), torch.randn(64, 8, 1, 1)
    check(x, w)
    check(channels_last(1, 8, 14, 16), torch.randn(18736, 8, 1, 1))
    check(channels_last(1, 64, 260, 260), torch.randn(16, 64, 1, 1), stride=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_padded_pixels_of_neighbouring_tasks(groups: int, dtype: torch.dtype) -> None:
    """Tasks that differ in their sample or group alone copy pixels of their own."""
    x = channels_last(2, 64 * groups, 10, 10, dtype=dtype)
    w = torch.randn(64 * groups, 64, 1, 1, dtype=dtype)
    check(x, w, padding=1, groups=groups)


@on_dtypes
@pytest.mark.parametrize("size", [(7, 28), (16, 29), (5, 64)], ids=str)
def test_taps_along_an_axis(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Read in place with padding too: dilations up to and beyond the image, padding that whole rows
    of the kernel lie in, panels of filters that are not full.
    """
    for C, K in ((20, 33), (64, 64), (130, 40)):
        for taps, gap, padding in ((3, 1, 1), (3, 4, 4), (7, 1, 3), (2, 1, 1), (3, 16, 16)):
            for vertical in (True, False):
                pair = (lambda a, b: (a, b)) if vertical else (lambda a, b: (b, a))
                check(
                    channels_last(2, C, *size, dtype=dtype),
                    channels_last(K, C, *pair(taps, 1), dtype=dtype),
                    torch.randn(K).to(dtype),
                    padding=pair(padding, 0),
                    dilation=pair(gap, 1),
                )


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("kernel", [(3, 1), (1, 3)], ids=str)
def test_special_values_beside_padding(kernel: tuple[int, int], value: float) -> None:
    x, w = channels_last(2, 40, 9, 30), torch.rand(64, 40, *kernel) + 0.5
    x[1, 17, 8, 0] = x[0, 3, 0, 29] = value
    padding = (kernel[0] // 2, kernel[1] // 2)
    y, theirs = F.conv2d(x, w, padding=padding), torch_F.conv2d(x, w, padding=padding)
    assert torch.equal(torch.isfinite(y), torch.isfinite(theirs))
    assert torch.equal(torch.isnan(y), torch.isnan(theirs))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_special_values_stay_in_their_windows(value: float) -> None:
    x, w = channels_last(2, 40, 9, 11), torch.rand(35, 40, 3, 3) + 0.5
    x[1, 17, 4, 0] = value
    y, theirs = F.conv2d(x, w, padding=1), torch_F.conv2d(x, w, padding=1)
    assert torch.equal(torch.isfinite(y), torch.isfinite(theirs))
    assert torch.equal(torch.isnan(y), torch.isnan(theirs))
    assert_accurate(y[:1], theirs[:1].double())


def test_lanes_beyond_the_last_filter_are_not_written() -> None:
    """Neighbouring groups' filters share vectors: each group writes only its own."""
    x, w = channels_last(2, 30, 5, 6), torch.randn(27, 10, 3, 3)
    check(x, w, torch.randn(27), groups=3, padding=1)
