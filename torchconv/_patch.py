"""`torchconv.patch`: run F.conv2d, F.batch_norm and the functions of 2D pooling through torchconv.

For models that call functions, or subclass layers, where `torchconv.convert` finds no layer to
swap. It is a TorchFunctionMode: PyTorch shows it every call of its functions made by this thread
inside the `with`, under every name and spelling, and torch.compile traces through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchconv import functional
from torchconv._coverage import (
    covers_adaptive_pool,
    covers_avg_pool,
    covers_conv,
    covers_select_pool,
)

__all__ = ["patch"]


class patch(TorchFunctionMode):
    """Context manager: inside, every call of F.conv2d, F.batch_norm, F.max_pool2d, F.avg_pool2d,
    F.adaptive_max_pool2d and F.adaptive_avg_pool2d that torchconv has a kernel for runs through
    torchconv, whether a module or plain code makes it.

    Also covered are their other names: torch.conv2d, torch.batch_norm, torch.max_pool2d, the
    ..._with_indices of F and those of torch._C._nn. Not covered are operators called as
    torch.ops.aten.*, and functions like F.lp_pool2d that PyTorch shows to a mode as a whole.
    Calls on integers and complex numbers, quantized, sparse or mkldnn tensors, tensor subclasses
    and devices without a torchconv kernel go on to PyTorch unchanged.

    It nests, and holds for the current thread only. A backward pass uses what its forward pass
    used, inside or outside the `with`. Code under torch.utils.checkpoint runs again in backward,
    where PyTorch has no mode on: open the `with` inside the function that is checkpointed.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        ours = _OURS.get(func)
        if ours is not None:
            result = ours(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


# Each takes the arguments of the functions that it stands for, names those that it looks at, and
# returns NotImplemented for a call that is PyTorch's.


def _conv2d(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    if not covers_conv(input, weight, bias):
        return NotImplemented
    return functional.conv2d(input, weight, bias, *args, **kwargs)


def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not isinstance(input, torch.Tensor):
        return NotImplemented
    # Which asks by itself what is covered.
    return functional.batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps
    )


def _torch_batch_norm(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    # What F.batch_norm refuses, this does not.
    if not isinstance(input, torch.Tensor) or input.dim() != 4 or eps <= 0:
        return NotImplemented
    if training and input.numel() <= input.shape[1]:
        return NotImplemented
    return functional.batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps
    )


def _max_pool2d(input: Any, *args: Any, **kwargs: Any) -> Any:
    if not covers_select_pool(input):
        return NotImplemented
    return functional.max_pool2d(input, *args, **kwargs)


def _max_pool2d_with_indices(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = True,  # ignored in PyTorch too
    *,
    out: Any = None,
) -> Any:
    if out is not None or not covers_select_pool(input):
        return NotImplemented
    return functional.max_pool2d(
        input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True
    )


def _avg_pool2d(input: Any, *args: Any, out: Any = None, **kwargs: Any) -> Any:
    if out is not None or not covers_avg_pool(input):
        return NotImplemented
    return functional.avg_pool2d(input, *args, **kwargs)


def _adaptive_avg_pool2d(input: Any, output_size: Any, *, out: Any = None) -> Any:
    if out is not None or not covers_adaptive_pool(input):
        return NotImplemented
    return functional.adaptive_avg_pool2d(input, output_size)


def _adaptive_max_pool2d(input: Any, output_size: Any, return_indices: bool = False) -> Any:
    if not covers_adaptive_pool(input):
        return NotImplemented
    return functional.adaptive_max_pool2d(input, output_size, return_indices)


def _adaptive_max_pool2d_with_indices(
    input: Any,
    output_size: Any,
    return_indices: bool = True,  # ignored in PyTorch too
    *,
    out: Any = None,
) -> Any:
    if out is not None or not covers_adaptive_pool(input):
        return NotImplemented
    return functional.adaptive_max_pool2d(input, output_size, return_indices=True)


_OURS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    F.max_pool2d_with_indices: _max_pool2d_with_indices,
    torch._C._nn.max_pool2d_with_indices: _max_pool2d_with_indices,
    torch._C._nn.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    torch._C._nn.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    F.adaptive_max_pool2d: _adaptive_max_pool2d,
    F.adaptive_max_pool2d_with_indices: _adaptive_max_pool2d_with_indices,
    torch._C._nn.adaptive_max_pool2d: _adaptive_max_pool2d_with_indices,
}
