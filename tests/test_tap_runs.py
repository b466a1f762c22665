"""Convolutions of channels_last images with at most four channels, read where they lie
(csrc/cpu/tap_runs.cpp), against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchconv
import torchconv.functional as F
from conftest import assert_accurate, cpu_only, everywhere, in_layout
from oracle import torch_F
from test_determinism import threads

pytestmark = everywhere

# name: input size, weight size, further arguments of conv2d
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "first_layer": ((2, 3, 33, 64), (16, 3, 3, 3), {"stride": 2, "padding": 1}),
    "first_layer_odd": ((2, 3, 32, 65), (32, 3, 3, 3), {"stride": 2, "padding": 1}),
    "unpadded": ((2, 3, 31, 63), (24, 3, 3, 3), {"stride": 2}),
    "one_filter": ((1, 3, 9, 40), (1, 3, 3, 3), {"stride": 2, "padding": 1}),
    "many_filters": ((2, 3, 9, 11), (75, 3, 3, 3), {"padding": 1}),
    "two_channels": ((2, 2, 15, 31), (19, 2, 3, 2), {"stride": (1, 2), "padding": (0, 1)}),
    "four_channels": ((2, 4, 15, 31), (30, 4, 2, 3), {"stride": (3, 2), "padding": (1, 2)}),
    "wide_stride": ((2, 3, 35, 66), (32, 3, 3, 3), {"stride": 5, "padding": 1}),
    "one_tap": ((2, 3, 9, 40), (20, 3, 1, 1), {"stride": 2}),
    "one_column": ((2, 3, 9, 40), (12, 3, 5, 1), {"padding": (2, 0)}),
    "one_row": ((2, 3, 9, 10), (12, 3, 1, 5), {"padding": (0, 2)}),
    "dilated_rows": ((2, 3, 13, 11), (24, 3, 3, 3), {"padding": (4, 1), "dilation": (4, 1)}),
    "narrow": ((3, 3, 12, 2), (24, 3, 3, 3), {"stride": 2, "padding": 1}),
    "padding_only": ((1, 3, 3, 3), (24, 3, 2, 2), {"stride": 2, "padding": (3, 4)}),
    "few_filters": ((2, 3, 12, 40), (7, 3, 3, 3), {"padding": 1}),
}
on_cases = pytest.mark.parametrize("case", CASES)
on_activations = pytest.mark.parametrize("activation", [None, "relu6", "hardswish", "silu"])


def make(case: str) -> tuple[list[Tensor], dict[str, Any]]:
    x_size, w_size, kwargs = CASES[case]
    x = in_layout(torch.randn(x_size), "channels_last")
    return [x, torch.randn(w_size) / 5, torch.randn(w_size[0])], kwargs


def truth_of(tensors: list[Tensor], kwargs: dict[str, Any]) -> Tensor:
    x, w, b = (t.double() for t in tensors)
    return torch_F.conv2d(x, w, b, **kwargs)


@cpu_only
@on_cases
def test_explained(case: str) -> None:
    tensors, kwargs = make(case)
    found = torchconv.explain(*tensors, **kwargs, peak=100.0, bandwidth=10.0)["fprop"]
    assert found.algorithm == "runs of taps in place"
    assert found.otherwise == ""
    columns = tensors[1].shape[3]
    if case not in ("narrow", "padding_only"):  # some of whose taps never reach the image
        assert found.blocking.endswith(f"runs of {columns * tensors[0].shape[1]} terms")


@cpu_only
def test_few_filters_of_a_large_kernel_with_a_stride() -> None:
    """They would leave most of a vector empty, and taps enough repay vectors along the pixels."""
    found = []
    for kernel, filters in ((7, 1), (5, 1), (3, 1), (3, 32)):
        shape, kwargs = (filters, 3, kernel, kernel), {"stride": 2, "padding": kernel // 2}
        x, w = torch.randn(1, 3, 48, 50), torch.randn(shape)
        x = x.contiguous(memory_format=torch.channels_last)
        assert_accurate(F.conv2d(x, w, **kwargs), torch_F.conv2d(x.double(), w.double(), **kwargs))
        report = torchconv.explain(x, w, **kwargs, peak=100.0, bandwidth=10.0)["fprop"]
        found.append(report.algorithm == "runs of taps in place")
    assert found == [False, False, True, True]


@on_cases
@on_activations
@pytest.mark.parametrize("adds", [False, True], ids=["plain", "residual"])
def test_forward(case: str, activation: str | None, adds: bool) -> None:
    tensors, kwargs = make(case)
    truth = truth_of(tensors, kwargs)
    residual = in_layout(torch.randn(truth.shape), "channels_last") if adds else None
    if residual is not None:
        truth = truth + residual.double()
    if activation is not None:
        truth = getattr(torch_F, activation)(truth)
    y = F.conv2d(*tensors, **kwargs, activation=activation, residual=residual)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_accurate(y, truth)


@on_cases
def test_without_bias(case: str) -> None:
    (x, w, b), kwargs = make(case)
    truth = truth_of([x, w, torch.zeros_like(b)], kwargs)
    assert_accurate(F.conv2d(x, w, **kwargs), truth)
    flipped = truth_of([x, w.flip(2, 3), torch.zeros_like(b)], kwargs)
    assert_accurate(F.conv2d(x, w, **kwargs, flip_kernel=True), flipped)


@on_cases
def test_derivative_of_what_was_activated(case: str) -> None:
    """SiLU's derivative needs what came before it, which is written too."""
    (x, w, b), kwargs = make(case)
    w.requires_grad_()
    y = F.conv2d(x, w, b, **kwargs, activation="silu")
    exact = w.detach().double().requires_grad_()
    truth = torch_F.silu(truth_of([x, exact, b], kwargs))
    dy = torch.randn_like(y)
    assert_accurate(y, truth)
    (dw,) = torch.autograd.grad(y, w, dy)
    (exact_dw,) = torch.autograd.grad(truth, exact, dy.double())
    assert_accurate(dw, exact_dw)


