"""torch.ops.torchconv.* as PyTorch operators: schemas, fakes, derivatives, autocast and tracing.

opcheck is PyTorch's own test of an operator's registration. The rest asks what users of the
operators ask: gradcheck of every derivative formula, also of the second one and in forward mode;
the same results under torch.func, torch.compile and torch.export as in eager mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import FLOATS, assert_accurate, assert_same, in_layout
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as torch_F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import torchconv
import torchconv.functional as F
from torchconv.autograd import (
    AvgPool2dFunction,
    Conv2dFunction,
    MaxPool2dFunction,
    MinPool2dFunction,
)

OPS = torch.ops.torchconv
FORMATS = ("contiguous", "channels_last")
ACTIVATIONS = ("relu", "relu6", "sigmoid", "tanh", "silu", "hardswish", "gelu")

on_formats = pytest.mark.parametrize("layout", FORMATS)

OPERATORS = (
    "conv2d",
    "conv2d_with_preactivation",
    "conv2d_backward",
    "max_pool2d",
    "min_pool2d",
    "max_pool2d_with_offsets",
    "min_pool2d_with_offsets",
    "max_pool2d_with_indices",
    "min_pool2d_with_indices",
    "select_pool2d_backward",
    "select_pool2d_gather",
    "avg_pool2d",
    "avg_pool2d_backward",
)

# input, weight, (stride, padding as left right top bottom, dilation, groups)
CONVOLUTIONS = (
    ((2, 3, 5, 6), (4, 3, 3, 3), ([1, 1], [0, 0, 0, 0], [1, 1], 1)),
    ((2, 4, 7, 6), (6, 2, 3, 2), ([2, 1], [1, 0, 2, 1], [1, 2], 2)),
    ((1, 3, 6, 6), (6, 1, 3, 3), ([2, 2], [1, 1, 1, 1], [1, 1], 3)),
    ((2, 5, 4, 3), (2, 5, 1, 1), ([1, 1], [0, 0, 0, 0], [1, 1], 1)),
)
# input, (kernel_size, stride, padding, dilation, ceil_mode)
POOLINGS = (
    ((2, 3, 6, 5), ([2, 2], [2, 2], [0, 0], [1, 1], False)),
    ((2, 2, 7, 8), ([3, 2], [2, 1], [1, 0], [1, 2], True)),
    ((1, 2, 1, 5), ([2, 2], [1, 1], [1, 1], [2, 2], False)),  # windows with no valid element
)
# input, (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
AVERAGES = (
    ((2, 3, 6, 5), ([2, 2], [2, 2], [0, 0], False, True, None)),
    ((2, 2, 7, 8), ([3, 4], [2, 3], [1, 2], True, False, None)),
    ((1, 2, 5, 6), ([3, 2], [1, 1], [1, 0], False, True, 5)),
)


def distinct(*size: int) -> Tensor:
    """Values that no small step makes equal: a selection is differentiable only there."""
    count = torch.Size(size).numel()
    return torch.randperm(count).view(size).double() / 4


def samples(name: str, layout: str, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Any, ...]]:
    """Arguments of an operator in its normal form, every tensor that has a gradient asking for it."""

    def leaf(t: Tensor) -> Tensor:
        laid = in_layout(t, layout) if t.dim() == 4 else t
        return laid.detach().to(dtype).requires_grad_()

    if name.startswith("conv2d"):
        for (x_size, w_size, geometry), activation, flip in zip(
            CONVOLUTIONS * 2, ("none", *ACTIVATIONS), itertools.cycle((False, True)), strict=False
        ):
            x, w, b = (leaf(torch.randn(s)) for s in (x_size, w_size, w_size[:1]))
            y, z = OPS.conv2d_with_preactivation(
                x.detach(), w.detach(), b.detach(), *geometry, activation, flip
            )
            if name != "conv2d_backward":
                yield (x, w, b, *geometry, activation, flip)
                yield (x, w, None, *geometry, activation, flip)
                continue
            by_output = activation in ("relu", "relu6", "sigmoid", "tanh")
            saved = None if activation == "none" else y if by_output else z
            for mask in ([True, True, True], [False, True, False]):
                yield (leaf(torch.randn_like(y)), x, w, saved, *geometry, activation, flip, mask)
    elif name.startswith("avg"):
        for size, arguments in AVERAGES:
            x = leaf(torch.randn(size))
            if name == "avg_pool2d":
                yield (x, *arguments)
            else:
                dy = leaf(torch.randn_like(OPS.avg_pool2d(x.detach(), *arguments)))
                yield (dy, list(size), *arguments, layout == "channels_last")
    else:
        for size, arguments in POOLINGS:
            x = leaf(distinct(*size))
            if not name.startswith("select"):
                yield (x, *arguments)
                continue
            for op in (OPS.max_pool2d_with_offsets, OPS.min_pool2d_with_indices):
                y, selected = op(x.detach(), *arguments)
                if name == "select_pool2d_gather":
                    yield (x, selected, *arguments[:4])
                else:
                    dy = leaf(torch.randn_like(y))
                    channels_last = layout == "channels_last"
                    yield (dy, selected, list(size), *arguments[:4], channels_last)


# --- registration --------------------------------------------------------------------------------


def test_every_operator_is_listed() -> None:
    names = torch._C._dispatch_get_all_op_names()
    assert sorted(n for n in names if n.startswith("torchconv::")) == sorted(
        f"torchconv::{n}" for n in OPERATORS
    )


@on_formats
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, layout: str) -> None:
    """Schema, autograd registration, fake tensors, and compilation with dynamic shapes."""
    for arguments in samples(name, layout, torch.float32):
        torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_without_gradient(name: str) -> None:
    for arguments in samples(name, "contiguous", torch.bfloat16):
        detached = tree_map_only(Tensor, Tensor.detach, arguments)
        torch.library.opcheck(getattr(OPS, name).default, detached)


@on_formats
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_fake_equals_real(name: str, dtype: torch.dtype, layout: str) -> None:
    """Size, dtype and exact strides of every output, from fake and from meta tensors."""
    for arguments in samples(name, layout, dtype):
        detached = tree_map_only(Tensor, Tensor.detach, arguments)
        real = tree_flatten(getattr(OPS, name)(*detached))[0]
        with FakeTensorMode() as mode:
            faked = tree_map_only(Tensor, mode.from_tensor, detached)
            fake = tree_flatten(getattr(OPS, name)(*faked))[0]
        meta_arguments = tree_map_only(Tensor, lambda t: t.to("meta"), detached)
        meta = tree_flatten(getattr(OPS, name)(*meta_arguments))[0]
        for out, *predictions in zip(real, fake, meta, strict=True):
            for prediction in predictions:
                assert prediction.dtype == out.dtype
                assert prediction.shape == out.shape
                assert prediction.stride() == out.stride()


def awkward(n: int, c: int, h: int, w: int) -> Iterator[Tensor]:
    """Tensors whose memory format is a matter of opinion: sizes of one, gaps, permutations."""
    plain = torch.randn(n, c, h, w)
    yield plain
    yield plain.contiguous(memory_format=torch.channels_last)
    yield torch.randn(n, 2 * c, h, w).contiguous(memory_format=torch.channels_last)[:, ::2]
    yield torch.randn(n, c, w, h).transpose(2, 3)
    yield torch.randn(c, n, h, w).transpose(0, 1)
    yield torch.randn(n, c, h, 1).expand(n, c, h, w)
    yield torch.randn(1, 1, h, w).expand(n, c, h, w)
    yield torch.randn(n, h, w, c).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "sizes",
    [
        ((2, 3, 4, 5), (4, 3, 2, 2)),
        ((2, 1, 4, 5), (4, 1, 2, 2)),
        ((1, 3, 4, 5), (1, 3, 2, 2)),
        ((2, 3, 1, 1), (4, 3, 1, 1)),
        ((2, 3, 4, 5), (1, 3, 1, 1)),
        ((1, 1, 1, 5), (1, 1, 1, 1)),
        ((0, 3, 4, 5), (4, 3, 2, 2)),
        ((2, 3, 2, 2), (4, 3, 2, 2)),
    ],
    ids=str,
)
def test_strides_equal_pytorchs(sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Of real and fake results, whatever the inputs look like in memory."""
    x_size, w_size = sizes
    for x, w in itertools.product(awkward(*x_size), awkward(*w_size)):
        expected = torch_F.conv2d(x, w).stride()
        assert F.conv2d(x, w).stride() == expected, (x.stride(), w.stride())
        with FakeTensorMode() as mode:
            assert F.conv2d(mode.from_tensor(x), mode.from_tensor(w)).stride() == expected
    for x in awkward(*x_size):
        k = w_size[2:]
        expected = torch_F.max_pool2d(x, k, 1).stride()
        average = torch_F.avg_pool2d(x, k, 1).stride()
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(x)
            assert F.max_pool2d(fake, k, 1).stride() == expected
            assert F.avg_pool2d(fake, k, 1).stride() == average
        assert F.max_pool2d(x, k, 1).stride() == expected, x.stride()
        assert F.min_pool2d(x, k, 1).stride() == expected
        assert F.avg_pool2d(x, k, 1).stride() == average


