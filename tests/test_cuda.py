"""What only a GPU has: streams, graphs, several devices, TF32, more than 2^31 elements.

That its kernels compute the right thing is the business of the other files, which run on it too.
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as torch_F

import torchconv
import torchconv.functional as F
from conftest import WHY_NO_CUDA, assert_same, cuda_only, everywhere, in_layout, relative_error
from dispatch_log import DispatchLog

if WHY_NO_CUDA:
    pytest.skip(WHY_NO_CUDA, allow_module_level=True)

pytestmark = [cuda_only, everywhere]


@dataclass(frozen=True)
class Call:
    """An operator on operands of these sizes, the first of which has the batch."""

    op: Callable[..., Any]
    sizes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    layout: str

    def operands(self) -> list[Tensor]:
        scale = 1.0 if len(self.sizes) == 1 else torch.Size(self.sizes[1][1:]).numel() ** -0.5
        tensors = [torch.randn(size) for size in self.sizes]
        tensors[1:2] = [w * scale for w in tensors[1:2]]
        laid = [in_layout(t.to(self.dtype), self.layout) if t.dim() == 4 else t.to(self.dtype)
                for t in tensors]  # fmt: skip
        return [t.requires_grad_() for t in laid]

    def passes(self, operands: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
        y = self.op(*operands)
        return [y.detach(), *torch.autograd.grad(y, operands, dy)]

    def gradient(self, operands: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.randn_like(self.op(*operands))


def conv(**kwargs: Any) -> Callable[..., Tensor]:
    return lambda x, w, b=None: F.conv2d(x, w, b, **kwargs)


HALF, BF16, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
LAST, FIRST = "channels_last", "contiguous"
DENSE = ((3, 64, 14, 14), (72, 64, 3, 3), (72,))
CALLS: dict[str, Call] = {
    "dense_half": Call(conv(padding=1), DENSE, HALF, LAST),
    "dense_half_relu": Call(conv(padding=1, activation="relu"), DENSE, HALF, LAST),
    "dense_half_gelu": Call(conv(padding=1, activation="gelu"), DENSE, HALF, LAST),
    "dense_half_nchw": Call(conv(padding=1), DENSE, HALF, FIRST),
    "dense_bfloat16_s2": Call(conv(padding=1, stride=2), DENSE, BF16, LAST),
    "dense_float32": Call(conv(padding=1), DENSE, SINGLE, LAST),
    "dense_float64": Call(conv(padding=1), ((2, 8, 9, 9), (8, 8, 3, 3), (8,)), DOUBLE, FIRST),
    "1x1_half": Call(conv(), ((3, 128, 14, 14), (256, 128, 1, 1), (256,)), HALF, LAST),
    "stem_half": Call(conv(stride=2, padding=3), ((2, 3, 32, 32), (64, 3, 7, 7)), HALF, LAST),
    "odd_channels": Call(conv(padding=1), ((2, 5, 11, 9), (7, 5, 3, 3), (7,)), HALF, LAST),
    "depthwise": Call(
        conv(padding=1, groups=64), ((3, 64, 15, 14), (64, 1, 3, 3), (64,)), HALF, LAST
    ),
    "depthwise_nchw": Call(
        conv(padding=2, stride=2, groups=32), ((3, 32, 16, 16), (32, 1, 5, 5), (32,)), SINGLE, FIRST
    ),
    "grouped": Call(conv(padding=1, groups=8), ((3, 64, 14, 14), (64, 8, 3, 3), (64,)), HALF, LAST),
    "grouped_nchw": Call(conv(groups=4), ((3, 32, 8, 8), (64, 8, 3, 3), (64,)), SINGLE, FIRST),
    "max_pool": Call(lambda x: F.max_pool2d(x, 3, 2, 1), ((3, 32, 20, 24),), HALF, LAST),
    "max_pool_nchw": Call(lambda x: F.max_pool2d(x, 2), ((3, 32, 20, 24),), SINGLE, FIRST),
    "min_pool": Call(lambda x: F.min_pool2d(x, 3, 1, 1), ((3, 7, 20, 23),), SINGLE, FIRST),
    "avg_pool": Call(lambda x: F.avg_pool2d(x, 3, 2, 1), ((3, 32, 20, 24),), HALF, LAST),
    "avg_pool_global": Call(lambda x: F.avg_pool2d(x, 7), ((3, 256, 7, 7),), HALF, FIRST),
    "adaptive_avg": Call(
        lambda x: F.adaptive_avg_pool2d(x, (5, 3)), ((3, 32, 14, 14),), HALF, LAST
    ),
    "adaptive_max": Call(lambda x: F.adaptive_max_pool2d(x, 3), ((3, 32, 14, 14),), SINGLE, FIRST),
}
on_calls = pytest.mark.parametrize("name", CALLS)


# --- streams, graphs -----------------------------------------------------------------------------


@on_calls
def test_runs_on_the_current_stream(name: str) -> None:
    """Both passes see what was queued on that stream before them, late as it comes."""
    call = CALLS[name]
    operands, late = call.operands(), call.operands()
    dy = call.gradient(operands)
    expected = call.passes(late, dy)
    call.passes(operands, dy)  # libraries are opened, kernels loaded
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for operand, value in zip(operands, late, strict=True):
                operand.copy_(value)
        found = call.passes(operands, dy)
    stream.synchronize()
    for out, value in zip(found, expected, strict=True):
        assert_same(out, value)


@on_calls
def test_graph_capture(name: str) -> None:
    """Both passes can be captured: they neither synchronise nor allocate by themselves. A replay
    computes what the same call does."""
    call = CALLS[name]
    operands = call.operands()
    dy = call.gradient(operands)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call.passes(operands, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = call.passes(operands, dy)
    for _ in range(2):
        new = call.operands()
        with torch.no_grad():
            for operand, value in zip(operands, new, strict=True):
                operand.copy_(value)
            for out in captured:
                out.fill_(float("nan"))
        graph.replay()
        for out, value in zip(captured, call.passes(new, dy), strict=True):
            assert_same(out, value)


def test_no_hidden_synchronisation() -> None:
    calls = [(call, call.operands()) for call in CALLS.values()]
    gradients = [call.gradient(operands) for call, operands in calls]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for (call, operands), dy in zip(calls, gradients, strict=True):
            call.passes(operands, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 32, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@pytest.mark.filterwarnings("ignore")
def test_compile_reduce_overhead() -> None:
    """CUDA graphs of torch.compile, training too."""
    torch._dynamo.reset()
    model = torchconv.convert(small_network())
    compiled = torch.compile(model, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(4, 3, 32, 32)
        torch.compiler.cudagraph_mark_step_begin()
        compiled(x).square().sum().backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        model(x).square().sum().backward()
        expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        assert len(found) == len(expected) > 0
        for gradient, value in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, value, rtol=1e-3, atol=1e-3)


def test_threads_with_streams_of_their_own() -> None:
    call = CALLS["dense_half"]
    inputs = [call.operands() for _ in range(4)]
    dy = call.gradient(inputs[0])
    expected = [call.passes(operands, dy) for operands in inputs]
    torch.cuda.synchronize()
    found: dict[int, list[Tensor]] = {}

    def run(index: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(5):
                found[index] = call.passes(inputs[index], dy)
        stream.synchronize()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        for out, value in zip(found[index], expected[index], strict=True):
            assert_same(out, value)


# --- bits ----------------------------------------------------------------------------------------


@on_calls
def test_same_bits_every_time(name: str) -> None:
    call = CALLS[name]
    operands = call.operands()
    dy = call.gradient(operands)
    first = call.passes(operands, dy)
    for _ in range(5):
        for out, value in zip(call.passes(operands, dy), first, strict=True):
            assert_same(out, value)


@on_calls
def test_a_sample_alone(name: str) -> None:
    """Its output and input gradient do not depend on the batch, whatever its size."""
    call = CALLS[name]
    operands = call.operands()
    dy = call.gradient(operands)
    y, dx, *_ = call.passes(operands, dy)
    for count in (1, 40):
        x = operands[0].detach()[1:2].expand(count, -1, -1, -1)
        some = in_layout(x, call.layout).requires_grad_()
        z, dz, *_ = call.passes([some, *operands[1:]], dy[1:2].expand(count, -1, -1, -1))
        for index in (0, count - 1):
            assert torch.equal(z[index], y[1])
            assert torch.equal(dz[index], dx[1])


@pytest.mark.parametrize("layout", [LAST, FIRST])
@pytest.mark.parametrize("size", [1, 3])
def test_tf32_only_where_it_is_allowed(size: int, layout: str) -> None:
    """torch.backends.cudnn.allow_tf32, at every call, in all passes."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    sizes = ((4, 64, 16, 16), (64, 64, size, size))
    call = Call(conv(padding=size // 2), sizes, SINGLE, layout)
    operands = call.operands()
    dy = call.gradient(operands)
    doubles = [t.detach().double().requires_grad_() for t in operands]
    truth = torch_F.conv2d(*doubles, padding=size // 2)
    expected = [truth, *torch.autograd.grad(truth, doubles, dy.double())]
    errors = []
    for allowed in (False, True, False):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            found = call.passes(operands, dy)
        errors.append([relative_error(a, b) for a, b in zip(found, expected, strict=True)])
    assert max(errors[0]) <= 1e-6 and errors[2] == errors[0]
    assert 5e-5 <= max(errors[1]) <= 1e-3


def test_winograd_only_where_it_is_allowed() -> None:
    """torchconv.backends.allow_winograd, at every call."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("not used on this GPU")
    x, w = torch.randn(2, 64, 14, 14, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    used = []
    for allowed in (True, False, True):
        with torchconv.backends.allow_winograd(allowed):
            used.append("Winograd" in str(torchconv.explain(x, w, padding=1)))
    assert used == [True, False, True]


# --- devices -------------------------------------------------------------------------------------


def test_mixed_devices_are_refused() -> None:
    """With PyTorch's class of exception, and a message that speaks of devices."""
    x, w, b = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
    for arguments in (
        (x, w.cpu(), b),
        (x, w, b.cpu()),
        (x.cpu(), w, b),
        (x.cpu(), w.cpu(), b),
        (x, w.cpu(), None),
    ):
        with pytest.raises(RuntimeError):
            torch_F.conv2d(*arguments)
        with pytest.raises(RuntimeError, match="device"):
            F.conv2d(*arguments)
    y, indices = F.max_pool2d(x, 2, return_indices=True)
    with pytest.raises(RuntimeError, match="device"):
        torch.ops.torchconv.select_pool2d_gather(x, indices.cpu(), [2, 2], [2, 2], [0, 0], [1, 1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one GPU")
@on_calls
def test_another_device_than_the_current_one(name: str) -> None:
    call = CALLS[name]
    operands = call.operands()
    dy = call.gradient(operands)
    there = [t.detach().to("cuda:1").requires_grad_() for t in operands]
    expected = call.passes(operands, dy)
    assert torch.cuda.current_device() == 0
    found = call.passes(there, dy.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for out, value in zip(found, expected, strict=True):
        assert out.device == torch.device("cuda:1")
        assert torch.equal(out.to("cuda:0"), value)


def test_the_current_device_stays() -> None:
    before = torch.cuda.current_device()
    for call in CALLS.values():
        operands = call.operands()
        call.passes(operands, call.gradient(operands))
        assert torch.cuda.current_device() == before


# --- sizes, memory -------------------------------------------------------------------------------


def need_memory(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"{gigabytes} GiB of GPU memory are needed, {free:.0f} are free")


@pytest.mark.parametrize("layout", [LAST, FIRST])
@pytest.mark.parametrize("op", ["max_pool2d", "avg_pool2d", "conv2d", "depthwise"])
def test_more_than_2_31_elements(op: str, layout: str) -> None:
    """An image whose far corner is right is addressed with 64 bits."""
    need_memory(24)
    size = (3, 48, 4000, 4000)
    assert torch.Size(size).numel() > 2**31
    x = torch.empty(size, dtype=HALF, memory_format=torch.channels_last if layout == LAST else
                    torch.contiguous_format)  # fmt: skip
    for sample in x:
        sample.normal_()
    w = torch.randn(8, 48, 3, 3, dtype=HALF) * 0.05
    taps = torch.randn(48, 1, 3, 3, dtype=HALF)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "max_pool2d": lambda t: F.max_pool2d(t, 2),
        "avg_pool2d": lambda t: F.avg_pool2d(t, 2),
        "conv2d": lambda t: F.conv2d(t, w, stride=2),
        "depthwise": lambda t: F.conv2d(t, taps, groups=48),
    }
    y = calls[op](x)
    for rows in (slice(0, 64), slice(-64, None)):
        for n in (0, 2):
            piece = in_layout(x[n : n + 1, :, rows, rows], layout)
            part = calls[op](piece)
            at = slice(0, part.shape[2]) if rows.start == 0 else slice(-part.shape[2], None)
            whole = y[n : n + 1, :, at, at]
            if op == "conv2d" and rows.start != 0:
                continue  # the last windows of the piece begin elsewhere
            torch.testing.assert_close(whole, part, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("layout", [LAST, FIRST])
@pytest.mark.parametrize("op", ["max_pool2d", "avg_pool2d"])
def test_gradient_of_more_than_2_31_elements(op: str, layout: str) -> None:
    need_memory(30)
    x = torch.zeros(3, 48, 4000, 4000, dtype=HALF)
    x = in_layout(x, layout).requires_grad_()
    y = getattr(F, op)(x, 2)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    each = 1.0 if op == "max_pool2d" else 0.25
    del y
    for n, rows in ((0, slice(0, 8)), (2, slice(-8, None))):
        corner = dx[n, :, rows, rows]
        assert (corner[:, ::2, ::2] == each).all()
        others = corner[:, 1::2, 1::2]
        assert (others == (0.0 if op == "max_pool2d" else each)).all()
    assert dx.sum(dtype=torch.float64) == each * dx.numel() / (4 if op == "max_pool2d" else 1)


@on_calls
def test_empty_batch(name: str) -> None:
    """No samples: empty outputs, zero gradients by the weights."""
    call = CALLS[name]
    operands = call.operands()
    operands[0] = operands[0].detach()[:0].requires_grad_()
    y, dx, *others = call.passes(operands, call.gradient(operands))
    assert y.shape[0] == 0 and dx.shape == operands[0].shape
    assert all(torch.count_nonzero(gradient) == 0 for gradient in others)


def test_memory_does_not_grow() -> None:
    calls = [(call, call.operands()) for call in CALLS.values()]
    gradients = [call.gradient(operands) for call, operands in calls]

    def run() -> None:
        for (call, operands), dy in zip(calls, gradients, strict=True):
            call.passes(operands, dy)

    gc.collect()  # what earlier tests left in cycles must not be freed in between
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(50):
        run()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.memory_reserved() == reserved


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAST, FIRST])
def test_a_converted_network_trains_alike(layout: str) -> None:
    """Three steps of SGD, against PyTorch's in float64."""
    truth = small_network().double()
    model = torchconv.convert(copy.deepcopy(truth).float())
    if layout == LAST:
        model = model.to(memory_format=torch.channels_last)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (truth, model)]
    for _ in range(3):
        x, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
        losses = []
        for net, optimizer in zip((truth, model), optimizers, strict=True):
            optimizer.zero_grad()
            batch = x.double() if net is truth else in_layout(x, layout)
            loss = torch_F.cross_entropy(net(batch), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().double())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize("layout", [LAST, FIRST])
def test_a_converted_network_under_autocast(layout: str, dtype: torch.dtype) -> None:
    model = small_network().eval()
    x = in_layout(torch.randn(4, 3, 32, 32), layout)
    with torch.no_grad(), torch.autocast("cuda", dtype):
        expected = model(x)
        with DispatchLog() as log:
            found = torchconv.convert(model)(x)
    assert found.dtype == expected.dtype == dtype
    assert any(name.startswith("torchconv::conv2d") for name in log.names)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_patch() -> None:
    x, w = torch.randn(2, 8, 9, 9), torch.randn(8, 8, 3, 3)
    expected = torch_F.max_pool2d(torch_F.conv2d(x, w), 2)
    with torchconv.patch(), DispatchLog() as log:
        found = torch_F.max_pool2d(torch_F.conv2d(x, w), 2)
    assert [name.partition("::")[0] for name in log.names].count("torchconv") == 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
