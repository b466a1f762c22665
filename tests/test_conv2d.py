"""conv2d against torch.nn.functional.conv2d: values, dtypes, strides and gradients.

The truth is F.conv2d in float64 on the same (already rounded) inputs; dtype and strides are those
of F.conv2d in the dtype under test. What PyTorch has no argument for is compared with how one
spells it in PyTorch: F.pad for padding by side, weight.flip for the true convolution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import torchconv
import torchconv.functional as F
from conftest import (
    FLOATS,
    LAYOUTS,
    assert_accurate,
    assert_same,
    everywhere,
    from_numpy,
    in_layout,
    relative_error,
    to_numpy,
)
from oracle import torch_F

pytestmark = everywhere

FORMATS = ("contiguous", "channels_last")
# Of the direct product, and of the choice that may fall on Winograd's algorithms.
ERROR_BOUNDS = {False: 1e-6, True: 2e-6}

# name: input size, weight size, further arguments of conv2d
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1x1": ((2, 5, 7, 6), (4, 5, 1, 1), {}),
    "1x1_s2": ((2, 17, 7, 6), (33, 17, 1, 1), {"stride": 2}),
    "1x1_s3x1_p2": ((2, 5, 7, 6), (4, 5, 1, 1), {"stride": (3, 1), "padding": 2}),
    "1x1_one_channel": ((2, 1, 5, 5), (1, 1, 1, 1), {}),
    "3x3": ((2, 4, 9, 8), (6, 4, 3, 3), {}),
    "3x3_p1": ((2, 16, 9, 19), (32, 16, 3, 3), {"padding": 1}),
    "3x3_s2_p1": ((2, 8, 9, 10), (12, 8, 3, 3), {"stride": 2, "padding": 1}),
    "3x3_s2x1_p1x0": ((2, 4, 9, 8), (6, 4, 3, 3), {"stride": (2, 1), "padding": (1, 0)}),
    "3x3_s4": ((1, 4, 13, 14), (6, 4, 3, 3), {"stride": 4}),
    "3x3_d2": ((2, 4, 9, 8), (6, 4, 3, 3), {"dilation": 2}),
    "3x3_d3x1_p3x1": ((2, 4, 9, 8), (6, 4, 3, 3), {"dilation": (3, 1), "padding": (3, 1)}),
    "3x3_s2_d2_p2": ((2, 4, 9, 8), (6, 4, 3, 3), {"stride": 2, "dilation": 2, "padding": 2}),
    "3x3_s3_d2_short_rows": (
        (2, 35, 22, 5),
        (18, 35, 3, 3),
        {"stride": 3, "dilation": 2},
    ),
    "1x3_s1x3_d1x3_one_phase": (
        (2, 39, 1, 11),
        (128, 39, 1, 3),
        {"stride": (1, 3), "dilation": (1, 3)},
    ),
    "5x5_few_filters_short_rows": ((2, 64, 7, 7), (5, 64, 5, 5), {}),
    "4x4_s3x2_p1": ((2, 67, 11, 9), (20, 67, 4, 4), {"stride": (3, 2), "padding": 1}),
    "3x5_s4": ((1, 37, 14, 13), (33, 37, 3, 5), {"stride": 4}),
    "3x3_wide": ((1, 3, 5, 70), (17, 3, 3, 3), {"padding": 1}),
    "3x3_tall": ((1, 3, 70, 2), (5, 3, 3, 3), {"padding": 1}),
    "3x3_many_channels": ((1, 67, 6, 5), (37, 67, 3, 3), {"padding": 1}),
    "2x2": ((2, 4, 9, 8), (6, 4, 2, 2), {}),
    "2x2_s2": ((2, 4, 9, 8), (6, 4, 2, 2), {"stride": 2}),
    "4x4_s2_p1": ((2, 3, 10, 8), (6, 3, 4, 4), {"stride": 2, "padding": 1}),
    "3x1": ((2, 4, 9, 8), (6, 4, 3, 1), {"padding": (1, 0)}),
    "1x3": ((2, 16, 9, 8), (16, 16, 1, 3), {"padding": (0, 1)}),
    "1x7_p3": ((2, 4, 5, 9), (6, 4, 1, 7), {"padding": (0, 3)}),
    "5x2": ((2, 4, 9, 8), (6, 4, 5, 2), {"stride": (1, 2)}),
    "5x5_p2": ((2, 1, 12, 11), (6, 1, 5, 5), {"padding": 2}),
    "6x6": ((1, 2, 9, 8), (3, 2, 6, 6), {"padding": (2, 3)}),
    "7x7_s2_p3": ((1, 3, 20, 22), (9, 3, 7, 7), {"stride": 2, "padding": 3}),
    "7x7_is_the_image": ((2, 3, 7, 7), (5, 3, 7, 7), {}),
    "kernel_larger_than_image": ((2, 3, 3, 2), (4, 3, 5, 5), {"padding": 2}),
    "padding_beyond_kernel": ((1, 2, 4, 4), (3, 2, 3, 3), {"padding": (5, 4)}),
    "one_row": ((2, 4, 1, 9), (6, 4, 1, 3), {"padding": (0, 1)}),
    "one_pixel": ((3, 5, 1, 1), (4, 5, 1, 1), {}),
    "one_pixel_3x3": ((3, 5, 1, 1), (4, 5, 3, 3), {"padding": 1}),
    "stride_beyond_image": ((2, 3, 6, 6), (4, 3, 3, 3), {"stride": 50}),
    "groups_2": ((2, 8, 7, 6), (6, 4, 3, 3), {"groups": 2, "padding": 1}),
    "groups_3_s2": ((2, 9, 8, 7), (12, 3, 3, 3), {"groups": 3, "stride": 2}),
    "groups_4_1x1": ((2, 8, 5, 6), (8, 2, 1, 1), {"groups": 4}),
    "groups_resnext": ((1, 64, 6, 5), (64, 8, 3, 3), {"groups": 8, "padding": 1}),
    "depthwise_3x3": ((2, 19, 9, 8), (19, 1, 3, 3), {"groups": 19, "padding": 1}),
    "depthwise_s2_p1": ((2, 24, 9, 10), (24, 1, 3, 3), {"groups": 24, "stride": 2, "padding": 1}),
    "depthwise_5x5": ((1, 33, 9, 8), (33, 1, 5, 5), {"groups": 33, "padding": 2}),
    "depthwise_7x7_d2": ((1, 6, 14, 15), (6, 1, 7, 7), {"groups": 6, "padding": 6, "dilation": 2}),
    "depthwise_multiplier_2": ((2, 5, 7, 6), (10, 1, 3, 3), {"groups": 5, "padding": 1}),
    "depthwise_multiplier_3": ((2, 4, 7, 6), (12, 1, 3, 2), {"groups": 4, "stride": 2}),
    "depthwise_1x1": ((2, 6, 5, 4), (6, 1, 1, 1), {"groups": 6}),
    "same": ((2, 4, 9, 8), (6, 4, 3, 3), {"padding": "same"}),
    "same_even_d3": ((2, 4, 9, 8), (6, 4, 4, 2), {"padding": "same", "dilation": (1, 3)}),
    "valid": ((2, 4, 9, 8), (6, 4, 3, 3), {"padding": "valid", "stride": 2}),
}

on_cases = pytest.mark.parametrize("case", CASES)
on_dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def make(case: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    x_size, w_size, kwargs = CASES[case]
    sizes = (x_size, w_size, w_size[:1])
    return [torch.randn(s).to(dtype).requires_grad_() for s in sizes], kwargs


def gradients(
    op: Callable[..., Tensor], leaves: list[Tensor], kwargs: dict[str, Any], dz: Tensor
) -> tuple[Tensor, list[Tensor]]:
    z = op(*leaves, **kwargs)
    return z, list(torch.autograd.grad(z, leaves, dz.to(z.dtype)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("input_format", FORMATS)
@on_dtypes
@on_cases
def test_forward_and_backward(
    case: str, dtype: torch.dtype, input_format: str, weight_format: str
) -> None:
    (x, w, b), kwargs = make(case, dtype)
    leaves = [in_layout(x, input_format), in_layout(w, weight_format), b]
    z = F.conv2d(*leaves, **kwargs)
    theirs = torch_F.conv2d(*leaves, **kwargs)
    assert z.dtype == theirs.dtype
    assert z.shape == theirs.shape
    assert z.stride() == theirs.stride()
    dz = in_layout(torch.randn_like(z), input_format)
    got = torch.autograd.grad(z, leaves, dz)
    torch_dx = torch.autograd.grad(theirs, leaves, dz)[0]
    doubles = [t.detach().double().contiguous().requires_grad_() for t in (x, w, b)]
    truth, expected = gradients(torch_F.conv2d, doubles, kwargs, dz.double())
    assert_accurate(z, truth)
    for gradient, value in zip(got, expected, strict=True):
        assert gradient.dtype == dtype
        assert_accurate(gradient, value)
    assert got[0].stride() == torch_dx.stride()


@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("input_layout", LAYOUTS)
@pytest.mark.parametrize("case", ["3x3_s2_p1", "1x1", "depthwise_3x3", "groups_2"])
def test_any_strides(case: str, input_layout: str, weight_layout: str) -> None:
    """Views with gaps, offsets and permuted axes are read right and never written."""
    (x, w, b), kwargs = make(case, torch.float32)
    leaves = [in_layout(x, input_layout), in_layout(w, weight_layout), b]
    z = F.conv2d(*leaves, **kwargs)
    theirs = torch_F.conv2d(*leaves, **kwargs)
    assert z.stride() == theirs.stride()
    dz = in_layout(torch.randn_like(z), weight_layout)
    got = torch.autograd.grad(z, leaves, dz)
    doubles = [t.detach().double().requires_grad_() for t in (x, w, b)]
    truth, expected = gradients(torch_F.conv2d, doubles, kwargs, dz.double())
    for out, value in zip((z, *got), (truth, *expected), strict=True):
        assert_accurate(out, value)
    assert torch.equal(leaves[0], x) and torch.equal(leaves[1], w)


def test_expanded_operands() -> None:
    """Stride 0: one picture for the whole batch, one kernel for all filters, one number for dz."""
    x = torch.randn(1, 3, 6, 5).expand(4, -1, -1, -1).requires_grad_()
    w = torch.randn(1, 3, 3, 3).expand(5, -1, -1, -1).requires_grad_()
    b = torch.randn(1).expand(5).requires_grad_()
    z = F.conv2d(x, w, b, padding=1)
    got = torch.autograd.grad(z.sum(), (x, w, b))
    doubles = [t.detach().double().contiguous().requires_grad_() for t in (x, w, b)]
    truth = torch_F.conv2d(*doubles, padding=1)
    assert_accurate(z, truth)
    for gradient, value in zip(got, torch.autograd.grad(truth.sum(), doubles), strict=True):
        assert_accurate(gradient, value)


def test_strided_bias() -> None:
    x, w, b = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3), torch.randn(4, 2)[:, 1]
    assert not b.is_contiguous()
    assert_accurate(F.conv2d(x, w, b), torch_F.conv2d(x.double(), w.double(), b.double()))


@on_dtypes
@pytest.mark.parametrize("needs", [m for m in itertools.product([True, False], repeat=3) if any(m)])
def test_only_the_wanted_gradients(needs: tuple[bool, bool, bool], dtype: torch.dtype) -> None:
    leaves, kwargs = make("3x3_s2_p1", dtype)
    leaves = [t.detach().requires_grad_(n) for t, n in zip(leaves, needs, strict=True)]
    z = F.conv2d(*leaves, **kwargs)
    dz = torch.randn_like(z)
    z.backward(dz)
    doubles = [t.detach().double().requires_grad_(n) for t, n in zip(leaves, needs, strict=True)]
    torch_F.conv2d(*doubles, **kwargs).backward(dz.double())
    for leaf, double in zip(leaves, doubles, strict=True):
        assert (leaf.grad is None) == (double.grad is None)
        if leaf.grad is not None and double.grad is not None:
            assert_accurate(leaf.grad, double.grad)
            assert leaf.grad.stride() == leaf.stride()


@on_dtypes
@pytest.mark.parametrize("layout", FORMATS)
def test_without_bias(dtype: torch.dtype, layout: str) -> None:
    (x, w, _), kwargs = make("3x3_p1", dtype)
    x = in_layout(x, layout)
    out = F.conv2d(x, w, **kwargs)
    assert_accurate(out, torch_F.conv2d(x.double(), w.double(), **kwargs))
    assert_same(F.conv2d(x, w, None, **kwargs), out)
    assert_same(F.conv2d(x, w, torch.zeros(w.shape[0], dtype=dtype), **kwargs), out)


@pytest.mark.parametrize(
    "args",
    [(2,), (2, 1), (2, 1, 2), (2, 1, 1, 2), ((2, 1), (0, 1), (1, 2), 2), ([2], [1], [1])],
    ids=str,
)
def test_positional_arguments(args: tuple[Any, ...]) -> None:
    """The order of F.conv2d: stride, padding, dilation, groups; ints, pairs, lists of one."""
    groups = args[3] if len(args) > 3 else 1
    x, w, b = torch.randn(2, 4, 8, 9), torch.randn(6, 4 // groups, 3, 3), torch.randn(6)
    truth = torch_F.conv2d(x.double(), w.double(), b.double(), *args)
    assert_accurate(F.conv2d(x, w, b, *args), truth)
    assert_accurate(F.conv2d(input=x, weight=w, bias=b, **_named(args)), truth)


def _named(args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("stride", "padding", "dilation", "groups"), args, strict=False))


@on_dtypes
@pytest.mark.parametrize("case", ["3x3_s2_p1", "1x1", "depthwise_3x3", "same"])
def test_unbatched(case: str, dtype: torch.dtype) -> None:
    """(C, H, W) in, (K, P, Q) out, forward and backward."""
    (x, w, b), kwargs = make(case, dtype)
    single = x.detach()[0].requires_grad_()
    z = F.conv2d(single, w, b, **kwargs)
    theirs = torch_F.conv2d(single, w, b, **kwargs)
    assert z.shape == theirs.shape and z.stride() == theirs.stride() and z.dim() == 3
    dz = torch.randn_like(z)
    doubles = [t.detach().double().requires_grad_() for t in (single, w, b)]
    truth, expected = gradients(torch_F.conv2d, doubles, kwargs, dz)
    assert_accurate(z, truth)
    for gradient, value in zip(torch.autograd.grad(z, (single, w, b), dz), expected, strict=True):
        assert_accurate(gradient, value)


@on_dtypes
@pytest.mark.parametrize("layout", FORMATS)
def test_empty_batch(dtype: torch.dtype, layout: str) -> None:
    """No images: an output of no elements, zero weight gradients."""
    x = in_layout(torch.randn(0, 4, 8, 9).to(dtype), layout).requires_grad_()
    w, b = (
        torch.randn(6, 4, 3, 3).to(dtype).requires_grad_(),
        torch.randn(6).to(dtype).requires_grad_(),
    )
    z = F.conv2d(x, w, b, padding=1, stride=2)
    theirs = torch_F.conv2d(x, w, b, padding=1, stride=2)
    assert z.shape == theirs.shape == (0, 6, 4, 5) and z.dtype == dtype
    dx, dw, db = torch.autograd.grad(z.sum(), (x, w, b))
    assert dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(w)) and torch.equal(db, torch.zeros_like(b))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("sides", [(90, 0, 0, 9), (0, 90, 9, 0), (3, 70, 17, 2)], ids=str)
@pytest.mark.parametrize(
    ("c", "k", "size", "kwargs"),
    [
        (32, 33, 3, {}),
        (160, 48, 3, {}),
        (32, 32, 3, {"dilation": 3}),
        (32, 32, 3, {"stride": 2}),
        (3, 32, 7, {"stride": 2}),
        (3, 32, 3, {}),
        (20, 24, 5, {}),
        (20, 24, 1, {"stride": 3}),
        (20, 24, (1, 3), {"stride": (1, 2)}),
        (32, 32, 3, {"groups": 32}),
        (32, 32, 3, {"groups": 8}),
    ],
    ids=str,
)
def test_padding_far_beyond_the_image(
    c: int, k: int, size: Any, kwargs: dict[str, Any], sides: tuple[int, ...], layout: str
) -> None:
    """Whole tiles and vectors of a row that no pixel of the image reaches, in all passes."""
    kernel = size if isinstance(size, tuple) else (size, size)
    x = in_layout(torch.randn(2, c, 9, 8), layout)
    w = in_layout(torch.randn(k, c // kwargs.get("groups", 1), *kernel), layout)
    leaves = [t.requires_grad_() for t in (x, w)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]

    def padded(x: Tensor, w: Tensor) -> Tensor:
        return torch_F.conv2d(torch_F.pad(x, sides), w, **kwargs)

    dz = torch.randn(padded(*doubles).shape)
    truth, expected = gradients(padded, doubles, {}, dz)
    z, got = gradients(F.conv2d, leaves, {"padding": sides, **kwargs}, dz)
    for value, exact in zip((z, *got), (truth, *expected), strict=True):
        assert relative_error(value, exact) <= ERROR_BOUNDS[True]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 7])
def test_no_input_channels_of_any_kernel(size: int, stride: int) -> None:
    x, w, b = torch.randn(2, 0, 32, 32), torch.randn(16, 0, size, size), torch.randn(16)
    z = F.conv2d(x, w, b, stride)
    assert torch.equal(z, b[:, None, None].expand(z.shape))


def test_no_input_channels() -> None:
    """The empty sum is zero and leaves the bias; PyTorch's output has no channels either."""
    x, w = torch.randn(2, 0, 8, 8), torch.randn(6, 0, 3, 3)
    b = torch.randn(6, requires_grad=True)
    z = F.conv2d(x, w, b)
    assert torch.equal(z, b[:, None, None].expand(2, 6, 6, 6))
    assert torch.equal(torch.autograd.grad(z.sum(), b)[0], torch.full((6,), 72.0))


