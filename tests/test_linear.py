"""Linear layers over images with channels last: torch.nn's numbers, by the 1x1 convolution."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_F
from torch import Tensor
from torch.nn.utils import parametrizations

import torchconv
import torchconv.functional as F
from conftest import relative_error
from dispatch_log import DispatchLog
from torchconv import nn

LIMITS = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 1e-3}
# N x H x W x C and K, with every size that may be one.
SIZES = [
    ((2, 5, 6, 7), 9),
    ((1, 1, 1, 8), 3),
    ((3, 4, 1, 1), 5),
    ((2, 3, 4, 16), 1),
    ((1, 1, 9, 40), 48),
]


def problem(
    size: tuple[int, ...], filters: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Input, weight and bias."""
    shapes = (size, (filters, size[-1]), (filters,))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def convolutions(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    with DispatchLog() as log:
        function(*args, **kwargs)
    return log.count("conv2d")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "filters"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_like_torch(dtype: torch.dtype, size: Any, filters: int, bias: bool) -> None:
    leaves = problem(size, filters, dtype)[: 3 if bias else 2]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, expected = F.linear(*leaves), torch_F.linear(*doubles)
    assert out.dtype == dtype
    assert out.stride() == expected.stride()
    assert relative_error(out, expected) <= LIMITS[dtype]
    dy = torch.randn_like(out)
    truth = torch.autograd.grad(expected, doubles, dy.double())
    for got, exact in zip(torch.autograd.grad(out, leaves, dy), truth, strict=True):
        assert got.shape == exact.shape
        assert relative_error(got, exact) <= LIMITS[dtype]
    assert convolutions(F.linear, *leaves) == 1


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        lambda x: x[:, ::2],
        lambda x: x[..., 1:],
        lambda x: x[:1].expand(3, -1, -1, -1),
    ],
    ids=["images", "rows apart", "not all channels", "one image thrice"],
)
def test_of_views(view: Callable[[Tensor], Tensor]) -> None:
    x = view(torch.randn(2, 4, 5, 6, dtype=torch.float64))
    weight = torch.randn(3, x.shape[-1], dtype=torch.float64)
    expected = torch_F.linear(x, weight)
    out = F.linear(x, weight)
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_activation_and_residual(activation: str | None, dims: int) -> None:
    leaves = problem((2, 3, 4, 5)[4 - dims :], 6)
    residual = torch.randn(*leaves[0].shape[:-1], 6, dtype=torch.float64, requires_grad=True)
    apply: Any = torch.nn.Identity() if activation is None else getattr(torch_F, activation)
    out = F.linear(*leaves, activation=activation, residual=residual)
    expected = apply(torch_F.linear(*leaves) + residual)
    torch.testing.assert_close(out, expected)
    dy = torch.randn_like(out)
    for got, truth in zip(
        torch.autograd.grad(out, (*leaves, residual), dy),
        torch.autograd.grad(expected, (*leaves, residual), dy),
        strict=True,
    ):
        torch.testing.assert_close(got, truth)
    layer = nn.Linear(5, 6, dtype=torch.float64, activation=activation).eval()
    assert ("activation" in repr(layer)) == (activation is not None)
    with torch.no_grad():
        truth = apply(torch_F.linear(leaves[0], layer.weight, layer.bias) + residual)
        for _ in range(2):
            torch.testing.assert_close(layer(leaves[0], residual), truth)


