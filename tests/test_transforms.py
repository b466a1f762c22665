"""The operators under torch.func, torch.compile and torch.export: what eager mode computes.

vmap against a loop, per-sample gradients against one sample at a time, Jacobians against PyTorch's
operators; compiled graphs without breaks, bit for bit what eager mode computes, strides included.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as torch_F

import torchconv
import torchconv.functional as F
from conftest import assert_accurate, assert_same, everywhere, in_layout
from dispatch_log import DispatchLog
from operator_samples import ACTIVATIONS, FORMATS

pytestmark = everywhere

on_formats = pytest.mark.parametrize("layout", FORMATS)


@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None), (0, 0, 0), (None, 0, None), (1, 2, 1), (None, None, 0), (0, None, 0)],
)
@pytest.mark.parametrize("kwargs", [{}, {"groups": 2, "padding": 1, "activation": "gelu"}], ids=str)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_vmap_conv2d(
    in_dims: tuple[int | None, ...], kwargs: dict[str, Any], batched: bool
) -> None:
    sizes = ((3, 4, 6, 5) if batched else (4, 6, 5), (2, 4 // kwargs.get("groups", 1), 3, 2), (2,))
    tensors = []
    for size, dim in zip(sizes, in_dims, strict=True):
        full = list(size)
        if dim is not None:
            full.insert(dim, 5)
        tensors.append(torch.randn(full, dtype=torch.float64))

    def op(*args: Tensor) -> Tensor:
        return F.conv2d(*args, **kwargs)

    out = vmap(op, in_dims)(*tensors)
    for i in range(5):
        one = [t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)]
        assert_accurate(out[i], op(*one))


@pytest.mark.parametrize("in_dim", [0, 1, 3])
@pytest.mark.parametrize("op", [F.max_pool2d, F.min_pool2d, F.avg_pool2d])
def test_vmap_pooling(op: Callable[..., Any], in_dim: int) -> None:
    x = torch.randn(3, 4, 6, 7, 5)
    out = vmap(lambda t: op(t, 3, 2, 1), in_dim)(x)
    for i in range(x.shape[in_dim]):
        assert torch.equal(out[i], op(x.select(in_dim, i), 3, 2, 1))
    if op is not F.avg_pool2d:
        values, indices = vmap(lambda t: op(t, 3, 2, 1, return_indices=True), in_dim)(x)
        one = op(x.select(in_dim, 2), 3, 2, 1, return_indices=True)
        assert torch.equal(values[2], one[0]) and torch.equal(indices[2], one[1])


def test_vmap_of_an_empty_batch() -> None:
    """No images inside a mapped dimension."""
    x, w = torch.randn(3, 0, 2, 6, 5), torch.randn(3, 4, 2, 3, 3)
    assert vmap(F.conv2d)(x, w).shape == (3, 0, 4, 4, 3)
    assert vmap(F.conv2d, (0, None))(x, w[0]).shape == (3, 0, 4, 4, 3)
    assert vmap(lambda t: F.max_pool2d(t, 2))(x).shape == (3, 0, 2, 3, 2)
    assert vmap(lambda t: F.avg_pool2d(t, 2))(x).shape == (3, 0, 2, 3, 2)


def test_vmap_nested() -> None:
    x, w = torch.randn(2, 3, 2, 6, 5), torch.randn(4, 2, 3, 3)
    out = vmap(vmap(lambda t: F.max_pool2d(F.conv2d(t, w), 2)))(x)
    expected = torch_F.max_pool2d(torch_F.conv2d(x.flatten(0, 1), w), 2)
    torch.testing.assert_close(out.flatten(0, 1), expected)


def network() -> nn.Sequential:
    return nn.Sequential(
        torchconv.nn.Conv2d(1, 3, 3, dtype=torch.float64),
        nn.Tanh(),
        torchconv.nn.MaxPool2d(2),
        torchconv.nn.Conv2d(3, 4, 2, dtype=torch.float64),
        torchconv.nn.AvgPool2d(2),
        torchconv.nn.MinPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(4, 2, dtype=torch.float64),
    )


def test_gradients_per_sample() -> None:
    """vmap(grad(loss)), the way differential privacy does it, against one sample at a time."""
    model = network()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    x, labels = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.randint(2, (5,))

    def loss(values: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        out = functional_call(model, values, (sample[None],))
        return torch_F.cross_entropy(out, label[None])

    got = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, labels)
    for i in range(5):
        expected = grad(loss)(parameters, x[i], labels[i])
        model.zero_grad()
        torch_F.cross_entropy(model(x[i : i + 1]), labels[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(got[name][i], expected[name])
            torch.testing.assert_close(got[name][i], parameter.grad)


def test_jacobians_and_hessian() -> None:
    """jvp, jacrev, jacfwd and hessian of one loss, against PyTorch's operators."""
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    w = torch.randn(2, 2, 2, 2, dtype=torch.float64)

    def ours(weight: Tensor) -> Tensor:
        return F.avg_pool2d(F.max_pool2d(F.conv2d(x, weight, activation="tanh"), 2, 1), 2)

    def theirs(weight: Tensor) -> Tensor:
        inner = torch.tanh(torch_F.conv2d(x, weight))
        return torch_F.avg_pool2d(torch_F.max_pool2d(inner, 2, 1), 2)

    tangent = torch.randn_like(w)
    for got, expected in zip(
        jvp(ours, (w,), (tangent,)), jvp(theirs, (w,), (tangent,)), strict=True
    ):
        torch.testing.assert_close(got, expected)
    reverse, forward = jacrev(ours)(w), jacfwd(ours)(w)
    torch.testing.assert_close(reverse, forward)
    torch.testing.assert_close(reverse, jacrev(theirs)(w))

    def energy(op: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda weight: op(weight).square().sum()

    second = hessian(energy(theirs))(w)
    torch.testing.assert_close(hessian(energy(ours))(w), second)
    torch.testing.assert_close(jacrev(jacrev(energy(ours)))(w), second)
    torch.testing.assert_close(jacfwd(jacfwd(energy(ours)))(w), second)


# --- torch.compile, torch.export -----------------------------------------------------------------


def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Every operator in one graph."""
    a = F.conv2d(x, w, b, padding=(1, 0, 1, 1), stride=(1, 2), activation="gelu")
    a = F.conv2d(a, w[:, :1], None, padding="same", groups=a.shape[1], flip_kernel=True)
    a = F.max_pool2d(a, 3, 1, 1) + F.min_pool2d(a, 3, 1, 1)
    _, indices = F.max_pool2d(a, 2, return_indices=True)
    return F.avg_pool2d(a, 2, ceil_mode=True, count_include_pad=False), indices


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@on_formats
def test_compile_forward_and_backward(layout: str, dynamic: bool) -> None:
    """fullgraph: no breaks. The same bits and strides as eager, and so the same gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    w, b = torch.randn(4, 4, 3, 3), torch.randn(4)
    sizes = ((2, 4, 9, 10), (3, 4, 12, 11), (1, 4, 8, 14)) if dynamic else ((2, 4, 9, 10),)
    for size in sizes:
        leaves = [in_layout(t, layout) if t.dim() == 4 else t for t in (torch.randn(size), w, b)]
        leaves = [t.requires_grad_() for t in leaves]
        (y, indices), (expected, theirs) = compiled(*leaves), step(*leaves)
        assert_same(y, expected)
        assert_same(indices, theirs)
        dy = torch.randn_like(expected)
        got = torch.autograd.grad(y, leaves, dy)
        for gradient, value in zip(got, torch.autograd.grad(expected, leaves, dy), strict=True):
            torch.testing.assert_close(gradient, value)


def test_compile_does_not_recompile_for_a_new_size() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    w, b = torch.randn(4, 4, 3, 3), torch.randn(4)
    for n, h, v in ((2, 9, 10), (3, 12, 13), (5, 20, 31)):
        compiled(torch.randn(n, 4, h, v), w, b)
    assert counter.frame_count == 1


def test_compile_same_with_stride_and_without_a_batch() -> None:
    """The padding of 'same' is arithmetic on symbolic sizes, in one graph for even and odd ones."""
    torch._dynamo.reset()

    def run(x: Tensor, w: Tensor) -> Tensor:
        a = F.conv2d(x, w, stride=(2, 3), padding="same", dilation=(1, 2))
        return F.min_pool2d(F.conv2d(a, w, padding="same"), 2, 1) + F.avg_pool2d(a, 2, 1)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    w = torch.randn(4, 4, 3, 2)
    for h, v in ((11, 17), (12, 31), (21, 20)):
        x = torch.randn(4, h, v)
        assert_same(compiled(x, w), run(x, w))
    assert counter.frame_count == 1


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_compile_activations(activation: str | None) -> None:
    torch._dynamo.reset()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, activation=activation).square().sum()

    x, w = torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, w), (x, w))
    for gradient, value in zip(got, torch.autograd.grad(loss(x, w), (x, w)), strict=True):
        assert_same(gradient, value)


