"""Packed weights that layers in eval mode keep: the same bits, when they are kept, and where."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import torchconv
from conftest import in_layout, threads
from dispatch_log import DispatchLog
from packed_layers import (
    SIZE,
    assert_fresh,
    assert_fresh_in_threads,
    kept,
    layer,
    packed as packed,
    unpacked,
)
from torchconv import nn
from torchconv._dispatch import operator
from torchconv._packed_weights import PackedWeights

# --- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"channels": 35, "filters": 37},
        {"channels": 130, "filters": 256},
        {"kernel": 1},
        {"kernel": 1, "channels": 40, "filters": 50, "stride": 2},
        {"kernel": 5, "stride": 2},
        {"stride": 2},
        {"channels": 3, "filters": 64, "kernel": 7, "stride": 2},
        {"dilation": 2},
        {"channels": 3, "filters": 20, "kernel": 7, "stride": 2},
        {"channels": 3, "filters": 40, "kernel": 7, "stride": 2},
        {"groups": 2},
        {"groups": 32},
        {"flip_kernel": True, "activation": "relu", "bias": False},
    ],
    ids=str,
)
def test_same_bits(arguments: dict[str, Any], dtype: torch.dtype, layout: str) -> None:
    """In every layout, alone and in a batch, for one thread and two."""
    module = layer(**arguments).to(dtype)
    x = torch.randn(3, module.in_channels, 17, 16, dtype=dtype)
    x = x.to(memory_format=getattr(torch, f"{layout}_format".replace("last_format", "last")))
    assert_fresh(module, x)
    assert_fresh(module, x[1:2])
    if dtype == torch.float32:
        # Few pixels after the stride: see test_few_pixels_keep_nothing.
        few = module.kernel_size == (1, 1) and module.stride != (1, 1) and layout != "contiguous"
        found = torchconv.explain(
            *(x, module.weight, None, module.stride, module.padding, module.dilation),
            module.groups,
            peak=100.0,
            bandwidth=10.0,
        )["fprop"]
        # With the default instruction set, first layers with a stride: a thread copies few weights.
        runs = found.algorithm == "runs of taps in place"
        assert (kept(module) > 0) == (module.groups < 32 and not few and not runs)
    with threads(1 if torch.get_num_threads() > 1 else 2):
        assert_fresh(module, x)


def test_infinity_and_nan(packed: nn.Conv2d) -> None:
    x = torch.randn(SIZE)
    x[0, 3, 4, 5], x[1, 0, 0, 0] = torch.inf, torch.nan
    expected = unpacked(packed, x)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), expected, rtol=0, atol=0, equal_nan=True)


def test_unbatched_and_empty(packed: nn.Conv2d) -> None:
    assert_fresh(packed, torch.randn(SIZE[1:]))
    assert_fresh(packed, torch.randn(0, *SIZE[1:]))


# --- when weights are kept -----------------------------------------------------------------------


def test_only_inference_keeps() -> None:
    module, x = layer(), torch.randn(SIZE)
    y = module(x)
    assert y.requires_grad and kept(module) == 0
    module.train()
    with torch.no_grad():
        module(x)
    assert kept(module) == 0
    module.eval()
    module.requires_grad_(False)
    assert module(x.requires_grad_()).requires_grad and kept(module) == 0
    assert not module(x.detach()).requires_grad and kept(module) > 0
    module.train()
    assert "_packed_weights" not in vars(module)


def test_few_pixels_keep_nothing() -> None:
    """A 1x1 layer packs its weights while it multiplies few pixels by them, be they few or many."""
    x = torch.randn(1, 1024, 4, 4)
    for layout in ("contiguous", "channels_last"):
        module = layer(kernel=1, channels=1024, filters=512)
        assert_fresh(module, in_layout(x, layout))
        assert kept(module) == 0
    module = layer(kernel=1, channels=40, filters=70, activation="gelu")
    x = in_layout(torch.randn(3, 40, 14, 14), "channels_last")
    assert_fresh(module, x[:1])
    assert kept(module) == 0
    module.weight.data.mul_(2)
    assert_fresh(module, x[:1])
    assert_fresh(module, x)
    assert kept(module) > 0
    assert_fresh(module, x[:1])


def test_gradients_after_inference(packed: nn.Conv2d) -> None:
    x = torch.randn(SIZE, requires_grad=True)
    packed(x).sum().backward()
    assert x.grad is not None and packed.weight.grad is not None


def test_inference_mode(packed: nn.Conv2d) -> None:
    x = torch.randn(SIZE)
    with torch.inference_mode():
        packed.weight.mul_(2)
        y = packed(x)
        assert y.is_inference()
    assert torch.equal(y, unpacked(packed, x))
    with torch.inference_mode():
        module = layer()
        assert module.weight.is_inference()
        for _ in range(2):
            assert torch.equal(module(x), unpacked(module, x))
            module.weight[0, 0, 0, 0] += 1
    assert kept(module) == 0


def test_weights_in_shared_memory(packed: nn.Conv2d) -> None:
    """Another process may change them, which this one does not count."""
    packed.weight.share_memory_()
    assert_fresh(packed)
    assert kept(packed) == 0
    other = layer().share_memory()
    assert_fresh(other)
    assert kept(other) == 0


def test_autocast_and_subclasses_keep_nothing() -> None:
    module, x = layer(), torch.randn(SIZE)

    class Watched(Tensor):
        pass

    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
        module(x.as_subclass(Watched))
    assert kept(module) == 0


def test_switch(packed: nn.Conv2d) -> None:
    assert torchconv.backends.packed_weights_kept()
    torchconv.drop_packed_weights(torch.nn.Sequential(packed, torch.nn.ReLU()))
    with torchconv.backends.keep_packed_weights(False):
        assert not torchconv.backends.packed_weights_kept()
        assert_fresh(packed)
        assert kept(packed) == 0
    assert_fresh(packed)
    assert kept(packed) > 0


# --- sizes and threads ---------------------------------------------------------------------------


def test_images_of_many_sizes_share() -> None:
    module = layer()
    assert_fresh(module)
    before = kept(module)
    for size in range(8, 20):
        assert_fresh(module, torch.randn(1, 32, size, 11))
    assert kept(module) == before > 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("groups", "kernel", "stride"), [(2, 5, 2), (2, 3, 3), (2, 2, 2), (1, 5, 2), (1, 2, 3)]
)
def test_image_of_one_output(groups: int, kernel: int, stride: int, layout: str) -> None:
    """All taps reach an image of the kernel's size, but no step is ever taken."""
    module = nn.Conv2d(16, 16, kernel, stride=stride, groups=groups).eval()
    for size in (20, kernel, 21):
        x = torch.randn(1, 16, size, size)
        assert_fresh(module, in_layout(x, layout))


