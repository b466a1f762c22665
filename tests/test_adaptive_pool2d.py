"""adaptive_avg_pool2d and adaptive_max_pool2d: functions, operators, modules, convert and patch.

The maximum is exact: the same bits, indices and strides as PyTorch. The average is compared with
PyTorch's in float64. Sizes cover windows that divide the image (which ordinary pooling's kernels
compute), windows that overlap, and outputs larger than the image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap

import torchconv
import torchconv.functional as F
from conftest import (
    FLOATS,
    LAYOUTS,
    assert_accurate,
    assert_same,
    cpu_only,
    everywhere,
    in_layout,
    threads,
)
from oracle import torch_F
from torchconv.autograd import AdaptiveAvgPool2dFunction, AdaptiveMaxPool2dFunction

pytestmark = everywhere

OPS = torch.ops.torchconv
FORMATS = ("contiguous", "channels_last")
# input size, output size
CASES: dict[str, tuple[tuple[int, ...], Any]] = {
    "global": ((2, 5, 7, 6), 1),
    "global_many_channels": ((2, 67, 7, 7), (1, 1)),
    "divides": ((2, 5, 12, 8), (3, 4)),
    "divides_one_axis": ((2, 5, 12, 7), (3, 3)),
    "same_size": ((2, 5, 6, 7), (6, 7)),
    "overlaps": ((2, 5, 13, 11), (6, 4)),
    "overlaps_many_channels": ((1, 83, 13, 10), (5, 7)),
    "one_row_of_outputs": ((2, 3, 9, 40), (1, 7)),
    "one_column_of_outputs": ((2, 3, 9, 71), (4, 1)),
    "wide": ((1, 2, 7, 150), (3, 64)),
    "tall": ((2, 3, 150, 5), (4, 3)),
    "large_windows": ((1, 2, 70, 67), (3, 2)),
    "one_large_image": ((1, 2, 80, 71), (30, 20)),
    "larger_than_input": ((2, 5, 3, 4), (7, 9)),
    "multiple_of_input": ((2, 17, 3, 4), (6, 8)),
    "larger_and_smaller": ((2, 5, 3, 11), (8, 4)),
    "from_one_pixel": ((2, 5, 1, 1), (3, 2)),
    "one_pixel": ((3, 5, 1, 1), 1),
    "one_channel": ((2, 1, 9, 8), (4, 3)),
    "empty_batch": ((0, 3, 9, 8), (4, 3)),
    "empty_output": ((2, 3, 9, 8), (0, 3)),
    "none_in_pair": ((2, 3, 9, 8), (None, 3)),
}
on_cases = pytest.mark.parametrize("case", CASES)
on_dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
on_formats = pytest.mark.parametrize("layout", FORMATS)
POOLINGS = ("adaptive_avg_pool2d", "adaptive_max_pool2d")
on_poolings = pytest.mark.parametrize("op", POOLINGS)


def distinct(*size: int) -> Tensor:
    """Values that no small step makes equal: a selection is differentiable only there."""
    return torch.randperm(torch.Size(size).numel()).view(size).double() / 4


# --- against PyTorch -----------------------------------------------------------------------------


@on_formats
@on_dtypes
@on_cases
def test_max(case: str, dtype: torch.dtype, layout: str) -> None:
    """The same bits, with few distinct values, so that ties (and zeros of both signs) are many."""
    size, output_size = CASES[case]
    x = torch.randint(-3, 3, size).to(dtype)
    x = in_layout(torch.where((x == 0) & (torch.rand(size) < 0.5), -0.0, x), layout)
    x.requires_grad_()
    expected, indices = torch_F.adaptive_max_pool2d(x, output_size, return_indices=True)
    y = F.adaptive_max_pool2d(x, output_size)
    both = F.adaptive_max_pool2d(x, output_size, return_indices=True)
    assert_same(both[0], expected)
    assert_same(both[1], indices)
    assert y.stride() == expected.stride() and y.dtype == dtype and torch.equal(y, expected)
    with torch.no_grad():
        inferred = F.adaptive_max_pool2d(x, output_size)
    assert inferred.stride() == expected.stride() and torch.equal(inferred, expected)
    dy = in_layout(torch.randint(-4, 5, y.shape).to(dtype), layout)
    for output in (y, both[0]):
        (dx,) = torch.autograd.grad(output, x, dy, retain_graph=True)
        if y.numel() == 0:  # PyTorch refuses to differentiate this
            assert dx.shape == x.shape and not dx.any()
            continue
        (torchs,) = torch.autograd.grad(expected, x, dy, retain_graph=True)
        assert_same(dx, torchs)


@on_formats
@on_dtypes
@on_cases
def test_avg(case: str, dtype: torch.dtype, layout: str) -> None:
    size, output_size = CASES[case]
    x = in_layout(torch.randn(size).to(dtype), layout).requires_grad_()
    truth_x = x.detach().double().requires_grad_()
    truth = torch_F.adaptive_avg_pool2d(truth_x, output_size)
    y = F.adaptive_avg_pool2d(x, output_size)
    assert_accurate(y, truth)
    assert y.dtype == dtype
    assert y.stride() == torch_F.adaptive_avg_pool2d(x, output_size).stride()
    dy = in_layout(torch.randn(y.shape).to(dtype), layout)
    (dx,) = torch.autograd.grad(y, x, dy)
    if y.numel() == 0:
        assert dx.shape == x.shape and not dx.any()
        return
    # PyTorch's gradient of the global average is contiguous in any format.
    assert dx.stride() == x.stride()
    (truth_dx,) = torch.autograd.grad(truth, truth_x, dy.double())
    assert_accurate(dx, truth_dx)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["global", "divides", "overlaps", "larger_than_input"])
@on_poolings
def test_any_strides(op: str, case: str, layout: str) -> None:
    size, output_size = CASES[case]
    plain = torch.randint(-6, 7, size).double()
    x = in_layout(plain, layout).requires_grad_()
    y, expected = getattr(F, op)(x, output_size), getattr(torch_F, op)(x, output_size)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    dy = in_layout(torch.randint(-4, 5, y.shape).double(), layout)
    (dx,), (torchs,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
    torch.testing.assert_close(dx, torchs, rtol=1e-14, atol=1e-14)
    assert torch.equal(x, plain)


@on_poolings
def test_expanded(op: str) -> None:
    """Stride 0 in the input and in the incoming gradient."""
    x = torch.randn(1, 3, 6, 7).double().expand(4, -1, -1, -1).requires_grad_()
    for output_size in (1, 2, (4, 5)):
        y, expected = getattr(F, op)(x, output_size), getattr(torch_F, op)(x, output_size)
        torch.testing.assert_close(y, expected)
        (dx,), (torchs,) = (torch.autograd.grad(out.sum(), x) for out in (y, expected))
        torch.testing.assert_close(dx, torchs)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("output_size", [1, (2, 3), (4, 5), (9, 9), (None, 2), [3, None]])
@on_poolings
def test_unbatched(op: str, output_size: Any, transposed: bool) -> None:
    x = torch.randn(6, 7, 5).permute(2, 0, 1) if transposed else torch.randn(5, 6, 7)
    x.requires_grad_()
    y, expected = getattr(F, op)(x, output_size), getattr(torch_F, op)(x, output_size)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
    dy = torch.randn(y.shape)
    (dx,), (torchs,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
    torch.testing.assert_close(dx, torchs)
    if op == "adaptive_max_pool2d":
        indices = F.adaptive_max_pool2d(x, output_size, True)[1]
        assert_same(indices, torch_F.adaptive_max_pool2d(x, output_size, True)[1])


class Pair:
    """Two sizes without being any kind of sequence that Python knows."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return (3, 2)[index]