# --- what PyTorch has no argument for ------------------------------------------------------------


@on_dtypes
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    "sides",
    [(1, 2, 0, 3), (0, 0, 2, 0), (4, 0, 0, 1), (2, 2, 1, 1), (-1, 2, 0, -2), (0, -3, -1, 1)],
)
def test_padding_by_side_is_pad_then_conv(
    sides: tuple[int, int, int, int], layout: str, dtype: torch.dtype
) -> None:
    """Four ints mean what they mean to F.pad, a negative one a crop."""
    (x, w, b), _ = make("3x3", dtype)
    leaves = [in_layout(x, layout), w, b]
    kwargs = {"stride": (2, 1), "dilation": (1, 2)}
    z = F.conv2d(*leaves, padding=sides, **kwargs)
    dz = torch.randn_like(z)
    doubles = [t.detach().double().requires_grad_() for t in (x, w, b)]
    truth = torch_F.conv2d(torch_F.pad(doubles[0], sides), *doubles[1:], **kwargs)
    expected = torch.autograd.grad(truth, doubles, dz.double())
    for out, value in zip(
        (z, *torch.autograd.grad(z, leaves, dz)), (truth, *expected), strict=True
    ):
        assert_accurate(out, value)


@pytest.mark.parametrize("size", [(8, 9), (7, 12), (1, 5)])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (3, 3), (5, 4), (7, 7)])
@pytest.mark.parametrize("stride", [(2, 2), (3, 1), (4, 5)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
def test_same_with_stride(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    """ceil(n / stride) outputs; the odd row or column of padding at the end."""
    x, w = torch.randn(2, 3, *size).double().requires_grad_(), torch.randn(4, 3, *kernel).double()
    z = F.conv2d(x, w, stride=stride, padding="same", dilation=dilation)
    assert z.shape[2:] == tuple(math.ceil(n / s) for n, s in zip(size, stride, strict=True))
    vertical = reference.same_padding(size[0], kernel[0], stride[0], dilation[0])
    horizontal = reference.same_padding(size[1], kernel[1], stride[1], dilation[1])
    truth = torch_F.conv2d(
        torch_F.pad(x, (*horizontal, *vertical)), w, stride=stride, dilation=dilation
    )
    assert_accurate(z, truth)
    dz = torch.randn_like(z)
    (dx,), (expected,) = torch.autograd.grad(z, x, dz), torch.autograd.grad(truth, x, dz)
    assert_accurate(dx, expected)


@on_dtypes
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    "case", ["3x3_s2_p1", "5x2", "1x1", "groups_2", "depthwise_multiplier_2", "same_even_d3"]
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
def test_flip_kernel(case: str, layout: str, dtype: torch.dtype) -> None:
    """The true convolution: the kernel turned by 180 degrees, and its gradient turned back."""
    (x, w, b), kwargs = make(case, dtype)
    leaves = [in_layout(x, layout), in_layout(w, layout), b]
    z = F.conv2d(*leaves, **kwargs, flip_kernel=True)
    assert z.stride() == torch_F.conv2d(*leaves, **kwargs).stride()
    dz = torch.randn_like(z)
    doubles = [t.detach().double().requires_grad_() for t in (x, w, b)]
    truth = torch_F.conv2d(doubles[0], doubles[1].flip(2, 3), doubles[2], **kwargs)
    expected = torch.autograd.grad(truth, doubles, dz.double())
    for out, value in zip(
        (z, *torch.autograd.grad(z, leaves, dz)), (truth, *expected), strict=True
    ):
        assert_accurate(out, value)


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("winograd", ERROR_BOUNDS, ids=("direct", "chosen"))
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("x_size", "w_size", "kwargs"),
    [
        ((1, 512, 7, 7), (64, 512, 3, 3), {"padding": 1}),
        ((1, 2048, 7, 7), (32, 2048, 1, 1), {}),
        ((1, 4096, 3, 3), (8, 4096, 3, 3), {}),
        ((1, 3, 64, 64), (16, 3, 7, 7), {"stride": 2, "padding": 3}),
        ((16, 16, 40, 40), (8, 16, 3, 3), {"padding": 1}),
        ((4, 64, 32, 32), (64, 1, 3, 3), {"groups": 64, "padding": 1}),
        ((8, 64, 20, 20), (64, 8, 3, 3), {"groups": 8, "padding": 1}),
        ((64, 1, 28, 28), (6, 1, 5, 5), {"padding": 2}),
        ((8, 32, 40, 40), (16, 32, 1, 1), {}),
    ],
    ids=str,
)
def test_float32_error_is_within_the_promise(
    x_size: tuple[int, ...],
    w_size: tuple[int, ...],
    kwargs: dict[str, Any],
    layout: str,
    winograd: bool,
) -> None:
    """Of all three passes in norm, whatever the length of the sum."""
    x = in_layout(torch.randn(x_size), layout).requires_grad_()
    w, b = torch.randn(w_size, requires_grad=True), torch.randn(w_size[0], requires_grad=True)
    dz = torch.randn(torch_F.conv2d(x, w, b, **kwargs).shape)
    doubles = [t.detach().double().requires_grad_() for t in (x, w, b)]
    truth, expected = gradients(torch_F.conv2d, doubles, kwargs, dz)
    with torchconv.backends.allow_winograd(winograd):
        z, got = gradients(F.conv2d, [x, w, b], kwargs, dz)
    pairs = zip((z, *got), (truth, *expected), strict=True)
    errors = [relative_error(value, exact) for value, exact in pairs]
    assert max(errors) <= ERROR_BOUNDS[winograd], dict(
        zip(("z", "dx", "dw", "db"), errors, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_half_types_add_up_in_float32(dtype: torch.dtype, layout: str) -> None:
    """2x2 ones give 4 (pytorch#163347); 4096 ones give 4096, where a half-type sum stops early."""
    ones = in_layout(torch.ones(1, 1, 4, 4, dtype=dtype), layout)
    assert F.conv2d(ones, torch.ones(1, 1, 2, 2, dtype=dtype)).unique().tolist() == [4]
    many = in_layout(torch.ones(2, 4096, 2, 2, dtype=dtype, requires_grad=True), layout)
    w = torch.ones(3, 4096, 1, 1, dtype=dtype)
    assert F.conv2d(many, w).unique().tolist() == [4096]
    x = in_layout(torch.ones(4, 2, 32, 32, dtype=dtype), layout)
    w = torch.zeros(3, 2, 1, 1, dtype=dtype, requires_grad=True)
    b = torch.zeros(3, dtype=dtype, requires_grad=True)
    dw, db = torch.autograd.grad(F.conv2d(x, w, b).sum(), (w, b))
    assert dw.unique().tolist() == [4096] and db.unique().tolist() == [4096]


@on_dtypes
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", ["3x3_p1", "1x1", "depthwise_3x3"])
def test_nan_and_infinity_stay_where_they_belong(
    case: str, layout: str, dtype: torch.dtype
) -> None:
    """A NaN reaches the windows that hold it, and no zero padding or unused lane becomes one."""
    (x, w, b), kwargs = make(case, dtype)
    x = x.detach().clone()
    x[0, 0, 2, 3], x[1, 1, 0, 0] = math.nan, math.inf
    out = F.conv2d(in_layout(x, layout), w, b, **kwargs)
    truth = torch_F.conv2d(x.double(), w.double(), b.double(), **kwargs)
    assert torch.equal(out.isnan(), truth.isnan())
    assert torch.equal(out.isinf(), truth.isinf())


@pytest.mark.parametrize("layout", FORMATS)
def test_depthwise_weight_gradient_of_24_groups(layout: str) -> None:
    """groups=24, stride 2, padding 1 (pytorch#50042)."""
    x = in_layout(torch.randn(3, 24, 15, 15), layout)
    w = torch.randn(24, 1, 3, 3, requires_grad=True)
    kwargs = {"groups": 24, "stride": 2, "padding": 1}
    z = F.conv2d(x, w, **kwargs)
    dz = torch.randn_like(z)
    double = w.detach().double().requires_grad_()
    truth = torch_F.conv2d(x.double(), double, **kwargs)
    (expected,) = torch.autograd.grad(truth, double, dz.double())
    assert_accurate(torch.autograd.grad(z, w, dz)[0], expected)


@pytest.mark.parametrize("layout", FORMATS)
def test_denormals_are_kept(layout: str) -> None:
    """Tiny inputs are not flushed to zero behind the user's back."""
    x = in_layout(torch.full((1, 4, 5, 5), 1e-40), layout)
    out = F.conv2d(x, torch.ones(4, 4, 1, 1))
    assert torch.equal(out, torch.full_like(out, 0).add(x[0, 0, 0, 0] * 4))


@pytest.mark.parametrize("size", [2**31, 2**40, 2**62])
def test_huge_stride_and_dilation(size: int) -> None:
    """One output is left of a huge stride; a 1x1 kernel has nothing to dilate."""
    x, w = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3)
    truth = torch_F.conv2d(x.double(), w.double())[:, :, :1, :1]
    assert_accurate(F.conv2d(x, w, stride=size), truth)
    pointwise = torch.randn(4, 3, 1, 1)
    truth = torch_F.conv2d(x.double(), pointwise.double())
    assert_accurate(F.conv2d(x, pointwise, dilation=size), truth)
    with pytest.raises(RuntimeError):
        F.conv2d(x, w, dilation=size)


@pytest.mark.parametrize("layout", FORMATS)
def test_input_is_not_changed(layout: str) -> None:
    """Neither pass writes to what it was given."""
    (x, w, b), kwargs = make("3x3_s2_p1", torch.float32)
    leaves = [in_layout(x, layout), in_layout(w, layout), b]
    dz = torch.randn_like(F.conv2d(*leaves, **kwargs))
    before = [t.detach().clone() for t in (*leaves, dz)]
    for name in (None, "relu", "gelu"):
        z = F.conv2d(*leaves, **kwargs, activation=name)
        torch.autograd.grad(z, leaves, dz)
    for tensor, copy in zip((*leaves, dz), before, strict=True):
        assert torch.equal(tensor, copy)


def test_scalar_reference() -> None:
    """Once against the loops that the lectures write down, sharing nothing with PyTorch."""
    x, w, b = torch.randn(2, 4, 7, 6), torch.randn(6, 2, 3, 2), torch.randn(6)
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    kwargs = {"stride": (2, 1), "dilation": (1, 2), "groups": 2}
    sides = (1, 2, 0, 1)
    z = F.conv2d(*leaves, **kwargs, padding=sides, flip_kernel=True)
    arrays = [to_numpy(t) for t in leaves]
    truth = reference.conv2d(*arrays, (2, 1), sides, (1, 2), 2, flip=True)
    assert_accurate(z, from_numpy(truth))
    dz = torch.randn_like(z)
    turned = arrays[1][:, :, ::-1, ::-1]
    dx, dw, db = reference.conv2d_backward(
        to_numpy(dz), arrays[0], turned, (2, 1), sides, (1, 2), 2
    )
    expected = (dx, dw[:, :, ::-1, ::-1].copy(), db)
    for gradient, value in zip(torch.autograd.grad(z, leaves, dz), expected, strict=True):
        assert_accurate(gradient, from_numpy(value))


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("case", ["3x3_s2_p1", "1x1", "groups_2", "depthwise_3x3", "3x3_wide"])
def test_integers(case: str, dtype: torch.dtype, layout: str) -> None:
    """Exact, and modulo two to the width where the sum does not fit, as PyTorch's integers are."""
    x_size, w_size, kwargs = CASES[case]
    info = torch.iinfo(dtype)
    low, high = max(info.min, -(2**62)), min(info.max, 2**62)
    x, w, b = (torch.randint(low, high, s).to(dtype) for s in (x_size, w_size, w_size[:1]))
    out = F.conv2d(in_layout(x, layout), in_layout(w, layout), b, **kwargs, flip_kernel=True)
    turned = w.long().flip(2, 3)
    exact = torch_F.conv2d(x.long(), turned, b.long(), **kwargs)
    assert out.dtype == dtype and torch.equal(out, exact.to(dtype))
