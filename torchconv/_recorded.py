"""What autograd records of plain calls: the Functions of torchconv.autograd, made lean.

On small images Python's part of a recorded call takes longer than the kernel. Nothing transforms,
traces or watches a plain call (torchconv/_dispatch.py), so its Function needs no tangents and no
arguments one by one: it takes the short way at once, and returns y alone, without what only
backward needs. Backward, which may be watched or differentiated, is that of the operator's
Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchconv._dispatch import Operator, operator, unrecorded
from torchconv._fake import is_channels_last
from torchconv._single_level import SingleLevelFunction
from torchconv._wanted import wanted_gradients
from torchconv.autograd import NEEDS_PREACTIVATION, conv2d_gradients, saved_for_derivative

__all__ = ["RECORDED"]

_conv2d = operator("conv2d")
_conv2d_with_preactivation = operator("conv2d_with_preactivation")


class _Conv2d(SingleLevelFunction):
    """``conv2d``, with the settings of the call last."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        values: tuple[Any, ...],
    ) -> Tensor:
        activation = values[4]
        z = None
        if activation in NEEDS_PREACTIVATION:
            op = _conv2d_with_preactivation
            y, z = op.call(input, weight, bias, residual, op.settings(values))
        else:
            y = _conv2d.call(input, weight, bias, residual, _conv2d.settings(values))
            bias = residual = None  # which only computing z again would need
        ctx.set_materialize_grads(False)
        ctx.values = values
        ctx.save_for_backward(input, weight, saved_for_derivative(activation, y, z), bias, residual)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        *mask, of_residual, _ = wanted_gradients(ctx)
        return (
            *conv2d_gradients(ctx.saved_tensors, ctx.values, grad, tuple(mask), of_residual),
            None,
        )


class _Pool2d(SingleLevelFunction):
    """A pooling of the input by `op`, whose second result, where it has one, is what it selected.

    Of the arguments of the pooling, backward_op takes the first `taken`.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, op: Operator, backward_op: Operator, taken: int, values: Any
    ) -> Tensor:
        y = op.call(input, op.settings(values))
        ctx.set_materialize_grads(False)
        ctx.op = backward_op
        ctx.values = (input.shape, *values[:taken], is_channels_last(input))
        if type(y) is tuple:
            y, selected = y
            ctx.save_for_backward(selected)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        dx = None
        if grad is not None:
            dx = unrecorded(ctx.op, (grad, *ctx.saved_tensors), ctx.values)
        return dx, None, None, None, None


def _pool2d(name: str, op_name: str, backward_name: str, taken: int) -> Callable[..., Tensor]:
    op, backward_op = operator(op_name), operator(backward_name)
    named: Any = type(name, (_Pool2d,), {})
    apply = named.apply
    return lambda input, values: apply(input, op, backward_op, taken, values)


def _conv2d_applier() -> Callable[..., Tensor]:
    """Named as the Functions of the operators are, for who looks at grad_fn."""
    plain: Any = type("Conv2dFunction", (_Conv2d,), {})
    activated: Any = type("Conv2dWithPreactivationFunction", (_Conv2d,), {})

    def apply(*arguments: Any) -> Tensor:
        activation = arguments[-1][4]
        y: Tensor = (activated if activation in NEEDS_PREACTIVATION else plain).apply(*arguments)
        return y

    return apply


# By operator: its tensors and the tuple of what is none give y.
RECORDED: dict[str, Callable[..., Tensor]] = {
    "conv2d": _conv2d_applier(),
    "max_pool2d": _pool2d(
        "MaxPool2dFunction", "max_pool2d_with_offsets", "select_pool2d_backward", 4
    ),
    "min_pool2d": _pool2d(
        "MinPool2dFunction", "min_pool2d_with_offsets", "select_pool2d_backward", 4
    ),
    "avg_pool2d": _pool2d("AvgPool2dFunction", "avg_pool2d", "avg_pool2d_backward", 6),
    "adaptive_avg_pool2d": _pool2d(
        "AdaptiveAvgPool2dFunction", "adaptive_avg_pool2d", "adaptive_avg_pool2d_backward", 0
    ),
    "adaptive_max_pool2d_values": _pool2d(
        "AdaptiveMaxPool2dFunction", "adaptive_max_pool2d", "adaptive_max_pool2d_backward", 0
    ),
}