SIZES = [
    3,
    (3, 2),
    [None, 2],
    torch.Size([3, 2]),
    torch.tensor([3, 2], dtype=torch.int32),
    torch.tensor([[3], [2]]),
    (torch.tensor(3), torch.tensor([2])),
    np.array([3, 2]),
    np.array([None, 2]),
    (np.int64(3), np.uint8(2)),
    range(2, 4),
    Pair(),
    # Refused, by PyTorch as by us.
    *(None, True, 3.0, "ab", "", (3.0, 2), (True, True), 2**63, -1, (3,), (), (3, 2, 1), range(4)),
    *(torch.tensor(3), torch.tensor([3.0, 2.0]), torch.tensor([3]), np.array(3), np.int64(3)),
    *(np.array([3.0, 2.0]), torch.tensor([[3, 2]]), ([3, 2], 2), iter((3, 2)), {3: 2}, (2, "a")),
]


@pytest.mark.parametrize("size", SIZES)
@on_poolings
def test_spellings_of_the_output_size(op: str, size: Any) -> None:
    """Those that PyTorch takes and no others, with its errors, by function and module."""

    def outcome(pool: Callable[[Tensor], Tensor], x: Tensor) -> Any:
        try:
            return tuple(pool(x).shape)
        except (RuntimeError, TypeError, ValueError) as error:
            return type(error)

    name = {"adaptive_avg_pool2d": "AdaptiveAvgPool2d", "adaptive_max_pool2d": "AdaptiveMaxPool2d"}
    for dims in (4, 3, 2, 1):
        x = torch.randn((1, 2, 6, 7)[-dims:])
        expected = outcome(lambda t: getattr(torch_F, op)(t, size), x)
        assert outcome(lambda t: getattr(F, op)(t, size), x) == expected
        assert outcome(getattr(torchconv.nn, name[op])(size), x) == expected
        converted = torchconv.convert(nn.Sequential(getattr(nn, name[op])(size)))
        assert outcome(converted, x) == expected


