"""What autograd records of plain calls in C++ (csrc/bound/recorded.cpp) is what the Functions in
Python record: the same bits and strides, errors, hooks and derivatives."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad as fwAD, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

import torchconv.functional as F
from conftest import in_layout
from dispatch_log import DispatchLog
from torchconv import _build, _load, _recorded

LAYOUTS = ("contiguous", "channels_last")


def _images(*size: int) -> Tensor:
    torch.manual_seed(sum(size))
    # No two values alike, so that maxima differ by more than a finite difference.
    return torch.randperm(torch.Size(size).numel()).double().view(size) / 16 - 3


def _norm(**settings: Any) -> Callable[..., Tensor]:
    def call(x: Tensor, w: Tensor, b: Tensor, *residual: Tensor) -> Tensor:
        running = (torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype))
        added = residual[0] if residual else None
        return F.batch_norm(x, *running, w, b, True, residual=added, **settings)

    return call


X = _images(2, 4, 6, 7)
W, DEPTHWISE, BIAS = _images(6, 4, 3, 2), _images(8, 1, 3, 3), _images(6)
SCALE, SHIFT = torch.rand(4).double() + 0.5, torch.rand(4).double()
CASES: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {
    "conv": (F.conv2d, (X, W, BIAS)),
    "conv without bias": (lambda x, w: F.conv2d(x, w, None, 2, (1, 0), (1, 2)), (X, W)),
    "depthwise": (lambda x, w: F.conv2d(x, w, None, 1, (1, 2, 0, 1), 1, 4), (X, DEPTHWISE)),
    "flipped": (lambda x, w, b: F.conv2d(x, w, b, flip_kernel=True), (X, W, BIAS)),
    **{
        activation: (
            lambda x, w, b, name=activation: F.conv2d(x / 64, w / 64, b, activation=name),
            (X, W, BIAS),
        )
        for activation in ("relu", "relu6", "sigmoid", "tanh")
    },
    "max_pool2d": (lambda x: F.max_pool2d(x, (3, 2), 2, 1, (1, 2), True), (X,)),
    "min_pool2d": (lambda x: F.min_pool2d(x, 2, (1, 3)), (X,)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), (X,)),
    "avg_pool2d by 5": (lambda x: F.avg_pool2d(x, 2, divisor_override=5), (X,)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (4, 3)), (X,)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, (4, 3)), (X,)),
    "batch_norm": (_norm(), (X, SCALE, SHIFT)),
    "batch_norm alone": (lambda x: F.batch_norm(x, None, None, training=True), (X,)),
    "batch_norm relu": (_norm(activation="relu", eps=0.1), (X, SCALE, SHIFT)),
    "batch_norm sum": (_norm(), (X, SCALE, SHIFT, X.flip(0))),
    "batch_norm sum relu6": (_norm(activation="relu6"), (X, SCALE, SHIFT, X.flip(0) / 32)),
}
by_name = pytest.mark.parametrize("name", CASES)


def leaves_of(name: str, layout: str = "contiguous", dtype: Any = torch.float64) -> list[Tensor]:
    tensors = [t.to(dtype) for t in CASES[name][1]]
    return [
        (in_layout(t, layout) if t.dim() == 4 else t).detach().requires_grad_() for t in tensors
    ]


@pytest.fixture(params=["C++", "Python"])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who records; a test that takes this runs with both."""
    _load.load()
    assert _load.records, "the library for this PyTorch was not built: see `python -m torchconv`"
    if request.param == "Python":
        monkeypatch.setattr(_load, "records", False)
    return str(request.param)


def is_in_cpp(y: Tensor) -> bool:
    return "CppNode" in y.grad_fn.name()  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", LAYOUTS)
