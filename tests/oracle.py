"""torch.nn.functional as it computes on the CPU, for tensors of any device.

What torchconv promises is compared with PyTorch's CPU kernels on every device: those of a GPU lack
integers, round half types more, and give some results in other memory formats. Tensors go to the
CPU and back with their strides, and gradients follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


class _Move(torch.autograd.Function):
    """A copy on another device, in the very same strides; of the gradient likewise."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, device: torch.device) -> Tensor:
        ctx.device = t.device
        return moved(t, device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Move.apply(grad, ctx.device), None


def moved(t: Tensor, device: torch.device) -> Tensor:
    """t's values on another device. Strides that are not dense stay what they are too."""
    if any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True)):
        return t.to(device)
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)


def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        devices = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        devices.discard(torch.device("cpu"))
        if len(devices) != 1 or devices == {torch.device("meta")}:
            return function(*args, **kwargs)
        [device], cpu = devices, torch.device("cpu")
        args, kwargs = tree_map_only(Tensor, lambda t: _Move.apply(t, cpu), (args, kwargs))
        return tree_map_only(Tensor, lambda t: _Move.apply(t, device), function(*args, **kwargs))

    return call


class _Functional:
    def __getattr__(self, name: str) -> Any:
        found = getattr(torch.nn.functional, name)
        return on_cpu(found) if callable(found) and not isinstance(found, type) else found


torch_F = _Functional()
