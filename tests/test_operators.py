"""torch.ops.torchconv.* as PyTorch operators: schemas, fakes, autocast, and the grad modes.

opcheck is PyTorch's own test of an operator's registration; fake and meta results must have the
very strides of the real ones, and those must be PyTorch's. test_gradients and test_transforms go on
with derivatives and with torch.func, torch.compile and torch.export.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import torchconv.functional as F
from conftest import FLOATS, assert_accurate, assert_fakes_equal_real, cpu_only, everywhere
from dispatch_log import DispatchLog
from operator_samples import FORMATS, OPERATORS, OPS, samples
from oracle import torch_F
from test_adaptive_pool2d import OPERATORS as ADAPTIVE
from test_batch_norm import OPERATORS as NORM
from torchconv._settings import OVERLOADED

pytestmark = everywhere

on_formats = pytest.mark.parametrize("layout", FORMATS)


# --- registration --------------------------------------------------------------------------------


@cpu_only
def test_every_operator_is_listed() -> None:
    names = torch._C._dispatch_get_all_op_names()
    short = (f"{n}.settings" for n in OVERLOADED)
    recorded = ("record_conv2d", "record_pool2d", "record_batch_norm")
    chains = ("keep_chain", "run_kept_chain", "run_planned_chain")
    others = ("explain_conv2d", *chains, *short, *recorded)
    assert sorted(n for n in names if n.startswith("torchconv::")) == sorted(
        f"torchconv::{n}" for n in (*OPERATORS, *ADAPTIVE, *NORM, *others)
    )


@on_formats
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, layout: str) -> None:
    """Schema, autograd registration, fake tensors, and compilation with dynamic shapes."""
    pytest.importorskip("expecttest")  # which opcheck imports
    for arguments in samples(name, layout, torch.float32):
        torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_without_gradient(name: str) -> None:
    pytest.importorskip("expecttest")  # which opcheck imports
    for arguments in samples(name, "contiguous", torch.bfloat16):
        detached = tree_map_only(Tensor, Tensor.detach, arguments)
        torch.library.opcheck(getattr(OPS, name).default, detached)


@on_formats
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_fake_equals_real(name: str, dtype: torch.dtype, layout: str) -> None:
    """Size, dtype and exact strides of every output, from fake and from meta tensors."""
    for arguments in samples(name, layout, dtype):
        assert_fakes_equal_real(getattr(OPS, name), arguments)


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


# --- autocast, grad modes ------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_autocast(dtype: torch.dtype, inside: torch.dtype, device: str) -> None:
    """The dtype of every result is what PyTorch's function gives under the same autocast."""
    x = torch.randn(2, 3, 8, 8).to(dtype).requires_grad_()
    w, b = torch.randn(4, 3, 3, 3).to(dtype).requires_grad_(), torch.randn(4).to(dtype)
    with torch.autocast(device, inside):
        expected = torch.nn.functional.conv2d(x, w, b)
        z = F.conv2d(x, w, b)
        activated = F.conv2d(x, w, b, activation="gelu")
        for op in ("max_pool2d", "avg_pool2d"):
            pooled, theirs = getattr(F, op)(x, 2), getattr(torch.nn.functional, op)(x, 2)
            assert pooled.dtype == theirs.dtype
        assert F.min_pool2d(x, 2).dtype == torch.nn.functional.max_pool2d(x, 2).dtype
    assert z.dtype == activated.dtype == expected.dtype
    rounded = [t.detach().to(z.dtype).double() for t in (x, w, b)]
    assert_accurate(z, torch_F.conv2d(*rounded))
    dx, dw = torch.autograd.grad(activated.sum(), (x, w))
    assert dx.dtype == x.dtype and dw.dtype == w.dtype


def test_autocast_mixes_dtypes(device: str) -> None:
    """As F.conv2d, autocast makes one dtype of a float32 weight and a bfloat16 input."""
    x, w = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16), torch.randn(4, 3, 3, 3)
    with torch.autocast(device, torch.bfloat16):
        assert F.conv2d(x, w).dtype == torch.bfloat16
    with torch.autocast(device, enabled=False), pytest.raises(RuntimeError):
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


def test_inference_keeps_nothing_for_backward() -> None:
    """Neither offsets nor a pre-activation are computed where no gradient is wanted."""
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with DispatchLog() as log:
        F.min_pool2d(F.max_pool2d(F.conv2d(x, w, activation="gelu"), 2), 2)
    assert log.names == ["torchconv::conv2d", "torchconv::max_pool2d", "torchconv::min_pool2d"]


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


@cpu_only
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
