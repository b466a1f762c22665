"""Times calls with next to nothing to compute: what dispatch and set-up take.

    python -m benchmarks.calls

The image is a pixel of one channel, or 8 x 8 of 8 channels, with one thread. PyTorch's own call is
the yardstick. A sample is the mean of many calls in a row, as the clock is too coarse for one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchconv
from benchmarks import machine, report
from benchmarks.run import RESULTS
from benchmarks.timing import Timing, interleave

LIMIT = 8.0  # us, of a forward call of a convolution that computes next to nothing
CALLS = 100  # in one sample
SIZES = {"1x1 of a pixel": (1, 1, 1), "3x3 of 8x8 pixels": (8, 8, 3)}  # C = K, H = W, R = S

Call = Callable[..., Any]
# What is called, the pass, whether autograd records it, and the calls of torchconv and of torch.
Case = tuple[str, str, bool, list[Call]]


def bound(function: Call, *args: Any) -> Call:
    return lambda: function(*args)


def gradients(call: Call, leaves: Sequence[Tensor], dy: Tensor) -> Call:
    return lambda: torch.autograd.grad(call(), leaves, dy)


def cases(channels: int, size: int, kernel: int) -> Iterator[Case]:
    padding = kernel // 2
    x = torch.randn(1, channels, size, size)
    kinds: list[Any] = [torchconv.nn.Conv2d, torch.nn.Conv2d]
    layers = [kind(channels, channels, kernel, padding=padding) for kind in kinds]
    layers[1].load_state_dict(layers[0].state_dict())
    weight, bias = layers[0].parameters()
    leaves = (x.clone().requires_grad_(), weight, bias)
    functions: list[Call] = [torchconv.functional.conv2d, torch.nn.functional.conv2d]
    plain = [bound(f, x, weight, bias, 1, padding) for f in functions]
    recorded = [bound(f, *leaves, 1, padding) for f in functions]
    yield "conv2d", "forward", False, plain
    yield "conv2d", "forward, recorded", True, recorded
    yield "conv2d", "forward+backward", True, [gradients(call, leaves, x) for call in recorded]
    calls = [bound(layer, x) for layer in layers]
    yield "Conv2d", "forward", False, calls
    of_layers = [
        gradients(call, tuple(layer.parameters()), x)
        for call, layer in zip(calls, layers, strict=True)
    ]
    yield "Conv2d", "forward+backward", True, of_layers
    for layer in layers:
        layer.eval()
    yield "Conv2d in eval mode", "forward", False, calls
    image = torch.randn(1, channels, 2 * size, 2 * size)
    leaf = image.clone().requires_grad_()
    for name in ("max_pool2d", "avg_pool2d"):
        pools = [getattr(torchconv.functional, name), getattr(torch.nn.functional, name)]
        yield name, "forward", False, [bound(pool, image, 2) for pool in pools]
        both = [gradients(bound(pool, leaf, 2), (leaf,), x) for pool in pools]
        yield name, "forward+backward", True, both


def repeated(call: Call) -> Call:
    def calls() -> None:
        for _ in range(CALLS):
            call()

    return calls


def of_one(timing: Timing) -> Timing:
    """From that of CALLS calls."""
    return replace(
        timing,
        median=timing.median / CALLS,
        first_quartile=timing.first_quartile / CALLS,
        third_quartile=timing.third_quartile / CALLS,
    )


def measure(budget: float) -> list[report.Result]:
    results = []
    for problem, sizes in SIZES.items():
        for what, pass_name, recorded, calls in cases(*sizes):
            with torch.set_grad_enabled(recorded):
                timings = interleave([repeated(call) for call in calls], budget)
            ours, peer = map(of_one, timings)
            extra = {"torchconv us": ours.median * 1e6, "torch us": peer.median * 1e6}
            if pass_name == "forward" and what.startswith(("conv", "Conv")):
                extra["limit us"] = LIMIT
            row = report.Result("calls", what, "call", "float32", problem, pass_name, ours, peer)
            results.append(replace(row, extra=extra))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calls", description="Time calls that compute next to nothing."
    )
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each row")
    parser.add_argument(
        "--output",
        type=Path,
        help="where to write, without suffix (default: in benchmarks/results)",
    )
    options = parser.parse_args(arguments)
    load = machine.warn_if_busy()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = measure(options.budget)
        described = machine.describe()
    finally:
        torch.set_num_threads(threads)
    summary = report.Report(
        title="Calls that compute next to nothing, one thread",
        peer="torch",
        machine={**described, "load before": load},
        results=results,
        columns=["torchconv us", "torch us", "limit us"],
    )
    report.publish(summary, options.output or RESULTS / "calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