@on_formats
@pytest.mark.parametrize("output_size", [1, (2, 3), (4, 5), (9, 11), (3, 1)])
def test_nan_and_infinity(output_size: Any, layout: str) -> None:
    """The last NaN of a window is selected; -inf everywhere selects the first element."""
    x = torch.randn(4, 19, 8, 41)
    x[torch.rand(x.shape) < 0.1] = float("nan")
    x[1] = float("-inf")
    x[2] = float("nan")
    x[3, :, 3:5, 2:4] = float("inf")
    x = in_layout(x, layout)
    y, indices = F.adaptive_max_pool2d(x, output_size, return_indices=True)
    expected = torch_F.adaptive_max_pool2d(x, output_size, return_indices=True)
    assert_same(y, expected[0])
    assert_same(indices, expected[1])
    torch.testing.assert_close(
        F.adaptive_avg_pool2d(x, output_size),
        torch_F.adaptive_avg_pool2d(x, output_size),
        equal_nan=True,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_formats
def test_half_types_add_up_in_float32(dtype: torch.dtype, layout: str) -> None:
    """A running sum in the half type itself would stop growing at 256 or 2048."""
    x = in_layout(torch.ones(1, 3, 90, 91, dtype=dtype), layout).requires_grad_()
    y = F.adaptive_avg_pool2d(x, (2, 2))
    assert torch.equal(y, torch.ones_like(y))
    z = torch.zeros(1, 3, 2, 2, dtype=dtype).requires_grad_()
    (dz,) = torch.autograd.grad(F.adaptive_avg_pool2d(z, (91, 91)).sum(), z)
    assert_accurate(dz, torch_F_gradient(z, (91, 91)))


def torch_F_gradient(x: Tensor, output_size: Any) -> Tensor:
    x = x.detach().double().requires_grad_()
    return torch.autograd.grad(torch_F.adaptive_avg_pool2d(x, output_size).sum(), x)[0]


def test_no_channels() -> None:
    """PyTorch takes these for the average only."""
    x = torch.randn(2, 0, 5, 6, requires_grad=True)
    y = F.adaptive_avg_pool2d(x, (2, 3))
    assert y.shape == (2, 0, 2, 3)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    with pytest.raises(RuntimeError, match="non-zero size"):
        F.adaptive_max_pool2d(x, (2, 3))


# --- errors --------------------------------------------------------------------------------------

IMAGE = torch.zeros(2, 3, 5, 6)
# what is wrong: arguments; PyTorch raises the same class for them
WRONG: dict[str, Callable[[], tuple[Any, ...]]] = {
    "negative": lambda: (IMAGE, (-1, 2)),
    "negative_int": lambda: (IMAGE, -3),
    "one_value": lambda: (IMAGE, (2,)),
    "three_values": lambda: (IMAGE, (2, 3, 4)),
    "no_values": lambda: (IMAGE, ()),
    "float": lambda: (IMAGE, 2.0),
    "float_in_pair": lambda: (IMAGE, (1.0, 2)),
    "bool": lambda: (IMAGE, True),
    "bool_in_pair": lambda: (IMAGE, (True, 2)),
    "word": lambda: (IMAGE, ("a", 2)),
    "none": lambda: (IMAGE, None),
    "far_too_large": lambda: (IMAGE, 2**40),
    "no_rows": lambda: (torch.zeros(2, 3, 0, 6), 2),
    "no_columns": lambda: (torch.zeros(3, 5, 0), 2),
    "two_dimensions": lambda: (torch.zeros(5, 6), 2),
    "two_dimensions_and_pair": lambda: (torch.zeros(5, 6), (2, 2)),
    "five_dimensions": lambda: (torch.zeros(1, 2, 3, 5, 6), 2),
    "five_dimensions_and_pair": lambda: (torch.zeros(1, 2, 3, 5, 6), (2, 2)),
    "int64": lambda: (torch.zeros(2, 3, 5, 6, dtype=torch.int64), 2),
    "bool_image": lambda: (torch.zeros(2, 3, 5, 6, dtype=torch.bool), 2),
    "complex": lambda: (torch.zeros(2, 3, 5, 6, dtype=torch.complex64), 2),
}


@cpu_only
@pytest.mark.parametrize("case", WRONG)
@on_poolings
def test_errors_have_pytorchs_class(op: str, case: str) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
        getattr(torch_F, op)(*WRONG[case]())
    with pytest.raises(Exception) as ours:
        getattr(F, op)(*WRONG[case]())
    assert type(ours.value) is type(theirs.value), (ours.value, theirs.value)


@on_poolings
def test_unbatched_image_without_channels(op: str) -> None:
    x = torch.zeros(0, 5, 6, requires_grad=True)
    got, expected = getattr(F, op)(x, 2), getattr(torch_F, op)(x, 2)
    assert_same(got, expected)
    assert torch.autograd.grad(got.sum(), x)[0].shape == x.shape


@cpu_only
@pytest.mark.parametrize("sizes", [torch.tensor([True, True]), (2, torch.tensor(True))], ids=str)
def test_bool_tensors_as_sizes(sizes: Any) -> None:
    for module in (F, torch_F):
        with pytest.raises(RuntimeError):
            module.adaptive_avg_pool2d(IMAGE, sizes)
    assert_same(F.adaptive_max_pool2d(IMAGE, sizes), torch_F.adaptive_max_pool2d(IMAGE, sizes))


@cpu_only
def test_operators_refuse_what_does_not_belong_together() -> None:
    dy, indices = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2, dtype=torch.int64)
    for call in (
        lambda: OPS.adaptive_avg_pool2d(IMAGE[0], [2, 2]),
        lambda: OPS.adaptive_avg_pool2d_backward(dy, [2, 4, 5, 6], False),
        lambda: OPS.adaptive_avg_pool2d_backward(dy, [2, 3, 0, 6], False),
        lambda: OPS.adaptive_avg_pool2d_backward(dy, [2, 3, 5], False),
        lambda: OPS.adaptive_max_pool2d_backward(dy, indices[:, :2], [2, 3, 5, 6], False),
        lambda: OPS.adaptive_max_pool2d_backward(dy, indices.int(), [2, 3, 5, 6], False),
        lambda: OPS.adaptive_max_pool2d_gather(IMAGE, indices[:1]),
        lambda: OPS.adaptive_max_pool2d_gather(IMAGE, indices.float()),
        lambda: OPS.adaptive_avg_pool2d(IMAGE.long(), [2, 2]),
    ):
        with pytest.raises(RuntimeError):
            call()


