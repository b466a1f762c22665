"""`torchconv.explain`: what a convolution will run, and what it should take.

The library answers from the functions that choose the algorithms and cut the work; nothing of that
is repeated here. Times follow from a peak and a bandwidth, measured on this machine unless given:
of the GPU for tensors that lie there, else of the CPU.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchconv import _load, _peak
from torchconv._arguments import conv_arguments

__all__ = ["Explanation", "Pass", "explain"]


@dataclass(frozen=True)
class Pass:
    """One of fprop, dgrad and wgrad.

    Attributes:
        algorithm, blocking: what runs, and how the work is cut.
        otherwise: the algorithm that computes again what is infinite or NaN; may be empty.
        direct_operations: of the direct algorithm, two for a multiply-add.
        operations: of this algorithm.
        bytes: of input, weight and output, once each.
        floor, predicted: seconds of the direct operations, and of this algorithm's, at the peak, or
            of the bytes at the bandwidth where that is longer.
    """

    name: str
    algorithm: str
    otherwise: str
    blocking: str
    direct_operations: float
    operations: float
    bytes: float
    floor: float
    predicted: float


@dataclass(frozen=True)
class Explanation:
    """The passes of a convolution, with the peak and the bandwidth that their times assume.

    Attributes:
        peak: GFLOP/s; bandwidth: GB/s.
        measured: what of the two was measured on this machine: the rest was given.
    """

    problem: str
    passes: tuple[Pass, ...]
    peak: float
    bandwidth: float
    measured: tuple[str, ...]

    def __getitem__(self, name: str) -> Pass:
        for each in self.passes:
            if each.name == name:
                return each
        raise KeyError(name)

    def __str__(self) -> str:
        def source(name: str) -> str:
            return "measured" if name in self.measured else "given"

        lines = [
            self.problem,
            f"at {self.peak:.0f} GFLOP/s ({source('peak')}), "
            f"{self.bandwidth:.1f} GB/s ({source('bandwidth')})",
        ]
        for p in self.passes:
            again = f"; infinity and NaN: {p.otherwise}" if p.otherwise else ""
            lines += [
                f"{p.name}  {p.algorithm}{again}",
                f"       {p.blocking}",
                f"       {p.operations / 1e9:.3g} of {p.direct_operations / 1e9:.3g} GFLOP, "
                f"{p.bytes / 1e6:.3g} MB; floor {1e3 * p.floor:.3g} ms, "
                f"predicted {1e3 * p.predicted:.3g} ms",
            ]
        return "\n".join(lines)


def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    flip_kernel: bool = False,
    residual: Tensor | None = None,
    peak: float | None = None,
    bandwidth: float | None = None,
) -> Explanation:
    """What :func:`torchconv.functional.conv2d` and its backward run for these arguments.

    Reads sizes, strides and dtypes only, so that tensors on the meta device serve as well.

    Args:
        input ... residual: as for conv2d; bias, activation and residual change no choice on a CPU.
            What is said of a GPU is for no activation and no residual.
        peak: GFLOP/s of this dtype, for the floor and the predicted time; None measures that of
            multiply-adds in registers, with the current number of threads; on a GPU that of a
            matrix product, under the TF32 switch of those, which is not convolution's.
        bandwidth: GB/s of memory; None measures that of a copy.

    Returns:
        An `Explanation`: `print` it, or take a pass of it, as in ``explain(x, w)["dgrad"]``.

    Raises:
        What conv2d raises; RuntimeError for an empty batch, NotImplementedError for integers.
    """
    if isinstance(input, Tensor) and not input.is_floating_point():
        raise NotImplementedError(f'torchconv "explain" not implemented for {input.dtype}')
    strides, pads, dilations, count, _, flip = conv_arguments(
        *(input, weight, bias, stride, padding, dilation, groups, activation, flip_kernel),
        residual,
    )
    if input.device.type != "cuda":
        _load.load()  # as tensors on the meta device do not
    image = input if input.dim() == 4 else input.unsqueeze(0)
    text: str = torch.ops.torchconv.explain_conv2d(
        image.detach(), weight.detach(), strides, pads, dilations, count, flip
    )
    measured = []
    device = input.device if input.device.type == "cuda" else torch.device("cpu")
    if peak is None:
        peak = _rate(input.dtype, device, torch.get_num_threads())
        measured.append("peak")
    if bandwidth is None:
        bandwidth = _bandwidth(device, torch.get_num_threads())
        measured.append("bandwidth")
    passes = []
    for line in text.splitlines():
        name, algorithm, otherwise, blocking, *counts = line.split("\t")
        direct, operations, moved = map(float, counts)
        floor, predicted = (
            max(each / peak, moved / bandwidth) / 1e9 for each in (direct, operations)
        )
        described = (name, algorithm, otherwise, blocking)
        passes.append(Pass(*described, direct, operations, moved, floor, predicted))
    layout = " channels_last" if image.is_contiguous(memory_format=torch.channels_last) else ""
    problem = (
        f"{'x'.join(map(str, image.shape))}{layout} by {'x'.join(map(str, weight.shape))} "
        f"{str(input.dtype).removeprefix('torch.')}, stride {strides}, padding {pads}, "
        f"dilation {dilations}, groups {count}"
    )
    return Explanation(problem, tuple(passes), peak, bandwidth, tuple(measured))


def _best(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of a few calls."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    return min(timed() for _ in range(4))


@functools.cache
def _rate(dtype: torch.dtype, device: torch.device, threads: int) -> float:
    """GFLOP/s of multiply-adds in registers, or on a GPU of a matrix product."""
    if device.type == "cpu":
        return _peak.peak(dtype, threads)
    size = 8192
    a = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)
    with torch.no_grad():
        return 2 * size**3 / _best(lambda: torch.mm(a, a, out=out), device) / 1e9


@functools.cache
def _bandwidth(device: torch.device, threads: int) -> float:
    """GB/s of a copy larger than the caches, bytes read and bytes written."""
    source = torch.ones((256 if device.type == "cuda" else 16) << 20, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device) / 1e9
