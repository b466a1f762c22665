"""No call reaches an address that is not its own, and memory does not grow.

The operators check their arguments without relying on torchconv.functional. Calls that would kill
the process if they were wrong run in a process of their own, with guard pages around the tensors.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import torchconv.functional as F
from test_errors import W, X, quantized

OPS = torch.ops.torchconv


def run(code: str) -> str:
    """Python code in a process of its own, whose death by a signal is a failed test."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


def test_a_window_as_large_as_32_bits_go() -> None:
    """One window of 2^31-1 by 2^31-1, nearly all of it padding: right, and in finite time."""
    size = 2**31 - 1
    kwargs: dict[str, Any] = {"kernel_size": size, "stride": size, "padding": size // 2}
    code = (
        "import torch, torchconv.functional as F\n"
        "x = torch.arange(12.).view(1, 1, 3, 4)\n"
        f"k = {kwargs}\n"
        "for op in (F.max_pool2d, F.min_pool2d, F.avg_pool2d):\n"
        "    try:\n"
        "        y = op(x, **k, ceil_mode=False)\n"
        "        print(op.__name__, y.flatten().tolist())\n"
        "    except RuntimeError as e:\n"
        "        print(op.__name__, 'refused', e)\n"
    )
    lines = run(code).splitlines()
    for line, right in zip(lines, ("[11.0]", "[0.0]", ""), strict=True):
        assert "refused" in line or right in line


# --- the operators below functional --------------------------------------------------------------

PAIR, FOUR = [1, 1], [0, 0, 0, 0]


@pytest.mark.parametrize(
    "args",
    [
        (X[0], W, None, PAIR, FOUR, PAIR, 1),
        (X, W[0], None, PAIR, FOUR, PAIR, 1),
        (X, W, None, [1], FOUR, PAIR, 1),
        (X, W, None, [1, 1, 1], FOUR, PAIR, 1),
        (X, W, None, PAIR, [0, 0], PAIR, 1),
        (X, W, None, PAIR, FOUR, [], 1),
        (X, W, None, PAIR, FOUR, PAIR, 0),
        (X, W, None, PAIR, FOUR, PAIR, 1, "swish"),
        (X, W, None, PAIR, FOUR, PAIR, 1, ""),
        (X.long(), W.long(), None, PAIR, FOUR, PAIR, 1, "relu"),
        (X.to(torch.complex64), W.to(torch.complex64), None, PAIR, FOUR, PAIR, 1),
        (X.to_sparse(), W, None, PAIR, FOUR, PAIR, 1),
        (quantized(X), quantized(W), None, PAIR, FOUR, PAIR, 1),
    ],
    ids=lambda args: str(args[3:]),
)
def test_conv2d_operator_checks_its_arguments(args: tuple[Any, ...]) -> None:
    """csrc/ops does not rely on functional.py."""
    with pytest.raises(RuntimeError):
        OPS.conv2d(*args)


def test_conv2d_backward_checks_its_arguments() -> None:
    dz = torch.randn(2, 6, 6, 6)
    mask = [True, True, True]
    tail = (PAIR, FOUR, PAIR, 1, "none", False, mask)
    assert OPS.conv2d_backward(dz, X, W, None, *tail)[0].shape == X.shape
    for bad in (
        (dz[:, :, :5], X, W, None, *tail),
        (dz[:1], X, W, None, *tail),
        (dz[:, :5], X, W, None, *tail),
        (dz[0], X, W, None, *tail),
        (dz.double(), X, W, None, *tail),
        (dz, X[0], W, None, *tail),
        (dz, X, W[0], None, *tail),
        (dz, X, W[:, :3], None, *tail),
        (dz, X, W, dz, *tail),
        (dz, X, W, None, PAIR, FOUR, PAIR, 1, "relu", False, mask),
        (dz, X, W, dz[:1], PAIR, FOUR, PAIR, 1, "relu", False, mask),
        (dz, X, W, dz.double(), PAIR, FOUR, PAIR, 1, "relu", False, mask),
        (dz, X, W, None, [0, 1], FOUR, PAIR, 1, "none", False, mask),
        (dz, X, W, None, PAIR, FOUR, PAIR, 3, "none", False, mask),
        (dz, X, W, None, PAIR, FOUR, PAIR, 1, "none", False, [True]),
    ):
        with pytest.raises(RuntimeError):
            OPS.conv2d_backward(*bad)


def test_pool_backward_operators_check_their_arguments() -> None:
    window = ([2, 2], [2, 2], [0, 0], [1, 1])
    y, offsets = OPS.max_pool2d_with_offsets(X, *window)
    size = list(X.shape)
    assert OPS.select_pool2d_backward(y, offsets, size, *window, False).shape == X.shape
    for bad in (
        (y, offsets, [2, 4, 8], *window, False),
        (y, offsets, [2, 4, 80, 8], *window, False),
        (y, offsets, [2, 3, 8, 8], *window, False),
        (y, offsets, [2, 4, -8, 8], *window, False),
        (y, offsets[:1], size, *window, False),
        (y, offsets[0], size, *window, False),
        (y, offsets.float(), size, *window, False),
        (y, offsets.bool(), size, *window, False),
        (y[0], offsets[0], size, *window, False),
        (y, offsets, size, [2, 2], [0, 2], [0, 0], [1, 1], False),
        (y, offsets, size, [2, 2], [2, 2], [3, 0], [1, 1], False),
        (y, offsets, size, [2], [2, 2], [0, 0], [1, 1], False),
    ):
        with pytest.raises(RuntimeError):
            OPS.select_pool2d_backward(*bad)
    for bad in (
        (X, offsets[:1], *window),
        (X, offsets.float(), *window),
        (X[:, :2], offsets, *window),
        (X[0], offsets[0], *window),
        (X, offsets, [2, 2], [1, 1], [0, 0], [1, 1]),
    ):
        with pytest.raises(RuntimeError):
            OPS.select_pool2d_gather(*bad)
    average = ([2, 2], [2, 2], [0, 0], False, True, None, False)
    for bad in (
        (y, [2, 4, 8], *average),
        (y, [2, 4, 800, 8], *average),
        (y[0], size, *average),
        (y, size, [2, 2], [2, 2], [0, 0], False, True, 0, False),
        (y.long(), size, *average),
    ):
        with pytest.raises(RuntimeError):
            OPS.avg_pool2d_backward(*bad)


def test_forged_selections_reach_no_memory() -> None:
    """Offsets outside the window and indices outside the image: an error or nothing, no address."""
    code = """
import itertools, torch
ops = torch.ops.torchconv
import torchconv
for n, c, h, w in ((1, 1, 4, 4), (2, 19, 9, 10)):
    x = torch.randn(n, c, h, w)
    for channels_last, k, s, p, d in itertools.product(
        (False, True), ([2, 2], [3, 3]), ([1, 1], [2, 2]), ([0, 0], [1, 1]), ([1, 1], [2, 2])
    ):
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        for make in (ops.max_pool2d_with_offsets, ops.max_pool2d_with_indices):
            try:
                y, selected = make(x, k, s, p, d)
            except RuntimeError:
                continue
            values = (4, 9, 200, 255) if selected.dtype == torch.uint8 else (
                h * w, h * w + 7, -2, 2**31, 2**40, 2**61, -(2**63))
            for value in values:
                forged = torch.full_like(selected, value)
                for call in (
                    lambda: ops.select_pool2d_backward(
                        y, forged, list(x.shape), k, s, p, d, channels_last),
                    lambda: ops.select_pool2d_gather(x, forged, k, s, p, d),
                ):
                    try:
                        out = call()
                    except RuntimeError:
                        continue
                    assert out.isfinite().all()
print("alive")
"""
    assert "alive" in run(code)


# --- guard pages ---------------------------------------------------------------------------------

# A tensor that ends (or begins) where an unreadable page begins (or ends), as `guarded(t, at_end)`.
_GUARD = """
import ctypes, mmap, itertools, torch
import torchconv.functional as F
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE
torch.manual_seed(0)

def guarded(t, at_end):
    size = t.numel() * t.element_size()
    pages = -(-size // PAGE)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = libc.mmap(None, (pages + 2) * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert libc.mprotect(start, PAGE, 0) == 0
    assert libc.mprotect(start + (pages + 1) * PAGE, PAGE, 0) == 0
    address = start + (pages + 1) * PAGE - size if at_end else start + PAGE
    memory = (ctypes.c_char * size).from_address(address)
    flat = torch.frombuffer(memory, dtype=t.dtype)
    out = flat.as_strided(t.shape, t.stride())
    return out.copy_(t)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)
COMBINATIONS = list(itertools.product(DTYPES, FORMATS, (True, False)))
"""

_GUARDED_CONVOLUTIONS = """
for dtype, layout, at_end in COMBINATIONS:
    for (n, c, h, w), (k, r, s), kwargs in (
        ((1, 3, 7, 9), (5, 3, 3), dict(padding=1)),
        ((1, 3, 7, 9), (5, 3, 3), dict()),
        ((1, 17, 5, 5), (19, 1, 1), dict()),
        ((2, 8, 6, 33), (16, 3, 3), dict(padding=1, stride=2)),
        ((1, 16, 4, 17), (16, 1, 1), dict(stride=2)),
        ((1, 6, 9, 8), (6, 3, 3), dict(groups=6, padding=1)),
        ((1, 16, 9, 8), (16, 5, 5), dict(groups=16, padding=2, stride=2)),
        ((1, 8, 7, 6), (12, 3, 2), dict(groups=4, dilation=2)),
        ((1, 1, 28, 28), (6, 5, 5), dict(padding=2)),
        ((3, 2, 1, 1), (4, 3, 3), dict(padding=1)),
        ((2, 16, 5, 32), (16, 1, 3), dict(padding=(0, 1))),
        ((2, 16, 16, 9), (15, 5, 1), dict()),
        ((1, 5, 7, 7), (5, 7, 7), dict(groups=5, padding=3)),
        ((1, 37, 9, 8), (37, 3, 3), dict(groups=37, padding=1)),
        ((2, 515, 1, 1), (6, 1, 1), dict()),
    ):
        x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=layout)
        groups = kwargs.get("groups", 1)
        weight = torch.randn(k, c // groups, r, s).to(dtype).contiguous(memory_format=layout)
        b = torch.randn(k).to(dtype)
        leaves = [guarded(t, at_end).requires_grad_() for t in (x, weight, b)]
        z = F.conv2d(*leaves, **kwargs)
        assert torch.equal(z, F.conv2d(x, weight, b, **kwargs))
        dz = guarded(torch.randn(z.shape).to(dtype).contiguous(memory_format=layout), at_end)
        torch.autograd.grad(z, leaves, dz)
print("alive")
"""

_GUARDED_POOLINGS = """
for dtype, layout, at_end in COMBINATIONS:
    for size, args in (
        ((1, 3, 7, 9), (2,)),
        ((2, 1, 6, 33), (2, 2)),
        ((1, 17, 9, 8), (3, 2, 1)),
        ((1, 2, 5, 40), (3, 1, 1)),
        ((1, 33, 7, 7), (7,)),
        ((2, 1025, 15, 13), ((15, 13),)),
        ((2, 9, 11, 23), (3, 3)),
        ((1, 5, 9, 9), (5, 1, 2)),
        ((3, 4, 1, 1), (1,)),
        ((1, 1, 3, 3), ((3, 1), 1)),
    ):
        x = torch.randn(size).to(dtype).contiguous(memory_format=layout)
        for op in (F.max_pool2d, F.min_pool2d, F.avg_pool2d):
            leaf = guarded(x, at_end).requires_grad_()
            y = op(leaf, *args)
            assert torch.equal(y, op(x, *args))
            dy = guarded(torch.randn(y.shape).to(dtype).contiguous(memory_format=layout), at_end)
            torch.autograd.grad(y, leaf, dy)
            if op is not F.avg_pool2d:
                y, _ = op(leaf, *args, return_indices=True)
                torch.autograd.grad(y, leaf, dy)
print("alive")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mmap and mprotect are called as on Linux")
@pytest.mark.parametrize(
    "program", [_GUARDED_CONVOLUTIONS, _GUARDED_POOLINGS], ids=["conv", "pool"]
)
def test_nothing_is_read_outside_the_inputs(program: str) -> None:
    """Neither before the first nor past the last element, by either pass: vectors are wide."""
    assert "alive" in run(_GUARD + program)


def sparse_zeros(*size: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until somebody writes to them."""
    count = torch.Size(size).numel()
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(size)


def test_more_than_2_31_elements() -> None:
    """One plane of 2^31 and more, read at a stride: every offset into it needs 64 bits."""
    h, w, stride = 2**16 + 1, 2**15 + 65, 64
    x = sparse_zeros(1, 1, h, w, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[0, 0, -1, ::stride] = torch.arange(w // stride + 1).bfloat16() % 128
    x[0, 0, 2**15, 5 * stride] = -3
    sampled = x[..., ::stride, ::stride].float()
    weight = torch.full((2, 1, 1, 1), 2.0, dtype=torch.bfloat16, requires_grad=True)
    z = F.conv2d(x, weight, stride=stride)
    assert torch.equal(z.float(), (2 * sampled).expand(1, 2, -1, -1))
    dz = torch.zeros_like(z)
    dz[0, 1, -1, 9], dz[0, 0, 512, 5] = 1, 1
    (dw,) = torch.autograd.grad(z, weight, dz)
    assert dw.flatten().tolist() == [-3, 9]
    for op in (F.max_pool2d, F.min_pool2d):
        y, indices = op(x, 1, stride, return_indices=True)
        assert torch.equal(y.float(), sampled)
        assert int(indices[0, 0, -1, -1]) == (h - 1) * w + w // stride * stride
    assert torch.equal(F.avg_pool2d(x, 1, stride).float(), sampled)


_GROWTH = """
import os, torch, torchconv.functional as F
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def step(i):
    x = torch.randn(1, 8, 20 + i % 37, 21 + i % 41, requires_grad=True)
    w = torch.randn(8, 8, 1 + i % 4, 1 + i % 5, requires_grad=True)
    F.avg_pool2d(F.max_pool2d(F.conv2d(x, w, activation="silu"), 2), 2).sum().backward()
for i in range(100):
    step(i)
before = resident()
for i in range(100, 2100):
    step(i)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_memory_does_not_grow_with_new_shapes() -> None:
    """2000 shapes leave nothing behind: no primitive cache (pytorch#27971, #32037)."""
    assert int(run(_GROWTH)) < 16 * 2**20
