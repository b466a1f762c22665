"""Batch normalisation, with a sum and an activation behind it: functional, layer, operators.

Numbers are compared with float64, what is a matter of rules (running statistics, strides, gradients
at a bound or a NaN, errors) with PyTorch's BatchNorm2d followed by a sum and an activation.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchconv
import torchconv.functional as F
from conftest import (
    FLOATS,
    LAYOUTS,
    assert_accurate,
    assert_fakes_equal_real,
    assert_same,
    in_layout,
    relative_error,
    threads,
)
from dispatch_log import DispatchLog

OPS = torch.ops.torchconv
OPERATORS = ("batch_norm_training", "batch_norm_inference", "batch_norm_backward")
FORMATS = ("contiguous", "channels_last")
ACTIVATIONS = (None, "relu", "relu6", "silu", "hardswish")
# What the kernels have where nothing is added before them.
CURVES = {"silu": nn.functional.silu, "hardswish": nn.functional.hardswish}
HALVES = (torch.bfloat16, torch.float16)
# Of one pixel, less than a vector, whole vectors, several blocks; one channel; one image; strips of
# channels, and blocks of many vectors.
SIZES = (
    (2, 1, 1, 1),
    (1, 3, 1, 2),
    (5, 2, 3, 1),
    (4, 37, 1, 1),
    (3, 16, 4, 4),
    (2, 19, 7, 7),
    (1, 5, 13, 17),
    (4, 3, 40, 37),
    (3, 40, 16, 16),
    (2, 150, 5, 7),
    (3, 150, 16, 16),
)
EPS = 1e-5

on_formats = pytest.mark.parametrize("layout", FORMATS)
on_dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
on_activations = pytest.mark.parametrize("activation", ACTIVATIONS)
on_training = pytest.mark.parametrize("training", (True, False), ids=("training", "given"))


def names_of(log: DispatchLog) -> list[str]:
    return [name.removeprefix("torchconv::") for name in log.names if "torchconv" in name]


def activate(z: Tensor, activation: str | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Its derivative is taken where z is after rounding to dtype, as of a z that was stored."""
    if activation is None:
        return z
    if activation in CURVES:
        return CURVES[activation](z)
    rounded = z.to(dtype).double() - z
    z = z + rounded.detach()
    y = torch.relu(z) if activation == "relu" else nn.functional.relu6(z)
    return y - torch.where((y > 0) & (y < (6 if activation == "relu6" else torch.inf)), rounded, 0)