@pytest.mark.parametrize("watched", [False, True], ids=["short", "watched"])
def test_compiled_autograd(watched: bool) -> None:
    """Its graph of one call is not taken for a call of the same sizes and other settings."""

    def gradients(padding: int) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        with DispatchLog() if watched else nullcontext():
            y = F.conv2d(*leaves, None, 1, padding, padding)
            y = F.max_pool2d(y, 2) + F.avg_pool2d(y, 2 * padding + 1, 2, padding)
            y = F.adaptive_max_pool2d(y, 3) * F.adaptive_avg_pool2d(y, 3)
        return torch.autograd.grad(y.square().sum(), leaves)

    torch._dynamo.reset()
    x, w = torch.randn(2, 4, 10, 10), torch.randn(6, 4, 3, 3)
    expected = [gradients(padding) for padding in (1, 2)]
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        got = [gradients(padding) for padding in (1, 2)]
    for ours, theirs in zip(got, expected, strict=True):
        for gradient, value in zip(ours, theirs, strict=True):
            torch.testing.assert_close(gradient, value)


def test_compile_with_inductor() -> None:
    """The default backend checks the strides that a fake kernel promised."""
    torch._dynamo.reset()
    model = network().float()
    x = torch.randn(4, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True)
    expected, got = model(x), compiled(x)
    torch.testing.assert_close(got, expected)
    gradients = []
    for out in (expected, got):
        model.zero_grad()
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_export() -> None:
    """One program for every batch size, with our operators in its graph."""
    model = network().float().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        model, (torch.randn(4, 1, 8, 8),), dynamic_shapes=({0: batch},), strict=False
    )
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {f"torchconv.{n}.default" for n in ("conv2d", "max_pool2d", "avg_pool2d")} <= targets
    x = torch.randn(7, 1, 8, 8)
    torch.testing.assert_close(program.module()(x), model(x))


def test_make_fx_traces_symbolically() -> None:
    w, b = torch.randn(4, 4, 3, 3), torch.randn(4)
    graph = make_fx(step, tracing_mode="symbolic")(torch.randn(2, 4, 9, 10), w, b)
    x = torch.randn(3, 4, 13, 12)
    for got, expected in zip(graph(x, w, b), step(x, w, b), strict=True):
        assert_same(got, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stride", [1, 2])
def test_jit_trace_of_same_padding(stride: int) -> None:
    layer = torchconv.nn.Conv2d(3, 3, 3, stride=stride, padding="same")
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(torch.jit.trace(layer, x)(x), layer(x))
