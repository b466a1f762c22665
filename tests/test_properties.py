"""Random configurations of conv2d and the poolings, drawn by hypothesis, against PyTorch.

A configuration is sizes, arguments, layouts and a dtype; hypothesis looks for the smallest one that
fails. Both must agree on what is refused as well as on every value and gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

import torchconv.functional as F
from conftest import FLOATS, LAYOUTS, NORM_BOUND, assert_accurate, everywhere, in_layout
from oracle import torch_F

pytestmark = everywhere

bounded = settings(max_examples=250, suppress_health_check=list(HealthCheck))

sizes = st.integers(1, 9)
kernels = st.tuples(st.integers(1, 5), st.integers(1, 5))
strides = st.tuples(st.integers(1, 4), st.integers(1, 4))
dilations = st.tuples(st.integers(1, 3), st.integers(1, 3))
layouts = st.sampled_from(sorted(LAYOUTS))
dtypes = st.sampled_from(FLOATS)
seeds = st.integers(0, 2**31)


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.integers(1, 4))
    per_group = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 16, 33]))
    wide = draw(st.booleans())  # a whole vector of outputs and a ragged rest
    return {
        "x": (draw(st.integers(0, 3)), groups * per_group, draw(sizes), draw(sizes) + 30 * wide),
        "w": (groups * draw(st.sampled_from([1, 2, 3, 5, 16, 35])), per_group, *draw(kernels)),
        "bias": draw(st.booleans()),
        "stride": draw(strides),
        "sides": draw(st.tuples(*[st.integers(0, 4)] * 4)),
        "dilation": draw(dilations),
        "groups": groups,
        "flip": draw(st.booleans()),
        "activation": draw(st.sampled_from([None, None, "relu", "sigmoid", "hardswish", "gelu"])),
        "dtype": draw(dtypes),
        "layouts": (draw(layouts), draw(layouts), draw(layouts)),
        "unbatched": draw(st.booleans()),
        "seed": draw(seeds),
    }


G = {
    "relu": torch_F.relu,
    "sigmoid": torch.sigmoid,
    "hardswish": torch_F.hardswish,
    "gelu": torch_F.gelu,
    None: lambda z: z,
}


def truth_of(x: Tensor, w: Tensor, b: Tensor | None, c: dict[str, Any]) -> Tensor:
    kernel = w.flip(2, 3) if c["flip"] else w
    padded = torch_F.pad(x, c["sides"])
    arguments = (c["stride"], 0, c["dilation"], c["groups"])
    return G[c["activation"]](torch_F.conv2d(padded, kernel, b, *arguments))


@bounded
@given(convolutions())
def test_conv2d(c: dict[str, Any]) -> None:
    torch.manual_seed(c["seed"])
    dtype = c["dtype"]
    if c["activation"] == "hardswish" and dtype not in NORM_BOUND:
        return  # its derivative jumps at -3 and 3, and a rounded z may lie on the other side
    x, w = torch.randn(c["x"]).to(dtype), torch.randn(c["w"]).to(dtype)
    x, w = in_layout(x, c["layouts"][0]), in_layout(w, c["layouts"][1])
    b = torch.randn(c["w"][0]).to(dtype) if c["bias"] else None
    if c["unbatched"] and c["x"][0] > 0:
        x = x[0]
    leaves = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    pad = ([None] if b is None else []) + [c]

    def ours(*operands: Any) -> Tensor:
        return F.conv2d(
            *operands[:3],
            stride=c["stride"],
            padding=c["sides"],
            dilation=c["dilation"],
            groups=c["groups"],
            activation=c["activation"],
            flip_kernel=c["flip"],
        )

    try:
        truth = truth_of(*doubles, *pad)
    except RuntimeError:  # the kernel does not fit
        try:
            ours(*leaves, *pad)
        except RuntimeError:
            return
        raise AssertionError("PyTorch refuses it") from None
    z = ours(*leaves, *pad)
    assert z.dtype == dtype
    assert_close(z, truth)
    dz = torch.randn(z.shape).to(dtype)
    dz = in_layout(dz, c["layouts"][2]) if dz.dim() == 4 else dz
    got = torch.autograd.grad(z, leaves, dz)
    expected = torch.autograd.grad(truth, doubles, dz.double())
    # With g'(z) = 1: what the rounding of a saturated sigmoid, kept for backward, is small against.
    linear = truth_of(*doubles, *pad[:-1], {**c, "activation": None})
    sizes = torch.autograd.grad(linear, doubles, dz.double())
    for gradient, value, size in zip(got, expected, sizes, strict=True):
        if dtype in NORM_BOUND or c["activation"] in (None, "relu"):
            assert_close(gradient, value, size)
        else:
            # Backward starts from a rounded y or z, as PyTorch's does.
            loose = 8 * torch.finfo(dtype).eps * float(value.abs().max() if value.numel() else 0)
            torch.testing.assert_close(gradient.double(), value, rtol=0.02, atol=loose + 1e-6)


def assert_close(out: Tensor, truth: Tensor, size: Tensor | None = None) -> None:
    """As assert_accurate; but a few numbers may all cancel, and then only an error against numbers
    of size one, or of a size that is given, means anything."""
    if out.dtype not in NORM_BOUND:
        assert_accurate(out, truth)
        return
    eps = torch.finfo(out.dtype).eps
    allowed = NORM_BOUND[out.dtype] * torch.linalg.vector_norm(truth)
    if truth.numel() <= 64:
        allowed += 64 * eps
    if size is not None:
        allowed += 4 * eps * torch.linalg.vector_norm(size)
    assert torch.linalg.vector_norm(out.double() - truth) <= allowed


@st.composite
def poolings(draw: st.DrawFn) -> dict[str, Any]:
    kernel = draw(kernels)
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3), (2, 2)]))
    padding = tuple(
        draw(st.integers(0, min(k // 2, (d * (k - 1) + 1) // 2)))
        for k, d in zip(kernel, dilation, strict=True)
    )
    wide = draw(st.booleans())
    channels = draw(st.sampled_from([1, 2, 5, 17, 33]))
    return {
        "x": (draw(st.integers(0, 3)), channels, draw(sizes), draw(sizes) + 40 * wide),
        "kernel_size": kernel,
        "stride": draw(st.one_of(st.none(), strides)),
        "padding": padding,
        "dilation": dilation,
        "ceil_mode": draw(st.booleans()),
        "dtype": draw(dtypes),
        "layouts": (draw(layouts), draw(layouts)),
        "special": draw(st.booleans()),
        "seed": draw(seeds),
    }


def has_empty_window(c: dict[str, Any]) -> bool:
    """Whether PyTorch would be asked for a dilated window without a valid element; never do."""
    for n, p, d in zip(c["x"][2:], c["padding"], c["dilation"], strict=True):
        if d > 1 and p > 0 and n < d:
            return True
    return False


@bounded
@given(poolings())
def test_selecting_pools(c: dict[str, Any]) -> None:
    if has_empty_window(c):
        return  # test_pool2d has the scalar reference for these
    torch.manual_seed(c["seed"])
    dtype = c["dtype"]
    x = torch.randint(-5, 6, c["x"]).to(dtype)
    if c["special"]:
        chance = torch.rand(x.shape)
        x[chance < 0.05], x[chance > 0.95] = float("nan"), float("-inf")
    x = in_layout(x, c["layouts"][0]).requires_grad_()
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    kwargs = {name: c[name] for name in names}
    for op, sign in ((F.max_pool2d, 1), (F.min_pool2d, -1)):
        try:
            theirs, places = torch_F.max_pool2d(sign * x, **kwargs, return_indices=True)
        except RuntimeError:
            try:
                op(x, **kwargs)
            except RuntimeError:
                continue
            raise AssertionError("PyTorch refuses it") from None
        theirs = sign * theirs
        y, indices = op(x, **kwargs, return_indices=True)
        plain = op(x, **kwargs)
        assert torch.equal(indices, places)
        for out in (y, plain):
            torch.testing.assert_close(out, theirs, rtol=0, atol=0, equal_nan=True)
        dy = torch.randint(-3, 4, y.shape).to(dtype)
        dy = in_layout(dy, c["layouts"][1])
        (expected,) = torch.autograd.grad(theirs, x, dy)
        for out in (y, plain):
            (dx,) = torch.autograd.grad(out, x, dy)
            assert torch.equal(dx, expected)


@bounded
@given(poolings(), st.booleans(), st.one_of(st.none(), st.integers(-9, 9)))
def test_average_pool(c: dict[str, Any], count_include_pad: bool, divisor: int | None) -> None:
    torch.manual_seed(c["seed"])
    x = in_layout(torch.randn(c["x"]).to(c["dtype"]), c["layouts"][0]).requires_grad_()
    double = x.detach().double().requires_grad_()
    names = ("kernel_size", "stride", "padding", "ceil_mode")
    kwargs = {name: c[name] for name in names}
    kwargs |= {"count_include_pad": count_include_pad, "divisor_override": divisor}
    try:
        truth = torch_F.avg_pool2d(double, **kwargs)
    except RuntimeError:
        try:
            F.avg_pool2d(x, **kwargs)
        except RuntimeError:
            return
        raise AssertionError("PyTorch refuses it") from None
    y = F.avg_pool2d(x, **kwargs)
    assert_close(y, truth)
    dy = in_layout(torch.randn(y.shape).to(c["dtype"]), c["layouts"][1])
    (dx,) = torch.autograd.grad(y, x, dy)
    (expected,) = torch.autograd.grad(truth, double, dy.double())
    assert_close(dx, expected)


@bounded
@given(poolings())
def test_pools_agree_with_one_another(c: dict[str, Any]) -> None:
    """min <= mean <= max, and min(x) = -max(-x), whatever the windows, where all are inside."""
    torch.manual_seed(c["seed"])
    x = in_layout(torch.randn(c["x"]).to(c["dtype"]), c["layouts"][0])
    k, s = c["kernel_size"], c["stride"]
    try:
        largest, smallest, mean = (
            F.max_pool2d(x, k, s),
            F.min_pool2d(x, k, s),
            F.avg_pool2d(x, k, s),
        )
    except RuntimeError:
        return
    assert torch.equal(smallest, -F.max_pool2d(-x, k, s))
    slack = 2 * torch.finfo(c["dtype"]).eps * x.abs().max() if x.numel() else 0
    assert (smallest <= mean + slack).all() and (mean <= largest + slack).all()


@bounded
@given(convolutions())
def test_convolution_is_linear(c: dict[str, Any]) -> None:
    """conv(a x + y) = a conv(x) + conv(y), exactly, in integers that float64 holds."""
    torch.manual_seed(c["seed"])
    x, y = (torch.randint(-9, 10, c["x"]).double() for _ in range(2))
    w = torch.randint(-9, 10, c["w"]).double()
    kwargs = {name: c[name] for name in ("stride", "dilation", "groups")}

    def conv(t: Tensor) -> Tensor:
        laid = in_layout(t, c["layouts"][0])
        return F.conv2d(laid, w, padding=c["sides"], **kwargs, flip_kernel=c["flip"])

    try:
        out = conv(3 * x + y)
    except RuntimeError:
        return
    assert torch.equal(out, 3 * conv(x) + conv(y))