def truth(
    x: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """By the definition, in float64."""
    mean, var = statistics or (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
    z = (x - mean[:, None, None]) / (var[:, None, None] + EPS).sqrt()
    if weight is not None:
        z = z * weight[:, None, None]
    if bias is not None:
        z = z + bias[:, None, None]
    return activate(z if residual is None else z + residual, activation, dtype)


class Problem:
    """Tensors of one call, and the same in float64, all of them leaves."""

    def __init__(
        self, size: tuple[int, ...], dtype: torch.dtype, layout: str, *, residual: bool = False
    ) -> None:
        channels = size[1]
        self.dtype = dtype
        x = torch.randn(size) * 2 + torch.randn(channels)[:, None, None]
        self.x = in_layout(x.to(dtype), layout).requires_grad_()
        self.weight = (torch.randn(channels) + 3).to(dtype).requires_grad_()
        self.bias = (torch.randn(channels) + 1).to(dtype).requires_grad_()
        self.mean, self.var = torch.randn(channels).to(dtype), torch.rand(channels).to(dtype) + 1
        added = in_layout(torch.randn(size).to(dtype), layout).requires_grad_()
        self.residual = added if residual else None
        self.dy = in_layout(torch.randn(size).to(dtype), layout)

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]

    def check(self, training: bool, activation: str | None) -> None:
        """Output and gradients against float64."""
        y = F.batch_norm(
            *(self.x, self.mean.clone(), self.var.clone(), self.weight, self.bias, training),
            activation=activation,
            residual=self.residual,
        )
        wide = [t.detach().double().requires_grad_() for t in self.leaves()]
        given = None if training else (self.mean.double(), self.var.double())
        residual = wide[3] if self.residual is not None else None
        expected = truth(*(wide[0], given, wide[1], wide[2], activation, residual, self.dtype))
        assert y.dtype == self.dtype
        assert y.stride() == nn.functional.batch_norm(self.x, self.mean, self.var).stride()
        assert_accurate(y, expected)
        grads = torch.autograd.grad(y, self.leaves(), self.dy)
        truths = torch.autograd.grad(expected, wide, self.dy.double())
        for leaf, grad, true in zip(self.leaves(), grads, truths, strict=True):
            assert grad.dtype == leaf.dtype
            # Few numbers may cancel in the sums; then what is lost belongs to what was added.
            usual = float(self.dy.double().norm()) * 3
            if self.dtype in HALVES:
                assert relative_error(grad, true, usual) < torch.finfo(self.dtype).eps
            else:
                assert_accurate(grad, true, usual=usual)


# --- accuracy ------------------------------------------------------------------------------------


@on_training
@on_activations
@on_formats
@on_dtypes
def test_against_float64(
    dtype: torch.dtype, layout: str, activation: str | None, training: bool
) -> None:
    for size, residual in itertools.product(SIZES, (False, True)):
        if residual and activation in CURVES and dtype in HALVES:
            continue  # PyTorch's, which rounds the sum
        Problem(size, dtype, layout, residual=residual).check(training, activation)


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - set(FORMATS)))
def test_other_layouts(layout: str) -> None:
    for training in (True, False):
        Problem((3, 6, 5, 9), torch.float32, layout, residual=True).check(training, "relu")


def test_layouts_may_differ() -> None:
    problem = Problem((3, 20, 5, 9), torch.float32, "contiguous", residual=True)
    problem.residual = in_layout(problem.leaves()[3], "channels_last").requires_grad_()
    problem.dy = in_layout(problem.dy, "transposed")
    problem.check(True, "relu6")


