"""torchconv.explain: what the table of algorithms says of a convolution, and its numbers."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torchconv
from torchconv import _explain, _load, _peak, explain

WINOGRAD, PRODUCT = "Winograd", "matrix product, vectors along pixels"
SAMPLES = "matrix product of samples, weights in place"


def operands(
    *sizes: int, groups: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Meta tensors: N, C, H, W, K, R."""
    n, c, h, w, k, r = sizes
    x = torch.empty(n, c, h, w, dtype=dtype, device="meta")
    return x, torch.empty(k, c // groups, r, r, dtype=dtype, device="meta")


def has_pairs() -> bool:
    """Whether the processor has dot products of pairs, and the library is one with them."""
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return avx512 and torch.cpu._is_avx512_bf16_supported()


def at(*arguments: Any, **kwargs: Any) -> torchconv._explain.Explanation:
    return explain(*arguments, **kwargs, peak=100.0, bandwidth=10.0)


@pytest.mark.parametrize("side, saving, tiles", [(3, 4, "7 x 7 tiles"), (5, 2.8, "14 x 14 tiles")])
def test_numbers(side: int, saving: float, tiles: str) -> None:
    x, w = operands(2, 64, 28, 28, 32, side)
    found = at(x, w, None, 1, side // 2)
    direct = 2 * 2 * 32 * 28 * 28 * 64 * side**2
    moved = 4 * (x.numel() + w.numel() + 2 * 32 * 28 * 28)
    assert [p.name for p in found.passes] == ["fprop", "dgrad", "wgrad"]
    for each in found.passes:
        assert each.algorithm == WINOGRAD
        assert each.otherwise != WINOGRAD and each.otherwise != ""
        assert each.direct_operations == direct and each.bytes == moved
        assert direct / saving < each.operations < direct
        assert each.floor == max(direct / 100, moved / 10) / 1e9
        assert each.predicted == max(each.operations / 100, moved / 10) / 1e9
    assert tiles in found["fprop"].blocking
    assert found.measured == ()
    with pytest.raises(KeyError):
        found["forward"]


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize(
    ("sizes", "arguments"),
    [
        ((1, 64, 14, 14, 64, 3), {"padding": 1}),
        ((2, 64, 14, 14, 64, 1), {"stride": 2}),
        ((2, 64, 15, 14, 64, 3), {"stride": 2, "padding": (0, 1), "flip_kernel": True}),
        ((2, 3, 31, 31, 64, 7), {"stride": 2, "padding": 3}),
        ((2, 3, 32, 32, 64, 4), {"stride": 4}),
        ((2, 300, 1, 1, 64, 1), {}),
        ((2, 4, 15, 14, 6, 5), {"padding": "same", "dilation": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_kind(
    sizes: tuple[int, ...], arguments: dict[str, Any], dtype: torch.dtype, layout: str
) -> None:
    """Real and meta tensors agree, and the switch is obeyed."""
    x, w = (t.to(memory_format=getattr(torch, layout)) for t in operands(*sizes, dtype=dtype))
    found = at(x, w, **arguments)
    real = [torch.zeros_like(t, device="cpu") for t in (x, w)]
    assert at(*real, **arguments) == found
    assert all(p.algorithm and p.blocking and p.operations > 0 for p in found.passes)
    with torchconv.backends.allow_winograd(False):
        forbidden = at(x, w, **arguments)
    for with_it, without in zip(found.passes, forbidden.passes, strict=True):
        assert WINOGRAD not in without.algorithm
        # One sample does not repay copies of all.
        copies = "by way of channels_last images" in without.blocking
        if WINOGRAD in with_it.algorithm:
            assert with_it.otherwise == without.algorithm or copies
        else:
            assert with_it == without


def test_phases_by_way_of_an_image() -> None:
    """Dot products of pairs read channels_last."""
    x, w = operands(2, 128, 28, 28, 128, 3, dtype=torch.bfloat16)
    words = "by way of a channels_last image"
    assert (words in at(x, w, None, 2, 1)["dgrad"].blocking) == has_pairs()
    assert words not in at(x, w, None, 1, 1)["dgrad"].blocking
    x = x.to(memory_format=torch.channels_last)
    assert words not in at(x, w, None, 2, 1)["dgrad"].blocking


def test_columns() -> None:
    """A fold pays where most taps of the gather lie beside dz, or few pixels meet the weights."""
    words = "columns that are added up"
    for sizes, stride, layout, folds in (
        ((1, 48, 14, 14, 256, 9), 1, torch.contiguous_format, True),
        ((1, 48, 14, 14, 256, 9), 1, torch.channels_last, True),
        ((1, 48, 40, 40, 256, 9), 1, torch.contiguous_format, False),
        ((1, 48, 40, 40, 256, 9), 1, torch.channels_last, True),
        ((1, 48, 14, 14, 64, 9), 1, torch.contiguous_format, False),
        ((1, 48, 13, 13, 256, 5), 4, torch.contiguous_format, True),
        ((1, 48, 30, 30, 64, 4), 2, torch.contiguous_format, False),
    ):
        x, w = operands(*sizes)
        found = at(x.to(memory_format=layout), w.to(memory_format=layout), None, stride)
        assert (words in found["dgrad"].blocking) == folds
    # Of pairs in float, which pack weights for enough taps.
    for kernel in (9, 5):
        x, w = operands(1, 48, kernel + 5, kernel + 5, 256, kernel, dtype=torch.bfloat16)
        blocking = at(x, w)["dgrad"].blocking
        assert (words + ": register tiles of 8 x " in blocking) == (has_pairs() and kernel == 9)
    # In channels_last of few channels.
    for channels in (3, 48):
        x, w = operands(1, channels, 13, 13, 256, 9, dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last)
        blocking = at(x, w.to(memory_format=torch.channels_last))["dgrad"].blocking
        assert (words in blocking) == (has_pairs() and channels == 3)


def test_strides_by_way_of_channels_last_images() -> None:
    """Phases of a contiguous image are copied for the direct product, unless transforms pay."""
    words = "by way of channels_last images"
    for size, stride, layout, copied in (
        (4, 2, torch.contiguous_format, True),
        (4, 2, torch.channels_last, False),
        (4, 1, torch.contiguous_format, False),
        (3, 2, torch.contiguous_format, False),
    ):
        x, w = operands(2, 64, 28, 28, 64, size)
        found = at(x.to(memory_format=layout), w.to(memory_format=layout), None, stride, 1)
        assert (words in found["dgrad"].blocking) == copied


def test_few_filters_over_short_rows() -> None:
    """Vectors along rows of three pixels would be mostly empty."""
    for size, copied in ((7, True), (28, False)):
        x, w = operands(2, 64, size, size, 5, 5)
        words = "by way of channels_last images"
        assert (words in at(x, w)["fprop"].blocking) == copied


def test_few_filters_of_one_tap() -> None:
    """The sum over the lanes of a filter's inner product takes as long as several terms do."""
    inner = "inner products along channels"
    for channels, filters, summed in ((16, 1, True), (16, 8, False), (32, 4, True), (64, 8, True)):
        x, w = operands(2, channels, 28, 28, filters, 1)
        found = at(x.to(memory_format=torch.channels_last), w)["fprop"].algorithm
        assert found == (inner if summed else "matrix product in place")


def test_few_filters_of_a_stride() -> None:
    """Bands along pixels would take the phases apart. Of a first layer that is little."""
    for channels, pairs in ((64, has_pairs()), (3, False)):
        x, w = operands(2, channels, 28, 28, 6, 3, dtype=torch.bfloat16)
        assert ("in place" in at(x, w, None, 2, 1)["fprop"].algorithm) == pairs


def test_weight_gradient_of_few_strided_pixels() -> None:
    """The tiles of a stride have more products to transform back than few pixels pay for."""
    for batch, transforms in ((2, False), (8, True)):
        x, w = operands(batch, 64, 14, 14, 128, 3)
        assert (at(x, w, None, 2, 1)["wgrad"].algorithm == WINOGRAD) == transforms


def test_strides_of_wide_groups() -> None:
    """Groups of few pixels are too small for transforms, or to fill a product's tiles."""
    x, w = operands(1, 128, 14, 14, 128, 3, groups=4)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = at(x.to(memory_format=layout), w, None, 2, 1, 1, 4)
        assert found["fprop"].algorithm.startswith("bands of rows, groups side by side")
        assert found["dgrad"].algorithm == found["fprop"].algorithm
        assert WINOGRAD not in found["wgrad"].algorithm


def test_pairs_of_wide_groups() -> None:
    x, w = operands(1, 128, 14, 14, 128, 1, groups=4, dtype=torch.bfloat16)
    assert ("pairs" in at(x, w, groups=4)["wgrad"].algorithm) == has_pairs()


def test_a_band_that_does_not_fit() -> None:
    """Taps too far apart for scratch: a product that needs no band runs instead."""
    x, w = (t.double() for t in operands(1, 4, 3000, 3000, 4, 3))
    near, far = (at(x, w, None, 1, d, d)["fprop"].algorithm for d in (1, 1400))
    assert near.startswith("bands of rows")
    assert far == PRODUCT
    x, w = (t.double() for t in operands(1, 64, 8, 2560, 3, 3))
    assert "pieces of the columns" in at(x, w, None, 1, 1)["fprop"].blocking


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_weights_in_place(dtype: torch.dtype) -> None:
    """Those of a kernel as large as the image, which meet every sample once, are not packed."""
    found = at(*operands(1, 96, 7, 7, 256, 7, dtype=dtype))
    assert found["fprop"].algorithm == found["dgrad"].algorithm == SAMPLES


def test_one_image_and_arguments() -> None:
    x, w = operands(1, 64, 28, 28, 64, 3)
    assert at(x[0], w, padding=1).passes == at(x, w, padding=[1, 1]).passes
    with pytest.raises(RuntimeError, match="64 channels, but got 32"):
        at(x[:, :32], w)
    with pytest.raises(RuntimeError, match="empty"):
        at(x[:0], w)
    with pytest.raises(NotImplementedError):
        at(x.to(torch.int32), w.to(torch.int32))


def test_windows_that_miss_the_image() -> None:
    x, w = operands(1, 8, 2, 2, 8, 1)
    found = at(x, w, None, 16, (5, 5, 5, 5))
    for name in ("dgrad", "wgrad"):
        assert found[name].algorithm == "zeros" and found[name].operations == 0


def test_text() -> None:
    """What is measured is said to be, and measured once."""
    x, w = operands(1, 64, 28, 28, 64, 3)
    text = str(explain(x, w, padding=1))
    assert text.count("(measured)") == 2 and "fprop  Winograd" in text
    assert str(explain(x, w, padding=1)) == text
    assert "100 GFLOP/s (given), 10.0 GB/s (given)" in str(at(x, w, padding=1))


def test_the_peak_counts_what_every_thread_does() -> None:
    library = ctypes.CDLL(str(_load.load()))
    for kind in ("float32", "float64", "pairs"):
        function = getattr(library, f"torchconv_multiply_adds_{kind}")
        function.argtypes, function.restype = (ctypes.c_int64, ctypes.c_int64), ctypes.c_int64
        once = function(1, 1)
        assert once > 0 or kind == "pairs"
        assert function(3, 5) == 15 * once
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert 0 < _peak.peak(dtype, torch.get_num_threads()) < 1e5


def test_the_machine_is_measured_whatever_the_default_device() -> None:
    devices = set()

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            devices.add(out.device.type)
            return out

    with torch.device("meta"), Devices():
        _explain._rate.__wrapped__(torch.float32, torch.device("cpu"), 1)
        _explain._bandwidth.__wrapped__(torch.device("cpu"), 1)
    assert devices == {"cpu"}