@by_name
def test_same_bits_of_all_that_is_asked_for(
    name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, tensors = CASES[name][0], leaves_of(name, layout, torch.float32)
    _load.load()
    for count in range(1, len(tensors) + 1):
        for chosen in itertools.combinations(tensors, count):
            for tensor in tensors:
                tensor.requires_grad_(any(tensor is leaf for leaf in chosen))
            got = []
            for records in (True, False):
                monkeypatch.setattr(_load, "records", records)
                y = call(*tensors)
                assert is_in_cpp(y) == records
                dy = torch.ones_like(y)
                got.append((y, *torch.autograd.grad(y, chosen, dy, retain_graph=True)))
                got.append((y, *torch.autograd.grad(y, chosen[:1], dy)))
            for ours, theirs in zip(got[:2], got[2:], strict=True):
                for a, b in zip(ours, theirs, strict=True):
                    assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype is b.dtype


@by_name
def test_derivatives(name: str, recorder: str) -> None:
    call, tensors = CASES[name][0], leaves_of(name)
    assert is_in_cpp(call(*tensors)) == (recorder == "C++")
    assert gradcheck(call, tensors, check_batched_grad=True)
    assert gradgradcheck(call, tensors)


@by_name
def test_a_watched_backward_calls_the_whole_operator(name: str, recorder: str) -> None:
    """So do those of tensors with tangents, and of vmap; a plain one calls the short overload."""
    call, tensors = CASES[name][0], leaves_of(name)
    y = call(*tensors)
    dy = torch.ones_like(y)
    expected = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    with DispatchLog() as log:
        watched = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    assert [n for n in log.names if n.endswith("_backward") and n.startswith("torchconv::")]
    assert not [n for n in log.names if "settings" in n]
    batched = torch.autograd.grad(
        y, tensors, torch.stack([dy, dy]), retain_graph=True, is_grads_batched=True
    )
    with fwAD.dual_level():
        dual = fwAD.make_dual(dy, 2 * dy)
        tangents = [
            fwAD.unpack_dual(g).tangent
            for g in torch.autograd.grad(y, tensors, dual, create_graph=True)
        ]
    for value, *others in zip(expected, watched, batched, tangents, strict=True):
        torch.testing.assert_close(others[0], value)
        torch.testing.assert_close(others[1], torch.stack([value, value]))
        torch.testing.assert_close(others[2], 2 * value)


@pytest.mark.parametrize("name", ["conv", "max_pool2d", "batch_norm sum relu6"])
def test_saved_tensors(name: str, recorder: str) -> None:
    """Hooks see them; backward frees them, and refuses those that were overwritten."""
    call, tensors = CASES[name][0], leaves_of(name)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(*tensors)
    assert packed
    y.sum().backward()
    expected = torch.autograd.grad(call(*tensors).sum(), tensors)
    for tensor, gradient in zip(tensors, expected, strict=True):
        assert torch.equal(tensor.grad, gradient)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    operands = [tensor * 1 for tensor in tensors]
    y = call(*operands)
    with torch.no_grad():
        (operands[0] if "pool" not in name else y).add_(1)
    if "pool" in name:
        y.sum().backward()  # which keeps neither input nor output
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_an_activation_keeps_the_output(recorder: str) -> None:
    y = F.conv2d(*leaves_of("conv"), activation="relu")
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_bias_that_only_counts_by_its_type_may_change(recorder: str) -> None:
    x, w, b = leaves_of("batch_norm")
    y = F.batch_norm(x, None, None, w, b, True)
    with torch.no_grad():
        b.add_(1)
    y.sum().backward()
    assert b.grad is not None


@by_name
def test_a_gradient_of_another_size_is_refused(name: str, recorder: str) -> None:
    """A hook can hand a node one that the engine has not compared with the output."""
    call, tensors = CASES[name][0], leaves_of(name)
    y = call(*tensors)
    y.grad_fn.register_prehook(lambda grads: (grads[0][:1], *grads[1:]))  # type: ignore[union-attr]
    for create_graph in (False, True):
        with pytest.raises(RuntimeError, match="size"):
            torch.autograd.grad(
                y, tensors, torch.ones_like(y), retain_graph=True, create_graph=create_graph
            )


def test_first_call_may_be_recomputed_by_another_recorder() -> None:
    """The call that opens the libraries is recorded in Python, a checkpoint's second in C++."""
    code = """
import torch
import torchconv.functional as F
from torch.utils.checkpoint import checkpoint
x, w, b = (torch.rand(4, *n, requires_grad=True) for n in ((4, 6, 6), (), ()))
def call(x):
    return F.batch_norm(x, None, None, w, b, True, residual=x, activation="relu")
y = checkpoint(call, x, use_reentrant=False)
y.sum().backward()
first, second = y.grad_fn.name(), call(x).grad_fn.name()
assert "CppNode" not in first and "CppNode" in second, (first, second)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_running_statistics_change(recorder: str) -> None:
    x, w, b = leaves_of("batch_norm")
    mean, var = torch.zeros(4).double(), torch.ones(4).double()
    versions = mean._version, var._version
    F.batch_norm(x, mean, var, w, b, True, momentum=0.5)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)).detach() / 2)
    torch.testing.assert_close(var, x.var((0, 2, 3)).detach() / 2 + 0.5)
    assert mean._version > versions[0] and var._version > versions[1]


def test_what_python_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations whose derivative needs the pre-activation, and residuals."""
    _load.load()
    x, w, b = leaves_of("conv")
    for activation in ("silu", "hardswish", "gelu"):
        assert not is_in_cpp(F.conv2d(x, w, b, activation=activation))
    y = F.conv2d(x, w, b)
    assert is_in_cpp(y) and not is_in_cpp(F.conv2d(x, w, b, residual=y))


def test_a_library_for_another_pytorch_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _load.load()
    monkeypatch.setattr(_load, "records", False)
    monkeypatch.setattr(_build, "bound_fault", lambda _: "was built for PyTorch 2.13.0+other")
    _load._open_library(library, _load.isa())
    assert not _load.records
    assert not is_in_cpp(F.conv2d(*leaves_of("conv")))


def test_every_pooling_has_its_place() -> None:
    """In C++ they go by number: each must be the one that Python means."""
    _load.load()
    x = X.float().requires_grad_()
    for name, (function, forward, *_) in _recorded._POOLINGS.items():
        window = ((2, 2),) if "adaptive" in name else ((2, 2), (2, 2), (0, 0))
        more = {"max": ((1, 1), False), "min": ((1, 1), False), "avg": (False, True, None)}
        values = (*window, *more.get(name[:3], ()))
        op = _recorded.operator(forward)
        expected = op.call(X.float(), op.settings(values))
        y = _recorded.RECORDED[name](x, values)
        assert y.grad_fn.name() == f"torch::autograd::CppNode<torchconv::{function}Function>"
        assert torch.equal(y, expected[0] if isinstance(expected, tuple) else expected)