def set_sampled(x: Tensor, count: int, value: float) -> None:
    """Sets the first `count` of the eight elements of a channel that its shift is taken from, which
    csrc/cpu/batch_norm.cpp spreads over the images."""
    batch, _, height, width = x.shape
    k = torch.arange(count)
    at = (55 * k + (k + 1) * 34 % 55) * (batch * height * width) // (8 * 55)
    plane = height * width
    x[at // plane, :, at % plane // width, at % plane % width] = value


@on_formats
@on_dtypes
def test_large_mean(dtype: torch.dtype, layout: str) -> None:
    """A mean of ten thousand deviations, of which a sampled element far from it tells nothing."""
    for sampled in (None, -7.0):
        x = torch.randn(4, 5, 30, 31).double() + 1e4
        if sampled is not None:
            set_sampled(x, 1, sampled)
        x = in_layout(x.to(dtype), layout)
        mean, var = torch.zeros(5).to(dtype), torch.ones(5).to(dtype)
        y = F.batch_norm(x, mean, var, training=True, momentum=1.0)
        wide = x.double()
        truths = (
            truth(wide, None, None, None, None, None),
            wide.mean((0, 2, 3)),
            wide.var((0, 2, 3)),
        )
        for got, true in zip((y, mean, var), truths, strict=True):
            if dtype == torch.float64:  # the truth's own error
                assert relative_error(got, true) < 1e-11
            else:
                assert_accurate(got, true)


@on_formats
def test_two_values(layout: str) -> None:
    """Sums of few distinct numbers round the same way again and again, which shows where the
    eight elements that the shift is taken from are three deviations off.
    """
    batch, side = 16, 64
    x = torch.where(torch.rand(batch, 20, side, side) < 0.5, 0.7, 1.3)
    set_sampled(x, 8, 1.0 + 3 * 0.3)
    x = in_layout(x, layout)
    y = F.batch_norm(x, None, None, training=True)
    assert relative_error(y, truth(x.double(), None, None, None, None, None)) < 2e-7


@on_formats
@pytest.mark.parametrize("scale", (1e19, 1e-20))
def test_squares_past_float32(scale: float, layout: str) -> None:
    """Too large or too small for it, as one of them would be for the sum of a few."""
    x = in_layout(torch.randn(4, 20, 9, 9) * scale, layout)
    y = F.batch_norm(x, None, None, training=True, eps=1e-45)
    wide = x.double()
    mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
    assert_accurate(y, (wide - mean[:, None, None]) / (var + 1e-45).sqrt()[:, None, None])


@on_formats
def test_outputs_past_the_caches(layout: str) -> None:
    """Of sixteen megabytes and more, which are streamed."""
    Problem((2, 64, 184, 184), torch.float32, layout).check(True, "relu")


@on_dtypes
@on_formats
def test_far_in_memory(dtype: torch.dtype, layout: str) -> None:
    """So large that what a pass reads is in no near cache: several vectors of channels at a time,
    and all kinds of rests; of many channels, pixel by pixel."""
    for channels, residual in ((239, False), (239, True), (600, True)):
        height = (8 << 20) // (dtype.itemsize * channels * 61) + 1
        Problem((1, channels, height, 61), dtype, layout, residual=residual).check(True, "relu6")


def test_constant_channels() -> None:
    for layout, value in itertools.product(FORMATS, (0.0, 0.1, 3e4)):
        x = in_layout(torch.full((3, 5, 7, 9), value), layout)
        y = F.batch_norm(x, None, None, None, torch.arange(5.0), training=True)
        assert_accurate(y, torch.arange(5.0).view(5, 1, 1).expand(3, 5, 7, 9))


# --- as PyTorch ----------------------------------------------------------------------------------


def both_layers(size: tuple[int, ...], **arguments: Any) -> tuple[nn.Module, nn.Module]:
    theirs = nn.BatchNorm2d(size[1], **arguments)
    if theirs.affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    return torchconv.convert(copy.deepcopy(theirs)), theirs


@pytest.mark.parametrize(
    "arguments",
    (
        {},
        {"momentum": 0.7, "eps": 0.1},
        {"momentum": None},
        {"momentum": 1},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ),
    ids=str,
)
@on_formats
@on_dtypes
def test_layer_equals_pytorchs(dtype: torch.dtype, layout: str, arguments: dict[str, Any]) -> None:
    """Some steps in training mode, then one in eval mode: outputs and the whole state."""
    size = (4, 6, 9, 8)
    ours, theirs = (layer.to(dtype) for layer in both_layers(size, **arguments))
    assert type(ours) is torchconv.nn.BatchNorm2d
    for step in range(4):
        for layer in (ours, theirs):
            layer.train(step < 3)
        x = in_layout(torch.randn(size).to(dtype) + step, layout).requires_grad_()
        with DispatchLog() as log:  # which is a mode: what it watches is PyTorch's
            ours_watched = copy.deepcopy(ours)(x)
        assert not names_of(log)
        y, expected = ours(x), theirs(x)
        tolerance = 16 * torch.finfo(dtype).eps
        for got in (y, ours_watched):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
            assert got.stride() == expected.stride()
        state, theirs_state = ours.state_dict(), theirs.state_dict()
        assert state.keys() == theirs_state.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, theirs_state[name], rtol=tolerance, atol=tolerance)
        dy = torch.randn_like(y)
        (dx,), (expected_dx,) = (torch.autograd.grad(t, x, dy) for t in (y, expected))
        assert dx.stride() == expected_dx.stride()
        if dtype not in HALVES:  # where PyTorch itself rounds what lies between
            torch.testing.assert_close(dx, expected_dx, rtol=1e-4, atol=1e-5)


