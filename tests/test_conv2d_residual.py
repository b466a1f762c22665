"""conv2d with a residual: g(conv2d(x) + residual) in one pass, as cuDNN's fused call, and backward.

The truth is PyTorch's calls in float64. The residual is added to the unrounded sums, so the half
types round once, after the activation.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torchconv
import torchconv.functional as F
from conftest import (
    FLOATS,
    LAYOUTS,
    NORM_BOUND,
    assert_accurate,
    assert_same,
    cpu_only,
    everywhere,
    in_layout,
    relative_error,
)
from oracle import torch_F
from test_conv2d import FORMATS, make
from test_conv2d_activation import ACTIVATIONS
from test_determinism import threads
from test_gradients import CHECKED, CHECKED_TWICE
from torchconv.autograd import Conv2dFunction

pytestmark = everywhere

on_dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
on_formats = pytest.mark.parametrize("layout", FORMATS)

# Input size, weight size, further arguments: what is named is a CPU's algorithm for one layout, or
# both, of float32.
PROBLEMS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "winograd": ((2, 16, 14, 13), (33, 16, 3, 3), {"padding": 1}),
    "winograd_5x5": ((1, 32, 12, 12), (32, 32, 5, 5), {"padding": 2}),
    "winograd_s2": ((1, 64, 28, 27), (64, 64, 3, 3), {"padding": 1, "stride": 2}),
    "winograd_s2_stem": ((1, 3, 64, 64), (64, 3, 7, 7), {"padding": 3, "stride": 2}),
    "winograd_rows": ((2, 3, 12, 21), (24, 3, 3, 3), {"padding": 1}),
    "winograd_rows_by_points": ((2, 24, 9, 49), (24, 24, 3, 8), {"padding": 2}),
    "channels_last_copies": ((2, 64, 7, 7), (5, 64, 5, 5), {}),
    "matrix_product": ((2, 33, 7, 6), (41, 33, 1, 1), {}),
    "matrix_product_in_chunks": ((1, 700, 5, 6), (150, 700, 1, 1), {}),
    "matrix_product_s2": ((2, 24, 9, 9), (40, 24, 1, 1), {"stride": 2}),
    "matrix_product_along_planes": ((3, 24, 9, 11), (40, 24, 1, 1), {}),
    "band_product": ((1, 24, 9, 10), (27, 24, 3, 3), {"stride": (2, 1)}),
    "bands": ((2, 1, 12, 11), (6, 1, 5, 5), {"padding": 2}),
    "direct_product_of_few_filters": ((2, 24, 9, 36), (12, 24, 3, 2), {}),
    "inner_product": ((2, 64, 9, 8), (2, 64, 3, 3), {"padding": 1}),
    "depthwise_rolling": ((2, 33, 9, 10), (33, 1, 3, 3), {"groups": 33, "padding": 1}),
    "depthwise_rolling_d2": (
        (1, 20, 14, 15), (20, 1, 7, 7), {"groups": 20, "padding": 6, "dilation": 2}
    ),
    "depthwise_taps": ((1, 20, 14, 15), (20, 1, 4, 2), {"groups": 20}),
    "depthwise_multiplier": ((2, 5, 7, 6), (10, 1, 3, 3), {"groups": 5, "padding": 1}),
    "groups": ((2, 32, 9, 8), (32, 4, 3, 3), {"groups": 8, "padding": 1}),
    "groups_s2": ((2, 9, 8, 7), (15, 3, 3, 3), {"groups": 3, "stride": 2}),
}  # fmt: skip


def problem(name: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor, dict[str, Any]]:
    """x, w and b; a residual; z without it in float64; and the further arguments."""
    x_size, w_size, kwargs = PROBLEMS[name]
    scale = math.prod(w_size[1:]) ** -0.5
    tensors = [torch.randn(x_size), torch.randn(w_size) * scale, torch.randn(w_size[0])]
    tensors = [t.to(dtype) for t in tensors]
    z = torch_F.conv2d(*(t.double() for t in tensors), **kwargs)
    return tensors, torch.randn_like(z).to(dtype), z, kwargs


@on_dtypes
@on_formats
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_algorithm(name: str, layout: str, dtype: torch.dtype) -> None:
    """Stored from registers and by way of scratch, of which each activation takes one."""
    (x, w, b), residual, z, kwargs = problem(name, dtype)
    x = in_layout(x, layout)
    for activation in (None, "relu", "silu"):
        g = ACTIVATIONS.get(str(activation), torch.clone)
        for other in FORMATS:
            y = F.conv2d(
                *(x, w, b), **kwargs, activation=activation, residual=in_layout(residual, other)
            )
            assert_accurate(y, g(z + residual.double()))
        assert y.stride() == F.conv2d(x, w, b, **kwargs).stride()


@on_dtypes
@pytest.mark.parametrize("of_residual", LAYOUTS)
@on_formats
@pytest.mark.parametrize("case", ["3x3_s2_p1", "1x1", "groups_2", "depthwise_multiplier_2"])
def test_layouts_and_gradients(
    case: str, layout: str, of_residual: str, dtype: torch.dtype
) -> None:
    (x, w, b), kwargs = make(case, dtype)
    residual = torch.randn_like(torch_F.conv2d(x, w, b, **kwargs)).detach().requires_grad_()
    leaves = [in_layout(x, layout), w, b, in_layout(residual, of_residual)]
    y = F.conv2d(*leaves[:3], **kwargs, activation="relu", residual=leaves[3])
    theirs = torch_F.relu(torch_F.conv2d(*leaves[:3], **kwargs) + leaves[3])
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch_F.relu(torch_F.conv2d(*doubles[:3], **kwargs) + doubles[3])
    assert_accurate(y, truth)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, dy)
    torchs = torch.autograd.grad(theirs, leaves, dy)
    expected = torch.autograd.grad(truth, doubles, dy.double())
    for gradient, other, value in zip(got, torchs, expected, strict=True):
        if dtype in NORM_BOUND:
            assert_accurate(gradient, value)
        else:  # see test_conv2d_activation
            limit = 1.5 * relative_error(other, value) + torch.finfo(dtype).eps
            assert relative_error(gradient, value) <= limit


@on_formats
def test_residual_is_the_input(layout: str) -> None:
    """A residual block's, in the very memory of x; and y is memory of its own."""
    x = in_layout(torch.randn(2, 19, 9, 8), layout)
    w = torch.randn(19, 19, 3, 3) / 13
    before = x.clone()
    y = F.conv2d(x, w, padding=1, residual=x)
    assert_accurate(y, torch_F.conv2d(x.double(), w.double(), padding=1) + x.double())
    assert torch.equal(x, before)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@on_formats