def test_residual_that_spreads() -> None:
    x, weight, bias = problem((2, 3, 4, 5), 6)
    for size in ((6,), (4, 1), (1, 3, 4, 6)):
        residual = torch.randn(size, dtype=torch.float64)
        expected = torch_F.linear(x, weight, bias) + residual
        torch.testing.assert_close(F.linear(x, weight, bias, residual=residual), expected)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((4, 5), torch.float32),
        ((3, 4, 5), torch.float32),
        ((1, 2, 3, 4, 5), torch.float32),
        ((2, 3, 4, 5), torch.bfloat16),
        ((2, 3, 4, 5), torch.int64),
        ((0, 3, 4, 5), torch.float32),
        ((2, 3, 4, 0), torch.float32),
        ((2, 0, 4, 5), torch.float32),
        ((2, 3, 0, 5), torch.float32),
    ],
    ids=str,
)
def test_left_to_torch(size: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.ones(size, dtype=dtype)
    for filters in (3, 0):
        weight = torch.ones(filters, size[-1], dtype=dtype)
        out, expected = F.linear(x, weight), torch_F.linear(x, weight)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()
        assert convolutions(F.linear, x, weight) == 0


def test_no_filters_are_left_to_torch() -> None:
    x, weight = torch.ones(2, 3, 4, 5), torch.ones(0, 5)
    assert F.linear(x, weight).shape == (2, 3, 4, 0)


def test_under_autocast() -> None:
    x, weight, bias = problem((2, 3, 4, 5), 6, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(F.linear(x, weight, bias), torch_F.linear(x, weight, bias))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x[..., 1:], w, b),
        lambda x, w, b: (x, w, b[1:]),
        lambda x, w, b: (x, w.unsqueeze(0).unsqueeze(0), b),
        lambda x, w, b: (x, w.double(), b),
        lambda x, w, b: (x, w, b.double()),
        lambda x, w, b: (x.tolist(), w, b),
    ],
    ids=["channels", "bias", "weight", "weight's type", "bias's type", "no tensor"],
)
def test_errors_are_torchs(change: Callable[..., Any]) -> None:
    arguments = change(*problem((2, 3, 4, 5), 6, torch.float32))
    with pytest.raises(Exception) as expected:
        torch_F.linear(*arguments)
    with pytest.raises(expected.type) as got:
        F.linear(*arguments)
    assert str(got.value) == str(expected.value)


def test_activation_must_exist() -> None:
    with pytest.raises(ValueError, match="swoosh"):
        nn.Linear(3, 4, activation="swoosh")
    with pytest.raises(ValueError, match="swoosh"):
        F.linear(torch.ones(2, 3), torch.ones(4, 3), activation="swoosh")


# --- the layer -----------------------------------------------------------------------------------


def layer() -> nn.Linear:
    return nn.Linear(40, 40, dtype=torch.float64).eval()


def assert_fresh(module: nn.Linear) -> None:
    """The layer computes what its weights say, also from what it keeps."""
    # Of fewer pixels it keeps nothing: see test_packed_weights.
    x = torch.randn(1, 21, 22, module.in_features, dtype=torch.float64)
    with torch.no_grad():
        expected = F.linear(x, module.weight, module.bias)
        for _ in range(2):
            assert torch.equal(module(x), expected)


def _load(module: nn.Linear) -> None:
    module.load_state_dict({k: torch.randn_like(v) for k, v in module.state_dict().items()})


def _turn(module: nn.Linear) -> None:
    module.weight.data = module.weight.data.t()  # the same address


def _replace(module: nn.Linear) -> None:
    module.weight = torch.nn.Parameter(torch.randn_like(module.weight))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.weight.data.mul_(2),
        lambda m: m.weight.requires_grad_(False).mul_(2),
        lambda m: m.weight.data.copy_(torch.randn_like(m.weight)),
        lambda m: m.bias.data.fill_(3),
        lambda m: parametrizations.weight_norm(m),
        lambda m: m.float().double(),
        _load, _turn, _replace,
    ],
)  # fmt: skip
def test_kept_weights_are_never_stale(change: Callable[[nn.Linear], Any]) -> None:
    module = layer()
    assert_fresh(module)
    packed = module._packed_weights
    assert packed is not None
    assert packed.bytes() > 0
    change(module)
    assert_fresh(module)


def test_nothing_is_kept_where_weights_learn() -> None:
    module = layer()
    x = torch.randn(1, 6, 7, 40, dtype=torch.float64)
    module(x).sum().backward()
    assert module._packed_weights is None
    assert module.weight.grad is not None
    assert_fresh(module)
    module.train()
    assert module._packed_weights is None


def test_parameters_can_be_swapped() -> None:
    module = layer()
    assert_fresh(module)
    other = torch.nn.Parameter(torch.randn_like(module.weight))
    torch.utils.swap_tensors(module.weight, other)
    assert_fresh(module)