@on_formats
@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_wrong_indices_touch_no_memory(size: tuple[int, int], layout: str) -> None:
    x = in_layout(torch.randn(2, 19, *size), layout)
    dy = in_layout(torch.randn(2, 19, 3, 4), layout)
    pixels = size[0] * size[1]
    for wrong in (-1, pixels, 2**62 + pixels, -(2**63) + pixels, 2**32 - 1):
        indices = torch.full_like(dy, wrong, dtype=torch.int64)
        dx = OPS.adaptive_max_pool2d_backward(dy, indices, x.shape, layout == "channels_last")
        assert not dx.any()
        assert not OPS.adaptive_max_pool2d_gather(x, indices).any()


# --- operators -----------------------------------------------------------------------------------


def samples(name: str, layout: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of an operator, every tensor that has a gradient asking for it."""
    channels_last = layout == "channels_last"
    for size, output_size in (
        ((2, 2, 6, 4), [3, 2]),
        ((2, 3, 5, 4), [2, 3]),
        ((1, 2, 2, 3), [3, 5]),
    ):
        x = in_layout(distinct(*size), layout).requires_grad_()
        y, indices = OPS.adaptive_max_pool2d(x.detach(), output_size)
        dy = in_layout(torch.randn_like(y), layout).requires_grad_()
        yield {
            "adaptive_avg_pool2d": (x, output_size),
            "adaptive_avg_pool2d_backward": (dy, list(size), channels_last),
            "adaptive_max_pool2d": (x, output_size),
            "adaptive_max_pool2d_values": (x, output_size),
            "adaptive_max_pool2d_backward": (dy, indices, list(size), channels_last),
            "adaptive_max_pool2d_gather": (x, indices),
        }[name]


OPERATORS = (
    "adaptive_avg_pool2d",
    "adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_values",
    "adaptive_max_pool2d_backward",
    "adaptive_max_pool2d_gather",
)
on_operators = pytest.mark.parametrize("name", OPERATORS)


def floating(op: Callable[..., Any]) -> Callable[..., Any]:
    """op, of whose outputs only the differentiable ones count."""

    def call(*args: Any) -> Any:
        out = op(*args)
        return out[0] if isinstance(out, tuple) else out

    return call


@on_formats
@on_operators
def test_opcheck(name: str, layout: str) -> None:
    pytest.importorskip("expecttest")  # which opcheck imports
    for args in samples(name, layout):
        torch.library.opcheck(getattr(OPS, name).default, args)


@on_formats
@on_operators
def test_derivatives(name: str, layout: str) -> None:
    """First and second, backward and forward, batched too (which asks the vmap rules)."""
    op = floating(getattr(OPS, name))
    for args in samples(name, layout):
        assert gradcheck(op, args, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(op, args, check_fwd_over_rev=True, fast_mode=True)


@on_operators
def test_vmap_and_jvp(name: str) -> None:
    op = floating(getattr(OPS, name))
    for args in samples(name, "contiguous"):
        tensors = [a.detach() for a in args if isinstance(a, Tensor)]
        rest = args[len(tensors) :]
        stacked = [torch.stack([t, t.flip(0)], 1) for t in tensors]
        out = vmap(lambda *t: op(*t, *rest), in_dims=1)(*stacked)  # noqa: B023
        for i in range(2):
            torch.testing.assert_close(out[i], op(*(s[:, i] for s in stacked), *rest))
        tangent = torch.randn_like(tensors[0])
        forward = jvp(lambda t: op(t, *tensors[1:], *rest), (tensors[0],), (tangent,))[1]  # noqa: B023
        x = tensors[0].requires_grad_()
        y = op(x, *tensors[1:], *rest)
        cotangent = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, cotangent)
        torch.testing.assert_close((forward * cotangent).sum(), (dx * tangent).sum())


@pytest.mark.parametrize("layout", LAYOUTS)
@on_cases
def test_fake_strides(case: str, layout: str) -> None:
    size, output_size = CASES[case]
    x = in_layout(torch.randn(size), layout)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    for call in (
        lambda t: F.adaptive_avg_pool2d(t, output_size),
        lambda t: F.adaptive_max_pool2d(t, output_size),
        *(lambda t, i=i: F.adaptive_max_pool2d(t, output_size, True)[i] for i in range(2)),
    ):
        real = call(x)
        with mode:
            faked = call(fake)
        assert (faked.shape, faked.stride(), faked.dtype) == (real.shape, real.stride(), real.dtype)


def test_functions() -> None:
    x = torch.randn(2, 3, 7, 6, requires_grad=True)
    assert torch.equal(AdaptiveAvgPool2dFunction.apply(x, (3, 4)), F.adaptive_avg_pool2d(x, (3, 4)))
    y, indices = AdaptiveMaxPool2dFunction.apply(x, (3, 4))
    expected = F.adaptive_max_pool2d(x, (3, 4), return_indices=True)
    assert torch.equal(y, expected[0]) and torch.equal(indices, expected[1])
    assert y.requires_grad and not indices.requires_grad


@on_formats
@pytest.mark.parametrize("sizes", [((56, 60), (7, 6)), ((57, 61), (7, 6)), ((19, 23), (50, 60))])
def test_same_bits_for_any_number_of_threads(sizes: Any, layout: str) -> None:
    x = in_layout(torch.randn(4, 24, *sizes[0]), layout).requires_grad_()
    dy = in_layout(torch.randn(4, 24, *sizes[1]), layout)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            outputs = [
                F.adaptive_avg_pool2d(x, sizes[1]),
                *F.adaptive_max_pool2d(x, sizes[1], True),
            ]
            gradients = [torch.autograd.grad(y, x, dy)[0] for y in outputs[:2]]
            results.append(outputs + gradients)
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            assert_same(a, b)


def test_compile() -> None:
    torch._dynamo.reset()

    def network(x: Tensor) -> Tensor:
        y, indices = F.adaptive_max_pool2d(x, (4, 3), return_indices=True)
        return F.adaptive_avg_pool2d(y * indices, 2) + F.adaptive_max_pool2d(x, (2, None))[..., :2]

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((2, 3, 9, 8), (3, 3, 8, 6)):
        for layout in FORMATS:
            x = in_layout(torch.randn(size), layout).requires_grad_()
            y, expected = compiled(x), network(x)
            assert_same(y, expected)
            (dx,), (eager,) = (torch.autograd.grad(t.square().sum(), x) for t in (y, expected))
            torch.testing.assert_close(dx, eager)


# --- modules, convert, patch ---------------------------------------------------------------------


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.AdaptiveMaxPool2d((7, None)),
        nn.AdaptiveAvgPool2d((5, 3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def test_convert_and_restore() -> None:
    net, x = model(), torch.randn(2, 3, 16, 15)
    before, classes = net(x), [type(m) for m in net]
    assert torchconv.convert(net) is net
    assert [type(m) for m in list(net)[1:4]] == [
        torchconv.nn.AdaptiveMaxPool2d,
        torchconv.nn.AdaptiveAvgPool2d,
        torchconv.nn.AdaptiveAvgPool2d,
    ]
    assert repr(net[1]) == "AdaptiveMaxPool2d(output_size=(7, None))"
    torch.testing.assert_close(net(x), before)
    traced = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(traced(x), before)
    torchconv.restore(net)
    assert [type(m) for m in net] == classes
    assert all("_converted" not in vars(m) for m in net)


def test_converted_layers_leave_the_rest_to_pytorch() -> None:
    """Integers, and the numbers of dimensions that only PyTorch's global average takes."""
    layer = torchconv.convert(nn.AdaptiveAvgPool2d(1))
    for size in ((5, 6), (1, 2, 3, 5, 6)):
        x = torch.randn(size)
        torch.testing.assert_close(layer(x), torch_F.adaptive_avg_pool2d(x, 1))
    x = torch.zeros(1, 2, 4, 4, dtype=torch.complex64)
    assert torch.equal(layer(x), torch_F.adaptive_avg_pool2d(x, 1))
    with pytest.raises(NotImplementedError):
        torchconv.nn.AdaptiveAvgPool2d(1)(x)


def test_modules_return_indices() -> None:
    x = torch.randn(2, 3, 9, 8)
    ours = torchconv.nn.AdaptiveMaxPool2d((4, 3), return_indices=True)(x)
    theirs = nn.AdaptiveMaxPool2d((4, 3), return_indices=True)(x)
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


def test_patch() -> None:
    from dispatch_log import DispatchLog

    x = torch.randn(2, 3, 9, 8)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
        (torch_F.adaptive_avg_pool2d, (x, 2), {}),
        (torch._C._nn.adaptive_avg_pool2d, (x, [2, 3]), {}),
        (torch_F.adaptive_max_pool2d, (x, (None, 3)), {}),
        (torch_F.adaptive_max_pool2d, (x, 2, True), {}),
        (torch_F.adaptive_max_pool2d, (x,), {"output_size": 2, "return_indices": True}),
        (torch_F.adaptive_max_pool2d_with_indices, (x, 2), {}),
        (torch._C._nn.adaptive_max_pool2d, (x, [2, 2]), {}),
        (nn.AdaptiveMaxPool2d(4), (x,), {}),
        (nn.AdaptiveAvgPool2d(1), (x,), {}),
    ]
    for function, args, kwargs in calls:
        expected = function(*args, **kwargs)
        with torchconv.patch(), DispatchLog() as log:
            out = function(*args, **kwargs)
        assert any(name.startswith("torchconv::adaptive") for name in log.names), function
        torch.testing.assert_close(out, expected)
    with torchconv.patch():  # PyTorch's own business
        assert torch_F.adaptive_avg_pool2d(torch.ones(5, 6), 1).shape == (1, 1)
        with pytest.raises(NotImplementedError):
            torch_F.adaptive_max_pool2d(torch.ones(1, 1, 4, 4).long(), 2)


@pytest.mark.parametrize(
    "sizes", list(itertools.product((1, 2, 5, 16, 17, 33), (1, 2, 3, 7, 16, 40))), ids=str
)
def test_every_pair_of_sizes(sizes: tuple[int, int]) -> None:
    """One size along H and W in turns, forward and backward, in both formats."""
    size, out = sizes
    for shape, output_size in (((2, 3, size, 6), (out, 4)), ((2, 3, 6, size), (4, out))):
        for layout in FORMATS:
            x = in_layout(torch.randn(shape).double(), layout).requires_grad_()
            for op in POOLINGS:
                y, expected = getattr(F, op)(x, output_size), getattr(torch_F, op)(x, output_size)
                torch.testing.assert_close(y, expected)
                dy = torch.randn_like(y)
                (dx,), (torchs,) = (torch.autograd.grad(t, x, dy) for t in (y, expected))
                torch.testing.assert_close(dx, torchs)