def test_gradcheck(activation: str | None, layout: str) -> None:
    sizes = ((2, 3, 5, 4), (2, 3, 3, 3), (2,), (2, 2, 3, 2))
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]
    leaves = [in_layout(t, layout) if t.dim() == 4 else t for t in leaves]

    def op(x: Tensor, w: Tensor, b: Tensor, residual: Tensor) -> Tensor:
        return F.conv2d(x, w, b, 2, 1, activation=activation, residual=residual)

    assert gradcheck(op, leaves, **CHECKED, fast_mode=True)
    assert gradgradcheck(op, leaves, **CHECKED_TWICE, fast_mode=True)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("needed", range(4))
def test_gradient_of_one_operand(activation: str | None, needed: int) -> None:
    sizes = ((2, 3, 5, 4), (2, 3, 3, 3), (2,), (2, 2, 3, 2))
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=i == needed)
              for i, s in enumerate(sizes)]  # fmt: skip

    def op(x: Tensor, w: Tensor, b: Tensor, residual: Tensor) -> Tensor:
        return F.conv2d(x, w, b, 2, 1, activation=activation, residual=residual)

    assert gradcheck(op, leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(op, leaves, fast_mode=True)


def test_function_with_and_without_a_residual() -> None:
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True)
              for s in ((2, 3, 5, 4), (2, 3, 3, 3), (2, 2, 3, 2))]  # fmt: skip
    geometry = ((1, 1), (0, 0, 0, 0), (1, 1), 1, "gelu", False)
    assert gradcheck(lambda x, w, _: Conv2dFunction.apply(x, w, None, *geometry), leaves)
    assert gradcheck(lambda x, w, r: Conv2dFunction.apply(x, w, None, *geometry, r), leaves)


def test_relu_keeps_no_residual_for_backward() -> None:
    x, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3, requires_grad=True)
    residual = torch.randn(1, 3, 3, 3, requires_grad=True)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        F.conv2d(x, w, activation="relu", residual=residual)
    assert all(t is not residual for t in kept)


