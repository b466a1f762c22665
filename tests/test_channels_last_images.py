"""Convolutions of contiguous images that go by way of channels_last ones, where those take less
(csrc/cpu/channels_last_copy.h), against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchconv
import torchconv.functional as F
from conftest import assert_accurate, cpu_only, in_layout
from oracle import torch_F
from packed_layers import assert_fresh
from test_determinism import threads
from torchconv import nn

pytestmark = cpu_only

# name: input size, weight size, further arguments of conv2d
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "short_rows": ((3, 48, 28, 5), (24, 48, 3, 3), {"stride": 3, "dilation": 2}),
    "many_samples": ((8, 64, 44, 11), (64, 64, 5, 5), {"stride": 2}),
    "few_pixels": ((8, 64, 14, 14), (128, 64, 5, 5), {"stride": 4}),
    "one_panel": ((6, 40, 15, 11), (16, 40, 5, 5), {"stride": 2}),
    "one_sample": ((1, 96, 14, 14), (40, 96, 3, 4), {"stride": (2, 3), "padding": (0, 1)}),
    "bands": ((2, 72, 21, 20), (96, 72, 7, 7), {"stride": 2, "padding": 1}),
    "patches": ((4, 48, 14, 14), (200, 48, 2, 2), {"stride": 2}),
    "few_filters": ((12, 64, 7, 7), (5, 64, 5, 5), {}),
}
WORDS = "by way of channels_last images"
on_cases = pytest.mark.parametrize("case", CASES)
on_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def make(case: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    x_size, w_size, kwargs = CASES[case]
    w = torch.randn(w_size, dtype=dtype) / w_size[1]
    return [torch.randn(x_size, dtype=dtype), w, torch.randn(w_size[0], dtype=dtype)], kwargs


def truth_of(tensors: list[Tensor], kwargs: dict[str, Any]) -> Tensor:
    x, w, b = (t.double() for t in tensors)
    return torch_F.conv2d(x, w, b, **kwargs)


@on_cases
def test_explained(case: str) -> None:
    (x, w, _), kwargs = make(case)
    sizes = {"peak": 100.0, "bandwidth": 10.0}
    assert WORDS in torchconv.explain(x, w, **kwargs, **sizes)["fprop"].blocking
    # The choice is that of a sample alone.
    assert WORDS in torchconv.explain(x[:1], w, **kwargs, **sizes)["fprop"].blocking
    x = x.contiguous(memory_format=torch.channels_last)
    assert WORDS not in torchconv.explain(x, w, **kwargs, **sizes)["fprop"].blocking


def test_where_copies_do_not_pay() -> None:
    """Long rows, few channels, single taps, and what Winograd's algorithm computes."""
    for x_size, w_size, kwargs in (
        ((2, 16, 64, 64), (16, 16, 3, 1), {"padding": (1, 0)}),
        ((2, 3, 56, 56), (32, 3, 4, 4), {"stride": 4}),
        ((2, 64, 28, 28), (64, 64, 1, 1), {"stride": 2}),
        ((2, 64, 7, 7), (64, 64, 3, 3), {"padding": 1}),
    ):
        x, w = torch.randn(x_size), torch.randn(w_size)
        found = torchconv.explain(x, w, **kwargs, peak=100.0, bandwidth=10.0)["fprop"]
        assert WORDS not in found.blocking


def test_weight_gradients_explained() -> None:
    """Of few filters over images that most taps read."""
    for filters, stride, copied in ((5, 1, True), (8, 1, True), (16, 1, False), (8, 4, False)):
        x, w = torch.randn(3, 64, 7, 7), torch.randn(filters, 64, 4, 4)
        found = torchconv.explain(x, w, None, stride, peak=100.0, bandwidth=10.0)["wgrad"]
        assert (WORDS in found.blocking) == copied


@on_cases
@on_dtypes
@pytest.mark.parametrize("activation", [None, "relu6", "hardswish"])
@pytest.mark.parametrize("adds", [False, True], ids=["plain", "residual"])
def test_forward(case: str, dtype: torch.dtype, activation: str | None, adds: bool) -> None:
    tensors, kwargs = make(case, dtype)
    truth = truth_of(tensors, kwargs)
    residual = torch.randn(truth.shape, dtype=dtype) if adds else None
    if residual is not None:
        truth = truth + residual.double()
    if activation is not None:
        truth = getattr(torch_F, activation)(truth)
    y = F.conv2d(*tensors, **kwargs, activation=activation, residual=residual)
    assert y.is_contiguous()
    assert_accurate(y, truth)


@on_cases
@on_dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients(case: str, dtype: torch.dtype, layout: str) -> None:
    """Behind SiLU, whose derivative needs what came before it; weights in either layout."""
    (x, w, b), kwargs = make(case, dtype)
    leaves = [x.requires_grad_(), in_layout(w, layout).requires_grad_(), b.requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y = F.conv2d(*leaves, **kwargs, activation="silu")
    truth = torch_F.silu(truth_of(exact, kwargs))
    assert_accurate(y, truth)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, dy)
    expected = torch.autograd.grad(truth, exact, dy.double())
    for got, wanted in zip(found, expected, strict=True):
        assert_accurate(got, wanted)


@on_cases
def test_bits(case: str) -> None:
    """Of a sample: the same alone and in its batch, and for every number of threads."""
    (x, w, b), kwargs = make(case)
    dy = torch.randn_like(F.conv2d(x, w, b, **kwargs))

    def run(x: Tensor, dy: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, w)]
        y = F.conv2d(*leaves, b, **kwargs)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    together = run(x, dy)
    for count in (1, 2, 3):
        with threads(count):
            for got, expected in zip(run(x, dy), together, strict=True):
                assert torch.equal(got, expected)
    y, dx, _ = run(x[-1:], dy[-1:])
    assert torch.equal(y[0], together[0][-1])
    assert torch.equal(dx[0], together[1][-1])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@on_cases
def test_special_values(case: str, value: float) -> None:
    """A NaN or an infinity reaches the outputs whose windows hold it, and no others."""
    tensors, kwargs = make(case)
    tensors[0][-1, 0, 4, 4] = value
    y, truth = F.conv2d(*tensors, **kwargs), truth_of(tensors, kwargs)
    assert torch.equal(y.isfinite(), truth.isfinite())
    assert torch.equal(y.isnan(), truth.isnan())
    assert_accurate(y[truth.isfinite()], truth[truth.isfinite()])


@pytest.mark.parametrize("case", ["many_samples", "few_pixels", "bands", "few_filters"])
def test_layers_in_eval_mode(case: str) -> None:
    """Which keep packed weights."""
    x_size, w_size, kwargs = CASES[case]
    layer = nn.Conv2d(x_size[1], w_size[0], w_size[2:], **kwargs).eval()
    assert_fresh(layer, torch.randn(x_size))
    assert_fresh(layer, torch.randn(x_size)[:1])