# --- derivatives ---------------------------------------------------------------------------------

CHECKED = {
    "check_forward_ad": True,
    "check_backward_ad": True,
    "check_batched_grad": True,
    "check_batched_forward_grad": True,
}
CHECKED_TWICE = {
    "check_fwd_over_rev": True,
    "check_rev_over_rev": True,
    "check_batched_grad": True,
    "gen_non_contig_grad_outputs": True,
}


def small_convolution(layout: str, groups: int = 1) -> list[Tensor]:
    x = in_layout(torch.randn(2, 2, 4, 3, dtype=torch.float64), layout)
    w = in_layout(torch.randn(2, 2 // groups, 2, 2, dtype=torch.float64), layout)
    b = torch.randn(2, dtype=torch.float64)
    return [t.requires_grad_() for t in (x, w, b)]


@on_formats
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"stride": (2, 1), "padding": (1, 0, 2, 1), "dilation": (1, 2)},
        {"groups": 2, "padding": 1},
        {"flip_kernel": True, "padding": "same", "stride": 2},
        {"groups": 2, "flip_kernel": True, "padding": (1, -1, 0, 1)},
    ],
    ids=str,
)
def test_gradcheck_conv2d(kwargs: dict[str, Any], layout: str) -> None:
    leaves = small_convolution(layout, kwargs.get("groups", 1))

    def op(*args: Tensor) -> Tensor:
        return F.conv2d(*args, **kwargs)

    assert gradcheck(op, leaves, **CHECKED)
    assert gradgradcheck(op, leaves, **CHECKED_TWICE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@on_formats
def test_gradcheck_activation(activation: str, layout: str) -> None:
    leaves = small_convolution(layout)

    def op(*args: Tensor) -> Tensor:
        return F.conv2d(*args, padding=1, stride=2, activation=activation)

    assert gradcheck(op, leaves, **CHECKED)
    assert gradgradcheck(op, leaves, **CHECKED_TWICE)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
@pytest.mark.parametrize("activation", [None, "sigmoid", "gelu"])
def test_gradcheck_of_some_operands(activation: str | None, needs: tuple[bool, ...]) -> None:
    """Every subset of input, weight and bias, in all orders of differentiation."""
    leaves = small_convolution("contiguous")
    for t, n in zip(leaves, needs, strict=True):
        t.requires_grad_(n)

    def op(*args: Tensor) -> Tensor:
        return F.conv2d(*args, padding=1, stride=2, activation=activation)

    assert gradcheck(op, leaves, check_forward_ad=True)
    assert gradgradcheck(op, leaves, check_fwd_over_rev=True)


@on_formats
@pytest.mark.parametrize("op", [F.max_pool2d, F.min_pool2d])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 1, "padding": 1},
        {"kernel_size": 2, "stride": 1, "dilation": 2, "padding": 1},
        {"kernel_size": 2, "stride": 3, "ceil_mode": True},
    ],
    ids=str,
)
def test_gradcheck_select(op: Callable[..., Any], kwargs: dict[str, Any], layout: str) -> None:
    x = in_layout(distinct(2, 2, 4, 5), layout).requires_grad_()
    for function in (
        lambda t: op(t, **kwargs),
        lambda t: op(t, **kwargs, return_indices=True)[0],
    ):
        assert gradcheck(function, (x,), **CHECKED)
        assert gradgradcheck(function, (x,), **CHECKED_TWICE)