@pytest.mark.parametrize("name", PROBLEMS)
@on_formats
def test_batch_and_threads_change_no_bit(name: str, layout: str) -> None:
    (x, w, b), residual, _, kwargs = problem(name, torch.float32)
    x, residual = (in_layout(torch.cat([t, t.flip(0)]), layout) for t in (x, residual))

    def call(x: Tensor, residual: Tensor) -> Tensor:
        return F.conv2d(x, w, b, **kwargs, activation="relu", residual=residual)

    expected = call(x, residual)
    assert_same(call(x, residual), expected)
    with threads(3):
        assert_same(call(x, residual), expected)
    assert torch.equal(call(x[:1], residual[:1]), expected[:1])


@cpu_only
@on_formats
@pytest.mark.parametrize("activation", ["silu", "gelu", "hardswish", "sigmoid"])
def test_gradients_have_the_same_bits(activation: str, layout: str) -> None:
    """For any number of threads, and for a sample alone or in its batch."""
    x, residual = torch.randn(5, 7, 17, 17), torch.randn(5, 60, 17, 17)
    w, dy = torch.randn(60, 7, 3, 3), in_layout(torch.randn(5, 60, 17, 17), layout)

    def gradients(n: int) -> tuple[Tensor, ...]:
        leaves = [in_layout(t[:n], layout).requires_grad_() for t in (x, residual)]
        y = F.conv2d(leaves[0], w, padding=1, activation=activation, residual=leaves[1])
        return torch.autograd.grad(y, leaves, dy[:n])

    with threads(1):
        expected = gradients(5)
    with threads(2):
        for found, wanted in zip(gradients(5), expected, strict=True):
            assert torch.equal(found, wanted)
    for found, wanted in zip(gradients(2), expected, strict=True):
        assert torch.equal(found, wanted[:2])


@on_formats
@pytest.mark.parametrize(
    "name",
    ["winograd", "winograd_s2", "winograd_rows", "winograd_rows_by_points", "matrix_product"],
)
def test_nan_and_infinity(name: str, layout: str) -> None:
    """Of the residual where they stand, of the image where the direct sum has them."""
    (x, w, b), residual, _, kwargs = problem(name, torch.float32)
    x[-1, 0, 2, 3], x[-1, 1, 5, 1] = math.inf, math.nan
    residual[0, 1, 2, 2], residual[0, 0, 1, 1] = math.nan, -math.inf
    y = F.conv2d(in_layout(x, layout), w, b, **kwargs, residual=residual)
    truth = torch_F.conv2d(x, w, b, **kwargs) + residual
    assert torch.equal(y.isnan(), truth.isnan())
    assert torch.equal(y.isinf(), truth.isinf())
    finite = truth.isfinite()
    assert torch.equal(y.isfinite(), finite)
    torch.testing.assert_close(y[finite], truth[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(0, 4, 7, 6), (2, 4, 7, 6)], ids=str)
def test_no_images_and_no_channels(size: tuple[int, ...]) -> None:
    """An empty batch has an empty residual; without channels y is g(b + residual)."""
    channels = 0 if size[0] else size[1]
    x, w, b = torch.randn(size[0], channels, 7, 6), torch.randn(3, channels, 3, 3), torch.randn(3)
    residual = torch.randn(size[0], 3, 5, 4)
    y = F.conv2d(x, w, b, activation="relu", residual=residual)
    assert torch.equal(y, (residual + b[:, None, None]).relu())


@cpu_only
@on_dtypes
def test_preactivation_has_the_residual(dtype: torch.dtype) -> None:
    (x, w, b), residual, z, _ = problem("matrix_product", dtype)
    y, got = torch.ops.torchconv.conv2d_with_preactivation(
        x, w, b, activation="silu", residual=residual
    )
    assert_accurate(got, z + residual.double())
    assert_accurate(y, torch_F.silu(z + residual.double()))


