"""Convolutions of contiguous images of few channels or by few filters, read where they lie
(csrc/cpu/plane_taps.cpp), against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchconv
import torchconv.functional as F
from conftest import assert_accurate, cpu_only, everywhere
from oracle import torch_F
from test_determinism import threads
from torchconv import _load

pytestmark = everywhere

# name: input size, weight size, further arguments of conv2d
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "one_column": ((2, 16, 20, 64), (16, 16, 3, 1), {"padding": (1, 0)}),
    "few_filters": ((2, 40, 9, 250), (3, 40, 3, 3), {"padding": 1}),
    "one_filter": ((1, 5, 7, 400), (1, 5, 2, 5), {"padding": (0, 2)}),
    "two_filters": ((1, 6, 9, 127), (2, 6, 4, 2), {}),
    "four_filters": ((2, 3, 9, 96), (4, 3, 5, 3), {"padding": (4, 3)}),
    "uneven_tiles": ((2, 4, 12, 63), (11, 4, 5, 3), {"padding": (2, 1)}),
    "six_filters": ((3, 1, 28, 28), (6, 1, 5, 5), {"padding": 2}),
    "eight_filters": ((2, 8, 32, 32), (8, 8, 5, 5), {"padding": 2}),
    "many_channels": ((1, 75, 7, 80), (5, 75, 3, 3), {"padding": 1}),
    "rows_apart": ((2, 4, 17, 48), (10, 4, 3, 3), {"stride": (2, 1), "padding": 1}),
    "dilated": ((2, 4, 15, 60), (12, 4, 3, 3), {"dilation": (3, 5), "padding": (3, 5)}),
    "beside_the_image": ((1, 4, 5, 10), (9, 4, 3, 3), {"padding": (2, 12), "dilation": (1, 4)}),
}
on_cases = pytest.mark.parametrize("case", CASES)
on_activations = pytest.mark.parametrize("activation", [None, "relu6", "hardswish", "silu"])


def make(case: str) -> tuple[list[Tensor], dict[str, Any]]:
    x_size, w_size, kwargs = CASES[case]
    return [torch.randn(x_size), torch.randn(w_size) / 5, torch.randn(w_size[0])], kwargs


def truth_of(tensors: list[Tensor], kwargs: dict[str, Any]) -> Tensor:
    x, w, b = (t.double() for t in tensors)
    return torch_F.conv2d(x, w, b, **kwargs)


@pytest.fixture(autouse=True)
def direct() -> Any:
    with torchconv.backends.allow_winograd(False):
        yield


@cpu_only
@on_cases
def test_explained(case: str) -> None:
    tensors, kwargs = make(case)
    found = torchconv.explain(*tensors, **kwargs, peak=100.0, bandwidth=10.0)["fprop"]
    # A tile of one filter has too few sums in fewer registers.
    taken = case != "one_filter" or _load.isa() == "avx512"
    assert (found.algorithm == "taps of planes in place, vectors along pixels") == taken
    assert found.otherwise == ""
    assert found.blocking.startswith("register tiles of ") == taken


@on_cases
@on_activations
def test_forward(case: str, activation: str | None) -> None:
    tensors, kwargs = make(case)
    truth = truth_of(tensors, kwargs)
    act = {
        None: lambda t: t,
        "relu6": torch_F.relu6,
        "hardswish": torch_F.hardswish,
        "silu": torch_F.silu,
    }[activation]
    assert_accurate(F.conv2d(*tensors, **kwargs, activation=activation), act(truth))
    residual = torch.randn(truth.shape)
    got = F.conv2d(*tensors, **kwargs, activation=activation, residual=residual)
    assert_accurate(got, act(truth + residual.double()))
    x, w, _ = tensors
    assert_accurate(F.conv2d(x, w, **kwargs), torch_F.conv2d(x.double(), w.double(), **kwargs))


@on_cases
def test_gradients(case: str) -> None:
    tensors, kwargs = make(case)
    leaves = [t.requires_grad_() for t in tensors]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    truth = torch_F.conv2d(*wide, **kwargs)
    dz = torch.randn(truth.shape)
    got = torch.autograd.grad(F.conv2d(*leaves, **kwargs, activation="silu"), leaves, dz)
    want = torch.autograd.grad(torch_F.silu(truth), wide, dz.double())
    for g, t in zip(got, want, strict=True):
        assert_accurate(g, t)


@on_cases
def test_bits_depend_on_neither_threads_nor_batch(case: str) -> None:
    (x, w, b), kwargs = make(case)
    x = x.repeat(5, 1, 1, 1)
    with threads(1):
        first = F.conv2d(x, w, b, **kwargs)
    with threads(3):
        assert torch.equal(F.conv2d(x, w, b, **kwargs), first)
    assert torch.equal(F.conv2d(x[-1:], w, b, **kwargs), first[-1:])


@cpu_only
def test_streamed() -> None:
    """Outputs of sixteen megabytes and more, of whole vectors."""
    for width in (512, 520):
        x, w, b = torch.randn(2, 16, 300, width), torch.randn(16, 16, 3, 1), torch.randn(16)
        got = F.conv2d(x, w, b, padding=(1, 0), activation="relu")
        assert got.nbytes >= 16 << 20
        assert_accurate(
            got, torch_F.conv2d(x.double(), w.double(), b.double(), padding=(1, 0)).relu()
        )


@cpu_only
@pytest.mark.parametrize("height", [46, 47])
def test_gradient_streamed_in_phases(height: int) -> None:
    """Rows of an odd number of half vectors between those of a phase: planes may begin anywhere."""
    x, w = torch.randn(105, 16, height, 56, requires_grad=True), torch.randn(4, 16, 3, 3)
    assert x.nbytes >= 16 << 20
    z = F.conv2d(x, w, stride=(2, 1), padding=1)
    dz = torch.randn_like(z)
    want = torch.nn.grad.conv2d_input(x.shape, w.double(), dz.double(), stride=(2, 1), padding=1)
    assert_accurate(torch.autograd.grad(z, x, dz)[0], want)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_windows(value: float) -> None:
    x, w = torch.randn(2, 20, 9, 40), torch.randn(3, 20, 3, 3)
    x[1, 4, 3, 20] = value
    got = F.conv2d(x, w, padding=1)
    met = torch.zeros(got.shape, dtype=torch.bool)
    met[1, :, 2:5, 19:22] = True
    assert torch.equal(~torch.isfinite(got), met)