@on_formats
@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 1, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
        {"kernel_size": 2, "stride": 3, "ceil_mode": True, "divisor_override": 3},
    ],
    ids=str,
)
def test_gradcheck_average(kwargs: dict[str, Any], layout: str) -> None:
    x = in_layout(torch.randn(2, 2, 4, 5, dtype=torch.float64), layout).requires_grad_()
    assert gradcheck(lambda t: F.avg_pool2d(t, **kwargs), (x,), **CHECKED)
    assert gradgradcheck(lambda t: F.avg_pool2d(t, **kwargs), (x,), **CHECKED_TWICE)


@on_formats
@pytest.mark.parametrize(
    "name", ["conv2d_backward", "select_pool2d_backward", "select_pool2d_gather"]
)
def test_gradcheck_of_the_other_operators(name: str, layout: str) -> None:
    """A backward is an operator with a derivative of its own."""
    for arguments in samples(name, layout):
        tensors = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]
        if name == "conv2d_backward" and arguments[8] != "none":
            continue  # differentiated through conv2d, where z follows the inputs

        def op(*leaves: Tensor) -> Any:
            full = list(arguments)  # noqa: B023
            for place, tensor in zip(places, leaves, strict=True):  # noqa: B023
                full[place] = tensor
            out = getattr(OPS, name)(*full)
            flat = out if isinstance(out, tuple) else (out,)
            return tuple(t for t in flat if t.requires_grad or t.numel() > 0)

        assert gradcheck(op, tensors, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(op, tensors, fast_mode=True)


FUNCTIONS: dict[str, tuple[Any, Callable[[], list[Any]]]] = {
    "conv2d": (
        Conv2dFunction,
        lambda: [
            *small_convolution("contiguous"),
            *((2, 1), (1, 0, 1, 1), (1, 1), 1, "none", False),
        ],
    ),
    "conv2d_relu": (
        Conv2dFunction,
        lambda: [
            *small_convolution("channels_last"),
            *((1, 1), (1, 0, 1, 1), (1, 2), 1, "relu", True),
        ],
    ),
    "conv2d_gelu": (
        Conv2dFunction,
        lambda: [
            *small_convolution("contiguous"),
            *((1, 1), (0, 0, 0, 0), (1, 1), 1, "gelu", False),
        ],
    ),
    "max_pool2d": (
        MaxPool2dFunction,
        lambda: [distinct(2, 2, 4, 5).requires_grad_(), (3, 2), (2, 1), (1, 0), (1, 2), False],
    ),
    "min_pool2d": (
        MinPool2dFunction,
        lambda: [distinct(2, 2, 4, 5).requires_grad_(), (3, 2), (2, 1), (1, 0), (1, 2), True],
    ),
    "avg_pool2d": (
        AvgPool2dFunction,
        lambda: [
            torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True),
            *((3, 2), (2, 1), (1, 0), True, False, None),
        ],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_apply(name: str) -> None:
    """torchconv.autograd's Functions, used directly, are the operators' own derivatives."""
    function, make = FUNCTIONS[name]
    arguments = make()
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    rest = arguments[len(tensors) :]

    def apply(*leaves: Tensor) -> Tensor:
        out = function.apply(*leaves, *rest)
        return out[0] if isinstance(out, tuple) else out

    def operator(*leaves: Tensor) -> Tensor:
        return getattr(OPS, name.split("_relu")[0].split("_gelu")[0])(*leaves, *rest)

    assert isinstance(function, type) and issubclass(function, torch.autograd.Function)
    y, expected = apply(*tensors), operator(*tensors)
    assert_same(y, expected)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, tensors, dy)
    for gradient, other in zip(got, torch.autograd.grad(expected, tensors, dy), strict=True):
        assert_same(gradient, other)
    assert gradcheck(apply, tensors, check_forward_ad=True)
    assert gradgradcheck(apply, tensors)


def test_third_derivative() -> None:
    """d3/dt3 of a smooth loss along one direction, against PyTorch."""
    x, w, _ = small_convolution("contiguous")
    direction = torch.randn_like(w)

    def along(op: Callable[..., Tensor], t: Tensor) -> Tensor:
        return op(x, w + t * direction).pow(3).sum()

    t = torch.zeros((), dtype=torch.float64)
    ours = grad(grad(grad(lambda s: along(F.conv2d, s))))(t)
    theirs = grad(grad(grad(lambda s: along(torch_F.conv2d, s))))(t)
    torch.testing.assert_close(ours, theirs)


def test_gradient_of_a_gradient_penalty() -> None:
    """|dL/dx|^2 as part of a loss (pytorch#2106), through conv, activation and pooling."""
    model = nn.Sequential(
        torchconv.nn.Conv2d(2, 3, 3, dtype=torch.float64),
        nn.Tanh(),
        torchconv.nn.MaxPool2d(2),
        torchconv.nn.AvgPool2d(2),
    )
    twin = nn.Sequential(
        nn.Conv2d(2, 3, 3, dtype=torch.float64), nn.Tanh(), nn.MaxPool2d(2), nn.AvgPool2d(2)
    )
    twin.load_state_dict(model.state_dict())
    gradients = []
    for net in (model, twin):
        x = torch.ones(1, 2, 10, 10, dtype=torch.float64).cumsum(2).sin().requires_grad_()
        (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        gradients.append(torch.autograd.grad(dx.square().sum(), list(net.parameters())[:1]))
    torch.testing.assert_close(gradients[0], gradients[1])


# --- torch.func ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (0, 0, 0), (None, 0, None), (1, 2, 1), (None, None, 0), (0, None, 0)]
)
@pytest.mark.parametrize("kwargs", [{}, {"groups": 2, "padding": 1, "activation": "gelu"}], ids=str)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_vmap_conv2d(in_dims: tuple[int | None, ...], kwargs: dict[str, Any], batched: bool) -> None:
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


# --- autocast, grad modes ------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_autocast(dtype: torch.dtype, inside: torch.dtype) -> None:
    """The dtype of every result is what PyTorch's function gives under the same autocast."""
    x = torch.randn(2, 3, 8, 8).to(dtype).requires_grad_()
    w, b = torch.randn(4, 3, 3, 3).to(dtype).requires_grad_(), torch.randn(4).to(dtype)
    with torch.autocast("cpu", inside):
        expected = torch_F.conv2d(x, w, b)
        z = F.conv2d(x, w, b)
        activated = F.conv2d(x, w, b, activation="gelu")
        for op in ("max_pool2d", "avg_pool2d"):
            pooled, theirs = getattr(F, op)(x, 2), getattr(torch_F, op)(x, 2)
            assert pooled.dtype == theirs.dtype
        assert F.min_pool2d(x, 2).dtype == torch_F.max_pool2d(x, 2).dtype
    assert z.dtype == activated.dtype == expected.dtype
    rounded = [t.detach().to(z.dtype).double() for t in (x, w, b)]
    assert_accurate(z, torch_F.conv2d(*rounded))
    dx, dw = torch.autograd.grad(activated.sum(), (x, w))
    assert dx.dtype == x.dtype and dw.dtype == w.dtype


def test_autocast_mixes_dtypes() -> None:
    """As F.conv2d, autocast makes one dtype of a float32 weight and a bfloat16 input."""
    x, w = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16), torch.randn(4, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.conv2d(x, w).dtype == torch.bfloat16
    with torch.autocast("cpu", enabled=False), pytest.raises(RuntimeError):
        F.conv2d(x, w)


def test_no_grad_and_inference_mode() -> None:
    x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)

    def run() -> Tensor:
        return F.avg_pool2d(F.max_pool2d(F.conv2d(x, w, activation="gelu"), 2), 2)

    expected = run()
    assert expected.requires_grad
    with torch.no_grad():
        quiet = run()
    with torch.inference_mode():
        inference = run()
        assert inference.is_inference()
    assert not quiet.requires_grad
    assert torch.equal(quiet, expected) and torch.equal(inference, expected)


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_inference_keeps_nothing_for_backward() -> None:
    """Neither offsets nor a pre-activation are computed where no gradient is wanted."""
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with _Calls() as calls:
        F.min_pool2d(F.max_pool2d(F.conv2d(x, w, activation="gelu"), 2), 2)
    assert calls.names == ["torchconv::conv2d", "torchconv::max_pool2d", "torchconv::min_pool2d"]