def test_a_bounded_number_of_forms() -> None:
    """Small images, which some taps never reach, have forms of their own."""
    module = layer(kernel=9)
    sizes = []
    for size in (12, 4, 3, 2, 1):
        x = torch.randn(1, 32, size, size).to(memory_format=torch.channels_last)
        assert_fresh(module, x)
        sizes.append(kept(module))
    assert 0 < sizes[0] and max(sizes) <= 2 * sizes[0] and sizes[-1] < sizes[0]


def test_channels_last_and_contiguous_in_turn(packed: nn.Conv2d) -> None:
    x = torch.randn(SIZE)
    for _ in range(2):
        assert_fresh(packed, x)
        assert_fresh(packed, x.to(memory_format=torch.channels_last))


def test_threads() -> None:
    module, x = layer(), torch.randn(SIZE)

    def change() -> Tensor:
        with torch.no_grad():
            module.weight.add_(0.1)
        return unpacked(module, x)

    assert_fresh_in_threads(module, x, change)


# Memory that is freed is the system's again, so that who still reads it ends.
SWAPS = """
import threading, time, torch, torchconv
torch.set_num_threads(1)
layer = torchconv.nn.Conv2d(256, 256, 3, padding=1).eval()
x, calls, stop = torch.randn(1, 256, 8, 8), [0, 0], time.monotonic() + 1
def call(i):
    with torch.no_grad():
        while time.monotonic() < stop:
            layer(x)
            calls[i] += 1
workers = [threading.Thread(target=call, args=(i,)) for i in range(2)]
for worker in workers:
    worker.start()
while time.monotonic() < stop:
    layer.weight.data, layer.bias.data = torch.ones(256, 256, 3, 3), torch.ones(256)
    before = list(calls)
    while time.monotonic() < stop and any(a < b + 2 for a, b in zip(calls, before)):
        time.sleep(0)
for worker in workers:
    worker.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="by glibc's setting")
def test_weights_that_another_thread_swaps_in_a_call() -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", SWAPS], env=environment, check=False)
    assert done.returncode == 0


def test_memory_is_given_back() -> None:
    def allocated() -> int:
        gc.collect()
        return torchconv.memory_stats()["allocated"]

    module = layer(128, 128)
    before = allocated()
    assert_fresh(module, torch.randn(1, 128, 9, 9))
    assert kept(module) > 2**20
    assert allocated() >= before + kept(module)
    copy_ = copy.copy(module._packed_weights)
    del module
    assert allocated() == before
    assert copy_ is not None and copy_.bytes() == 0


# --- no part of the layer's state ----------------------------------------------------------------


def pickled(module: nn.Conv2d) -> bytes:
    """A pickle in which tensors are their sizes and types: a tensor's own has its address."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer)
    pickler.persistent_id = lambda o: (o.shape, o.dtype) if isinstance(o, Tensor) else None
    pickler.dump(module)
    return buffer.getvalue()