@on_cases
@on_activations
def test_bits_of_a_sample(case: str, activation: str | None) -> None:
    """The same alone and in its batch, and for every number of threads."""
    (x, w, b), kwargs = make(case)
    x = in_layout(torch.cat([x, x.flip(0), x.flip(3)]), "channels_last")
    y = F.conv2d(x, w, b, **kwargs, activation=activation)
    with threads(1 if torch.get_num_threads() > 1 else 2):
        assert torch.equal(F.conv2d(x, w, b, **kwargs, activation=activation), y)
    alone = F.conv2d(in_layout(x[1:2], "channels_last"), w, b, **kwargs, activation=activation)
    assert torch.equal(alone[0], y[1])


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 3e38])
@on_cases
def test_special_values(case: str, value: float) -> None:
    """A NaN or an infinity reaches the outputs whose windows hold it, and no others."""
    tensors, kwargs = make(case)
    tensors[0][0, -1, 1, 1] = value
    tensors[0][-1, 0, 0, 0] = value
    tensors[1] /= 4
    truth = truth_of(tensors, kwargs)
    z = F.conv2d(*tensors, **kwargs)
    assert torch.equal(z.isfinite(), truth.isfinite())
    assert torch.equal(z.isnan(), truth.isnan())
    clamped = F.conv2d(*tensors, **kwargs, activation="relu")
    assert torch.equal(clamped.isnan(), truth.isnan())


def test_streamed_outputs() -> None:
    x = in_layout(torch.randn(2, 3, 520, 520), "channels_last")
    w, b = torch.randn(32, 3, 3, 3), torch.randn(32)
    kwargs: dict[str, Any] = {"stride": 2, "padding": 1}
    truth = truth_of([x, w, b], kwargs)
    assert_accurate(F.conv2d(x, w, b, **kwargs), truth)
    assert_accurate(F.conv2d(x, w, b, **kwargs, activation="relu"), truth.relu())


def test_input_gradient_of_a_last_layer() -> None:
    """Its filters are the channels of the gather."""
    x = in_layout(torch.randn(2, 40, 12, 17), "channels_last").requires_grad_()
    w = torch.randn(3, 40, 3, 3)
    dz = in_layout(torch.randn(2, 3, 12, 17), "channels_last")
    with torchconv.backends.allow_winograd(False):
        (dx,) = torch.autograd.grad(F.conv2d(x, w, padding=1), x, dz)
    truth = torch.nn.grad.conv2d_input(x.shape, w.double(), dz.double(), padding=1)
    assert_accurate(dx, truth)


@cpu_only
def test_parts_of_a_concatenation() -> None:
    """Convolutions of a fused network that are concatenated."""

    class Parts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Conv2d(3, 24, 3, 2, 1)
            self.b = torch.nn.Conv2d(3, 8, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x).relu(), self.b(x)], 1)

    network = Parts().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = in_layout(torch.randn(1, 3, 32, 40), "channels_last")
    fused = torchconv.fuse(network)
    with torch.no_grad():
        expected = network.double()(x.double())
        for _ in range(4):
            assert_accurate(fused(x), expected)
