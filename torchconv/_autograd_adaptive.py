"""The derivatives of adaptive pooling, as ``torchconv.autograd`` has those of everything else.

The average is linear; so is the maximum once its indices are known. Each backward is an operator
whose own derivative is the forward (average) or the gather at the indices (maximum).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torchconv._dispatch import below_autograd, forward, may_have_tangents, operator, unrecorded
from torchconv._fake import is_channels_last

__all__ = [
    "AdaptiveAvgPool2dBackwardFunction",
    "AdaptiveAvgPool2dFunction",
    "AdaptiveMaxPool2dBackwardFunction",
    "AdaptiveMaxPool2dFunction",
    "AdaptiveMaxPool2dGatherFunction",
]

_ops = torch.ops.torchconv
_adaptive_avg_pool2d = operator("adaptive_avg_pool2d")
_adaptive_avg_pool2d_backward = operator("adaptive_avg_pool2d_backward")
_adaptive_max_pool2d = operator("adaptive_max_pool2d")
_adaptive_max_pool2d_backward = operator("adaptive_max_pool2d_backward")


class AdaptiveAvgPool2dFunction(Function):
    """Adaptive average pooling: linear, with adaptive_avg_pool2d_backward as its adjoint."""

    @staticmethod
    def forward(input: Tensor, output_size: Sequence[int]) -> Tensor:
        return forward(_adaptive_avg_pool2d, (input,), (output_size,))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.output_size = inputs
        ctx.input_size, ctx.channels_last = input.shape, is_channels_last(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        values = (ctx.input_size, ctx.channels_last)
        return unrecorded(_adaptive_avg_pool2d_backward, (grad,), values), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _ops.adaptive_avg_pool2d(tangents[0], ctx.output_size)


class AdaptiveAvgPool2dBackwardFunction(Function):
    """adaptive_avg_pool2d_backward: linear, with adaptive_avg_pool2d as its adjoint."""

    @staticmethod
    def forward(grad_output: Tensor, input_size: Sequence[int], channels_last: bool) -> Tensor:
        return below_autograd(
            _ops.adaptive_avg_pool2d_backward, grad_output, input_size, channels_last
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.output_size, ctx.arguments = inputs[0].shape[2:], inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _ops.adaptive_avg_pool2d(grad, ctx.output_size), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _ops.adaptive_avg_pool2d_backward(tangents[0], *ctx.arguments)


class AdaptiveMaxPool2dFunction(Function):
    """Adaptive max pooling. Returns y and int64 indices h*W + w, which alone backward needs."""

    @staticmethod
    def forward(input: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
        return forward(_adaptive_max_pool2d, (input,), (output_size,))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.input_size, ctx.channels_last = inputs[0].shape, is_channels_last(inputs[0])
        ctx.set_materialize_grads(False)  # which would fill zeros for the indices
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        if may_have_tangents():
            ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
        if grad is None:
            return None, None
        (indices,) = ctx.saved_tensors
        values = (ctx.input_size, ctx.channels_last)
        return unrecorded(_adaptive_max_pool2d_backward, (grad, indices), values), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        return _ops.adaptive_max_pool2d_gather(tangents[0], *ctx.saved_tensors), None


class AdaptiveMaxPool2dBackwardFunction(Function):
    """adaptive_max_pool2d_backward: linear, with adaptive_max_pool2d_gather as its adjoint."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return below_autograd(_ops.adaptive_max_pool2d_backward, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.arguments = inputs[2:]
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (_ops.adaptive_max_pool2d_gather(grad, *ctx.saved_tensors), *(None,) * 3)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (indices,) = ctx.saved_tensors
        return _ops.adaptive_max_pool2d_backward(tangents[0], indices, *ctx.arguments)


class AdaptiveMaxPool2dGatherFunction(Function):
    """adaptive_max_pool2d_gather: linear, with adaptive_max_pool2d_backward as its adjoint."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return below_autograd(_ops.adaptive_max_pool2d_gather, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, indices = inputs
        ctx.input_size, ctx.channels_last = input.shape, is_channels_last(input)
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (indices,) = ctx.saved_tensors
        dx = _ops.adaptive_max_pool2d_backward(grad, indices, ctx.input_size, ctx.channels_last)
        return dx, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _ops.adaptive_max_pool2d_gather(tangents[0], *ctx.saved_tensors)
