"""Some calls of every operator on small sizes, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python -m tools.sanitizer_calls

Sizes leave remainders in every tile. Inputs are made on the CPU, so that few kernels but ours run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torchconv import functional

# input, weight, then stride, padding, dilation, groups
CONVOLUTIONS = (
    ((2, 16, 13, 11), (24, 16, 3, 3), (1, 1, 1, 1)),  # tensor cores
    ((1, 64, 14, 14), (72, 64, 3, 3), (2, 1, 1, 1)),
    ((2, 32, 9, 9), (40, 32, 1, 1), (1, 0, 1, 1)),
    ((2, 3, 17, 15), (10, 3, 5, 3), (2, 2, 1, 1)),  # odd channels
    ((2, 12, 15, 14), (12, 1, 3, 3), (1, 1, 1, 12)),  # depthwise
    ((1, 24, 16, 19), (24, 1, 5, 5), (2, 2, 1, 24)),
    ((2, 5, 12, 13), (10, 1, 3, 3), (1, 2, 2, 5)),
    ((2, 32, 10, 11), (32, 4, 3, 3), (1, 1, 1, 8)),  # grouped
    ((1, 18, 9, 9), (12, 9, 3, 3), (2, 1, 1, 2)),
)
POOLINGS: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("max_pool2d", (3, 2, 1)),
    ("max_pool2d", (2, 2)),
    ("min_pool2d", ((3, 2), (1, 2), (1, 0))),
    ("avg_pool2d", (3, 1, 1)),
    ("avg_pool2d", (2, 2)),
    ("avg_pool2d", ((13, 11), 1)),
    ("adaptive_avg_pool2d", (1,)),
    ("adaptive_avg_pool2d", ((5, 4),)),
    ("adaptive_max_pool2d", ((3, 7),)),
)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def convolutions(device: str, dtype: torch.dtype) -> Iterator[Callable[[], Tensor]]:
    for x_size, w_size, geometry in CONVOLUTIONS:
        for layout in LAYOUTS:
            x, w = (
                torch.randn(size).to(dtype).contiguous(memory_format=layout).to(device)
                for size in (x_size, w_size)
            )
            b = torch.randn(w_size[0]).to(device, dtype)
            leaves = tuple(t.requires_grad_() for t in (x, w, b))

            def call(
                leaves: tuple[Tensor, ...] = leaves, geometry: tuple[int, ...] = geometry
            ) -> Tensor:
                x, w, b = leaves
                y = functional.conv2d(x, w, b, *geometry, activation="relu")
                torch.autograd.grad(y, leaves, y.detach())
                return y

            yield call


def poolings(device: str, dtype: torch.dtype) -> Iterator[Callable[[], Tensor]]:
    for name, arguments in POOLINGS:
        for size in ((2, 16, 13, 11), (1, 3, 13, 11)):
            for layout in LAYOUTS:
                x = torch.randn(size).to(dtype).contiguous(memory_format=layout).to(device)
                x.requires_grad_()

                def call(
                    name: str = name, arguments: tuple[object, ...] = arguments, x: Tensor = x
                ) -> Tensor:
                    y: Tensor = getattr(functional, name)(x, *arguments)
                    torch.autograd.grad(y, x, y.detach())
                    return y

                yield call


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.sanitizer_calls")
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    count = 0
    for dtype in (torch.float32, torch.float16):
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            torch.backends.cudnn.allow_tf32 = tf32
            for call in convolutions(device, dtype):
                assert call().detach().cpu().isfinite().all()
                count += 1
        for call in poolings(device, dtype):
            assert call().detach().cpu().isfinite().all()
            count += 1
    print(f"{count} calls")


if __name__ == "__main__":
    main()