@pytest.mark.parametrize(
    ("kernel", "dtype"), [(2, torch.uint8), ((16, 16), torch.uint16), ((300, 300), torch.int32)]
)
@pytest.mark.parametrize("op", [F.max_pool2d, F.min_pool2d])
def test_pooling_keeps_one_byte_an_output(
    op: Callable[..., Tensor], kernel: Any, dtype: torch.dtype
) -> None:
    """Offsets in the window for backward, an eighth of int64 indices; neither input nor output."""
    x = torch.randn(1, 1, 300, 300, requires_grad=True)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = op(x, kernel)
    assert [t.dtype for t in kept] == [dtype] and kept[0].numel() == y.numel()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.sum() == y.numel()


def test_average_pooling_keeps_nothing() -> None:
    kept: list[Tensor] = []
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        F.avg_pool2d(x, 2)
    assert kept == []


def test_a_changed_operand_is_noticed() -> None:
    """Autograd's own check that nobody wrote to a tensor that backward needs."""
    x, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3, requires_grad=True)
    z = F.conv2d(x, w)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_meta_tensors() -> None:
    """Shapes without memory: 2^50 elements are no obstacle."""
    x = torch.empty(2**20, 3, 2**15, 2**15, device="meta", dtype=torch.bfloat16)
    w = torch.empty(4, 3, 3, 3, device="meta", dtype=torch.bfloat16, requires_grad=True)
    z = F.conv2d(x, w, stride=2, padding=1, activation="silu")
    assert z.shape == (2**20, 4, 2**14, 2**14) and z.is_meta and z.dtype == torch.bfloat16
    y, indices = F.max_pool2d(z, 2, return_indices=True)
    assert y.shape == indices.shape == (2**20, 4, 2**13, 2**13) and indices.dtype == torch.int64
    F.avg_pool2d(y, 2).sum().backward()
    assert w.grad is not None and w.grad.is_meta and w.grad.shape == w.shape


def test_deterministic_algorithms_are_no_obstacle() -> None:
    """What pytorch#131972 and others ask for: nothing here is nondeterministic."""
    x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        y = F.min_pool2d(F.avg_pool2d(F.max_pool2d(F.conv2d(x, w), 2), 2, 1), 2)
        y.sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert x.grad is not None and w.grad is not None


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
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    w, b = torch.randn(4, 4, 3, 3), torch.randn(4)
    for n, h, v in ((2, 9, 10), (3, 12, 13), (5, 20, 31)):
        compiled(torch.randn(n, 4, h, v), w, b)
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
    from torch.fx.experimental.proxy_tensor import make_fx

    w, b = torch.randn(4, 4, 3, 3), torch.randn(4)
    graph = make_fx(step, tracing_mode="symbolic")(torch.randn(2, 4, 9, 10), w, b)
    x = torch.randn(3, 4, 13, 12)
    for got, expected in zip(graph(x, w, b), step(x, w, b), strict=True):
        assert_same(got, expected)
