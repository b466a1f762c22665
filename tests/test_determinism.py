"""The same bits: on every run, for every number of threads, for a sample alone or in its batch.

Sums are split by the shape of the problem and never by the number of threads, and the algorithm is
chosen by the shape of one sample, so nothing here needs a tolerance.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import torchconv.functional as F
from conftest import in_layout, threads

FORMATS = ("contiguous", "channels_last")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

# name: input size, weight size, arguments
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((5, 16, 20, 21), (24, 16, 3, 3), {"padding": 1}),
    "3x3_s2": ((4, 19, 17, 18), (13, 19, 3, 3), {"padding": 1, "stride": 2}),
    "1x1": ((5, 64, 14, 14), (48, 64, 1, 1), {}),
    "1x1_deep": ((3, 700, 7, 7), (32, 700, 1, 1), {}),
    "1x1_panels": ((3, 300, 14, 14), (90, 300, 1, 1), {}),
    "1x1_half_vectors": ((3, 120, 14, 14), (104, 120, 1, 1), {}),
    "1x1_chunks": ((10, 2100, 7, 7), (150, 2100, 1, 1), {}),
    "1x1_s2": ((3, 40, 15, 16), (520, 40, 1, 1), {"stride": 2}),
    "patches": ((3, 3, 34, 33), (48, 3, 4, 4), {"stride": 4}),
    "one_pixel": ((5, 700, 1, 1), (48, 700, 1, 1), {}),
    "one_pixel_shallow": ((5, 100, 1, 1), (75, 100, 1, 1), {}),
    "5x5": ((5, 19, 13, 14), (24, 19, 5, 5), {"padding": 2}),
    "5x5_deep": ((3, 260, 7, 7), (70, 260, 5, 5), {"padding": 2}),
    "5x5_lenet": ((33, 1, 28, 28), (6, 1, 5, 5), {"padding": 2}),
    "7x7_stem": ((3, 3, 50, 50), (16, 3, 7, 7), {"stride": 2, "padding": 3}),
    "depthwise": ((5, 40, 19, 18), (40, 1, 3, 3), {"groups": 40, "padding": 1}),
    "grouped": ((4, 32, 12, 13), (32, 4, 3, 3), {"groups": 8, "padding": 1}),
    "dilated": ((3, 8, 20, 20), (8, 8, 3, 3), {"dilation": 3, "padding": 3}),
    "3x3_deep": ((2, 256, 7, 7), (64, 256, 3, 3), {"padding": 1}),
}
POOLINGS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    f"{op}_{name}": (op, size, kwargs)
    for op in ("max_pool2d", "min_pool2d", "avg_pool2d")
    for name, size, kwargs in (
        ("2x2", (5, 19, 30, 31), {"kernel_size": 2}),
        ("3x3_s2", (4, 16, 29, 30), {"kernel_size": 3, "stride": 2, "padding": 1}),
        ("5x5_s1", (3, 8, 24, 24), {"kernel_size": 5, "stride": 1, "padding": 2}),
        ("global", (6, 70, 7, 7), {"kernel_size": 7}),
        ("global_channels", (1, 48, 64, 64), {"kernel_size": 64}),
        ("global_halves", (3, 130, 61, 40), {"kernel_size": (61, 40)}),
        ("global_halves_deep", (3, 600, 21, 27), {"kernel_size": (21, 27)}),
    )
}
PROBLEMS = [*CONVOLUTIONS, *POOLINGS]

on_problems = pytest.mark.parametrize("problem", PROBLEMS)
on_formats = pytest.mark.parametrize("layout", FORMATS)
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def inputs(problem: str, layout: str, dtype: torch.dtype) -> list[Tensor]:
    if problem in POOLINGS:
        return [in_layout(torch.randn(POOLINGS[problem][1]).to(dtype), layout)]
    x_size, w_size, _ = CONVOLUTIONS[problem]
    w = torch.randn(w_size).to(dtype)
    x, b = torch.randn(x_size).to(dtype), torch.randn(w_size[0]).to(dtype)
    return [in_layout(x, layout), in_layout(w, layout), b]


def forward(problem: str, tensors: list[Tensor]) -> Tensor:
    if problem in POOLINGS:
        op, _, kwargs = POOLINGS[problem]
        return getattr(F, op)(*tensors, **kwargs)
    return F.conv2d(*tensors, **CONVOLUTIONS[problem][2], activation="gelu")


def both(problem: str, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = forward(problem, leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@on_formats
@on_dtypes
@on_problems
def test_threads_and_repetition(problem: str, dtype: torch.dtype, layout: str) -> None:
    """1, 2 and 3 threads, and the same call again."""
    tensors = inputs(problem, layout, dtype)
    dy = torch.randn(forward(problem, tensors).shape).to(dtype)
    with threads(1):
        first, again = both(problem, tensors, dy), both(problem, tensors, dy)
    results = [again]
    for count in (2, 3):
        with threads(count):
            results.append(both(problem, tensors, dy))
    for result in results:
        for got, expected in zip(result, first, strict=True):
            assert torch.equal(got, expected)


@on_formats
@on_dtypes
@on_problems
def test_a_sample_alone_and_in_its_batch(problem: str, dtype: torch.dtype, layout: str) -> None:
    """Forward and the gradient of the input: pytorch#134908."""
    x, *rest = inputs(problem, layout, dtype)
    dy = torch.randn(forward(problem, [x, *rest]).shape).to(dtype)
    y, dx, *_ = both(problem, [x, *rest], dy)
    for n in (0, x.shape[0] - 1):
        alone = in_layout(x[n : n + 1], layout)
        y_alone, dx_alone, *_ = both(problem, [alone, *rest], dy[n : n + 1])
        assert torch.equal(y_alone[0], y[n])
        assert torch.equal(dx_alone[0], dx[n])
        if layout == "contiguous":  # without a batch there is no channels_last
            assert torch.equal(forward(problem, [x[n], *rest]), y[n])