@on_formats
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_parameters_of_float32(dtype: torch.dtype, layout: str) -> None:
    """Beside an input of a smaller type, as under autocast."""
    ours, theirs = both_layers((4, 6, 9, 8))
    x = in_layout(torch.randn(4, 6, 9, 8).to(dtype), layout).requires_grad_()
    for training in (True, False):
        y, expected = (layer.train(training)(x) for layer in (ours, theirs))
        assert y.dtype == expected.dtype == dtype
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        (dx, dw, db), theirs_grads = (
            torch.autograd.grad(out, (x, *layer.parameters()), dy)
            for out, layer in ((y, ours), (expected, theirs))
        )
        torch.testing.assert_close(dx, theirs_grads[0], rtol=2e-2, atol=2e-2)
        assert dw.dtype == db.dtype == torch.float32
        torch.testing.assert_close(dw, theirs_grads[1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(db, theirs_grads[2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@on_training
@on_formats
@on_dtypes
@pytest.mark.parametrize("activation", ("relu", "relu6"))
def test_gradient_at_a_bound(
    activation: str, dtype: torch.dtype, layout: str, training: bool
) -> None:
    """Zero at and past the bounds, also of a number that only rounding takes there, and whatever
    the incoming gradient; passed on at a NaN."""
    steps = torch.tensor([-1, 0, 1e-8, 3e-8, 1e-5, 1, 5.97, 5.98, 5.99, 5.999, 6 - 1e-6, 6, 7])
    x = steps.view(1, 1, 1, -1).repeat(2, 2, 1, 1).to(dtype)
    if not training:
        x[0, 0, 0, 5] = float("nan")
    x = in_layout(x, layout).requires_grad_()
    mean, var = torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)
    dy = torch.full_like(x, float("inf")) if not training else torch.randn_like(x)
    arguments = (None, None, training, 0.1, 1e-12)
    y = F.batch_norm(x, mean, var, *arguments, activation=activation)
    (dx,) = torch.autograd.grad(y, x, dy)
    stored = F.batch_norm(x.detach(), mean, var, *arguments)
    constant = stored <= 0 if activation == "relu" else (stored <= 0) | (stored >= 6)
    if training:
        z = F.batch_norm(x, mean, var, *arguments)
        (expected,) = torch.autograd.grad(z, x, torch.where(constant, 0, dy))
    else:
        expected = torch.where(constant, 0, dy * torch.ones(()))
    assert_same(dx, expected)


def test_not_a_number_stays_in_its_channel() -> None:
    for layout, training in itertools.product(FORMATS, (True, False)):
        x = in_layout(torch.randn(2, 20, 5, 5), layout)
        x[0, 3, 2, 2], x[1, 7, 0, 0] = float("nan"), float("inf")
        mean, var = torch.zeros(20), torch.ones(20)
        theirs_mean, theirs_var = mean.clone(), var.clone()
        y = F.batch_norm(x, mean, var, training=training, activation="relu6")
        expected = nn.functional.relu6(
            nn.functional.batch_norm(x, theirs_mean, theirs_var, training=training)
        )
        torch.testing.assert_close(y, expected, equal_nan=True)
        torch.testing.assert_close(mean, theirs_mean, equal_nan=True)
        torch.testing.assert_close(var, theirs_var, equal_nan=True)


# --- derivatives ---------------------------------------------------------------------------------


@on_training
@on_activations
@on_formats
def test_gradcheck(layout: str, activation: str | None, training: bool) -> None:
    x = in_layout(torch.randn(2, 3, 2, 3).double(), layout).requires_grad_()
    weight, bias = (torch.randn(3).double() + 2).requires_grad_(), torch.randn(3).double()
    residual = in_layout(torch.randn(2, 3, 2, 3).double(), layout).requires_grad_()
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(
            x, mean.clone(), var.clone(), weight, bias, training, activation=activation
        )

    def added(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return F.batch_norm(
            *(x, mean.clone(), var.clone(), weight, bias, training),
            activation=activation,
            residual=residual,
        )

    def shifted(x: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(
            x, mean.clone(), var.clone(), None, bias, training, activation=activation
        )

    inputs = (x, weight, bias.requires_grad_())
    torch.autograd.gradcheck(plain, inputs)
    torch.autograd.gradgradcheck(plain, inputs)
    torch.autograd.gradgradcheck(shifted, (x, bias))
    torch.autograd.gradcheck(added, (*inputs, residual))
    torch.autograd.gradgradcheck(added, (*inputs, residual))


@on_activations
def test_gradients_of_some(activation: str | None) -> None:
    """Whichever of the inputs need one, with and without parameters."""
    for needs in itertools.product((False, True), repeat=4):
        if not any(needs):
            continue
        problem = Problem((2, 5, 4, 3), torch.float64, "contiguous", residual=True)
        for leaf, need in zip(problem.leaves(), needs, strict=True):
            leaf.requires_grad_(need)
        for affine, training in itertools.product((True, False), repeat=2):
            tensors = [problem.x, problem.weight, problem.bias, problem.residual]
            weight, bias = tensors[1:3] if affine else (None, None)
            wanted = [
                t
                for t, need, used in zip(tensors, needs, (True, affine, affine, True), strict=True)
                if need and used
            ]
            if not wanted:
                continue
            y = F.batch_norm(
                *(problem.x, problem.mean.clone(), problem.var.clone(), weight, bias, training),
                activation=activation,
                residual=problem.residual,
            )
            given = None if training else (problem.mean, problem.var)
            expected = truth(problem.x, given, weight, bias, activation, problem.residual)
            grads, truths = (torch.autograd.grad(t, wanted, problem.dy) for t in (y, expected))
            for grad, true in zip(grads, truths, strict=True):
                torch.testing.assert_close(grad, true)


def test_what_backward_keeps() -> None:
    """The input and one number or two for each channel; the output only if a residual is in it."""
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    for activation, residual, large in (
        (None, None, 1),
        ("relu", None, 1),
        ("silu", None, 1),
        ("hardswish", None, 1),
        (None, x, 1),
        ("relu", x, 2),
    ):
        kept: list[Tensor] = []

        def keep(t: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            F.batch_norm(x, None, None, training=True, activation=activation, residual=residual)
        assert sum(t.numel() > 3 for t in kept) == large


def test_statistics_changed_before_backward() -> None:
    """By a step in training mode, after the forward in eval mode: it counts what was used there."""
    layer = torchconv.nn.BatchNorm2d(3, activation="relu")
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(layer.eval()(x).sum(), x)
    y = layer(x)
    with torch.no_grad():
        layer.train()(5 * x + 1)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, expected)


def test_the_operator_changes_versions() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    OPS.batch_norm_training(torch.randn(2, 3, 5, 5), None, None, None, mean, var, 0.1, EPS, "none")
    assert mean._version == var._version == 1


@pytest.mark.parametrize("size", [(4, 1, 6, 7), (4, 5, 1, 1), (4, 1, 1, 7)])
@pytest.mark.parametrize("training", [True, False])
def test_strides_of_what_is_dense_in_both_layouts(size: tuple[int, ...], training: bool) -> None:
    x = torch.randn(size).contiguous(memory_format=torch.channels_last)
    mean, var = torch.zeros(size[1]), torch.ones(size[1])
    y = F.batch_norm(x, mean.clone(), var.clone(), training=training)
    expected = nn.functional.batch_norm(x, mean, var, training=training)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)


@on_training
def test_bias_may_change_before_backward(training: bool) -> None:
    """As in PyTorch, where no activation needs it again."""
    for residual in (None, torch.randn(2, 3, 5, 5)):
        layer = torchconv.nn.BatchNorm2d(3).train(training)
        x = torch.randn(2, 3, 5, 5, requires_grad=True)
        dy = torch.randn(2, 3, 5, 5)
        expected = torch.autograd.grad(layer(x, residual), (x, *layer.parameters()), dy)
        y = layer(x, residual)
        with torch.no_grad():
            layer.bias.add_(1)
        assert_same(
            torch.cat([g.flatten() for g in torch.autograd.grad(y, (x, *layer.parameters()), dy)]),
            torch.cat([g.flatten() for g in expected]),
        )
    layer.activation = "relu"
    y = layer(x)
    with torch.no_grad():
        layer.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- determinism ---------------------------------------------------------------------------------


@on_formats
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_threads_and_repetition(dtype: torch.dtype, layout: str) -> None:
    for size in ((5, 19, 30, 31), (3, 130, 14, 14), (64, 7, 6, 5), (8, 180, 56, 56)):
        problem = Problem(size, dtype, layout, residual=True)
        results = []
        for count in (1, 1, 2, 3):
            with threads(count):
                mean, var = problem.mean.clone(), problem.var.clone()
                y = F.batch_norm(
                    *(problem.x, mean, var, problem.weight, problem.bias, True),
                    activation="relu",
                    residual=problem.residual,
                )
                grads = torch.autograd.grad(y, problem.leaves(), problem.dy)
                results.append([y.detach(), mean, var, *grads])
        for result in results[1:]:
            for got, expected in zip(result, results[0], strict=True):
                assert torch.equal(got, expected)


# --- what is PyTorch's ---------------------------------------------------------------------------


def test_errors_equal_pytorchs() -> None:
    x, three, four = torch.randn(2, 3, 4, 4), torch.ones(3), torch.ones(4)
    calls: tuple[tuple[Any, ...], ...] = (
        (torch.randn(1, 3, 1, 1), three, three, None, None, True),
        (torch.randn(3), None, None, None, None, True),
        (x, four, four),
        (x, three, four),
        (x, three, three, four),
        (x, three, three, three, four, True),
        (x, None, None),
        (x, three, None),
        (x, three.double(), three.double()),
        (x.long(), three, three),
        (x, three, three, None, None, True, 0.1, 0.0),
        (x, three, three, None, None, False, 0.1, -1.0),
        (x, three, three, None, None, True, None),
    )
    for arguments in calls:
        try:
            nn.functional.batch_norm(*arguments)
        except Exception as error:
            with pytest.raises(type(error)) as raised:
                F.batch_norm(*arguments)
            assert str(raised.value) == str(error)
        else:
            torch.testing.assert_close(
                F.batch_norm(*arguments), nn.functional.batch_norm(*arguments)
            )
    with pytest.raises(ValueError, match="activation must be None or one of"):
        F.batch_norm(x, three, three, activation="swish")
    with pytest.raises(RuntimeError, match="The size of tensor"):
        F.batch_norm(x, three, three, residual=torch.ones(5))
    with pytest.raises(ValueError, match="expected 4D input"):
        torchconv.nn.BatchNorm2d(3)(torch.randn(2, 3))
    with pytest.raises(ValueError, match="activation must be None or one of"):
        torchconv.nn.BatchNorm2d(3, activation="swish")


def test_the_rest_runs_in_pytorch() -> None:
    """Sums that broadcast, other activations, numbers of dimensions, empty images, transforms."""
    x, mean, var = torch.randn(2, 3, 4, 4), torch.randn(3), torch.rand(3) + 1
    z = nn.functional.batch_norm(x, mean, var)
    added = F.batch_norm(x, mean, var, residual=mean[:, None, None], activation="relu")
    torch.testing.assert_close(added, torch.relu(z + mean[:, None, None]))
    torch.testing.assert_close(F.batch_norm(x, mean, var, activation="gelu"), nn.functional.gelu(z))
    for size in ((4, 3), (4, 3, 5), (4, 3, 2, 2, 2), (0, 3, 4, 4), (2, 3, 0, 4)):
        other = torch.randn(size)
        got = F.batch_norm(other, mean, var, training=size[0] == 4, activation="relu")
        expected = nn.functional.batch_norm(other, mean, var, training=size[0] == 4)
        torch.testing.assert_close(got, torch.relu(expected))

    def call(t: Tensor) -> Tensor:
        return F.batch_norm(t, None, None, training=True, activation="relu")

    def theirs(t: Tensor) -> Tensor:
        return torch.relu(nn.functional.batch_norm(t, None, None, training=True))

    images = torch.randn(5, 2, 3, 4, 4)
    torch.testing.assert_close(torch.vmap(call)(images), torch.vmap(theirs)(images))
    for ours, expected in zip(
        torch.func.jvp(call, (x,), (z,)), torch.func.jvp(theirs, (x,), (z,)), strict=True
    ):
        torch.testing.assert_close(ours, expected)
    traced = torch.jit.trace(call, x)
    torch.testing.assert_close(traced(x), theirs(x))
    with pytest.raises(NotImplementedError):
        OPS.batch_norm_inference(x.to_sparse(), None, None, None, mean, var, EPS, "none")


def test_autocast() -> None:
    """As PyTorch's, which runs in its input's type."""
    ours, theirs = both_layers((2, 3, 4, 4))
    x = torch.randn(2, 3, 4, 4)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = ours(x.to(dtype)), theirs(x.to(dtype))
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected)


def test_compile() -> None:
    """Traced, it is PyTorch's: the compiler has its own passes for what follows."""
    layer = torchconv.nn.BatchNorm2d(3, activation="relu")
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, residual = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(2, 3, 5, 5)
    y, expected = compiled(x, residual), other(x, residual)
    torch.testing.assert_close(y, expected)
    (dx,), (expected_dx,) = (torch.autograd.grad(t.square().sum(), x) for t in (y, expected))
    torch.testing.assert_close(dx, expected_dx)
    torch.testing.assert_close(layer.running_var, other.running_var)
    assert layer.num_batches_tracked == 1


def test_no_grad_and_inference_mode() -> None:
    problem = Problem((2, 5, 6, 7), torch.float32, "contiguous")

    def run(training: bool) -> Tensor:
        mean, var = problem.mean.clone(), problem.var.clone()
        return F.batch_norm(
            *(problem.x, mean, var, problem.weight, problem.bias, training), activation="relu"
        )

    for training in (True, False):
        expected = run(training)
        assert expected.requires_grad
        with torch.no_grad():
            assert torch.equal(run(training), expected)
        with torch.inference_mode():
            assert torch.equal(run(training), expected)


# --- layers --------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3),
        nn.BatchNorm2d(12, momentum=None),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


@on_formats
def test_converted_model_trains_alike(layout: str) -> None:
    theirs = network()
    ours = torchconv.convert(copy.deepcopy(theirs))
    assert type(ours[1]) is torchconv.nn.BatchNorm2d
    x, target = in_layout(torch.randn(6, 3, 16, 15), layout), torch.randint(4, (6,))
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(*(torch.stack(each) for each in losses))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-3, atol=1e-4)
    assert not torchconv.restore(ours)._modules.keys() - theirs._modules.keys()
    assert [type(m) for m in ours] == [type(m) for m in theirs]


def test_layer_with_activation_and_residual() -> None:
    layer = torchconv.nn.BatchNorm2d(3, 1e-3, 0.2, activation="relu")
    theirs = nn.BatchNorm2d(3, 1e-3, 0.2)
    assert repr(layer) == repr(theirs)[:-1] + ", activation=relu)"
    assert layer.state_dict().keys() == theirs.state_dict().keys()
    x, residual = torch.randn(2, 2, 3, 4, 5)
    torch.testing.assert_close(layer(x, residual), torch.relu(theirs(x) + residual))
    assert copy.deepcopy(layer).activation == "relu"


def test_other_classes_are_left_alone() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    layers = (Own(3), nn.BatchNorm1d(3), nn.LazyBatchNorm2d(), nn.SyncBatchNorm(3))
    for layer in layers:
        cls = type(layer)
        assert type(torchconv.convert(layer)) is cls


def test_symbolic_trace() -> None:
    """One node, which counts batches as torch.nn's does."""
    model = torchconv.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    traced = torch.fx.symbolic_trace(model)
    assert [n.op for n in traced.graph.nodes if n.target == "1"] == ["call_module"]
    x = torch.randn(2, 3, 4, 4)
    for _ in range(2):
        traced(x)
    assert model[1].num_batches_tracked == 2


# --- the operators -------------------------------------------------------------------------------


def samples(
    name: str, layout: str, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[Any, ...]]:
    """An operator's arguments; every tensor that can have a gradient asks for one."""
    for activation, residual, affine in itertools.product(
        ("none", "relu", "relu6", *CURVES), (False, True), (False, True)
    ):
        if residual and activation in CURVES:
            continue
        problem = Problem((2, 3, 4, 5), dtype, layout, residual=residual)
        x, added, mean, var = problem.x, problem.residual, problem.mean, problem.var
        weight, bias = (problem.weight, problem.bias) if affine else (None, None)
        if name == "batch_norm_training":
            yield (x, weight, bias, added, mean, var, 0.1, EPS, activation)
            yield (x, weight, bias, added, None, None, 0.1, EPS, activation)
        elif name == "batch_norm_inference":
            yield (x, weight, bias, added, mean, var, EPS, activation)
        else:
            detached = [None if t is None else t.detach() for t in (x, weight, bias, added)]
            y, mean, invstd = OPS.batch_norm_training(*detached, None, None, 0.1, EPS, activation)
            saved = y if residual and activation != "none" else None
            dy = problem.dy.requires_grad_()
            for training, mask in (
                (True, [True, residual, affine, affine]),
                (False, [False, residual, False, affine]),
            ):
                yield (dy, x, saved, weight, bias, mean, invstd, training, activation, mask)


@on_formats
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, layout: str) -> None:
    """Schema, autograd registration, fake tensors, and compilation with dynamic shapes."""
    pytest.importorskip("expecttest")  # which opcheck imports
    for arguments in samples(name, layout, torch.float32):
        torch.library.opcheck(getattr(OPS, name).default, arguments)


@on_formats
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_fake_equals_real(name: str, dtype: torch.dtype, layout: str) -> None:
    """Size, dtype and exact strides of every output, from fake and from meta tensors."""
    for arguments in samples(name, layout, dtype):
        assert_fakes_equal_real(getattr(OPS, name), arguments)


def test_operators_check_their_arguments() -> None:
    x, three = torch.randn(2, 3, 4, 4), torch.ones(3)
    plain: tuple[Any, ...] = (x, None, None, None, three, three, EPS, "none")

    def changed(**by: Any) -> tuple[Any, ...]:
        names = ("input", "weight", "bias", "residual", "mean", "var", "eps", "activation")
        return tuple(by.get(name, value) for name, value in zip(names, plain, strict=True))

    for by, message in (
        ({"input": x[0]}, "expected 4D input"),
        ({"input": x[:0]}, "empty input"),
        ({"input": x.long()}, "not implemented for 'Long'"),
        ({"weight": torch.ones(4)}, "weight should be contiguous and contain 3 elements"),
        ({"bias": torch.ones(6)[::2]}, "bias should be contiguous"),
        ({"mean": three.double()}, "expected running_mean of the type of input"),
        ({"residual": x[:1]}, "expected residual of size"),
        ({"residual": x.double()}, "expected residual of the type"),
        ({"activation": "gelu"}, "takes no activation 'gelu'"),
        ({"activation": "silu", "residual": x}, "takes no activation 'silu' after a sum"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.batch_norm_inference(*changed(**by))
    with pytest.raises(RuntimeError, match="more than 1 value per channel"):
        OPS.batch_norm_training(x[:1, :, :1, :1], *(None,) * 5, 0.1, EPS, "none")
    with pytest.raises(RuntimeError, match="numbers of type Double"):
        OPS.batch_norm_backward(
            x, x, None, None, None, three, three, True, "none", [True, False, False, False]
        )
