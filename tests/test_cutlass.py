"""Convolutions through CUTLASS, on a Hopper GPU: the edges of its tiles, against float64.

Channels leave every residue of the tiles of 32, 64 and 128; images leave a last tile of positions
and lie in the middle of one; taps reach over every border of the image, which a pad below zero also
crops. Most layers are small, and their shares and phases are those of large ones; a few are large
enough for wide tiles.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_F

import torchconv.functional as F
from conftest import WHY_NO_CUDA, assert_accurate, cuda_only, relative_error
from torchconv import explain

CUTLASS = "CUTLASS"


def _why_not() -> str | None:
    if WHY_NO_CUDA:
        return WHY_NO_CUDA
    image = torch.zeros(1, 128, 32, 32, dtype=torch.float16, device="cuda")
    told = explain(image, image.new_zeros(128, 128, 3, 3), padding=1, peak=1.0, bandwidth=1.0)
    return None if CUTLASS in told["fprop"].algorithm else "no kernels of CUTLASS for this GPU"


if WHY_NOT := _why_not():
    pytest.skip(WHY_NOT, allow_module_level=True)

pytestmark = cuda_only

on_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)

# name: N, C, H, W, filters, kernel, arguments
CASES: dict[str, tuple[tuple[int, int, int, int], int, tuple[int, int], dict[str, Any]]] = {
    "1x1": ((3, 64, 7, 9), 64, (1, 1), {}),
    "1x1_wide": ((2, 104, 13, 11), 264, (1, 1), {}),
    "1x1_s2": ((2, 128, 9, 8), 136, (1, 1), {"stride": 2}),
    "3x3": ((3, 64, 14, 14), 64, (3, 3), {"padding": 1}),
    "3x3_wide": ((2, 200, 12, 17), 328, (3, 3), {"padding": 1}),
    "3x3_valid": ((2, 128, 11, 9), 128, (3, 3), {}),
    "3x3_s2": ((2, 128, 15, 18), 96, (3, 3), {"padding": 1, "stride": 2}),
    "3x3_s2_even": ((2, 64, 16, 16), 128, (3, 3), {"padding": 1, "stride": 2}),
    "3x3_d2": ((2, 96, 13, 12), 64, (3, 3), {"padding": 2, "dilation": 2}),
    "3x3_s2_d2": ((2, 64, 13, 12), 64, (3, 3), {"padding": 2, "dilation": 2, "stride": 2}),
    "far": ((1, 64, 40, 40), 64, (3, 3), {"padding": 19, "dilation": 19}),
    "5x5_s2": ((2, 64, 17, 15), 64, (5, 5), {"padding": 2, "stride": 2}),
    "7x7": ((1, 64, 12, 12), 64, (7, 7), {"padding": 3}),
    "1x3_s4": ((2, 64, 9, 40), 64, (1, 3), {"padding": (0, 1), "stride": (1, 4)}),
    "3x1_s3": ((2, 64, 22, 9), 64, (3, 1), {"padding": (1, 0), "stride": (3, 1)}),
    "wide_padding": ((2, 64, 6, 5), 64, (3, 3), {"padding": (4, 3)}),
    "uneven": ((2, 64, 9, 10), 64, (4, 4), {"padding": "same"}),
    "pixel": ((5, 256, 1, 1), 128, (1, 1), {}),
    # Few channels in rows of outputs, loaded with a halo: a last tile of one row, of few columns.
    "halo": ((3, 64, 57, 56), 64, (3, 3), {"padding": 1}),
    "halo_column": ((2, 64, 500, 1), 64, (5, 1), {"padding": (2, 0)}),
    "halo_few": ((2, 48, 30, 31), 56, (3, 2), {"padding": (1, 0)}),
    # Of wgrad in TF32: columns turned in shared memory, channels and filters of them.
    "1x1_few": ((3, 48, 19, 23), 200, (1, 1), {}),
    "1x1_to_few": ((3, 328, 19, 23), 64, (1, 1), {"stride": 2}),
    "many": ((64, 64, 16, 16), 64, (3, 3), {"padding": 1}),
    "long": ((8, 64, 96, 96), 64, (3, 3), {"padding": 1}),
    # Tiles of 256 filters, one round, and two with a rest in other tiles; of 128, three warpgroups,
    # or clusters of four; sums of wgrad in parts.
    "tiles_256": ((13, 64, 31, 33), 248, (3, 3), {"padding": 1}),
    "rounds_256": ((20, 264, 31, 33), 504, (1, 1), {}),
    "tiles_192": ((36, 264, 31, 33), 248, (1, 1), {}),
    "clusters_4": ((4, 136, 31, 33), 504, (1, 1), {}),
    "rounds_128": ((32, 64, 32, 32), 120, (3, 3), {"padding": 1}),
    "parts": ((13, 248, 31, 33), 248, (3, 3), {"padding": 1}),
}


# Groups, whose kernels keep some units or lines ahead (cutlass_sm90_groups.h and
# cutlass_sm90_groups_wgrad.h): fewer and more of them than there is room for, several units of an
# image, a slab that is half full, sums of wgrad that are added up several times. Image, groups,
# stride.
GROUPS: dict[str, tuple[tuple[int, int, int, int], int, int]] = {
    "of_32": ((5, 96, 7, 7), 3, 1),
    "of_32_many": ((140, 1024, 7, 7), 32, 1),
    "of_32_rows": ((19, 96, 28, 27), 3, 1),
    "of_32_s2": ((3, 128, 14, 14), 4, 2),
    "of_32_chains": ((96, 2112, 14, 14), 66, 1),
    "of_64": ((5, 128, 7, 6), 2, 1),
    "of_64_many": ((100, 1024, 7, 7), 16, 1),
    "of_64_rows": ((9, 256, 14, 14), 4, 1),
    "of_64_s2": ((64, 1024, 14, 14), 16, 2),
    "of_64_rows_s2": ((9, 192, 27, 28), 3, 2),
}


def _operands(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    size, filters, kernel, _ = CASES[case]
    terms = size[1] * kernel[0] * kernel[1]
    image = torch.randn(size, device="cuda").to(dtype)
    weight = (torch.randn(filters, size[1], *kernel, device="cuda") / terms**0.5).to(dtype)
    bias = torch.randn(filters, device="cuda").to(dtype)
    last = torch.channels_last
    return image.contiguous(memory_format=last), weight.contiguous(memory_format=last), bias


def _passes(conv: Any, x: Tensor, w: Tensor, b: Tensor, dz: Tensor, **kwargs: Any) -> list[Tensor]:
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    z = conv(x, w, b, **kwargs)
    return [z.detach(), *torch.autograd.grad(z, (x, w), dz)]


def _truth(case: str, x: Tensor, w: Tensor, b: Tensor, dz: Tensor) -> list[Tensor]:
    wide = [t.double().cpu() for t in (x, w, b, dz)]
    return [t.cuda() for t in _passes(torch_F.conv2d, *wide, **CASES[case][3])]


@on_dtypes
@pytest.mark.parametrize("case", CASES)
def test_passes(case: str, dtype: torch.dtype) -> None:
    x, w, b = _operands(case, dtype)
    kwargs = CASES[case][3]
    told = explain(x, w, **kwargs, peak=1.0, bandwidth=1.0)
    assert all(CUTLASS in each.algorithm for each in told.passes), str(told)
    dz = torch.randn_like(F.conv2d(x, w, b, **kwargs))
    found = _passes(F.conv2d, x, w, b, dz, **kwargs)
    for each, exact in zip(found, _truth(case, x, w, b, dz), strict=True):
        assert_accurate(each, exact)
    again = _passes(F.conv2d, x, w, b, dz, **kwargs)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


@pytest.mark.parametrize("case", CASES)
@torch.backends.cudnn.flags(enabled=True, allow_tf32=True)
def test_tf32(case: str) -> None:
    x, w, b = _operands(case, torch.float32)
    kwargs = CASES[case][3]
    told = explain(x, w, **kwargs, peak=1.0, bandwidth=1.0)
    assert all(CUTLASS in told[name].algorithm for name in ("fprop", "dgrad")), str(told)
    dz = torch.randn_like(F.conv2d(x, w, b, **kwargs))
    found = _passes(F.conv2d, x, w, b, dz, **kwargs)
    for each, exact in zip(found, _truth(case, x, w, b, dz), strict=True):
        assert relative_error(each, exact) < 1e-3


@on_dtypes
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_activation(activation: str, dtype: torch.dtype) -> None:
    x, w, b = _operands("3x3_wide", dtype)
    y = F.conv2d(x, w, 4 * b, padding=1, activation=activation)
    z = torch_F.conv2d(x.double().cpu(), w.double().cpu(), 4 * b.double().cpu(), padding=1)
    assert_accurate(y, getattr(torch_F, activation)(z).cuda())


@on_dtypes
@pytest.mark.parametrize("case", GROUPS)
def test_groups(case: str, dtype: torch.dtype) -> None:
    size, groups, stride = GROUPS[case]
    of_group = size[1] // groups
    last = torch.channels_last
    x = torch.randn(size, device="cuda").to(dtype).contiguous(memory_format=last)
    w = torch.randn(size[1], of_group, 3, 3, device="cuda") / (9 * of_group) ** 0.5
    w = w.to(dtype).contiguous(memory_format=last)
    b = torch.randn(size[1], device="cuda").to(dtype)
    kwargs = {"groups": groups, "stride": stride, "padding": 1}
    told = explain(x, w, **kwargs, peak=1.0, bandwidth=1.0)
    assert CUTLASS in told["fprop"].algorithm, str(told)
    assert CUTLASS in told["dgrad"].algorithm, str(told)
    # Lines of 28 pixels, and as many of dz, are too long.
    assert (CUTLASS in told["wgrad"].algorithm) == (case != "of_32_rows"), str(told)
    dz = torch.randn_like(F.conv2d(x, w, b, **kwargs))
    found = _passes(F.conv2d, x, w, b, dz, **kwargs)
    doubles = [t.double() for t in (x, w, b, dz)]
    truth = _passes(torch_F.conv2d, *doubles, **kwargs)
    for each, exact in zip(found, truth, strict=True):
        assert_accurate(each, exact)
    for _ in range(10):  # copies and products that overlap
        again = _passes(F.conv2d, x, w, b, dz, **kwargs)
        assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))
    y = F.conv2d(x, w, 4 * b, **kwargs, activation="relu6")
    z = torch_F.conv2d(doubles[0], doubles[1], 4 * doubles[2], **kwargs)
    assert_accurate(y, torch_F.relu6(z))
    alone = x[-1:].contiguous(memory_format=last)
    assert torch.equal(F.conv2d(alone, w, b, **kwargs), found[0][-1:])


@on_dtypes
@pytest.mark.parametrize("case", ["1x1_wide", "3x3_wide", "3x3_s2", "tiles_192"])
def test_residual(case: str, dtype: torch.dtype) -> None:
    x, w, b = _operands(case, dtype)
    kwargs = CASES[case][3]
    residual = torch.randn_like(F.conv2d(x, w, b, **kwargs))
    y = F.conv2d(x, w, b, **kwargs, residual=residual, activation="relu")
    z = torch_F.conv2d(*(t.double().cpu() for t in (x, w, b)), **kwargs) + residual.double().cpu()
    assert_accurate(y, torch_F.relu(z).cuda())


@pytest.mark.parametrize("case", ["3x3", "3x3_wide", "3x3_s2", "halo"])
def test_a_sample_does_not_depend_on_its_batch(case: str) -> None:
    x, w, b = _operands(case, torch.float16)
    many = x.repeat(200, 1, 1, 1)
    kwargs = CASES[case][3]
    assert torch.equal(F.conv2d(many, w, b, **kwargs)[: len(x)], F.conv2d(x, w, b, **kwargs))


@on_dtypes
def test_nan_and_infinity(dtype: torch.dtype) -> None:
    x, w, b = _operands("3x3", dtype)
    x[0, 5, 3, 3], x[1, 6, 4, 4] = torch.nan, torch.inf
    y = F.conv2d(x, w, b, padding=1, activation="relu")
    z = torch_F.conv2d(x.float().cpu(), w.float().cpu(), b.float().cpu(), padding=1)
    expected = torch_F.relu(z)
    assert torch.equal(y.isnan().cpu(), expected.isnan())
    assert torch.equal(y.isinf().cpu(), expected.isinf())


@on_dtypes
def test_operands_at_any_element(dtype: torch.dtype) -> None:
    x, w, b = _operands("3x3", dtype)

    def moved(t: Tensor) -> Tensor:
        whole = torch.zeros(t.numel() + 3, dtype=dtype, device="cuda")
        return whole[3:].as_strided(t.size(), t.stride(), 3).copy_(t)

    dz = torch.randn_like(F.conv2d(x, w, b, padding=1))
    expected = _passes(F.conv2d, x, w, b, dz, padding=1)
    found = _passes(F.conv2d, moved(x), moved(w), moved(b), moved(dz), padding=1)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def _in_a_new_thread(call: Callable[[], Tensor]) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def test_from_a_thread_without_a_context() -> None:
    """The driver makes no tensor map where nothing has called CUDA's runtime yet."""
    x, w, b = _operands("3x3", torch.float16)
    wide = torch.randn(64, 32, 3, 3, device="cuda").half().to(memory_format=torch.channels_last)
    calls = [
        lambda: F.conv2d(x, w, b, padding=1),
        lambda: F.conv2d(x, wide, b, padding=1, groups=2),
    ]
    for call in calls:
        expected = call()
        torch.cuda.synchronize()
        assert torch.equal(_in_a_new_thread(call), expected)


def test_in_a_graph() -> None:
    x, w, b = _operands("3x3_s2", torch.float16)

    def step() -> list[Tensor]:
        return _passes(F.conv2d, x, w, b, dz, padding=1, stride=2)

    dz = torch.randn_like(F.conv2d(x, w, b, padding=1, stride=2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, step(), strict=True))