@on_dtypes
@on_problems
def test_wherever_it_lies_in_memory(problem: str, dtype: torch.dtype) -> None:
    """An address that is not aligned, or a gap between rows, changes no bit."""
    tensors = inputs(problem, "contiguous", dtype)
    y = forward(problem, tensors)
    for layout in ("offset", "sliced", "transposed"):
        moved = [in_layout(t, layout) if t.dim() == 4 else t for t in tensors]
        assert torch.equal(forward(problem, moved), y)


_PROGRAM = """
import hashlib, torch, torchconv.functional as F
torch.manual_seed(0)
digest = hashlib.sha256()
for size in ((4, 16, 20, 20), (2, 64, 9, 9)):
    x = torch.randn(size, requires_grad=True)
    w = torch.randn(24, size[1], 3, 3, requires_grad=True)
    y = F.avg_pool2d(F.max_pool2d(F.conv2d(x, w, padding=1, activation="silu"), 3, 2), 2, 1)
    for t in (y, *torch.autograd.grad(y.square().sum(), (x, w))):
        digest.update(t.detach().contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def test_outputs_that_are_written_past_the_caches() -> None:
    """Of grouped convolution, whose batch has enough of them and whose sample has not."""
    x = in_layout(torch.randn(3, 32, 153, 152), "channels_last")
    w, b = torch.randn(32, 4, 3, 3), torch.randn(32)
    z, alone = (F.conv2d(t, w, b, padding=1, groups=8, activation="relu") for t in (x, x[2:]))
    assert torch.equal(z[2], alone[0])


@on_formats
@on_dtypes
@pytest.mark.parametrize("kernel_size", [2, 4, 12])
def test_sign_of_an_average_s_gradient(kernel_size: int, dtype: torch.dtype, layout: str) -> None:
    """It is a sum that begins at 0, in all of the kernels, one of which the batch chooses."""
    x = in_layout(torch.randn(2, 5, 12, 12, dtype=dtype), layout).requires_grad_()
    y = F.avg_pool2d(x, kernel_size)
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, -0.0))
    assert torch.equal(dx, torch.zeros_like(dx)) and not dx.signbit().any()


def test_every_process_gives_the_same_bits() -> None:
    """Fresh processes, each with another number of OpenMP threads."""
    digests = set()
    for count in ("1", "3"):
        environment = {**os.environ, "OMP_NUM_THREADS": count}
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
            env=environment,
        )
        digests.add(done.stdout)
    assert len(digests) == 1
