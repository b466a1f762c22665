"""Arguments in the normal form, for every operator of torch.ops.torchconv."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import torchconv  # noqa: F401  registers the operators
from conftest import in_layout

OPS = torch.ops.torchconv
FORMATS = ("contiguous", "channels_last")
ACTIVATIONS = ("relu", "relu6", "sigmoid", "tanh", "silu", "hardswish", "gelu")

OPERATORS = (
    "conv2d",
    "conv2d_with_preactivation",
    "conv2d_backward",
    "max_pool2d",
    "min_pool2d",
    "max_pool2d_with_offsets",
    "min_pool2d_with_offsets",
    "max_pool2d_with_indices",
    "min_pool2d_with_indices",
    "select_pool2d_backward",
    "select_pool2d_gather",
    "avg_pool2d",
    "avg_pool2d_backward",
)

# input, weight, (stride, padding as left right top bottom, dilation, groups)
CONVOLUTIONS = (
    ((2, 3, 5, 6), (4, 3, 3, 3), ([1, 1], [0, 0, 0, 0], [1, 1], 1)),
    ((2, 4, 7, 6), (6, 2, 3, 2), ([2, 1], [1, 0, 2, 1], [1, 2], 2)),
    ((1, 3, 6, 6), (6, 1, 3, 3), ([2, 2], [1, 1, 1, 1], [1, 1], 3)),
    ((2, 5, 4, 3), (2, 5, 1, 1), ([1, 1], [0, 0, 0, 0], [1, 1], 1)),
)
# input, (kernel_size, stride, padding, dilation, ceil_mode)
POOLINGS = (
    ((2, 3, 6, 5), ([2, 2], [2, 2], [0, 0], [1, 1], False)),
    ((2, 2, 7, 8), ([3, 2], [2, 1], [1, 0], [1, 2], True)),
    ((1, 2, 1, 5), ([2, 2], [1, 1], [1, 1], [2, 2], False)),  # windows with no valid element
)
# input, (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
AVERAGES = (
    ((2, 3, 6, 5), ([2, 2], [2, 2], [0, 0], False, True, None)),
    ((2, 2, 7, 8), ([3, 4], [2, 3], [1, 2], True, False, None)),
    ((1, 2, 5, 6), ([3, 2], [1, 1], [1, 0], False, True, 5)),
)


def distinct(*size: int) -> Tensor:
    """Values that no small step makes equal: a selection is differentiable only there."""
    count = torch.Size(size).numel()
    return torch.randperm(count).view(size).double() / 4


def samples(
    name: str, layout: str, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[Any, ...]]:
    """An operator's arguments; every tensor that can have a gradient asks for one."""

    def leaf(t: Tensor) -> Tensor:
        laid = in_layout(t, layout) if t.dim() == 4 else t
        return laid.detach().to(dtype).requires_grad_()

    if name.startswith("conv2d"):
        for (x_size, w_size, geometry), activation, flip in zip(
            CONVOLUTIONS * 2, ("none", *ACTIVATIONS), itertools.cycle((False, True)), strict=False
        ):
            x, w, b = (leaf(torch.randn(s)) for s in (x_size, w_size, w_size[:1]))
            y, z = OPS.conv2d_with_preactivation(
                x.detach(), w.detach(), b.detach(), *geometry, activation, flip
            )
            if name != "conv2d_backward":
                yield (x, w, b, *geometry, activation, flip)
                yield (x, w, None, *geometry, activation, flip)
                yield (x, w, b, *geometry, activation, flip, leaf(torch.randn_like(y)))
                continue
            by_output = activation in ("relu", "relu6", "sigmoid", "tanh")
            saved = None if activation == "none" else y if by_output else z
            for mask in ([True, True, True], [False, True, False]):
                yield (leaf(torch.randn_like(y)), x, w, saved, *geometry, activation, flip, mask)
    elif name.startswith("avg"):
        for size, arguments in AVERAGES:
            x = leaf(torch.randn(size))
            if name == "avg_pool2d":
                yield (x, *arguments)
            else:
                dy = leaf(torch.randn_like(OPS.avg_pool2d(x.detach(), *arguments)))
                yield (dy, list(size), *arguments, layout == "channels_last")
    else:
        for size, arguments in POOLINGS:
            x = leaf(distinct(*size))
            if not name.startswith("select"):
                yield (x, *arguments)
                continue
            for op in (OPS.max_pool2d_with_offsets, OPS.min_pool2d_with_indices):
                y, selected = op(x.detach(), *arguments)
                if name == "select_pool2d_gather":
                    yield (x, selected, *arguments[:4])
                else:
                    dy = leaf(torch.randn_like(y))
                    channels_last = layout == "channels_last"
                    yield (dy, selected, list(size), *arguments[:4], channels_last)
