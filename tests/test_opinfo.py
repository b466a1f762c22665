"""PyTorch's own sample inputs and error inputs for conv2d, max_pool2d and avg_pool2d.

torch.testing's op_db is what PyTorch tests its operators with. Every sample goes through PyTorch
and through torchconv: values, dtype, strides and gradients. min_pool2d is max_pool2d by negation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import torchconv.functional as F
from conftest import FLOATS, NORM_BOUND, assert_accurate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

INFOS = {
    info.name.rsplit(".", 1)[1]: info
    for info in op_db
    if info.name in ("nn.functional.conv2d", "nn.functional.max_pool2d", "nn.functional.avg_pool2d")
}
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REAL = set(FLOATS) | set(INTEGERS)


def supported(name: str) -> list[torch.dtype]:
    """What PyTorch tests on CPU, without complex numbers; averages of floating point only."""
    dtypes = set(INFOS[name].dtypes) & (set(FLOATS) if name == "avg_pool2d" else REAL)
    return sorted(dtypes, key=str)


def calls(name: str, dtype: torch.dtype) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in INFOS[name].sample_inputs("cpu", dtype, requires_grad=False):
            yield [sample.input, *sample.args], dict(sample.kwargs)


def leaves_of(args: list[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """The arguments with fresh tensors that ask for a gradient where they can."""
    fresh = []
    for a in args:
        if isinstance(a, Tensor):
            a = a.detach() if dtype is None else a.detach().to(dtype)
            a = a.requires_grad_() if a.is_floating_point() else a
        fresh.append(a)
    return fresh


def gradients(out: Tensor, args: list[Any], dy: Tensor) -> list[Tensor]:
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    return list(torch.autograd.grad(out, wanted, dy))


def check_float(
    ours: Callable[..., Any], theirs: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
) -> None:
    dtype = args[0].dtype
    here, there = leaves_of(args), leaves_of(args)
    out, expected = ours(*here, **kwargs), theirs(*there, **kwargs)
    double = leaves_of(args, torch.float64)
    truth = theirs(*double, **kwargs)
    if isinstance(out, tuple):
        assert torch.equal(out[1], expected[1]) and out[1].stride() == expected[1].stride()
        out, expected, truth = out[0], expected[0], truth[0]
    assert out.dtype == expected.dtype
    assert out.stride() == expected.stride()
    dy = torch.randn(truth.shape).to(out.dtype)
    # The same sums with no sign: what an error is small against where a sum cancels to nothing.
    absolute = [a.abs() if isinstance(a, Tensor) else a for a in leaves_of(args, torch.float64)]
    sizes = theirs(*absolute, **kwargs)
    values = [out, *gradients(out, here, dy)]
    others = [expected, *gradients(expected, there, dy)]
    rights = [truth, *gradients(truth, double, dy.double())]
    bounds = [sizes, *gradients(sizes, absolute, dy.double().abs())]
    for value, other, right, size in zip(values, others, rights, bounds, strict=True):
        assert value.dtype == other.dtype and value.shape == other.shape
        if value.dtype in NORM_BOUND:
            error = torch.linalg.vector_norm(value.double() - right)
            assert error <= 4 * torch.finfo(dtype).eps * torch.linalg.vector_norm(size)
        else:
            assert_accurate(value, right)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", supported("conv2d"), ids=str)
def test_conv2d_samples(dtype: torch.dtype) -> None:
    count = 0
    for args, kwargs in calls("conv2d", dtype):
        count += 1
        if dtype.is_floating_point:
            check_float(F.conv2d, torch.nn.functional.conv2d, args, kwargs)
            continue
        # The bias samples are floating point however the rest is typed.
        args = [a.to(dtype) if isinstance(a, Tensor) else a for a in args]
        out, expected = F.conv2d(*args, **kwargs), torch.nn.functional.conv2d(*args, **kwargs)
        assert torch.equal(out, expected) and out.dtype == dtype
        assert out.stride() == expected.stride()
    assert count >= 20


def min_pool2d(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Min pooling as PyTorch can spell it."""
    out = torch.nn.functional.max_pool2d(-x, *args, **kwargs)
    return (out[0].neg_(), out[1]) if isinstance(out, tuple) else out.neg_()


# -x reverses the order of floating point numbers; test_pool2d_special has the rest.
SELECTIONS = [("max_pool2d", dtype) for dtype in supported("max_pool2d")]
SELECTIONS += [("min_pool2d", dtype) for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("op", "dtype"), SELECTIONS, ids=str)
def test_select_pool2d_samples(op: str, dtype: torch.dtype) -> None:
    """Selection is exact: the same bits, indices and strides, and the same gradients."""
    theirs = torch.nn.functional.max_pool2d if op == "max_pool2d" else min_pool2d
    count = 0
    for args, kwargs in calls("max_pool2d", dtype):
        count += 1
        (x,) = args
        here, there = leaves_of([x])[0], leaves_of([x])[0]
        out, expected = getattr(F, op)(here, **kwargs), theirs(there, **kwargs)
        if isinstance(out, tuple):
            assert torch.equal(out[1], expected[1])
            assert out[1].stride() == expected[1].stride()
            out, expected = out[0], expected[0]
        assert out.dtype == dtype and torch.equal(out, expected)
        assert out.stride() == expected.stride()
        if dtype.is_floating_point:
            dy = torch.randint(-3, 4, out.shape).to(dtype)
            dx, torchs = gradients(out, [here], dy)[0], gradients(expected, [there], dy)[0]
            assert torch.equal(dx, torchs) and dx.stride() == torchs.stride()
    assert count >= 100


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", supported("avg_pool2d"), ids=str)
def test_avg_pool2d_samples(dtype: torch.dtype) -> None:
    count = 0
    for args, kwargs in calls("avg_pool2d", dtype):
        count += 1
        check_float(F.avg_pool2d, torch.nn.functional.avg_pool2d, args, kwargs)
    assert count >= 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["conv2d", "max_pool2d", "min_pool2d", "avg_pool2d"])
def test_error_inputs(name: str) -> None:
    """What PyTorch lists as refused is refused, with the class it lists and the one it raises."""
    info = INFOS["max_pool2d" if name == "min_pool2d" else name]
    count = 0
    for error in info.error_inputs("cpu"):
        sample = error.sample_input
        arguments = (sample.input, *sample.args)
        with pytest.raises(error.error_type) as theirs:
            info.op(*arguments, **sample.kwargs)
        with pytest.raises(error.error_type) as ours:
            getattr(F, name)(*arguments, **sample.kwargs)
        assert isinstance(ours.value, theirs.type)
        assert str(ours.value)
        count += 1
    assert count >= 5