def test_copies_and_pickles() -> None:
    module = layer()
    assert_fresh(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is nn.Linear
        assert other._packed_weights is None
        assert list(other.state_dict()) == list(module.state_dict()) == ["weight", "bias"]
        assert_fresh(other)


def test_convert_and_restore() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ).double()
    parametrizations.weight_norm(model[2])
    images, rows = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(4, 5).double()
    expected, text = (model(images), model(rows)), repr(model[0])
    assert torchconv.convert(model) is model
    assert [isinstance(m, nn.Linear) for m in model] == [True, False, True]
    assert repr(model[0]) == text
    assert convolutions(model, images) == 2
    assert convolutions(model, rows) == 0
    for x, y in zip((images, rows), expected, strict=True):
        torch.testing.assert_close(model(x), y)
    torchconv.restore(model)
    assert type(model[0]) is torch.nn.Linear
    assert not isinstance(model[2], nn.Linear)
    assert torch.equal(model(images), expected[0])


def test_is_seen_by_what_transforms_it() -> None:
    module = layer()
    x = torch.randn(3, 1, 6, 7, 40, dtype=torch.float64)
    expected = torch.stack([torch_F.linear(image, module.weight, module.bias) for image in x])
    torch.testing.assert_close(torch.func.vmap(module)(x), expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x[0]), expected[0])
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(module))
    torch.testing.assert_close(traced(x[0]), expected[0])
    leaves = problem((1, 2, 3, 4), 2)
    assert torch.autograd.gradcheck(F.linear, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(F.linear, leaves)


# N, C, K: at the limits of what is few, and weights beyond those that are read one after the other.
ROWS = [
    (1, 512, 512),
    (7, 1000, 263),
    (32, 4096, 64),
    (33, 4096, 64),
    (4, 512, 511),
    (2, 4096, 800),
]


@pytest.fixture
def plain_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """As `convolutions`, for calls that nothing may watch."""
    seen: list[Tensor] = []
    convolve = F.conv2d

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(convolve(*args, **kwargs))
        return seen[-1]

    def count(*args: Any, **kwargs: Any) -> int:
        del seen[:]
        F.linear(*args, **kwargs)
        return len(seen)

    monkeypatch.setattr(F, "conv2d", watched)
    return count


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_few_rows(
    dtype: torch.dtype, rows: Any, activation: str | None, plain_calls: Callable[..., int]
) -> None:
    n, c, k = rows
    x, w, b = (t.detach() for t in problem((n, c), k, dtype))
    layer = nn.Linear(c, k, dtype=dtype, activation=activation).eval()
    layer.load_state_dict({"weight": w, "bias": b})
    exact = F.activate(activation, torch_F.linear(x.double(), w.double(), b.double()))
    with torch.no_grad():
        few = n <= 32 and c * k >= 2**18
        assert plain_calls(x, w, b, activation=activation) == few
        for out in (layer(x), F.linear(x, w, b, activation=activation), layer(x)):
            assert out.shape == exact.shape and out.stride() == exact.stride()
            assert relative_error(out, exact) <= LIMITS[dtype]
        assert relative_error(F.linear(x[:, ::2], w[:, ::2], None), x[:, ::2] @ w[:, ::2].T) < 1e-5


def test_few_rows_that_are_pytorchs(plain_calls: Callable[..., int]) -> None:
    """A gradient, another type, a matrix that does not lie in one piece, sizes that do not fit."""
    x, w, b = problem((2, 1024), 512, torch.float32)
    assert not plain_calls(x, w, b)
    x, w, b = x.detach(), w.detach(), b.detach()
    assert plain_calls(x, w, b)
    assert plain_calls(x, w)
    assert not plain_calls(x.bfloat16(), w.bfloat16(), b.bfloat16())
    assert not plain_calls(x[0], w, b)
    assert not plain_calls(x[:0], w, b)
    assert not plain_calls(x, w.T.contiguous().T, b)
    assert not convolutions(F.linear, x, w, b)  # which would be in the graph of a trace
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, w, b).dtype == torch.bfloat16
    for wrong in ((x[:, :-1], w, b), (x, w, b[:-1]), (x.double(), w, b)):
        with pytest.raises(RuntimeError) as error:
            torch_F.linear(*wrong)
        with pytest.raises(RuntimeError) as again:
            F.linear(*wrong)
        assert str(again.value) == str(error.value)