# --- transforms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("in_dims", [(0, None, None, 0), (0, 0, 0, 0), (None, 0, None, 1),
                                     (None, None, None, 2), (1, None, 0, None)])  # fmt: skip
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_vmap(in_dims: tuple[int | None, ...], activation: str | None) -> None:
    tensors = []
    for size, dim in zip(((3, 4, 6, 5), (2, 4, 3, 2), (2,), (3, 2, 4, 4)), in_dims, strict=True):
        full = list(size)
        if dim is not None:
            full.insert(dim, 5)
        tensors.append(torch.randn(full, dtype=torch.float64))

    def op(x: Tensor, w: Tensor, b: Tensor, residual: Tensor) -> Tensor:
        return F.conv2d(x, w, b, activation=activation, residual=residual)

    out = torch.func.vmap(op, in_dims)(*tensors)
    for i in range(5):
        one = [t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)]
        assert_accurate(out[i], op(*one))


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_compile(activation: str | None) -> None:
    torch._dynamo.reset()

    def loss(x: Tensor, w: Tensor, residual: Tensor) -> Tensor:
        y = F.conv2d(x, w, padding=1, activation=activation, residual=residual)
        return y.square().sum()

    sizes = ((2, 3, 6, 6), (4, 3, 3, 3), (2, 4, 6, 6))
    leaves = [torch.randn(s, requires_grad=True) for s in sizes]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    for gradient, value in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(gradient, value)


def test_autocast(device: str) -> None:
    """Cast as the other operands are."""
    x, w, residual = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(2, 4, 6, 6)
    with torch.autocast(device, torch.bfloat16):
        y = F.conv2d(x, w, residual=residual)
    assert y.dtype == torch.bfloat16
    rounded = [t.bfloat16().double() for t in (x, w, residual)]
    assert_accurate(y, torch_F.conv2d(*rounded[:2]) + rounded[2])


# --- errors --------------------------------------------------------------------------------------

X, W = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3)


@pytest.mark.parametrize("size", [(1, 4, 4, 3), (2, 1, 4, 3), (2, 4, 1, 1), (2, 4, 4, 2),
                                  (2, 3, 6, 5), (4, 4, 3), (4,), (1, 2, 4, 4, 3)])  # fmt: skip
@pytest.mark.parametrize("requires_grad", [False, True])
def test_wrong_size(size: tuple[int, ...], requires_grad: bool) -> None:
    """Nothing is broadcast; the message has the size."""
    x, w = (t.to(torch.get_default_device()) for t in (X, W))
    residual = torch.randn(size, requires_grad=requires_grad)
    with pytest.raises(RuntimeError, match=f"residual.*{list(size)}".replace("[", r"\[")):
        F.conv2d(x, w, residual=residual)
    with pytest.raises(RuntimeError, match="residual"):
        F.conv2d(x.to("meta"), w.to("meta"), residual=residual.to("meta"))


def test_unbatched() -> None:
    x, w = (t.to(torch.get_default_device()) for t in (X, W))
    residual = torch.randn(4, 4, 3)
    for leaf in (residual, residual.clone().requires_grad_()):
        y = F.conv2d(x[0], w, residual=leaf)
        torch.testing.assert_close(y, F.conv2d(x[0], w) + leaf)
    with pytest.raises(RuntimeError, match="3D residual"):
        F.conv2d(x[0], w, residual=residual[None])


def test_wrong_types() -> None:
    x, w = (t.to(torch.get_default_device()) for t in (X, W))
    residual = torch.randn(2, 4, 4, 3)
    with pytest.raises(RuntimeError, match="on meta"):
        F.conv2d(x, w, residual=residual.to("meta"))
    with pytest.raises(RuntimeError, match=r"Input type \(Float\) and residual type \(Double\)"):
        F.conv2d(x, w, residual=residual.double())
    with pytest.raises(TypeError, match="'residual' must be Tensor"):
        F.conv2d(x, w, residual=1.0)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="complex64"):
        F.conv2d(x, w, residual=residual.to(torch.complex64))
    with pytest.raises(RuntimeError, match="residual not implemented"):
        F.conv2d(x.int(), w.int(), residual=residual.int())
    with pytest.raises(TypeError):
        F.conv2d(x, w, None, 1, 0, 1, 1, residual)  # type: ignore[misc]


@cpu_only
def test_explain_takes_a_residual() -> None:
    residual = torch.randn(2, 4, 4, 3)
    text = str(torchconv.explain(X, W, residual=residual, peak=1, bandwidth=1))
    assert text == str(torchconv.explain(X, W, peak=1, bandwidth=1))
