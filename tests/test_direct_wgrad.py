"""The direct weight gradient: ragged channels, chunks of pixels, accuracy, determinism.

3x3 kernels are run with Winograd's algorithms off. float64 is the judge.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_F

import torchconv
import torchconv.functional as F
from conftest import in_layout, relative_error
from test_determinism import threads

FORMATS = ("contiguous", "channels_last")
on_formats = pytest.mark.parametrize("layout", FORMATS)
on_formats_of_dz = pytest.mark.parametrize("dz_layout", FORMATS)
on_weight_formats = pytest.mark.parametrize("weight_layout", FORMATS)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def direct() -> Iterator[None]:
    with torchconv.backends.allow_winograd(False):
        yield


def wgrad(x: Tensor, dz: Tensor, w: Tensor, **kwargs: Any) -> Tensor:
    w = w.detach().requires_grad_()
    return torch.autograd.grad(F.conv2d(x, w, **kwargs), w, dz)[0]


def reference(x: Tensor, dz: Tensor, w: Tensor, **kwargs: Any) -> Tensor:
    w = w.double().contiguous().requires_grad_()
    y = torch_F.conv2d(x.double().contiguous(), w, **kwargs)
    return torch.autograd.grad(y, w, dz.double().contiguous())[0]


def problem(
    size: tuple[int, ...], filters: tuple[int, ...], layout: str, weight_layout: str, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """x, dz and a weight, in float64."""
    x = torch.randn(size, dtype=torch.float64)
    w = torch.randn(filters, dtype=torch.float64)
    dz = torch.randn_like(torch_F.conv2d(x, w, **kwargs))
    return in_layout(x, layout), in_layout(dz, layout), in_layout(w, weight_layout)


KINDS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "1x1": ((1, 1), {}),
    "1x1_s2": ((1, 1), {"stride": 2}),
    "1x1_p1": ((1, 1), {"padding": 1}),
    "3x3": ((3, 3), {}),
    "3x3_p1": ((3, 3), {"padding": 1}),
    "3x3_s2_p1": ((3, 3), {"stride": 2, "padding": 1}),
    "3x3_d2_p3": ((3, 3), {"dilation": 2, "padding": 3}),
    "2x5_s3x2": ((2, 5), {"stride": (3, 2), "padding": (0, 2)}),
}


def assert_right(
    size: tuple[int, ...],
    filters: tuple[int, ...],
    layout: str,
    weight_layout: str,
    kwargs: dict[str, Any],
) -> None:
    """The weight gradient in every type (of two bytes: where the channels divide by 3)."""
    operands = problem(size, filters, layout, weight_layout, **kwargs)
    truth = reference(*operands, **kwargs)
    for dtype, allowed in TOLERANCE.items():
        if dtype.itemsize == 2 and size[1] % 3:
            continue
        narrow = [t.to(dtype) for t in operands]
        if dtype.itemsize == 2:
            truth = reference(*narrow, **kwargs)
        error = wgrad(*narrow, **kwargs).double() - truth
        # Sums of dz.numel() / K products of two normal numbers each: where a few of them happen to
        # cancel, what they usually are is the measure.
        usual = (operands[1].numel() / filters[0] * truth.numel()) ** 0.5
        assert error.norm() <= allowed * max(float(truth.norm()), usual), (filters, dtype)


@on_formats
@on_weight_formats
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_channels(kind: str, layout: str, weight_layout: str) -> None:
    """Every number of rows of a tile and of vectors of a panel, whole and ragged."""
    kernel, kwargs = KINDS[kind]
    for c, k in [
        (1, 16), (2, 33), (3, 64), (5, 9), (6, 16), (7, 48), (11, 31), (12, 12), (13, 97),
        (16, 1), (16, 3), (16, 7), (16, 23), (17, 20), (24, 10), (32, 32), (33, 65), (48, 7),
        (64, 80),
    ]:  # fmt: skip
        assert_right((2, c, 9, 11), (k, c, *kernel), layout, weight_layout, kwargs)


@on_formats
@pytest.mark.parametrize("kind", ["1x1", "1x1_s2", "3x3_p1", "3x3_s2_p1"])
@pytest.mark.parametrize(
    "size",
    [
        (70, 20, 1, 1), (9, 20, 7, 7), (5, 20, 14, 14), (3, 20, 13, 17), (2, 20, 3, 450),
        (2, 20, 450, 1), (2, 20, 1, 450), (33, 3, 6, 6), (2, 3, 5, 430), (2, 3, 41, 50),
        (9, 16, 7, 7), (2, 16, 3, 450), (2, 16, 450, 1), (2, 16, 41, 50),
        (2, 40, 3, 450), (1, 24, 41, 50), (5, 27, 15, 14),
    ],
    ids=str,
)  # fmt: skip
def test_chunks_of_pixels(size: tuple[int, ...], kind: str, layout: str) -> None:
    """Chunks of several samples, of one, of less than a row; and runs that are joined."""
    kernel, kwargs = KINDS[kind]
    filters = (32, size[1], *kernel)
    x, dz, w = (t.float() for t in problem(size, filters, layout, layout, **kwargs))
    truth = reference(x, dz, w, **kwargs)
    assert relative_error(wgrad(x, dz, w, **kwargs), truth) <= 1e-6


@on_formats
@pytest.mark.parametrize(("c", "k"), [(300, 40), (40, 300), (520, 530)])
@pytest.mark.parametrize("kind", ["1x1", "3x3_s2_p1"])
def test_many_channels(kind: str, c: int, k: int, layout: str) -> None:
    """Blocks of rows, stripes of columns and tasks that share neither."""
    kernel, kwargs = KINDS[kind]
    for size in ((1, c, 6, 5), (2, c, 40, 20)):
        x, dz, w = (t.float() for t in problem(size, (k, c, *kernel), layout, layout, **kwargs))
        truth = reference(x, dz, w, **kwargs)
        assert relative_error(wgrad(x, dz, w, **kwargs), truth) <= 1e-6


@on_formats
@pytest.mark.parametrize(("c", "k"), [(9, 20), (32, 16), (5, 32), (20, 10), (16, 16)])
@pytest.mark.parametrize("kind", ["1x1", "3x3", "3x3_p1", "3x3_s2_p1"])
def test_groups(kind: str, c: int, k: int, layout: str) -> None:
    kernel, kwargs = KINDS[kind]
    kwargs = {"groups": 3, **kwargs}
    size, filters = (3, 3 * c, 10, 9), (3 * k, c, *kernel)
    x, dz, w = (t.float() for t in problem(size, filters, layout, layout, **kwargs))
    assert relative_error(wgrad(x, dz, w, **kwargs), reference(x, dz, w, **kwargs)) <= 1e-6


@on_formats
@pytest.mark.parametrize(("c", "k"), [(2, 2), (9, 16)])
def test_error_does_not_grow_with_the_number_of_pixels(c: int, k: int, layout: str) -> None:
    for n, side in ((1, 1500), (40, 160)):
        x = in_layout(torch.randn(n, c, side, side), layout)
        dz = in_layout(torch.randn(n, k, side, side), layout)
        truth = torch.zeros(k, c, dtype=torch.float64)
        for sample in range(n):
            truth += dz[sample].flatten(1).double() @ x[sample].flatten(1).double().T
        got = wgrad(x, dz, torch.zeros(k, c, 1, 1))
        assert relative_error(got.flatten(1), truth) <= 1e-6


@on_formats
@pytest.mark.parametrize("kind", ["1x1", "3x3_p1", "3x3_s2_p1"])
@pytest.mark.parametrize(("c", "k"), [(3, 32), (16, 18), (40, 72), (72, 40)])
def test_bits_do_not_depend_on_threads(kind: str, c: int, k: int, layout: str) -> None:
    kernel, kwargs = KINDS[kind]
    size = (5, c, 33, 35)
    x, dz, w = (t.float() for t in problem(size, (k, c, *kernel), layout, layout, **kwargs))
    with threads(1):
        first = wgrad(x, dz, w, **kwargs)
    for count in (2, 3):
        with threads(count):
            assert torch.equal(wgrad(x, dz, w, **kwargs), first)


@on_formats
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("c", [3, 16, 20])
def test_padding_meets_no_infinity(c: int, value: float, layout: str) -> None:
    """Taps that see padding where the gradient is not finite get nothing from it."""
    x, dz, w = (t.float() for t in problem((1, c, 8, 9), (32, c, 3, 3), layout, layout, padding=1))
    dz[0, 5, 0, 0] = value
    dw = wgrad(x, dz, w, padding=1)
    met = torch.zeros(32, c, 3, 3, dtype=torch.bool)
    met[5, :, 1:, 1:] = True
    assert torch.equal(~torch.isfinite(dw), met)


FEW_KINDS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    **KINDS,
    "5x5_p2": ((5, 5), {"padding": 2}),
    "5x5_p4": ((5, 5), {"padding": 4}),
    "3x3_p5": ((3, 3), {"padding": 5}),
    "3x3_p12": ((3, 3), {"padding": (1, 2)}),
    "1x3_p2": ((1, 3), {"padding": (0, 2)}),
    "3x1": ((3, 1), {}),
    "4x4_same": ((4, 4), {"padding": "same"}),
}


@on_formats
@on_weight_formats
@pytest.mark.parametrize("kind", FEW_KINDS)
def test_few_filters(kind: str, layout: str, weight_layout: str) -> None:
    """Every number of filters of a tile; rows that share their padding, and that do not."""
    kernel, kwargs = FEW_KINDS[kind]
    for c, k in [(1, 1), (1, 6), (2, 2), (8, 3), (3, 4), (7, 5), (8, 7), (8, 8), (21, 2), (40, 8)]:
        assert_right((3, c, 7, 19), (k, c, *kernel), layout, weight_layout, kwargs)


@on_formats
@pytest.mark.parametrize(
    "size",
    [(1, 3, 300, 40), (2, 4, 5, 1500), (70, 1, 1, 9), (70, 2, 4, 4), (33, 8, 20, 20)],
    ids=str,
)
def test_few_filters_in_bands(size: tuple[int, ...], layout: str) -> None:
    """Bands of a sample and slabs of several samples: the same bits for every number of threads."""
    kwargs = {"padding": 2}
    for k in (3, 6):
        filters = (k, size[1], 5, 5)
        x, dz, w = (t.float() for t in problem(size, filters, layout, layout, **kwargs))
        with threads(1):
            first = wgrad(x, dz, w, **kwargs)
        assert relative_error(first, reference(x, dz, w, **kwargs)) <= 1e-6
        for count in (2, 3):
            with threads(count):
                assert torch.equal(wgrad(x, dz, w, **kwargs), first)


@on_formats
@pytest.mark.parametrize("where", ["x", "dz"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_few_filters_with_infinity(value: float, where: str, layout: str) -> None:
    """The zeros between rows, and those of a gap in dz, meet no infinity."""
    for c, k in [(1, 6), (8, 8), (20, 3)]:
        filters = (k, c, 3, 3)
        x, dz, w = (t.float() for t in problem((2, c, 6, 7), filters, layout, layout, padding=1))
        (x if where == "x" else dz)[1, 0, 0, 6] = value
        want = torch.empty(w.shape, dtype=torch.float64)
        for r, i in enumerate((slice(1, 6), slice(0, 6), slice(0, 5))):
            for s, j in enumerate((slice(1, 7), slice(0, 7), slice(0, 6))):
                h, v = (slice(a.start + t - 1, a.stop + t - 1) for a, t in ((i, r), (j, s)))
                sums = torch.einsum("nkij,ncij->kc", dz[..., i, j].double(), x[..., h, v].double())
                want[:, :, r, s] = sums
        got = wgrad(x, dz, w, padding=1)
        assert torch.equal(torch.isnan(got), torch.isnan(want))
        finite = torch.isfinite(want)
        assert torch.equal(torch.isfinite(got), finite)
        torch.testing.assert_close(got[finite].double(), want[finite], rtol=1e-4, atol=1e-4)


@on_formats
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("k", [512, 517])
def test_gradients_past_the_caches(k: int, n: int, layout: str) -> None:
    """So large, and of so few pixels, that each is written once, by streamed stores."""
    x, dz, w = (t.float() for t in problem((n, 256, 6, 6), (k, 256, 6, 6), layout, layout))
    with threads(1):
        first = wgrad(x, dz, w)
    assert first.nbytes >= 16 << 20
    assert relative_error(first, reference(x, dz, w)) <= 1e-6
    with threads(3):
        assert torch.equal(wgrad(x, dz, w), first)


@on_formats
@on_formats_of_dz
def test_single_channel_with_either_gradient(dz_layout: str, layout: str) -> None:
    """One input channel is dense in both layouts; the strides of its gradient follow PyTorch's."""
    x, dz, w = (t.float() for t in problem((2, 1, 9, 8), (20, 1, 3, 3), layout, layout))
    dz = in_layout(dz, dz_layout)
    leaves = [t.detach().requires_grad_() for t in (x, w)]
    got = torch.autograd.grad(F.conv2d(*leaves), leaves, dz)
    want = torch.autograd.grad(torch_F.conv2d(*(t.double() for t in leaves)), leaves, dz.double())
    for g, t in zip(got, want, strict=True):
        assert relative_error(g, t.double()) <= 1e-6
    fake = torch.autograd.grad(torch_F.conv2d(*leaves), leaves, dz)
    assert got[0].stride() == fake[0].stride()
