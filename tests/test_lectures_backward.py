"""The backward rows of the lectures' common content: gradients, SGD, and the chain that trains.

The formulas are written as loops in reference.py; the homework identities of lecture C are stated
here with torchconv's own operators. Small integers make most of it exact.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reference
import torchconv
import torchconv.functional as F
from conftest import assert_accurate, everywhere, from_numpy, in_layout, to_numpy
from test_lectures import integers, on_dtypes, on_formats

pytestmark = everywhere


@on_formats
@on_dtypes
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("groups", [1, 2])
def test_rows_13_to_15_gradients(
    groups: int, stride: tuple[int, int], dtype: torch.dtype, layout: str
) -> None:
    """db, dw and dx against the lectures' sums over outputs, with unequal padding and dilation."""
    x, w = integers(2, 4, 6, 7, dtype=dtype), integers(6, 4 // groups, 3, 2, dtype=dtype)
    b = integers(6, dtype=dtype)
    sides, dilation = (1, 2, 0, 1), (1, 2)
    leaves = [in_layout(t, layout) if t.dim() == 4 else t for t in (x, w, b)]
    leaves = [t.requires_grad_() for t in leaves]
    z = F.conv2d(*leaves, stride=stride, padding=sides, dilation=dilation, groups=groups)
    dz = integers(*z.shape, dtype=dtype)
    got = torch.autograd.grad(z, leaves, in_layout(dz, layout))
    x64, w64, dz64 = (to_numpy(t.double()) for t in (x, w, dz))
    expected = reference.conv2d_backward(dz64, x64, w64, stride, sides, dilation, groups)
    for gradient, value in zip(got, expected, strict=True):
        assert torch.equal(gradient, from_numpy(value).to(dtype))


@on_formats
def test_row_14_homework_dw_is_a_correlation_of_x_with_dz(layout: str) -> None:
    """Stride 1: channels play the batch and the batch plays the channels."""
    x = in_layout(integers(3, 2, 7, 6), layout)
    w = integers(4, 2, 3, 2).requires_grad_()
    z = F.conv2d(x, w, padding=(2, 1))
    dz = integers(*z.shape)
    (dw,) = torch.autograd.grad(z, w, dz)
    identity = F.conv2d(x.transpose(0, 1), dz.transpose(0, 1), padding=(2, 1)).transpose(0, 1)
    assert torch.equal(dw, identity)


@on_formats
def test_row_15_homework_dx_is_a_correlation_of_dz_with_rot180_w(layout: str) -> None:
    """Stride 1: dz with f - 1 zeros on every side, correlated with rot180(w)."""
    x = in_layout(integers(3, 2, 7, 6), layout).requires_grad_()
    w = integers(4, 2, 3, 2)
    z = F.conv2d(x, w)
    dz = integers(*z.shape)
    (dx,) = torch.autograd.grad(z, x, dz)
    turned = torch.rot90(w, 2, (2, 3)).transpose(0, 1)
    padded = nn.functional.pad(dz, (1, 1, 2, 2))
    assert torch.equal(dx, F.conv2d(padded, turned))
    assert torch.equal(dx, F.conv2d(dz, w.transpose(0, 1), padding=(2, 1), flip_kernel=True))


@on_formats
@pytest.mark.parametrize("name", sorted(reference.DERIVATIVES))
def test_row_16_activation_derivative(name: str, layout: str) -> None:
    """dz = g'(z) * da elementwise; dw, dx and db follow from dz as without an activation."""
    x = in_layout(torch.randn(2, 3, 6, 5, dtype=torch.float64), layout).requires_grad_()
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    a = F.conv2d(x, w, b, activation=name)
    da = torch.randn_like(a)
    got = torch.autograd.grad(a, (x, w, b), da)
    arrays = to_numpy(x.detach()), to_numpy(w.detach())
    z = reference.conv2d(*arrays, to_numpy(b.detach()))
    slope = [reference.DERIVATIVES[name](v) for v in z.flatten()]
    dz = torch.tensor(slope, dtype=torch.float64).view(z.shape) * da
    for gradient, value in zip(got, reference.conv2d_backward(to_numpy(dz), *arrays), strict=True):
        assert_accurate(gradient, from_numpy(value))


@on_formats
@on_dtypes
@pytest.mark.parametrize("size", [(2, 2), (4, 2)])
def test_row_17_mean_backward_is_a_kronecker_product(
    size: tuple[int, int], dtype: torch.dtype, layout: str
) -> None:
    """Each dz is spread evenly over its window: dz (x) the constant kernel 1 / (R * S)."""
    x = in_layout(integers(2, 3, 8, 6, dtype=dtype), layout).requires_grad_()
    y = F.avg_pool2d(x, size)
    dy = integers(*y.shape, dtype=dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    kernel = torch.full(size, 1.0 / (size[0] * size[1]), dtype=dtype)
    for n in range(2):
        for c in range(3):
            assert torch.equal(dx[n, c], torch.kron(dy[n, c], kernel))


@on_formats
@on_dtypes
@pytest.mark.parametrize("op", ["max_pool2d", "min_pool2d"])
def test_row_18_selecting_backward_is_a_mask(op: str, dtype: torch.dtype, layout: str) -> None:
    """dz goes to the one selected element of its window: a 0/1 mask times dz spread out."""
    x = torch.randperm(2 * 3 * 8 * 6).view(2, 3, 8, 6).to(dtype)  # no ties: the mask is x == y
    x = in_layout(x, layout).requires_grad_()
    y = getattr(F, op)(x, 2)
    dy = integers(*y.shape, dtype=dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    ones = torch.ones(2, 2, dtype=dtype)
    for n in range(2):
        for c in range(3):
            mask = (x[n, c] == torch.kron(y[n, c], ones)).to(dtype)
            assert mask.sum() == y[n, c].numel()
            assert torch.equal(dx[n, c], mask * torch.kron(dy[n, c], ones))


@on_formats
@pytest.mark.parametrize("op", ["max_pool2d", "min_pool2d", "avg_pool2d"])
def test_rows_17_and_18_overlapping_windows_add_up(op: str, layout: str) -> None:
    x = integers(2, 2, 6, 7, low=-2, high=3)  # few values: ties everywhere
    leaf = in_layout(x, layout).requires_grad_()
    y = getattr(F, op)(leaf, 3, 1)
    dy = integers(*y.shape)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    if op == "avg_pool2d":
        ones = torch.ones(2, 1, 3, 3, dtype=x.dtype) / 9
        expected = nn.functional.conv_transpose2d(dy, ones, groups=2)
        assert_accurate(dx, expected)
    else:
        _, at = reference.select_pool2d(to_numpy(x), (3, 3), (1, 1), minimum=op[:3] == "min")
        expected = from_numpy(reference.select_pool2d_backward(to_numpy(dy), at, 6, 7))
        assert torch.equal(dx, expected)


@on_dtypes
def test_row_19_sgd_step(dtype: torch.dtype) -> None:
    """w <- w - eta * dw and b <- b - eta * db, by hand and by torch.optim.SGD on the module."""
    layer = torchconv.nn.Conv2d(2, 3, 3, dtype=dtype)
    x = torch.randn(4, 2, 6, 6, dtype=dtype)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.125)
    z = layer(x)
    (0.5 * z.square().sum()).backward()  # dL/dz = z
    arrays = to_numpy(x.double()), to_numpy(before["weight"].double())
    _, dw, db = reference.conv2d_backward(to_numpy(z.detach().double()), *arrays)
    optimizer.step()
    assert_accurate(layer.weight.detach(), before["weight"].double() - 0.125 * from_numpy(dw))
    assert layer.bias is not None
    assert_accurate(layer.bias.detach(), before["bias"].double() - 0.125 * from_numpy(db))


@on_formats
@pytest.mark.parametrize("pool", ["MaxPool2d", "MinPool2d", "AvgPool2d"])
def test_row_20_chain_trains(pool: str, layout: str) -> None:
    """CONV -> POOL -> CONV -> FC -> loss: plain SGD finds which edge a picture holds."""
    pictures = 0.3 * torch.randn(64, 1, 10, 10)
    labels = torch.arange(64) % 2
    pictures[labels == 0, :, :, 5:] += 1  # a vertical edge
    pictures[labels == 1, :, 5:, :] += 1  # a horizontal edge
    model = nn.Sequential(
        torchconv.nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        getattr(torchconv.nn, pool)(2),
        torchconv.nn.Conv2d(4, 4, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, 2),
    )
    pictures = in_layout(pictures, layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0], (losses[0], losses[-1])
    assert (model(pictures).argmax(1) == labels).all()