def test_state(packed: nn.Conv2d) -> None:
    fresh = layer()
    assert list(packed.state_dict()) == list(fresh.state_dict())
    assert [n for n, _ in packed.named_buffers()] == []
    assert pickled(packed) == pickled(fresh)
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (
        pickle.loads(pickle.dumps(packed)),
        copy.deepcopy(packed),
        copy.copy(packed),
        loaded,
    ):
        assert "_packed_weights" not in vars(other)
        assert_fresh(other)
    with torch.no_grad():
        other = copy.deepcopy(packed)
        other.weight.zero_()
    assert_fresh(other)
    assert_fresh(packed)


def test_converted_layers() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3, padding=1)).eval()
    torchconv.convert(model)
    module: Any = model[0]
    assert_fresh(module)
    assert kept(module) > 0
    torchconv.restore(model)
    assert type(module) is torch.nn.Conv2d
    assert vars(module).keys() == vars(torch.nn.Conv2d(1, 1, 1)).keys()


def test_traces_hold_the_plain_operator(packed: nn.Conv2d) -> None:
    x = torch.randn(SIZE)
    expected = unpacked(packed, x)
    with torch.no_grad():
        exported = torch.export.export(packed, (x,))
        graphs: list[Any] = [
            torch.fx.symbolic_trace(packed),
            make_fx(packed)(x),
            exported.module(),
        ]
        traced = torch.jit.trace(packed, x)
        compiled = torch.compile(packed, backend="eager", fullgraph=True)
        assert "settings" not in str(traced.graph)
        for function in (*graphs, traced, compiled):
            assert torch.equal(function(x), expected)
        for graph in graphs:
            assert "settings" not in graph.code
        with DispatchLog() as log:
            packed(x)
        assert log.names == ["torchconv::conv2d"]
        mapped = torch.func.vmap(packed)(x[None])
        assert torch.equal(mapped[0], expected)


# --- the operator --------------------------------------------------------------------------------


def test_operator_with_any_owner() -> None:
    """An owner that does not exist has nothing kept, and the result is conv2d's."""
    x, w = torch.randn(SIZE), torch.randn(32, 32, 3, 3)
    expected = torch.ops.torchconv.conv2d(x, w)
    values = ((1, 1), (0, 0, 0, 0), (1, 1), 1, "none", False)
    for owner in (0, -1, 2**62):
        for frozen in (False, True):
            settings = operator("conv2d").settings((*values, owner, 0, frozen))
            got = torch.ops.torchconv.conv2d.settings(x, w, None, None, settings)
            assert torch.equal(got, expected)


def test_a_frozen_call_reads_the_weights_that_it_began_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where another thread sets `weight.data` between any two steps of Python's."""
    conv: Any = nn.Conv2d(16, 16, 3).eval()
    conv._weights_frozen = True
    x, own = torch.randn(1, 16, 9, 9), PackedWeights.owner_of
    with torch.no_grad():
        expected = [conv(x) for _ in range(2)][-1]

        def owner_of(packed: PackedWeights, weight: Tensor) -> tuple[int, int, bool]:
            found = own(packed, weight)
            conv.weight.data = torch.zeros_like(conv.weight)
            return found

        monkeypatch.setattr(PackedWeights, "owner_of", owner_of)
        assert torch.equal(conv(x), expected)
        monkeypatch.undo()
        assert torch.equal(conv(x), conv.bias[:, None, None].expand(1, 16, 7, 7))
